"""Which steps are sparse: by noise level, never by counting calls."""

import math

import pytest

from pack_loader import load

schedule = load(".attention.schedule")
SIGMAS = (1.0, 0.9, 0.7, 0.4, 0.0)


def make(**settings):
    return schedule.StepSchedule(
        **({"sigmas": SIGMAS, "sigma_start": math.inf, "sigma_end": -math.inf} | settings)
    )


@pytest.mark.parametrize(
    "sigma, step",
    [
        (1.2, 0),
        (1.0, 0),
        (0.95, 0),
        (0.9, 1),
        (0.9000001, 1),
        (0.8999999, 1),
        (0.7, 2),
        (0.5, 2),
        (0.4, 3),
        (0.1, 3),
        (0.0, 3),
    ],
)
def test_a_level_between_two_steps_belongs_to_the_step_it_is_in(sigma, step):
    assert make().step(sigma) == step


@pytest.mark.parametrize(
    "sigma, reason",
    [(1.0, schedule.OUTSIDE_WINDOW), (0.9, None), (0.4, None), (0.39, schedule.OUTSIDE_WINDOW)],
)
def test_the_percent_window_is_inclusive(sigma, reason):
    assert make(sigma_start=0.9, sigma_end=0.4).dense_reason(sigma) == reason


def test_rising_levels_are_counted_from_their_own_start():
    """A video turned into noise: the levels rise, and the first step is the one at the lowest."""
    steps = make(sigmas=(0.0, 0.4, 0.7, 1.0), dense_first=1)
    assert [steps.step(sigma) for sigma in (0.0, 0.2, 0.4, 0.7, 1.0)] == [0, 0, 1, 2, 2]
    assert [steps.dense_reason(sigma) for sigma in (0.0, 0.4, 0.7)] == [
        schedule.FIRST_STEPS,
        None,
        None,
    ]


def test_first_and_last_steps_are_dense():
    steps = make(dense_first=1, dense_last=2)
    assert [steps.dense_reason(sigma) for sigma in SIGMAS[:-1]] == [
        schedule.FIRST_STEPS,
        None,
        schedule.LAST_STEPS,
        schedule.LAST_STEPS,
    ]


def test_steps_of_other_samplers_count():
    """The second expert of a shared schedule does not restart it, and the first does not end it."""
    assert make(dense_first=2, before=2).dense_reason(1.0) is None
    assert make(dense_first=3, before=2).dense_reason(1.0) == schedule.FIRST_STEPS
    assert make(dense_last=2, after=2).dense_reason(0.4) is None
    assert make(dense_last=3, after=2).dense_reason(0.4) == schedule.LAST_STEPS


def test_few_step_runs_keep_their_gain():
    """With one dense first step, the node's default, three of four steps run sparse."""
    steps = make(dense_first=1)
    assert sum(steps.dense_reason(sigma) is None for sigma in SIGMAS[:-1]) == 3
