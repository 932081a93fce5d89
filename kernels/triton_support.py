"""Whether Triton's kernels can run here, and if not, what stands in the way and what to do."""

from __future__ import annotations

import enum
import importlib.util
import re
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata

import torch

OLDEST_TRITON = (3, 4)
OLDEST_CUDA = (8, 0)  # before sm_80 Triton's dots use no tensor cores
TRITON_OF_TORCH = {"2.8": (3, 4), "2.9": (3, 5), "2.10": (3, 6)}
AMD_ARCHITECTURES = ("gfx90a", "gfx942", "gfx950")
PACKAGES = ("triton", "triton-windows", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm")


class TritonNotUsable(RuntimeError):
    """Triton was asked for and cannot run; the message says why and what to do."""


class Cause(enum.Enum):
    """What can stand against Triton; the value completes "Triton's kernels cannot be used: ..."."""

    NOT_ASKED_FOR = "backend is set to pytorch"
    NO_GPU = "the tensors are on {device}, and the kernels run on NVIDIA and AMD GPUs"
    NOT_INSTALLED = "the package triton is not installed"
    TOO_OLD = "{package} is {found}, and {needed} or newer is needed"
    GPU_TOO_OLD = "{gpu} is {found}, and the kernels need sm_80 or newer"
    GPU_UNKNOWN = "{found} is not among {known}"
    DTYPE = "the kernels are for {known}, not {found}"
    HEAD_DIM = "head_dim {found} is not a multiple of {multiple} up to {most}"
    BLOCK_SIZE = "blocks of {found} tokens are not among {known}"
    KERNEL_FAILED = "the kernel {operation} failed: {error}"

    def because(self, **facts: object) -> Obstacle:
        return Obstacle(self, self.value.format(**facts))


@dataclass(frozen=True)
class Obstacle:
    """Why Triton is not used: a cause to act on, and its words."""

    cause: Cause
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Limits:
    """What the kernels of an operation take; None: anything."""

    dtypes: tuple[torch.dtype, ...] | None = None
    head_dim_multiple: int = 1
    max_head_dim: int | None = None
    block_sizes: tuple[int, ...] | None = None


# float32 takes three products on tensor cores, whose operands overflow the registers (compiled: up
# to 7 kB spilled on sm_90 and sm_120, 107 kB on sm_80; the backward does not fit); the portable
# path runs on cuBLAS instead.
ON_TOKENS = Limits((torch.float16, torch.bfloat16), 8, 128, (16, 32, 64, 128))
ON_SCORES = Limits((torch.float16, torch.bfloat16, torch.float32))
ON_BITS = Limits()
LIMITS = {"block_select": ON_SCORES, "lists_from_bits": ON_BITS}  # all others: ON_TOKENS


@dataclass(frozen=True)
class Operands:
    """What decides whether a kernel can take a call."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_sizes: tuple[int, ...] = ()

    @property
    def kind(self) -> tuple[torch.dtype, int, tuple[int, ...]]:
        """What a kernel is compiled for."""
        return self.dtype, self.head_dim, self.block_sizes


def obstacle(operands: Operands, limits: Limits = ON_TOKENS) -> Obstacle | None:
    """What stands against Triton's kernels for such a call; None where they can run."""
    device = operands.device
    if device.type != "cuda":
        return _no_gpu(device.type)
    index = torch.cuda.current_device() if device.index is None else device.index
    return not_installed() or _gpu_obstacle(index) or _beyond(operands, limits)


@cache
def _no_gpu(device_type: str) -> Obstacle:
    return Cause.NO_GPU.because(device=device_type)


def _beyond(operands: Operands, limits: Limits) -> Obstacle | None:
    dtype, head_dim, sizes = operands.kind
    if limits.dtypes is not None and dtype not in limits.dtypes:
        known = " and ".join(map(_plain, limits.dtypes))
        return Cause.DTYPE.because(found=_plain(dtype), known=known)
    most = limits.max_head_dim
    if most is not None and (head_dim % limits.head_dim_multiple or head_dim > most):
        return Cause.HEAD_DIM.because(found=head_dim, multiple=limits.head_dim_multiple, most=most)
    if limits.block_sizes is not None and not set(sizes) <= set(limits.block_sizes):
        found = " and ".join(map(str, sizes))
        return Cause.BLOCK_SIZE.because(found=found, known=limits.block_sizes)
    return None


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def not_installed() -> Obstacle | None:
    """Triton is missing here, or too old; None where it can be imported."""
    try:
        found = importlib.util.find_spec("triton")
    except ValueError:  # a stand-in that another pack has put in its place
        found = None
    if found is None:
        return Cause.NOT_INSTALLED.because()
    name, version = installed_triton() or ("", "")
    if name and tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TRITON:
        needed = ".".join(map(str, OLDEST_TRITON))
        return Cause.TOO_OLD.because(package=name, found=version, needed=needed)
    return None


def installed_triton() -> tuple[str, str] | None:
    """The package that Triton comes from, and its version; None where there is no such package."""
    for name in PACKAGES:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


@cache
def _gpu_obstacle(index: int) -> Obstacle | None:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        if arch in AMD_ARCHITECTURES:
            return None
        return Cause.GPU_UNKNOWN.because(found=arch, known=", ".join(AMD_ARCHITECTURES))
    found = (properties.major, properties.minor)
    if found >= OLDEST_CUDA:
        return None
    return Cause.GPU_TOO_OLD.because(gpu=properties.name, found=f"sm_{found[0]}{found[1]}")


def explain(why: Obstacle) -> str:
    """One paragraph for a person whose graph asks for Triton: what is in the way, what to do."""
    text = f"Triton's kernels cannot be used: {why}. "
    if why.cause is Cause.NO_GPU:  # no package helps there
        advice = ""
    elif sys.platform == "win32":
        advice = (
            f"On Windows, install the triton-windows release that matches your PyTorch: "
            f"{_windows_package()} (run it with ComfyUI's own Python: python_embeded\\python.exe "
            "-m in the portable version), and the Microsoft Visual C++ Redistributable. "
        )
    elif not_installed():
        advice = (
            "On Linux, `pip install triton` in ComfyUI's environment; "
            "PyTorch for CUDA usually brings it. "
        )
    else:
        advice = ""
    return (
        f"{text}{advice}Or set backend to auto: it uses plain PyTorch wherever Triton cannot run."
    )


def _windows_package() -> str:
    """The pip command that fits the installed torch."""
    found = re.match(r"\d+\.\d+", torch.__version__)
    triton = TRITON_OF_TORCH.get(found[0] if found else "")
    if triton is None:
        return f"the README of triton-windows lists the release for torch {torch.__version__}"
    major, minor = triton
    return f'pip install -U "triton-windows>={major}.{minor},<{major}.{minor + 1}"'
