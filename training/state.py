"""A training on disk: everything that it needs to go on as if it had never stopped.

One safetensors file, written whole or not at all: parameters, their average, the best of it,
and the optimizer's tensors; counts and settings are in its header, as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..attention.adapters import write_safetensors

FORMAT = "ropeslr-training"


@dataclass
class State:
    """facts: what the training was begun with, see `differences`. losses: of each step. errors:
    (step, held-out error as a share of that without the LoRA). apart: how far held-out videos are
    from the teacher's, sampled without the LoRA and with it."""

    facts: dict[str, Any]
    step: int = 0
    parameters: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)  # of the last steps' parameters
    best: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    errors: list[tuple[int, float]] = field(default_factory=list)
    untrained: float = 0.0  # held-out error without the LoRA
    seconds: float = 0.0  # that it took so far
    apart: list[tuple[float, float]] = field(default_factory=list)

    def lowest(self) -> tuple[int, float]:
        """The step of the lowest held-out error, and that error."""
        return min(self.errors, key=lambda each: (math.isnan(each[1]), each[1]))

    def rises(self, patience: int) -> bool:
        """Whether the last errors, as many as patience says, were all above the lowest."""
        best = self.errors.index(self.lowest())
        return bool(patience) and len(self.errors) - 1 - best >= patience

    def differences(self, facts: Mapping[str, Any]) -> list[str]:
        """In words, where other facts would give another LoRA."""
        return [
            f"{name} was {self.facts.get(name)!r}, now {value!r}"
            for name, value in facts.items()
            if self.facts.get(name) != value
        ]


PARTS = ("parameters", "average", "best", "optimizer")
COUNTS = ("facts", "step", "losses", "errors", "untrained", "seconds", "apart")


def write_state(state: State, path: Path) -> None:
    """Write it whole or not at all; raises OSError, which names the file."""
    tensors = {
        f"{part}/{name}": tensor.detach().cpu().contiguous().clone()
        for part in PARTS
        for name, tensor in getattr(state, part).items()
    }
    counts = json.dumps({name: getattr(state, name) for name in COUNTS})
    write_safetensors(tensors, path, {"format": FORMAT, "training": counts})


def read_state(path: Path) -> State | None:
    """What was written; None where there is no file, or none that can be read."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                return None
            state = State(**json.loads(header["training"]))
            for key in file.keys():
                part, _, name = key.partition("/")
                getattr(state, part)[name] = file.get_tensor(key).clone()
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError):
        return None
    state.errors = [(int(step), float(error)) for step, error in state.errors]
    state.apart = [(float(without), float(with_it)) for without, with_it in state.apart]
    return state


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer remembers of each parameter, by the parameter's place and a name."""
    return {
        f"{place}/{name}": torch.as_tensor(value)
        for place, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse, into an optimizer of the same parameters."""
    known: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        place, _, name = key.partition("/")
        known.setdefault(int(place), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": known})
