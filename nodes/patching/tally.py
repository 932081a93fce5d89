"""Counts of a sampling run, or of one of its model calls, as it goes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from ...attention.accounting import AttentionCost

# What FLOPs are spent on, in the order in which they are shown.
KEPT_BLOCKS, ROUTING, BACKGROUND, CALIBRATION, DENSE_CALLS, COMPUTED_AGAIN = COMPONENTS = (
    "kept blocks",
    "routing",
    "background",
    "calibration",
    "dense calls",
    "recomputed",
)


class Cell(NamedTuple):
    """A step of this sampler, and a layer's number."""

    step: int
    layer: int


@dataclass
class Tally:
    """Sums over calls; `+=` adds those of another."""

    sparse_calls: int = 0
    dense_calls: Counter[str] = field(default_factory=Counter)  # by reason
    other_calls: Counter[str] = field(default_factory=Counter)  # attention that is never replaced
    density: float = 0.0  # the sum over all sparse calls
    dense_flops: float = 0.0  # had all self-attention been dense
    spent: Counter[str] = field(default_factory=Counter)  # FLOPs by COMPONENTS
    calibrations: int = 0
    recall: float = 0.0  # the sum over the calls that measured it
    measured: int = 0
    model_calls: int = 0
    backend: str = ""
    tokens: int = 0  # of the longest sparse sequence
    cells: dict[Cell, list[float]] = field(default_factory=dict)  # densities of a cell's calls
    # Densities of each head, by layer, of the calls whose heads differed.
    heads: dict[int, list[tuple[float, ...]]] = field(default_factory=dict)

    def sparse(self, cell: Cell, cost: AttentionCost, backend: str, tokens: int) -> None:
        """Count a sparse self-attention call."""
        self.sparse_calls += 1
        self.tokens = max(self.tokens, tokens)
        self.cells.setdefault(cell, []).append(cost.density)
        if cost.heads:
            self.heads.setdefault(cell.layer, []).append(cost.heads)
        self.backend = backend
        self.density += cost.density
        self.dense_flops += cost.dense
        self.spent[KEPT_BLOCKS] += cost.sparse  # type: ignore[assignment]  # FLOPs are floats
        self.spent[ROUTING] += cost.routing  # type: ignore[assignment]
        self.spent[BACKGROUND] += cost.background  # type: ignore[assignment]
        self.spent[CALIBRATION] += cost.calibration  # type: ignore[assignment]
        self.calibrations += cost.calibration > 0
        if cost.recall is not None:
            self.recall += cost.recall
            self.measured += 1

    def dense(self, cell: Cell, reason: str, flops: float) -> None:
        """Count a self-attention call that stayed dense."""
        self.dense_calls[reason] += 1
        self.cells.setdefault(cell, []).append(1.0)
        self.dense_flops += flops
        self.spent[DENSE_CALLS] += flops  # type: ignore[assignment]

    def learned(self, flops: float) -> None:
        """Count what was spent on learning beside a dense call."""
        self.spent[CALIBRATION] += flops  # type: ignore[assignment]

    def __iadd__(self, other: Tally) -> Tally:
        self.sparse_calls += other.sparse_calls
        self.dense_calls += other.dense_calls
        self.other_calls += other.other_calls
        self.density += other.density
        self.dense_flops += other.dense_flops
        self.spent += other.spent
        self.calibrations += other.calibrations
        self.recall += other.recall
        self.measured += other.measured
        self.model_calls += other.model_calls
        self.backend = other.backend or self.backend
        self.tokens = max(self.tokens, other.tokens)
        for cell, densities in other.cells.items():
            self.cells.setdefault(cell, []).extend(densities)
        for layer, found in other.heads.items():
            self.heads.setdefault(layer, []).extend(found)
        return self

    def map(self, num_layers: int) -> dict[str, object] | None:
        """Density by step and layer, a mean where a cell had several calls; see `RunReport.map`."""
        if not self.cells:
            return None
        steps = sorted({cell.step for cell in self.cells})
        density = [
            [_mean(self.cells.get(Cell(step, layer))) for layer in range(num_layers)]
            for step in steps
        ]
        return {"layers": num_layers, "steps": steps, "density": density}

    def head_map(self, num_layers: int) -> dict[str, object] | None:
        """Mean density by layer and head where heads differed; see `RunReport.heads`."""
        if not self.heads:
            return None
        means = {
            layer: [_mean(list(each)) for each in zip(*calls)]
            for layer, calls in self.heads.items()
        }
        heads = range(max(map(len, means.values())))
        density = [
            [dict(enumerate(means.get(layer, ()))).get(head) for layer in range(num_layers)]
            for head in heads
        ]
        return {"layers": num_layers, "heads": list(heads), "density": density}


def _mean(densities: list[float] | None) -> float | None:
    return None if densities is None else round(sum(densities) / len(densities), 4)
