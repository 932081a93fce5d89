"""Where the model's own RoPE puts every token of the video: read off its rotation, never made up."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Positions(NamedTuple):
    """The rotation of every token: pairs (2 i, 2 i + 1) of a head's channels turn by angle i. `(L, D / 2)` float32."""

    cos: Tensor
    sin: Tensor


def rope_axes(width: int) -> tuple[int, int, int]:
    """RoPE pairs of a head that Wan gives to time, rows and columns: 22, 21, 21 at width 128."""
    side = width // 6
    return (width // 2 - 2 * side, side, side)


def axis_positions(positions: Positions, grid: tuple[int, int, int]) -> list[tuple[Tensor, Tensor]]:
    """cos and sin `(n, D / 2)` of every place on each axis, the other two coordinates at 0."""
    frames, rows, columns = grid
    steps = (rows * columns, columns, 1)
    return [
        tuple(table[: step * (count - 1) + 1 : step] for table in positions) for count, step in zip(grid, steps)
    ]


def places(grid: tuple[int, int, int], device: torch.device | str = "cpu") -> Tensor:
    """Rows of stacked axis tables that belong to each token: -> `(T*H*W, 3)` int32, in raster order."""
    starts = (0, grid[0], grid[0] + grid[1])
    ranges = (torch.arange(start, start + count) for start, count in zip(starts, grid))
    return torch.stack(torch.meshgrid(*ranges, indexing="ij"), dim=-1).view(-1, 3).int().to(device)


def fourier_tables(weight: Tensor, positions: Positions, grid: tuple[int, int, int]) -> Tensor:
    """E(p) = W [cos a(p), sin a(p)] as axis tables: weight `(H, r, D)` -> `(H, T + rows + columns, r)` float32.

    Every angle belongs to one axis, so that E is the sum of one row of each axis.
    """
    half = weight.shape[-1] // 2
    by_cos, by_sin = weight.float().split(half, dim=-1)
    tables, start = [], 0
    for pairs, (cos, sin) in zip(rope_axes(2 * half), axis_positions(positions, grid)):
        own = slice(start, start + pairs)
        tables.append(cos[:, own] @ by_cos[..., own].mT + sin[:, own] @ by_sin[..., own].mT)
        start += pairs
    return torch.cat(tables, dim=1)


def resampled_tables(tables: Tensor, old: tuple[int, int, int], new: tuple[int, int, int]) -> Tensor:
    """Free axis tables `(H, sum(old), r)` on another grid, linearly between the old places: -> `(H, sum(new), r)`."""
    parts = []
    for part, count in zip(tables.float().split(list(old), dim=1), new):
        mode = dict(mode="linear", align_corners=True)
        parts.append(torch.nn.functional.interpolate(part.mT.contiguous(), size=count, **mode).mT)
    return torch.cat(parts, dim=1)


def rounded_angles(positions: Positions, grid: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """The angles `(L, D / 2)` float32 rounded to dtype, as weights trained in half precision saw them.

    A rotation tells an angle up to whole turns only, and rounding needs the turns: they are counted along each axis
    from the slowest pair, which never makes one, up to the fastest. Source: RoLA's released code rounds so.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return torch.atan2(positions.sin, positions.cos)                      # whole turns change nothing here
    half = positions.cos.shape[1]
    parts, start = [], 0
    for pairs, (cos, sin) in zip(rope_axes(2 * half), axis_positions(positions, grid)):
        own = slice(start, start + pairs)
        turned = torch.atan2(sin[:, own].double(), cos[:, own].double())
        angles = torch.empty_like(turned)
        known = turned[:, -1]
        angles[:, -1] = known
        for i in range(pairs - 2, -1, -1):  # pair i turns 10000^(1 / pairs) times as fast as pair i + 1
            guess = known * 10000.0 ** (1 / pairs)
            known = turned[:, i] + 2 * math.pi * ((guess - turned[:, i]) / (2 * math.pi)).round()
            angles[:, i] = known
        parts.append(angles)
        start += pairs
    by_place = places(grid, positions.cos.device).long()
    offsets = (0, grid[0], grid[0] + grid[1])
    columns = [part[by_place[:, axis] - offsets[axis]] for axis, part in enumerate(parts)]
    return torch.cat(columns, dim=1).to(dtype).float()
