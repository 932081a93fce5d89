"""Dense and block-sparse attention in plain PyTorch.

Kept blocks are gathered a few query blocks at a time and attended to as small dense problems, so
nothing of size L x L ever exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import BlockMask, EightBit, PooledKV, TokenBlocks
from .common import acc_dtype, gather, per_head, scatter
from .eight_bit import eight_bit_attention, merged

# Query blocks per step. On a CPU every thread takes whole blocks, so a step has as many for each of
# them (measured: four are best, one where a head keeps many keys, for their gathered keys should
# stay in the thread's cache); elsewhere a step should be large enough to hide its launches, and
# small enough for any card.
CPU_BLOCKS_PER_THREAD = 4
CPU_THREAD_BYTES = 3 << 19
STEP_BYTES = 256 << 20
BLOCK = 64  # queries, where nobody has cut them


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_blocks: TokenBlocks | None,
    scale: float,
    out: Tensor | None = None,
    eight_bit: EightBit | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.dense_attention`; some queries of one head at a time."""
    if eight_bit is not None and kv_blocks is not None:
        return eight_bit_attention(q, every_block(q, kv_blocks), eight_bit, scale, out)
    dtype = acc_dtype(q.dtype)
    queries_per_step = max(1, STEP_BYTES // (4 * k.shape[2]))
    listed = None
    if kv_blocks is not None and not kv_blocks.lists_every_token:
        listed = kv_blocks.tokens[~kv_blocks.empty].long()

    def attend(b: int, h: int) -> tuple[Tensor, Tensor]:
        keys, values = k[b, h], v[b, h]
        if listed is not None:
            keys, values = keys.index_select(0, listed), values.index_select(0, listed)
        keys, values = keys.to(dtype), values.to(dtype)
        steps = q[b, h].to(dtype).split(queries_per_step)
        results = [softmax_attention(some, keys, values, scale, None) for some in steps]
        found, lse = results[0] if len(results) == 1 else map(torch.cat, zip(*results))
        return found.to(q.dtype), lse

    return per_head(q, attend, nhd_outputs=1, out=out)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    pooled: PooledKV | None,
    scale: float,
    out: Tensor | None = None,
    eight_bit: EightBit | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.block_sparse_attention`, and `reference.eight_bit_attention`."""
    if eight_bit is not None:
        near = eight_bit_attention(q, mask, eight_bit, scale, None if pooled else out)
        return near if pooled is None else _with_pooled(q, near, mask, pooled, scale, out)
    dtype, head_dim = acc_dtype(q.dtype), q.shape[-1]
    q_blocks, kv_blocks = mask.q_blocks, mask.kv_blocks
    bias = empty_slot_bias(kv_blocks, dtype)

    def attend(b: int, h: int) -> tuple[Tensor, Tensor]:
        lists, counts = mask.head_lists(b, h, kv_blocks.num_blocks), mask.kv_num_blocks[b, h]
        lists = lists[:, : _max_if_free(counts, lists.shape[1])]
        if lists.shape[1] == 0 and pooled is None:
            return _nothing_kept(q[b, h], dtype)
        ragged = kv_blocks.has_empty_slots or _any_if_free(counts != lists.shape[1])
        step = blocks_per_step(q, keys_at_once(mask, lists, pooled), q_blocks.block_size)
        queries = gather(q[b, h], q_blocks, dtype)
        keys, values = (
            gather(x[b, h], kv_blocks, dtype, zero_empty=True).flatten(1) for x in (k, v)
        )
        results = []
        for start in range(0, q_blocks.num_blocks, step):
            kept, some = lists[start : start + step], queries[start : start + step]
            flat = kept.clamp(max=kv_blocks.num_blocks - 1).reshape(-1)
            near_k, near_v = (
                x.index_select(0, flat).view(some.shape[0], -1, head_dim) for x in (keys, values)
            )
            near_bias = None
            if ragged or pooled is not None:
                near_bias = bias.index_select(0, kept.reshape(-1)).view(some.shape[0], 1, -1)
            if pooled is not None and near_bias is not None:
                far_k, far_v = (x[b, h].to(dtype).expand(some.shape[0], -1, -1) for x in pooled)
                near_k, near_v = torch.cat((near_k, far_k), 1), torch.cat((near_v, far_v), 1)
                near_bias = torch.cat((near_bias, dropped_bias(kept, kv_blocks, dtype)), 2)
            found, lse = softmax_attention(some, near_k, near_v, scale, near_bias)
            results.append((found.to(q.dtype), lse))
        found, lse = (scatter(torch.cat(parts), q_blocks) for parts in zip(*results))
        return found, lse

    return per_head(q, attend, nhd_outputs=1, out=out)


def every_block(q: Tensor, kv_blocks: TokenBlocks) -> BlockMask:
    """The mask that keeps all key blocks for all queries."""
    q_blocks = TokenBlocks.cut(torch.arange(q.shape[2], device=q.device), BLOCK)
    shape = (*q.shape[:2], q_blocks.num_blocks, kv_blocks.num_blocks)
    lists = torch.arange(shape[-1], dtype=torch.int32, device=q.device).expand(shape)
    counts = lists.new_full(shape[:-1], shape[-1])
    return BlockMask(q_blocks, kv_blocks, lists, counts, trusted=True)


def _with_pooled(
    q: Tensor,
    near: tuple[Tensor, Tensor],
    mask: BlockMask,
    pooled: PooledKV,
    scale: float,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks, and one pooled key for every block that is not."""
    dtype, (q_blocks, kv_blocks) = acc_dtype(q.dtype), (mask.q_blocks, mask.kv_blocks)

    def attend(b: int, h: int) -> tuple[Tensor, Tensor]:
        queries, (far_k, far_v) = gather(q[b, h], q_blocks, dtype), (x[b, h] for x in pooled)
        bias = dropped_bias(mask.head_lists(b, h, kv_blocks.num_blocks), kv_blocks, dtype)
        far = softmax_attention(queries, far_k.to(dtype), far_v.to(dtype), scale, bias)
        own = near[0][b, h], near[1][b, h]
        found, lse = merged(own, (scatter(far[0], q_blocks), scatter(far[1], q_blocks)))
        return found.to(q.dtype), lse

    return per_head(q, attend, nhd_outputs=1, out=out)


def _nothing_kept(q: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a head `(L, D)` gives that keeps no key: out 0, LSE -inf."""
    return torch.zeros_like(q), q.new_full(q.shape[:1], -torch.inf, dtype=dtype)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of (batched) matrices with additive scores: -> out, LSE; a row of -inf: 0, -inf."""
    scores = (q * scale) @ k.transpose(-1, -2)
    if bias is not None:
        scores += bias
    # The shift changes no value and no gradient, so it needs none itself; the rest can then happen
    # in place.
    shift = scores.detach().amax(dim=-1, keepdim=True)
    shift.masked_fill_(shift == -torch.inf, 0.0)
    weights = scores.sub_(shift).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    out = (weights @ v) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return out, (shift + total.log()).squeeze(-1)


def empty_slot_bias(kv_blocks: TokenBlocks, dtype: torch.dtype) -> Tensor:
    """Additive scores `(Nk + 1, S)`: -inf on empty slots; a last row of -inf for unused entries."""
    shape = (kv_blocks.num_blocks + 1, kv_blocks.block_size)
    bias = torch.zeros(shape, dtype=dtype, device=kv_blocks.tokens.device)
    bias[:-1].masked_fill_(kv_blocks.empty, -torch.inf)
    bias[-1] = -torch.inf
    return bias


def dropped_bias(kept: Tensor, kv_blocks: TokenBlocks, dtype: torch.dtype) -> Tensor:
    """What pooled keys add to their scores `(rows, 1, Nk)`: log size, -inf for kept blocks."""
    blocks = kv_blocks.num_blocks
    listed = torch.zeros(kept.shape[0], blocks + 1, dtype=torch.bool, device=kept.device)
    listed.scatter_(1, kept, True)
    return kv_blocks.sizes.to(dtype).log().masked_fill(listed[:, :blocks], -torch.inf)[:, None]


def keys_at_once(mask: BlockMask, lists: Tensor, pooled: PooledKV | None) -> int:
    """Keys, and pseudo-keys, that a query block of these lists `(Nq, K)` attends to."""
    blocks = mask.kv_blocks
    return lists.shape[1] * blocks.block_size + (blocks.num_blocks if pooled is not None else 0)


def blocks_per_step(q: Tensor, keys: int, block_size: int) -> int:
    """Query blocks that are attended to together."""
    per_block = 4 * keys * (2 * block_size + 2 * q.shape[-1])
    most = max(1, STEP_BYTES // max(1, per_block))
    if q.device.type != "cpu":
        return most
    fitting = CPU_THREAD_BYTES // max(1, 4 * keys * q.shape[-1])
    return min(most, torch.get_num_threads() * min(CPU_BLOCKS_PER_THREAD, max(1, fitting)))


def _max_if_free(counts: Tensor, most: int) -> int:
    """The largest of the counts, where asking is free; elsewhere the most that there can be."""
    return int(counts.max()) if counts.device.type == "cpu" else most


def _any_if_free(condition: Tensor) -> bool:
    """Whether any is true, where asking is free; else True, rather than wait for the device."""
    return bool(condition.any()) if condition.device.type == "cpu" else True
