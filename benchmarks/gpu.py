"""How the benchmarks measure: CUDA events or the clock; medians, spread, and the machine."""

from __future__ import annotations

import contextlib
import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import commit

LEAST_SAMPLES = 20
SHORT = 1e-4  # seconds of a call that is replayed from a graph
REPLAYED = 20  # calls in a graph


class Time(NamedTuple):
    """Milliseconds of one call: median, and the quarter and three-quarter points."""

    median: float
    low: float
    high: float
    samples: int


class Stopwatch:
    """Times calls on one device, as often as fits into `seconds` but at least `least` times."""

    def __init__(self, device: torch.device, seconds: float, least: int = LEAST_SAMPLES) -> None:
        self.device, self.seconds, self.least = device, seconds, least

    def time(self, call: Callable[[int], object]) -> Time:
        """call(turn) is given the number of the turn, to choose among inputs with."""
        call(0)
        self._wait()
        started = time.perf_counter()
        call(1)
        self._wait()
        each = max(time.perf_counter() - started, 1e-6)
        turns = int(min(max(self.least, self.seconds / each), 200))
        samples = (
            self._on_gpu(call, turns, each)
            if self.device.type == "cuda"
            else self._on_cpu(call, turns)
        )
        quarters = statistics.quantiles(samples, n=4) if turns > 1 else samples * 3
        return Time(statistics.median(samples), quarters[0], quarters[2], turns)

    def _on_gpu(self, call: Callable[[int], object], turns: int, each: float) -> list[float]:
        if each < SHORT:
            with contextlib.suppress(RuntimeError):  # what cannot be captured is called
                return self._replayed(call, turns)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(turns + 1)]
        marks[0].record()
        for turn in range(turns):
            call(turn)
            marks[turn + 1].record()
        self._wait()
        return [before.elapsed_time(after) for before, after in zip(marks, marks[1:])]

    def _replayed(self, call: Callable[[int], object], turns: int) -> list[float]:
        """Of a call so short that Python's part would be measured: many of it as one graph."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(0)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            for turn in range(REPLAYED):
                call(turn)
        samples = self._on_gpu(lambda _: graph.replay(), turns, SHORT)
        return [each / REPLAYED for each in samples]

    @staticmethod
    def _on_cpu(call: Callable[[int], object], turns: int) -> list[float]:
        samples = []
        for turn in range(turns):
            started = time.perf_counter()
            call(turn)
            samples.append(1e3 * (time.perf_counter() - started))
        return samples

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def machine(device: torch.device) -> dict:
    """What the figures were measured on and with."""
    found = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "device": str(device),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "machine": properties.name,
            "architecture": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "driver_and_clocks": clocks(),
        }
    return found


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def clocks() -> str | None:
    """Driver, clocks now and at most, and power limit, as nvidia-smi tells them; nothing is set."""
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
