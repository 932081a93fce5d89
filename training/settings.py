"""How a LoRA is trained, validated once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

OPTIMIZERS = ("AdamW", "Adam", "SGD", "RMSprop")
WARM_UP = 20  # steps in which the learning rate rises
FALLS = 0.4  # share of the steps, the last ones, in which it falls evenly
FINAL_RATE = 0.05  # of the learning rate, what is left at the end
BETAS = (0.9, 0.99)  # of Adam and AdamW: a few hundred steps are too few for 0.999


@dataclass(frozen=True)
class TrainSettings:
    """What decides the LoRA that comes out, and when the training stops.

    steps: of the optimizer, each by batch_size x grad_accumulation_steps examples. evaluate_every,
    save_every: steps between two held-out errors, and between two saves; 0: none in between.
    patience: held-out errors without a better one after which it stops; 0: never. minutes: after
    which it stops; 0: none.

    A ValueError names the field, what was found and what was expected.
    """

    steps: int = 16
    batch_size: int = 1
    grad_accumulation_steps: int = 1
    learning_rate: float = 5e-4
    optimizer: str = "AdamW"
    seed: int = 0
    evaluate_every: int = 25
    save_every: int = 100
    patience: int = 4
    minutes: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer is {self.optimizer!r}; it must be one of: {', '.join(OPTIMIZERS)}."
            )
        for name in ("steps", "batch_size", "grad_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        for name in ("seed", "evaluate_every", "save_every", "patience", "minutes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0.")

    @property
    def examples(self) -> int:
        """Examples of one step."""
        return self.batch_size * self.grad_accumulation_steps

    def rate(self, step: int) -> float:
        """The learning rate of a step: it rises at the start, and falls to nearly nothing."""
        falls = (self.steps - step) / (FALLS * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / WARM_UP, max(FINAL_RATE, falls))

    def make_optimizer(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """PyTorch's own, by its name."""
        more = {"betas": BETAS} if self.optimizer.startswith("Adam") else {}
        kind = getattr(torch.optim, self.optimizer)
        return kind(list(parameters), lr=self.learning_rate, **more)
