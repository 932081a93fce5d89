"""Dense and block-sparse attention against their definition in float64, on the backend at hand.

In a process of its own the same tests run on Triton's kernels, in the watched interpreter.
"""

import pytest
import torch

from pack_loader import load
from support.data.backend import BACKEND, DTYPES, HALF, same
from support.data.blocks import (
    LIMITS,
    blocks_of,
    layout_of,
    packed,
    ragged,
    reference,
    selected,
    sparse_case,
    tensors,
    types,
    wide,
)

ops = load(".kernels.ops")


@pytest.mark.parametrize(
    "tokens", [1, 63, 64, 65, 127, 129, pytest.param(1000, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_attention_matches_its_definition(tokens, dtype):
    batch = 2 if tokens < 100 else 1
    case, _ = sparse_case(tokens, dtype, batch=batch, topk=4 if tokens == 1000 else None)
    out, lse = ops.block_sparse_attention(*case, **BACKEND)
    expected, expected_lse = reference.block_sparse_attention(*wide(case))
    assert out.dtype == dtype and out.shape == case[0].shape
    same(out, expected, dtype)
    assert (lse - expected_lse).abs().max() < max(LIMITS[dtype], 1e-5)


@pytest.mark.slow
def test_many_blocks():
    case, _ = sparse_case(4097, torch.bfloat16, heads=1, topk=2)
    out, _ = ops.block_sparse_attention(*case, **BACKEND)
    same(out, reference.block_sparse_attention(*wide(case))[0], torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("scale", [1.0, 16.0, 64.0])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_large_activations_stay_finite_and_right(head_dim, scale, dtype):
    """Keys scaled in bf16 before the product are right at unit scale and wrong at 16 times it."""
    case, _ = sparse_case(200, dtype, head_dim, scale=scale, topk=2)
    out, lse = ops.block_sparse_attention(*case, **BACKEND)
    expected, _ = reference.block_sparse_attention(*wide(case))
    assert torch.isfinite(lse).all()
    # Logits grow with the square of the scale: at 64 they reach 5e4, where a float32 step is 4e-3.
    same(out, expected, dtype, LIMITS[dtype] + {1.0: 0, 16.0: 1e-4, 64.0: 2e-3}[scale])


@pytest.mark.parametrize("q_tokens, k_tokens", [(130, 700), (700, 130), (64, 65)])
@pytest.mark.parametrize("pooled", [False, True])
def test_query_and_key_lengths_may_differ_and_rows_may_be_ragged(q_tokens, k_tokens, pooled):
    (q,) = tensors((1, 3, q_tokens, 32), dtype=torch.float32)
    k, v = tensors(*[(1, 3, k_tokens, 32)] * 2, seed=1, dtype=torch.float32)
    q_blocks, kv_blocks = blocks_of(q_tokens), blocks_of(k_tokens, shuffled=True)
    shape = (q_blocks.num_blocks, kv_blocks.num_blocks)
    required = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.3
    mask, _ = selected(q, k, q_blocks, kv_blocks, 1, required)
    far = types.PooledKV(*(reference.block_pool(x, kv_blocks) for x in (k, v))) if pooled else None
    case = (q, k, v, mask, far)
    out, lse = ops.block_sparse_attention(*case, **BACKEND)
    expected, expected_lse = reference.block_sparse_attention(*wide(case))
    same(out, expected, torch.float32)
    assert (lse - expected_lse).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_blocks_may_be_short(dtype):
    """As tiles at the sides of a grid are; whole ones come first. Selection, sum and all."""
    q, k, v = tensors(*[(1, 3, 190, 64)] * 3, dtype=dtype)
    table, order = torch.full((6, 64), -1), torch.arange(190)
    for row, part in zip(table, order.split([64, 64, 20, 7, 34, 1])):
        row[: len(part)] = part
    blocks = types.TokenBlocks(table.int(), 190, 190)
    layout, means = (
        layout_of(blocks, blocks),
        [ops.block_pool(x, blocks, **BACKEND) for x in (q, k)],
    )
    for found, x in zip(means, (q, k)):
        same(found, reference.block_pool(x.double(), blocks), dtype)
    for topk in (1, 4, 6):
        mask, _ = ops.block_select(*means, layout, topk, **BACKEND)
        expected_mask, _ = reference.block_select(*wide(means), layout, topk)
        assert torch.equal(mask.to_dense(), expected_mask.to_dense())
        case = (q, k, v, mask, None)
        out, lse = ops.block_sparse_attention(*case, **BACKEND)
        expected, expected_lse = reference.block_sparse_attention(*wide(case))
        same(out, expected, dtype)
        assert (lse - expected_lse).abs().max() < 1e-4


@pytest.mark.parametrize("key_block", [64, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pooled", [False, True])
def test_rows_may_keep_from_nothing_to_everything(dtype, pooled, key_block):
    q, k, v = tensors(*[(1, 3, 330, 64)] * 3, dtype=dtype)
    keys = blocks_of(330, key_block, shuffled=key_block != 64)
    mask, far = ragged(3, blocks_of(330), keys), None
    if pooled:
        far = types.PooledKV(*(reference.block_pool(x.double(), keys).to(dtype) for x in (k, v)))
    case = (q, k, v, mask, far)
    out, lse = ops.block_sparse_attention(*case, **BACKEND)
    expected, expected_lse = reference.block_sparse_attention(*wide(case))
    same(out, expected, dtype)
    if not pooled:
        assert (mask.kv_num_blocks[:, :, 0] == 0).all()
        assert (out[:, :, :64] == 0).all() and (lse[:, :, :64] == -torch.inf).all()
    finite = expected_lse > -torch.inf
    assert (lse - expected_lse)[finite].abs().max() < 1e-4


@pytest.mark.parametrize("key_block", [64, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pooled", [False, True])
def test_packed_lists_give_what_padded_ones_give(dtype, pooled, key_block):
    """One head keeps nothing at all, one a single block of some rows."""
    q, k, v = tensors(*[(1, 3, 330, 64)] * 3, dtype=dtype)
    keys, far = blocks_of(330, key_block, shuffled=True), None
    kept = ragged(3, blocks_of(330), keys).to_dense()
    kept[:, 0], kept[:, 1, :, 1:] = False, False
    mask = types.BlockMask.from_dense(blocks_of(330), keys, kept)
    if pooled:
        far = types.PooledKV(*(reference.block_pool(x.double(), keys).to(dtype) for x in (k, v)))
    own = packed(mask)
    assert torch.equal(own.to_dense(), mask.to_dense())
    out, lse = ops.block_sparse_attention(q, k, v, own, far, **BACKEND)
    expected, expected_lse = ops.block_sparse_attention(q, k, v, mask, far, **BACKEND)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    if not pooled:
        assert (out[:, 0] == 0).all() and (lse[:, 0] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_blocks_kept_is_dense_attention(dtype):
    case, dropped_lse = sparse_case(270, dtype, topk=5)
    q, k, v = wide(case[:3])
    expected, expected_lse = reference.dense_attention(q, k, v)
    for out, lse in (
        ops.block_sparse_attention(*case, **BACKEND),
        ops.dense_attention(*case[:3], **BACKEND),
        ops.dense_attention(case[0][:, :, :70], *case[1:3], **BACKEND),
    ):
        rows = out.shape[2]
        same(out, expected[:, :, :rows], dtype)
        assert (lse - expected_lse[:, :, :rows]).abs().max() < max(LIMITS[dtype], 1e-5)
    assert (dropped_lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("key_block", [64, 16])
def test_keys_in_no_block_are_never_seen(dtype, pooled, key_block):
    """Hidden text's keys and values hold NaN here, and none of it may come through."""
    q, k, v = tensors(*[(1, 2, 200, 64)] * 3, dtype=dtype)
    listed = torch.cat((torch.arange(0, 90), torch.arange(110, 200)))
    k[:, :, 90:110], v[:, :, 90:110] = torch.nan, torch.nan
    q_blocks, kv_blocks = blocks_of(200), types.TokenBlocks.cut(listed, key_block, num_tokens=200)
    # Blocks are those of a sequence that never had the hidden keys.
    seen_k, seen_v, seen_blocks = k[:, :, listed], v[:, :, listed], blocks_of(180, key_block)
    mask, _ = selected(q, seen_k, q_blocks, seen_blocks, 2)
    here = types.BlockMask(q_blocks, kv_blocks, mask.kv_indices, mask.kv_num_blocks)
    far = None
    if pooled:
        pools = (reference.block_pool(x.double(), seen_blocks).to(dtype) for x in (seen_k, seen_v))
        far = types.PooledKV(*pools)
    expected, expected_lse = reference.block_sparse_attention(*wide((q, seen_k, seen_v, mask, far)))
    out, lse = ops.block_sparse_attention(q, k, v, here, far, **BACKEND)
    same(out, expected, dtype)
    assert (lse - expected_lse).abs().max() < max(LIMITS[dtype], 1e-5)
    dense, _ = ops.dense_attention(q, k, v, kv_blocks, **BACKEND)
    same(dense, reference.dense_attention(*wide((q, seen_k, seen_v)))[0], dtype)
    assert torch.isnan(reference.dense_attention(*wide((q, k, v)))[0]).any()


def test_what_padding_would_hold_is_never_seen():
    """Tokens next to a short block in memory hold NaN; a mask that multiplies lets them through."""
    q, k, v = tensors(*[(1, 1, 200, 64)] * 3, dtype=torch.float32)
    views = [torch.cat((x, torch.full_like(x, torch.nan)), dim=2)[:, :, :200] for x in (q, k, v)]
    blocks = blocks_of(200)
    mask, _ = selected(q, k, blocks, blocks, 2)
    out, _ = ops.block_sparse_attention(*views, mask, **BACKEND)
    same(out, reference.block_sparse_attention(*wide((q, k, v)), mask)[0], torch.float32)
    pooled = ops.block_pool(views[1], blocks, **BACKEND)
    same(pooled, reference.block_pool(k.double(), blocks), torch.float32)


def test_strides_of_the_caller_are_taken_as_they_are():
    q, k, v = (x.transpose(1, 2) for x in tensors(*[(2, 150, 2, 64)] * 3, dtype=torch.float32))
    blocks = blocks_of(150)
    mask, _ = selected(q, k, blocks, blocks, 2)
    out, _ = ops.block_sparse_attention(q, k, v, mask, **BACKEND)
    expected, _ = ops.block_sparse_attention(*(x.contiguous() for x in (q, k, v)), mask, **BACKEND)
    assert torch.equal(out, expected)
    assert out.transpose(1, 2).is_contiguous()  # heads side by side, as the host wants them back
    packed = torch.stack((q, k, v), dim=-2).transpose(-1, -2)  # rows that no kernel reads in place
    out, _ = ops.block_sparse_attention(*packed.unbind(-1), mask, **BACKEND)
    assert torch.equal(out, expected)


def test_results_are_written_where_the_caller_wants_them():
    """Into a part of a larger tensor, whatever its strides; nothing beside that part is touched."""
    case, _ = sparse_case(150, torch.float32)
    (q, k, v, _), batch = case, 1
    expected, _ = ops.block_sparse_attention(*case, **BACKEND)
    dense, _ = ops.dense_attention(q, k, v, **BACKEND)
    for whole in (
        torch.zeros(batch, 200, 2, 64).transpose(1, 2),
        torch.zeros(batch, 2, 64, 200).mT,
    ):
        part = whole[:, :, 20:170]
        out, _ = ops.block_sparse_attention(*case, out=part, **BACKEND)
        assert out is part and torch.equal(part, expected)
        assert not whole[:, :, :20].any() and not whole[:, :, 170:].any()
        ops.dense_attention(q, k, v, out=part, **BACKEND)
        assert torch.equal(part, dense)


@pytest.mark.parametrize("topk", [1, 3, 5])
@pytest.mark.parametrize("size", [16, 32, 128])
def test_blocks_of_other_sizes(size, topk):
    """A tile of 64 keys is put together from up to four blocks; the last one may be half empty."""
    q, k, v = tensors(*[(1, 1, 150, 64)] * 3, dtype=torch.float32)
    pair = (blocks_of(150, size), blocks_of(150, 64))
    for q_blocks, kv_blocks in (pair, pair[::-1]):
        mask, _ = selected(q, k, q_blocks, kv_blocks, topk)
        out, _ = ops.block_sparse_attention(q, k, v, mask, **BACKEND)
        same(out, reference.block_sparse_attention(*wide((q, k, v)), mask)[0], q.dtype)
