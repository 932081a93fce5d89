"""How many steps of the whole schedule lie before and behind the slice that one sampler runs.

Two experts share one schedule: each sampler is handed only its own noise levels, and "the first 2 steps" must not be
counted anew by the second. What is known: a sampler that adds noise starts a schedule, and one whose levels end at 0
ends it. What lies beyond is found by looking for the slice in the schedules that ComfyUI itself can make; for levels
made by hand it is estimated from the slice's own spacing.
"""

from __future__ import annotations

from collections.abc import Iterator

import comfy.samplers
import torch

MAX_STEPS = 100
TOLERANCE = 1e-4                            # of a level; samplers pass float32 slices of float32 schedules


def steps_outside(
    sigmas: list[float], adds_noise: bool, model_sampling: object, ask_before: bool = True, ask_after: bool = True
) -> tuple[int, int]:
    """Steps of the whole schedule before and after `sigmas` (one more level than steps); 0 for what is not asked.

    Levels that rise, where a video is turned into noise, are a schedule of their own.
    """
    if len(sigmas) < 2 or sigmas[0] < sigmas[-1]:
        return 0, 0
    begins = not ask_before or adds_noise or sigmas[0] >= float(model_sampling.sigma_max) * (1 - TOLERANCE)
    ends = not ask_after or sigmas[-1] <= 0.0
    if begins and ends:
        return 0, 0
    for schedule in _known_schedules(model_sampling, len(sigmas) - 1):
        at = _find(sigmas, schedule)
        if at is not None:
            before, after = at, len(schedule) - at - len(sigmas)
            return (0 if begins else before), (0 if ends else after)
    return _estimate(sigmas, begins, ends, float(model_sampling.sigma_max))


def _known_schedules(model_sampling: object, at_least: int) -> Iterator[list[float]]:
    for steps in range(max(1, at_least), MAX_STEPS + 1):
        for name in comfy.samplers.SCHEDULER_NAMES:
            try:
                levels = [float(s) for s in comfy.samplers.calculate_sigmas(model_sampling, name, steps)]
            except Exception:               # other packs add schedulers, and not each fits each model or step count
                continue
            yield levels
            if len(levels) > 2:             # some samplers run the schedule without its last level above 0
                yield levels[:-2] + levels[-1:]


def _find(part: list[float], whole: list[float]) -> int | None:
    for start in range(len(whole) - len(part) + 1):
        if all(abs(a - b) <= TOLERANCE * max(b, 1e-3) for a, b in zip(part, whole[start:])):
            return start
    return None


def _estimate(sigmas: list[float], begins: bool, ends: bool, sigma_max: float) -> tuple[int, int]:
    step = (sigmas[0] - sigmas[-1]) / (len(sigmas) - 1)
    if step <= 0:
        return (0 if begins else 1), (0 if ends else 1)
    before = 0 if begins else max(1, round((sigma_max - sigmas[0]) / step))
    after = 0 if ends else max(1, round(sigmas[-1] / step))
    return before, after


def adds_noise(noise: torch.Tensor) -> bool:
    """Whether a sampler starts from noise of its own; one that goes on with another's latent is handed zeros."""
    return bool(torch.count_nonzero(noise))
