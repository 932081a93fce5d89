"""The definition of every operation, in plain PyTorch: slow, memory-hungry, easy to check by eye.

Tests compare every other implementation with this file. Shapes: `(B, H, L, D)` = batch, heads,
tokens, head_dim; Nq and Nk = number of query and key blocks. The bundles are those of `types`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import (
    GAINS,
    LARGEST,
    Background,
    BlockLayout,
    BlockMask,
    EightBit,
    FeatureMap,
    LinearBranch,
    LinearState,
    PooledKV,
    Prefixes,
    RankedBlocks,
    RmsLowRank,
    SiluMap,
    TokenBlocks,
    value_slots,
)

TILE = 64  # keys that 8-bit attention takes at a time


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_blocks: TokenBlocks | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention and its log-sum-exp.

    q `(B, H, Lq, D)`, k and v `(B, H, Lk, D)` -> out `(B, H, Lq, D)`, LSE `(B, H, Lq)` (natural
    logarithm). kv_blocks: only the keys in these blocks; all when None.
    """
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * softmax_scale(q, scale)
    if kv_blocks is not None:
        listed = kv_blocks.block_of_token < kv_blocks.num_blocks
        scores = scores.masked_fill(~listed, -torch.inf)
    return _softmax_read(scores, v)


def block_pool(x: Tensor, blocks: TokenBlocks) -> Tensor:
    """Mean of x over the tokens of each block: x `(B, H, L, D)` -> `(B, H, N, D)`."""
    numbers = torch.arange(blocks.num_blocks, device=x.device)
    member = (blocks.block_of_token[None, :] == numbers[:, None]).to(x.dtype)
    sums = torch.einsum("nl,bhld->bhnd", member, x)
    return sums / member.sum(dim=-1)[:, None]


def block_select(
    pooled_q: Tensor,
    pooled_k: Tensor,
    layout: BlockLayout,
    topk: int | Sequence[int],
    *,
    scale: float | None = None,
) -> tuple[BlockMask, Tensor]:
    """Routing: the `topk` best key blocks of every query block, and the required ones.

    pooled_q `(B, H, Nq, D)`, pooled_k `(B, H, Nk, D)` -> the block mask, and dropped_lse
    `(B, H, Nq)` = log of the pooled mass of the blocks that were NOT kept, -inf where all were.
    topk: one number, or one for each of B * H heads. Required blocks come in addition: they do not
    count towards it.
    """
    scores = torch.einsum("bhqd,bhkd->bhqk", pooled_q, pooled_k) * softmax_scale(pooled_q, scale)
    required = _required(layout, scores.device)
    batch, heads = scores.shape[:2]
    most = torch.tensor([topk] * batch * heads if isinstance(topk, int) else topk)
    place = scores.masked_fill(required, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    best = place.argsort(dim=-1) < most.view(batch, heads, 1, 1).to(scores.device)
    kept = required | best
    sizes = layout.kv_blocks.sizes.to(scores.dtype)
    dropped_lse = (scores + sizes.log()).masked_fill(kept, -torch.inf).logsumexp(dim=-1)
    return BlockMask.from_dense(layout.q_blocks, layout.kv_blocks, kept), dropped_lse


def dropped_mass(pooled_q: Tensor, pooled_k: Tensor, mask: BlockMask, *, scale: float) -> Tensor:
    """The dropped_lse `(B, H, Nq)` of `block_select`, of a mask that is given; -inf for none."""
    scores = scale * pooled_q @ pooled_k.mT + mask.kv_blocks.sizes.log()
    return scores.masked_fill(mask.to_dense(), -torch.inf).logsumexp(dim=-1)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    pooled: PooledKV | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each query over the key blocks that its own block keeps, and its log-sum-exp.

    q `(B, H, Lq, D)`, k and v `(B, H, Lk, D)` -> out `(B, H, Lq, D)`, LSE `(B, H, Lq)`.
    With `pooled`, every block that is not kept adds ONE pseudo-key to the same softmax: its pooled
    key, weighted by its size, with its pooled value. A row that keeps nothing gives out 0 and -inf.
    """
    scale = softmax_scale(q, scale)
    kept = mask.to_dense()[:, :, mask.q_blocks.block_of_token]  # (B, H, Lq, Nk)
    nowhere = F.pad(kept, (0, 1))  # keys in no block
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    scores = scores.masked_fill(~nowhere[..., mask.kv_blocks.block_of_token], -torch.inf)
    if pooled is None:
        return _softmax_read(scores, v)
    sizes = mask.kv_blocks.sizes.to(q.dtype)
    far = torch.einsum("bhqd,bhnd->bhqn", q, pooled.k.to(q.dtype)) * scale + sizes.log()
    scores = torch.cat((scores, far.masked_fill(kept, -torch.inf)), dim=-1)
    return _softmax_read(scores, torch.cat((v, pooled.v.to(v.dtype)), dim=2))


def quantize_kv(
    k: Tensor, v: Tensor, blocks: TokenBlocks, k_mean: Tensor, v_mean: Tensor, dtype: torch.dtype
) -> EightBit:
    """Keys and values in 8 bits: one scale per key block, one per channel of the values.

    k, v `(B, H, L, D)`, k_mean, v_mean `(B, H, D)`: any vectors give the same attention, the means
    the least error. dtype: of the values. Rounding is to the nearest, ties to even.
    """

    def ordered(x: Tensor) -> Tensor:
        found = x[:, :, blocks.slots].unflatten(2, blocks.tokens.shape)
        return found.masked_fill(blocks.empty[..., None], 0.0)

    centred = ordered(k - k_mean[:, :, None])
    k_scale = centred.abs().amax(dim=(-2, -1)).clamp(min=1e-20) / 127
    listed = blocks.block_of_token < blocks.num_blocks
    v = (v - v_mean[:, :, None]).masked_fill(~listed[:, None], 0.0)
    v_scale = v.abs().amax(dim=2).clamp(min=1e-20) / LARGEST[dtype]
    values = ordered(v / v_scale[:, :, None])[..., value_slots(blocks.block_size), :].mT
    return EightBit(
        (centred / k_scale[..., None, None]).round().to(torch.int8),
        k_scale,
        k_mean,
        values.round().to(dtype) if dtype == torch.int8 else values.to(dtype),
        v_scale,
        v_mean,
    )


def eight_bit_attention(
    q: Tensor, mask: BlockMask, kv: EightBit, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`block_sparse_attention` in 8 bits: a row's kept blocks in tiles of 64 keys, one by one.

    Weights are rounded relative to the largest score so far: -> out `(B, H, Lq, D)`, LSE.
    """
    log2_scale = softmax_scale(q, scale) / math.log(2)
    q_scale = q.abs().amax(dim=-1).clamp(min=1e-20) / 127
    q8 = (q / q_scale[..., None]).round()
    each, (blocks, size) = max(1, TILE // mask.kv_blocks.block_size), mask.kv_blocks.tokens.shape
    there = ~F.pad(mask.kv_blocks.empty, (0, 0, 0, 1), value=True)
    keys = F.pad(kv.k.to(q.dtype) * kv.k_scale[..., None, None].to(q.dtype), (0, 0, 0, 0, 0, 1))
    values = F.pad(kv.v.to(q.dtype)[..., value_slots(size).argsort()].mT, (0, 0, 0, 0, 0, 1))
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf)
    rows = mask.q_blocks.block_of_token
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        lists = F.pad(mask.head_lists(b, h, blocks), (0, -mask.head_lists(b, h, 0).shape[1] % each),
                      value=blocks)  # fmt: skip
        highest, total = q.new_full(q.shape[2:3], -torch.inf), q.new_zeros(q.shape[2:3])
        sums, gain = q.new_zeros(q.shape[2:]), GAINS[kv.v.dtype]
        for tile in lists.split(each, dim=1):
            tile = tile[rows]  # (Lq, each)
            own = keys[b, h][tile].flatten(1, 2)
            scores = torch.einsum("qd,qkd->qk", q8[b, h], own) * q_scale[b, h, :, None] * log2_scale
            scores = scores.masked_fill(~there[tile].flatten(1), -torch.inf)
            new = torch.maximum(highest, scores.amax(dim=1))
            shift = new.masked_fill(new == -torch.inf, 0.0)
            weights, fade = torch.exp2(scores - shift[:, None] + gain), torch.exp2(highest - shift)
            rounded = weights.round() if kv.v.dtype == torch.int8 else weights.to(kv.v.dtype)
            read = torch.einsum("qk,qkd->qd", rounded.to(q.dtype), values[b, h][tile].flatten(1, 2))
            highest, total = new, total * fade + weights.sum(dim=1)
            sums = sums * fade[:, None] + read
        read = sums / total.clamp(min=1e-300)[:, None] * kv.v_scale[b, h]
        out[b, h] = torch.where(total[:, None] > 0, read + kv.v_mean[b, h], 0.0)
        lse[b, h] = (highest + total.log2() - gain) * math.log(2)
    shifted = torch.einsum("bhqd,bhd->bhq", q, kv.k_mean.to(q.dtype)) * softmax_scale(q, scale)
    return out, lse + shifted


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranked: RankedBlocks,
    counts: Sequence[int],
    *,
    scale: float | None = None,
) -> Prefixes:
    """Attention of queries `(B, H, R, D)` over their best key blocks, for each of `counts`."""
    scale, (kv_blocks, pooled_q, pooled_k, required, pooled) = softmax_scale(q, scale), ranked
    block_scores = torch.einsum("bhrd,bhnd->bhrn", pooled_q, pooled_k).to(q.dtype) * scale
    if required is None:
        required = torch.zeros_like(block_scores[0, 0], dtype=torch.bool)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    hidden = kv_blocks.block_of_token == kv_blocks.num_blocks
    exact_out, exact_lse = _softmax_read(scores.masked_fill(hidden, -torch.inf), v)
    sizes = kv_blocks.sizes.to(q.dtype).log()
    best = block_scores.masked_fill(required, -torch.inf)
    rank = best.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    parts = []
    for count in counts:
        kept = required | (rank < count)
        seen = F.pad(kept, (0, 1))[..., kv_blocks.block_of_token]
        near, values = scores.masked_fill(~seen, -torch.inf), v
        if pooled is not None:
            far = torch.einsum("bhqd,bhnd->bhqn", q, pooled.k.to(q.dtype)) * scale + sizes
            near = torch.cat((near, far.masked_fill(kept, -torch.inf)), dim=-1)
            values = torch.cat((v, pooled.v.to(v.dtype)), dim=2)
        dropped = (block_scores + sizes).masked_fill(kept, -torch.inf).logsumexp(dim=-1)
        parts.append((*_softmax_read(near, values), dropped))
    out, lse, dropped_lse = (torch.stack(each) for each in zip(*parts))
    return Prefixes(out, lse, dropped_lse, exact_out, exact_lse)


def block_pool_state(
    k: Tensor, v: Tensor, layout: BlockLayout, channel_ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Block means of k, and the first-order state of the keys that stand at a query's place.

    k, v `(B, H, L, D)`, channel_ids `(B, H, r)` = the channels of k that are used, all when None ->
    means `(B, H, Nk, D)`, mean of v `(B, H, D)`, covariance mean((k - mean k)^T v) `(B, H, r, D)`.
    """
    tokens = layout.kv_of_queries.tokens
    tokens = tokens[tokens >= 0].long()
    k_in, v_in = _channels(k, channel_ids)[:, :, tokens], v[:, :, tokens]
    centred = k_in - k_in.mean(dim=2, keepdim=True)
    cov = torch.einsum("bhld,bhle->bhde", centred, v_in) / tokens.numel()
    return block_pool(k, layout.kv_blocks), v_in.mean(dim=2), cov


def features(x: Tensor, feature_map: FeatureMap) -> Tensor:
    """phi = act(proj x + pe(p)): x `(B, H, L, D)` after RoPE, undone first -> `(B, H, L, r)`."""
    logits = _project(x, feature_map)
    return logits.softmax(-1) if feature_map.act == "softmax" else F.elu(logits) + 1


def low_rank_state(k: Tensor, v: Tensor, feature_map: FeatureMap) -> tuple[Tensor, Tensor]:
    """What a linear branch keeps of k, v `(B, H, L, D)`: mean(phi_k^T v), mean(phi_k)."""
    phi = features(k, feature_map)
    return torch.einsum("bhlr,bhld->bhrd", phi, v) / k.shape[2], phi.mean(dim=2)


def linear_read(q: Tensor, feature_map: FeatureMap, state: LinearState) -> Tensor:
    """phi_q kv_state / (eps + phi_q normalizer): -> `(B, H, L, D)`."""
    phi = features(q, feature_map)
    under = state.eps + torch.einsum("bhlr,bhr->bhl", phi, state.normalizer)
    return (phi @ state.kv_state) / under[..., None]


def mix_background(
    q: Tensor, out: Tensor, lse: Tensor, q_blocks: TokenBlocks, background: Background
) -> Tensor:
    """Mix the sparse output with its background by their shares of the softmax mass.

    g = sigmoid(slope (dropped_lse - LSE) + bias + logits), 1 where nothing was kept (LSE = -inf),
    0 where nothing was dropped;
    (1 - g) out + g (v_mean + (channel_scale q) cov + scale (low rank - v_mean)).
    q, out `(B, H, L, D)`; lse `(B, H, L)`; the rest as `types` tells.
    """
    gate, first, low_rank = background
    dropped = gate.dropped_lse[:, :, q_blocks.block_of_token]
    logits = gate.slope[..., None] * (dropped - lse.clamp(min=-1e30)) + gate.bias[..., None]
    if gate.logits is not None:
        logits = logits + gate.logits
    g = torch.sigmoid(logits).masked_fill(lse == -torch.inf, 1.0)
    g = g.masked_fill(dropped == -torch.inf, 0.0)[..., None]
    mean = first.v_mean[:, :, None]
    scaled = _channels(q, first.channel_ids) * first.channel_scale[:, :, None]
    mixed = mean + scaled @ first.cov
    if low_rank is not None:
        read = linear_read(q, low_rank.feature_map, low_rank.state)
        mixed = mixed + low_rank.scale[:, None, None] * (read - mean)
    return (1 - g) * out + g * mixed


def block_sparse_mixed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    background: Background,
    *,
    scale: float | None = None,
) -> Tensor:
    """`block_sparse_attention` and `mix_background` in one."""
    out, lse = block_sparse_attention(q, k, v, mask, scale=scale)
    return mix_background(q, out, lse, mask.q_blocks, background)


def block_sparse_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    branch: LinearBranch,
    *,
    scale: float | None = None,
) -> Tensor:
    """Sparse output + linear branch + bias: SLA, its projection W folded into the state S W^T."""
    out, _ = block_sparse_attention(q, k, v, mask, scale=scale)
    return out + linear_read(q, branch.feature_map, branch.state) + branch.bias


def silu_features(x: Tensor, silu_map: SiluMap) -> Tensor:
    """phi = rope(silu(proj x + pe(p))): x `(B, H, L, D)`, RoPE undone first -> `(B, H, L, r)`."""
    phi = F.silu(_project(x, silu_map))
    cos, sin = silu_map.feature_cos, silu_map.feature_sin
    if cos is None or sin is None:
        return phi
    rotated = 2 * cos.shape[1]
    even, odd = phi[..., :rotated:2], phi[..., 1:rotated:2]
    pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return torch.cat((pairs.flatten(-2), phi[..., rotated:]), dim=-1)


def rms_low_rank(q: Tensor, k: Tensor, v: Tensor, branch: RmsLowRank) -> Tensor:
    """RMSNorm over D of phi_q (sum phi_k^T v), no normaliser or weight: -> `(B, H, Lq, D)`."""
    state = torch.einsum("bhlr,bhld->bhrd", silu_features(k, branch.k_map), v)
    read = silu_features(q, branch.q_map) @ state
    return read * (read.square().mean(dim=-1, keepdim=True) + branch.eps).rsqrt()


def add_rms_low_rank(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, gate: Tensor, branch: RmsLowRank
) -> Tensor:
    """(out / s + gate * rms_low_rank) * s, s = sqrt(mean_D(out^2) + 1e-5); gate `(B, H, Lq)`."""
    size = (out.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return (out / size + gate[..., None] * rms_low_rank(q, k, v, branch)) * size


def add_mapped(x: Tensor, matrix: Tensor) -> Tensor:
    """x + x matrix of every head: x `(B, H, L, D)`, matrix `(B, H, D, D)` -> `(B, H, L, D)`."""
    return x + x @ matrix


def feature_energy(q: Tensor, k: Tensor, v: Tensor, branch: RmsLowRank) -> Tensor:
    """Mean square of each feature's part of phi_q sum(phi_k^T v), summed over D: -> `(B, H, r)`."""
    state = torch.einsum("bhlr,bhld->bhrd", silu_features(k, branch.k_map), v)
    parts = torch.einsum("bhlr,bhrd->bhlrd", silu_features(q, branch.q_map), state)
    return parts.square().sum(dim=-1).mean(dim=2)


def add_coarse(
    out: Tensor,
    gate: Tensor,
    pooled: tuple[Tensor, Tensor, Tensor],
    blocks: TokenBlocks,
    *,
    scale: float,
) -> Tensor:
    """Attention between blocks, added to each of their tokens by a gate.

    out, gate `(B, H, L, D)`; pooled q, k, v `(B, H, N, D)`: the means of `blocks` ->
    out + gate C[block], C = softmax(scale pooled_q pooled_k^T) pooled_v.
    """
    pooled_q, pooled_k, pooled_v = pooled
    coarse = (scale * pooled_q @ pooled_k.mT).softmax(dim=-1) @ pooled_v
    return out + gate * F.pad(coarse, (0, 0, 0, 1))[:, :, blocks.block_of_token]


def marginal_linear(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, marginal: Tensor, *, eps: float
) -> Tensor:
    """Linear attention of each query over the key blocks that its own block marks.

    marginal `(B, H, Nq, Nk)` bool; phi_q sum(phi_k^T v) / (eps + phi_q sum(phi_k)) with
    phi = softmax over the channels -> `(B, H, Lq, D)`.
    """
    phi_q, phi_k = q.softmax(dim=-1), k.softmax(dim=-1)
    seen = F.pad(marginal[:, :, layout.q_blocks.block_of_token], (0, 1))
    seen = seen[..., layout.kv_blocks.block_of_token]
    weights = torch.einsum("bhqd,bhkd->bhqk", phi_q, phi_k) * seen
    return (weights @ v) / (eps + weights.sum(dim=-1, keepdim=True))


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    layout: BlockLayout,
    topks: list[int],
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact search (AdaSpa): the blocks of largest softmax mass of every row, for each topk.

    lse `(B, H, Lq)` from a dense pass -> bits `(B, H, len(topks), Nq, ceil(Nk / 32))` int32, bit
    j % 32 of word j / 32 for key block j, required blocks in addition to the best; recall
    `(B, H, len(topks))`, the share of the softmax mass that is kept.
    """
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * softmax_scale(q, scale)
    mass = _sum_blocks((scores - lse[..., None]).exp(), layout)
    required = _required(layout, q.device)
    bits, recall = [], []
    for topk in topks:
        best = mass.masked_fill(required, -1.0).topk(min(topk, mass.shape[-1]), dim=-1).indices
        kept = required | torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, best, True)
        bits.append(pack_bits(kept))
        recall.append((mass * kept).sum(dim=(-2, -1)) / mass.sum(dim=(-2, -1)))
    return torch.stack(bits, dim=2), torch.stack(recall, dim=2)


def pack_bits(kept: Tensor) -> Tensor:
    """Booleans `(..., Nk)` -> `(..., ceil(Nk / 32))` int32."""
    words = F.pad(kept, (0, -kept.shape[-1] % 32)).unflatten(-1, (-1, 32)).long()
    packed = (words << torch.arange(32, device=kept.device)).sum(dim=-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def mask_from_bits(bits: Tensor, layout: BlockLayout, list_width: int) -> BlockMask:
    """Bit masks `(B, H, Nq, words)` -> the block mask whose lists have `list_width` entries."""
    blocks = layout.kv_blocks.num_blocks
    kept = (bits[..., None] >> torch.arange(32, device=bits.device)) & 1
    kept = kept.flatten(-2)[..., :blocks].bool()
    return BlockMask.from_dense(layout.q_blocks, layout.kv_blocks, kept, list_width)


def softmax_scale(q: Tensor, scale: float | None) -> float:
    """The caller's own, or 1 / sqrt(D)."""
    return q.shape[-1] ** -0.5 if scale is None else scale


def _required(layout: BlockLayout, device: torch.device) -> Tensor:
    if layout.required is not None:
        return layout.required.mask
    shape = (layout.q_blocks.num_blocks, layout.kv_blocks.num_blocks)
    return torch.zeros(shape, dtype=torch.bool, device=device)


def _sum_blocks(weights: Tensor, layout: BlockLayout) -> Tensor:
    """weights `(B, H, Lq, Lk)` -> their sums over pairs of blocks `(B, H, Nq, Nk)`."""
    n_q, n_k = layout.q_blocks.num_blocks, layout.kv_blocks.num_blocks
    sums = weights.new_zeros(*weights.shape[:3], n_k + 1)
    sums.index_add_(3, layout.kv_blocks.block_of_token, weights)
    mass = weights.new_zeros(*weights.shape[:2], n_q, n_k)
    return mass.index_add_(2, layout.q_blocks.block_of_token, sums[..., :n_k])


def _project(x: Tensor, feature_map: FeatureMap | SiluMap) -> Tensor:
    """proj x + pe(p), x taken back to before RoPE: `(B, H, L, D)` -> `(B, H, L, r)`."""
    cos, sin = feature_map.rope_cos, feature_map.rope_sin
    if cos is not None and sin is not None:
        even, odd = x[..., 0::2], x[..., 1::2]
        x = torch.stack((even * cos + odd * sin, odd * cos - even * sin), dim=-1).flatten(-2)
    if feature_map.proj is not None:
        x = torch.einsum("bhld,hrd->bhlr", x, feature_map.proj)
    if feature_map.pe is not None and feature_map.axis_ids is not None:
        ids = feature_map.axis_ids.long()
        x = x + sum(feature_map.pe[:, ids[:, axis]] for axis in range(3))
    return x


def _channels(x: Tensor, channel_ids: Tensor | None) -> Tensor:
    if channel_ids is None:
        return x
    return x.gather(-1, channel_ids[:, :, None].expand(-1, -1, x.shape[2], -1))


def _softmax_read(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return torch.einsum("bhqk,bhkd->bhqd", weights, v), lse
