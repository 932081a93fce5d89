"""The loop that trains a LoRA, on a problem of milliseconds: ends, saves, kills, many processes."""

import math
import os
import random
import signal
import time

import pytest
import torch

from pack_loader import load
from support import processes, small_problem
from support.small_problem import FACTS, MATERIAL, Problem, Stop, Watch, make, settings

training = load(".training")


@pytest.fixture(scope="module")
def uninterrupted():
    run = make()
    return run.run(), run.state


def same(a, b, tolerance=0.0):
    return a.keys() == b.keys() and all(
        torch.allclose(a[name], b[name], rtol=0, atol=tolerance) for name in a
    )


def test_it_learns_and_keeps_the_best(uninterrupted):
    outcome, state = uninterrupted
    assert outcome.ended is training.Ended.STEPS and state.step == len(state.losses) == 24
    assert [step for step, _ in state.errors] == [0, 6, 12, 18, 24]
    assert state.errors[0][1] == 1.0 and outcome.error < 0.8
    assert outcome.error == min(error for _, error in state.errors)


def test_held_out_examples_are_of_latents_and_levels_that_are_not_trained_on():
    drawn = [MATERIAL.example(number) for number in range(1, 400)]
    judged = training.held_out(MATERIAL)
    assert {each.latent for each in drawn} == set(range(7))
    assert {each.latent for each in judged} == {7, 8}
    assert {each.level for each in drawn} == set(MATERIAL.levels)
    assert not {each.level for each in judged} & set(MATERIAL.levels)
    assert len({each.seed for each in drawn + judged}) == len(drawn) + len(judged)
    alone = training.Material(1, (0.9,))
    assert {each.latent for each in training.held_out(alone)} == {0} == {alone.example(1).latent}


def test_examples_of_every_kind_are_drawn():
    """Half with noise of their own, a third to hold the dense model; held-out ones are neither."""
    drawn = [MATERIAL.example(number) for number in range(1, 2001)]
    assert sum(each.fresh for each in drawn) / 2000 == pytest.approx(0.5, abs=0.04)
    assert sum(each.dense for each in drawn) / 2000 == pytest.approx(1 / 3, abs=0.04)
    assert not any(each.fresh or each.dense for each in training.held_out(MATERIAL))


def test_levels_are_drawn_by_their_weights():
    material = training.Material(9, (1.0, 0.8, 0.5, 0.2), weights=(4.0, 3.0, 2.0, 1.0))
    drawn = [material.example(number).level for number in range(1, 2001)]
    shares = [drawn.count(level) / 2000 for level in material.levels]
    assert shares == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.04)
    judged = [each.level for each in training.held_out(material)]
    assert set(judged) == {0.9, 0.65, 0.35} and judged.count(0.9) >= 3


def test_draws_do_not_depend_on_who_asked_before():
    torch.manual_seed(5)
    late = [MATERIAL.example(number) for number in (9, 3)]
    torch.manual_seed(6)
    assert [MATERIAL.example(number) for number in (3, 9)] == late[::-1]
    assert training.Material(9, MATERIAL.levels, seed=4).example(3) != late[1]


def test_stopped_at_any_moment_it_goes_on_to_the_same_lora(uninterrupted, tmp_path):
    """Before every one of its examples, those of held-out errors among them."""
    expected, whole = uninterrupted
    for ticks in range(1, 200, 4):
        path = tmp_path / f"{ticks}.state"
        try:
            make(watch=Watch(path, ticks)).run()
        except Stop:
            pass
        else:
            break
        problem, state = Problem(), training.read_state(path)
        done = 0 if state is None else state.step
        run = make(problem, Watch(path), state)
        outcome = run.run()
        assert same(outcome.parameters, expected.parameters), ticks
        assert run.state.losses == whole.losses and run.state.errors == whole.errors
        assert len(problem.seen) == 48 - 2 * done
    assert ticks > 60


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_killed_at_any_of_20_moments_it_goes_on_to_the_same_lora(tmp_path, uninterrupted):
    """Without a chance to save; a file is whole or not there."""
    expected, _ = uninterrupted
    path, moments = tmp_path / "killed.state", random.Random(0)
    kills, found = 0, set()
    while kills < 20:
        if kills % 5 == 0:
            path.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:  # whatever happens, never back into pytest
            try:
                torch.set_num_threads(1)
                run = make(Problem(0.002), Watch(path), training.read_state(path), save_every=1)
                run.run()
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        state = training.read_state(path)
        assert path.exists() == (state is not None)
        found.add(0 if state is None else state.step)
        outcome = make(state=state).run()
        assert same(outcome.parameters, expected.parameters)
    assert len(found) > 4


def test_an_interrupted_save_leaves_the_state_before(tmp_path, monkeypatch):
    path = tmp_path / "a.state"
    run = make()
    run.run()
    training.write_state(run.state, path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"a\.state could not be written"):
        training.write_state(run.state, path)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["a.state"]


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_broken_state_is_none(content, tmp_path):
    path = tmp_path / "a.state"
    path.write_bytes(content)
    assert training.read_state(path) is None
    assert training.read_state(tmp_path / "none.state") is None
    assert training.read_state(tmp_path) is None


def test_a_state_says_what_is_different_now():
    state = training.State({"rank": 8, "seed": 0})
    assert not state.differences({"rank": 8, "seed": 0})
    assert state.differences({"rank": 16, "seed": 0}) == ["rank was 8, now 16"]


def test_more_steps_go_on_from_what_is_there():
    first = make(steps=12)
    error = first.run().error
    more = make(state=first.state)
    assert more.run().error < error and more.state.step == 24


def test_it_stops_where_held_out_errors_rise():
    """What is returned is the best, not the last."""

    class Worse(Problem):
        def loss(self, example):  # held-out examples count down
            found = super().loss(example)
            return found if example.number > 0 else found.detach() + 100 * self.up.abs().sum()

    problem = Worse()
    run = make(problem, steps=100, patience=2, evaluate_every=5)
    outcome = run.run()
    assert outcome.ended is training.Ended.RISES and run.state.step == 10
    assert outcome.step == 0 and outcome.error == 1.0 and not outcome.parameters["up"].any()
    assert problem.up.any()
    again = make(Worse(), state=run.state, steps=100, patience=2, evaluate_every=5)
    assert again.run().ended is training.Ended.RISES and again.state.step == 10


def test_a_budget_of_minutes_is_kept_over_all_sittings():
    run = make(Problem(0.01), steps=10_000, minutes=0.5 / 60)
    assert run.run().ended is training.Ended.MINUTES
    assert 0.5 < run.state.seconds < 2 and run.state.errors[-1][0] == run.state.step < 100
    again = make(Problem(0.01), state=run.state, steps=10_000, minutes=0.5 / 60)
    assert again.run().ended is training.Ended.MINUTES and again.state.step == run.state.step


def test_a_loss_that_is_not_finite_ends_it_with_what_was_learned(tmp_path):
    class Explodes(Problem):
        def loss(self, example):
            return super().loss(example) * (math.inf if example.number > 20 else 1)

    path = tmp_path / "a.state"
    with pytest.raises(ValueError, match="step 11 is not finite. Lower learning_rate"):
        make(Explodes(), Watch(path)).run()
    state = training.read_state(path)
    assert state.step == 10 and all(each.isfinite().all() for each in state.parameters.values())


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_every_optimizer_goes_on_exactly(optimizer, tmp_path):
    expected = make(optimizer=optimizer).run()
    path = tmp_path / "a.state"
    with pytest.raises(Stop):
        make(watch=Watch(path, 40), optimizer=optimizer).run()
    again = make(state=training.read_state(path), optimizer=optimizer)
    assert same(again.run().parameters, expected.parameters)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(steps=0),
        dict(batch_size=0),
        dict(learning_rate=0.0),
        dict(learning_rate=math.nan),
        dict(optimizer="Lion"),
        dict(minutes=-1.0),
        dict(minutes=math.nan),
    ],
)
def test_settings_name_what_is_wrong(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is "):
        settings(**wrong)


def test_the_learning_rate_rises_and_falls_to_nearly_nothing():
    rates = [settings(steps=100).rate(step) for step in range(100)]
    assert rates[:3] == pytest.approx([0.001, 0.002, 0.003])
    assert rates[20:60] == [0.02] * 40
    assert rates[60:] == sorted(rates[60:], reverse=True)
    assert rates[80] == pytest.approx(0.01) and rates[-1] == pytest.approx(0.001)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow("thorough"))])
def test_several_processes_train_what_one_does(size, tmp_path):
    run = make(batch_size=2, grad_accumulation_steps=2)
    expected = run.run()
    processes.run(small_problem.__file__, size, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    for part in parts:
        assert same(part["best"], expected.parameters, 1e-5)
        assert part["losses"] == pytest.approx(run.state.losses, rel=1e-4)
        assert [step for step, _ in part["errors"]] == [step for step, _ in run.state.errors]
    assert parts[0]["saves"] > 0 and not any(part["saves"] for part in parts[1:])
    shares = sorted(number for part in parts for number in part["seen"])
    assert shares == list(range(1, 97))
    # What several processes saved, one goes on with.
    state = training.read_state(tmp_path / "shared.state")
    assert state.facts == FACTS and state.step == 24
    alone = make(state=state, batch_size=2, grad_accumulation_steps=2, steps=30)
    assert alone.run().error < expected.error
