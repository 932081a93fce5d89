"""The portable path: every operation in plain PyTorch, for any device, differentiable, with bounded memory.

Kept blocks are gathered a few query blocks at a time and attended to as small dense problems, so nothing of size
L x L ever exists. Half precision is computed in float32 per head: a bf16 score of 100 is off by a quarter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Query blocks per step. On a CPU the gathered keys should stay in the cache (measured: 4 to 16 blocks are best);
# elsewhere a step should be large enough to hide its launches, and small enough for any card.
CPU_BLOCKS_PER_STEP = 8
STEP_BYTES = 256 << 20


def block_sizes(blocks: Tensor) -> Tensor:
    """Real tokens per block: `(N, S)` table -> `(N,)` int64."""
    return (blocks >= 0).sum(dim=-1)


def token_slots(blocks: Tensor, tokens: int) -> Tensor:
    """Where each token stands in the flattened `(N, S)` table: -> `(tokens,)` int64."""
    flat = blocks.reshape(-1).long()
    slots = torch.empty(tokens + 1, dtype=torch.int64, device=blocks.device)
    slots[torch.where(flat < 0, tokens, flat)] = torch.arange(flat.numel(), device=blocks.device)
    return slots[:tokens]


def block_pool(x: Tensor, blocks: Tensor) -> Tensor:
    """Mean over each block, float32 or wider: see `reference.block_pool`."""
    sizes = block_sizes(blocks)[:, None]

    def pool(b: int, h: int) -> tuple[Tensor]:
        return (_gather(x[b, h], blocks, _wide(x.dtype), zero_empty=True).sum(dim=1) / sizes,)

    return _per_head(x, pool)[0]


def block_select(
    pooled_q: Tensor, pooled_k: Tensor, k_sizes: Tensor, keep: int, forced: Tensor | None = None,
    scale: float | None = None, most_forced: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Routing: see `reference.block_select`; most_forced = forced blocks of the fullest row, if known on the host."""
    scale = pooled_q.shape[-1] ** -0.5 if scale is None else scale
    n_k = pooled_k.shape[2]
    scores = pooled_q @ pooled_k.transpose(-1, -2) * scale
    ranked = scores if forced is None else scores.masked_fill(forced, -torch.inf)
    indices = ranked.topk(min(keep, n_k), dim=-1, sorted=False).indices
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, indices, True)
    counts = torch.full(scores.shape[:-1], indices.shape[-1], dtype=torch.int32, device=scores.device)
    if forced is not None:
        kept |= forced
        counts = kept.sum(dim=-1, dtype=torch.int32)
        most_forced = int(forced.sum(dim=-1).max()) if most_forced is None else most_forced
        indices = torch.where(kept, torch.arange(n_k, device=scores.device), n_k)
    indices = indices.sort(dim=-1).values[..., : min(n_k, keep + (most_forced or 0))]
    tail = (scores + k_sizes.to(scores.dtype).log()).masked_fill(kept, -torch.inf).logsumexp(dim=-1)
    return indices.int(), counts, tail


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Exact attention of a FEW query rows, one head at a time: see `reference.dense_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def attend(b: int, h: int) -> tuple[Tensor, Tensor]:
        out, lse = _attend(*(x[b, h].to(_wide(q.dtype)) for x in (q, k, v)), scale, None)
        return out.to(q.dtype), lse

    return _per_head(q, attend)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, indices: Tensor, counts: Tensor,
    tail_k: Tensor | None = None, tail_v: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks, chunk by chunk: see `reference.block_sparse_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = _wide(q.dtype)
    (n_q, s_q), (n_k, s_k), width = q_blocks.shape, k_blocks.shape, q.shape[-1]
    q_slots = token_slots(q_blocks, q.shape[2])
    # One additive row of scores per key block, -inf on empty slots, and one more row for unused places of a list.
    bias = torch.zeros(n_k + 1, s_k, dtype=wide, device=q.device)
    bias[:n_k].masked_fill_(k_blocks < 0, -torch.inf)
    bias[n_k] = -torch.inf
    place = torch.arange(indices.shape[-1], device=q.device)
    indices = torch.where(place < counts[..., None], indices.long(), n_k)
    ragged = k_blocks.numel() != k.shape[2] or _on_host_any(counts != indices.shape[-1])
    log_sizes = block_sizes(k_blocks).to(wide).log()
    step = _blocks_per_step(q, indices.shape[-1] * s_k, s_q, width)

    def attend(b: int, h: int) -> tuple[Tensor, Tensor]:
        queries = _gather(q[b, h], q_blocks, wide)
        keys, values = (_gather(x[b, h], k_blocks, wide, zero_empty=True).view(n_k, -1) for x in (k, v))
        head_out, head_lse = [], []
        for start in range(0, n_q, step):
            lists = indices[b, h, start : start + step]
            rows = queries[start : start + step]
            flat = lists.clamp(max=n_k - 1).reshape(-1)
            near_k, near_v = (x.index_select(0, flat).view(rows.shape[0], -1, width) for x in (keys, values))
            mask = bias.index_select(0, lists.reshape(-1)).view(rows.shape[0], 1, -1) if ragged else None
            if tail_k is None:
                out, lse = _attend(rows, near_k, near_v, scale, mask)
            else:
                kept = torch.zeros(rows.shape[0], n_k + 1, dtype=torch.bool, device=q.device).scatter_(1, lists, True)
                far = log_sizes.masked_fill(kept[:, :n_k], -torch.inf)[:, None]
                near = mask if mask is not None else rows.new_zeros(rows.shape[0], 1, near_k.shape[1])
                far_k, far_v = (x[b, h].to(wide).expand(rows.shape[0], -1, -1) for x in (tail_k, tail_v))
                out, lse = _attend(
                    rows, torch.cat((near_k, far_k), 1), torch.cat((near_v, far_v), 1), scale, torch.cat((near, far), 2)
                )
            head_out.append(out.to(q.dtype))
            head_lse.append(lse)
        return tuple(torch.cat(parts).flatten(0, 1).index_select(0, q_slots) for parts in (head_out, head_lse))

    return _per_head(q, attend)


def first_order_state(k: Tensor, v: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean value and key-value covariance, summed in float32 or wider: see `reference.first_order_state`."""
    wide = _wide(k.dtype)

    def state(b: int, h: int) -> tuple[Tensor, Tensor]:
        keys, values = _channels(k, features, b, h).to(wide), v[b, h].to(wide)
        return values.mean(dim=0), (keys - keys.mean(dim=0)).T @ values / keys.shape[0]

    return _per_head(k, state)


def mix_first_order(
    q: Tensor, out: Tensor, lse: Tensor, tail: Tensor, q_blocks: Tensor, v_mean: Tensor, cov: Tensor,
    gate_c: Tensor, gate_b: Tensor, beta: Tensor, features: Tensor | None = None,
) -> Tensor:
    """Mix sparse output and first-order background by mass: see `reference.mix_first_order`."""
    wide = _wide(q.dtype)
    slots = token_slots(q_blocks, q.shape[2])
    tail = tail.index_select(2, slots // q_blocks.shape[1])
    gate = torch.sigmoid(gate_c[..., None] * (tail - lse) + gate_b[..., None])
    gate = gate.masked_fill(tail == -torch.inf, 0.0)[..., None]

    def mix(b: int, h: int) -> tuple[Tensor]:
        queries = _channels(q, features, b, h).to(wide)
        background = torch.addmm(v_mean[b, h], queries, cov[b, h] * beta[b, h, :, None])
        return (torch.lerp(out[b, h].to(wide), background, gate[b, h]).to(q.dtype),)

    return _per_head(q, mix)[0]


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


def _gather(head: Tensor, blocks: Tensor, dtype: torch.dtype, zero_empty: bool = False) -> Tensor:
    """Tokens of one head in block order: head `(L, D)`, blocks `(N, S)` -> `(N, S, D)`."""
    gathered = head.index_select(0, blocks.reshape(-1).long().clamp(min=0)).view(*blocks.shape, -1).to(dtype)
    if zero_empty and blocks.numel() != head.shape[0]:
        gathered = gathered.masked_fill((blocks < 0)[..., None], 0.0)
    return gathered


def _blocks_per_step(q: Tensor, keys: int, block: int, width: int) -> int:
    if q.device.type == "cpu":
        return CPU_BLOCKS_PER_STEP
    per_block = 4 * keys * (2 * block + 2 * width)
    return max(1, STEP_BYTES // max(1, per_block))


def _channels(x: Tensor, features: Tensor | None, b: int, h: int) -> Tensor:
    return x[b, h] if features is None else x[b, h].index_select(1, features[b, h])


def _per_head(like: Tensor, compute: Callable[[int, int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Run compute(b, h) for every head of `like` and put the results together as `(B, H, ...)`.

    Heads lie side by side in each row of a result, as hosts want them, and are written as they come: a second copy of
    everything would cost as much memory as dense attention needs in all. Only gradients need the copy.
    """
    batch, heads = like.shape[:2]
    results: list[Tensor] = []
    parts: list[tuple[Tensor, ...]] = []
    for b in range(batch):
        for h in range(heads):
            found = compute(b, h)
            if any(x.requires_grad for x in found):
                parts.append(found)
                continue
            if not results:
                results = [x.new_empty(batch, x.shape[0], heads, *x.shape[1:]).transpose(1, 2) for x in found]
            for whole, x in zip(results, found):
                whole[b, h] = x
    if parts:
        return tuple(torch.stack(xs).unflatten(0, (batch, heads)) for xs in zip(*parts))
    return tuple(results)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _on_host_any(condition: Tensor) -> bool:
    """Whether any is true, where asking is free; True elsewhere rather than make the host wait for the device."""
    return bool(condition.any()) if condition.device.type == "cpu" else True
