"""The definition of every operation, in plain PyTorch: slow, memory-hungry, and easy to check by eye.

Tests compare every other implementation with this file. Shapes: `(B, H, L, D)` = batch, heads, tokens, head width.

A *block table* `(N, S)` of integers names the tokens of each of N blocks, up to S per block; -1 marks an empty slot.
Every token of a tensor stands in its table exactly once. One table thus says three things at once: which tokens
belong together, in which order the blocks follow, and which blocks are short.
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_sizes(blocks: Tensor) -> Tensor:
    """Real tokens per block: `(N, S)` table -> `(N,)` int64."""
    return (blocks >= 0).sum(dim=-1)


def token_to_block(blocks: Tensor) -> Tensor:
    """Block number of every token: `(N, S)` table -> `(L,)` int64."""
    number = torch.arange(blocks.shape[0], device=blocks.device)[:, None].expand_as(blocks)
    filled = blocks >= 0
    owner = torch.empty(int(filled.sum()), dtype=torch.int64, device=blocks.device)
    owner[blocks[filled].long()] = number[filled]
    return owner


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention and its log-sum-exp.

    q `(B, H, Lq, D)`, k and v `(B, H, Lk, D)` -> out `(B, H, Lq, D)`, LSE `(B, H, Lq)` (natural logarithm).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _softmax_read(torch.einsum("bhqd,bhkd->bhqk", q, k) * scale, v)


def block_pool(x: Tensor, blocks: Tensor) -> Tensor:
    """Mean of x over the real tokens of each block: x `(B, H, L, D)`, blocks `(N, S)` -> `(B, H, N, D)`."""
    member = (token_to_block(blocks)[None, :] == torch.arange(blocks.shape[0], device=x.device)[:, None]).to(x.dtype)
    sums = torch.einsum("nl,bhld->bhnd", member, x)
    return sums / member.sum(dim=-1)[:, None]


def block_select(
    pooled_q: Tensor, pooled_k: Tensor, k_sizes: Tensor, keep: int, forced: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Routing: the `keep` best key blocks of every query block, plus the forced ones, and the mass of the rest.

    pooled_q `(B, H, Nq, D)`, pooled_k `(B, H, Nk, D)`, k_sizes `(Nk,)`, forced `(Nq, Nk)` bool ->
    indices `(B, H, Nq, K)` int32, ascending, `Nk` in unused places; counts `(B, H, Nq)` int32;
    tail `(B, H, Nq)` = log of the pooled mass of the blocks that were NOT kept, -inf where all were.
    Forced blocks come in addition: they take none of the `keep` places.
    """
    scale = pooled_q.shape[-1] ** -0.5 if scale is None else scale
    n_k = pooled_k.shape[2]
    scores = torch.einsum("bhqd,bhkd->bhqk", pooled_q, pooled_k) * scale
    if forced is None:
        forced = torch.zeros(scores.shape[2:], dtype=torch.bool, device=scores.device)
    best = scores.masked_fill(forced, -torch.inf).topk(min(keep, n_k), dim=-1).indices
    kept = forced | torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    counts = kept.sum(dim=-1)
    column = torch.arange(n_k, device=scores.device).expand_as(scores)
    indices = torch.where(kept, column, n_k).sort(dim=-1).values[..., : int(counts.max())]
    tail = (scores + k_sizes.to(scores.dtype).log()).masked_fill(kept, -torch.inf).logsumexp(dim=-1)
    return indices.int(), counts.int(), tail


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, indices: Tensor, counts: Tensor,
    tail_k: Tensor | None = None, tail_v: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each query over the key blocks that its own block keeps, and its log-sum-exp.

    q `(B, H, Lq, D)`, k and v `(B, H, Lk, D)`, tables `(Nq, Sq)` and `(Nk, Sk)`, indices and counts of `block_select`.
    With tail_k and tail_v `(B, H, Nk, D)` every block that is not kept adds ONE pseudo-key to the same softmax: its
    pooled key, weighted by its size, with its pooled value. A row that keeps nothing gives out 0 and LSE -inf.
    -> out `(B, H, Lq, D)` in q's token order, LSE `(B, H, Lq)`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    n_k = k_blocks.shape[0]
    place = torch.arange(indices.shape[-1], device=q.device)
    used = place < counts[..., None]
    kept = torch.zeros(*indices.shape[:-1], n_k + 1, dtype=torch.bool, device=q.device)
    kept.scatter_(-1, torch.where(used, indices, n_k).long(), True)
    kept = kept[..., :n_k][:, :, token_to_block(q_blocks)]                       # (B, H, Lq, Nk)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    scores = scores.masked_fill(~kept[..., token_to_block(k_blocks)], -torch.inf)
    if tail_k is None:
        return _softmax_read(scores, v)
    pooled = torch.einsum("bhqd,bhnd->bhqn", q, tail_k.to(q.dtype)) * scale + block_sizes(k_blocks).to(q.dtype).log()
    scores = torch.cat((scores, pooled.masked_fill(kept, -torch.inf)), dim=-1)
    return _softmax_read(scores, torch.cat((v, tail_v.to(v.dtype)), dim=2))


def first_order_state(k: Tensor, v: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the first-order background has to know about all keys and values.

    k, v `(B, H, L, D)`, features `(B, H, R)` = the channels of k that take part, all D when None ->
    mean of v `(B, H, D)`, and the covariance mean((k - mean k)^T v) `(B, H, R, D)`.
    """
    k = _channels(k, features)
    centred = k - k.mean(dim=2, keepdim=True)
    return v.mean(dim=2), torch.einsum("bhld,bhle->bhde", centred, v) / k.shape[2]


def mix_first_order(
    q: Tensor, out: Tensor, lse: Tensor, tail: Tensor, q_blocks: Tensor, v_mean: Tensor, cov: Tensor,
    gate_c: Tensor, gate_b: Tensor, beta: Tensor, features: Tensor | None = None,
) -> Tensor:
    """Mix the sparse output with its background by their shares of the softmax mass.

    g = sigmoid(gate_c (tail - LSE) + gate_b), 0 where nothing was dropped;  (1 - g) out + g (v_mean + (beta q) cov).
    q, out `(B, H, L, D)`; lse `(B, H, L)`; tail `(B, H, Nq)`; gate_c, gate_b `(B, H)`; v_mean `(B, H, D)`;
    cov `(B, H, R, D)`; beta `(B, H, R)`; features `(B, H, R)` = the channels of q that take part (all when None).
    """
    tail = tail[:, :, token_to_block(q_blocks)]
    gate = torch.sigmoid(gate_c[..., None] * (tail - lse) + gate_b[..., None])
    gate = gate.masked_fill(tail == -torch.inf, 0.0)[..., None]
    return (1 - gate) * out + gate * (v_mean[:, :, None] + (_channels(q, features) * beta[:, :, None]) @ cov)


def _channels(x: Tensor, features: Tensor | None) -> Tensor:
    return x if features is None else x.gather(-1, features[:, :, None].expand(-1, -1, x.shape[2], -1))


def _softmax_read(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return torch.einsum("bhqk,bhkd->bhqd", weights, v), lse
