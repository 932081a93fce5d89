"""Bad input is refused before anything is launched, by the name of the argument, with what was found and expected."""

import pytest
import torch

from pack_loader import load
from support.data.blocks import feature_map, mixing_case, selected, sparse_case, table, tensors

ops, background = load(".kernels.ops"), load(".kernels.background")


def test_tensors_that_do_not_belong_together():
    q, k, v = tensors(*[(1, 1, 64, 32)] * 3)
    blocks = table(64)
    indices, counts, _ = selected(q, k, blocks, blocks, 1)
    with pytest.raises(ValueError, match=r"q, k, v must agree .* k \(1, 1, 64, 16\)"):
        ops.block_sparse_attention(q, k[..., :16], v[..., :16], blocks, blocks, indices, counts)
    with pytest.raises(ValueError, match="one dtype; found torch.float32"):
        ops.block_sparse_attention(q.float(), k, v, blocks, blocks, indices, counts)
    with pytest.raises(ValueError, match="one device; found meta, cpu"):
        ops.block_sparse_attention(q.to("meta"), k, v, blocks, blocks, indices, counts)
    with pytest.raises(ValueError, match="q must be floating point; found torch.int64"):
        ops.block_sparse_attention(q.long(), k.long(), v.long(), blocks, blocks, indices, counts)
    with pytest.raises(ValueError, match=r"one row per head and query block, \(1, 1, 1\); found \(1, 1, 3, 1\)"):
        ops.block_sparse_attention(q, k, v, blocks, blocks, indices.expand(1, 1, 3, 1), counts)
    with pytest.raises(ValueError, match="go together"):
        ops.block_sparse_attention(q, k, v, blocks, blocks, indices, counts, k)
    with pytest.raises(ValueError, match=r"tail_k must have the shape \(1, 1, 1, 32\)"):
        ops.block_sparse_attention(q, k, v, blocks, blocks, indices, counts, k, v)
    with pytest.raises(ValueError, match="scale must be a positive number, found nan"):
        ops.dense_attention(q, k, v, float("nan"))
    with pytest.raises(ValueError, match="backend must be one of auto, triton, pytorch; found 'cuda'"):
        ops.dense_attention(q, k, v, backend="cuda")


@pytest.mark.parametrize("shape", [(0, 1, 64, 32), (1, 0, 64, 32), (1, 1, 0, 32), (1, 1, 64, 0)])
def test_empty_tensors(shape):
    empty = torch.empty(shape)
    with pytest.raises(ValueError, match="none 0; found"):
        ops.block_pool(empty, table(64))
    with pytest.raises(ValueError, match="none 0; found"):
        ops.dense_attention(empty, empty, empty)


def test_block_tables():
    (q,) = tensors((1, 1, 100, 32))
    with pytest.raises(ValueError, match="integer table"):
        ops.block_pool(q, table(100).float())
    with pytest.raises(ValueError, match="blocks has 64 slots, too few for 100 tokens"):
        ops.block_pool(q, table(64))
    for wrong in (120, 90):                 # others would be read and stored out of bounds, or never written
        with pytest.raises(ValueError, match=f"blocks names {wrong} tokens up to {wrong - 1}; expected 100, each once"):
            ops.block_pool(q, table(wrong))


@pytest.mark.parametrize("keep, says", [
    (0, "keep must be at least 1, found 0"), (float("nan"), "keep must be a whole number, found nan"),
    (2.5, "keep must be a whole number, found 2.5"), (None, "keep must be a whole number, found None"),
])
def test_keep(keep, says):
    q, k = tensors((1, 1, 3, 32), (1, 1, 4, 32))
    with pytest.raises(ValueError, match=says):
        ops.block_select(q, k, torch.ones(4), keep)


def test_routing_shapes():
    q, k = tensors((1, 1, 3, 32), (1, 1, 4, 32))
    with pytest.raises(ValueError, match=r"forced must have the shape \(3, 4\); found \(3, 3\)"):
        ops.block_select(q, k, torch.ones(4), 1, torch.zeros(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"k_sizes must have the shape \(4,\)"):
        ops.block_select(q, k, torch.ones(3), 1)
    with pytest.raises(ValueError, match="bits must be int32 with 2 words a row; found torch.int64"):
        ops.lists_from_bits(torch.zeros(1, 2, dtype=torch.int64), 40, 3)


@pytest.mark.parametrize("spoil, says", [
    (lambda i, c: (i + 3, c), r"indices must be from 0 to 3; found 4 at \(0, 0, 0, 1\)"),
    (lambda i, c: (i - 5, c), r"indices must be from 0 to 3; found -5"),
    (lambda i, c: (i.flip(-1), c), "indices must ascend within a row, each block once"),
    (lambda i, c: (i[..., :1].expand_as(i), c), "indices must ascend within a row, each block once"),
    (lambda i, c: (i, c + 1), "counts must be from 0 to 2; found 3 to 3"),
    (lambda i, c: (i, c - 3), "counts must be from 0 to 2; found -1 to -1"),
    (lambda i, c: (i.float(), c), "indices must be int32 or int64; found torch.float32"),
])
def test_a_wrong_list_is_caught_on_the_host(spoil, says):
    (q, k, v, blocks, _, indices, counts), _ = sparse_case(250, torch.float32, heads=1, keep=2)
    indices[:] = torch.tensor([0, 1], dtype=torch.int32)
    ops.block_sparse_attention(q, k, v, blocks, blocks, indices, counts)
    with pytest.raises(ValueError, match=says):
        ops.block_sparse_attention(q, k, v, blocks, blocks, *spoil(indices, counts))


def test_unused_places_of_a_list_may_hold_anything():
    (q, k, v, blocks, _, indices, counts), _ = sparse_case(250, torch.float32, heads=1, keep=2)
    expected = ops.block_sparse_attention(q, k, v, blocks, blocks, indices[..., :1], counts - 1)[0]
    indices[..., 1] = 10_000
    assert torch.equal(ops.block_sparse_attention(q, k, v, blocks, blocks, indices, counts - 1)[0], expected)


def test_backgrounds():
    *sparse, tail, gate, first, branch = mixing_case(torch.float32, low_rank="softmax")
    for wrong, says in (
        ((tail[..., :1], gate, first), r"tail must have the shape \(1, 2, 3\)"),
        ((tail, gate._replace(c=gate.c[0]), first), r"gate.c must have the shape \(1, 2\)"),
        ((tail, gate, first._replace(cov=first.cov[..., :3])), "first.cov must have the shape"),
        ((tail, gate, first, branch._replace(eta=branch.eta[:1])), r"low_rank.eta must have the shape \(2,\)"),
        ((tail, gate, first, branch._replace(linear=branch.linear._replace(state=branch.linear.state[:, :, :16]))),
         r"low_rank.linear.state must have the shape \(1, 2, 24, 48\)"),
        ((tail.to("meta"), gate, first), r"all tensors must be on cpu, as q is; found \(1, 2, 3\) on meta"),
    ):
        with pytest.raises(ValueError, match=says):
            ops.block_sparse_mixed(*sparse, *wrong)


def test_feature_maps():
    k, v = tensors(*[(1, 2, 100, 32)] * 2, dtype=torch.float32)
    whole = feature_map("elu", 2, 100, 32, 16, torch.float32)
    for wrong, says in (
        (whole._replace(act="gelu"), "act must be one of softmax, elu, relu; found 'gelu'"),
        (whole._replace(sin=None), "cos and sin go together"), (whole._replace(places=None), "pe and places"),
        (whole._replace(cos=whole.cos[:5]), r"map.cos must have the shape \(100, 16\)"),
        (whole._replace(a=whole.a[:1]), r"map.a must have the shape \(2, 16, 32\)"),
        (whole._replace(a=None), "without a there is nothing to undo it for"),
    ):
        with pytest.raises(ValueError, match=says):
            ops.low_rank_state(k, v, wrong)
