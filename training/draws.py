"""What is trained on: which latent, how much noise, which noise; the same whoever asks, and when.

Every draw follows from the seed and its number alone. So a training that goes on draws what one
that never stopped would have, and so do many processes that share the examples of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

HELD_OUT_SHARE = 6  # one latent in so many is not trained on
HELD_OUT_EXAMPLES = 8  # that an error is the mean of

DENSE = 1 / 3  # share of the examples that hold the dense model where it was
FRESH = 0.5  # share of the examples with other noise than that of the teacher's sampler


class Example(NamedTuple):
    """One draw. number: of all draws, from 1; held-out ones count down from -1."""

    number: int
    latent: int
    level: float  # of noise
    seed: int  # of the noise
    fresh: bool = False  # noise that the teacher's sampler did not go through
    dense: bool = False  # of the LoRA without sparse attention, which it is to leave as it was


@dataclass(frozen=True)
class Material:
    """latents: how many there are. levels: noise levels of the use, falling, without a last 0.

    weights: of each level, how often it is drawn; empty: all as often.
    """

    latents: int
    levels: Sequence[float]
    seed: int = 0
    weights: Sequence[float] = ()

    @property
    def trained_on(self) -> int:
        """The first latents; the others are held out. All, where there is but one."""
        return max(1, self.latents - -(-self.latents // HELD_OUT_SHARE))

    def example(self, number: int) -> Example:
        """A draw for training; number from 1."""
        draw = _Draw(self.seed, number)
        latent, level = draw(self.trained_on), self.level(draw() / 2**31)
        fresh, seed = draw(100) < 100 * FRESH, draw()
        return Example(number, latent, level, seed, fresh, draw(100) < 100 * DENSE)

    def level(self, share: float, between: bool = False) -> float:
        """The level up to which weights add up to a share of them all.

        between: the middle of it and the next lower one.
        """
        weights = self.weights or [1.0] * len(self.levels)
        left = share * sum(weights)
        for level, after, weight in zip(self.levels, self.levels[1:], weights):
            left -= weight
            if left < 0:
                return (level + after) / 2 if between else level
        last = self.levels[-1]
        return (self.levels[-2] + last) / 2 if between and len(self.levels) > 1 else last


class _Draw:
    """Whole numbers that follow from two others."""

    def __init__(self, seed: int, number: int) -> None:
        # One multiplication apart, neighbouring numbers give unlike streams.
        mixed = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9) % 2**63
        self._generator = torch.Generator().manual_seed(mixed)

    def __call__(self, below: int = 2**31) -> int:
        return int(torch.randint(below, (1,), generator=self._generator))


def held_out(material: Material) -> list[Example]:
    """Examples to judge by: latents that are not trained on, levels between those that are."""
    count = min(HELD_OUT_EXAMPLES, max(len(material.levels), material.latents))
    kept = range(min(material.trained_on, material.latents - 1), material.latents)
    return [
        Example(
            -1 - index,
            kept[index % len(kept)],
            material.level((2 * index + 1) / (2 * count), between=True),
            _Draw(material.seed, -1 - index)(),
        )
        for index in range(count)
    ]
