"""The hottest loop of a compiled kernel: its instructions by kind and place, its buffers and waits.

Read from the disassembly and from Triton's own intermediate code; see `static` for how a kernel is
compiled without a GPU. These figures tell what registers and spills do not: whether the next tile
is asked for before the present one is done with, and whether weights travel through shared memory.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .static import disassemble, mma_flops

KINDS = {
    "mma": r"HMMA|HGMMA|IMMA|IGMMA|QGMMA|QMMA|UTC\w*MMA",
    "exp2": r"MUFU",
    "float": r"FFMA|FADD|FMUL|FMNMX",
    "convert": r"F2FP|F2F|I2F|F2I",
    "shared load": r"LDS|LDSM",
    "shared store": r"STS|STSM",
    "async copy": r"LDGSTS|UTMALDG|UBLKCP",
    "global load": r"LDG",
    "spill": r"LDL|STL",
    "barrier": r"BAR|SYNCS|DEPBAR|LDGDEPBAR|WARPGROUP|WARPSYNC",
}
WIDTHS = {".128": 512, ".64": 256, "M88.4": 512, "M88.2": 256}  # bytes of a warp's access


@dataclass(frozen=True)
class Loop:
    """One turn of it, for one warp; before, between, after: its place among the tile's products."""

    flops: int  # of tensor cores, all warps
    instructions: int
    before: int  # instructions until the first product
    between: int  # those around and between products
    after: int  # after the last product
    exp2: int
    shared_bytes: int  # loaded and stored
    kinds: dict[str, int]
    copies_first: bool  # the next tile is asked for before the first product
    buffers: int  # tiles of the largest kind that are in shared memory at a time
    waits: tuple[int, ...]  # how many later copies may be under way when a tile is waited for
    warps_per_dot: tuple[tuple[int, int], ...]  # of each product with tensor cores, rows first

    def record(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))  # as it is read back: without tuples


def hottest_loop(kernel: Any) -> Loop | None:
    """The loop with the most tensor-core work a turn; None where no loop has any."""
    instructions, labels = disassemble(kernel)
    best: tuple[float, int, int] | None = None
    for start, end in _loops(instructions, labels):
        flops = sum(map(mma_flops, instructions[start : end + 1]))
        # Of loops within each other the inner one; of equal ones the first, which is pipelined.
        if flops and (best is None or flops > best[0]):
            best = flops, start, end
    if best is None:
        return None
    flops, start, end = best
    body = instructions[start : end + 1]
    kinds = Counter(map(_kind, body))
    products = [i for i, text in enumerate(body) if _kind(text) == "mma"]
    copies = [i for i, text in enumerate(body) if _kind(text) == "async copy"]
    code = kernel.asm["ttgir"]
    return Loop(
        flops=round(flops * kernel.metadata.num_warps),
        instructions=len(body),
        before=products[0],
        between=products[-1] - products[0] + 1 - len(products),
        after=len(body) - products[-1] - 1,
        exp2=kinds["exp2"],
        shared_bytes=sum(map(_shared_bytes, body)),
        kinds={name: kinds[name] for name in KINDS if kinds[name]},
        copies_first=bool(copies) and copies[0] < products[0],
        buffers=_buffers(code),
        waits=tuple(int(n) for n in re.findall(r"ttg\.async_wait [^\n]*num = (\d+)", _loop(code))),
        warps_per_dot=_warps(code),
    )


def innermost_loops(kernel: Any) -> list[int]:
    """Instructions of one turn of every loop that has no other one inside, in the code's order."""
    loops = list(_loops(*disassemble(kernel)))
    return [
        end - start + 1
        for start, end in loops
        if end > start  # the program's end, a jump to itself
        and not any(start <= a and b <= end and (a, b) != (start, end) for a, b in loops)
    ]


def _loops(instructions: list[str], labels: dict[str, int]) -> Iterator[tuple[int, int]]:
    """First and last instruction of all loops: jumps backwards."""
    for end, text in enumerate(instructions):
        jump = re.search(r"\bBRA\S*\s.*?`\((\.L_[^)]+)\)", text)
        start = labels.get(jump[1], end + 1) if jump else end + 1
        if start <= end:
            yield start, end


def _kind(text: str) -> str:
    name = re.sub(r"^@!?U?P\w+\s+", "", text)
    for kind, pattern in KINDS.items():
        if re.match(rf"({pattern})\b", name):
            return kind
    return "other"


def _shared_bytes(text: str) -> int:
    if _kind(text) not in ("shared load", "shared store"):
        return 0
    return next((size for mark, size in WIDTHS.items() if mark in text), 128)


def _loop(code: str) -> str:
    """The body of the first loop of Triton's code that has a product with tensor cores."""
    for found in re.finditer(r"^( *)[^\n]*scf\.for .*?^\1}", code, re.M | re.S):
        if re.search(r"tt\.dot |warp_group_dot |tc_gen5_mma", found[0]):
            return found[0]
    return ""


def _buffers(code: str) -> int:
    """How often the largest mutable tile is there: its buffers, in a pipelined loop."""
    tiles = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x(\d+)x(\d+)x\w+", code)
    if not tiles:
        return 0
    return max(((int(r) * int(c), int(n)) for n, r, c in tiles))[1]


def _warps(code: str) -> tuple[tuple[int, int], ...]:
    """How the products of the loop spread over the warps: by rows and by columns."""
    layouts = dict(re.findall(r"^(#mma\d*) = [^\n]*warpsPerCTA = \[(\d+, \d+)\]", code, re.M))
    used = re.findall(
        r"(?:tt\.dot|warp_group_dot) [^\n]*-> tensor<\d+x\d+x\w+, (#mma\d*)>", _loop(code)
    )
    return tuple(_pair(layouts[name]) for name in used)


def _pair(text: str) -> tuple[int, int]:
    rows, columns = map(int, text.split(", "))
    return rows, columns
