"""Checks of arguments before anything is launched: a ValueError names the argument, what was found and expected."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .background import ACTS, FeatureMap, FirstOrder, Gate, LowRank, SiluMap
from .dispatch import BACKENDS


def check_backend(backend: str) -> None:
    """One of BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; found {backend!r}")


def whole_number(name: str, value: object, low: int, high: int | None = None) -> int:
    """A whole number in range, as an int; NaN, fractions and text are refused."""
    try:
        number = operator.index(value)
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
            raise ValueError(f"{name} must be (batch, heads, tokens, head width), none 0; found {tuple(x.shape)}")
        if not x.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point; found {x.dtype}")


def check_shape(name: str, x: Tensor, shape: Sequence[int]) -> None:
    """Exactly this shape."""
    if x.shape != torch.Size(shape):
        raise ValueError(f"{name} must have the shape {tuple(shape)}; found {tuple(x.shape)}")


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Queries, keys and values that belong together."""
    check_heads(q=q, k=k, v=v)
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q, k, v must agree in batch, heads and head width, and k and v in tokens; "
            f"found q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must have one dtype; found {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must be on one device; found {q.device}, {k.device}, {v.device}")


def check_table(name: str, blocks: Tensor, tokens: int) -> None:
    """An integer table of the right size; on a CPU, where looking is free, one that names every token once."""
    if blocks.ndim != 2 or blocks.dtype.is_floating_point:
        raise ValueError(f"{name} must be an integer table (blocks, slots); found {tuple(blocks.shape)} {blocks.dtype}")
    if blocks.numel() < tokens:
        raise ValueError(f"{name} has {blocks.numel()} slots, too few for {tokens} tokens")
    if blocks.device.type == "cpu" and not torch.compiler.is_compiling() and type(blocks) is Tensor:
        named = int((blocks >= 0).sum())
        if named != tokens or int(blocks.max()) != tokens - 1:
            raise ValueError(f"{name} names {named} tokens up to {int(blocks.max())}; expected {tokens}, each once")


def check_devices(like: Tensor, *values: object) -> None:
    """All tensors, in whatever tuples they come, on one device."""
    for value in values:
        if isinstance(value, tuple):
            check_devices(like, *value)
        elif isinstance(value, Tensor) and value.device != like.device:
            found = f"{tuple(value.shape)} on {value.device}"
            raise ValueError(f"all tensors must be on {like.device}, as q is; found {found}")


def check_linear(name: str, map: FeatureMap, state: Tensor, norm: Tensor, x: Tensor) -> None:
    """State and norm of a linear branch that fit its map and x `(B, H, L, D)`."""
    batch, heads, _, width = x.shape
    rank = width if map.a is None else map.a.shape[1]
    check_shape(f"{name}.state", state, (batch, heads, rank, width))
    check_shape(f"{name}.norm", norm, (batch, heads, rank))


def check_lists(indices: Tensor, counts: Tensor, rows: Sequence[int], blocks: int, values: bool) -> None:
    """Block lists of the right shape; with `values` also that every entry in use names a block, once, ascending."""
    if indices.shape[:-1] != torch.Size(rows) or counts.shape != torch.Size(rows):
        raise ValueError(
            f"indices and counts must have one row per head and query block, {tuple(rows)}; "
            f"found {tuple(indices.shape)} and {tuple(counts.shape)}"
        )
    for name, x in (("indices", indices), ("counts", counts)):
        if x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 or int64; found {x.dtype}")
    if not values or torch.compiler.is_compiling() or indices.device.type == "meta":
        return
    width = indices.shape[-1]
    if counts.numel() and not (0 <= int(counts.min()) and int(counts.max()) <= width):
        raise ValueError(f"counts must be from 0 to {width}; found {int(counts.min())} to {int(counts.max())}")
    used = torch.arange(width, device=indices.device) < counts[..., None]
    wrong = used & ((indices < 0) | (indices >= blocks))
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        raise ValueError(f"indices must be from 0 to {blocks - 1}; found {int(indices[tuple(at)])} at {tuple(at)}")
    falls = used[..., 1:] & (indices[..., 1:] <= indices[..., :-1])
    if falls.any():
        at = tuple(falls.nonzero()[0].tolist())
        row = indices[at[:-1]].tolist()
        raise ValueError(f"indices must ascend within a row, each block once; row {at[:-1]} has {row[:8]} ...")


def check_map(map: FeatureMap, x: Tensor) -> None:
    """A feature map that fits x `(B, H, L, D)`."""
    _, heads, tokens, width = x.shape
    if map.act not in ACTS:
        raise ValueError(f"act must be one of {', '.join(ACTS)}; found {map.act!r}")
    rank = width if map.a is None else map.a.shape[1]
    if map.a is not None:
        check_shape("map.a", map.a, (heads, rank, width))
    elif map.cos is not None:
        raise ValueError("cos and sin undo RoPE before the projection a; without a there is nothing to undo it for")
    if (map.cos is None) != (map.sin is None):
        raise ValueError("cos and sin go together")
    if map.cos is not None:
        check_shape("map.cos", map.cos, (tokens, width // 2))
        check_shape("map.sin", map.sin, (tokens, width // 2))
    _check_places(map, heads, tokens, rank)


def check_silu_map(name: str, map: SiluMap, x: Tensor) -> None:
    """A SiLU map that fits x `(B, H, L, D)`."""
    _, heads, tokens, width = x.shape
    rank = map.a.shape[1] if map.a.ndim == 3 else 0
    check_shape(f"{name}.a", map.a, (heads, rank, width))
    check_shape(f"{name}.cos", map.cos, (tokens, width // 2))
    check_shape(f"{name}.sin", map.sin, (tokens, width // 2))
    _check_places(map, heads, tokens, rank)
    if (map.turn_cos is None) != (map.turn_sin is None):
        raise ValueError("turn_cos and turn_sin go together")
    if map.turn_cos is not None:
        turns = map.turn_cos.shape[-1]
        if 2 * turns > rank:
            raise ValueError(f"{name} turns {turns} pairs of features, but has {rank} features only")
        check_shape(f"{name}.turn_cos", map.turn_cos, (tokens, turns))
        check_shape(f"{name}.turn_sin", map.turn_sin, (tokens, turns))


def _check_places(map: FeatureMap | SiluMap, heads: int, tokens: int, rank: int) -> None:
    if (map.pe is None) != (map.places is None):
        raise ValueError("pe and places go together")
    if map.pe is not None:
        check_shape("map.pe", map.pe, (heads, map.pe.shape[1], rank))
        check_shape("map.places", map.places, (tokens, 3))


def check_background(
    q: Tensor, q_blocks: Tensor, tail: Tensor, gate: Gate, first: FirstOrder, low_rank: LowRank | None
) -> None:
    """What mixing by mass takes, for q `(B, H, L, D)`."""
    check_devices(q, q_blocks, tail, gate, first, low_rank)
    batch, heads, tokens, width = q.shape
    channels = width if first.features is None else first.features.shape[2]
    for name, x, shape in (
        ("tail", tail, (batch, heads, q_blocks.shape[0])), ("gate.c", gate.c, (batch, heads)),
        ("gate.b", gate.b, (batch, heads)), ("gate.x", gate.x, (batch, heads, tokens)),
        ("first.v_mean", first.v_mean, (batch, heads, width)), ("first.beta", first.beta, (batch, heads, channels)),
        ("first.cov", first.cov, (batch, heads, channels, width)),
    ):
        if x is not None:
            check_shape(name, x, shape)
    if low_rank is not None:
        check_map(low_rank.map, q)
        check_linear("low_rank.linear", low_rank.map, low_rank.linear.state, low_rank.linear.norm, q)
        check_shape("low_rank.eta", low_rank.eta, (heads,))
