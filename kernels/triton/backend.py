"""The operations on Triton kernels: checked tensors in, launches, tensors out; contracts as in `pytorch`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import pytorch
from ..background import FeatureMap, FirstOrder, Gate, LinearState, LowRank
from ..lists import transpose_lists
from ..pytorch.heads import block_sizes, like_host
from .block_pool import _low_rank_state, _pool, _pool_state
from .block_select import _mass, _select, _unpack
from .block_sparse import _forward
from .block_sparse_backward import _d_keys, _d_queries, _delta
from .features import ACTS
from .launch import aligned, launch_options, padded, strides

SELECT_CHUNK = 1024
SCRATCH_BYTES = 64 << 20                    # scores or masses of so many rows at a time
BLOCKS_PER_STATE = 64                       # blocks that one program sums into its part of a state
BLOCK = 64                                  # where the caller has no table


def block_pool(x: Tensor, blocks: Tensor) -> Tensor:
    """See `reference.block_pool`."""
    batch, heads, tokens, width = x.shape
    x, blocks = aligned(x), _table(blocks)
    means = x.new_empty(batch, heads, blocks.shape[0], width, dtype=torch.float32)
    _pool[(blocks.shape[0], batch * heads)](
        x, means, blocks, *strides(x), heads, tokens, blocks.shape[0],
        D=width, DP=padded(width), BLOCK=blocks.shape[1], **launch_options("pool"),
    )
    return means


def block_pool_state(
    k: Tensor, v: Tensor, blocks: Tensor, inner: int, features: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.block_pool_state`; the state is made of all channels, which costs no further read."""
    batch, heads, tokens, width = k.shape
    k, v, blocks = aligned(k), aligned(v), _table(blocks)
    count = blocks.shape[0]
    parts = -(-count // BLOCKS_PER_STATE)
    means = k.new_empty(batch, heads, count, width, dtype=torch.float32)
    products = k.new_empty(batch, heads, parts, width, width, dtype=torch.float32)
    sums = k.new_empty(batch, heads, parts, 2, width, dtype=torch.float32)
    _pool_state[(parts, batch * heads)](
        k, v, means, products, sums, blocks, *strides(k), *strides(v),
        heads, tokens, count, inner, BLOCKS_PER_STATE, parts,
        D=width, DP=padded(width), BLOCK=blocks.shape[1], **launch_options("state"),
    )
    size = (blocks[:inner] >= 0).sum()
    k_mean, v_mean = (x.contiguous() for x in (sums.sum(dim=2) / size).unbind(dim=2))
    cov = products.sum(dim=2) / size - k_mean[..., :, None] * v_mean[..., None, :]
    if features is not None:
        cov = cov.gather(2, features[..., None].expand(-1, -1, -1, width))
    return means, v_mean, cov


def low_rank_state(k: Tensor, v: Tensor, map: FeatureMap) -> tuple[Tensor, Tensor]:
    """See `reference.low_rank_state`."""
    batch, heads, tokens, width = k.shape
    k, v = aligned(k), aligned(v)
    rank = width if map.a is None else map.a.shape[1]
    parts = -(-tokens // (BLOCK * BLOCKS_PER_STATE))
    products = k.new_empty(batch, heads, parts, rank, width, dtype=torch.float32)
    sums = k.new_empty(batch, heads, parts, rank, dtype=torch.float32)
    _low_rank_state[(parts, batch * heads)](
        k, v, products, sums, *_map_pointers(map), *strides(k), *strides(v),
        heads, tokens, rank, _pe_rows(map), BLOCKS_PER_STATE, parts,
        D=width, DP=padded(width), RP=padded(rank), BLOCK=BLOCK, ACT=ACTS[map.act],
        **launch_options("features"),
    )
    return products.sum(dim=2) / tokens, sums.sum(dim=2) / tokens


def block_select(
    pooled_q: Tensor, pooled_k: Tensor, k_sizes: Tensor, keep: int, forced: Tensor | None, scale: float,
    most_forced: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.block_select`. Scores are made for a few heads at a time and never kept."""
    batch, heads, n_q, width = pooled_q.shape
    n_k = pooled_k.shape[2]
    list_width = min(n_k, keep + most_forced)
    q, k = (x.flatten(0, 1).float() for x in (pooled_q, pooled_k))
    indices = q.new_empty(batch, heads, n_q, list_width, dtype=torch.int32)
    counts = q.new_empty(batch, heads, n_q, dtype=torch.int32)
    tail = q.new_empty(batch, heads, n_q)
    log_sizes = k_sizes.to(torch.float32).log2()
    forced = None if forced is None else forced.to(torch.uint8).contiguous()
    for some in _head_chunks(batch * heads, n_q * n_k):
        scores = torch.bmm(q[some] * scale, k[some].mT)
        _select[(scores.shape[0] * n_q, 1)](
            scores, forced, log_sizes, None, indices, counts, tail, None, None,
            some.start * n_q, n_q, n_k, keep, list_width, 0, 1, CHUNK=SELECT_CHUNK, **launch_options("select"),
        )
    return indices, counts, tail


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, q_blocks: Tensor, k_blocks: Tensor, keeps: list[int], forced: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `reference.block_mass`. Masses are made for a few heads at a time and never kept."""
    batch, heads, tokens, width = q.shape
    q, k, q_blocks, k_blocks = aligned(q), aligned(k), _table(q_blocks), _table(k_blocks)
    n_q, n_k, choices = q_blocks.shape[0], k_blocks.shape[0], len(keeps)
    words = -(-n_k // 32)
    bits = q.new_empty(batch * heads, n_q, choices, words, dtype=torch.int32)
    kept_mass = q.new_empty(batch * heads, n_q, choices, dtype=torch.float32)
    all_mass = []
    keeps_there = torch.tensor(keeps, dtype=torch.int32).to(q.device, non_blocking=True)
    forced = None if forced is None else forced.to(torch.uint8).contiguous()
    lse = lse.contiguous()
    for some in _head_chunks(batch * heads, n_q * n_k):
        mass = q.new_empty(some.stop - some.start, n_q, n_k, dtype=torch.float32)
        _mass[(n_q, mass.shape[0])](
            q, k, lse, mass, q_blocks, k_blocks, *strides(q), *strides(k),
            heads, some.start, tokens, k.shape[2], n_q, n_k, scale,
            D=width, DP=padded(width), BLOCK_Q=q_blocks.shape[1], BLOCK_K=k_blocks.shape[1],
            **launch_options("mass"),
        )
        all_mass.append(mass.sum(dim=(1, 2)))
        _select[(mass.shape[0] * n_q, choices)](
            mass, forced, None, keeps_there, None, None, None, bits, kept_mass,
            some.start * n_q, n_q, n_k, 0, 0, words, choices, CHUNK=SELECT_CHUNK, **launch_options("select"),
        )
    bits, kept_mass = (x.unflatten(0, (batch, heads)).movedim(3, 2) for x in (bits, kept_mass))
    return bits.contiguous(), kept_mass.sum(dim=-1) / torch.cat(all_mass).view(batch, heads, 1)


def lists_from_bits(bits: Tensor, blocks: int, longest: int) -> tuple[Tensor, Tensor]:
    """See `reference.lists_from_bits`."""
    bits = bits.contiguous()
    rows = bits.shape[:-1]
    indices = bits.new_empty(*rows, longest)
    counts = bits.new_empty(rows)
    _unpack[(counts.numel(),)](
        bits, indices, counts, blocks, longest, bits.shape[-1], CHUNK=SELECT_CHUNK, **launch_options("select")
    )
    return indices, counts


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See `reference.dense_attention`."""
    return _attend(q, k, v, None, None, None, None, scale)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, indices: Tensor, counts: Tensor,
    tail_k: Tensor | None, tail_v: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:
    """See `reference.block_sparse_attention`; pooled keys and values enter in q's dtype."""
    tail = None
    if tail_k is not None:
        log_sizes = block_sizes(k_blocks).float().log2()
        tail = (tail_k.to(q.dtype).contiguous(), tail_v.to(q.dtype).contiguous(), log_sizes)
    return _attend(q, k, v, q_blocks, k_blocks, indices, counts, scale, tail)


def block_sparse_mixed(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, indices: Tensor, counts: Tensor,
    tail: Tensor, gate: Gate, first: FirstOrder, low_rank: LowRank | None, scale: float,
) -> Tensor:
    """See `reference.block_sparse_mixed`: sparse output and background, mixed before anything is written."""
    width = q.shape[3]
    matrix = first.cov * first.beta[..., None]
    if first.features is not None:          # left-out channels are rows of 0: a product of D x D costs one key block
        whole = matrix.new_zeros(*matrix.shape[:2], width, width)
        matrix = whole.scatter_(2, first.features[..., None].expand_as(matrix), matrix)
    matrix, size = _normalised(matrix.float(), q.dtype)
    mixing = [tail, *gate, matrix, size, first.v_mean, None]
    branch = low_rank or (None,) * 3
    return _attend(q, k, v, q_blocks, k_blocks, indices, counts, scale, None, mixing, *branch, lse=False)[0]


def block_sparse_linear(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, indices: Tensor, counts: Tensor,
    map: FeatureMap, linear: LinearState, bias: Tensor, scale: float,
) -> Tensor:
    """See `reference.block_sparse_linear`: sparse output plus a linear branch (SLA)."""
    mixing = [None] * 7 + [bias]
    return _attend(q, k, v, q_blocks, k_blocks, indices, counts, scale, None, mixing, map, linear, lse=False)[0]


def block_sparse_attention_backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    q_blocks: Tensor, k_blocks: Tensor, indices: Tensor, counts: Tensor, tail_k: Tensor | None, tail_v: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of `block_sparse_attention`; with a tail, which is no trained method's, on the portable path."""
    if tail_k is not None:
        return pytorch.block_sparse_attention_backward(
            d_out, d_lse, q, k, v, out, lse, q_blocks, k_blocks, indices, counts, tail_k, tail_v, scale
        )
    batch, heads, tokens, width = q.shape
    q, k, v, out, d_out = (aligned(x) for x in (q, k, v, out, d_out.to(q.dtype)))
    q_blocks, k_blocks, indices, counts = _table(q_blocks), _table(k_blocks), indices.contiguous(), counts.contiguous()
    lse, d_lse = lse.contiguous(), None if d_lse is None else d_lse.float().contiguous()
    n_q, n_k, k_tokens = q_blocks.shape[0], k_blocks.shape[0], k.shape[2]
    shape = dict(D=width, DP=padded(width), BLOCK_Q=q_blocks.shape[1], BLOCK_K=k_blocks.shape[1])
    delta = torch.empty_like(lse)
    _delta[(-(-tokens // BLOCK), batch * heads)](
        out, d_out, d_lse, delta, *strides(out), *strides(d_out), heads, tokens,
        D=width, DP=padded(width), BLOCK=BLOCK, **launch_options("pool"),
    )
    d_q, d_k, d_v = like_host(q, tokens), like_host(k, k_tokens), like_host(v, k_tokens)
    _d_queries[(n_q, batch * heads)](
        q, k, v, d_out, lse, delta, d_q, q_blocks, k_blocks, indices, counts,
        *strides(q), *strides(k), *strides(v), *strides(d_out), *strides(d_q),
        heads, tokens, k_tokens, n_q, indices.shape[-1], scale, **shape, **launch_options("d_queries"),
    )
    entries, starts = transpose_lists(indices, counts, n_k)
    _d_keys[(n_k, batch * heads)](
        q, k, v, d_out, lse, delta, d_k, d_v, q_blocks, k_blocks, entries, starts,
        *strides(q), *strides(k), *strides(v), *strides(d_out), *strides(d_k), *strides(d_v),
        heads, tokens, k_tokens, n_k, entries.shape[-1], scale, **shape, **launch_options("d_keys"),
    )
    return d_q, d_k, d_v


def _attend(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor | None, k_blocks: Tensor | None, indices: Tensor | None,
    counts: Tensor | None, scale: float, tail: tuple[Tensor, Tensor, Tensor] | None = None,
    mixing: list[Tensor | None] | None = None, map: FeatureMap | None = None, linear: LinearState | None = None,
    eta: Tensor | None = None, lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward kernel with whatever groups of pointers there are."""
    batch, heads, tokens, width = q.shape
    q, k, v = aligned(q), aligned(k), aligned(v)
    q_blocks, k_blocks = (None if x is None else _table(x) for x in (q_blocks, k_blocks))
    indices, counts = (None if x is None else x.contiguous() for x in (indices, counts))
    n_q, block_q = (-(-tokens // BLOCK), BLOCK) if q_blocks is None else q_blocks.shape
    n_k, block_k = (-(-k.shape[2] // BLOCK), BLOCK) if k_blocks is None else k_blocks.shape
    if mixing is None:
        variant = "tail" if tail else "forward"
    elif mixing[0] is None:
        variant = "linear"
    else:
        variant = "low_rank" if linear else "mixed"
    map = map or FeatureMap("softmax")
    out = like_host(q, tokens)
    sums = q.new_empty(batch, heads, tokens, dtype=torch.float32) if lse else None
    rank, state = 0, (None,) * 5
    if linear is not None:
        rank = linear.state.shape[2]
        matrix, size = _normalised(linear.state.float(), q.dtype)
        state = (matrix, size, linear.norm.float(), torch.full_like(size, linear.eps), eta)
    _forward[(n_q, batch * heads)](
        q, k, v, out, sums, q_blocks, k_blocks, indices, counts,
        *(tail or (None,) * 3), *_contiguous(mixing or [None] * 8),
        *_map_pointers(map), *_contiguous(state),
        *strides(q), *strides(k), *strides(v), *strides(out),
        heads, tokens, k.shape[2], n_q, n_k, 0 if indices is None else indices.shape[-1], rank,
        _pe_rows(map), scale,
        D=width, DP=padded(width), RP=padded(rank or 1), BLOCK_Q=block_q, BLOCK_K=block_k,
        ACT=ACTS[map.act], **launch_options(variant),
    )
    return out, sums


def _normalised(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix per head scaled to at most 1, so that no half precision overflows, and its scale `(B, H)`.

    The scale is a power of two: what is divided and multiplied by it comes back bit for bit.
    """
    size = torch.exp2(matrix.abs().amax(dim=(-2, -1)).clamp(min=1e-30).log2().ceil())
    return (matrix / size[..., None, None]).to(dtype).contiguous(), size


def _map_pointers(map: FeatureMap) -> list[Tensor | None]:
    return _contiguous((map.a, map.cos, map.sin, map.pe, map.places))


def _contiguous(tensors) -> list[Tensor | None]:
    """Every tensor as a kernel can take it; float64 is no dtype of theirs."""
    return [
        None if x is None else (x.float() if x.dtype == torch.float64 else x).contiguous() for x in tensors
    ]


def _pe_rows(map: FeatureMap) -> int:
    return 0 if map.pe is None else map.pe.shape[1]


def _table(blocks: Tensor) -> Tensor:
    return blocks.to(torch.int32).contiguous()


def _head_chunks(heads: int, numbers_per_head: int) -> list[slice]:
    step = max(1, SCRATCH_BYTES // (4 * numbers_per_head))
    return [slice(start, min(start + step, heads)) for start in range(0, heads, step)]
