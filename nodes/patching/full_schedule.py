"""The full schedule around the slice of it that one sampler runs.

Two experts share one schedule: each sampler is handed only its own noise levels, and "the first 2
steps" must not be counted anew by the second. What is known: a sampler that adds noise starts a
schedule, and one whose levels end at 0 ends it. What lies beyond is found by looking for the slice
in the schedules that ComfyUI itself can make; for levels made by hand it is estimated from the
slice's own spacing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import comfy.samplers
import torch
from torch import Tensor

from ...attention import ResolvedPlan
from ...attention.plan import AUTO
from ...attention.schedule import StepSchedule

MAX_STEPS = 100
TOLERANCE = 1e-4  # of a level; samplers pass float32 slices of float32 schedules
BEGUN = 0.95  # share of noise: what starts with less has a composition already


def step_schedule(
    plan: ResolvedPlan, sigmas: Tensor, starts: bool, model_sampling: Any
) -> StepSchedule:
    """What a plan says about a sampler's noise levels. starts: it adds its own noise first."""
    levels = [float(sigma) for sigma in sigmas]
    adaspa = plan.method == "adaspa"
    outside = steps_outside(
        levels,
        starts,
        model_sampling,
        Asked(plan.dense_first_steps > 0 or adaspa, plan.dense_last_steps > 0 or adaspa),
    )
    start, end = sigma_window(plan.start_percent, plan.end_percent, model_sampling)
    first = plan.dense_first_steps
    if plan.asked.dense_first_steps == AUTO and begun_elsewhere(levels, model_sampling):
        first = 0
    return StepSchedule(tuple(levels), start, end, first, plan.dense_last_steps, *outside)


def begun_elsewhere(sigmas: list[float], model_sampling: Any) -> bool:
    """Whether what a run denoises was a video before: a second stage, or a low denoise."""
    if len(sigmas) < 2 or sigmas[0] < sigmas[-1]:
        return False
    first, highest = sigmas[0], float(model_sampling.sigma_max)
    # Of flow models a level is the share of noise; others add a multiple of it to the video.
    share = first / highest if highest <= 1.0 else first / math.sqrt(1.0 + first * first)
    return share < BEGUN


def sigma_window(start: float, end: float, model_sampling: Any) -> tuple[float, float]:
    """The highest and lowest noise level of a percent window; of an empty one, none fits.

    The ends of the schedule mean "no limit": samplers may start a little above the model's own
    maximum.
    """
    if start >= end:
        return -math.inf, math.inf
    return (
        math.inf if start <= 0.0 else float(model_sampling.percent_to_sigma(start)),
        -math.inf if end >= 1.0 else float(model_sampling.percent_to_sigma(end)),
    )


class Asked(NamedTuple):
    """Whether anyone wants to know the steps before and after."""

    before: bool = True
    after: bool = True


class Outside(NamedTuple):
    """Steps of the full schedule before and after a sampler's own."""

    before: int
    after: int


def steps_outside(
    sigmas: list[float],
    starts: bool,
    model_sampling: Any,
    asked: Asked = Asked(),  # noqa: B008
) -> Outside:
    """Steps of the full schedule around `sigmas` (one more level than steps); 0 if not asked for.

    Levels that rise, where a video is turned into noise, are a schedule of their own.
    """
    if len(sigmas) < 2 or sigmas[0] < sigmas[-1]:
        return Outside(0, 0)
    highest = float(model_sampling.sigma_max)
    begins = not asked.before or starts or sigmas[0] >= highest * (1 - TOLERANCE)
    ends = not asked.after or sigmas[-1] <= 0.0
    if begins and ends:
        return Outside(0, 0)
    for schedule in _known_schedules(model_sampling, len(sigmas) - 1):
        at = _find(sigmas, schedule)
        if at is not None:
            after = len(schedule) - at - len(sigmas)
            return Outside(0 if begins else at, 0 if ends else after)
    return _estimate(sigmas, begins, ends, highest)


def _known_schedules(model_sampling: Any, at_least: int) -> Iterator[list[float]]:
    for steps in range(max(1, at_least), MAX_STEPS + 1):
        for name in comfy.samplers.SCHEDULER_NAMES:
            try:
                levels = comfy.samplers.calculate_sigmas(model_sampling, name, steps)
            except Exception:
                # Other packs add schedulers, and not each fits each model or step count.
                continue
            levels = [float(sigma) for sigma in levels]
            yield levels
            if len(levels) > 2:  # some samplers run the schedule without its last level above 0
                yield levels[:-2] + levels[-1:]


def _find(part: list[float], whole: list[float]) -> int | None:
    for start in range(len(whole) - len(part) + 1):
        if all(abs(a - b) <= TOLERANCE * max(b, 1e-3) for a, b in zip(part, whole[start:])):
            return start
    return None


def _estimate(sigmas: list[float], begins: bool, ends: bool, sigma_max: float) -> Outside:
    step = (sigmas[0] - sigmas[-1]) / (len(sigmas) - 1)
    if step <= 0:
        return Outside(0 if begins else 1, 0 if ends else 1)
    before = 0 if begins else max(1, round((sigma_max - sigmas[0]) / step))
    after = 0 if ends else max(1, round(sigmas[-1] / step))
    return Outside(before, after)


def adds_noise(noise: Tensor) -> bool:
    """Whether a sampler starts from its own noise; one that continues another's gets zeros."""
    return bool(torch.count_nonzero(noise))
