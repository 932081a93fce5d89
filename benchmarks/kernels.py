"""The kernels on one GPU: `python -m benchmarks.kernels [--stage ...] [--out FILE.json]`.

Needs torch, triton, einops and safetensors, no ComfyUI and no git; builds nothing. Two commands of
at most eight minutes measure everything, the second adds to the first one's file:

    python -m benchmarks.kernels --out FILE.json --stage correctness cold forward
    python -m benchmarks.kernels --out FILE.json --stage backward others

and `--stage variants` every variant of the forward side by side. correctness: every operation
against float64; cold: the first calls of a new user, and the ceilings (matrix product, copy);
forward: for each case exact attention of others, ours part by part and as the WHOLE replaced call,
memory. Each job runs in a process of its own, and the file is written after each: what crashes
costs itself. What does not fit into --minutes is left out and named. --quick takes the smallest
case alone. Random inputs, larger than the cache. With --device cpu it runs at small sizes in plain
PyTorch, to test this program.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import ROOT, baselines, load_pack
from .adapters import layer_inputs, random_adapter
from .correctness import errors, kinds
from .gpu import Stopwatch, clocks, machine
from .kernels_report import table, targets

attention, ops = load_pack(".attention"), load_pack(".kernels.ops")
types, tuning = load_pack(".kernels.types"), load_pack(".kernels.tuning")
STAGES = ("correctness", "cold", "forward", "backward", "others", "variants")
GRACE = 60.0  # seconds that a job may end after its time


@dataclass(frozen=True)
class Case:
    """One attention layer of a model at a resolution; sparsities are shares of blocks left out."""

    name: str
    grid: tuple[int, int, int]
    heads: int
    sparsities: tuple[float, ...] = (0.80, 0.90, 0.95, 0.97)
    text: int = 0
    order: str = "cube"
    width: int = 128

    @property
    def tokens(self) -> int:
        return math.prod(self.grid) + self.text


# The most important first: what time does not allow is left out at the end.
CASES = (
    Case("Wan 720p", (21, 45, 80), 40),
    Case("HunyuanVideo 720p", (33, 45, 80), 24, text=256),
    Case("Wan 480p", (21, 30, 52), 12),
    Case("109,632 tokens, 64 of 1,713 blocks", (1713, 8, 8), 7, (1 - 64.5 / 1713,), order="raster"),
)
QUICK = (Case("Wan 480p", (21, 30, 52), 12, (0.90,)),)
CPU = (Case("small", (4, 16, 16), 2, (0.80, 0.90), text=40),)
CALIBRATE_EVERY = load_pack(".attention.plan").CALIBRATE_EVERY
BLOCK, FINE_BLOCK, DEFAULT_SPARSITY = 64, 16, 0.90
TRAINED, FINE = "ropeslr + adapter", f"ropeslr, key blocks of {FINE_BLOCK}"


class Run:
    """One run of the benchmark: its device, its clock, and the record that it fills."""

    def __init__(self, device: torch.device, minutes: float, seconds: float, least: int) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        # By name on a GPU: a kernel that fails must show as an error, not be stood in for.
        self.backend = {"backend": "triton" if device.type == "cuda" else "pytorch"}
        self.watch = Stopwatch(device, seconds, least)
        self.ends = time.monotonic() + 60 * minutes
        self.record: dict = {"skipped": []}

    def has_time(self, what: str, seconds: float = 0.0) -> bool:
        """Whether something that takes about so long still ends in time."""
        if time.monotonic() + seconds < self.ends:
            return True
        self.record["skipped"].append(what)
        return False

    def measure(self, call: Callable[[int], object]) -> dict:
        """Milliseconds, or the first line of the error."""
        try:
            found = self.watch.time(call)
        except Exception as error:
            failed = {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}
        else:
            failed = None
        if failed:  # here the failed call's tensors are free
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            return failed
        return {"ms": found.median, "low": found.low, "high": found.high, "samples": found.samples}

    def guarded(self, what: Callable[[], dict]) -> dict:
        """What it returns, or the error: one failure must not cost the whole record."""
        try:
            return what()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {str(error)[:500]}"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="write the measurements to this JSON file, stage by stage")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES[:-1])
    parser.add_argument("--quick", action="store_true", help="one case, one sparsity")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="begin nothing new after so many"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)  # one job: its part goes into --out
    options = parser.parse_args()
    cases = cases_of(options)
    if options.child:
        child(options, cases)
        return
    device, record = torch.device(options.device), new_record(torch.device(options.device))
    if options.out and Path(options.out).exists():  # a later command adds its stages
        known = json.loads(Path(options.out).read_text(encoding="utf-8"))
        if known.get("commit") == record["commit"] and known["machine"] == record["machine"]:
            record |= known
    ends = time.monotonic() + 60 * options.minutes
    for stage in options.stage:
        for name in jobs(stage, cases, device):
            left = ends - time.monotonic()
            if left <= 0:
                record["skipped"].append(f"{stage} {name}".strip())
                continue
            part = in_a_child(options, f"{stage}:{name}", left + GRACE)
            merge(record, stage, name, part, cases)
            print(f"# {stage} {name} done", file=sys.stderr, flush=True)
            record["clocks_at_end"] = clocks()
            record["targets"] = targets(record)
            if options.out:
                text = json.dumps(record, indent=1) + "\n"
                Path(options.out).write_text(text, encoding="utf-8")
    print(table(record))


def cases_of(options: argparse.Namespace) -> tuple[Case, ...]:
    if not options.device.startswith("cuda"):
        return CPU
    return QUICK if options.quick else CASES


def new_record(device: torch.device) -> dict:
    return {
        "benchmark": "kernels",
        **machine(device),
        "skipped": [],
        "cold_start": {},
        "errors": {},
        "ceilings": {},
        "variants": [],
        "cases": [],
    }


def jobs(stage: str, cases: tuple[Case, ...], device: torch.device) -> list[str]:
    """What a stage consists of, each in a process of its own; "" for the whole of it."""
    if stage == "correctness":
        return list(kinds(device))
    if stage in ("cold", "variants"):
        return [""]
    if stage == "others":
        return [case.name for case in cases if baselines.sparse(device)]
    return [case.name for case in cases]


def in_a_child(options: argparse.Namespace, job: str, seconds: float) -> dict:
    """The part of the record that one job gives; what it had written is kept when it fails."""
    with tempfile.TemporaryDirectory(prefix="ropeslr-") as folder:
        part = Path(folder) / "part.json"
        command = [sys.executable, "-m", "benchmarks.kernels", "--child", job, "--out", str(part)]
        command += ["--device", options.device, "--minutes", str((seconds - GRACE) / 60)]
        command += ["--quick"] * options.quick
        # An empty cache of compiled kernels shows what a new user waits for; the stages share it.
        failed = ""
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=seconds)
            if done.returncode:
                failed = f"the process ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            failed = f"took longer than {seconds:.0f} s"
        found = json.loads(part.read_text(encoding="utf-8")) if part.exists() else {}
    return found | ({"error": failed} if failed else {})


def merge(record: dict, stage: str, name: str, part: dict, cases: tuple[Case, ...]) -> None:
    """Put a job's part where it belongs."""
    record["skipped"] += part.pop("skipped", [])
    if stage == "correctness":
        record["errors"] |= part.pop("errors", {})
        if "error" in part:
            infinite = {"error": float("inf"), "limit": 1.0, "error_text": part["error"]}
            record["errors"][f"failed {name}"] = infinite
    elif stage == "cold":
        record |= {key: part[key] for key in ("cold_start", "ceilings") if key in part}
        record["cold_start"] |= {key: x for key, x in part.items() if key == "error"}
    elif stage == "variants":
        record["variants"] = part.get("variants", [])
    else:
        (case,) = [case for case in cases if case.name == name]
        known = next((x for x in record["cases"] if x["case"] == name), None)
        if known is None:
            known = {
                "case": name,
                "tokens": case.tokens,
                "heads": case.heads,
                "width": case.width,
            }
            record["cases"].append(known)
        known |= part


def child(options: argparse.Namespace, cases: tuple[Case, ...]) -> None:
    """One job, its part written after each of its steps."""
    device, (stage, _, name) = torch.device(options.device), options.child.partition(":")
    on_gpu = device.type == "cuda"
    run = Run(device, options.minutes, 1.0 if on_gpu else 0.1, 20 if on_gpu else 3)
    if on_gpu:
        torch.cuda.set_device(device)

    def write(part: dict) -> None:
        Path(options.out).write_text(
            json.dumps(part | {"skipped": run.record["skipped"]}), encoding="utf-8"
        )

    case = next((case for case in cases if case.name == name), cases[0])
    with torch.inference_mode():
        if stage == "correctness":
            write({"errors": errors(device, name)})
        elif stage == "cold":
            with tempfile.TemporaryDirectory(prefix="ropeslr-triton-") as folder:
                os.environ["TRITON_CACHE_DIR"] = folder
                found = {"cold_start": run.guarded(lambda: cold_start(run, case))}
                write(found)
                write(found | {"ceilings": run.guarded(lambda: ceilings(run))})
        elif stage == "variants":
            write({"variants": variants(run, case)})
        elif stage == "forward":
            measure_case(run, case, write)
        elif stage == "backward":
            write({"backward": run.guarded(lambda: backward(run, case))})
        elif stage == "others":
            write({"others": others(run, case)})


def variants(run: Run, case: Case) -> list[dict]:
    """Every variant of the forward side by side, each tried in a process of its own."""
    if run.device.type != "cuda":
        return []
    trial = tuning.Trial(str(run.device), math.prod(case.grid), case.heads, case.width)
    found = tuning.run_trials(tuning.short_list(run.device), trial)
    return [{**asdict(each), "name": each.variant.name} for each in found.outcomes]


def others(run: Run, case: Case) -> dict:
    """Other packages' sparse attention at every sparsity."""
    sets, found = inputs(run, case), {}
    for sparsity in case.sparsities:
        row = found[str(sparsity)] = {}
        for name, call in baselines.sparse(run.device).items():

            def other(turn: int, call: Callable = call, keep: float = 1 - sparsity):
                return call(*sets[turn % len(sets)], keep)

            row[name] = run.measure(other)
    return found


def inputs(run: Run, case: Case, requires_grad: bool = False) -> list[tuple[Tensor, ...]]:
    """q, k, v as the host hands them over, in enough sets to be twice the size of the cache."""
    size = 3 * case.tokens * case.heads * case.width * torch.finfo(run.dtype).bits // 8
    cache = (
        torch.cuda.get_device_properties(run.device).L2_cache_size
        if run.device.type == "cuda"
        else 0
    )
    shape = (1, case.tokens, case.heads, case.width)
    return [
        tuple(
            torch.randn(
                shape, device=run.device, dtype=run.dtype, requires_grad=requires_grad
            ).transpose(1, 2)
            for _ in range(3)
        )
        for _ in range(max(1, -(-2 * cache // size)))
    ]


def layout_of(case: Case):
    return attention.TokenLayout(case.grid, after=case.text, order=case.order)


def whole_call(
    run: Run, case: Case, sets: list, method: str, sparsity: float, calibrate: str = "first step"
) -> Callable:
    """Everything that replaces one dense call, by the code that the node runs."""
    adapter, given = None, attention.LayerInputs()
    if method in ("rola", "sla", TRAINED):
        method = method.removesuffix(" + adapter")
        adapter = random_adapter(method, case.heads, case.width, run.device)
        given = layer_inputs(case.grid, case.tokens, case.heads, case.width, run.dtype, run.device)
    key_block = "auto"
    if method == FINE:
        method, key_block = "ropeslr", str(FINE_BLOCK)
    plan = attention.SparsePlan(
        method=method,
        sparsity=sparsity,
        calibrate=calibrate,
        key_block=key_block,
        **run.backend,
    )
    session = attention.AttentionRun(plan.resolve(adapter))
    layout, call = layout_of(case), attention.AttentionCall
    return lambda turn: session.attend(
        *sets[turn % len(sets)], call(layout, step=turn, inputs=given)
    )


def measure_case(run: Run, case: Case, write: Callable[[dict], None]) -> dict:
    """Exact attention and ours, forward, of one case; written as it goes."""
    sets = inputs(run, case)
    found: dict = {"rows": []}
    # One shape is enough for what is compiled anew for each.
    exact = baselines.dense(run.device, compiled=case is CASES[0] or run.device.type != "cuda")
    found["dense"] = {
        name: run.measure(lambda turn, f=attend: f(*sets[turn % len(sets)]))
        for name, attend in exact.items()
    }
    known = [row["ms"] for row in found["dense"].values() if "ms" in row]
    found["dense_ms"] = min(known) if known else None
    write(found)
    for sparsity in case.sparsities:
        if run.has_time(f"{case.name} at {sparsity:.2f}"):
            row = {"sparsity": sparsity}
            found["rows"].append(row)
            row |= run.guarded(
                lambda s=sparsity: measure_sparsity(run, case, sets, s, found["dense_ms"])
            )
            write(found)
    return found


def measure_sparsity(
    run: Run, case: Case, sets: list, sparsity: float, dense_ms: float | None
) -> dict:
    """Parts, whole calls, memory and other packages at one sparsity."""
    row: dict = {"whole": {}}
    row |= parts(run, case, sets, sparsity, BLOCK)
    if sparsity == DEFAULT_SPARSITY:
        row["fine"] = parts(run, case, sets, sparsity, FINE_BLOCK)
    density = row["density"]
    pairs = math.prod(case.grid) * case.tokens
    row["kept_tflop"] = 4e-12 * pairs * density * case.width * case.heads
    for method in ("ropeslr", FINE, "top-k", "top-k plain", TRAINED, "adaspa", "rola", "sla"):
        row["whole"][method] = run.measure(whole_call(run, case, sets, method, sparsity))
    for method, name in (("ropeslr", "ropeslr_ms"), (FINE, "fine_ms")):
        calibrating = run.measure(whole_call(run, case, sets, method, sparsity, "every step"))
        row["whole"][f"{method}, calibrating"] = calibrating
        plain = row["whole"][method]
        if "ms" in plain and "ms" in calibrating:
            row[name] = plain["ms"] + (calibrating["ms"] - plain["ms"]) / CALIBRATE_EVERY
    if "ropeslr_ms" in row and dense_ms:
        row["times_dense"] = dense_ms / row["ropeslr_ms"]
        row["sparse_efficiency"] = row["times_dense"] * density
    if "ropeslr_ms" in row and all("ms" in part for part in row["parts"].values()):
        ms = {name: part["ms"] for name, part in row["parts"].items()}
        beside = ms["block_pool"] + ms["block_pool_state"] + ms["block_select"]
        beside += max(ms["sparse + background"] - ms["sparse"], 0)
        row["share_of_routing_and_background"] = beside / row["ropeslr_ms"]
        row["kept_tflops"] = row["kept_tflop"] / ms["sparse"] * 1e3
    row["memory_mb"] = run.guarded(lambda: memory(run, case, sets, sparsity))
    return row


def parts(run: Run, case: Case, sets: list, sparsity: float, key_block: int) -> dict:
    """The density with key blocks of so many tokens, and what each part of a call takes."""
    on = run.backend
    blocks = layout_of(case).blocks(device=run.device, key_block=key_block)
    topk = attention.SparsePlan(sparsity=sparsity).resolve().topk(blocks.num_ranked)
    scale = case.width**-0.5
    video = [(q[:, :, : math.prod(case.grid)], k, v) for q, k, v in sets]

    def at(turn: int) -> tuple[Tensor, Tensor, Tensor]:
        return video[turn % len(video)]

    q, k, v = at(0)
    pooled_q = ops.block_pool(q, blocks.q_blocks, **on)
    pooled_k, v_mean, cov = ops.block_pool_state(k, v, blocks, **on)
    routing = (pooled_q, pooled_k, blocks, topk)
    mask, dropped_lse = ops.block_select(*routing, **on)
    ones = torch.ones(q.shape[:2], device=run.device)
    gate = types.Gate(dropped_lse, ones, torch.zeros_like(ones))
    channel_scale = torch.full(v_mean.shape, scale, device=run.device)
    mixed = types.Background(gate, types.FirstOrder(v_mean, cov, channel_scale))
    far = types.PooledKV(pooled_k, ops.block_pool(v, blocks.kv_blocks, **on))
    calls: dict[str, Callable[[int], object]] = {
        "block_pool": lambda turn: ops.block_pool(at(turn)[0], blocks.q_blocks, **on),
        "block_pool_state": lambda turn: ops.block_pool_state(*at(turn)[1:], blocks, **on),
        "block_select": lambda turn: ops.block_select(*routing, **on),
        "sparse": lambda turn: ops.block_sparse_attention(*at(turn), mask, **on),
        "sparse + pooled": lambda turn: ops.block_sparse_attention(*at(turn), mask, far, **on),
        "sparse + background": lambda turn: ops.block_sparse_mixed(*at(turn), mask, mixed, **on),
    }
    found: dict = {"density": blocks.density(topk)}
    found["parts"] = {name: run.measure(call) for name, call in calls.items()}
    if run.device.type == "cuda" and key_block == BLOCK:
        found["token_order"] = token_order(run, at, mask)
    return found


def token_order(run: Run, at: Callable, mask) -> dict:
    """The cost of reading tokens through block tables, and of permuting q, k, v and out instead."""
    in_order = [
        types.TokenBlocks.cut(torch.arange(each.num_tokens, device=run.device), each.block_size)
        for each in (mask.q_blocks, mask.kv_blocks)
    ]
    raster = types.BlockMask(*in_order, mask.kv_indices, mask.kv_num_blocks, trusted=True)
    order = mask.q_blocks.slots[: mask.q_blocks.num_listed]
    return {
        "sparse, tokens as they lie": run.measure(
            lambda turn: ops.block_sparse_attention(*at(turn), raster, **run.backend)
        ),
        "permuting q, k, v and out": run.measure(
            lambda turn: [x.index_select(2, order) for x in (*at(turn), at(turn)[0])]
        ),
    }


def memory(run: Run, case: Case, sets: list, sparsity: float) -> dict:
    """MB above the inputs: at the peak of a calibrating and of a usual call, and kept per layer.

    The output counts.
    """
    if run.device.type != "cuda":
        return {}
    plan = attention.SparsePlan(sparsity=sparsity, **run.backend).resolve()
    session, layout, call = attention.AttentionRun(plan), layout_of(case), attention.AttentionCall

    def peak(layer: int, step: int) -> float:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        session.attend(*sets[0], call(layout, layer, step))
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    session.attend(*sets[0], call(layout))  # blocks are made once for a run, not for a layer
    before = torch.cuda.memory_allocated()
    calibrating = peak(1, 0)
    kept = (torch.cuda.memory_allocated() - before) / 1e6
    return {"peak calibrating": calibrating, "peak": peak(1, 1), "kept": kept}


def backward(run: Run, case: Case, sparsity: float = 0.95) -> dict:
    """Gradients against those of exact attention: time of forward and backward less forward."""
    with torch.inference_mode(False), torch.enable_grad():
        sets = inputs(
            run, Case(case.name, case.grid, case.heads, width=case.width, order=case.order), True
        )
        layout = layout_of(Case(case.name, case.grid, case.heads, order=case.order))
        blocks = layout.blocks(device=run.device)
        topk = attention.SparsePlan(sparsity=sparsity).resolve().topk(blocks.num_ranked)
        with torch.no_grad():
            pooled = [ops.block_pool(x, blocks.kv_blocks, **run.backend) for x in sets[0][:2]]
            mask, _ = ops.block_select(*pooled, blocks, topk, **run.backend)
        gradient = torch.randn_like(sets[0][0])

        def both(attend: Callable) -> Callable[[int], object]:
            def call(turn: int) -> object:
                q, k, v = sets[turn % len(sets)]
                return torch.autograd.grad(attend(q, k, v), (q, k, v), gradient)

            return call

        found: dict = {"sparsity": sparsity, "density": blocks.density(topk)}
        for name, attend in {
            **{n: f for n, f in baselines.dense(run.device).items() if n.startswith("sdpa")},
            "ours": lambda q, k, v: ops.block_sparse_attention(q, k, v, mask, **run.backend)[0],
        }.items():
            forward = run.measure(lambda turn, f=attend: f(*sets[turn % len(sets)]))
            whole = run.measure(both(attend))
            failed = next((x for x in (forward, whole) if "error" in x), None)
            found[name] = failed or {
                "forward_ms": forward["ms"],
                "both_ms": whole["ms"],
                "backward_ms": whole["ms"] - forward["ms"],
            }
    dense = [
        x["backward_ms"] for n, x in found.items() if n.startswith("sdpa") and "backward_ms" in x
    ]
    if dense and "backward_ms" in found["ours"]:
        found["efficiency"] = min(dense) / found["ours"]["backward_ms"] * found["density"]
    return found


def ceilings(run: Run) -> dict:
    """What this device reaches at best: a large matrix product, and copying."""
    side, bytes_ = (8192, 1 << 30) if run.device.type == "cuda" else (512, 1 << 22)
    a, b = (torch.randn(side, side, device=run.device, dtype=run.dtype) for _ in range(2))
    source = torch.empty(bytes_, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    product, copy = run.watch.time(lambda _: a @ b), run.watch.time(lambda _: target.copy_(source))
    return {
        "matmul_tflops": 2e-9 * side**3 / product.median,
        "copy_gb_per_s": 2e-6 * bytes_ / copy.median,
    }


def cold_start(run: Run, case: Case) -> dict:
    """Seconds of the first calls with nothing compiled, and of later lengths, sparsities, ranks."""

    def first_call(grid: tuple[int, int, int], sparsity: float, rank: int) -> float:
        sets = inputs(run, Case(case.name, grid, case.heads, text=case.text))
        plan = attention.SparsePlan(sparsity=sparsity, rank=rank, **run.backend).resolve()
        session = attention.AttentionRun(plan)
        started = time.perf_counter()
        for step in range(2):  # the first calibrates, the second is fused
            layout = layout_of(Case(case.name, grid, case.heads, text=case.text))
            session.attend(*sets[0], attention.AttentionCall(layout, step=step))
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    t, h, w = case.grid
    return {
        "seconds": first_call(case.grid, 0.9, 0),
        "same_again": first_call(case.grid, 0.9, 0),
        "another_length": first_call((t, h, w - 2), 0.9, 0),
        "another_sparsity": first_call(case.grid, 0.83, 0),
        "another_rank": first_call(case.grid, 0.9, 24),
    }


if __name__ == "__main__":
    main()
