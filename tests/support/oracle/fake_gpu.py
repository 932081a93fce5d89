"""A GPU that is not there: code meant for CUDA runs to its end, with no numbers worth looking at.

Tensors asked for on CUDA lie on the CPU, kernels are compiled for the architecture and never run
(new memory holds zeros, hence their outputs do), and torch.cuda answers as such a GPU would. What
such a run shows: that names, arguments and the order of calls are right.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from pack_loader import load

PROPERTIES = SimpleNamespace(
    name="a GPU that is not there",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 << 30,
    L2_cache_size=1 << 20,
)


NEW = (torch.empty, torch.empty_like, torch.Tensor.new_empty)


class _OnTheCpu(TorchFunctionMode):
    """Every function that is told of a CUDA device is told of the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.device:  # which may well be asked what it is
            return function(*args, **kwargs)
        kwargs = {name: _cpu(x) for name, x in kwargs.items()}
        found = function(*map(_cpu, args), **kwargs)
        return found.zero_() if function in NEW else found


def _cpu(x):
    asked = x if isinstance(x, (str, torch.device)) else None
    return torch.device("cpu") if str(asked).startswith("cuda") else x


class Generator(torch.Generator):
    """Of the CPU, whatever device is asked for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


@contextlib.contextmanager
def fake_gpu(target: str = "cuda:90") -> Iterator[Counter[str]]:
    """Inside, there seems to be one; yields how often torch.cuda's parts and kernels were called."""
    static, support = load(".benchmarks.static"), load(".kernels.triton_support")
    split = load(".kernels.triton.split")
    asked: Counter[str] = Counter()

    def counted(name: str, answer):
        def call(*args, **kwargs):
            asked[name] += 1
            return answer(*args, **kwargs)

        return call

    @contextlib.contextmanager
    def nothing(*_):
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    graph = SimpleNamespace(replay=lambda: None)
    answers = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": nothing,
        "get_device_properties": lambda device=0: PROPERTIES,
        "get_device_name": lambda device=0: PROPERTIES.name,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 1_000_000,
        "reset_peak_memory_stats": lambda device=None: None,
        "current_stream": lambda device=None: stream,
        "Stream": lambda: stream,
        "stream": nothing,
        "CUDAGraph": lambda: graph,
        "graph": nothing,
        "Event": Event,
    }
    on_gpu, count = torch.device("cuda", 0), split.multiprocessors
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, counted(name, answer)))
        patch = mock.patch.object
        stack.enter_context(patch(torch, "Generator", Generator))
        stack.enter_context(patch(split, "multiprocessors", lambda device: count(on_gpu)))
        stack.enter_context(patch(support, "obstacle", lambda *_: support._gpu_obstacle(0)))
        stack.callback(support._gpu_obstacle.cache_clear)
        stack.callback(count.cache_clear)
        compiled = stack.enter_context(static.capture(target))
        stack.enter_context(_OnTheCpu())
        yield asked
        asked.update(name for name, _ in compiled)
