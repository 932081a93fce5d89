"""Block-sparse attention in plain PyTorch, forward and backward.

Kept blocks are gathered a few query blocks at a time and attended to as small dense problems, so nothing of size
L x L ever exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .heads import block_sizes, gather, per_head, token_slots, wide

# Query blocks per step. On a CPU the gathered keys should stay in the cache (measured: 4 to 16 blocks are best);
# elsewhere a step should be large enough to hide its launches, and small enough for any card.
CPU_BLOCKS_PER_STEP = 8
STEP_BYTES = 256 << 20


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Exact attention, some rows of one head at a time: see `reference.dense_attention`."""
    rows = max(1, STEP_BYTES // (4 * k.shape[2]))

    def attend(b: int, h: int) -> tuple[Tensor, Tensor]:
        queries, keys, values = (x[b, h].to(wide(q.dtype)) for x in (q, k, v))
        parts = [_attend(some, keys, values, scale, None) for some in queries.split(rows)]
        out, lse = parts[0] if len(parts) == 1 else (torch.cat(each) for each in zip(*parts))
        return out.to(q.dtype), lse

    return per_head(q, attend, host=1)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, indices: Tensor, counts: Tensor,
    tail_k: Tensor | None, tail_v: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks, chunk by chunk: see `reference.block_sparse_attention`."""
    dtype = wide(q.dtype)
    (n_q, s_q), (n_k, s_k), width = q_blocks.shape, k_blocks.shape, q.shape[-1]
    q_slots = token_slots(q_blocks, q.shape[2])
    ragged = k_blocks.numel() != k.shape[2] or _on_host_any(counts != indices.shape[-1])
    bias, indices, log_sizes = _bias(k_blocks, dtype), _unused_last(indices, counts, n_k), _log_sizes(k_blocks, dtype)
    step = _blocks_per_step(q, indices.shape[-1] * s_k, s_q, width)

    def attend(b: int, h: int) -> tuple[Tensor, Tensor]:
        queries = gather(q[b, h], q_blocks, dtype)
        keys, values = (gather(x[b, h], k_blocks, dtype, zero_empty=True).view(n_k, -1) for x in (k, v))
        head_out, head_lse = [], []
        longest = _on_host_max(counts[b, h], indices.shape[-1])               # heads may differ threefold
        for start in range(0, n_q, step):
            lists = indices[b, h, start : start + step, :longest]
            rows = queries[start : start + step]
            flat = lists.clamp(max=n_k - 1).reshape(-1)
            near_k, near_v = (x.index_select(0, flat).view(rows.shape[0], -1, width) for x in (keys, values))
            mask = bias.index_select(0, lists.reshape(-1)).view(rows.shape[0], 1, -1) if ragged else None
            if tail_k is None:
                out, lse = _attend(rows, near_k, near_v, scale, mask)
            else:
                far = _dropped(lists, log_sizes)
                near = mask if mask is not None else rows.new_zeros(rows.shape[0], 1, near_k.shape[1])
                far_k, far_v = (x[b, h].to(dtype).expand(rows.shape[0], -1, -1) for x in (tail_k, tail_v))
                out, lse = _attend(
                    rows, torch.cat((near_k, far_k), 1), torch.cat((near_v, far_v), 1), scale, torch.cat((near, far), 2)
                )
            head_out.append(out.to(q.dtype))
            head_lse.append(lse)
        return tuple(torch.cat(parts).flatten(0, 1).index_select(0, q_slots) for parts in (head_out, head_lse))

    return per_head(q, attend, host=1)


def block_sparse_attention_backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_blocks: Tensor,
    k_blocks: Tensor, indices: Tensor, counts: Tensor, tail_k: Tensor | None, tail_v: Tensor | None, scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of `block_sparse_attention`: of q, k, v, and with a tail of tail_k and tail_v too.

    Weights come from the LSE again; delta = sum(out d_out) - d_lse is summed in float32 or wider.
    """
    dtype = wide(q.dtype)
    (n_q, s_q), (n_k, s_k), width = q_blocks.shape, k_blocks.shape, q.shape[-1]
    q_slots, k_slots = token_slots(q_blocks, q.shape[2]), token_slots(k_blocks, k.shape[2])
    bias, indices, log_sizes = _bias(k_blocks, dtype), _unused_last(indices, counts, n_k), _log_sizes(k_blocks, dtype)
    step = _blocks_per_step(q, indices.shape[-1] * s_k, s_q, width)

    def gradients(b: int, h: int) -> tuple[Tensor, ...]:
        queries, d_outs = (gather(x[b, h], q_blocks, dtype, zero_empty=True) for x in (q, d_out))
        keys, values = (gather(x[b, h], k_blocks, dtype, zero_empty=True).view(n_k, -1) for x in (k, v))
        delta = (out[b, h].to(dtype) * d_out[b, h].to(dtype)).sum(dim=-1, keepdim=True)
        if d_lse is not None:
            delta = delta - d_lse[b, h, :, None].to(dtype)
        # An infinite LSE leaves no weight: on empty slots, and on rows that keep nothing.
        shift = lse[b, h, :, None].to(dtype)
        shift = gather(shift.masked_fill(shift == -torch.inf, torch.inf), q_blocks, dtype)
        shift = shift.masked_fill((q_blocks < 0)[..., None], torch.inf)
        delta = gather(delta, q_blocks, dtype)
        d_queries = torch.empty_like(queries)
        d_keys, d_values = (x.new_zeros(n_k + 1, s_k * width) for x in (keys, values))
        d_tail = [torch.zeros_like(x[b, h], dtype=dtype) for x in (tail_k, tail_v) if x is not None]
        for start in range(0, n_q, step):
            some = slice(start, start + step)
            rows, d_rows, lists = queries[some], d_outs[some], indices[b, h, some]
            flat = lists.reshape(-1)
            near = flat.clamp(max=n_k - 1)
            near_k, near_v = (x.index_select(0, near).view(rows.shape[0], -1, width) for x in (keys, values))
            scores = rows @ near_k.mT * scale + bias.index_select(0, flat).view(rows.shape[0], 1, -1)
            weights = (scores - shift[some]).exp_()
            d_scores = weights * (d_rows @ near_v.mT - delta[some]) * scale
            d_queries[some] = d_scores @ near_k
            d_keys.index_add_(0, flat, (d_scores.mT @ rows).view(-1, s_k * width))
            d_values.index_add_(0, flat, (weights.mT @ d_rows).view(-1, s_k * width))
            if d_tail:
                far_k, far_v = (x[b, h].to(dtype) for x in (tail_k, tail_v))
                scores = rows @ far_k.T * scale + _dropped(lists, log_sizes)
                weights = (scores - shift[some]).exp_()
                d_scores = weights * (d_rows @ far_v.T - delta[some]) * scale
                d_queries[some] += d_scores @ far_k
                d_tail[0] += torch.einsum("mqn,mqd->nd", d_scores, rows)
                d_tail[1] += torch.einsum("mqn,mqd->nd", weights, d_rows)
        d_q = d_queries.flatten(0, 1).index_select(0, q_slots)
        d_k, d_v = (x[:n_k].reshape(-1, width).index_select(0, k_slots) for x in (d_keys, d_values))
        return (*(x.to(q.dtype) for x in (d_q, d_k, d_v)), *d_tail)

    return per_head(q, gradients, host=3)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax attention of (batched) matrices with an additive mask: -> out, LSE. A row of -inf gives 0 and -inf."""
    scores = (q * scale) @ k.transpose(-1, -2)
    if mask is not None:
        scores += mask
    # The shift changes no value and no gradient, so it needs none itself; the rest can then happen in place.
    shift = scores.detach().amax(dim=-1, keepdim=True)
    shift.masked_fill_(shift == -torch.inf, 0.0)
    weights = scores.sub_(shift).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    return (weights @ v) / total.clamp(min=torch.finfo(total.dtype).tiny), (shift + total.log()).squeeze(-1)


def _bias(k_blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive scores `(Nk + 1, Sk)`: -inf on empty slots, and one row of -inf for unused places of a list."""
    n_k, s_k = k_blocks.shape
    bias = torch.zeros(n_k + 1, s_k, dtype=dtype, device=k_blocks.device)
    bias[:n_k].masked_fill_(k_blocks < 0, -torch.inf)
    bias[n_k] = -torch.inf
    return bias


def _unused_last(indices: Tensor, counts: Tensor, n_k: int) -> Tensor:
    """The lists as int64, with n_k in every place beyond a row's count."""
    place = torch.arange(indices.shape[-1], device=indices.device)
    return torch.where(place < counts[..., None], indices.long(), n_k)


def _log_sizes(k_blocks: Tensor, dtype: torch.dtype) -> Tensor:
    return block_sizes(k_blocks).to(dtype).log()


def _dropped(lists: Tensor, log_sizes: Tensor) -> Tensor:
    """What the pooled tail adds to its scores `(rows, 1, Nk)`: log n_j, and -inf where block j is kept."""
    n_k = log_sizes.shape[0]
    kept = torch.zeros(lists.shape[0], n_k + 1, dtype=torch.bool, device=lists.device).scatter_(1, lists, True)
    return log_sizes.masked_fill(kept[:, :n_k], -torch.inf)[:, None]


def _blocks_per_step(q: Tensor, keys: int, block: int, width: int) -> int:
    if q.device.type == "cpu":
        return CPU_BLOCKS_PER_STEP
    per_block = 4 * keys * (2 * block + 2 * width)
    return max(1, STEP_BYTES // max(1, per_block))


def _on_host_max(counts: Tensor, most: int) -> int:
    """The largest of the counts, where asking is free; elsewhere the most that there can be."""
    return max(1, int(counts.max())) if counts.device.type == "cpu" else most


def _on_host_any(condition: Tensor) -> bool:
    """Whether any is true, where asking is free; True elsewhere rather than make the host wait for the device."""
    return bool(condition.any()) if condition.device.type == "cpu" else True
