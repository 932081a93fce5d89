"""The training loop: steps, held-out errors, the best of them, saves, and every way to end."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .crowd import Crowd
from .draws import Example, Material, held_out
from .settings import TrainSettings
from .state import State, optimizer_tensors, restore_optimizer

NOT_FINITE = (
    "The loss of step {step} is not finite. Lower learning_rate (now {rate:g}), or set "
    "training_dtype to fp32."
)
MOST_GRADIENT = 1.0  # longer ones are cut to this length
AVERAGED = 20  # steps, about, that the judged parameters are the mean of
UNEVEN = (
    "batch_size x grad_accumulation_steps is {examples}, which {size} processes cannot share; make "
    "it a multiple of {size}."
)


class Problem(Protocol):
    """What is trained."""

    def loss(self, example: Example) -> Tensor:
        """With the LoRA; a scalar, differentiable where gradients are enabled."""
        ...

    def untrained_loss(self, example: Example) -> Tensor:
        """Without it."""
        ...


class Watch(Protocol):
    """Who looks on. Whatever it raises ends the training, which is saved first."""

    def tick(self, training: Training) -> None:
        """Before every example."""
        ...

    def judged(self, training: Training) -> None:
        """After every held-out error."""
        ...

    def save(self, state: State) -> None:
        """Keep it. Called in one process only."""
        ...


class Ended(Enum):
    """Why a training is over."""

    STEPS = "all steps are done"
    MINUTES = "the minutes are over"
    RISES = "the held-out error was rising"


class Outcome(NamedTuple):
    """What came out: the parameters of the lowest held-out error, and at which step that was."""

    parameters: dict[str, Tensor]
    step: int
    error: float  # as a share of that without the LoRA
    ended: Ended


class Training:
    """One training; all that it knows is in `state`, so that another can go on with it."""

    def __init__(
        self,
        problem: Problem,
        parameters: Mapping[str, torch.nn.Parameter],
        material: Material,
        settings: TrainSettings,
        watch: Watch,
    ) -> None:
        self.problem, self.parameters, self.material = problem, parameters, material
        self.settings, self.watch = settings, watch
        self.optimizer = settings.make_optimizer(parameters.values())
        self.crowd = Crowd(parameters.values())
        if settings.examples % self.crowd.size:
            raise ValueError(UNEVEN.format(examples=settings.examples, size=self.crowd.size))
        self.state = State({})
        self.held_out = held_out(material)
        self.device = next(iter(parameters.values())).device
        self._whole = True  # not in the middle of changing parameters
        self._begun, self._first = time.monotonic(), 0

    def begin_with(self, state: State) -> None:
        """Go on with a state, or begin with one that has facts alone."""
        self.state = state
        if state.parameters:
            _copy(state.parameters, self.parameters)
        average = state.average or self.parameters
        state.average = {name: x.detach().to(self.device).clone() for name, x in average.items()}
        if state.optimizer:
            restore_optimizer(self.optimizer, state.optimizer)

    def run(self) -> Outcome:
        """Train to the end. An exception is raised after the state was saved."""
        try:
            ended = self._run()
        except BaseException:
            if self._whole:
                self._save()
            raise
        self._save()
        return Outcome(self.state.best, *self.state.lowest(), ended)

    def seconds_left(self) -> float:
        """By the steps so far; infinite before the first."""
        done = self.state.step - self._first
        spent = time.monotonic() - self._begun
        return spent / done * (self.settings.steps - self.state.step) if done else math.inf

    def _run(self) -> Ended:
        state, settings = self.state, self.settings
        self._begun, self._first = time.monotonic(), state.step
        before = state.seconds
        if not state.errors:
            state.untrained = self._error(self.problem.untrained_loss)
            self._judge()
        while True:
            ended = self._over()
            due = _due(state.step, settings.evaluate_every)
            if (due or ended is not None) and state.errors[-1][0] != state.step:
                self._judge()
            if ended is not None:
                return ended
            if state.rises(settings.patience):
                return Ended.RISES
            if _due(state.step, settings.save_every) and state.step > self._first:
                self._save()
            self._step()
            state.seconds = before + time.monotonic() - self._begun

    def _over(self) -> Ended | None:
        """Whether steps or minutes are used up."""
        if self.state.step >= self.settings.steps:
            return Ended.STEPS
        minutes = self.settings.minutes
        late = bool(minutes) and self.state.seconds > 60 * minutes
        return Ended.MINUTES if self.crowd.any(late, self.device) else None

    def _step(self) -> None:
        state, settings = self.state, self.settings
        first = state.step * settings.examples + 1
        numbers = self.crowd.own(range(first, first + settings.examples))
        self.optimizer.zero_grad()
        total = 0.0
        for number in numbers:
            self.watch.tick(self)
            example = self.material.example(number)
            sharing = number == numbers[-1]
            with contextlib.nullcontext() if sharing else self.crowd.without_sharing():
                loss = self.crowd.loss(lambda: self.problem.loss(example))  # noqa: B023
                (loss / len(numbers)).backward()
            total += float(loss.detach())
        mean = self.crowd.mean(total, len(numbers), self.device)
        if not math.isfinite(mean):
            raise ValueError(NOT_FINITE.format(step=state.step + 1, rate=settings.learning_rate))
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), MOST_GRADIENT)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(state.step)
        self._whole = False
        self.optimizer.step()
        state.step += 1
        for name, each in self.parameters.items():
            state.average[name].lerp_(each.detach(), max(1 / AVERAGED, 1 / state.step))
        state.losses.append(mean)
        self._whole = True

    def _judge(self) -> None:
        """Find the held-out error of the average, which is kept where it is the lowest so far."""
        state = self.state
        with self._averaged():
            error = self._error(self.problem.loss) / max(state.untrained, 1e-30)
        self._whole = False
        if not state.errors or error < state.lowest()[1]:
            state.best = {name: each.clone() for name, each in state.average.items()}
        state.errors.append((state.step, error))
        self._whole = True
        self.watch.judged(self)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The average in place of the parameters."""
        own = {name: each.detach().clone() for name, each in self.parameters.items()}
        _copy(self.state.average, self.parameters)
        try:
            yield
        finally:
            _copy(own, self.parameters)

    @torch.no_grad()
    def _error(self, loss: Any) -> float:
        total, count = 0.0, 0
        for index in self.crowd.judged(range(len(self.held_out))):
            self.watch.tick(self)
            total, count = total + float(loss(self.held_out[index])), count + 1
        return self.crowd.mean(total, count, self.device)

    def _save(self) -> None:
        if not self.crowd.leads or not self.state.errors:
            return
        state = self.state
        state.parameters = {name: each.detach().clone() for name, each in self.parameters.items()}
        state.optimizer = optimizer_tensors(self.optimizer)
        self.watch.save(state)


def outcome_of(state: State, settings: TrainSettings) -> Outcome | None:
    """What came out of a training that is over; None where there is more to do."""
    if not state.errors or state.errors[-1][0] != state.step:
        return None
    if state.step >= settings.steps:
        return Outcome(state.best, *state.lowest(), Ended.STEPS)
    rises = state.rises(settings.patience)
    return Outcome(state.best, *state.lowest(), Ended.RISES) if rises else None


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, torch.nn.Parameter]) -> None:
    for name, parameter in target.items():
        parameter.copy_(source[name])


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
