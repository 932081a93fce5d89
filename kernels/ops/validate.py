"""Checks of an operation's arguments; a ValueError names the argument, what was found and expected.

A bundle checks itself when it is made (see `types`); here is what has to fit q, k and v.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from torch import Tensor

from ..dispatch import BACKENDS
from ..types import (
    ACTS,
    Background,
    BlockMask,
    EightBit,
    FeatureMap,
    LinearState,
    RmsLowRank,
    SiluMap,
    TokenBlocks,
)


def check_backend(backend: str) -> None:
    """One of BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; found {backend!r}")


def softmax_scale(q: Tensor, scale: float | None) -> float:
    """The caller's own, or 1 / sqrt(D)."""
    found = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not found > 0:
        raise ValueError(f"scale must be a positive number, found {found}")
    return found


def whole_number(name: str, value: object, low: int, high: int | None = None) -> int:
    """A whole number in range, as an int; NaN, fractions and text are refused."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} must be a whole number, found {value!r}") from None
    if number < low or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {bounds}, found {number}")
    return number


def check_heads(**tensors: Tensor) -> None:
    """Four dimensions, none of them empty, floating point."""
    for name, x in tensors.items():
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(
                f"{name} must be (batch, heads, tokens, head_dim), none 0; found {tuple(x.shape)}"
            )
        if not x.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point; found {x.dtype}")


def check_shape(name: str, x: Tensor, shape: Sequence[int]) -> None:
    """Exactly this shape."""
    if x.shape != tuple(shape):
        raise ValueError(f"{name} must have the shape {tuple(shape)}; found {tuple(x.shape)}")


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Queries, keys and values that belong together."""
    check_heads(q=q, k=k, v=v)
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q, k, v must agree in batch, heads and head_dim, and k and v in tokens; "
            f"found q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must have one dtype; found {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must be on one device; found {q.device}, {k.device}, {v.device}")


def check_blocks(name: str, blocks: TokenBlocks, x: Tensor) -> None:
    """Blocks of x's tokens, on its device."""
    _check_tokens(name, blocks, x)
    check_devices(x, [blocks.tokens])


def _check_tokens(name: str, blocks: TokenBlocks, x: Tensor) -> None:
    if blocks.num_tokens != x.shape[2]:
        raise ValueError(
            f"{name} are blocks of {blocks.num_tokens} tokens, but the tensor has {x.shape[2]}"
        )


def check_mask(mask: BlockMask, q: Tensor, k: Tensor) -> None:
    """A block mask for these queries and keys."""
    q_blocks, kv_blocks = mask.q_blocks, mask.kv_blocks
    _check_tokens("mask.q_blocks", q_blocks, q)
    _check_tokens("mask.kv_blocks", kv_blocks, k)
    rows = (*q.shape[:2], q_blocks.num_blocks)
    check_shape("mask.kv_num_blocks", mask.kv_num_blocks, rows)
    lists = [mask.kv_indices, mask.kv_num_blocks]
    if mask.packing is not None:
        lists.append(mask.packing.starts)
    check_devices(q, [q_blocks.tokens, kv_blocks.tokens, *lists])


def check_eight_bit(eight_bit: EightBit | None, kv_blocks: TokenBlocks | None, q: Tensor) -> None:
    """Keys and values in 8 bits that were made of these blocks."""
    if eight_bit is None:
        return
    if kv_blocks is None:
        raise ValueError("eight_bit needs the kv_blocks that it was made of; found None")
    (batch, heads, _, head_dim), (blocks, size) = q.shape, kv_blocks.tokens.shape
    check_shape("eight_bit.k", eight_bit.k, (batch, heads, blocks, size, head_dim))
    check_shape("eight_bit.v", eight_bit.v, (batch, heads, blocks, head_dim, size))
    check_devices(q, eight_bit)


def check_out(out: Tensor | None, q: Tensor, gradients: bool) -> None:
    """A tensor to write into, of q's shape and dtype; as in PyTorch, not with gradients."""
    if out is None:
        return
    check_shape("out", out, q.shape)
    if out.dtype != q.dtype:
        raise ValueError(f"out must be {q.dtype}, as q is; found {out.dtype}")
    check_devices(q, [out])
    if gradients:
        raise ValueError(
            "out was given, but gradients are required; leave out away or call under no_grad"
        )


def check_devices(like: Tensor, values: Iterable[object]) -> None:
    """All tensors, in whatever tuples they come, on one device."""
    for value in values:
        if isinstance(value, tuple):
            check_devices(like, value)
        elif isinstance(value, Tensor) and value.device != like.device:
            found = f"{tuple(value.shape)} on {value.device}"
            raise ValueError(f"all tensors must be on {like.device}, as q is; found {found}")


def check_state(name: str, feature_map: FeatureMap, state: LinearState, x: Tensor) -> None:
    """State of a linear branch that fits its map and x `(B, H, L, D)`."""
    batch, heads, _, head_dim = x.shape
    rank = feature_map.rank(head_dim)
    check_shape(f"{name}.kv_state", state.kv_state, (batch, heads, rank, head_dim))
    check_shape(f"{name}.normalizer", state.normalizer, (batch, heads, rank))


def check_map(feature_map: FeatureMap, x: Tensor) -> None:
    """A feature map that fits x `(B, H, L, D)`."""
    _, heads, tokens, head_dim = x.shape
    if feature_map.act not in ACTS:
        raise ValueError(f"act must be one of {', '.join(ACTS)}; found {feature_map.act!r}")
    rank = feature_map.rank(head_dim)
    if feature_map.proj is not None:
        check_shape("feature_map.proj", feature_map.proj, (heads, rank, head_dim))
    elif feature_map.rope_cos is not None:
        raise ValueError(
            "rope_cos and rope_sin undo RoPE before proj; without proj there is nothing to undo it "
            "for"
        )
    _check_rope("feature_map", feature_map, tokens, head_dim)
    _check_positions("feature_map", feature_map, heads, tokens, rank)


def check_rms_low_rank(branch: RmsLowRank, q: Tensor, k: Tensor) -> None:
    """Feature maps that fit q and k."""
    _check_silu_map("q_map", branch.q_map, q)
    _check_silu_map("k_map", branch.k_map, k)
    check_devices(q, branch)


def _check_silu_map(name: str, silu_map: SiluMap, x: Tensor) -> None:
    _, heads, tokens, head_dim = x.shape
    rank = silu_map.proj.shape[1] if silu_map.proj.ndim == 3 else 0
    check_shape(f"{name}.proj", silu_map.proj, (heads, rank, head_dim))
    _check_rope(name, silu_map, tokens, head_dim)
    _check_positions(name, silu_map, heads, tokens, rank)
    cos, sin = silu_map.feature_cos, silu_map.feature_sin
    _check_pair(f"{name}.feature_cos", cos, f"{name}.feature_sin", sin)
    if cos is not None and sin is not None:
        pairs = cos.shape[-1]
        if 2 * pairs > rank:
            raise ValueError(f"{name} rotates {pairs} pairs of features, but has {rank} features")
        check_shape(f"{name}.feature_cos", cos, (tokens, pairs))
        check_shape(f"{name}.feature_sin", sin, (tokens, pairs))


def _check_pair(name: str, x: Tensor | None, other_name: str, other: Tensor | None) -> None:
    if (x is None) != (other is None):
        there, missing = (name, other_name) if other is None else (other_name, name)
        raise ValueError(f"{there} needs {missing}; found it alone")


def _check_rope(name: str, feature_map: FeatureMap | SiluMap, tokens: int, head_dim: int) -> None:
    cos, sin = feature_map.rope_cos, feature_map.rope_sin
    _check_pair(f"{name}.rope_cos", cos, f"{name}.rope_sin", sin)
    if cos is not None and sin is not None:
        check_shape(f"{name}.rope_cos", cos, (tokens, head_dim // 2))
        check_shape(f"{name}.rope_sin", sin, (tokens, head_dim // 2))


def _check_positions(
    name: str, feature_map: FeatureMap | SiluMap, heads: int, tokens: int, rank: int
) -> None:
    pe, axis_ids = feature_map.pe, feature_map.axis_ids
    _check_pair(f"{name}.pe", pe, f"{name}.axis_ids", axis_ids)
    if pe is not None and axis_ids is not None:
        check_shape(f"{name}.pe", pe, (heads, pe.shape[1], rank))
        check_shape(f"{name}.axis_ids", axis_ids, (tokens, 3))


def check_background(background: Background, q: Tensor, q_blocks: TokenBlocks) -> None:
    """A background for q `(B, H, L, D)`."""
    gate, first, low_rank = background
    check_devices(q, background)
    batch, heads, tokens, head_dim = q.shape
    rank = head_dim if first.channel_ids is None else first.channel_ids.shape[2]
    per_head = (batch, heads)
    for name, x, shape in (
        ("gate.dropped_lse", gate.dropped_lse, (*per_head, q_blocks.num_blocks)),
        ("gate.slope", gate.slope, per_head),
        ("gate.bias", gate.bias, per_head),
        ("gate.logits", gate.logits, (*per_head, tokens)),
        ("first_order.v_mean", first.v_mean, (*per_head, head_dim)),
        ("first_order.channel_scale", first.channel_scale, (*per_head, rank)),
        ("first_order.cov", first.cov, (*per_head, rank, head_dim)),
    ):
        if x is not None:
            check_shape(name, x, shape)
    if low_rank is not None:
        check_map(low_rank.feature_map, q)
        check_state("low_rank.state", low_rank.feature_map, low_rank.state, q)
        check_shape("low_rank.scale", low_rank.scale, (heads,))
