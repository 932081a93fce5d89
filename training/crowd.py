"""The processes that train together, by PyTorch's own DistributedDataParallel; or one alone."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

# Whether the model itself is spread over the processes: asked for by the command alone.
SHARDED = contextvars.ContextVar("ropeslr_sharded", default=False)


class Crowd:
    """Who takes part in a training of some parameters: all of the default process group."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        module = _Losses(parameters)
        self.rank, self.size = rank_and_size()
        self._losses: torch.nn.Module = module
        if self.size > 1:
            # No gradients of its own buckets to wait for but those of the LoRA.
            self._losses = DistributedDataParallel(module)

    @property
    def leads(self) -> bool:
        """Whether it is this process that writes files."""
        return self.rank == 0

    def loss(self, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns; its gradients become the mean over all processes."""
        return self._losses(make)

    def without_sharing(self) -> contextlib.AbstractContextManager:
        """For every backward pass of a step but the last: gradients gather here alone."""
        found = getattr(self._losses, "no_sync", None)
        return contextlib.nullcontext() if found is None else found()

    def own(self, numbers: range) -> range:
        """This process's share."""
        return numbers[self.rank :: self.size]

    def judged(self, numbers: range) -> range:
        """The same of held-out examples, of which some processes may have fewer."""
        return numbers if SHARDED.get() else self.own(numbers)

    def mean(self, total: float, count: int, device: torch.device) -> float:
        """The mean of what all processes have: their sums and counts."""
        if self.size == 1:
            return total / count
        both = torch.tensor([total, count], dtype=torch.float64, device=device)
        dist.all_reduce(both)
        return float(both[0] / both[1])

    def any(self, here: bool, device: torch.device) -> bool:
        """Whether it holds in any process: all of them stop at the same step."""
        if self.size == 1:
            return here
        found = torch.tensor(int(here), device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)


def rank_and_size() -> tuple[int, int]:
    """0 and 1 outside of a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _Losses(torch.nn.Module):
    """Holds parameters that work elsewhere, so that DistributedDataParallel finds them."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().__init__()
        self.parameters_elsewhere = torch.nn.ParameterList(parameters)

    def forward(self, make: Callable[[], Tensor]) -> Tensor:
        return make()
