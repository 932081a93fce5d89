"""AdaSpa: which blocks it finds, how heads share the work, when it searches, for whom."""

import pytest
import torch

from pack_loader import load
from support.data.blocks import tensors
from support.data.fields import relative_error, smooth_qkv
from support.data.runs import Call
from support.data.runs import run_of as run_by

attention = load(".attention")
adaspa = load(".attention.methods.adaspa")
ops = load(".kernels.ops")
GRID = (8, 14, 18)  # 2016 tokens, 31.5 blocks


def run_of(sparsity=0.8, **plan):
    return run_by(method="adaspa", sparsity=sparsity, **plan)


def masks(bits, blocks):
    """Bits as booleans."""
    return (
        ((bits[..., None] >> torch.arange(32, dtype=torch.int32)) & 1)
        .flatten(-2)[..., :blocks]
        .bool()
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("sparsity", [0.6, 0.8, 0.9])
def test_exact_masks_hold_at_least_the_mass_of_top_k(seed, sparsity):
    """Row by row, with as many blocks as the search gave each head."""
    q, k, v = smooth_qkv(GRID, heads=4, seed=seed, sharpness=1.4)
    blocks = attention.TokenLayout(GRID).blocks()
    mass = block_mass(q, k, ops.dense_attention(q, k, v)[1], blocks.q_blocks.tokens)
    run = run_of(sparsity)
    _, cost = run.attend(q, k, v, Call(attention.TokenLayout(GRID)))
    (found,) = run.method.memory.values()
    kept = masks(found.bits, blocks.q_blocks.num_blocks)
    pooled_q, pooled_k = (ops.block_pool(x, blocks.q_blocks) for x in (q, k))
    by_top_k = torch.zeros(kept.shape[:3])
    for head in range(4):
        part = pooled_q[:, head : head + 1], pooled_k[:, head : head + 1]
        routed, _ = ops.block_select(*part, blocks, int(kept[0, head, 0].sum()))
        by_top_k[:, head] = mass[:, head].gather(-1, routed.kv_indices[:, 0].long()).sum(-1)
    by_search = (mass * kept).sum(-1)
    assert (by_search >= by_top_k * (1 - 1e-5)).all() and by_search.sum() > by_top_k.sum()
    recall = (by_search.sum(-1) / mass.sum((-1, -2))).mean()
    assert cost.recall == pytest.approx(recall.item(), rel=1e-4)


def block_mass(q, k, lse, table):
    """Softmax mass of every pair of blocks, straight from its definition: `(1, H, N, N)`."""
    weights = (q @ k.mT * q.shape[-1] ** -0.5 - lse[..., None]).exp()
    rows = [[int(t) for t in row if t >= 0] for row in table]
    return torch.stack(
        [torch.stack([weights[:, :, i][..., j].sum((-1, -2)) for j in rows], -1) for i in rows], -2
    )


@pytest.mark.parametrize(
    "recall, expected",
    [
        ([0.95, 0.9, 0.85, 0.5, 0.6, 0.7], [0, 0, 0, 2, 2, 2]),  # three good heads, half of them
        ([0.95, 0.2, 0.5, 0.6], [0, 2, 1, 1]),
        ([0.9, 0.91, 0.92, 0.93], [2, 2, 0, 0]),  # all good: no more than half of the heads
        ([0.1, 0.2, 0.3], [1, 1, 1]),
        ([0.99], [1]),
        ([0.99, 0.98, 0.97], [0, 1, 2]),
    ],
)
def test_heads_of_high_recall_give_to_those_of_low_recall(recall, expected):
    assert adaspa.choose(torch.tensor([recall])).tolist() == [expected]


def test_the_three_sparsities_and_their_mean():
    assert adaspa.head_sparsities(0.8) == pytest.approx((0.9, 0.8, 0.7))
    assert adaspa.head_sparsities(1 / 3)[2] == pytest.approx(0.0, abs=1e-9)
    assert adaspa.head_sparsities(0.2) == (0.2,)
    grid = (10, 16, 20)  # 50 blocks: 5, 10, 15 of them are whole numbers
    heads = 6
    q, k, v = smooth_qkv(grid, heads=heads, sharpness=1.0)
    q[:, :3] *= 12  # three sharp heads, whose mass lies in few blocks
    run = run_of(0.8)
    layout = attention.TokenLayout(grid)
    run.attend(q, k, v, Call(layout))
    (found,) = run.method.memory.values()
    kept = masks(found.bits, 50).sum(-1)[0]
    assert (kept == kept[:, :1]).all()  # every row of a head alike
    assert sorted(kept[:, 0].tolist()) == [5, 5, 5, 15, 15, 15]
    assert set(kept[:3, 0].tolist()) == {5}
    assert found.density == pytest.approx(0.2) and found.list_width == 15
    _, cost = run.attend(q, k, v, Call(layout))
    assert cost.density == pytest.approx(0.2)


@pytest.mark.parametrize(
    "steps, expected", [(50, (10, 30)), (30, (6, 18)), (9, (1, 5)), (8, (0,)), (4, (0,)), (1, (0,))]
)
def test_when_it_searches(steps, expected):
    assert adaspa.search_steps(steps) == expected
    method = adaspa.AdaSpa(attention.SparsePlan(method="adaspa").resolve())
    for step in range(steps):
        assert (method.dense_reason(step, steps) is not None) == (step < expected[0])


def test_a_run_searches_dense_first_then_once_more_without_a_dense_pass(monkeypatch):
    q, k, v = smooth_qkv((4, 8, 16), heads=2)
    layout, run = attention.TokenLayout((4, 8, 16)), run_of(0.6)
    dense_calls = []
    real = ops.dense_attention
    monkeypatch.setattr(
        ops, "dense_attention", lambda *a, **b: dense_calls.append(1) or real(*a, **b)
    )
    costs = {
        step: run.attend(q, k, v, Call(layout, step=step, num_steps=50))[1]
        for step in range(10, 50)
    }
    assert len(dense_calls) == 1
    assert [step for step, cost in costs.items() if cost.calibration] == [10, 30]
    assert [step for step, cost in costs.items() if cost.density == 1.0] == [10]
    assert costs[10].calibration == costs[10].dense * (0.5 + costs[11].density)
    assert costs[30].calibration == costs[30].dense * (0.5 + costs[30].density)
    (found,) = run.method.memory.values()
    assert found.step == 30


def test_a_run_that_starts_late_searches_at_once():
    """start_percent, second expert, or a sampler that goes on: its first call searches."""
    q, k, v = smooth_qkv((4, 8, 16), heads=2)
    run = run_of(0.6)
    dense = ops.dense_attention(q, k, v)[0]
    layout = attention.TokenLayout((4, 8, 16))
    out, cost = run.attend(q, k, v, Call(layout, step=41, num_steps=50))
    assert cost.density == 1.0 and relative_error(out, dense) < 1e-5
    assert run.attend(q, k, v, Call(layout, step=42, num_steps=50))[1].calibration == 0


def test_nothing_is_shared_between_conditionings_layers_shapes_windows():
    layout = attention.TokenLayout((4, 8, 16))
    q, k, v = smooth_qkv((4, 8, 16), heads=2)
    run = run_of(0.6)
    seen = [
        dict(conditioning=(("a", 1),)),
        dict(conditioning=(("b", 1),)),
        dict(layer=1, conditioning=(("a", 1),)),
        dict(conditioning=(("a", 1),), window=8),
    ]
    for arguments in seen:
        assert run.attend(q, k, v, Call(layout, **arguments))[1].density == 1.0, arguments
    for arguments in seen:
        assert run.attend(q, k, v, Call(layout, **arguments))[1].density < 1.0, arguments
    other = attention.TokenLayout((8, 8, 8))
    assert run.attend(q, k, v, Call(other, conditioning=(("a", 1),)))[1].density == 1.0
    assert run_of(0.6).attend(q, k, v, Call(layout, conditioning=(("a", 1),)))[1].density == 1.0


def test_a_conditioning_that_comes_late_is_searched_with_the_others():
    """A layer met after the last search has no ratio, and the next search cannot use one for both."""
    layout = attention.TokenLayout((4, 8, 16))
    q, k, v = smooth_qkv((4, 8, 16), heads=2)
    run = run_of(0.6)
    run.attend(q, k, v, Call(layout, step=10, num_steps=50, conditioning=(("a", 1),)))
    run.attend(q, k, v, Call(layout, step=31, num_steps=50, conditioning=(("b", 1),)))
    both = [torch.cat((x, x)) for x in (q, k, v)]
    for step, density in ((32, 1.0), (33, 0.4)):
        call = Call(layout, step=step, num_steps=50, conditioning=(("b", 1), ("a", 1)))
        out, cost = run.attend(*both, call)
        assert torch.isfinite(out).all() and cost.density == pytest.approx(density, abs=0.03)


def test_windows_that_move_leave_nothing_behind():
    """Some schedules shift the windows at every step.

    Masks of a window that is gone are dropped.
    """
    layout = attention.TokenLayout((4, 8, 16))
    q, k, v = smooth_qkv((4, 8, 16), heads=2)
    run = run_of(0.6)
    for step in range(10, 20):
        for layer in range(2):
            for window in (step, 100 + step, 200):  # two that move and one that stays
                call = Call(layout, layer, step, num_steps=50, window=(window,))
                _, cost = run.attend(q, k, v, call)
                assert (cost.density == 1.0) is (window != 200 or step == 10)
    assert len(run.method.memory) == len(run.method._last_asked) == 2 * 5


def test_a_run_that_searches_once_does_no_more_than_that(monkeypatch):
    calls = []
    real = ops.block_sparse_attention
    monkeypatch.setattr(
        ops, "block_sparse_attention", lambda *a, **b: calls.append(1) or real(*a, **b)
    )
    q, k, v = smooth_qkv((4, 8, 16), heads=2)
    run = run_of(0.6)
    run.attend(q, k, v, Call(attention.TokenLayout((4, 8, 16)), step=0, num_steps=4))
    assert not calls
    run.attend(q, k, v, Call(attention.TokenLayout((4, 8, 16)), step=1, num_steps=4))
    assert len(calls) == 1


def test_conditionings_together_and_apart_give_the_same():
    layout = attention.TokenLayout((4, 8, 16))
    a, b = smooth_qkv((4, 8, 16), seed=0), smooth_qkv((4, 8, 16), seed=1)
    together = [torch.cat(pair) for pair in zip(a, b)]
    joint, apart = run_of(0.6), run_of(0.6)
    both = (("a", 1), ("b", 1))
    for step in (10, 11):
        out, _ = joint.attend(*together, Call(layout, step=step, num_steps=50, conditioning=both))
        singles = [
            apart.attend(*x, Call(layout, step=step, num_steps=50, conditioning=((key, 1),)))[0]
            for x, key in ((a, "a"), (b, "b"))
        ]
        assert relative_error(out, torch.cat(singles)) < 1e-6
    call = Call(layout, step=12, num_steps=50, conditioning=(("a", 1),))
    mixed, _ = joint.attend(*a, call)  # found together, used alone
    alone, _ = apart.attend(*a, call)
    assert torch.equal(mixed, alone)


@pytest.mark.parametrize("grid, heads", [(GRID, 3), ((5, 8, 9), 2)])
def test_masks_are_kept_as_bits_and_ratios_in_half_precision(grid, heads):
    q, k, v = smooth_qkv(grid, heads=heads)
    run, blocks = run_of(0.8), -(-q.shape[2] // 64)
    for step, again in ((10, True), (30, False)):
        for layer in range(2):
            for key in "ab":
                layout = attention.TokenLayout(grid)
                run.attend(q, k, v, Call(layout, layer, step, 50, conditioning=((key, 1),)))
        both = [
            tensor for found in run.method.memory.values() for tensor in (found.bits, found.ratio)
        ]
        held = sum(tensor.untyped_storage().nbytes() for tensor in both if tensor is not None)
        # One bit per block pair, in words of 32; two bytes per token until the last search. At Wan
        # 14B 720p: 7.0 MB of bits and 6.0 MB of ratios in each layer and conditioning.
        assert held == 4 * heads * (4 * blocks * -(-blocks // 32) + 2 * q.shape[2] * again)


def test_text_is_always_kept_and_text_rows_are_dense():
    layout = attention.TokenLayout((2, 16, 16), before=20, after=30)
    q, k, v = tensors(*[(1, 2, layout.tokens, 32)] * 3, dtype=torch.float32)
    run = run_of(0.75)
    dense = ops.dense_attention(q, k, v)[0]
    assert relative_error(run.attend(q, k, v, Call(layout))[0], dense) < 1e-5
    out, _ = run.attend(q, k, v, Call(layout))
    assert relative_error(out[:, :, :20], dense[:, :, :20]) < 1e-5
    assert relative_error(out[:, :, -30:], dense[:, :, -30:]) < 1e-5
    (found,) = run.method.memory.values()
    blocks = run.method.blocks(layout, q.device).kv_blocks.num_blocks
    assert masks(found.bits, blocks)[..., 8:].all()  # the text's own blocks


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_logits_leave_finite_masks(scale):
    """A ratio past half precision, or a mass that underflows, must not become NaN."""
    q, k, v = smooth_qkv((4, 8, 16), heads=2)
    run, layout = run_of(0.6), attention.TokenLayout((4, 8, 16))
    for step in (10, 11, 30, 31):
        call = Call(layout, step=step, num_steps=50)
        out, cost = run.attend(scale * q, k if step == 10 else -k, v, call)
        assert torch.isfinite(out).all()
        assert cost.recall is None or 0 <= cost.recall <= 1
