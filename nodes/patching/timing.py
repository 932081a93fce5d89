"""Time spent in self-attention during one run, without waiting for the device meanwhile."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch


class AttentionTiming:
    """Spans by kind ("sparse", "dense"): device events on CUDA and ROCm, wall time on a CPU."""

    def __init__(self) -> None:
        self._walls: list[tuple[str, float]] = []
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def measure(self, kind: str, device: torch.device) -> Iterator[None]:
        """Add the time of a `with` block; one that raises does not count."""
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(device)
            start.record(stream)
            yield
            end.record(stream)
            self._events.append((kind, start, end))
        elif device.type == "cpu":
            started = time.perf_counter()
            yield
            self._walls.append((kind, time.perf_counter() - started))
        else:
            yield

    def spans(self) -> dict[str, list[float]]:
        """Seconds of every call by kind. Waits for the device: for the end of a run."""
        found: dict[str, list[float]] = defaultdict(list)
        for kind, seconds in self._walls:
            found[kind].append(seconds)
        for kind, start, end in self._events:
            end.synchronize()
            found[kind].append(start.elapsed_time(end) / 1000)
        return dict(found)
