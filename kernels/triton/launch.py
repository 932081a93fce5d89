"""Declares and launches kernels: nothing specialises on a size, a table holds the parameters.

A kernel's pointers end in `_ptr`, its constexprs are written in capitals; every other argument is a
run-time number that Triton is told not to specialise on, so a new length, sparsity or rank never
compiles anything. A pointer that ends in `_single` isn't known to be aligned either: each lane
reads one number there, its neighbours the next ones, instead of four.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import tuning
from ..types import FeatureMap, TokenBlocks
from .tiles import STRIDE_UNIT

UNIT = STRIDE_UNIT.value


class Launch(NamedTuple):
    """Launch parameters of one kernel.

    stages: the compiler shares them out among the loads of a loop that wait for each other. lean:
    for chips whose products read and write registers; see `attention._forward`.
    """

    warps: int
    stages: int
    lean: bool = False


def kernel(function: Callable) -> Any:
    """`triton.jit` with every run-time number left unspecialised: a `JITFunction`."""
    parameters = inspect.signature(function).parameters
    numbers = [name for name in parameters if not name.endswith("_ptr") and not name.isupper()]
    return triton.jit(function, do_not_specialize=numbers)  # pyright: ignore


def strides(x: Tensor) -> tuple[int, int, int]:
    """Batch, head and token stride of `(B, H, L, D)` in STRIDE_UNITs, for `aligned` tensors."""
    batch, head, token = (x.stride(i) // UNIT if x.shape[i] > 1 else 0 for i in range(3))
    return batch, head, token


def aligned(x: Tensor) -> Tensor:
    """x itself where the kernels can read it in place: rows contiguous, starting at multiples of 8.

    Else a copy.
    """
    in_place = x.stride(3) == 1 and all(
        x.stride(i) % UNIT == 0 and x.stride(i) >= 0 for i in range(3) if x.shape[i] > 1
    )
    return x if in_place else x.contiguous()


def padded(width: int) -> int:
    """The power of two, at least 32, that holds a width.

    A product takes 16 channels, and features come in pairs.
    """
    return max(32, 1 << (width - 1).bit_length())


# The forward by what it adds to its output; "wide": with query blocks of 128, "8-bit": with keys
# and values in 8 bits.
FORWARD = ("forward", "mixed", "pooled", "linear", "low_rank")
TUNED, TUNED_WIDTH = ("forward", "mixed"), 128  # what RoPeSLR Doctor's trials stand for


class Forward(NamedTuple):
    """Launches of the forward, of all its kinds."""

    narrow: Launch
    wide: Launch
    dense: Launch
    narrow_8bit: Launch
    wide_8bit: Launch

    def by_name(self) -> dict[str, Launch]:
        found = {"dense": self.dense, "8-bit dense": self.narrow_8bit}
        for kind in FORWARD:
            found |= {kind: self.narrow, f"wide {kind}": self.wide}
            found |= {f"8-bit {kind}": self.narrow_8bit, f"8-bit wide {kind}": self.wide_8bit}
        return found


# Products that read and write registers (mma.sync).
_LEAN = Forward(
    narrow=Launch(4, 3, True),
    wide=Launch(8, 5, True),
    dense=Launch(4, 2, True),
    narrow_8bit=Launch(4, 3, True),
    wide_8bit=Launch(8, 4, True),
)
# Launch parameters by architecture and kernel for half precision at D = 128; chosen by static
# checks and the estimate (benchmarks/results/compile.json, benchmarks/model.py), not yet by
# measurement. "other" serves what is not named.
TABLE: dict[str, dict[str, Launch]] = {
    "other": {
        **Forward(Launch(4, 3), Launch(8, 3), Launch(4, 2), Launch(4, 3), Launch(8, 3)).by_name(),
        "d_queries": Launch(8, 2),
        "d_keys": Launch(8, 2),
        "mass": Launch(4, 3),
        "pool": Launch(4, 1),
        "state": Launch(8, 2),
        "features": Launch(8, 1),
        "select": Launch(1, 1),  # a row's counts need no barrier then
        "quantize": Launch(4, 1),
    },
    # Shared memory for two buffers, and still two programs.
    "80": _LEAN._replace(narrow=Launch(4, 5, True), dense=Launch(4, 3, True)).by_name(),
    "86": _LEAN.by_name(),
    "89": _LEAN.by_name(),
    "120": _LEAN.by_name(),
    # One warpgroup of four warps owns 64 rows of a wgmma; two that share them issue up to half as
    # much again.
    "90": {
        **Forward(
            Launch(4, 5), Launch(8, 5), Launch(4, 3), Launch(4, 4, True), Launch(8, 4)
        ).by_name(),
        "8-bit linear": Launch(4, 2),  # spills else
        "d_queries": Launch(4, 2),
        "d_keys": Launch(4, 3),
    },
    "100": {
        **Forward(
            Launch(4, 3), Launch(8, 3, True), Launch(8, 3), Launch(4, 3), Launch(8, 3)
        ).by_name(),
        "low_rank": Launch(8, 3),
        "features": Launch(8, 2),
        "d_queries": Launch(4, 2),
        "d_keys": Launch(4, 1),
    },
    "gfx942": {
        **Forward(Launch(4, 3), Launch(8, 3), Launch(4, 2), Launch(4, 2), Launch(8, 2)).by_name(),
        "d_queries": Launch(4, 1),
        "d_keys": Launch(4, 1),
    },
}


def table(blocks: TokenBlocks) -> Tensor:
    """The tokens of every block, as kernels read them."""
    return blocks.tokens.to(torch.int32).contiguous()


def as_operand(x: Tensor | None) -> Tensor | None:
    """A small tensor as kernels can take it: contiguous, and not float64."""
    if x is None:
        return None
    return (x.float() if x.dtype == torch.float64 else x).contiguous()


def map_pointers(feature_map: FeatureMap) -> list[Tensor | None]:
    """The tensors of a feature map, in the order that kernels take them."""
    return [as_operand(x) for x in feature_map[1:]]


def pe_rows(feature_map: FeatureMap) -> int:
    return 0 if feature_map.pe is None else feature_map.pe.shape[1]


def launch_of(name: str, width: int = 0) -> Launch:
    """The parameters of a kernel on the active device: tuned there, where it was tried, or shipped.

    width: padded channels of a head.
    """
    kind = name.removeprefix("8-bit ").removeprefix("wide ")
    if kind in TUNED and width == TUNED_WIDTH:
        precision = "8-bit" if name.startswith("8-bit") else "16-bit"
        tuned = tuning.launch_here(precision, 128 if "wide" in name else 64)
        if tuned is not None:
            return Launch(*tuned)
    return TABLE.get(architecture(), {}).get(name) or TABLE["other"][name]


def shipped(precision: str, rows: int) -> Launch:
    """The forward's parameters on the active device before anything is measured."""
    name = ("8-bit " if precision == "8-bit" else "") + ("wide " if rows > 64 else "") + "mixed"
    return TABLE.get(architecture(), {}).get(name) or TABLE["other"][name]


def launch_options(name: str, width: int = 0) -> dict[str, int | bool]:
    """Keyword arguments of a launch; FP fusion by name, as Triton 3.10 turns it off by default."""
    found = launch_of(name, width)
    return {"num_warps": found.warps, "num_stages": found.stages, "enable_fp_fusion": True}


def architecture() -> str:
    """The name of the active device's architecture in TABLE: "90" for sm_90, "gfx942"."""
    try:
        arch = triton.runtime.driver.active.get_current_target().arch  # pyright: ignore
    except Exception:  # the interpreter has no driver
        return "other"
    return "100" if arch in (101, 103, 110) else str(arch)  # datacentre Blackwell, all with tcgen05
