"""Bad input is refused before any launch: the argument, what was found, what was expected.

What a bundle can check alone it checks when it is made; what has to fit q, k, v, when it is used.
"""

import pytest
import torch

from pack_loader import load
from support.data.blocks import (
    blocks_of,
    feature_map,
    layout_of,
    mask_like,
    mixing_case,
    ragged,
    selected,
    sparse_case,
    tensors,
    types,
)

ops = load(".kernels.ops")


def test_tensors_that_do_not_belong_together():
    q, k, v = tensors(*[(1, 1, 64, 32)] * 3)
    blocks = blocks_of(64)
    mask, _ = selected(q, k, blocks, blocks, 1)
    with pytest.raises(ValueError, match=r"q, k, v must agree .* k \(1, 1, 64, 16\)"):
        ops.block_sparse_attention(q, k[..., :16], v[..., :16], mask)
    with pytest.raises(ValueError, match="one dtype; found torch.float32"):
        ops.block_sparse_attention(q.float(), k, v, mask)
    with pytest.raises(ValueError, match="one device; found meta, cpu"):
        ops.block_sparse_attention(q.to("meta"), k, v, mask)
    with pytest.raises(ValueError, match="q must be floating point; found torch.int64"):
        ops.block_sparse_attention(q.long(), k.long(), v.long(), mask)
    with pytest.raises(ValueError, match=r"pooled.k must have the shape \(1, 1, 1, 32\)"):
        ops.block_sparse_attention(q, k, v, mask, types.PooledKV(k, v))
    with pytest.raises(ValueError, match="scale must be a positive number, found nan"):
        ops.dense_attention(q, k, v, scale=float("nan"))
    with pytest.raises(
        ValueError, match="backend must be one of auto, triton, pytorch; found 'cuda'"
    ):
        ops.dense_attention(q, k, v, backend="cuda")
    with pytest.raises(
        ValueError, match=r"out must have the shape \(1, 1, 64, 32\); found \(1, 1, 9, 32\)"
    ):
        ops.dense_attention(q, k, v, out=q[:, :, :9].clone())
    with pytest.raises(ValueError, match=r"must be on cpu, as q is; found .* on meta"):
        ops.dense_attention(q, k, v, out=torch.empty_like(q, device="meta"))
    with pytest.raises(ValueError, match="out must be torch.float64, as q is; found torch.float32"):
        ops.dense_attention(q, k, v, out=q.float())
    with pytest.raises(ValueError, match="out was given, but gradients are required"):
        ops.block_sparse_attention(q.clone().requires_grad_(), k, v, mask, out=torch.empty_like(q))


def test_a_mask_for_other_queries_or_keys():
    q, k, v = tensors(*[(1, 2, 100, 32)] * 3)
    long, short = blocks_of(100), blocks_of(60)
    for blocks, says in (
        ((short, long), "mask.q_blocks are blocks of 60 tokens, but the tensor has 100"),
        ((long, short), "mask.kv_blocks are blocks of 60 tokens, but the tensor has 100"),
    ):
        with pytest.raises(ValueError, match=says):
            ops.block_sparse_attention(q, k, v, ragged(2, *blocks))
    with pytest.raises(ValueError, match=r"kv_num_blocks must have the shape \(1, 2, 2\)"):
        ops.block_sparse_attention(q, k, v, ragged(1, long, long))
    some = types.TokenBlocks.cut(torch.arange(80), 64, num_tokens=100)
    with pytest.raises(
        ValueError, match="every query must be in a block; q_blocks lists 80 of 100"
    ):
        ragged(2, some, long)


@pytest.mark.parametrize("shape", [(0, 1, 64, 32), (1, 0, 64, 32), (1, 1, 0, 32), (1, 1, 64, 0)])
def test_empty_tensors(shape):
    empty = torch.empty(shape)
    with pytest.raises(ValueError, match="none 0; found"):
        ops.block_pool(empty, blocks_of(64))
    with pytest.raises(ValueError, match="none 0; found"):
        ops.dense_attention(empty, empty, empty)


def test_token_blocks():
    (q,) = tensors((1, 1, 100, 32))
    whole = blocks_of(100)
    table = whole.tokens
    with pytest.raises(ValueError, match="integer table"):
        types.TokenBlocks(table.float(), 100, 100)
    with pytest.raises(ValueError, match="tokens has 64 slots, too few for 100 tokens"):
        types.TokenBlocks(table[:1], 100, 100)
    with pytest.raises(ValueError, match="num_listed must be from 1 to 100, found 101"):
        types.TokenBlocks(table, 100, 101)
    for wrong in (120, 90):  # others would be read and stored out of bounds, or never written
        with pytest.raises(
            ValueError,
            match=f"tokens lists {wrong} tokens, {wrong} of them different, up to {wrong - 1}; exp",
        ):
            types.TokenBlocks(blocks_of(wrong).tokens, 100, 100)
        with pytest.raises(ValueError, match=f"blocks of {wrong} tokens, but the tensor has 100"):
            ops.block_pool(q, blocks_of(wrong))


def test_token_blocks_say_where_every_token_stands():
    listed = torch.tensor([5, 3, 0, 9, 7])
    blocks = types.TokenBlocks.cut(listed, 2, num_tokens=10)
    assert blocks.num_blocks == 3 and blocks.block_size == 2 and blocks.has_empty_slots
    assert not blocks.lists_every_token and blocks.sizes.tolist() == [2, 2, 1]
    assert blocks.block_of_token.tolist() == [1, 3, 3, 0, 3, 0, 3, 2, 3, 1]
    assert blocks.slots.tolist() == [5, 3, 0, 9, 7, 0]
    again = blocks.to("meta")
    assert again.tokens.device.type == "meta" and again.num_listed == 5


@pytest.mark.parametrize("topk, says", [
    (0, "topk must be at least 1, found 0"), (float("nan"), "topk must be a whole number, found nan"),
    (2.5, "topk must be a whole number, found 2.5"), (None, "topk must be a whole number, found None"),
])  # fmt: skip
def test_topk(topk, says):
    q, k = tensors((1, 1, 3, 32), (1, 1, 4, 32))
    with pytest.raises(ValueError, match=says):
        ops.block_select(q, k, layout_of(blocks_of(192), blocks_of(256)), topk)


def test_routing_shapes():
    q, k = tensors((1, 1, 3, 32), (1, 1, 4, 32))
    q_blocks, kv_blocks = blocks_of(192), blocks_of(256)
    with pytest.raises(ValueError, match=r"required must have the shape \(3, 4\); found \(3, 3\)"):
        layout_of(q_blocks, kv_blocks, torch.zeros(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"pooled_k must have the shape \(1, 1, 3, 32\)"):
        ops.block_select(q, k, layout_of(q_blocks, q_blocks), 1)
    with pytest.raises(
        ValueError, match="bits must be int32 with 1 words a row; found torch.int64"
    ):
        ops.mask_from_bits(
            torch.zeros(1, 1, 3, 1, dtype=torch.int64), layout_of(q_blocks, kv_blocks), 3
        )


@pytest.mark.parametrize("spoil, says", [
    (lambda i, c: (i + 3, c), r"kv_indices must be from 0 to 3; found 4 at \(0, 0, 0, 1\)"),
    (lambda i, c: (i - 5, c), r"kv_indices must be from 0 to 3; found -5"),
    (lambda i, c: (i.flip(-1), c), "kv_indices must ascend within a row, each block once"),
    (lambda i, c: (i[..., :1].expand_as(i), c), "kv_indices must ascend within a row, each block once"),
    (lambda i, c: (i, c + 1), "kv_num_blocks must be from 0 to 2; found 3 to 3"),
    (lambda i, c: (i, c - 3), "kv_num_blocks must be from 0 to 2; found -1 to -1"),
    (lambda i, c: (i.float(), c), "kv_indices must be int16, int32 or int64; found torch.float32"),
    (lambda i, c: (i.expand(1, 1, 4, 2)[:, :, :3], c), "must have 4 rows per head, one per query block"),
])  # fmt: skip
def test_a_wrong_list_is_caught_when_the_mask_is_made(spoil, says):
    (*_, mask), _ = sparse_case(250, torch.float32, heads=1, topk=2)
    lists = torch.tensor([0, 1], dtype=torch.int32).expand_as(mask.kv_indices)
    mask_like(mask, kv_indices=lists)
    wrong_lists, wrong_counts = spoil(lists, mask.kv_num_blocks)
    with pytest.raises(ValueError, match=says):
        mask_like(mask, kv_indices=wrong_lists, kv_num_blocks=wrong_counts)


def test_a_mask_is_made_of_what_is_kept_and_says_it_again():
    q_blocks, kv_blocks = blocks_of(192), blocks_of(250)
    kept = torch.rand(2, 3, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    kept[0, 0, 1] = False
    for width in (None, 4):
        mask = ops.BlockMask.from_dense(q_blocks, kv_blocks, kept, width)
        assert torch.equal(mask.to_dense(), kept)
        mask_like(mask)  # looked at entry by entry
    with pytest.raises(ValueError, match="a row keeps 4 blocks; list_width is 2"):
        ops.BlockMask.from_dense(q_blocks, kv_blocks, torch.ones_like(kept), 2)
    with pytest.raises(ValueError, match=r"kept must be \(B, H, 3, 4\).*found \(2, 3, 4, 4\)"):
        ops.BlockMask.from_dense(q_blocks, kv_blocks, kept[:, :, [0, 1, 2, 2]])


def test_unused_entries_of_a_list_may_hold_anything():
    (q, k, v, mask), _ = sparse_case(250, torch.float32, heads=1, topk=2)
    one = mask.kv_num_blocks - 1
    short = mask_like(mask, kv_indices=mask.kv_indices[..., :1], kv_num_blocks=one)
    expected = ops.block_sparse_attention(q, k, v, short)[0]
    lists = mask.kv_indices.clone()
    lists[..., 1] = 10_000
    spoiled = mask_like(mask, kv_indices=lists, kv_num_blocks=one)
    assert torch.equal(ops.block_sparse_attention(q, k, v, spoiled)[0], expected)


def test_backgrounds():
    *sparse, (gate, first, branch) = mixing_case(torch.float32, low_rank="softmax")
    state = branch.state
    cut = state._replace(kv_state=state.kv_state[:, :, :16])
    for wrong, says in (
        ((gate._replace(dropped_lse=gate.dropped_lse[..., :1]), first), r"gate.dropped_lse must have the shape \(1, 2, 3\)"),
        ((gate._replace(slope=gate.slope[0]), first), r"gate.slope must have the shape \(1, 2\)"),
        ((gate, first._replace(cov=first.cov[..., :3])), "first_order.cov must have the shape"),
        ((gate, first, branch._replace(scale=branch.scale[:1])), r"low_rank.scale must have the shape \(2,\)"),
        ((gate, first, branch._replace(state=cut)), r"low_rank.state.kv_state must have the shape \(1, 2, 24, 48\)"),
        ((gate._replace(slope=gate.slope.to("meta")), first), r"all tensors must be on cpu, as q is; found \(1, 2\) on meta"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            ops.block_sparse_mixed(*sparse, types.Background(*wrong))


def test_feature_maps():
    k, v = tensors(*[(1, 2, 100, 32)] * 2, dtype=torch.float32)
    whole = feature_map("elu", 2, 100, 32, 16, torch.float32)
    for wrong, says in (
        (whole._replace(act="gelu"), "act must be one of softmax, elu; found 'gelu'"),
        (whole._replace(rope_sin=None), "feature_map.rope_cos needs feature_map.rope_sin; found it alone"),
        (whole._replace(axis_ids=None), "feature_map.pe needs feature_map.axis_ids; found it alone"),
        (whole._replace(rope_cos=whole.rope_cos[:5]), r"feature_map.rope_cos must have the shape \(100, 16\)"),
        (whole._replace(proj=whole.proj[:1]), r"feature_map.proj must have the shape \(2, 16, 32\)"),
        (whole._replace(proj=None), "without proj there is nothing to undo it for"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            ops.low_rank_state(k, v, wrong)


def test_a_mask_that_keeps_nothing_gives_nothing():
    q, k, v = tensors(*[(1, 2, 192, 32)] * 3, dtype=torch.float32)
    kept = torch.zeros(1, 2, 3, 3, dtype=torch.bool)
    mask = ops.BlockMask.from_dense(blocks_of(192), blocks_of(192), kept)
    out, lse = ops.block_sparse_attention(q, k, v, mask)
    assert not out.any() and lse.isneginf().all()


def test_a_table_that_no_kernel_could_read_is_refused():
    """A token twice, or a token behind an empty slot: kernels look at a block's last slot alone."""
    table = torch.arange(128, dtype=torch.int32).view(2, 64)
    twice, behind = table.clone(), table.clone()
    twice[0, 1] = 0
    behind[1, 0] = -1
    with pytest.raises(ValueError, match="tokens lists 128 tokens, 127 of them different"):
        ops.TokenBlocks(twice, 128, 128)
    with pytest.raises(ValueError, match="must fill each block from the front"):
        ops.TokenBlocks(behind, 128, 127)
