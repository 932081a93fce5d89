"""What a person sees of a training while it runs; and the button that stops it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import comfy.utils

from ...training import State, Training
from ..host import prompt_server
from .distillation import interrupt_if_asked

logger = logging.getLogger(__name__)


class Progress:
    """ComfyUI's progress bar, a line of text under the node, and the log."""

    def __init__(self, steps: int, node_id: str | None) -> None:
        self._steps, self._node_id = steps, node_id
        self._bar: Any = None
        self.on_save: Callable[[State], None] = lambda _: None

    def begin(self, training: Training) -> None:
        """The bar of the training itself."""
        self._bar = comfy.utils.ProgressBar(self._steps)
        self._bar.update_absolute(training.state.step)
        if training.state.step:
            self.say(f"Going on after step {training.state.step}")

    def tick(self, training: Training) -> None:
        """See `Watch.tick`."""
        interrupt_if_asked()
        state = training.state
        self._bar.update_absolute(state.step)
        if state.losses:
            self._show(f"{_so_far(training)}, loss {state.losses[-1]:.3g}{_held_out(state)}")

    def judged(self, training: Training) -> None:
        """See `Watch.judged`."""
        self.say(f"{_so_far(training)}{_held_out(training.state)}")

    def save(self, state: State) -> None:
        """See `Watch.save`."""
        self.on_save(state)

    def say(self, text: str) -> None:
        """In the log, and under the node."""
        logger.info("RoPeSLR training: %s", text)
        self._show(text)

    def _show(self, text: str) -> None:
        server = prompt_server()
        if server is None or self._node_id is None:
            return
        try:
            server.send_progress_text(text, self._node_id)
        except Exception:  # an older ComfyUI, or a closed browser
            logger.debug("RoPeSLR: no progress text", exc_info=True)


def _so_far(training: Training) -> str:
    left = training.seconds_left()
    remaining = "" if math.isinf(left) else f", {clock(left)} left"
    return f"Step {training.state.step} of {training.settings.steps}{remaining}"


def _held_out(state: State) -> str:
    if not state.errors:
        return ""
    return f", held-out error {100 * state.errors[-1][1]:.1f} % of no LoRA's"


def clock(seconds: float) -> str:
    """As 4:05 or 1:04:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
