"""The PyTorch path against dense SDPA on this CPU: `python -m benchmarks.cpu [--out FILE.json]`.

Every row is the WHOLE replaced call: routing, kept blocks, background, mixing, and what a run
learns as often as it does (a probe, the choice of each head's share and calibrations, once in five
calls); adaspa between its searches; rola and sla with random weights. "ropeslr, uniform" keeps as
many blocks of 64 in every head. "kernel" is the sparse kernel alone. Times are medians of
interleaved runs, ratios within one run; random inputs whose heads are sharp or flat to different
degrees, so that they keep different numbers of blocks. "flex" is PyTorch's compiled flex_attention
over the same lists as "kernel", tokens in block order beforehand (--flex; needs a C++ compiler).
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
# At both lengths these keep a whole number of key blocks of 64, hence as many keys in units of 16.
SPARSITIES = tuple(1 - blocks / 64 for blocks in (12, 6, 3, 2))
HEADS, WIDTH = 4, 128
SHARPNESS = (0.2, 1.0, 1.5, 2.5)  # of each head's queries
EVERY = load_pack(".attention.plan").CALIBRATE_EVERY
METHODS = {  # name -> settings
    "ropeslr": dict(method="ropeslr"),
    "ropeslr, uniform": dict(method="ropeslr", allocation="uniform", key_block="64"),
    "top-k": dict(method="top-k"),
    "top-k plain": dict(method="top-k plain"),
    "adaspa": dict(method="adaspa"),
    "rola": dict(method="rola"),
    "sla": dict(method="sla"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument(
        "--tokens", type=int, nargs="+", choices=sorted(GRIDS), default=sorted(GRIDS)
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--flex", action="store_true", help="compiled flex_attention too")
    parser.add_argument("--out", help="write the measurements to this JSON file")
    options = parser.parse_args()
    rows = []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {HEADS} heads of {WIDTH}")
    print(f"{'':>9} {'':>7} {'dense':>9} {'':>9}   times faster than dense SDPA")
    print(
        f"{'dtype':>9} {'tokens':>7} {'ms':>9} {'sparsity':>9}",
        *(f"{name:>16}" for name in ("kernel", *METHODS)),
    )
    for dtype in options.dtypes.split(","):
        for tokens in options.tokens:
            rows += measure(tokens, getattr(torch, dtype), options.repeats, options.flex)
    if options.out:
        record = {
            "benchmark": "cpu",
            "date": datetime.date.today().isoformat(),
            "machine": cpu_name(),
            "flags": cpu_flags(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit(),
            "rows": rows,
        }
        with open(options.out, "w", encoding="utf-8") as file:
            file.write(json.dumps(record, indent=1) + "\n")


def measure(tokens: int, dtype: torch.dtype, repeats: int, with_flex: bool) -> list[dict]:
    """All sparsities of one length."""
    generator = torch.Generator().manual_seed(0)
    # As the host hands them over: heads side by side in each token.
    q, k, v = (
        torch.randn(1, tokens, HEADS, WIDTH, generator=generator).to(dtype).transpose(1, 2)
        for _ in range(3)
    )
    layout = attention.TokenLayout(GRIDS[tokens])
    rows = []
    q = q * torch.tensor(SHARPNESS, dtype=dtype)[None, :, None, None]
    for sparsity in SPARSITIES:
        runs = {name: Run(q, k, v, layout, name, sparsity) for name in METHODS}
        candidates: dict[str, Callable] = {"dense": lambda: F.scaled_dot_product_attention(q, k, v)}
        candidates |= {name: run.steady for name, run in runs.items()}
        candidates["kernel"] = kernel(q, k, v, layout, sparsity)
        if with_flex and (peer := flex(q, k, v, layout, sparsity)) is not None:
            candidates["flex"] = peer
        candidates |= {f"{name} learning": runs[name].learning for name in LEARNING}
        seconds = interleaved(candidates, repeats)
        learning = {}
        for name in LEARNING:  # two calls in five
            learning[name] = (seconds.pop(f"{name} learning") - 2 * seconds[name]) / EVERY
            seconds[name] += learning[name]
        kept, choice = runs["ropeslr"].heads, seconds_to_choose(runs["ropeslr"])
        ratios = {name: seconds["dense"] / value for name, value in seconds.items()}
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": tokens,
                "sparsity": sparsity,
                "ms": {name: round(1e3 * value, 2) for name, value in seconds.items()},
                "times_dense": {name: round(value, 2) for name, value in ratios.items()},
                "learning_ms": {name: round(1e3 * value, 2) for name, value in learning.items()},
                "choice_ms": round(1e3 * choice / EVERY, 3),
                "kept_by_head": [round(share, 4) for share in kept],
            }
        )
        print(
            f"{rows[-1]['dtype']:>9} {tokens:>7} {1e3 * seconds['dense']:>9.0f} {sparsity:>9.2f}",
            *(f"{ratios[name]:>15.2f}x" for name in ("kernel", *METHODS)),
            flush=True,
        )
        own = {"learning": learning["ropeslr"], "choice alone": choice / EVERY}
        shares = (f"{name} {100 * each / seconds['ropeslr']:.2f} %" for name, each in own.items())
        by_head = (f"{share:.3f}" for share in kept)
        print(f"{'':>38} ropeslr:", *shares, "kept by head", *by_head, flush=True)
    return rows


LEARNING = ("ropeslr", "ropeslr, uniform", "top-k", "top-k plain")


class Run:
    """Everything that replaces dense calls of one layer, after it has learned."""

    def __init__(self, q, k, v, layout, name: str, sparsity: float) -> None:
        plan = attention.SparsePlan(sparsity=sparsity, **METHODS[name])
        trained = plan.method in ("rola", "sla")
        adapter = random_adapter(plan.method, HEADS, WIDTH) if trained else None
        self.given = (
            layer_inputs(layout.grid, q.shape[2], HEADS, WIDTH, q.dtype)
            if trained
            else attention.LayerInputs()
        )
        self.qkv = q, k, v
        self.run = attention.AttentionRun(plan.resolve(adapter))
        self.layout = attention.TokenLayout(layout.grid, order=self.run.plan.block_order)
        self.step = 0
        for _ in range(2):
            self.learning()

    def learning(self) -> None:
        """The two calls of a period in which a run learns."""
        self._attend(self.step)
        self._attend(self.step + 1)
        self.step += EVERY

    def steady(self) -> None:
        """Any other."""
        self.heads = self._attend(self.step - 1).heads

    def _attend(self, step: int):
        call = attention.AttentionCall(self.layout, 0, step, 50, inputs=self.given)
        return self.run.attend(*self.qkv, call)[1]


def seconds_to_choose(run: Run) -> float:
    """How long it takes to deal the blocks out anew."""
    (group,) = run.run.method.allocation._groups.values()
    return statistics.median(timed(lambda: group.solve(None)) for _ in range(5))


def timed(function: Callable) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def kernel(q, k, v, layout, sparsity: float) -> Callable:
    """The sparse kernel alone, with its block lists made beforehand."""
    blocks = layout.blocks()
    topk = attention.SparsePlan(sparsity=sparsity).resolve().topk(blocks.num_ranked)
    pooled_q, pooled_k = (ops.block_pool(x, blocks.kv_blocks) for x in (q, k))
    mask, _ = ops.block_select(pooled_q, pooled_k, blocks, topk)
    return lambda: ops.block_sparse_attention(q, k, v, mask)


def flex(q, k, v, layout, sparsity: float) -> Callable | None:
    """The same blocks by compiled flex_attention; None where it cannot run."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    blocks = layout.blocks()
    topk = attention.SparsePlan(sparsity=sparsity).resolve().topk(blocks.num_ranked)
    pooled_q, pooled_k = (ops.block_pool(x, blocks.kv_blocks) for x in (q, k))
    mask, _ = ops.block_select(pooled_q, pooled_k, blocks, topk)
    lists = mask.fill_unused(0).int()
    pad = torch.zeros(*lists.shape[:3], blocks.kv_blocks.num_blocks - lists.shape[3]).int()
    given = mask.kv_num_blocks, torch.cat((lists, pad), -1)
    own = BlockMask.from_kv_blocks(*given, BLOCK_SIZE=64)
    order = blocks.kv_blocks.slots
    q, k, v = (x.index_select(2, order).contiguous() for x in (q, k, v))
    compiled = torch.compile(flex_attention, dynamic=False)
    try:
        with torch.no_grad():
            compiled(q, k, v, block_mask=own)
    except Exception as error:
        print(f"flex_attention cannot run here: {type(error).__name__}")
        return None
    return lambda: compiled(q, k, v, block_mask=own)


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Of the instructions that products of matrices use."""
    known = _cpuinfo("flags").split()
    return [flag for flag in known if flag.startswith(("amx", "avx2", "avx512f", "avx512_bf16"))]


def _cpuinfo(name: str) -> str:
    try:
        lines = open("/proc/cpuinfo", encoding="utf-8").read().splitlines()
    except OSError:
        return ""
    return next((x.partition(":")[2].strip() for x in lines if x.startswith(name)), "")


def interleaved(candidates: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each, measured in turns so that a busy moment meets all of them."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.no_grad():
        for turn in range(repeats + 1):
            for name, function in candidates.items():
                seconds = timed(function)
                if turn:  # the first turn warms up
                    samples[name].append(seconds)
    return {name: statistics.median(values) for name, values in samples.items()}


if __name__ == "__main__":
    main()
