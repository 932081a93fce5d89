"""Which body of an operation runs: Triton's kernels where they can, plain PyTorch elsewhere, and why, in words."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import sys
from collections.abc import Callable
from functools import cache
from importlib import metadata
from types import ModuleType

import torch

from . import pytorch

BACKENDS = ("auto", "triton", "pytorch")
OLDEST_TRITON = (3, 4)
OLDEST_CUDA = (8, 0)                        # before sm_80 Triton's dots use no tensor cores
TRITON_OF_TORCH = {"2.8": (3, 4), "2.9": (3, 5), "2.10": (3, 6)}
AMD_ARCHITECTURES = ("gfx90a", "gfx942", "gfx950")
# float32 takes three products on tensor cores, whose operands overflow the registers (compiled: up to 7 kB spilled on
# sm_90 and sm_120, 107 kB on sm_80; the backward does not fit); the portable path runs on cuBLAS instead.
DTYPES = (torch.float16, torch.bfloat16)
MAX_WIDTH = 128
NO_GPU = "the tensors are on"
BLOCK_SIZES = (16, 32, 64, 128)


class TritonNotUsable(RuntimeError):
    """Triton was asked for and cannot run; the message says why and what to do."""


_failed: dict[tuple, str] = {}              # kind of call whose kernel failed here -> why


def why_not_triton(
    device: torch.device, dtype: torch.dtype, width: int, block_sizes: tuple[int, ...] = ()
) -> str | None:
    """Why Triton's kernels cannot take such tensors, as the end of a sentence; None where they can."""
    if device.type != "cuda":
        return f"{NO_GPU} {device.type}, and the kernels run on NVIDIA and AMD GPUs"
    index = torch.cuda.current_device() if device.index is None else device.index
    reason = why_not_installed() or _why_not_device(index)
    if reason:
        return reason
    if dtype not in DTYPES:
        return f"the kernels are for float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if width % 8 or width > MAX_WIDTH:
        return f"head width {width} is not a multiple of 8 up to {MAX_WIDTH}"
    if any(size not in BLOCK_SIZES for size in block_sizes):
        return f"blocks of {' and '.join(map(str, block_sizes))} tokens are not among {BLOCK_SIZES}"
    return None


def choice(
    backend: str, device: torch.device, dtype: torch.dtype, width: int, block_sizes: tuple[int, ...] = ()
) -> tuple[str, str | None]:
    """Which of "triton" and "pytorch" such a call gets, and where it is not Triton, why."""
    if backend == "pytorch":
        return "pytorch", "backend is set to pytorch"
    reason = why_not_triton(device, dtype, width, block_sizes)
    if reason is None and backend == "auto":
        reason = next((why for (_, *kind), why in _failed.items() if kind[:2] == [dtype, width]), None)
    return ("triton", None) if reason is None else ("pytorch", reason)


def run(
    operation: str, backend: str, device: torch.device, dtype: torch.dtype, width: int, block_sizes: tuple[int, ...],
    call: Callable[[ModuleType], object],
) -> object:
    """call(module) with the backend's module. Under "auto" a kernel that fails is left alone from then on.

    Raises TritonNotUsable where backend is "triton" and its kernels cannot run, or fail.
    """
    if backend == "pytorch":
        return call(pytorch)
    kind = (operation, dtype, width, block_sizes)
    reason = why_not_triton(device, dtype, width, block_sizes)
    if reason is None and backend == "auto":
        reason = _failed.get(kind)
    if reason is not None:
        if backend == "triton":
            raise TritonNotUsable(explain(reason))
        return call(pytorch)
    try:
        # Triton launches on the current device and its stream, whatever the tensors are on.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return call(_triton())
    except Exception as error:              # a compiler that is missing, a driver too old: many kinds, all of Triton's
        if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower():
            raise
        words = f"the kernel {operation} failed: {_last_words(error)}"
        if backend == "triton":
            raise TritonNotUsable(explain(words)) from error
        _failed[kind] = words
        logging.warning("RoPeSLR: %s Going on with plain PyTorch.", explain(words))
        return call(pytorch)


def _last_words(error: BaseException) -> str:
    """What the innermost error says: its last line that holds a word, since compilers end in carets."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if re.search(r"[A-Za-z]{2}", line)]
    return f"{type(error).__name__}: {lines[-1][:200]}" if lines else type(error).__name__


def explain(reason: str) -> str:
    """One paragraph for a person whose graph asks for Triton: what is in the way, and what to do."""
    text = f"Triton's kernels cannot be used: {reason}. "
    if reason.startswith(NO_GPU):
        pass                                # no package helps there
    elif sys.platform == "win32":
        text += (
            "On Windows, install the package triton-windows in the version that belongs to your PyTorch: "
            f"{_windows_package()} (run it with ComfyUI's own Python: python_embeded\\python.exe -m in the portable "
            "version), and the Microsoft Visual C++ Redistributable. "
        )
    elif why_not_installed():
        text += "On Linux, `pip install triton` in ComfyUI's environment; PyTorch for CUDA usually brings it. "
    return text + "Or set backend to auto: it takes plain PyTorch wherever Triton cannot run."


def _windows_package() -> str:
    """The pip command that fits the installed torch."""
    found = re.match(r"\d+\.\d+", torch.__version__)
    triton = TRITON_OF_TORCH.get(found[0] if found else "")
    if triton is None:
        return f"the table in the README of triton-windows names it for torch {torch.__version__}"
    major, minor = triton
    return f'pip install -U "triton-windows>={major}.{minor},<{major}.{minor + 1}"'


@cache
def why_not_installed() -> str | None:
    """Why Triton cannot be imported here, or is too old; None where it is there."""
    try:
        found = importlib.util.find_spec("triton")
    except ValueError:                      # a stand-in that another pack has put in its place
        found = None
    if found is None:
        return "the package triton is not installed"
    name, version = installed_triton() or ("", "")
    if name and tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TRITON:
        return f"{name} is {version}, and {'.'.join(map(str, OLDEST_TRITON))} or newer is needed"
    return None


def installed_triton() -> tuple[str, str] | None:
    """The package that Triton comes from, and its version; None where there is none that can be told."""
    for name in ("triton", "triton-windows", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


@cache
def _why_not_device(index: int) -> str | None:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return None if arch in AMD_ARCHITECTURES else f"{arch} is not among {', '.join(AMD_ARCHITECTURES)}"
    found = (properties.major, properties.minor)
    if found < OLDEST_CUDA:
        return f"{properties.name} is sm_{found[0]}{found[1]}, and its tensor cores need sm_80 or newer"
    return None


def _triton() -> ModuleType:
    from .triton import backend
    return backend
