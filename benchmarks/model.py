"""What compiled kernels should reach, estimated: `python -m benchmarks.model [--out FILE.json]`.

Reads the compile record (benchmarks/results/compile.json), so it needs neither Triton nor a GPU.

An ESTIMATE, from instructions that were compiled and rates from data sheets; nothing runs on a GPU.
A simulation of one quarter of a multiprocessor (four warp schedulers behave alike) runs the warps
of its resident programs through the tiles of the forward's loop: issue slots, exponentials, tensor
cores, shared memory and memory are queues, and a tile can only be worked on once it is there. Load
latency, memory bandwidth to a multiprocessor and how far tensor cores reach their rate are guesses,
the same for all kernels; the anchors show what they say about kernels that others measured.
"""

from __future__ import annotations

import argparse
import datetime
import heapq
import itertools
import json
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import ROOT


class Chip(NamedTuple):
    """Rates of a GPU under load."""

    target: str
    multiprocessors: int
    clock: float  # GHz
    flops: int  # bf16 with float32 sums, a clock and multiprocessor
    memory: float  # bytes a clock and multiprocessor, from the cache
    latency: int  # clocks until a tile from there has arrived
    int8: float = 2.0  # products of 8 bits, in units of bf16's
    fp8: float = 2.0  # with float32 sums

    def tflops(self, flops_per_clock: float) -> float:
        return flops_per_clock * self.multiprocessors * self.clock * 1e-3


CHIPS = {
    "A100": Chip("cuda:80", 108, 1.41, 2048, 34, 500),
    "RTX 4090": Chip("cuda:89", 128, 2.60, 512, 20, 550, 4.0),
    "H100": Chip("cuda:90", 132, 1.62, 4096, 40, 650),
    "H200": Chip("cuda:90", 132, 1.65, 4096, 40, 650),
    "RTX 5090": Chip("cuda:120", 170, 2.50, 512, 20, 600, 4.0),
    "RTX PRO 5000": Chip("cuda:120", 110, 2.36, 1024, 20, 600),
}
FP8_TARGETS = ("cuda:89", "cuda:90", "cuda:120")
REACHED = 0.95  # of the tensor cores' rate
PRODUCT_LATENCY = 40
SHARED = 128  # bytes a clock and multiprocessor
EXP2 = 8  # clocks of a scheduler for one warp's exponentials
PROLOGUE, EPILOGUE = 1800, 1500  # clocks of a program beside its loop
STALL = 1.15  # clocks an instruction takes its own warp, beyond the slot
CHUNK = 16  # instructions that are issued before another warp may come in between


@dataclass(frozen=True)
class Program:
    """A kernel as the simulation knows it. Instructions are of one warp and tile."""

    rows: int
    keys: int
    warps: int
    resident: int  # programs on a multiprocessor at a time
    before: int
    between: int
    after: int
    exp2: int
    depth: int  # tiles that are asked for ahead
    shared_bytes: int = 0  # of one warp and tile
    head_dim: int = 128
    asynchronous: bool = False  # a warp goes on while its product runs
    overlap: bool = False  # the softmax of a tile runs beside the product of the one before
    early: bool = False  # the next keys are asked for as soon as the present ones are used
    scores_rate: float = 1.0  # in units of bf16's
    values_rate: float = 1.0
    bytes_per_number: float = 2.0

    @classmethod
    def of(cls, row: dict[str, Any], chip: Chip) -> Program:
        """What was compiled, a row of the record; tiles of 64 keys of 128 channels."""
        loop, small = row["loop"], row["case"].startswith("8-bit")
        hopper = row["target"] == "cuda:90"
        fp8 = row["target"] in FP8_TARGETS
        return cls(
            rows=128 if "wide" in row["case"] else 64,
            keys=64,
            warps=row["warps"],
            resident=max(1, row["blocks_per_sm"]),
            before=loop["before"],
            between=loop["between"],
            after=loop["after"],
            exp2=loop["exp2"],
            depth=max(1, loop["buffers"]),
            shared_bytes=0 if hopper else loop["shared_bytes"],
            asynchronous=hopper,
            scores_rate=chip.int8 if small else 1.0,
            values_rate=(chip.fp8 if fp8 else chip.int8) if small else 1.0,
            bytes_per_number=1.0 if small else 2.0,
        )


class Queue:
    """One at a time, in the order in which they come."""

    def __init__(self) -> None:
        self.free = 0.0

    def use(self, now: float, clocks: float) -> float:
        """-> when it is done."""
        self.free = max(now, self.free) + clocks
        return self.free


class Machine:
    """The queues of a quarter of a multiprocessor, and of what its quarters share."""

    def __init__(self, chip: Chip, program: Program) -> None:
        self.chip, self.program = chip, program
        self.issue, self.tensor, self.memory, self.shared = (Queue() for _ in range(4))
        p = program
        per_quarter = p.warps / 4
        flops = 2 * p.rows * p.keys * p.head_dim
        # The whole multiprocessor's rate, for this quarter's share of a program's product.
        self.product = flops / chip.flops / REACHED / per_quarter
        self.tile_bytes = p.keys * p.head_dim * p.bytes_per_number

    def instructions(self, now: float, count: float) -> Generator[float, float, float]:
        """Issue so many of one warp, a chunk at a time."""
        while count > 0:
            some = min(CHUNK, count)
            now = max(self.issue.use(now, some), now + some * STALL)
            count -= some
            yield now
        return now

    def fetch(self, now: float) -> float:
        """When a tile that is asked for now has arrived."""
        return self.memory.use(now, self.tile_bytes / self.chip.memory) + self.chip.latency


class Tiles:
    """When the keys and values of a program's tiles arrive; its warps use up tiles together."""

    def __init__(self, machine: Machine, started: float) -> None:
        self.machine, self.depth = machine, machine.program.depth
        first = started + PROLOGUE / 2
        self.keys = {i: machine.fetch(first) for i in range(self.depth)}
        self.values = {i: machine.fetch(first) for i in range(self.depth)}
        self.users: dict[tuple[str, int], int] = {}

    def used(self, kind: str, tile: int, now: float) -> None:
        """A warp is done with a tile; the last one's asking brings the next into its buffer."""
        count = self.users[kind, tile] = self.users.get((kind, tile), 0) + 1
        if count == max(1, self.machine.program.warps // 4):
            store = self.keys if kind == "keys" else self.values
            store[tile + self.depth] = self.machine.fetch(now)


def warp(machine: Machine, tiles: Tiles, now: float, count: int) -> Generator[float, float, float]:
    """One warp of a quarter, from a program's start to its end; yields when it wants to go on."""
    p = machine.program
    yield (now := now + PROLOGUE)
    finished = now  # the product of values that is under way
    for tile in range(count):
        now = yield from machine.instructions(now, p.before)
        while tile not in tiles.keys:
            yield (now := now + CHUNK)
        yield (now := max(now, tiles.keys[tile]))
        now = yield from _product(machine, now, p.scores_rate)
        yield (now := now + PRODUCT_LATENCY)
        if p.early:
            tiles.used("keys", tile, now)
        quarter = p.between / 4
        for _ in range(4):
            begun = now
            now = yield from machine.instructions(now, quarter)
            yield (now := max(now, begun + p.exp2 / 4 * EXP2))
        while tile not in tiles.values:
            yield (now := now + CHUNK)
        yield (now := max(now, tiles.values[tile]))
        if p.overlap:
            yield (now := max(now, finished))
        done = yield from _product(machine, now, p.values_rate)
        done += PRODUCT_LATENCY
        if not (p.asynchronous or p.overlap):
            yield (now := done)
        now = yield from machine.instructions(now, p.after)
        if not p.overlap:
            yield (now := max(now, done))
        finished = done
        if not p.early:
            tiles.used("keys", tile, now)
        tiles.used("values", tile, max(now, done))
    return max(now, finished) + EPILOGUE


def _product(machine: Machine, now: float, rate: float) -> Generator[float, float, float]:
    """A product of a tile: -> when it is done, its operands from shared memory included."""
    done = machine.tensor.use(now, machine.product / rate)
    traffic = machine.program.shared_bytes
    if traffic:
        done = max(done, machine.shared.use(now, 4 * traffic / 2 / SHARED))
    if not machine.program.asynchronous:
        yield (now := done)
    return done


def flops_per_clock(chip: Chip, program: Program, tiles: int = 118, waves: int = 4) -> float:
    """Of one multiprocessor, on programs of `tiles` tiles each."""
    machine = Machine(chip, program)
    per_quarter = max(1, program.warps // 4)
    left = program.resident * waves
    total, ended = left, 0.0
    events: list[tuple[float, int, Generator[float, float, float], list[int]]] = []
    number = itertools.count()

    def start(now: float) -> None:
        shared, live = Tiles(machine, now), [per_quarter]
        for _ in range(per_quarter):
            heapq.heappush(events, (now, next(number), warp(machine, shared, now, tiles), live))

    for i in range(program.resident):
        start(37.0 * i)
        left -= 1
    while events:
        _, _, running, live = heapq.heappop(events)
        try:
            heapq.heappush(events, (next(running), next(number), running, live))
        except StopIteration as stop:
            ended = max(ended, stop.value)
            live[0] -= 1
            if live[0] == 0 and left:
                left -= 1
                start(stop.value)
    return 4 * program.rows * program.keys * program.head_dim * tiles * total / ended


def estimate(chip: Chip, program: Program) -> float:
    """TFLOPS on kept blocks."""
    return chip.tflops(flops_per_clock(chip, program))


# What others measured, with instruction counts of such kernels as far as those can be known:
# compiled sketches of the same scheme, or their own listings.
ANCHORS = {
    "ThunderKittens VSA 64x64, H100": (
        "H100",
        Program(64, 64, 4, 4, 20, 271, 30, 34, 1, asynchronous=True, early=True),
        524,
    ),
    "FlashAttention 3 dense, H100": (
        "H100",
        Program(128, 128, 8, 1, 20, 500, 40, 66, 2, asynchronous=True, overlap=True, early=True),
        630,
    ),
    "FlashAttention 2 dense, RTX 4090": (
        "RTX 4090",
        Program(128, 64, 4, 1, 30, 560, 30, 68, 1, shared_bytes=49152, early=True),
        164,
    ),
    "FlashAttention 2 dense, A100": (
        "A100",
        Program(128, 64, 4, 1, 30, 560, 30, 68, 1, shared_bytes=49152, early=True),
        204,
    ),
    "FastVideo's Triton 64x64, RTX PRO 5000": (
        "RTX PRO 5000",
        Program(64, 64, 4, 1, 60, 780, 46, 34, 1, shared_bytes=45000),
        128,
    ),
}
SHOWN = ("A100", "RTX 4090", "H200", "RTX 5090")
CASES = ("mixed", "fine mixed", "wide mixed", "8-bit fine mixed", "8-bit wide mixed")


def anchors() -> list[dict[str, Any]]:
    rows = []
    for name, (chip, program, measured) in ANCHORS.items():
        found = estimate(CHIPS[chip], program)
        rows.append(
            {
                "anchor": name,
                "estimate": round(found),
                "measured": measured,
                "off_percent": round(100 * (found / measured - 1)),
            }
        )
    return rows


# The bar of the field: 104,000 tokens, 56 heads of 128, 10 % of the blocks and a pooled tail, on an
# RTX 5090: ComfyUI's own INT8 top-k, and dense bf16 attention, in milliseconds, by its authors.
FIELD = {
    "chip": "RTX 5090",
    "tokens": 104_000,
    "heads": 56,
    "kept": 0.10,
    "ms": 99,
    "dense_ms": 1440,
}


def milliseconds(layer: dict[str, Any], tflops: float) -> float:
    """Of the kept blocks of a layer with heads of 128, at that rate."""
    flops = 4.0 * layer["tokens"] ** 2 * 128 * layer["heads"] * layer["kept"]
    return flops / tflops * 1e-9


def beside_the_field(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What our kept blocks alone should take there, in 16 and in 8 bits."""
    return [
        FIELD | {"case": row["case"], "ours_ms": round(milliseconds(FIELD, row["tflops"]))}
        for row in found
        if row["chip"] == FIELD["chip"] and row["case"] in ("wide mixed", "8-bit wide mixed")
    ]


def estimates(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the kernels in a compile record, on the chips that are shown."""
    rows = []
    for name in SHOWN:
        chip = CHIPS[name]
        for case in CASES:
            for row in record["rows"]:
                if (row["target"], row["case"]) == (chip.target, case) and row["loop"]:
                    found = estimate(chip, Program.of(row, chip))
                    rows.append({"chip": name, "case": case, "tflops": round(found)})
    return rows


LAYER = {"tokens": 75_600, "heads": 40, "kept": 0.10}  # of Wan 14B at 720p
COUNTINGS = 7  # of a row, until its threshold is found: 5 to 9, simulated on all kinds of scores
TURN = 115  # instructions between two countings


def selection(record: dict[str, Any], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What choosing units of 16 takes, and its share of what the kept blocks take, per row size.

    Every scheduler is taken to issue an instruction a clock: rows are many and know no barrier.
    """
    rows, chunks = [], -(-LAYER["tokens"] // (16 * 512))
    for name in SHOWN:
        chip = CHIPS[name]
        rates = {row["case"]: row["tflops"] for row in found if row["chip"] == name}
        for row in record["rows"]:
            if (row["target"], row["case"]) != (chip.target, "select") or "passes" not in row:
                continue
            first, counting, *_, last, _ = row["passes"]
            each = chunks * (first + COUNTINGS * counting + last) + COUNTINGS * TURN
            for size, case in ((64, "fine mixed"), (128, "wide mixed")):
                number = LAYER["heads"] * -(-LAYER["tokens"] // size)
                ms = number * each / (4 * chip.multiprocessors * chip.clock * 1e6)
                share = ms / milliseconds(LAYER, rates[case])
                own = {"ms": round(ms, 2), "share_percent": round(100 * share, 1)}
                rows.append({"chip": name, "rows": size} | own)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results = ROOT / "benchmarks" / "results"
    parser.add_argument("--record", default=results / "compile.json", help="of benchmarks.compile")
    parser.add_argument("--out", help="write the estimates to this JSON file")
    options = parser.parse_args()
    with open(options.record, encoding="utf-8") as file:
        record = json.load(file)
    found = {"anchors": anchors(), "estimates": estimates(record)}
    found["field"] = beside_the_field(found["estimates"])
    found["selection"] = selection(record, found["estimates"])
    print("Estimates, TFLOPS on kept blocks at 118 tiles of 64 keys a row. Nothing was run.")
    for row in found["estimates"]:
        print(f"{row['chip']:>12} {row['case']:>18} {row['tflops']:>6}")
    print("Choosing units of 16 in a layer of Wan 14B at 720p, beside its kept blocks.")
    for row in found["selection"]:
        print(f"{row['chip']:>12} {row['rows']:>4} rows {row['ms']} ms {row['share_percent']} %")
    print("Anchors: what others measured, beside what this says of such kernels.")
    for row in found["anchors"]:
        off = row["off_percent"]
        print(f"{row['anchor']:>40} {row['estimate']:>6} {row['measured']:>6} {off:>+4} %")
    if options.out:
        date = datetime.date.today().isoformat()
        head = {"benchmark": "model", "date": date, "commit": record["commit"]}
        with open(options.out, "w", encoding="utf-8") as file:
            file.write(json.dumps(head | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
