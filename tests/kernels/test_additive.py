"""RoLA's branch, SLA's paper form and VSA's against their definition in float64.

Triton adds RoLA's branch; all else is plain PyTorch.
"""

import pytest
import torch

from pack_loader import load
from support.data.backend import BACKEND, HALF, same
from support.data.blocks import blocks_of, layout_of, reference, sparse_case, tensors, types, wide

ops = load(".kernels.ops")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def branch_of(dtype, tokens=170, heads=2, head_dim=48, rank=16, turned=6, positions=True):
    """An `RmsLowRank` with everything that it may have."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    proj_q, proj_k, pe = tensors(
        *[(heads, rank, head_dim)] * 2, (heads, 9, rank), dtype=sums, seed=5
    )
    angles, turns = tensors((tokens, head_dim // 2), (tokens, turned), dtype=sums, seed=6)
    number = torch.arange(tokens)
    axis_ids = torch.stack((number % 3, 3 + number % 4, 7 + number % 2), dim=1).int()
    learned = (0.3 * pe, axis_ids) if positions else (None, None)
    rotated = (turns.cos(), turns.sin()) if turned else (None, None)
    q_map, k_map = (
        types.SiluMap(proj / head_dim**0.5, angles.cos(), angles.sin(), *learned, *rotated)
        for proj in (proj_q, proj_k)
    )
    return types.RmsLowRank(q_map, k_map, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned, positions", [(6, True), (8, False), (0, True)])
def test_rolas_branch_matches_its_definition(dtype, turned, positions):
    (q, k, v, _), _ = sparse_case(170, dtype, 48)
    branch = branch_of(dtype, turned=turned, positions=positions)
    found = ops.rms_low_rank(q, k, v, branch)
    same(found, reference.rms_low_rank(*wide((q, k, v, branch))), dtype)
    (gate,) = tensors((1, 2, 170), dtype=found.dtype, seed=8)
    (sparse,) = tensors(q.shape, dtype=dtype, seed=9)
    case, out = (q, k, v, sparse, gate, branch), torch.empty_like(q)
    expected = reference.add_rms_low_rank(*wide(case))
    own = BACKEND if dtype in HALF else {}
    mixed = ops.add_rms_low_rank(q, k, v, sparse.clone(), gate, branch, **own)
    assert mixed.dtype == dtype
    same(mixed, expected, dtype)
    assert ops.add_rms_low_rank(*case, out=out, **own) is out and torch.equal(out, mixed)
    energy = ops.feature_energy(q, k, v, branch)
    same(energy, reference.feature_energy(*wide((q, k, v, branch))), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_linear_branch_over_marked_blocks_matches_its_definition(dtype):
    (q, k, v, _), _ = sparse_case(330, dtype, 48)
    listed = torch.cat((torch.arange(0, 100), torch.arange(120, 330)))
    layout = layout_of(
        blocks_of(330, shuffled=True), types.TokenBlocks.cut(listed, 64, num_tokens=330)
    )
    generator = torch.Generator().manual_seed(0)
    marginal = torch.rand(1, 2, 6, 5, generator=generator) < 0.5
    marginal[:, :, 0] = False
    found = ops.marginal_linear(q, k, v, layout, marginal)
    expected = reference.marginal_linear(*wide((q, k, v)), layout, marginal, eps=1e-5)
    same(found, expected, dtype)


def test_what_does_not_fit_is_named():
    (q, k, v, _), _ = sparse_case(170, torch.float32, 48)
    branch = branch_of(torch.float32)
    q_map = branch.q_map
    for wrong, says in (
        (
            q_map._replace(feature_sin=None),
            "q_map.feature_cos needs q_map.feature_sin; found it alone",
        ),
        (q_map._replace(proj=q_map.proj[:, :8]), "q_map rotates 6 pairs of features, but has 8"),
        (q_map._replace(rope_cos=q_map.rope_cos[:5]), "q_map.rope_cos must have the shape"),
        (q_map._replace(pe=None), "q_map.axis_ids needs q_map.pe; found it alone"),
    ):
        if wrong.proj.shape[1] == 8:
            wrong = wrong._replace(pe=None, axis_ids=None)
        with pytest.raises(ValueError, match=says):
            ops.rms_low_rank(q, k, v, branch._replace(q_map=wrong))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_between_blocks_matches_its_definition(dtype):
    """Blocks of any size, in any order; a token that is in none gets nothing."""
    (q, k, v, _), _ = sparse_case(170, dtype, 48)
    table = torch.full((4, 64), -1)
    for row, (start, stop) in zip(table, ((100, 164), (0, 17), (17, 60), (60, 99))):
        row[: stop - start] = torch.arange(start, stop)
    blocks = types.TokenBlocks(table.int(), 170, 163)
    pooled = tuple(
        ops.block_pool(x, blocks, **(BACKEND if dtype in HALF else {})) for x in (q, k, v)
    )
    out, gate = tensors(q.shape, q.shape, dtype=dtype, seed=9)
    expected = reference.add_coarse(*wide((out, gate, pooled)), blocks, scale=0.2)
    kept = out.clone()
    found = ops.add_coarse(out, gate, pooled, blocks, scale=0.2)
    same(found, expected, dtype)
    assert found.data_ptr() == out.data_ptr() and torch.equal(found[:, :, 164:], kept[:, :, 164:])
    with pytest.raises(ValueError, match="pooled k"):
        ops.add_coarse(out, gate, (pooled[0], pooled[1][:, :, :2], pooled[2]), blocks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [48, 128])
def test_a_linear_map_that_is_added_matches_its_definition(dtype, head_dim):
    (x,) = tensors((2, 3, 600, head_dim), dtype=dtype, seed=3)
    (matrix,) = tensors((2, 3, head_dim, head_dim), seed=4)
    own = BACKEND if dtype in HALF else {}
    found, expected = ops.add_mapped(x, matrix, **own), reference.add_mapped(*wide((x, matrix)))
    assert found.dtype == dtype and found.transpose(1, 2).is_contiguous()
    same(found, expected, dtype)
    side_by_side = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.add_mapped(side_by_side, matrix, **own), found)
    assert ops.add_mapped(side_by_side, matrix, out=side_by_side, **own) is side_by_side
    assert torch.equal(side_by_side, found)
    leaf = x.clone().requires_grad_()
    ops.add_mapped(leaf, matrix).sum().backward()
    same(leaf.grad, 1.0 + wide(matrix).sum(dim=-1)[:, :, None].expand_as(x), dtype)
    with pytest.raises(ValueError, match="matrix must have the shape"):
        ops.add_mapped(x, matrix[:, :1])
