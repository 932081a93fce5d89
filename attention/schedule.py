"""Which steps of a sampling run are sparse: percent window, dense first and last steps."""

from __future__ import annotations

from dataclasses import dataclass

OUTSIDE_WINDOW = "outside start/end percent"
FIRST_STEPS = "dense first steps"
LAST_STEPS = "dense last steps"


@dataclass(frozen=True)
class StepSchedule:
    """The noise levels of one sampling run, and what the plan says about them.

    sigmas: this sampler's levels, one more than steps; they rise where a video is turned into
    noise. before, after: steps of the whole schedule that other samplers run (two experts share one
    schedule). sigma_start, sigma_end: the percent window as noise levels.
    """

    sigmas: tuple[float, ...]
    sigma_start: float
    sigma_end: float
    dense_first: int = 0
    dense_last: int = 0
    before: int = 0
    after: int = 0

    @property
    def steps(self) -> int:
        """Steps of this sampler."""
        return max(0, len(self.sigmas) - 1)

    @property
    def full_steps(self) -> int:
        """Steps of the whole schedule, all samplers together."""
        return self.before + self.steps + self.after

    def step(self, sigma: float) -> int:
        """The step, counted within this sampler, that a model call at `sigma` belongs to.

        Samplers of higher order also call the model between two levels; such a call belongs to the
        step it is in.
        """
        if self.sigmas[:1] < self.sigmas[-1:]:
            reached = sum(level <= sigma * (1 + 1e-5) for level in self.sigmas)
        else:
            reached = sum(level >= sigma * (1 - 1e-5) for level in self.sigmas)
        return min(max(reached - 1, 0), max(self.steps - 1, 0))

    def dense_reason(self, sigma: float) -> str | None:
        """Why a model call at `sigma` stays dense; None where it may be sparse."""
        if sigma > self.sigma_start * (1 + 1e-5) or sigma < self.sigma_end * (1 - 1e-5):
            return OUTSIDE_WINDOW
        done = self.before + self.step(sigma)
        if done < self.dense_first:
            return FIRST_STEPS
        if self.full_steps - done <= self.dense_last:
            return LAST_STEPS
        return None
