"""Keys beside the video with a constant on their scores, which LTX's guides of any strength are."""

import math

import pytest
import torch

from pack_loader import load
from support.data.adapters import sla_adapter
from support.data.fields import relative_error, smooth_qkv
from support.data.runs import Call, run_of

attention = load(".attention")
reference = load(".kernels.reference")

GRID, BESIDE = (4, 8, 12), 96
SPANS = ((0, 20, math.log(0.7)), (20, 60, math.log(2.0)))  # of what follows; the rest as it is
HIDDEN = (90, BESIDE)
METHODS = ("ropeslr", "top-k", "top-k plain", "adaspa")


def states(spans=SPANS, hidden=True, dtype=torch.float32):
    """q of the video, k and v of all; the layout; and the score that is added to every key."""
    q, k, v = (x.to(dtype) for x in smooth_qkv(GRID, heads=2, seed=3))
    video = q.shape[2]
    more = torch.randn(2, 1, 2, BESIDE, q.shape[3], generator=torch.Generator().manual_seed(1))
    k, v = (torch.cat(pair, dim=2) for pair in zip((k, v), more.to(dtype)))
    added = torch.zeros(video + BESIDE, dtype=dtype)
    for start, stop, weight in spans:
        added[video + start : video + stop] = weight
    apart = (video + HIDDEN[0], video + HIDDEN[1])
    if hidden:
        added[slice(*apart)] = -torch.inf
    layout = attention.TokenLayout(
        GRID,
        after=BESIDE,
        hidden=(apart,) * hidden,
        weighted=tuple((video + start, video + stop, weight) for start, stop, weight in spans),
    )
    return (q, k, v), layout, added


def exact(qkv, added):
    q, k, v = (x.double() for x in qkv)
    return (q @ k.mT / q.shape[3] ** 0.5 + added).softmax(-1) @ v


@pytest.mark.parametrize("method", METHODS)
def test_they_weigh_what_they_were_given(method):
    """Every block kept: what a float64 softmax with the same constants gives."""
    qkv, layout, added = states()
    found, cost = run_of(method=method, sparsity=0.0).attend(*qkv, Call(layout, 0, 0, 4))
    assert found.shape == qkv[0].shape and cost.density == 1.0
    assert relative_error(found, exact(qkv, added)) < 1e-5


@pytest.mark.parametrize("allocation", ["uniform", "auto"])
@pytest.mark.parametrize("method", METHODS)
def test_a_constant_of_zero_is_none(method, allocation):
    """As if the keys were the method's own: in a calibrating call, and in one after it."""
    qkv, layout, _ = states(((0, BESIDE, 0.0),), hidden=False)
    plan = dict(method=method, sparsity=0.75, allocation=allocation)
    apart, own = run_of(**plan), run_of(**plan)
    plain = attention.TokenLayout(GRID, after=BESIDE)
    for step in range(3):
        found, cost = apart.attend(*qkv, Call(layout, 0, step, 8))
        expected, _ = own.attend(*qkv, Call(plain, 0, step, 8))
        truth = exact(qkv, 0.0)
        assert relative_error(found, truth) < 1.1 * relative_error(expected, truth) + 1e-5
        assert relative_error(found, expected) < 0.05
        assert 0.25 < cost.density <= 1.0


@pytest.mark.parametrize("method", ["ropeslr", "top-k"])
def test_a_head_that_keeps_nothing_still_weighs(method):
    """What its background stands for has a mass too: the same as beside keys of its own."""
    qkv, layout, _ = states(((0, BESIDE, 0.0),), hidden=False)
    plain, found = attention.TokenLayout(GRID, after=BESIDE), []
    for each in (layout, plain):
        run = run_of(method=method, sparsity=0.9, calibrate="off", allocation="auto")
        run.method.kept = lambda q, call: [0, 0]
        found.append(run.attend(*qkv, Call(each, 0, 1, 8))[0])
    assert relative_error(*found) < 1e-5


def test_half_precision_gives_half_precision():
    qkv, layout, added = states(dtype=torch.bfloat16)
    run = run_of(method="ropeslr", sparsity=0.0)
    found, _ = run.attend(*qkv, Call(layout, 0, 0, 4))
    assert found.dtype == torch.bfloat16
    assert relative_error(found, exact(qkv, added.double())) < 2e-2


def test_what_does_not_fit_is_refused():
    (q, k, v), layout, _ = states()
    with pytest.raises(ValueError, match="sla cannot take weighted keys"):
        weights = sla_adapter(1, 2, q.shape[3])
        run_of(weights, method="sla").attend(q, k, v, Call(layout, 0, 0, 4))
    with pytest.raises(ValueError, match="q has 480 tokens"):
        run_of().attend(k, k, v, Call(layout, 0, 0, 4))
    for spans in (((380, 390, 1.0),), ((390, 400, 1.0), (395, 410, 1.0))):
        with pytest.raises(ValueError, match="weighted must be ascending spans"):
            attention.TokenLayout(GRID, after=BESIDE, weighted=spans)
