"""Token layouts: every token stands in exactly one block, whatever the grid, and blocks are as compact as promised."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pack_loader import load
from support.data.fields import smooth_qkv

layout = load(".attention.layout")
reference = load(".kernels.reference")
# A busy machine is slow to draw examples; that says nothing about the code.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
grids = st.tuples(st.integers(1, 13), st.integers(1, 19), st.integers(1, 19))


@patient
@given(grids, st.integers(0, 150), st.integers(0, 150), st.sampled_from(["raster", "cube"]))
def test_every_token_is_in_exactly_one_block(grid, before, after, order):
    tokens = layout.TokenLayout(grid, before, after, order)
    tables = tokens.tables(False, False)
    filled = tables.keys[tables.keys >= 0]
    assert torch.equal(filled.sort().values, torch.arange(tokens.tokens))
    video = tables.video[tables.video >= 0]
    assert torch.equal(video.sort().values, torch.arange(math.prod(grid)))
    assert torch.equal(tables.key_sizes, (tables.keys >= 0).sum(dim=1))
    assert (tables.key_sizes > 0).all()
    assert (tables.key_sizes[: tables.video.shape[0] - 1] == 64).all()        # only the last video block may be short


@patient
@given(grids, st.integers(0, 100), st.integers(0, 100))
def test_text_has_blocks_of_its_own_that_every_query_keeps(grid, before, after):
    tokens = layout.TokenLayout(grid, before, after, "cube")
    tables = tokens.tables(False, False)
    n_q = tables.video.shape[0]
    in_video = (tables.keys >= before) & (tables.keys < before + math.prod(grid))
    assert in_video[:n_q].sum() == math.prod(grid) and not in_video[n_q:].any()
    if before + after:
        assert tables.forced[:, n_q:].all() and not tables.forced[:, :n_q].any()
    else:
        assert tables.forced is None


def test_diagonal_and_first_frame_are_forced_on_request():
    tables = layout.TokenLayout((6, 8, 8), order="cube").tables(True, True)
    assert tables.forced.diagonal().all()
    first = ((tables.video >= 0) & (tables.video < 64)).any(dim=1)
    assert tables.forced[:, first].all()
    elsewhere = tables.forced & ~torch.eye(len(first), dtype=torch.bool)
    assert not elsewhere[:, ~first].any()
    assert torch.equal(tables.forced_counts, tables.forced.sum(dim=1))


@pytest.mark.parametrize("grid", [(21, 30, 52), (21, 45, 80), (9, 17, 23)])
def test_cube_blocks_are_compact(grid):
    """Every full block lies within two bars across and a few columns, those on a turn of the walk included."""
    table = layout.TokenLayout(grid, order="cube").tables(False, False).video
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
        table = layout.TokenLayout(grid, order=order).tables(False, False).video
        owner = reference.token_to_block(table)
        weights = torch.softmax(q @ k.mT / 8, dim=-1)
        member = torch.nn.functional.one_hot(owner).float()
        mass = member.T @ weights @ member / member.sum(0)[:, None]
        recall[order] = mass.topk(max(1, table.shape[0] // 10), dim=-1).values.sum(dim=-1).mean().item()
    assert recall["cube"] > recall["raster"]


def test_wrong_layouts_are_refused():
    with pytest.raises(ValueError, match=r"grid must be \(frames, rows, columns\).*\(0, 4, 4\)"):
        layout.TokenLayout((0, 4, 4))
    with pytest.raises(ValueError, match="found -1 and 0"):
        layout.TokenLayout((1, 4, 4), before=-1)
    with pytest.raises(ValueError, match="'spiral'"):
        layout.TokenLayout((1, 4, 4), order="spiral")
