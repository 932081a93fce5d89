"""Compiles Triton launches for any GPU without one and reads registers, spills and MMA work.

    with capture("cuda:90") as compiled:           # the library's own launchers, on meta tensors
        backend.block_pool(x, blocks)
    for name, kernel in compiled: print(name, report(kernel))

A fake driver stands in for the GPU, so each launch is compiled exactly as it would be there
(alignment, constexprs, options), and nothing runs. The compiler, ptxas and the disassembler are
those inside the triton wheel. The figures are static: they tell whether a kernel fits, spills and
uses tensor cores, not how fast it is.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = ("cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942")


class Limits(NamedTuple):
    """What one multiprocessor offers (CUDA programming guide, table of compute capabilities)."""

    shared_per_block: int
    shared: int
    warps: int
    blocks: int


REGISTERS = 65536
LIMITS = {
    80: Limits(166912, 167936, 64, 32),
    86: Limits(101376, 102400, 48, 16),
    89: Limits(101376, 102400, 48, 24),
    90: Limits(232448, 233472, 64, 32),
    100: Limits(232448, 233472, 64, 32),
    120: Limits(101376, 102400, 48, 24),
}
RESERVED_SHARED = 1024  # per block, taken by the system


class FakeDriver:
    """Answers what the launcher asks a driver: which target, device and stream."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}-{self.target.arch}"  # the launcher caches kernels per device

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @classmethod
    def is_active(cls) -> bool:
        return True


def gpu_target(name: str) -> GPUTarget:
    """ "cuda:90" or "hip:gfx942" as Triton names it."""
    backend, arch = name.split(":")
    return GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)


@contextlib.contextmanager
def capture(target: str) -> Iterator[list[tuple[str, Any]]]:
    """Inside, every kernel launch only compiles for `target`; yields the list of (name, kernel)."""
    compiled: list[tuple[str, Any]] = []
    launch, driver = JITFunction.run, triton.runtime.driver
    slot = "_active" if "_active" in vars(driver) else "active"  # "active" up to Triton 3.4
    before = vars(driver)[slot]

    def compile_only(self, *args, grid, warmup, **kwargs):
        # A refusal of ptxas prints the whole program.
        with contextlib.redirect_stdout(io.StringIO()):
            found: Any = launch(self, *args, grid=grid, warmup=True, **kwargs)
        found = found.result() if hasattr(found, "result") else found
        compiled.append((self.__name__, found))
        return found

    JITFunction.run = compile_only
    stand_in: Any = FakeDriver(gpu_target(target))
    driver.set_active(stand_in)
    try:
        yield compiled
    finally:
        JITFunction.run = launch
        setattr(driver, slot, before)


def report(kernel: Any) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory, whether it launches, blocks per multiprocessor."""
    if kernel.metadata.target.backend == "hip":
        return _report_amd(kernel)
    meta, ptx = kernel.metadata, kernel.asm["ptx"]
    arch, warps = meta.target.arch, meta.num_warps
    launched = re.search(r"\.reqntid\s+(\d+)", ptx)
    if launched:  # a warp-specialised kernel launches more warps than it was asked for
        warps = max(warps, int(launched[1]) // 32)
    registers, spills, notes = _assemble(ptx, arch)
    limits = LIMITS[arch]
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        REGISTERS // (per_warp * warps),
        limits.shared // (meta.shared + RESERVED_SHARED),
        limits.warps // warps,
        limits.blocks,
    )
    fits = meta.shared <= limits.shared_per_block and per_warp * warps <= REGISTERS
    mma = {"wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync", "tcgen05": r"tcgen05\.mma"}
    return {
        "warps": warps,
        "stages": meta.num_stages,
        "registers": registers,
        "spilled_bytes": spills,
        "shared_bytes": meta.shared,
        "fits": fits,
        "blocks_per_sm": blocks if fits else 0,
        "tensor_cores": {name: n for name, p in mma.items() if (n := len(re.findall(p, ptx)))},
        "async_copies": len(re.findall(r"cp\.async\.c[ag]\.", ptx)),
        "notes": notes,
    }


def mma_flops(instruction: str) -> float:
    """FLOPs that one warp gets from one instruction; wgmma is issued by four warps together."""
    wide = re.search(r"[HIQ]GMMA\.(\d+)x(\d+)x(\d+)", instruction)
    if wide:
        m, n, k = map(int, wide.groups())
        return 2 * m * n * k / 4
    depth = re.search(r"\b(?:HMMA|IMMA|QMMA)\.(?:SP\.)?168(\d+)", instruction)
    return 2 * 16 * 8 * int(depth[1]) if depth else 0


def disassemble(kernel: Any) -> tuple[list[str], dict[str, int]]:
    """A kernel's machine instructions, and where its labels point."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        text = subprocess.run(
            [_tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True
        ).stdout
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = re.match(r"^(\.L_\S+):", line)
        if label:
            labels[label[1]] = len(instructions)
        found = re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if found:
            instructions.append(found[1])
    return instructions, labels


def _assemble(ptx: str, arch: int) -> tuple[int, int, list[str]]:
    """Run the wheel's ptxas as Triton does: -> registers, spilled bytes, remarks on wgmma."""
    import triton.backends.nvidia.compiler as compiler

    extra = (
        ["--regAllocOptLevel=2"]
        if "regAllocOptLevel" in Path(str(compiler.__file__)).read_text()
        else []
    )
    (target, *_) = re.findall(r"^\.target\s+(\w+)", ptx, re.M)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        done = subprocess.run(
            [
                _ptxas(arch),
                "-v",
                *extra,
                f"--gpu-name={target}",
                str(source),
                "-o",
                str(source) + ".o",
            ],
            capture_output=True,
            text=True,
        )
    log = done.stderr
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise RuntimeError(f"ptxas refused the kernel: {log[-500:]}")
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    notes = sorted(
        {
            line.strip()[:120]
            for line in log.splitlines()
            if "wgmma" in line or "warning" in line.lower()
        }
    )
    return int(registers[1]), spills, notes


def _ptxas(arch: int) -> str:
    import triton.backends.nvidia.compiler as compiler

    try:
        return compiler.get_ptxas(arch).path
    except Exception:  # before Triton 3.6
        newer = _tool("ptxas-blackwell")
        return newer if arch >= 100 and Path(newer).exists() else _tool("ptxas")


def _tool(name: str) -> str:
    return str(Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / name)


def _report_amd(kernel: Any) -> dict[str, Any]:
    text, meta = kernel.asm["amdgcn"], kernel.metadata

    def number(pattern: str) -> int:
        return int(re.findall(pattern, text)[0])

    return {
        "warps": meta.num_warps,
        "stages": meta.num_stages,
        "registers": number(r"\.vgpr_count:\s*(\d+)"),
        "spilled_bytes": 4 * number(r"\.vgpr_spill_count:\s*(\d+)"),
        "shared_bytes": meta.shared,
        "fits": "hsaco" in kernel.asm and meta.shared <= 65536,
        "blocks_per_sm": None,
        "tensor_cores": {"mfma": n} if (n := len(re.findall(r"\bv_mfma", text))) else {},
        "async_copies": 0,
        "notes": [],
    }
