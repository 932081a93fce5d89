"""Variants are admitted by a self-test in a child process; what is measured is kept, and gone by."""

import json
import logging
import sys

import pytest
import torch

from pack_loader import load
from support import needs

tuning = load(".kernels.tuning")
dispatch = load(".kernels.dispatch")
ops = load(".kernels.ops")
types = load(".kernels.types")

pytestmark = pytest.mark.skipif(needs.INTERPRET, reason="children run plain PyTorch here")

CPU = torch.device("cpu")
TRIAL = tuning.Trial("cpu", tokens=512, heads=1, head_dim=32, dtype="float32", backend="pytorch")
# A child whose variants misbehave, by the stages that they ask for.
PLANTED = """
import os, sys, time
sys.path.insert(0, {folder!r})
import child

honest = child.examine

def examine(variant, asked):
    fault = variant["launch"] and variant["launch"][1]
    if fault == 2:
        raise RuntimeError("no such instruction\\nand a long listing")
    if fault == 3:
        time.sleep(1000)
    if fault == 4:
        os.kill(os.getpid(), 9)
    if fault == 5:
        from ropeslr_trial import ops
        exact = ops.block_sparse_attention
        ops.block_sparse_attention = lambda *a, **k: (1.1 * exact(*a, **k)[0], None)
        try:
            return honest(variant, asked)
        finally:
            ops.block_sparse_attention = exact
    if fault == 6:
        print("a compiler says something")
    return honest(variant, asked)

child.examine = examine
child.main()
"""


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    monkeypatch.setattr(tuning, "_devices", {})


def variants(*stages):
    return [tuning.Variant("16-bit", 64, each and (4, each, False)) for each in stages]


@pytest.fixture
def planted(tmp_path):
    script = tmp_path / "planted.py"
    script.write_text(PLANTED.format(folder=str(tuning.CHILD.parent)))
    return [sys.executable, str(script)]


def test_every_kind_of_variant_passes_its_self_test():
    asked = [tuning.Variant(each, rows) for each in tuning.PRECISIONS for rows in tuning.ROWS]
    seen = []
    found = tuning.run_trials(asked, TRIAL, lambda done, of: seen.append((done, of)))
    assert [each.variant for each in found.outcomes] == asked
    assert all(each.failed is None and each.ms > 0 for each in found.outcomes), found
    errors = {each.variant.precision: each.error for each in found.outcomes}
    assert errors["16-bit"] < 1e-5 < errors["8-bit"] < tuning.LIMITS["8-bit"]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_what_misbehaves_costs_itself_alone(planted):
    """Wrong numbers, an exception, a hang, a crash of the whole process."""
    asked = variants(None, 2, 3, 4, 5, 6)
    found = tuning.run_trials(asked, TRIAL, seconds_each=20.0, command=planted)
    good, raises, hangs, dies, wrong, talks = found.outcomes
    assert good.failed is None and talks.failed is None
    assert raises.failed == "RuntimeError: no such instruction"
    assert hangs.failed == "took longer than 20 s"
    assert dies.failed == "its process ended with -9"
    assert wrong.failed == "wrong: relative error 1.0e-01"
    assert found.best("16-bit").variant in (good.variant, talks.variant)


def test_a_child_that_does_not_start_admits_nothing():
    found = tuning.run_trials(variants(None, 2), TRIAL, command=[sys.executable, "-c", "1 / 0"])
    assert [each.failed for each in found.outcomes] == ["the trial process does not start"] * 2
    assert found.best("16-bit") is None and not found.eight_bit_pays()


def outcome(precision, rows, ms, launch=None):
    return tuning.Outcome(tuning.Variant(precision, rows, launch), 1e-3, ms)


FOUND = tuning.Tuning(
    (
        outcome("16-bit", 64, 10.0),
        outcome("16-bit", 64, 8.0, (4, 4, True)),
        outcome("16-bit", 128, 9.0),
        outcome("8-bit", 64, 4.0, (8, 3, False)),
        tuning.Outcome(tuning.Variant("8-bit", 128), failed="its process ended with -11"),
    )
)


def test_the_fastest_admitted_variant_wins_and_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "user" / "tuning.json"
    assert tuning.use(path, CPU) == "not tuned" and tuning.launch_here("16-bit", 64) is None
    tuning.save(path, FOUND, CPU)
    assert tuning.use(path, CPU) == "tuned" and tuning._on(CPU).tuning == FOUND
    assert tuning.launch_here("16-bit", 64) == (4, 4, True)
    assert tuning.launch_here("8-bit", 64) == (8, 3, False)
    assert tuning.launch_here("16-bit", 128) is None
    assert FOUND.eight_bit_pays() and FOUND.eight_bit_pays(64) and not FOUND.eight_bit_pays(128)
    assert not tuning.prefers_eight_bit(CPU, 64) and tuning.state(CPU) == ""
    gpu, other = torch.device("cuda:0"), torch.device("cuda:1")
    tuning._devices["cuda:0"] = tuning._on(CPU)
    assert tuning.prefers_eight_bit(gpu, 64) and tuning.state(gpu) == "tuned"
    assert not tuning.prefers_eight_bit(gpu, 128) and not tuning.prefers_eight_bit(other, 64)
    assert tuning.state(other).startswith("not tuned") and not tuning.refuses(gpu, 64)
    # Other machines stay in the file, and say nothing about this one.
    monkeypatch.setattr(tuning, "machine_key", lambda device: "another")
    assert "another GPU" in tuning.use(path, CPU) and tuning.launch_here("16-bit", 64) is None
    tuning.save(path, tuning.Tuning(), CPU)
    assert len(tuning.read(path)) == 2
    assert tuning.use(path, CPU) == "tuned" and tuning.launch_here("16-bit", 64) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 99, "machines": {}}',
        '{"version": 1, "machines": {"KEY": {"outcomes": [{}], "withdrawn": []}}}',
        '{"version": 1, "machines": 3}',
    ],
)
def test_a_broken_file_is_ignored_in_words(text, tmp_path):
    path = tmp_path / "tuning.json"
    path.write_text(text.replace("KEY", tuning.machine_key(CPU)))
    assert "cannot be read" in tuning.use(path, CPU) and tuning._on(CPU).tuning is None
    tuning.save(path, FOUND, CPU)
    assert tuning.use(path, CPU) == "tuned"


@pytest.mark.parametrize("wrong", [(3, 3, True), (4, 0, True), (4, 3, "yes"), (4, 99, False)])
def test_launch_parameters_from_a_file_are_checked(wrong, tmp_path):
    path = tmp_path / "tuning.json"
    tuning.save(path, tuning.Tuning((outcome("16-bit", 64, 1.0, wrong),)), CPU)
    assert "cannot be read" in tuning.use(path, CPU)


def small_case():
    """q, k, v of two blocks, every one kept."""
    q, k, v = torch.randn(3, 1, 1, 128, 32, generator=torch.Generator().manual_seed(0))
    blocks = types.TokenBlocks.cut(torch.arange(128), 64)
    kept = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    return q, k, v, types.BlockMask.from_dense(blocks, blocks, kept)


def failing_in_8_bits(calls, error):
    """Kernels of which one raises in 8 bits; `calls` gets whether each call was in 8 bits."""

    class Kernels:
        @staticmethod
        def block_sparse_attention(q, k, v, mask, pooled, scale, out, eight_bit):
            calls.append(eight_bit is not None)
            if eight_bit is not None:
                raise RuntimeError(error)
            return load(".kernels.pytorch").block_sparse_attention(q, k, v, mask, pooled, scale)

    return Kernels


def test_what_fails_in_a_run_is_withdrawn_and_computed_by_the_next(tmp_path, monkeypatch, caplog):
    """An 8-bit kernel that raises: the call comes out right, in 16 bits, and stays so."""
    path = tmp_path / "tuning.json"
    tuning.save(path, FOUND, CPU)
    tuning.use(path, CPU)
    calls = []
    monkeypatch.setattr(dispatch, "_triton", lambda: failing_in_8_bits(calls, "misaligned address"))
    monkeypatch.setattr(load(".kernels.triton_support"), "obstacle", lambda *_: None)
    monkeypatch.setattr(dispatch, "_failed", {})
    q, k, v, mask = small_case()
    means = k.mean(dim=2), v.mean(dim=2)
    small = ops.quantize_kv(k, v, mask.kv_blocks, *means, backend="pytorch")
    with caplog.at_level(logging.WARNING):
        out, _ = ops.block_sparse_attention(q, k, v, mask, eight_bit=small)
        ops.block_sparse_attention(q, k, v, mask, eight_bit=small)
    exact, _ = ops.block_sparse_attention(q, k, v, mask, backend="pytorch")
    torch.testing.assert_close(out, exact)
    assert calls[:2] == [True, False] and not dispatch._failed
    said = [x.getMessage() for x in caplog.records if "withdrawn" in x.getMessage()]
    assert len(said) == 1 and "8-bit attention failed" in said[0] and "misaligned" in said[0]
    assert not tuning._on(CPU).tuning.eight_bit_pays() and not tuning.works("8-bit", CPU)
    assert tuning.launch_here("16-bit", 64) == (4, 4, True)
    known = json.loads(path.read_text())["machines"]
    assert any(each["withdrawn"] == ["8-bit"] for each in known.values())


def test_rows_whose_every_variant_is_wrong_are_never_run(monkeypatch):
    """Plain PyTorch computes them, whatever the kernel would say."""
    wrong = tuning.Outcome(tuning.Variant("16-bit", 64), failed="wrong: relative error 1.0e-01")
    tuning._on(CPU).tuning = tuning.Tuning((wrong, outcome("16-bit", 128, 3.0)))
    assert tuning.refuses(CPU, 64) and not tuning.refuses(CPU, 128)

    class Kernels:
        @staticmethod
        def block_sparse_attention(q, *_):
            raise AssertionError("it ran")

    monkeypatch.setattr(dispatch, "_triton", lambda: Kernels)
    monkeypatch.setattr(load(".kernels.triton_support"), "obstacle", lambda *_: None)
    q, k, v, mask = small_case()
    ops.block_sparse_attention(q, k, v, mask)


def test_eight_bits_that_fail_without_any_tuning_are_not_tried_again(monkeypatch, caplog):
    calls = []
    monkeypatch.setattr(dispatch, "_triton", lambda: failing_in_8_bits(calls, "does not compile"))
    q, k, v, mask = small_case()
    means = k.mean(dim=2), v.mean(dim=2)
    small = ops.quantize_kv(k, v, mask.kv_blocks, *means, backend="pytorch")
    monkeypatch.setattr(load(".kernels.triton_support"), "obstacle", lambda *_: None)
    assert ops.eight_bit_works(CPU)
    with caplog.at_level(logging.WARNING):
        ops.block_sparse_attention(q, k, v, mask, eight_bit=small)
    assert calls == [True, False] and not ops.eight_bit_works(CPU)
    assert "8-bit attention failed" in caplog.text and "does not compile" in caplog.text
