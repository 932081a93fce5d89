"""What happened in one sampling run: counted as it goes, told once at its end in words, as an event, as an object."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field

from ...attention.accounting import AttentionCost

logger = logging.getLogger(__name__)

EVENT = "ropeslr.report"


@dataclass(frozen=True)
class RunReport:
    """One sampling run in numbers.

    dense_calls counts the self-attention calls that stayed dense by reason, other_calls the attention that is never
    replaced (cross-attention). backend is that of the sparse calls, "" where there were none. density is the mean share
    of key blocks kept by the sparse calls, recall the softmax mass they kept where that was measured. below names
    who else held the attention slot and got the dense calls, "" for ComfyUI's own attention. FLOPs are those of all
    self-attention calls of the run, in TFLOP; seconds is the wall time of the run, attention_seconds what its sparse
    and dense self-attention took and call_seconds the median of one such call, None on devices without a clock (the
    median, since the first calls may compile kernels). tokens: of the longest sparse sequence.
    spent_parts: spent_tflop by what it was spent on. map: density
    by step (of this sampler, from 0) and layer, as {"layers": n, "steps": [s, ...], "density": [[x, ...], ...]}; 1 =
    dense, None = did not run.
    """

    model: str
    method: str
    adapter: str
    sparsity: float
    block_order: str
    backend: str
    sparse_calls: int
    dense_calls: dict[str, int]
    other_calls: dict[str, int]
    density: float
    dense_tflop: float
    spent_tflop: float
    recall: float | None
    calibrations: int
    model_calls: int
    below: str
    seconds: float
    completed: bool
    tokens: int
    attention_seconds: dict[str, float] | None
    call_seconds: dict[str, float] | None
    spent_parts: dict[str, float]
    map: dict[str, object] | None

    @property
    def flops_saved(self) -> float:
        """Share of the self-attention FLOPs that was not spent."""
        return 1.0 - self.spent_tflop / self.dense_tflop if self.dense_tflop else 0.0

    def summary(self) -> str:
        """The one line for the log."""
        dense = sum(self.dense_calls.values())
        total = self.sparse_calls + dense
        method = f"{self.method} ({self.adapter})" if self.adapter else self.method
        if self.method in ("rola", "sla") and not self.adapter:
            method += " without its weights"
        text = f"RoPeSLR {method} on {self.model}: {self.sparse_calls} of {total} self-attention calls sparse"
        if self.sparse_calls:
            text += f" in {self.backend} (density {self.density:.3f}, {self.block_order} order, "
            text += f"{self.calibrations} {'searched' if self.method == 'adaspa' else 'calibrated'}"
            text += f", recall {self.recall:.3f})" if self.recall is not None else ")"
        text += f", attention FLOPs saved {100 * self.flops_saved:.1f} %"
        if dense:
            text += "; dense: " + ", ".join(f"{n} ({why})" for why, n in sorted(self.dense_calls.items()))
            text += f" (by {self.below})" if self.below else ""
        return text + f"; {self.seconds:.1f} s" + ("" if self.completed else "; the run was cut short")

    def send(self, node_id: str | None) -> None:
        """Send the report to the browser that queued the run; does nothing where no server runs."""
        server = sys.modules.get("server")
        prompt_server = getattr(getattr(server, "PromptServer", None), "instance", None)
        if prompt_server is None or node_id is None:
            return
        detail = asdict(self) | {"node": node_id, "flops_saved": self.flops_saved, "summary": self.summary()}
        detail["workflow"] = _running_workflow(prompt_server)
        try:
            prompt_server.send_sync(EVENT, detail, prompt_server.client_id)
        except Exception:                   # a closed browser must not end a run that has just finished
            logger.debug("RoPeSLR: the report could not be sent to the browser", exc_info=True)


def _running_workflow(prompt_server) -> str | None:
    """The id of the workflow that runs, since the browser may show another by now; None where that cannot be told.

    Read from the queue: a node's own hidden inputs are those of its first run, as long as ComfyUI keeps its output.
    """
    try:
        (item,) = prompt_server.prompt_queue.currently_running.values()
        return item[3]["extra_pnginfo"]["workflow"]["id"]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):     # queued by a script, another ComfyUI
        return None


@dataclass
class Tally:
    """Counts of a run as it goes."""

    sparse_calls: int = 0
    dense_calls: Counter[str] = field(default_factory=Counter)
    other_calls: Counter[str] = field(default_factory=Counter)
    density: float = 0.0                    # the sum over all sparse calls
    dense_flops: float = 0.0
    spent: Counter[str] = field(default_factory=Counter)                      # FLOPs by what they were spent on
    calibrations: int = 0
    recall: float = 0.0                     # the sum over the calls that measured it
    measured: int = 0
    model_calls: int = 0
    backend: str = ""
    tokens: int = 0                         # of the longest sparse sequence
    cells: dict[tuple[int, int], list[float]] = field(default_factory=dict)   # (step, layer): densities of its calls

    def sparse(self, cost: AttentionCost, backend: str, tokens: int, step: int, layer: int) -> None:
        self.sparse_calls += 1
        self.tokens = max(self.tokens, tokens)
        self.cells.setdefault((step, layer), []).append(cost.density)
        self.backend = backend
        self.density += cost.density
        self.dense_flops += cost.dense
        self.spent.update({
            "kept blocks": cost.sparse, "routing": cost.routing, "background": cost.background,
            "calibration": cost.calibration,
        })
        self.calibrations += cost.calibration > 0
        if cost.recall is not None:
            self.recall += cost.recall
            self.measured += 1

    def dense(self, reason: str, flops: float, step: int, layer: int) -> None:
        self.dense_calls[reason] += 1
        self.cells.setdefault((step, layer), []).append(1.0)
        self.dense_flops += flops
        self.spent["dense calls"] += flops

    def add(self, call: Tally) -> None:
        """Add the counts of one model call; model_calls are counted by the run itself."""
        for name in ("sparse_calls", "density", "dense_flops", "calibrations", "recall", "measured"):
            setattr(self, name, getattr(self, name) + getattr(call, name))
        for name in ("dense_calls", "other_calls", "spent"):
            getattr(self, name).update(getattr(call, name))
        for place, densities in call.cells.items():
            self.cells.setdefault(place, []).extend(densities)
        self.tokens, self.backend = max(self.tokens, call.tokens), call.backend or self.backend

    def map(self, layers: int) -> dict[str, object] | None:
        """Density by step and layer, a mean where a cell had several calls; see `RunReport`."""
        if not self.cells:
            return None
        steps = sorted({step for step, _ in self.cells})
        rows = [[self.cells.get((step, layer)) for layer in range(layers)] for step in steps]
        density = [[None if cell is None else round(sum(cell) / len(cell), 4) for cell in row] for row in rows]
        return {"layers": layers, "steps": steps, "density": density}
