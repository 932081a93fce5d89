"""Draws a run's report, and a comparison if there is one, as one picture."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..attention.compare import MethodComparison
from .patching import RunReport
from .patching.tally import COMPONENTS

SPARSE, DENSE = "#1f618d", "#d68910"  # as in the panel: dense is orange
COLOURS = dict(
    zip(COMPONENTS, (SPARSE, "#5dade2", "#58a55c", "#8f6bb8", DENSE, "#a93226"), strict=True)
)
NOT_RUN = "#d9d9d9"
PANELS: list[Any] = [["density", "cost"], ["lower", "blocks"]]
WITH_HEADS: list[Any] = [["density", "heads", "cost"], ["lower", "lower", "blocks"]]


def draw(report: RunReport, comparison: MethodComparison | None) -> torch.Tensor:
    """-> IMAGE `(1, H, W, 3)` float32 in 0..1."""
    figure = Figure(
        figsize=(13 if report.heads is None else 17, 8.5), dpi=100, layout="constrained"
    )
    axes = figure.subplot_mosaic(PANELS if report.heads is None else WITH_HEADS)
    lower, blocks = axes["lower"], axes["blocks"]
    done = "" if report.completed else ", not finished"
    figure.suptitle(
        f"{report.model}: {report.method}, sparsity {report.sparsity:.2f}, {report.sparse_calls:,} "
        f"sparse and {sum(report.dense_calls.values()):,} dense calls, {report.seconds:.1f} "
        f"s{_in_attention(report)}{done}",
        fontsize=13,
    )
    _density(axes["density"], report)
    _cost(axes["cost"], report)
    if report.heads is not None:
        _heads(axes["heads"], report.heads)
    if comparison is None:
        _reasons(lower, report)
        _note(blocks, "Connect positive and choose a comparison\nto see errors and kept blocks.")
    else:
        _errors(lower, comparison)
        _blocks(blocks, comparison)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = numpy.asarray(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.astype(numpy.float32) / 255)[None]


def _in_attention(report: RunReport) -> str:
    return (
        f", {sum(report.attention_seconds.values()):.1f} s in attention"
        if report.attention_seconds
        else ""
    )


def _density(axes: Axes, report: RunReport) -> None:
    axes.set_title("Density by layer and step")
    if report.map is None:
        _note(axes, "No self-attention calls.")
        return
    _shares(axes, report.map["density"], [step + 1 for step in report.map["steps"]])
    axes.set(xlabel="step of this sampler", ylabel="layer")


def _heads(axes: Axes, heads: dict[str, Any]) -> None:
    axes.set_title("Density by layer and head, mean of the run")
    _shares(axes, heads["density"], heads["heads"])
    axes.set(xlabel="head", ylabel="layer")


def _shares(axes: Axes, columns: list[list[float | None]], names: list[int]) -> None:
    """Shares of kept blocks, a column for each name and a row for each layer."""
    values = numpy.array(columns, dtype=float).T  # None becomes NaN
    axes.set_facecolor(NOT_RUN)
    sparse = values[values < 1]
    most = min(1.0, max(0.05, 1.5 * float(sparse.max()))) if sparse.size else 0.05
    drawn = axes.imshow(
        values,
        aspect="auto",
        cmap=matplotlib.colormaps["Blues"].with_extremes(over=DENSE),
        vmin=0,
        vmax=most - 1e-6,
        interpolation="nearest",
        extent=(-0.5, len(names) - 0.5, len(values) - 0.5, -0.5),
    )
    every = max(1, -(-len(names) // 12))
    axes.set_xticks(range(0, len(names), every), [str(name) for name in names[::every]])
    axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.figure.colorbar(drawn, ax=axes, extend="max", label="share of blocks kept; orange: dense")


def _cost(axes: Axes, report: RunReport) -> None:
    axes.set_title(f"Attention FLOPs: {100 * report.flops_saved:.1f} % saved")
    scale, unit = _unit(report.dense_tflop)
    left, whole = 0.0, report.dense_tflop * scale
    axes.barh(["all dense"], [whole], color=DENSE)
    for part, colour in COLOURS.items():
        value = report.spent_parts.get(part, 0.0) * scale
        if value:
            axes.barh(
                ["spent"],
                [value],
                left=left,
                color=colour,
                label=f"{part} {100 * value / whole:.1f} %",
            )
            left += value
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    if left:
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9, frameon=False
        )


def _unit(tflop: float) -> tuple[float, str]:
    """A factor and the name of the unit in which so many TFLOP read well."""
    if tflop >= 1000:
        return 1e-3, "PFLOP"
    return (1.0, "TFLOP") if tflop >= 1 else (1e3, "GFLOP")


def _reasons(axes: Axes, report: RunReport) -> None:
    axes.set_title("Self-attention calls")
    counts = {f"sparse ({report.backend})": report.sparse_calls} if report.sparse_calls else {}
    counts |= {_short(reason): calls for reason, calls in report.dense_calls.items()}
    if not counts:
        _note(axes, "None.")
        return
    colours = [SPARSE if name.startswith("sparse (") else DENSE for name in counts]
    bars = axes.barh(list(counts), list(counts.values()), color=colours)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel("calls")


def _short(text: str, most: int = 34) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _errors(axes: Axes, comparison: MethodComparison) -> None:
    axes.set_title("Error against dense attention, by layer")
    for name, errors in comparison.errors.items():
        if errors:
            axes.plot(
                range(len(errors)),
                [each.relative for each in errors.values()],
                marker="o",
                markersize=3,
                label=name,
            )
    axes.set(xlabel="layer", ylabel="relative error of the output")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9)


def _blocks(axes: Axes, comparison: MethodComparison) -> None:
    shown = comparison.selection
    if shown is not None:
        axes.set_title(f"Kept blocks, layer {shown.number}, head {shown.head}")
    if comparison.kept is None:
        _note(axes, "This layer ran dense.")
        return
    axes.imshow(comparison.kept.numpy(), cmap="Blues", interpolation="nearest", aspect="auto")
    axes.set(xlabel="key block", ylabel="query block")


def _note(axes: Axes, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color="#666666", transform=axes.transAxes)
