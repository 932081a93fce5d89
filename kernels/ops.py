"""One public function per operation: the arguments are checked here, before a backend sees them.

Every function has the contract of the function of the same name in `reference`; the shapes are told there.
Errors are ValueErrors that name the argument, what was found and what was expected.
"""

from __future__ import annotations

from torch import Tensor

from . import pytorch

MAX_HEAD_WIDTH = 512


def why_not(head_width: int, heads: int, kv_heads: int) -> str | None:
    """Why no backend can take such a call, in words; None where one can."""
    if head_width % 2 or head_width > MAX_HEAD_WIDTH:
        return f"head width {head_width} (an even width up to {MAX_HEAD_WIDTH} is needed)"
    if heads != kv_heads:
        return f"{heads} query heads on {kv_heads} key heads (equal numbers are needed)"
    return None


def block_pool(x: Tensor, blocks: Tensor) -> Tensor:
    """x `(B, H, L, D)`, table `(N, S)` -> block means `(B, H, N, D)`, float32 or wider."""
    _check_heads(x=x)
    _check_table("blocks", blocks)
    return pytorch.block_pool(x, blocks)


def block_select(
    pooled_q: Tensor, pooled_k: Tensor, k_sizes: Tensor, keep: int, forced: Tensor | None = None,
    scale: float | None = None, most_forced: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> indices `(B, H, Nq, K)` int32 ascending, counts `(B, H, Nq)` int32, tail log-mass `(B, H, Nq)`.

    most_forced: forced blocks of the fullest row; callers who know it spare the host a question to the device.
    """
    _check_heads(pooled_q=pooled_q, pooled_k=pooled_k)
    if keep < 1:
        raise ValueError(f"keep must be at least 1 block per row, found {keep}")
    if forced is not None and forced.shape != (pooled_q.shape[2], pooled_k.shape[2]):
        expected = (pooled_q.shape[2], pooled_k.shape[2])
        raise ValueError(f"forced must be (query blocks, key blocks) = {expected}, found {tuple(forced.shape)}")
    return pytorch.block_select(pooled_q, pooled_k, k_sizes, keep, forced, scale, most_forced)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Exact attention of a few query rows: -> out `(B, H, Lq, D)`, LSE `(B, H, Lq)`."""
    _check_attention(q, k, v)
    return pytorch.dense_attention(q, k, v, scale)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, indices: Tensor, counts: Tensor,
    tail_k: Tensor | None = None, tail_v: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """-> out `(B, H, Lq, D)` in q's token order and dtype, LSE `(B, H, Lq)` in float32 or wider."""
    _check_attention(q, k, v)
    _check_table("q_blocks", q_blocks)
    _check_table("k_blocks", k_blocks)
    rows = (*q.shape[:2], q_blocks.shape[0])
    if indices.shape[:-1] != rows or counts.shape != rows:
        raise ValueError(
            f"indices and counts must have one row per head and query block, {rows}; "
            f"found {tuple(indices.shape)} and {tuple(counts.shape)}"
        )
    if (tail_k is None) != (tail_v is None):
        raise ValueError("tail_k and tail_v go together: give both for the pooled tail, or neither")
    return pytorch.block_sparse_attention(q, k, v, q_blocks, k_blocks, indices, counts, tail_k, tail_v, scale)


def first_order_state(k: Tensor, v: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """k, v `(B, H, L, D)` -> mean value `(B, H, D)`, key-value covariance `(B, H, R, D)`, float32 or wider."""
    _check_heads(k=k, v=v)
    return pytorch.first_order_state(k, v, features)


def mix_first_order(
    q: Tensor, out: Tensor, lse: Tensor, tail: Tensor, q_blocks: Tensor, v_mean: Tensor, cov: Tensor,
    gate_c: Tensor, gate_b: Tensor, beta: Tensor, features: Tensor | None = None,
) -> Tensor:
    """Sparse output and first-order background, mixed by mass: -> `(B, H, L, D)` in q's dtype."""
    _check_heads(q=q, out=out)
    _check_table("q_blocks", q_blocks)
    return pytorch.mix_first_order(q, out, lse, tail, q_blocks, v_mean, cov, gate_c, gate_b, beta, features)


def _check_heads(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name} must be (batch, heads, tokens, head width), none 0; found {tuple(x.shape)}")


def _check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    _check_heads(q=q, k=k, v=v)
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q, k, v must agree in batch, heads and head width, and k and v in tokens; "
            f"found q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must have one dtype; found {q.dtype}, {k.dtype}, {v.dtype}")


def _check_table(name: str, blocks: Tensor) -> None:
    if blocks.ndim != 2 or blocks.dtype.is_floating_point:
        raise ValueError(f"{name} must be an integer table (blocks, slots); found {tuple(blocks.shape)} {blocks.dtype}")
