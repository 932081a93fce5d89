"""Training through every method: gradients against finite differences, checkpoints, memory."""

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pack_loader import load
from support.data.adapters import layer_x, rola_adapter, ropeslr_adapter, sla_adapter
from support.data.fields import rope_angles, smooth_qkv
from support.data.runs import Call

attention = load(".attention")
training = load(".attention.training")

GRID, BESIDE, HEADS, WIDTH = (4, 8, 9), 12, 2, 16
METHODS = {
    "ropeslr": (dict(method="ropeslr"), None),
    "ropeslr, rank 8, alike": (dict(method="ropeslr", rank=8, allocation="uniform"), None),
    "ropeslr with weights": (dict(calibrate="refine"), ropeslr_adapter),
    "rola": (dict(), rola_adapter),
    "sla": (dict(), sla_adapter),
    "sla paper": (dict(sla_variant="paper"), sla_adapter),
    "adaspa": (dict(method="adaspa"), None),
    "top-k": (dict(method="top-k"), None),
    "top-k plain": (dict(method="top-k plain"), None),
    "vsa": (dict(method="vsa"), None),
}


IN_FLOAT32 = {"ropeslr with weights"}  # whose own low rank is computed in it


def case(name):
    """A plan, leaves in float64 where the method allows it, and a call."""
    (settings, make), dtype = METHODS[name], torch.float32 if name in IN_FLOAT32 else torch.float64
    adapter = None if make is None else in_dtype(make(1, HEADS, WIDTH), dtype)
    plan = attention.SparsePlan(sparsity=0.5, **settings).resolve(adapter)
    q, k, v = (x.to(dtype) for x in smooth_qkv(GRID, heads=HEADS, width=WIDTH))
    text = torch.randn(3, 1, HEADS, BESIDE, WIDTH, generator=torch.Generator().manual_seed(2))
    leaves = [torch.cat(pair, dim=2).requires_grad_() for pair in zip(text.to(dtype), (q, k, v))]
    angles = rope_angles(GRID, WIDTH).to(dtype)
    rope = attention.RopeTable(angles.cos(), angles.sin())
    x = layer_x(BESIDE + 288, HEADS * WIDTH, dtype)
    gate = (lambda x: 0.3 * x) if name == "vsa" else None
    layout = attention.TokenLayout(GRID, before=BESIDE, order=plan.block_order)
    return plan, leaves, Call(layout, inputs=attention.LayerInputs(x, rope, gate))


def in_dtype(adapter, dtype):
    layers = {
        layer: {name: weight.to(dtype) for name, weight in weights.items()}
        for layer, weights in adapter.layers.items()
    }
    return dataclasses.replace(adapter, layers=layers)


def attended(run, call):
    return lambda *qkv: run.attend(*qkv, call)[0]


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_finite_differences(name):
    """Of what is trained: which blocks are kept, and what was fitted to exact rows, is given."""
    plan, leaves, call = case(name)
    attend = attended(training.TrainingRun(plan).model_call(), call)
    out = attend(*leaves)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    found = torch.autograd.grad((out * weight).sum(), leaves)
    step, limit = (3e-3, 1e-2) if name in IN_FLOAT32 else (1e-5, 1e-5)
    for leaf, gradient in zip(leaves, found):
        direction = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        ends = []
        with torch.no_grad():
            for sign in (step, -step):
                moved = [x + sign * direction if x is leaf else x for x in leaves]
                ends.append((attend(*moved) * weight).sum())
        expected = (ends[0] - ends[1]) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(expected.item(), rel=limit)


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_takes_the_same_path(name):
    """Recomputed during the backward pass, after a later call has found other things."""
    plan, leaves, call = case(name)
    gradients = []
    for recompute in (False, True):
        run = training.TrainingRun(plan)
        outs = []
        for step in range(3):
            each = [x * (1 + 0.2 * step) for x in leaves]
            own = attended(run.model_call(), Call(call.layout, step=step, inputs=call.inputs))
            outs.append(checkpoint(own, *each, use_reentrant=False) if recompute else own(*each))
        total = sum(out.square().sum() for out in outs)
        gradients.append(torch.autograd.grad(total, leaves))
    for one, other in zip(*gradients):
        assert torch.equal(one, other)


def test_heads_share_blocks_by_what_the_call_before_found():
    plan, leaves, call = case("ropeslr")
    run, densities = training.TrainingRun(plan), []
    for step in range(2):
        own = Call(call.layout, step=step, inputs=call.inputs)
        densities.append(run.model_call().attend(*leaves, own)[1].heads)
    assert not densities[0] and len(set(densities[1])) > 1


def test_a_model_call_leaves_nothing_behind():
    """Its memory goes with its graph; of a training run, only the allocation stays."""
    import gc
    import weakref

    plan, leaves, call = case("ropeslr")
    run = training.TrainingRun(plan)
    each = run.model_call()
    out = each.attend(*leaves, call)[0]
    gone = weakref.ref(each)
    out.sum().backward()
    del each, out
    gc.collect()
    assert gone() is None
