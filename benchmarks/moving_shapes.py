"""Synthetic video for the tiny Wan: textured shapes that move over a panning ground, with captions.

A latent pixel holds four frames of one pixel, RGB, in 12 of its 16 channels; the rest are zero. So
a latent of Wan's shape can be made, and looked at, without a trained VAE: tools/tiny_models.py
writes a decoder with weights set by hand that unfolds the frames again.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS = 16  # of a Wan 2.1 latent
FOLD = 4  # frames of a latent frame
SHAPES = ("discs", "squares", "rings")
COLOURS = {
    "red": (1.7, -1.2, -1.2),
    "green": (-1.2, 1.5, -1.2),
    "blue": (-1.2, -0.9, 1.8),
    "yellow": (1.6, 1.4, -1.3),
}
GROUNDS = {"white": (1.3, 1.3, 1.2), "black": (-1.4, -1.4, -1.3), "brown": (0.1, -0.4, -0.9)}
CAPTIONS = tuple(
    f"{colour} {shape} on {ground}" for colour in COLOURS for shape in SHAPES for ground in GROUNDS
)
PERIOD = 64  # pixels after which a texture repeats


def latents(captions: list[str], grid: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """One latent for each caption: -> (B, 16, T, H, W), about unit variance. grid: (T, H, W)."""
    return torch.stack([fold(video(caption, grid, generator)) for caption in captions])


def video(caption: str, grid: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """A clip of 4 T frames: -> (4 T, 3, H, W). The pace is per latent frame, whatever the fold."""
    frames, height, width = grid
    time = torch.arange(FOLD * frames) / FOLD
    colour, shape, _, ground = caption.split()
    draw = _Draw(generator, time, height, width)
    pan = 0.7 * draw.normal(2) * (draw.uniform(1) < 0.7)
    moved = pan * time[:, None] + PERIOD * draw.uniform(2)
    picture = draw.texture(torch.tensor(GROUNDS[ground]), moved, contrast=0.25)
    for _ in range(1 + int(2 * draw.uniform(1))):
        radius = 4.5 + 2.5 * float(draw.uniform(1))
        centre = draw.path(radius)
        cover = draw.cover(shape, radius, centre)
        tint = torch.tensor(COLOURS[colour]) + 0.1 * draw.normal(3)
        picture = picture * (1 - cover) + cover * draw.texture(tint, centre, contrast=0.2)
    return picture


def plain_clips(
    captions: list[str], grid: tuple[int, int, int], generator: torch.Generator
) -> Tensor:
    """Clips of frames, not of latents: -> (B, 3, T, H, W), about unit variance.

    Strong textures of any colour and two to four shapes of any kind: no caption tells anything.
    """
    return torch.stack([plain_video(grid, generator) for _ in captions])


def plain_video(grid: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """One of `plain_clips`: -> (3, T, H, W)."""
    frames, height, width = grid
    draw = _Draw(generator, torch.arange(frames), height, width)
    pan = 0.7 * draw.normal(2) * (draw.uniform(1) < 0.7)
    moved = pan * draw.time[:, None] + PERIOD * draw.uniform(2)
    picture = draw.texture(0.8 * draw.normal(3), moved, contrast=0.65)
    for _ in range(2 + int(3 * draw.uniform(1))):
        radius = 2.5 + 3.5 * float(draw.uniform(1))
        centre = draw.path(radius)
        cover = draw.cover(SHAPES[int(len(SHAPES) * draw.uniform(1))], radius, centre)
        texture = draw.texture(0.8 * draw.normal(3), centre, contrast=0.65)
        picture = picture * (1 - cover) + cover * texture
    return picture.transpose(0, 1)


def fold(frames: Tensor) -> Tensor:
    """(4 T, 3, H, W) -> (16, T, H, W)."""
    time, _, height, width = frames.shape
    folded = frames.view(time // FOLD, FOLD * 3, height, width).transpose(0, 1)
    return F.pad(folded, (0, 0, 0, 0, 0, 0, 0, CHANNELS - FOLD * 3))


def unfold(latent: Tensor) -> Tensor:
    """(..., 16, T, H, W) -> the pictures (..., 4 T, 3, H, W)."""
    kept = latent[..., : FOLD * 3, :, :, :].movedim(-4, -3)
    return kept.reshape(*kept.shape[:-4], -1, 3, *kept.shape[-2:])


class _Draw:
    """The random choices of one clip, and what is drawn with them. time: (F,), in latent frames."""

    def __init__(self, generator: torch.Generator, time: Tensor, height: int, width: int) -> None:
        self.generator, self.time, self.height, self.width = generator, time, height, width
        self.y = torch.arange(height).float()[:, None]
        self.x = torch.arange(width).float()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def path(self, radius: float) -> Tensor:
        """A straight way that bounces off the walls: -> (F, 2), the centre's y and x."""
        room = torch.tensor([self.height - 1.0, self.width - 1.0]) - 2 * radius
        way = (self.uniform(2) * room + 1.6 * self.normal(2) * self.time[:, None]) % (2 * room)
        return radius + torch.where(way > room, 2 * room - way, way)

    def cover(self, shape: str, radius: float, centre: Tensor) -> Tensor:
        """How much of each pixel a shape covers: -> (F, 1, H, W), 0 to 1."""
        dy = (self.y - centre[:, 0, None, None]).abs()
        dx = (self.x - centre[:, 1, None, None]).abs()
        disc = (dy.square() + dx.square()).sqrt()
        outside = {
            "discs": disc - radius,
            "squares": torch.maximum(dy, dx) - 0.85 * radius,
            "rings": (disc - 0.75 * radius).abs() - 0.3 * radius,
        }[shape]
        return torch.sigmoid(-3 * outside)[:, None]

    def texture(self, tint: Tensor, moved: Tensor, contrast: float) -> Tensor:
        """Smooth noise and a wave, carried along. moved: (F, 2) pixels: -> (F, 3, H, W)."""
        grain = self.normal(1, 3, PERIOD, PERIOD)
        for _ in range(2):
            grain = 2.0 * F.avg_pool2d(F.pad(grain, (1, 1, 1, 1), mode="circular"), 3, 1)
        grain = F.pad(grain, (0, 1, 0, 1), mode="circular")
        y = (self.y - moved[:, 0, None, None]).expand(-1, -1, self.width)
        x = (self.x - moved[:, 1, None, None]).expand(-1, self.height, -1)
        where = torch.stack((x % PERIOD, y % PERIOD), -1) / PERIOD * 2 - 1
        noise = F.grid_sample(grain.expand(len(moved), -1, -1, -1), where, align_corners=True)
        pace, phase = 0.35 * self.normal(2, 3, 1, 1), 2 * math.pi * self.uniform(3, 1, 1)
        wave = torch.sin(pace[0] * y[:, None] + pace[1] * x[:, None] + phase)
        return tint[:, None, None] + contrast * (noise + wave)
