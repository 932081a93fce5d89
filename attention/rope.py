"""Where the model's own RoPE puts every token of the video, read off the rotation it returns."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int, int]


class RopeTable(NamedTuple):
    """The rotation of every token: channel pair (2 i, 2 i + 1) turns by angle i.

    cos, sin: `(L, D / 2)` float32.
    """

    cos: Tensor
    sin: Tensor


def rope_axes(head_dim: int) -> Grid:
    """RoPE pairs of a head that Wan gives to time, height and width: 22, 21, 21 at head_dim 128."""
    side = head_dim // 6
    return (head_dim // 2 - 2 * side, side, side)


def axis_tables(rope: RopeTable, grid: Grid) -> list[RopeTable]:
    """cos and sin `(n, D / 2)` of every position on each axis, the other two coordinates at 0."""
    _, height, width = grid
    steps = (height * width, width, 1)
    return [
        RopeTable(*(table[: step * (count - 1) + 1 : step] for table in rope))
        for count, step in zip(grid, steps)
    ]


def axis_ids(grid: Grid, device: torch.device | str = "cpu") -> Tensor:
    """The row of the stacked axis tables each token reads: -> `(T*H*W, 3)` int32, raster order."""
    starts = (0, grid[0], grid[0] + grid[1])
    ranges = (torch.arange(start, start + count) for start, count in zip(starts, grid))
    return torch.stack(torch.meshgrid(*ranges, indexing="ij"), dim=-1).view(-1, 3).int().to(device)


def fourier_tables(weight: Tensor, rope: RopeTable, grid: Grid) -> Tensor:
    """pe(p) = W [cos a(p), sin a(p)] as axis tables: weight `(H, r, D)` -> `(H, T + H + W, r)`.

    Every angle belongs to one axis, so that pe is the sum of one row of each axis. Float32.
    """
    half = weight.shape[-1] // 2
    by_cos, by_sin = weight.float().split(half, dim=-1)
    tables, start = [], 0
    for pairs, (cos, sin) in zip(rope_axes(2 * half), axis_tables(rope, grid)):
        own = slice(start, start + pairs)
        tables.append(cos[:, own] @ by_cos[..., own].mT + sin[:, own] @ by_sin[..., own].mT)
        start += pairs
    return torch.cat(tables, dim=1)


def resampled_tables(tables: Tensor, old: Grid, new: Grid) -> Tensor:
    """Free axis tables `(H, sum(old), r)` on another grid, linearly: -> `(H, sum(new), r)`."""
    resampled = []
    for axis, count in zip(tables.float().split(list(old), dim=1), new):
        resampled.append(
            torch.nn.functional.interpolate(
                axis.mT.contiguous(), size=count, mode="linear", align_corners=True
            ).mT
        )
    return torch.cat(resampled, dim=1)


def rounded_angles(rope: RopeTable, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The angles `(L, D / 2)` float32, rounded to dtype as half-precision training saw them.

    A rotation tells an angle up to whole turns only, and rounding needs the turns: they are counted
    along each axis from the slowest pair, which never makes one, up to the fastest. Source: RoLA's
    released code rounds so.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return torch.atan2(rope.sin, rope.cos)  # whole turns change nothing here
    half = rope.cos.shape[1]
    by_axis, start = [], 0
    for pairs, (cos, sin) in zip(rope_axes(2 * half), axis_tables(rope, grid)):
        own = slice(start, start + pairs)
        by_axis.append(_unwrapped(torch.atan2(sin[:, own].double(), cos[:, own].double())))
        start += pairs
    rows = axis_ids(grid, rope.cos.device).long()
    offsets = (0, grid[0], grid[0] + grid[1])
    columns = [angles[rows[:, axis] - offsets[axis]] for axis, angles in enumerate(by_axis)]
    return torch.cat(columns, dim=1).to(dtype).float()


def _unwrapped(wrapped: Tensor) -> Tensor:
    """Unwrapped angles `(n, pairs)` of one axis, from the slowest pair to the fastest."""
    angles, pairs = torch.empty_like(wrapped), wrapped.shape[1]
    known = wrapped[:, -1]
    angles[:, -1] = known
    for i in range(pairs - 2, -1, -1):
        guess = known * 10000.0 ** (1 / pairs)  # pair i turns so many times as fast as pair i + 1
        turns = ((guess - wrapped[:, i]) / (2 * math.pi)).round()
        known = wrapped[:, i] + 2 * math.pi * turns
        angles[:, i] = known
    return angles
