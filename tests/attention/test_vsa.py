"""VSA against a slow transcription of FastVideo's forms, and its tiles."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from pack_loader import load
from support.data.fields import relative_error
from support.data.runs import Call, run_of
from support.oracle import transcription as golden

attention = load(".attention")
LayerInputs = load(".attention.call").LayerInputs

# Odd sides everywhere, one frame more than a tile, and segments that tiles do not divide.
CASES = [((5, 6, 9), (70, 3, 64)), ((4, 8, 8), ()), ((1, 5, 5), (10,))]
HEADS, WIDTH, HEAD_DIM = 2, 48, 32
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def case(grid, segments, dtype=torch.float32):
    """q, k, v, the layout, and what a host knows of the layer."""
    tokens = sum(segments) + grid[0] * grid[1] * grid[2]
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    q, k, v = (normal(1, HEADS, tokens, HEAD_DIM) for _ in range(3))
    shared = normal(1, HEADS, 1, HEAD_DIM)
    layout = attention.TokenLayout(grid, sum(segments), order="tile", segments=segments)
    weight = normal(HEADS * HEAD_DIM, WIDTH) / WIDTH**0.5
    inputs = LayerInputs(normal(1, tokens, WIDTH), None, partial(F.linear, weight=weight))
    return (q + shared, k + shared, v), layout, inputs


def vsa(sparsity, **plan):
    return run_of(method="vsa", sparsity=sparsity, **plan)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9])
@pytest.mark.parametrize("grid, segments", CASES, ids=str)
def test_it_is_what_the_released_checkpoints_were_trained_with(grid, segments, sparsity, dtype):
    qkv, layout, inputs = case(grid, segments, dtype)
    found, cost = vsa(sparsity).attend(*qkv, Call(layout, inputs=inputs))
    gate = inputs.gate(inputs.x)[0].unflatten(-1, (HEADS, -1)).transpose(0, 1)
    expected = golden.vsa(*(x[0] for x in qkv), gate, list(segments), grid, sparsity)
    assert relative_error(found[0], expected) < LIMITS[dtype]
    assert cost.background > 0
    assert cost.density == 1.0 if sparsity == 0.0 else cost.density <= 1.0


def test_without_a_gate_it_is_block_sparse_attention_in_tiles():
    qkv, layout, inputs = case(*CASES[0])
    found, _ = vsa(0.8).attend(*qkv, Call(layout, inputs=inputs._replace(gate=None)))
    zero = inputs._replace(gate=lambda x: x.new_zeros(*x.shape[:2], HEADS * HEAD_DIM))
    expected, _ = vsa(0.8).attend(*qkv, Call(layout, inputs=zero))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("grid, segments", CASES, ids=str)
def test_tiles_hold_every_token_once_and_short_ones_come_last(grid, segments):
    layout = attention.TokenLayout(grid, sum(segments), 5, order="tile", segments=segments)
    found, (expected, before) = layout.blocks(), golden.vsa_tiles(list(segments), grid)
    own = [row[row >= 0].tolist() for row in found.kv_blocks.tokens]
    video, first = expected[before:], sum(segments)
    assert sorted(own[: len(video)]) == sorted(video) and found.num_ranked == len(video)
    assert own[len(video) : -1] == expected[:before]
    assert own[-1] == list(range(layout.tokens - 5, layout.tokens))
    assert [[x + first for x in row[row >= 0].tolist()] for row in found.q_blocks.tokens] == own[
        : len(video)
    ]
    whole = [len(row) == 64 for row in own[: len(video)]]
    assert whole == sorted(whole, reverse=True)


def test_its_tiles_are_no_setting_of_a_persons():
    plan = attention.SparsePlan(method="vsa", block_order="raster", key_block="16").resolve()
    assert (plan.block_order, plan.key_block, plan.query_block) == ("tile", "64", "64")
    assert plan.dense_first_steps == 0 and plan.allocation == "uniform"
    with pytest.raises(ValueError, match="order tile has blocks of 64"):
        attention.TokenLayout((4, 4, 4), order="tile").blocks(key_block=16)
    with pytest.raises(ValueError, match="add up to before = 7"):
        attention.TokenLayout((4, 4, 4), 7, order="tile", segments=(3, 3))


def test_gradients_reach_the_gate_and_leave_the_inputs_as_they_were():
    qkv, layout, inputs = case(*CASES[2])
    qkv = tuple(x.requires_grad_() for x in qkv)
    before = [x.detach().clone() for x in qkv]
    found, _ = vsa(0.5).attend(*qkv, Call(layout, inputs=inputs))
    found.square().sum().backward()
    assert all(torch.isfinite(x.grad).all() and x.grad.abs().max() > 0 for x in qkv)
    assert all(torch.equal(x, y) for x, y in zip(qkv, before))
