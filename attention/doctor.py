"""What this machine would run, whether it computes right, how fast, and what to do: as text."""

from __future__ import annotations

import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import ops, reference, triton_support, tuning
from ..kernels.dispatch import Choice, choose
from ..kernels.triton_support import Cause, Operands, explain
from .block_layout import TokenLayout
from .call import AttentionCall
from .plan import BLOCK, FINE, SparsePlan
from .run import AttentionRun

METHODS = ("ropeslr", "top-k", "top-k plain")
# Of the outputs of the self-test.
ROUNDING = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
HEADS, HEAD_DIM = 8, 128
LARGEST_ON_CPU = 4096  # tokens; a longer video would take minutes and say the same
WORTH_IT = 1.1


@dataclass(frozen=True)
class Measurement:
    """Medians in milliseconds of one self-attention call of 8 heads, dense and by method."""

    tokens: int
    dense: float
    methods: dict[str, float]

    def gain(self, method: str) -> float:
        return self.dense / self.methods[method]


def working_dtype(device: torch.device) -> torch.dtype:
    """What video models usually run in there."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def facts(device: torch.device) -> list[str]:
    """The machine, and which backend it would use, and why."""
    lines = [
        f"system: {platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}",
        f"triton: {' '.join(triton_support.installed_triton() or ('not installed',))}",
    ]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        arch = (
            properties.gcnArchName
            if torch.version.hip
            else f"sm_{properties.major}{properties.minor}"
        )
        lines.append(
            f"device: {properties.name} ({arch}), {properties.total_memory / 2**30:.0f} GiB"
        )
    else:
        lines.append(f"device: {device.type}, {torch.get_num_threads()} threads")
    lines.append(f"backend: {backend_line(device)}")
    found = _backend(device).obstacle
    if found is not None and triton_support.not_installed() and device.type == "cuda":
        lines.append(explain(found))
    return lines


def _backend(device: torch.device) -> Choice:
    return choose("auto", Operands(device, working_dtype(device), HEAD_DIM, (BLOCK,)))


def backend_line(device: torch.device) -> str:
    """What sparse attention would run in there, and why where it is not Triton."""
    backend, found = _backend(device)
    return "Triton kernels" if backend == "triton" else f"plain PyTorch: {found}"


def self_test(device: torch.device) -> list[str]:
    """Errors of the path that would run, against float64 on the CPU and PyTorch's attention."""
    dtype, grid = working_dtype(device), (5, 12, 15)
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, math.prod(grid), HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    call = AttentionCall(TokenLayout(grid))
    here = q.to(device), k.to(device), v.to(device)
    found, expected = _kept_blocks(here, call.layout)
    lines = [_verdict("kept blocks", found, expected, dtype)]
    everything = AttentionRun(SparsePlan(method="top-k plain", sparsity=0.0).resolve())
    whole, _ = everything.attend(*here, call)
    exact = reference.dense_attention(q, k, v)[0]
    lines.append(_verdict("every block kept, against dense", whole, exact, dtype))
    for method in METHODS[:2]:
        plan = SparsePlan(method=method, sparsity=0.6).resolve()
        expected, _ = AttentionRun(plan).attend(q.float(), k.float(), v.float(), call)
        found, _ = AttentionRun(plan).attend(*here, call)
        lines.append(_verdict(method, found, expected, dtype))
    return lines


def _kept_blocks(here: tuple[Tensor, Tensor, Tensor], layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """Attention over the same kept blocks, on the device and by the definition."""
    blocks, device = layout.blocks(), here[0].device
    q, k, v = (x.cpu().double() for x in here)
    pooled_q, pooled_k = (reference.block_pool(x, blocks.kv_blocks).float() for x in (q, k))
    mask, _ = reference.block_select(pooled_q, pooled_k, blocks, topk=4)
    expected, _ = reference.block_sparse_attention(q, k, v, mask)
    found, _ = ops.block_sparse_attention(*here, mask.to(device))
    return found, expected


def _verdict(name: str, found: Tensor, exact: Tensor, dtype: torch.dtype) -> str:
    error = ((found.cpu().double() - exact.double()).norm() / exact.double().norm()).item()
    good = error <= ROUNDING[dtype]  # also False for NaN
    same = ", which is the same code here" if error == 0 else ""
    verdict = "right" if good else "WRONG (please report this)"
    return f"{name}: relative error {error:.1e}{same}, {verdict}"


def tune(
    device: torch.device,
    grid: tuple[int, int, int],
    sparsity: float,
    path: Path | None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[str]:
    """Try the kernels' variants at this size, and keep what was found in a file, if there is one.

    Each is tried in a process of its own that may crash; only what is right there is ever used.
    """
    backend, obstacle = _backend(device)
    if backend != "triton":
        return [f"nothing to tune: {obstacle}"]
    dtype = str(working_dtype(device)).removeprefix("torch.")
    trial = tuning.Trial(
        str(device), math.prod(grid), HEADS, HEAD_DIM, sparsity, FINE, dtype, backend
    )
    found = tuning.run_trials(tuning.short_list(device), trial, progress)
    lines = []
    for each in found.outcomes:
        figures = f"not used, {each.failed}"
        if not each.failed:
            figures = f"{each.ms:.2f} ms, error {each.error:.1e}"
        lines.append(f"{each.variant.name}: {figures}")
    if any("out of memory" in (each.failed or "").lower() for each in found.outcomes):
        return [
            *lines,
            "Not kept: memory ran out. Try again with a smaller size, or a fresh ComfyUI.",
        ]
    best = found.best("8-bit" if found.eight_bit_pays() else "16-bit")
    if best is None:
        return [*lines, "No variant is right here: please report this. Set backend to pytorch."]
    lines.append(f"fastest: {best.variant.name}; precision auto goes by it")
    if path is not None:
        tuning.save(path, found, device)
        tuning.use(path, device)
        lines.append(f"kept in {path.name}")
    return lines


def measure(
    device: torch.device,
    grid: tuple[int, int, int],
    sparsity: float,
    seconds: float = 20.0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Measurement:
    """Time one self-attention call on a (frames, height, width) grid of tokens, in turns."""
    dtype = working_dtype(device)
    grid = _shortened(grid) if device.type == "cpu" else grid
    tokens = math.prod(grid)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, HEADS, HEAD_DIM, generator=generator)
        .to(device, dtype)
        .transpose(1, 2)
        for _ in range(3)
    )
    layout, steps = TokenLayout(grid), iter(range(1, 1 << 30))
    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v)
    }
    for method in METHODS:
        plan = SparsePlan(method=method, sparsity=sparsity, calibrate="first step").resolve()
        run = AttentionRun(plan)
        calls[method] = lambda run=run: run.attend(q, k, v, AttentionCall(layout, step=next(steps)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for name, call in _turns(calls, seconds, progress):
            _wait(device)
            started = time.perf_counter()
            call()
            _wait(device)
            samples[name].append(1e3 * (time.perf_counter() - started))
    # The first warms up.
    medians = {name: statistics.median(values[1:]) for name, values in samples.items()}
    return Measurement(tokens, medians.pop("dense"), medians)


def _turns(
    calls: dict, seconds: float, progress: Callable[[int, int], None]
) -> Iterator[tuple[str, Callable]]:
    """Every call in turn, at least three times, until the time is up."""
    started, turn = time.monotonic(), 0
    while turn < 3 or (time.monotonic() - started < seconds and turn < 50):
        yield from calls.items()
        turn += 1
        progress(
            min(99, max(100 * turn // 50, int(100 * (time.monotonic() - started) / seconds))), 100
        )
    progress(100, 100)


def _shortened(grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """The same picture with fewer frames, or a smaller one, that a CPU attends to in a moment."""
    frames, height, width = grid
    while frames * height * width > LARGEST_ON_CPU:
        if frames > 1:
            frames = max(1, LARGEST_ON_CPU // (height * width))
        else:
            height, width = max(1, height // 2), max(1, width // 2)
        if frames * height * width > LARGEST_ON_CPU and frames > 1:
            frames = 1
    return frames, height, width


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def advice(
    device: torch.device, measured: Measurement, asked_tokens: int, sparsity: float
) -> list[str]:
    """The figures in words, and what to do about them."""
    lines = [
        f"one self-attention call, {measured.tokens:,} tokens, {HEADS} heads, sparsity "
        f"{sparsity:.2f}: dense {measured.dense:.1f} ms; "
        + ", ".join(
            f"{name} {ms:.1f} ms ({measured.gain(name):.1f}x)"
            for name, ms in measured.methods.items()
        )
    ]
    if measured.tokens < asked_tokens:
        lines.append(
            f"Measured at {measured.tokens:,} instead of {asked_tokens:,} tokens, since a CPU "
            "would take minutes; longer videos gain more."
        )
    best = max(METHODS, key=measured.gain)
    if measured.gain("ropeslr") >= WORTH_IT:
        lines.append(
            f"Recommended: method auto, sparsity {sparsity:.2f}, for attention "
            f"{measured.gain('ropeslr'):.1f} times as fast at this size. A whole step gains less."
        )
    elif measured.gain(best) >= WORTH_IT:
        lines.append(
            f"ropeslr gains little here; {best} is faster, at a larger error. Longer videos gain "
            "more."
        )
    elif device.type != "cpu" and _backend(device).backend == "pytorch":
        lines.append(
            "Plain PyTorch gains nothing on this device: install Triton, or leave the node "
            "bypassed."
        )
    else:
        lines.append(
            "Sparse attention gains nothing at this size: raise the sparsity, or make the video "
            "longer."
        )
    return lines


def examine(
    device: torch.device,
    grid: tuple[int, int, int],
    sparsity: float,
    seconds: float = 20.0,
    progress: Callable[[int, int], None] = lambda done, of: None,
    kept_in: Path | None = None,
) -> str:
    """Everything above as one text. grid: frames, height, width of tokens.

    kept_in: a file for what was tuned.
    """
    lines = ["Machine", *(f"  {line}" for line in facts(device)), "Self-test"]
    try:
        lines += [f"  {line}" for line in self_test(device)]
        lines.append("Tuning")
        lines += [f"  {line}" for line in tune(device, grid, sparsity, kept_in, progress)]
        measured = measure(device, grid, sparsity, seconds, progress)
        lines += [
            "Speed",
            *(f"  {line}" for line in advice(device, measured, math.prod(grid), sparsity)),
        ]
    except Exception as error:  # whatever is broken here is what the person wants to know
        lines.append(
            f"  failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
        if sys.platform == "win32" or triton_support.not_installed():
            seen = Cause.KERNEL_FAILED.because(operation="of the self-test", error="see above")
            lines.append(f"  {explain(seen)}")
    return "\n".join(lines)
