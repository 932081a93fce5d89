"""Attention in 8 bits by a plan: asked for, or where it was measured to be faster and to lose little."""

import pytest
import torch

from pack_loader import load
from support.data.fields import relative_error, smooth_qkv
from support.data.runs import Call, run_of

attention = load(".attention")
ops = load(".kernels.ops")
reference = load(".kernels.reference")

GRID = (8, 8, 12)
LAYOUT = attention.TokenLayout(GRID)
METHODS = ("ropeslr", "top-k", "top-k plain", "adaspa")


@pytest.fixture
def faster(monkeypatch):
    """As on a GPU whose owner has measured that 8 bits are faster."""
    monkeypatch.setattr(ops, "prefers_eight_bit", lambda device, rows: True)


def steps(run, qkv, count=3, layer=0):
    for number in range(8, 8 + count):
        out, _ = run.attend(*qkv, Call(LAYOUT, layer, number, 20))
    return out


def planted(kind):
    """Keys that 8 bits can hold, and two kinds that they cannot."""
    q, k, v = smooth_qkv(GRID, heads=2, sharpness=1.5)
    v = v + 2.0  # or all of the output would be what noise leaves of itself
    if kind == "one channel":
        k[..., 5], q[..., 5] = 100 * k[..., 5], q[..., 5] / 100
    if kind == "one value":
        k[0, 0, ::50, 7] = 1e4
        q[..., 7] = 0.0
    return q, k, v


@pytest.mark.parametrize("method", METHODS)
def test_eight_bits_where_asked_for(method):
    qkv = planted("nothing")
    run, other = (run_of(method=method, precision=each) for each in ("8-bit", "16-bit"))
    out, expected = steps(run, qkv), steps(other, qkv)
    assert run.precision.calls >= 2 and other.precision.calls == 0
    assert 1e-5 < relative_error(out, expected) < 0.03
    exact = reference.dense_attention(*qkv)[0]
    assert relative_error(out, exact) < relative_error(expected, exact) + 0.02


@pytest.mark.parametrize("method", METHODS)
def test_auto_is_sixteen_bits_where_nothing_was_measured(method):
    qkv = planted("nothing")
    run, other = run_of(method=method), run_of(method=method, precision="16-bit")
    assert torch.equal(steps(run, qkv), steps(other, qkv))
    assert run.precision.calls == 0 and not run.precision.fits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("calibrate", ["auto", "off"])
def test_auto_measures_each_layer_once(method, calibrate, faster):
    run = run_of(method=method, calibrate=calibrate)
    for layer, kind in enumerate(("nothing", "one channel", "one value")):
        steps(run, planted(kind), layer=layer)
    assert run.precision.fits == {0: True, 1: False, 2: False}
    assert run.precision.refused == 2 and run.precision.calls >= 1
    # What was refused is as it would be without.
    qkv, other = planted("one channel"), run_of(method=method, precision="16-bit")
    alone = run_of(method=method, calibrate=calibrate)
    assert relative_error(steps(alone, qkv), steps(other, qkv)) < (
        1e-6 if calibrate == "auto" else 1
    )


@pytest.mark.parametrize("precision", ["auto", "8-bit"])
def test_gradients_are_those_of_sixteen_bits(precision, faster):
    found = []
    for each in (precision, "16-bit"):
        q, k, v = (x.requires_grad_() for x in smooth_qkv(GRID, heads=1))
        run = run_of(precision=each, calibrate="off")
        out, _ = run.attend(q, k, v, Call(LAYOUT, 0, 9, 20))
        found.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for here, there in zip(*found):
        assert torch.equal(here, there)


def test_hidden_keys_do_not_come_through(faster):
    """Hidden text holds NaN."""
    layout = attention.TokenLayout((4, 8, 8), after=100, hidden=((300, 356),))
    q, k, v = torch.randn(3, 1, 2, 356, 32, generator=torch.Generator().manual_seed(0))
    k[:, :, 300:], v[:, :, 300:] = torch.nan, torch.nan
    for precision in ("auto", "8-bit"):
        run = run_of(precision=precision, sparsity=0.5)
        for number in (8, 9):
            out, _ = run.attend(q, k, v, Call(layout, 0, number, 20))
        assert torch.isfinite(out).all() and run.precision.calls


def test_a_head_may_keep_nothing(faster):
    """Allocation deals some heads no block at all."""
    q, k, v = planted("nothing")
    k[:, 0], v[:, 0] = 0.0, 1.0  # exactly what the background says
    run = run_of(precision="8-bit", allocation="auto", key_block="16", sparsity=0.9)
    for number in range(3):
        out, cost = run.attend(q, k, v, Call(LAYOUT, 0, number, 20))
    assert min(cost.heads) == 0.0 and torch.isfinite(out).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(bad):
    q, k, v = planted("nothing")
    q[0, 0, 5, 3] = bad
    out, _ = run_of(method="top-k plain", precision="8-bit").attend(q, k, v, Call(LAYOUT, 0, 9, 20))
    assert not torch.isfinite(out).all()
