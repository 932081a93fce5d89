"""Samples of every method against dense attention: `python -m benchmarks.quality --out FILE`.

The trained tiny Wan (benchmarks/data) in a real ComfyUI, stock KSampler, same seed with and without
sparse attention. PSNR and SNR of the whole clip, SSIM of its frames, each a mean over seeds with
its spread; the error of attention by layer, measured at the states of the dense run; the density as
it really was. Needs COMFYUI_PATH and ROPESLR_TEST_BASE. `--quick` samples half of the seeds at one
density and fails where the methods are not in their order.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from . import commit
from .tiny_wan import DATA, FILE, PROMPTS, Sampling, model, pictures, sample

DENSITIES = (0.05, 0.10, 0.15, 0.25)
MAIN = 0.10
PEAK = 4.0  # the clips' values go from about -2 to 2
UNIFORM = dict(allocation="uniform")
# Name -> the node's settings, from worst to best as a rule.
METHODS: dict[str, dict[str, Any]] = {
    "kept blocks alone": dict(method="top-k plain", **UNIFORM),
    "pooled tail": dict(method="top-k", **UNIFORM),
    "pooled tail, allocated": dict(method="top-k", query_block="64"),
    "AdaSpa": dict(method="adaspa"),
    "ropeslr, not calibrated": dict(method="ropeslr", calibrate="off", **UNIFORM),
    "ropeslr, calibrated": dict(method="ropeslr", **UNIFORM),
    "ropeslr, calibrated and allocated": dict(method="ropeslr", query_block="64"),
    "the same, query blocks of 128": dict(method="ropeslr", query_block="128"),
}
KEY_BLOCKS = ("64", "16")
# From worst to best at MAIN, the first two about alike; and then the default.
ORDER = ("kept blocks alone", "pooled tail", "ropeslr, calibrated")
DEFAULT = "ropeslr, calibrated and allocated"
SETTINGS = dict(min_tokens=0)
LARGE = (16, 32, 48)  # 16 x 16 x 24 = 6,144 tokens


class Case(NamedTuple):
    """One row of the table, before it is measured."""

    method: str
    key_block: str
    density: float
    order: str = "cube"
    how: Sampling = Sampling()
    fewer: bool = False  # half of the seeds, and attention is not looked into

    def settings(self) -> dict[str, Any]:
        own = METHODS[self.method]
        key_block = "64" if own["method"] == "adaspa" else self.key_block
        return (
            SETTINGS
            | own
            | dict(sparsity=1 - self.density, key_block=key_block, block_order=self.order)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--weights", type=Path, default=DATA / FILE, help="another tiny Wan")
    parser.add_argument("--quick", action="store_true", help="a few samples; fails by their order")
    parser.add_argument(
        "--only", default="", help="methods whose name holds this; others stay as --out has them"
    )
    parser.add_argument("--out", type=Path, help="write the measurements to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw the record of --out to this SVG, no runs")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(options.out.read_text(encoding="utf-8")), options.plot)
        return
    started = time.perf_counter()
    bench = Bench(options.weights, options.seeds)
    if options.quick:
        cases = [Case(name, "64", MAIN, fewer=True) for name in ORDER]
        cases.append(Case(DEFAULT, "16", MAIN, fewer=True))
    else:
        cases = [case for case in all_cases() if options.only in case.method]
    rows = [bench.measure(case) for case in tqdm(cases, unit="case")]
    for row in rows:
        print(line(row))
    if options.quick:
        *without, calibrated, default = (row["psnr"] for row in rows)
        if not max(without) + 3 < calibrated < default - 3:
            raise SystemExit("The methods are not in their order, worst to best, 3 dB apart.")
    if options.out:
        if options.only and options.out.exists():
            known = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
            rows = [row for row in known if options.only not in row["method"]] + rows
        record = {
            "benchmark": "quality",
            "date": datetime.date.today().isoformat(),
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "commit": commit(),
            "comfyui": comfyui_version(),
            "seeds": bench.seeds,
            "peak": PEAK,
            "minutes": round((time.perf_counter() - started) / 60, 1),
            "rows": rows,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def comfyui_version() -> str:
    import comfyui_version

    return comfyui_version.__version__


def all_cases() -> list[Case]:
    """Every method at every density; at the main one also what else may matter."""
    every = [
        (name, size) for name in METHODS for size in KEY_BLOCKS if (name, size) != ("AdaSpa", "16")
    ]
    cases = [Case(*each, density) for density in DENSITIES for each in every]
    cases += [Case(*each, MAIN, order="raster", fewer=True) for each in every]
    for how in (Sampling(steps=4), Sampling(cfg=3.0), Sampling(steps=4, cfg=3.0), Sampling(LARGE)):
        cases += [Case(*each, MAIN, how=how, fewer=True) for each in every]
    return cases


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['method']:36} {row['key_block']:>3} {row['order']:6} {row['grid']!s:13} "
        f"{row['steps']:3} steps CFG {row['cfg']} kept {row['density']:.3f}  "
        f"PSNR {row['psnr']:.2f} +- {row['spread']:.2f}  SNR {row['snr']:.2f}  "
        f"SSIM {row['ssim']:.3f}" + (f"  attention {row['error']:.3f}" if "error" in row else "")
    )


class Bench:
    """The model, and the dense samples that have been made so far."""

    def __init__(self, weights: Path, seeds: int) -> None:
        self.model, self.seeds = model(weights), seeds
        self._dense: dict[Sampling, Tensor] = {}

    def dense(self, how: Sampling) -> Tensor:
        if how not in self._dense:
            self._dense[how] = sample(self.model, how)
        return self._dense[how]

    def measure(self, case: Case) -> dict[str, Any]:
        """All seeds of a case, as one row."""
        found: dict[str, list[float]] = defaultdict(list)
        layers: dict[Hashable, list[float]] = defaultdict(list)
        count = max(1, self.seeds // 2) if case.fewer else self.seeds
        for seed in range(777, 777 + count):
            how = case.how._replace(seed=seed, prompt=PROMPTS[seed % len(PROMPTS)])
            dense = self.dense(how)
            patched = node(self.model, case.settings())
            sparse = sample(patched, how)
            report = last_report(patched)
            shown, expected = pictures(sparse), pictures(dense)
            found["psnr"].append(psnr(sparse, dense))
            found["snr"].append(decibels(dense.square().mean(), sparse - dense))
            found["ssim"].append(ssim(shown, expected))
            found["density"].append(report.density)
            found["spent"].append(report.spent_tflop / report.dense_tflop)
            if case.density == MAIN and not case.fewer:
                for layer, each in attention_errors(self.model, case.settings(), how).items():
                    layers[layer].append(each)
        row: dict[str, Any] = {
            name: round(statistics.mean(values), 4) for name, values in found.items()
        }
        if layers:
            row["by_layer"] = [round(statistics.mean(values), 4) for values in layers.values()]
            row["error"] = round(statistics.mean(row["by_layer"]), 4)
        return {
            "method": case.method,
            "key_block": case.settings()["key_block"],
            "asked": case.density,
            "order": case.order,
            "grid": [case.how.grid[0], case.how.grid[1] // 2, case.how.grid[2] // 2],
            "steps": case.how.steps,
            "cfg": case.how.cfg,
            "seeds": count,
            **row,
            "spread": round(statistics.stdev(found["psnr"]), 4) if count > 1 else 0.0,
        }


def node(patched: Any, settings: dict[str, Any]) -> Any:
    """The MODEL behind RoPeSLR Sparse Attention."""
    import comfy_host

    comfy_host.pack()
    return comfy_host.run_node("RoPeSLRSparseAttention", model=patched, **settings)[0]


def last_report(patched: Any) -> Any:
    import comfy_host

    return comfy_host.module(".nodes.patching").last_report(patched)


def attention_errors(loaded: Any, settings: dict[str, Any], how: Sampling) -> dict[Hashable, float]:
    """Relative error of the attention's output by layer, at the states of the dense run."""
    import comfy_host

    patched = node(loaded, settings)
    patching = comfy_host.module(".nodes.patching.compare")
    own = patched.get_attachment(patching.KEY)
    beside = beside_dense(comfy_host.module(".attention.run").AttentionRun)
    measured: list[Any] = []

    def make(plan: Any) -> Any:
        measured.append(beside(plan))
        return measured[-1]

    patching.put_on(patched, patching.SilentPatch(own.plan, None, make))
    sample(patched, how)
    return {
        layer: (lost / whole) ** 0.5
        for each in measured
        for layer, (lost, whole) in each.sums.items()
    }


def beside_dense(attention_run: type) -> type:
    """An AttentionRun that learns and attends as always, and returns dense attention."""

    class BesideDense(attention_run):  # type: ignore[misc, valid-type]
        def __init__(self, plan: Any) -> None:
            super().__init__(plan)
            self.sums: dict[Hashable, tuple[float, float]] = {}

        def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Any) -> tuple[Tensor, Any]:
            out, cost = super().attend(q, k, v, call)
            dense = F.scaled_dot_product_attention(q, k, v, scale=call.scale)
            lost, whole = self.sums.get(call.layer, (0.0, 0.0))
            lost += float((out - dense).square().sum())
            self.sums[call.layer] = lost, whole + float(dense.square().sum())
            return dense, cost

    return BesideDense


def plot(record: dict[str, Any], path: Path) -> None:
    """PSNR by density of every method."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    usual = [
        row
        for row in record["rows"]
        if (row["order"], row["steps"], row["cfg"]) == ("cube", 20, 1.0)
        and row["grid"] == [8, 12, 16]
    ]
    for i, name in enumerate(METHODS):
        for key_block, line in (("64", ":"), ("16", "-")):
            rows = [row for row in usual if (row["method"], row["key_block"]) == (name, key_block)]
            label = f"{name}, key blocks of {key_block}"
            axes.errorbar(
                [100 * row["density"] for row in rows],
                [row["psnr"] for row in rows],
                [row["spread"] for row in rows],
                color=f"C{i}",
                linestyle=line,
                marker="o",
                markersize=3,
                label=label if rows else None,
            )
    axes.set(xlabel="blocks kept, %", ylabel="PSNR to dense attention, dB")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    with matplotlib.rc_context({"svg.hashsalt": "quality"}):
        figure.savefig(path, metadata={"Date": None})


def psnr(found: Tensor, dense: Tensor) -> float:
    """Of clips, in dB."""
    return decibels(PEAK**2, found - dense)


def decibels(power: float | Tensor, difference: Tensor) -> float:
    """A power beside that of a difference, in dB."""
    return 10 * float(torch.log10(power / difference.square().mean()))


def ssim(x: Tensor, y: Tensor, window: int = 7) -> float:
    """Mean structural similarity of frames `(F, 3, H, W)` from 0 to 1, uniform windows."""
    spread = window**2 / (window**2 - 1)  # of a sample

    def mean(z: Tensor) -> Tensor:
        return F.avg_pool2d(z, window, 1)

    mean_x, mean_y = mean(x), mean(y)
    var_x = spread * (mean(x * x) - mean_x**2)
    var_y = spread * (mean(y * y) - mean_y**2)
    both = spread * (mean(x * y) - mean_x * mean_y)
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return float((likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


if __name__ == "__main__":
    main()
