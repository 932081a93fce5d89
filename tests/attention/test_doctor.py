"""The doctor: right where the machine is right, loud where it is not, and never in the way."""

import pytest
import torch

from pack_loader import load

doctor = load(".attention.doctor")
ops = load(".kernels.ops")
CPU = torch.device("cpu")


def test_a_healthy_machine_passes_and_is_told_its_backend():
    text = doctor.examine(CPU, (3, 8, 9), 0.8, seconds=0.1)
    assert "plain PyTorch: the tensors are on cpu" in text and text.count(", right") == 4
    assert (
        "WRONG" not in text
        and "one self-attention call, 216 tokens, 8 heads, sparsity 0.80: dense" in text
    )


@pytest.mark.parametrize("spoil", [lambda out: out * 1.01, lambda out: out * float("nan")])
def test_wrong_numbers_are_called_wrong(monkeypatch, spoil):
    """A kernel that is off by a hundredth, or gives NaN, on this person's GPU alone."""
    real = ops.block_sparse_attention

    def wrong(*args, **kwargs):
        out, lse = real(*args, **kwargs)
        return spoil(out), lse

    monkeypatch.setattr(ops, "block_sparse_attention", wrong)
    lines = doctor.self_test(CPU)
    assert [line.split(":")[0] for line in lines if "WRONG" in line][:2] == [
        "kept blocks",
        "every block kept, against dense",
    ]


def test_a_failure_is_an_answer_too(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image\nand a long story")

    monkeypatch.setattr(ops, "block_sparse_attention", broken)
    text = doctor.examine(CPU, (3, 8, 9), 0.8, seconds=0.1)
    assert "failed: RuntimeError: no kernel image" in text and "a long story" not in text


@pytest.mark.parametrize(
    "grid", [(21, 30, 52), (1, 200, 300), (81, 90, 160), (1, 1, 100_000), (5000, 2, 2)]
)
def test_a_cpu_is_given_a_piece_that_it_can_do(grid):
    small = doctor._shortened(grid)
    assert 0 < small[0] * small[1] * small[2] <= doctor.LARGEST_ON_CPU
    assert all(a <= b for a, b in zip(small, grid))
    assert doctor._shortened(small) == small


@pytest.mark.parametrize(
    "ropeslr, plain, says",
    [
        (50.0, 40.0, "Recommended: method auto"),
        (99.0, 50.0, "top-k plain is faster"),
        (150.0, 140.0, "gains nothing at this size"),
    ],
)
def test_advice_follows_the_figures(ropeslr, plain, says):
    measured = doctor.Measurement(
        1000, 100.0, {"ropeslr": ropeslr, "top-k": 200.0, "top-k plain": plain}
    )
    text = "\n".join(doctor.advice(CPU, measured, 5000, 0.9))
    assert says in text and "Measured at 1,000 instead of 5,000 tokens" in text
    assert "Measured at" not in "\n".join(doctor.advice(CPU, measured, 1000, 0.9))
