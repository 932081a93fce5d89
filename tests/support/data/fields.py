"""Synthetic attention inputs with a video's structure: smooth fields over a grid under 3-D RoPE."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def smooth_qkv(
    grid: tuple[int, int, int],
    heads: int = 2,
    width: int = 64,
    sharpness: float = 1.0,
    noise: float = 0.3,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k after RoPE, and v: each `(1, heads, T*H*W, width)` float32.

    Every head's q, k, v is a sum of a few plane waves over the grid plus noise; q and k share a
    mean direction, as trained heads do.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.stack([_waves(grid, width, generator) for _ in range(heads)])[None]
        + noise * torch.randn(1, heads, math.prod(grid), width, generator=generator)
        for _ in range(3)
    )
    shared = torch.randn(1, heads, 1, width, generator=generator)
    angles = rope_angles(grid, width)
    return rotate(sharpness * (q + shared), angles), rotate(sharpness * (k + shared), angles), v


def rope_angles(grid: tuple[int, int, int], width: int) -> Tensor:
    """Wan's angles `(L, width / 2)`: channels split over time, rows and columns, theta 10000."""
    axes = (width - 4 * (width // 6), 2 * (width // 6), 2 * (width // 6))
    places = torch.stack(
        torch.meshgrid(*(torch.arange(float(n)) for n in grid), indexing="ij"), -1
    ).view(-1, 3)
    return torch.cat(
        [
            places[:, i : i + 1] * 10000.0 ** (-torch.arange(0, n, 2) / n)
            for i, n in enumerate(axes)
        ],
        dim=-1,
    )


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE on interleaved pairs."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _waves(
    grid: tuple[int, int, int], width: int, generator: torch.Generator, count: int = 6
) -> Tensor:
    field = torch.zeros(*grid, width)
    t, h, w = torch.meshgrid(*(torch.linspace(0, 1, n) for n in grid), indexing="ij")
    for _ in range(count):
        ft, fh, fw = (6 * math.pi * torch.rand(3, generator=generator)).tolist()
        phase = 2 * math.pi * torch.rand(width, generator=generator)
        size = torch.randn(width, generator=generator) / count**0.5
        field += size * torch.cos((ft * t + fh * h + fw * w)[..., None] + phase)
    return field.view(-1, width)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
