"""Query blocks of 128: what they give, and when a run takes them by itself."""

import pytest
import torch

from pack_loader import load
from support.data.fields import relative_error, smooth_qkv
from support.data.runs import Call, run_of

attention = load(".attention")
reference = load(".kernels.reference")

GRID = (8, 8, 12)  # 768 tokens
LAYOUT = attention.TokenLayout(GRID)
ALLOCATED = ("ropeslr", "top-k", "top-k plain")


def run(query_block="auto", **plan):
    settings = dict(allocation="auto", key_block="16", sparsity=0.75, query_block=query_block)
    return run_of(**(settings | plan))


def states(neighbours_agree):
    """q, k, v whose query blocks of 64 want what their neighbours want, or the very opposite."""
    q, k, v = smooth_qkv(GRID, heads=2, seed=3)
    order = LAYOUT.token_order()
    wanted = q[:, :, order].unflatten(2, (-1, 2, 64)).clone()
    wanted[:, :, :, 1] = wanted[:, :, :, 0] if neighbours_agree else -wanted[:, :, :, 0]
    q = torch.empty_like(q)
    q[:, :, order] = wanted.flatten(2, 4)
    return q, k, v


def steps(of, qkv, count=3):
    for number in range(count):
        found = of.attend(*qkv, Call(LAYOUT, 0, number, 20))
    return found


@pytest.mark.parametrize("method", ALLOCATED)
@pytest.mark.parametrize("agree, expected", [(True, 128), (False, 64)])
def test_auto_takes_large_blocks_where_they_cost_next_to_nothing(method, agree, expected):
    qkv, seen = states(agree), []
    found = run(method=method)
    found.on_mask = lambda mask: seen.append(mask.q_blocks.block_size)
    out, cost = steps(found, qkv)
    assert found.query_block == expected and seen == [64, expected, expected]
    exact = reference.dense_attention(*qkv)[0]
    small, same_density = steps(run("64", method=method), qkv)
    assert cost.density == pytest.approx(same_density.density, rel=0.02)
    assert relative_error(out, exact) < 1.1 * relative_error(small, exact)


def test_a_dense_step_is_enough_to_know():
    found = run()
    found.observe(*states(True), Call(LAYOUT, 0, 0, 20))
    assert found.query_block == 64
    found.attend(*states(True), Call(LAYOUT, 0, 1, 20))
    assert found.query_block == 128


def test_an_error_target_counts_blocks():
    for agree, expected in ((True, 128), (False, 64)):
        found = run(target="error", error=0.3)
        steps(found, states(agree))
        assert found.query_block == expected


def test_nothing_made_for_small_blocks_outlives_the_choice():
    found = run()
    found.attend(*states(True), Call(LAYOUT, 0, 0, 20))
    _, cost = found.attend(*states(True), Call(LAYOUT, 0, 1, 20))
    assert cost.calibration > 0 and len(found.lessons[0]) == 1


@pytest.mark.parametrize("method", [*ALLOCATED, "adaspa"])
def test_all_blocks_kept_is_dense_attention(method):
    qkv = states(False)
    out, cost = run("128", method=method, sparsity=0.0).attend(*qkv, Call(LAYOUT, 0, 10, 20))
    assert relative_error(out, reference.dense_attention(*qkv)[0]) < 1e-5 and cost.density == 1.0


@pytest.mark.parametrize("tokens", [1, 5, 37])
def test_any_length_and_text_beside_it(tokens):
    layout = attention.TokenLayout((1, 3, tokens), before=7, after=70)
    length = layout.tokens
    q, k, v = torch.randn(3, 1, 2, length, 32, generator=torch.Generator().manual_seed(0))
    out, _ = run("128", sparsity=0.5).attend(q, k, v, Call(layout, 0, 1, 20))
    exact = reference.dense_attention(q, k, v)[0]
    assert torch.isfinite(out).all()
    assert relative_error(out[:, :, :7], exact[:, :, :7]) < 1e-5
    assert relative_error(out[:, :, -70:], exact[:, :, -70:]) < 1e-5


def test_who_keeps_to_small_blocks():
    plan = attention.SparsePlan
    assert plan(allocation="uniform").resolve().query_block == "64"
    assert plan(method="adaspa").resolve().query_block == "64"
    assert plan(method="sla", query_block="128").resolve().query_tokens == 128
    assert plan().resolve().query_block == "auto" and plan().resolve().query_tokens == 64
    with pytest.raises(ValueError, match="query_block"):
        plan(query_block="96")
