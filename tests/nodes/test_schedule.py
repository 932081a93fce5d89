"""Windows and step counts on real samplers: sigma while sampling, one schedule for two experts."""

import pytest
import torch

import comfy_host
from support.host.sampling import (
    conditioning,
    k_sample,
    load_model,
    report,
    sample,
    sparse,
    two_experts,
)


def test_percent_is_read_when_sampling_and_not_when_patching():
    """A shift set behind the node moves the levels and the window alike."""
    model = load_model("tiny_wan21_t2v")
    for shift in (1.0, 8.0):
        patched = sparse(model, start_percent=0.5)
        (shifted,) = comfy_host.run_node("ModelSamplingSD3", model=patched, shift=shift)
        sample(shifted, steps=8)
        assert report(shifted).dense_calls == {"outside start/end percent": 8}
        assert report(shifted).sparse_calls == 8


def test_a_window_that_ends_before_it_starts_leaves_every_step_dense():
    patched = sparse(load_model("tiny_wan21_t2v"), start_percent=0.6, end_percent=0.3)
    sample(patched, steps=4)
    assert (
        report(patched).dense_calls == {"outside start/end percent": 8}
        and report(patched).sparse_calls == 0
    )


@pytest.mark.parametrize(
    "sampler, scheduler", [("euler", "simple"), ("uni_pc", "beta"), ("dpm_2", "normal")]
)
@pytest.mark.parametrize("split", [1, 3])
def test_first_and_last_steps_are_those_of_the_whole_schedule(split, sampler, scheduler):
    settings = dict(dense_first_steps=2, dense_last_steps=1)
    high, low = two_experts(
        split, high=settings, low=settings, sampler=sampler, scheduler=scheduler
    )
    calls = {"euler": 1, "uni_pc": 1, "dpm_2": 2}[sampler]  # dpm_2 calls the model twice a step
    first = [r.dense_calls.get("dense first steps", 0) for r in (high, low)]
    last = [r.dense_calls.get("dense last steps", 0) for r in (high, low)]
    assert first == [2 * calls * min(split, 2), 2 * calls * max(0, 2 - split)]
    assert last[0] == 0 and last[1] in (2, 2 * calls)  # its last step may need one call only


def test_the_first_expert_does_not_end_the_schedule():
    """Three last steps of six, split after four: one of them belongs to the first expert."""
    settings = dict(dense_last_steps=3)
    high, low = two_experts(4, high=settings, low=settings)
    assert high.dense_calls == {"dense last steps": 2} and low.dense_calls == {
        "dense last steps": 4
    }


def test_steps_of_levels_made_by_hand_are_estimated():
    module = comfy_host.module(".nodes.patching.full_schedule")
    sampling = load_model("tiny_wan21_t2v").get_model_object("model_sampling")
    assert module.steps_outside([0.6, 0.41, 0.2, 0.0], False, sampling) == (2, 0)
    assert module.steps_outside([1.0, 0.79, 0.6], True, sampling) == (0, 3)
    assert module.steps_outside([1.0, 0.5, 0.0], True, sampling) == (0, 0)


def test_a_run_that_starts_from_its_own_noise_starts_a_schedule():
    """denoise below 1 begins in the middle of the levels; its first step is still a first step."""
    patched = sparse(load_model("tiny_wan21_t2v"), dense_first_steps=1)
    k_sample(
        patched,
        conditioning(1),
        conditioning(2),
        torch.randn(1, 16, 5, 16, 16),
        steps=3,
        denoise=0.5,
    )
    assert report(patched).dense_calls == {"dense first steps": 2}
