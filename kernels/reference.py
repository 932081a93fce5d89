"""The definition of every operation, in plain PyTorch: slow, memory-hungry, and easy to check by eye.

Tests compare every other implementation with this file. Shapes: `(B, H, L, D)` = batch, heads, tokens, head width.

A *block table* `(N, S)` of integers names the tokens of each of N blocks, up to S per block; -1 marks an empty slot.
Every token of a tensor stands in its table exactly once. One table thus says three things at once: which tokens
belong together, in which order the blocks follow, and which blocks are short. Empty slots lie behind a block's tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .background import FeatureMap, FirstOrder, Gate, LinearState, LowRank, SiluMap


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


def block_pool_state(
    k: Tensor, v: Tensor, blocks: Tensor, inner: int, features: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Block means of k, and the first-order state of the keys and values in the first `inner` blocks.

    k, v `(B, H, L, D)`, blocks `(N, S)`, features `(B, H, R)` = the channels of k that take part, all D when None ->
    means `(B, H, N, D)`, mean of v `(B, H, D)`, and the covariance mean((k - mean k)^T v) `(B, H, R, D)`.
    """
    rows = blocks[:inner]
    rows = rows[rows >= 0].long()
    k_in, v_in = _channels(k, features)[:, :, rows], v[:, :, rows]
    centred = k_in - k_in.mean(dim=2, keepdim=True)
    return block_pool(k, blocks), v_in.mean(dim=2), torch.einsum("bhld,bhle->bhde", centred, v_in) / rows.numel()


def feature_map(x: Tensor, map: FeatureMap) -> Tensor:
    """phi = act(A x + E(p)): x `(B, H, L, D)` after RoPE, which is undone first -> `(B, H, L, r)`."""
    logits = x
    if map.a is not None:
        if map.cos is not None:
            even, odd = x[..., 0::2], x[..., 1::2]
            x = torch.stack((even * map.cos + odd * map.sin, odd * map.cos - even * map.sin), dim=-1).flatten(-2)
        logits = torch.einsum("bhld,hrd->bhlr", x, map.a)
    if map.pe is not None:
        logits = logits + sum(map.pe[:, map.places[:, axis].long()] for axis in range(3))
    return {"softmax": lambda y: y.softmax(-1), "elu": lambda y: torch.nn.functional.elu(y) + 1, "relu": torch.relu}[
        map.act
    ](logits)


def low_rank_state(k: Tensor, v: Tensor, map: FeatureMap) -> tuple[Tensor, Tensor]:
    """What a linear branch keeps of keys and values `(B, H, L, D)`: mean(phi_k^T v) `(B, H, r, D)`, mean(phi_k)."""
    phi = feature_map(k, map)
    return torch.einsum("bhlr,bhld->bhrd", phi, v) / k.shape[2], phi.mean(dim=2)


def linear_read(q: Tensor, map: FeatureMap, linear: LinearState) -> Tensor:
    """phi_q S / (eps + phi_q z) `(B, H, L, D)`."""
    phi = feature_map(q, map)
    return (phi @ linear.state) / (linear.eps + torch.einsum("bhlr,bhr->bhl", phi, linear.norm))[..., None]


def mix_background(
    q: Tensor, out: Tensor, lse: Tensor, tail: Tensor, q_blocks: Tensor, gate: Gate, first: FirstOrder,
    low_rank: LowRank | None = None,
) -> Tensor:
    """Mix the sparse output with its background by their shares of the softmax mass.

    g = sigmoid(c (tail - LSE) + b + x), 0 where nothing was dropped;
    (1 - g) out + g (v_mean + (beta q) cov + eta (low rank - v_mean)).
    q, out `(B, H, L, D)`; lse `(B, H, L)`; tail `(B, H, Nq)`; the rest as `background` tells.
    """
    tail = tail[:, :, token_to_block(q_blocks)]
    odds = gate.c[..., None] * (tail - lse.clamp(min=-1e30)) + gate.b[..., None]
    g = torch.sigmoid(odds if gate.x is None else odds + gate.x).masked_fill(tail == -torch.inf, 0.0)[..., None]
    mean = first.v_mean[:, :, None]
    background = mean + (_channels(q, first.features) * first.beta[:, :, None]) @ first.cov
    if low_rank is not None:
        background = background + low_rank.eta[:, None, None] * (linear_read(q, low_rank.map, low_rank.linear) - mean)
    return (1 - g) * out + g * background


def block_sparse_mixed(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, indices: Tensor, counts: Tensor, tail: Tensor,
    gate: Gate, first: FirstOrder, low_rank: LowRank | None = None, scale: float | None = None,
) -> Tensor:
    """`block_sparse_attention` and `mix_background` in one."""
    out, lse = block_sparse_attention(q, k, v, q_blocks, k_blocks, indices, counts, scale=scale)
    return mix_background(q, out, lse, tail, q_blocks, gate, first, low_rank)


def block_sparse_linear(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, indices: Tensor, counts: Tensor,
    map: FeatureMap, linear: LinearState, bias: Tensor, scale: float | None = None,
) -> Tensor:
    """Sparse output + linear branch + bias `(D,)`: SLA, whose projection W is folded into the state as S W^T."""
    out, _ = block_sparse_attention(q, k, v, q_blocks, k_blocks, indices, counts, scale=scale)
    return out + linear_read(q, map, linear) + bias


def silu_map(x: Tensor, map: SiluMap) -> Tensor:
    """phi = turn(silu(A x + E(p))): x `(B, H, L, D)` after RoPE, which is undone first -> `(B, H, L, r)`."""
    even, odd = x[..., 0::2], x[..., 1::2]
    x = torch.stack((even * map.cos + odd * map.sin, odd * map.cos - even * map.sin), dim=-1).flatten(-2)
    logits = torch.einsum("bhld,hrd->bhlr", x, map.a)
    if map.pe is not None:
        logits = logits + sum(map.pe[:, map.places[:, axis].long()] for axis in range(3))
    phi = torch.nn.functional.silu(logits)
    if map.turn_cos is None:
        return phi
    turned = 2 * map.turn_cos.shape[1]
    even, odd = phi[..., :turned:2], phi[..., 1:turned:2]
    pairs = (even * map.turn_cos - odd * map.turn_sin, even * map.turn_sin + odd * map.turn_cos)
    return torch.cat((torch.stack(pairs, dim=-1).flatten(-2), phi[..., turned:]), dim=-1)


def rms_low_rank(q: Tensor, k: Tensor, v: Tensor, q_map: SiluMap, k_map: SiluMap, eps: float) -> Tensor:
    """RMSNorm over D of phi_q (sum phi_k^T v), without a normaliser and without a weight: -> `(B, H, Lq, D)`."""
    read = silu_map(q, q_map) @ torch.einsum("bhlr,bhld->bhrd", silu_map(k, k_map), v)
    return read * (read.square().mean(dim=-1, keepdim=True) + eps).rsqrt()


def add_rms_low_rank(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, gate: Tensor, q_map: SiluMap, k_map: SiluMap, eps: float
) -> Tensor:
    """(out / s + gate * rms_low_rank) * s with s = sqrt(mean_D(out^2) + 1e-5); gate `(B, H, Lq)`."""
    size = (out.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return (out / size + gate[..., None] * rms_low_rank(q, k, v, q_map, k_map, eps)) * size


def feature_energy(q: Tensor, k: Tensor, v: Tensor, q_map: SiluMap, k_map: SiluMap) -> Tensor:
    """Mean square of what each feature adds to phi_q sum(phi_k^T v), summed over D: -> `(B, H, r)`."""
    state = torch.einsum("bhlr,bhld->bhrd", silu_map(k, k_map), v)
    return torch.einsum("bhlr,bhrd->bhlrd", silu_map(q, q_map), state).square().sum(dim=-1).mean(dim=2)


def marginal_linear(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, marginal: Tensor, eps: float
) -> Tensor:
    """Linear attention of each query over the key blocks that its own block marks: marginal `(B, H, Nq, Nk)` bool.

    phi_q sum(phi_k^T v) / (eps + phi_q sum(phi_k)) with phi = softmax over the channels -> `(B, H, Lq, D)`.
    """
    phi_q, phi_k = q.softmax(dim=-1), k.softmax(dim=-1)
    seen = marginal[:, :, token_to_block(q_blocks)][..., token_to_block(k_blocks)]
    weights = torch.einsum("bhqd,bhkd->bhqk", phi_q, phi_k) * seen
    return (weights @ v) / (eps + weights.sum(dim=-1, keepdim=True))


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, q_blocks: Tensor, k_blocks: Tensor, keeps: list[int],
    forced: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact search (AdaSpa): the blocks of largest softmax mass of every row, for each number of blocks in keeps.

    lse `(B, H, Lq)` from a dense pass, forced `(Nq, Nk)` bool, in addition to the best -> bits
    `(B, H, len(keeps), Nq, ceil(Nk / 32))` int32, bit j % 32 of word j / 32 for key block j; recall
    `(B, H, len(keeps))`, the share of the softmax mass that is kept.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = (torch.einsum("bhqd,bhkd->bhqk", q, k) * scale - lse[..., None]).exp()
    n_q, n_k = q_blocks.shape[0], k_blocks.shape[0]
    mass = _sum_blocks(weights, token_to_block(q_blocks), n_q, token_to_block(k_blocks), n_k)
    if forced is None:
        forced = torch.zeros(n_q, n_k, dtype=torch.bool, device=q.device)
    bits, recall = [], []
    for keep in keeps:
        best = mass.masked_fill(forced, -1.0).topk(min(keep, n_k), dim=-1).indices
        kept = forced | torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, best, True)
        bits.append(pack_bits(kept))
        recall.append((mass * kept).sum(dim=(-2, -1)) / mass.sum(dim=(-2, -1)))
    return torch.stack(bits, dim=2), torch.stack(recall, dim=2)


def pack_bits(kept: Tensor) -> Tensor:
    """Booleans `(..., Nk)` -> `(..., ceil(Nk / 32))` int32."""
    words = torch.nn.functional.pad(kept, (0, -kept.shape[-1] % 32)).unflatten(-1, (-1, 32)).long()
    packed = (words << torch.arange(32, device=kept.device)).sum(dim=-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def lists_from_bits(bits: Tensor, blocks: int, longest: int) -> tuple[Tensor, Tensor]:
    """Bit masks `(..., words)` -> the sorted lists `(..., longest)` and counts of `block_select`."""
    kept = ((bits[..., None] >> torch.arange(32, device=bits.device)) & 1).flatten(-2)[..., :blocks].bool()
    column = torch.arange(blocks, device=bits.device).expand(kept.shape)
    return torch.where(kept, column, blocks).sort(dim=-1).values[..., :longest].int(), kept.sum(dim=-1).int()


def _sum_blocks(weights: Tensor, of_query: Tensor, n_q: int, of_key: Tensor, n_k: int) -> Tensor:
    by_key = weights.new_zeros(*weights.shape[:3], n_k).index_add_(3, of_key, weights)
    return by_key.new_zeros(*weights.shape[:2], n_q, n_k).index_add_(2, of_query, by_key)


def _channels(x: Tensor, features: Tensor | None) -> Tensor:
    return x if features is None else x.gather(-1, features[:, :, None].expand(-1, -1, x.shape[2], -1))


def _softmax_read(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return torch.einsum("bhqk,bhkd->bhqd", weights, v), lse
