"""Token layouts: every token in exactly one block on any grid, and blocks are compact."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pack_loader import load
from support.data.fields import smooth_qkv

layout = load(".attention.block_layout")
# A busy machine is slow to draw examples; that says nothing about the code.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
grids = st.tuples(st.integers(1, 13), st.integers(1, 19), st.integers(1, 19))


@patient
@given(grids, st.integers(0, 150), st.integers(0, 150), st.sampled_from(["raster", "cube"]))
def test_every_token_is_in_exactly_one_block(grid, before, after, order):
    tokens = layout.TokenLayout(grid, before, after, order)
    blocks = tokens.blocks()
    keys, video = blocks.kv_blocks, blocks.q_blocks
    assert torch.equal(keys.tokens[keys.tokens >= 0].sort().values, torch.arange(tokens.tokens))
    assert torch.equal(video.tokens[video.tokens >= 0].sort().values, torch.arange(math.prod(grid)))
    assert torch.equal(keys.sizes, (keys.tokens >= 0).sum(dim=1))
    assert (keys.sizes > 0).all()
    assert (
        keys.sizes[: video.num_blocks - 1] == 64
    ).all()  # only the last video block may be short
    own = blocks.kv_of_queries
    assert torch.equal(own.tokens, torch.where(video.empty, -1, video.tokens + before))
    assert own.num_listed == video.num_listed


@patient
@given(grids, st.integers(0, 100), st.integers(0, 100))
def test_text_has_blocks_of_its_own_that_every_query_keeps(grid, before, after):
    tokens = layout.TokenLayout(grid, before, after, "cube")
    blocks = tokens.blocks()
    n_q, keys = blocks.q_blocks.num_blocks, blocks.kv_blocks.tokens
    in_video = (keys >= before) & (keys < before + math.prod(grid))
    assert in_video[:n_q].sum() == math.prod(grid) and not in_video[n_q:].any()
    if before + after:
        assert blocks.required.mask[:, n_q:].all() and not blocks.required.mask[:, :n_q].any()
    else:
        assert blocks.required is None


@patient
@given(grids, st.integers(1, 100), st.integers(0, 100), st.data())
def test_hidden_tokens_are_in_no_block_and_change_no_other(grid, before, after, data):
    """Blocks are those of a sequence without them, and every other token keeps its number."""
    start = data.draw(st.integers(0, before - 1))
    stop = data.draw(st.integers(start + 1, before))
    tokens = layout.TokenLayout(grid, before, after, hidden=((start, stop),))
    keys = tokens.blocks().kv_blocks
    left = before - (stop - start)
    shorter = layout.TokenLayout(grid, left, after).blocks().kv_blocks
    seen = torch.cat((torch.arange(start), torch.arange(stop, tokens.tokens)))
    expected = torch.where(shorter.empty, -1, seen[shorter.slots].view(shorter.tokens.shape))
    assert torch.equal(keys.tokens, expected.int())
    assert keys.num_listed == tokens.attended_tokens == tokens.tokens - (stop - start)


def test_diagonal_and_first_frame_are_required_on_request():
    blocks = layout.TokenLayout((6, 8, 8), order="cube").blocks(True, True)
    required, tokens = blocks.required.mask, blocks.q_blocks.tokens
    assert required.diagonal().all()
    first = ((tokens >= 0) & (tokens < 64)).any(dim=1)
    assert required[:, first].all()
    elsewhere = required & ~torch.eye(len(first), dtype=torch.bool)
    assert not elsewhere[:, ~first].any()
    assert torch.equal(blocks.required.counts, required.sum(dim=1))


@pytest.mark.parametrize("grid", [(21, 30, 52), (21, 45, 80), (9, 17, 23)])
def test_cube_blocks_are_compact(grid):
    """Every full block lies within two bars and a few columns, also where the snake turns."""
    table = layout.TokenLayout(grid, order="cube").blocks().q_blocks.tokens
    full = table[(table >= 0).all(dim=1)]
    t, h, w = full // (grid[1] * grid[2]), full // grid[2] % grid[1], full % grid[2]
    frames, rows, columns = (x.amax(dim=1) - x.amin(dim=1) + 1 for x in (t, h, w))
    assert frames.max() <= 8 and rows.max() <= 8 and columns.max() <= 9
    inside_a_bar = (frames <= 4) & (rows <= 4)
    bars = -(-grid[0] // 4) * -(-grid[1] // 4)
    assert (~inside_a_bar).sum() < bars


@pytest.mark.parametrize("grid", [(21, 15, 26), (9, 16, 16), (8, 18, 20)])
def test_cube_blocks_hold_more_of_the_attention_than_raster_blocks(grid):
    """Recall of the best tenth of the blocks, chosen with full knowledge of the attention."""
    q, k, v = smooth_qkv(grid, heads=2, width=64, sharpness=1.5)
    recall = {}
    for order in ("raster", "cube"):
        blocks = layout.TokenLayout(grid, order=order).blocks().q_blocks
        weights = torch.softmax(q @ k.mT / 8, dim=-1)
        member = torch.nn.functional.one_hot(blocks.block_of_token).float()
        mass = member.T @ weights @ member / member.sum(0)[:, None]
        recall[order] = (
            mass.topk(max(1, blocks.num_blocks // 10), dim=-1).values.sum(dim=-1).mean().item()
        )
    assert recall["cube"] > recall["raster"]


def test_wrong_layouts_are_refused():
    with pytest.raises(ValueError, match=r"grid must be \(frames, height, width\).*\(0, 4, 4\)"):
        layout.TokenLayout((0, 4, 4))
    with pytest.raises(ValueError, match="found -1 and 0"):
        layout.TokenLayout((1, 4, 4), before=-1)
    with pytest.raises(ValueError, match="'spiral'"):
        layout.TokenLayout((1, 4, 4), order="spiral")
    for spans in (
        ((4, 6),),
        ((2, 2),),
        ((3, 5), (0, 2)),
        ((0, 3), (2, 4)),
        ((20, 40),),
        ((-1, 2),),
    ):
        with pytest.raises(
            ValueError, match="hidden must be ascending spans .* before or after the video"
        ):
            layout.TokenLayout((1, 4, 4), before=5, after=9, hidden=spans)


@pytest.mark.parametrize("order", ["cube", "raster"])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_key_blocks_divide_query_blocks(order, size):
    """In the same order, so that a query block's own tokens are those of some key blocks."""
    case = layout.TokenLayout((3, 7, 9), before=5, after=21, order=order, hidden=((200, 204),))
    blocks = case.blocks(keep_diagonal=True, key_block=size)
    queries, keys = blocks.q_blocks, blocks.kv_blocks
    assert (queries.block_size, keys.block_size) == (64, size)
    assert blocks.num_ranked == -(-189 // size) == blocks.kv_of_queries.num_blocks
    video = keys.tokens[: blocks.num_ranked].flatten()
    assert torch.equal(video[video >= 0], queries.tokens[queries.tokens >= 0] + 5)
    beside = keys.tokens[blocks.num_ranked :].flatten()
    assert beside[beside >= 0].tolist() == [*range(5), *range(194, 200), *range(204, 215)]
    for i, row in enumerate(blocks.required.mask):
        kept = keys.tokens[: blocks.num_ranked][row[: blocks.num_ranked]].flatten()
        own = queries.tokens[i]
        assert torch.equal(kept[kept >= 0], own[own >= 0] + 5)
        assert row[blocks.num_ranked :].all()


def test_the_first_frame_costs_less_in_fine_key_blocks():
    case = layout.TokenLayout((2, 8, 20), order="raster")
    counts = [
        case.blocks(keep_first_frame=True, key_block=size).required.counts for size in (64, 16)
    ]
    assert [int(each[0]) * size for each, size in zip(counts, (64, 16))] == [192, 160]


def test_a_key_block_that_does_not_divide_a_query_block_is_refused():
    with pytest.raises(ValueError, match="key_block must divide 64; found 24"):
        layout.TokenLayout((1, 4, 4)).blocks(key_block=24)
