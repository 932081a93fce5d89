"""Gradients through a whole run, step after step: nothing remembered keeps an old graph alive."""

import pytest
import torch

from pack_loader import load
from support.data.adapters import layer_x, ropeslr_adapter
from support.data.fields import rope_angles, smooth_qkv
from support.data.runs import Call, run_of

attention = load(".attention")
GRID = (4, 8, 9)


@pytest.mark.parametrize("settings", [
    dict(), dict(calibrate="every step"), dict(rank=16), dict(method="adaspa"), dict(method="top-k"),
])  # fmt: skip
@pytest.mark.parametrize("beside", [0, 20])
def test_several_steps_of_training_backpropagate_one_by_one(settings, beside):
    """A calibration that was remembered with its graph would be gone through a second time."""
    q, k, v = (x.requires_grad_() for x in smooth_qkv(GRID, width=32))
    text = torch.randn(1, 2, beside, 32, generator=torch.Generator().manual_seed(0))
    layout = attention.TokenLayout(GRID, before=beside)
    run = run_of(sparsity=0.6, **settings)
    for step in range(7):
        given = [torch.cat((text, x), dim=2) for x in (q, k, v)]
        out, _ = run.attend(*given, Call(layout, step=step, num_steps=7))
        gradients = torch.autograd.grad(out.square().mean(), (q, k, v))
        assert all(torch.isfinite(x).all() and x.any() for x in gradients)


def test_an_adapter_refined_during_training_keeps_no_graph():
    adapter = ropeslr_adapter(1, 2, 32)
    angles = rope_angles(GRID, 32)
    rope = attention.RopeTable(angles.cos(), angles.sin())
    q, k, v = (x.requires_grad_() for x in smooth_qkv(GRID, width=32))
    inputs = attention.LayerInputs(layer_x(q.shape[2], 64, torch.float32), rope)
    run = run_of(adapter, sparsity=0.6, calibrate="refine")
    for step in range(7):
        call = Call(attention.TokenLayout(GRID), step=step, inputs=inputs)
        out, _ = run.attend(q, k, v, call)
        torch.autograd.grad(out.square().mean(), (q, k, v))


@pytest.mark.parametrize("settings", [dict(), dict(method="adaspa"), dict(method="top-k")])
@pytest.mark.parametrize("before, hidden", [(0, ()), (20, ()), (20, ((5, 20),))])
def test_gradients_and_results_are_those_of_the_call_without_gradients(settings, before, hidden):
    """With gradients the parts run one by one; hidden text may hold anything, NaN too."""
    q, k, v = smooth_qkv(GRID, width=32)
    text = torch.randn(1, 2, before, 32, generator=torch.Generator().manual_seed(0))
    for start, stop in hidden:
        text[:, :, start:stop] = float("nan")
    q, k, v = (torch.cat((text, x), dim=2) for x in (q, k, v))
    layout = attention.TokenLayout(GRID, before=before, hidden=hidden)
    plain, trained = run_of(sparsity=0.6, **settings), run_of(sparsity=0.6, **settings)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for step in range(2):
        expected, cost = plain.attend(q, k, v, Call(layout, step=step))
        found, same_cost = trained.attend(*leaves, Call(layout, step=step))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert cost == same_cost
        for start, stop in hidden:
            assert not found[:, :, start:stop].any() and not expected[:, :, start:stop].any()


@pytest.mark.parametrize("method", ["ropeslr", "adaspa", "top-k", "top-k plain"])
def test_autocast_changes_no_result(method):
    """Calibration solves equations, which no CPU does in bfloat16."""
    q, k, v = smooth_qkv(GRID, width=32)
    layout = attention.TokenLayout(GRID)
    expected, cost = run_of(method=method, sparsity=0.6).attend(q, k, v, Call(layout))
    with torch.autocast("cpu", torch.bfloat16):
        found, same_cost = run_of(method=method, sparsity=0.6).attend(q, k, v, Call(layout))
    assert torch.equal(found, expected) and cost == same_cost


def test_masks_that_are_searched_again_keep_no_graph():
    """Runs of more than 8 steps remember how much mass was kept, for their second search."""
    q, k, v = (x.requires_grad_() for x in smooth_qkv(GRID, width=32))
    run = run_of(sparsity=0.6, method="adaspa")
    for step in range(10):
        if run.dense_reason(step, 10) is None:
            out, _ = run.attend(q, k, v, Call(attention.TokenLayout(GRID), step=step, num_steps=10))
            torch.autograd.grad(out.square().mean(), (q, k, v))
    (found,) = run.method.memory.values()
    assert found.ratio is None or not found.ratio.requires_grad
