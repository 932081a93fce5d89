"""The PyTorch path against dense SDPA on this CPU: `python -m benchmarks.cpu [--out FILE.json]`.

Every row is the WHOLE replaced call: routing, kept blocks, background, mixing, and calibration as
often as a run makes it (once in five calls); adaspa between its searches; rola and sla with random
weights; "ropeslr, 16" with key blocks of 16 tokens. "kernel" is the sparse kernel alone. Times are
medians of interleaved runs, ratios within one run; random inputs, which cost what any inputs cost.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import commit, load_pack
from .adapters import layer_inputs, random_adapter

attention = load_pack(".attention")
ops = load_pack(".kernels.ops")

GRIDS = {4096: (4, 32, 32), 8192: (8, 32, 32)}
SPARSITIES = (0.80, 0.90, 0.95)
HEADS, WIDTH = 4, 128
CALIBRATE_EVERY = load_pack(".attention.plan").CALIBRATE_EVERY
FINE = "ropeslr, 16"  # key blocks of 16 tokens
METHODS = ("ropeslr", FINE, "top-k", "top-k plain", "adaspa", "rola", "sla")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument(
        "--tokens", type=int, nargs="+", choices=sorted(GRIDS), default=sorted(GRIDS)
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="write the measurements to this JSON file")
    options = parser.parse_args()
    rows = []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {HEADS} heads of {WIDTH}")
    print(f"{'':>9} {'':>7} {'dense':>9} {'':>9}   times faster than dense SDPA")
    print(
        f"{'dtype':>9} {'tokens':>7} {'ms':>9} {'sparsity':>9}",
        *(f"{name:>11}" for name in ("kernel", *METHODS)),
    )
    for dtype in options.dtypes.split(","):
        for tokens in options.tokens:
            rows += measure(tokens, getattr(torch, dtype), options.repeats)
    if options.out:
        record = {
            "benchmark": "cpu",
            "date": datetime.date.today().isoformat(),
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit(),
            "rows": rows,
        }
        with open(options.out, "w", encoding="utf-8") as file:
            file.write(json.dumps(record, indent=1) + "\n")


def measure(tokens: int, dtype: torch.dtype, repeats: int) -> list[dict]:
    """All sparsities of one length."""
    generator = torch.Generator().manual_seed(0)
    # As the host hands them over: heads side by side in each token.
    q, k, v = (
        torch.randn(1, tokens, HEADS, WIDTH, generator=generator).to(dtype).transpose(1, 2)
        for _ in range(3)
    )
    layout = attention.TokenLayout(GRIDS[tokens])
    rows = []
    for sparsity in SPARSITIES:
        candidates: dict[str, Callable] = {"dense": lambda: F.scaled_dot_product_attention(q, k, v)}
        for method in METHODS:
            plan = plan_of(method, sparsity, "first step")
            candidates[method] = whole_call(q, k, v, layout, plan)
        candidates["kernel"] = kernel(q, k, v, layout, sparsity)
        seconds = interleaved(candidates, repeats)
        calibrating = {
            method: whole_call(q, k, v, layout, plan_of(method, sparsity, "every step"))
            for method in ("ropeslr", FINE)
        }
        for method, own in interleaved(calibrating, repeats).items():
            seconds[method] += (own - seconds[method]) / CALIBRATE_EVERY
        ratios = {name: seconds["dense"] / value for name, value in seconds.items()}
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": tokens,
                "sparsity": sparsity,
                "ms": {name: round(1e3 * value, 2) for name, value in seconds.items()},
                "times_dense": {name: round(value, 2) for name, value in ratios.items()},
            }
        )
        print(
            f"{rows[-1]['dtype']:>9} {tokens:>7} {1e3 * seconds['dense']:>9.0f} {sparsity:>9.2f}",
            *(f"{ratios[name]:>10.2f}x" for name in ("kernel", *METHODS)),
            flush=True,
        )
    return rows


def plan_of(method: str, sparsity: float, calibrate: str):
    """The plan of one of METHODS."""
    method, _, key_block = method.partition(", ")
    return attention.SparsePlan(
        method=method, sparsity=sparsity, calibrate=calibrate, key_block=key_block or "auto"
    )


def whole_call(q, k, v, layout, plan) -> Callable:
    """Everything that replaces one dense call; a plan has calibrated before the clock starts."""
    trained = plan.method in ("rola", "sla")
    adapter = random_adapter(plan.method, HEADS, WIDTH) if trained else None
    given = (
        layer_inputs(layout.grid, q.shape[2], HEADS, WIDTH, q.dtype)
        if trained
        else attention.LayerInputs()
    )
    run = attention.AttentionRun(plan.resolve(adapter))
    own_layout = attention.TokenLayout(layout.grid, order=run.plan.block_order)
    steps, call = iter(range(1_000_000)), attention.AttentionCall
    return lambda: run.attend(q, k, v, call(own_layout, step=next(steps), inputs=given))


def kernel(q, k, v, layout, sparsity: float) -> Callable:
    """The sparse kernel alone, with its block lists made beforehand."""
    blocks = layout.blocks()
    topk = attention.SparsePlan(sparsity=sparsity).resolve().topk(blocks.num_ranked)
    pooled_q, pooled_k = (ops.block_pool(x, blocks.kv_blocks) for x in (q, k))
    mask, _ = ops.block_select(pooled_q, pooled_k, blocks, topk)
    return lambda: ops.block_sparse_attention(q, k, v, mask)


def interleaved(candidates: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each, measured in turns so that a busy moment meets all of them."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for name, function in candidates.items():
                started = time.perf_counter()
                function()
                if turn:  # the first turn warms up
                    samples[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in samples.items()}


if __name__ == "__main__":
    main()
