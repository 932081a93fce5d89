"""Which backend runs and why: every reason in words, no silent change, no failed run."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from pack_loader import load
from support.data.blocks import blocks_of, reference, tensors

ops, dispatch, support = (
    load(f".kernels.{name}") for name in ("ops", "dispatch", "triton_support")
)
Cause, Operands = support.Cause, support.Operands
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has a GPU of some kind, with some Triton installed."""

    def pretend(major=9, minor=0, triton="3.6.0", hip=None):
        support.not_installed.cache_clear()
        support._gpu_obstacle.cache_clear()
        properties = SimpleNamespace(
            name="a GPU", major=major, minor=minor, gcnArchName=f"{hip}:sramecc+"
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: triton and object())
        monkeypatch.setattr(support.metadata, "version", lambda name: triton)

    yield pretend
    support.not_installed.cache_clear()
    support._gpu_obstacle.cache_clear()


def why(dtype=torch.bfloat16, head_dim=128, blocks=(64, 64), device=GPU):
    return support.obstacle(Operands(device, dtype, head_dim, blocks))


@pytest.mark.parametrize(
    "machine", [dict(major=8), dict(major=8, minor=9), dict(major=12), dict(hip="gfx942")]
)
def test_where_the_kernels_can_run_nothing_stands_against_them(gpu, machine):
    gpu(**machine)
    assert all(why(dtype) is None for dtype in (torch.float16, torch.bfloat16))
    assert why(head_dim=64) is None and why(head_dim=80) is None


@pytest.mark.parametrize("machine, call, cause, says", [
    (dict(), dict(device=torch.device("cpu")), Cause.NO_GPU, "the tensors are on cpu"),
    (dict(), dict(device=torch.device("mps")), Cause.NO_GPU, "the tensors are on mps"),
    (dict(triton=None), dict(), Cause.NOT_INSTALLED, "the package triton is not installed"),
    (dict(triton="3.3.1"), dict(), Cause.TOO_OLD, "triton is 3.3.1, and 3.4 or newer is needed"),
    (dict(major=7, minor=5), dict(), Cause.GPU_TOO_OLD, "a GPU is sm_75, and the kernels need sm_80"),
    (dict(hip="gfx1100"), dict(), Cause.GPU_UNKNOWN, "gfx1100 is not among gfx90a, gfx942"),
    (dict(), dict(dtype=torch.float32), Cause.DTYPE, "the kernels are for float16 and bfloat16, not float32"),
    (dict(), dict(head_dim=36), Cause.HEAD_DIM, "head_dim 36 is not a multiple of 8"),
    (dict(), dict(head_dim=256), Cause.HEAD_DIM, "head_dim 256 is not a multiple of 8 up to 128"),
    (dict(), dict(blocks=(64, 48)), Cause.BLOCK_SIZE, "blocks of 64 and 48 tokens"),
])  # fmt: skip
def test_every_reason_is_told(gpu, machine, call, cause, says):
    gpu(**machine)
    found = why(**call)
    assert found.cause is cause and says in str(found)


def test_every_cause_has_words_and_is_tried():
    tried = {
        mark.args[1][i][2]
        for mark in test_every_reason_is_told.pytestmark
        for i in range(len(mark.args[1]))
    }
    assert set(Cause) - tried == {Cause.NOT_ASKED_FOR, Cause.KERNEL_FAILED}  # tried below
    assert all(cause.value and cause.value[0].islower() or "{" in cause.value for cause in Cause)


def test_scores_are_taken_in_float32_and_bits_in_anything(gpu):
    gpu()
    scores = Operands(GPU, torch.float32, 36)
    assert support.obstacle(scores, support.ON_SCORES) is None
    assert (
        support.obstacle(Operands(GPU, torch.float64, 36), support.ON_SCORES).cause is Cause.DTYPE
    )
    assert support.obstacle(Operands(GPU, torch.int32, 0), support.ON_BITS) is None


def test_triton_by_name_where_it_cannot_run_is_an_error_and_auto_is_not():
    q, k, v = tensors(*[(1, 1, 64, 32)] * 3, dtype=torch.float32)
    with pytest.raises(
        ops.TritonNotUsable, match="cannot be used: the tensors are on cpu.*Or set backend to auto"
    ):
        ops.dense_attention(q, k, v, backend="triton")
    ops.dense_attention(q, k, v, backend="auto")
    backend, found = ops.backend_for(q, "auto", 64)
    assert backend == "pytorch" and found.cause is Cause.NO_GPU
    backend, found = ops.backend_for(q, "pytorch", 64)
    assert backend == "pytorch" and str(found) == "backend is set to pytorch"


@pytest.mark.parametrize("torch_version, says", [
    ("2.9.1+cu128", 'pip install -U "triton-windows>=3.5,<3.6"'),
    ("2.10.0", "triton-windows>=3.6,<3.7"),
    ("2.13.0+cu130", "the README of triton-windows lists the release for torch 2.13.0"),
])  # fmt: skip
def test_windows_is_told_what_to_install(gpu, monkeypatch, torch_version, says):
    gpu(triton=None)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(torch, "__version__", torch_version)
    text = support.explain(why())
    assert says in text and "python_embeded" in text and "Visual C++" in text and "\n" not in text


def test_a_kernel_that_fails_is_said_once_and_replaced(monkeypatch, caplog):
    """A missing compiler or an old driver shows only at the first launch, under other errors."""
    calls = []

    def broken(*arguments):
        calls.append(1)
        raise RuntimeError("a page of text\nfatal error: Python.h: No such file")

    monkeypatch.setattr(support, "obstacle", lambda *_: None)
    monkeypatch.setattr(dispatch, "_triton", lambda: SimpleNamespace(block_pool=broken))
    monkeypatch.setattr(dispatch, "_failed", {})
    (x,) = tensors((1, 1, 100, 32), dtype=torch.float32)
    blocks = blocks_of(100)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            torch.testing.assert_close(ops.block_pool(x, blocks), reference.block_pool(x, blocks))
    assert len(calls) == 1 and len(caplog.records) == 1
    assert "block_pool failed: RuntimeError: fatal error: Python.h" in caplog.records[0].message
    backend, found = ops.backend_for(x, "auto", 64)
    assert backend == "pytorch" and found.cause is Cause.KERNEL_FAILED
    with pytest.raises(ops.TritonNotUsable, match="Python.h"):
        ops.block_pool(x, blocks, backend="triton")


def test_a_program_that_uses_the_kernels_keeps_its_own_logging(monkeypatch):
    """`logging.warning` would install a handler on the root logger of the importing program."""

    def broken(*arguments):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(support, "obstacle", lambda *_: None)
    monkeypatch.setattr(dispatch, "_triton", lambda: SimpleNamespace(block_pool=broken))
    monkeypatch.setattr(dispatch, "_failed", {})
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    ops.block_pool(torch.ones(1, 1, 100, 32), blocks_of(100))
    assert not logging.getLogger().handlers


def test_what_the_innermost_error_says_is_told():
    inner = ValueError("no kernel image\n  at 100:14:\n     ^")
    outer = RuntimeError("a page of text")
    outer.__cause__ = inner
    assert dispatch._last_words(outer) == "ValueError: at 100:14:"
    assert dispatch._last_words(AssertionError()) == "AssertionError"


def test_one_failure_does_not_speak_for_other_kinds_of_call(monkeypatch):
    failed = Cause.KERNEL_FAILED.because(operation="block_pool", error="it failed")
    monkeypatch.setattr(support, "obstacle", lambda *_: None)
    kind = (torch.float16, 64, (64,))
    monkeypatch.setattr(dispatch, "_failed", {("block_pool", kind): failed})
    half = torch.ones(1, 1, 64, 64, dtype=torch.float16)
    assert ops.backend_for(half, "auto", 64) == ("pytorch", failed)
    assert ops.backend_for(half.bfloat16(), "auto", 64) == ("triton", None)


@pytest.mark.parametrize("error", [
    torch.cuda.OutOfMemoryError("out of memory"), RuntimeError("Triton Error [CUDA]: out of memory"),
])  # fmt: skip
def test_running_out_of_memory_is_not_taken_for_a_broken_kernel(monkeypatch, error):
    def full(*arguments):
        raise error

    monkeypatch.setattr(support, "obstacle", lambda *_: None)
    monkeypatch.setattr(dispatch, "_triton", lambda: SimpleNamespace(block_pool=full))
    monkeypatch.setattr(dispatch, "_failed", {})
    with pytest.raises(type(error), match="out of memory"):
        ops.block_pool(torch.ones(1, 1, 100, 32), blocks_of(100))
    assert not dispatch._failed
