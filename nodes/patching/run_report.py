"""What happened in one sampling run: in words, as an event, as an object."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

from ...attention.plan import BLOCK, NEED_WEIGHTS
from ..host import prompt_server

logger = logging.getLogger(__name__)

EVENT = "ropeslr.report"


@dataclass(frozen=True)
class RunReport:
    """One sampling run in numbers; FLOPs are those of all self-attention calls of the run."""

    model: str
    method: str
    adapter: str  # "" without one
    sparsity: float
    block_order: str
    key_block: int  # tokens of a key block
    query_block: int  # and of a query block, at the end of the run
    eight_bit_calls: int  # sparse calls with keys and values in 8 bits
    sixteen_bit_layers: int  # that 8 bits would have cost too much
    tuned: str  # whether the kernels were tuned here, in words; "" where there is nothing to tune
    backend: str  # of the sparse calls, "" where there were none
    sparse_calls: int
    dense_calls: dict[str, int]  # self-attention calls that stayed dense, by reason
    other_calls: dict[str, int]  # attention that is never replaced (cross-attention)
    density: float  # mean share of key blocks that the sparse calls kept
    dense_tflop: float  # had every call been dense
    spent_tflop: float
    recall: float | None  # softmax mass that the sparse calls kept, where that was measured
    calibrations: int
    model_calls: int
    previous: str  # the override that got the dense calls, "" for ComfyUI's own attention
    seconds: float  # wall time of the run
    completed: bool
    tokens: int  # of the longest sparse sequence
    # Time in sparse and in dense self-attention, and the median of one such call, since the first
    # calls may compile kernels; None on devices without a clock.
    attention_seconds: dict[str, float] | None
    call_seconds: dict[str, float] | None
    spent_parts: dict[str, float]  # spent_tflop by what it was spent on, see tally.COMPONENTS
    # Density by step (of this sampler, from 0) and layer: {"layers": n, "steps": [s, ...],
    # "density": [[x, ...], ...]}; 1 = dense, None = did not run.
    map: dict[str, Any] | None
    # Density by head and layer, a mean of the calls whose heads differed: {"layers": n, "heads":
    # [h, ...], "density": [[x, ...], ...]}, None for a layer without; None where all kept the same.
    heads: dict[str, Any] | None

    @property
    def flops_saved(self) -> float:
        """Share of the self-attention FLOPs that was not spent."""
        return 1.0 - self.spent_tflop / self.dense_tflop if self.dense_tflop else 0.0

    def summary(self) -> str:
        """The one line for the log."""
        dense = sum(self.dense_calls.values())
        total = self.sparse_calls + dense
        text = f"RoPeSLR {self._method()} on {self.model}: {self.sparse_calls} of {total} "
        text += f"self-attention calls sparse{self._how()}"
        text += f", attention FLOPs saved {100 * self.flops_saved:.1f} %"
        if dense:
            counts = sorted(self.dense_calls.items())
            text += "; dense: " + ", ".join(f"{count} ({why})" for why, count in counts)
            text += f" (by {self.previous})" if self.previous else ""
        ended = "" if self.completed else "; the run did not finish"
        return f"{text}; {self.seconds:.1f} s{ended}"

    def _method(self) -> str:
        if self.adapter:
            return f"{self.method} ({self.adapter})"
        without = " without its weights" if self.method in NEED_WEIGHTS else ""
        return f"{self.method}{without}"

    def _how(self) -> str:
        if not self.sparse_calls:
            return ""
        learned = "searched" if self.method == "adaspa" else "calibrated"
        recall = "" if self.recall is None else f", recall {self.recall:.3f}"
        sizes = "" if self.key_block == BLOCK else f"key blocks of {self.key_block}, "
        sizes += "" if self.query_block == BLOCK else f"query blocks of {self.query_block}, "
        if self.eight_bit_calls or self.sixteen_bit_layers:
            stayed = self.sixteen_bit_layers
            sizes += f"{self.eight_bit_calls} in 8 bits"
            sizes += f" ({stayed} layers stayed in 16 bits), " if stayed else ", "
        backend = f"{self.backend}, {self.tuned}" if self.tuned else self.backend
        return (
            f" in {backend} (density {self.density:.3f}{self._range()}, "
            f"{self.block_order} order, {sizes}"
            f"{self.calibrations} {learned}{recall})"
        )

    def _range(self) -> str:
        """From the head that kept least to the one that kept most."""
        if self.heads is None:
            return ""
        each = [share for row in self.heads["density"] for share in row if share is not None]
        return f", {min(each):.3f} to {max(each):.3f} by head"

    def send(self, node_id: str | None) -> None:
        """Send the report to the browser that queued the run, where a server runs and one did."""
        server = prompt_server()
        client = getattr(server, "client_id", None)
        if client is None or node_id is None:  # without a client it would go to every browser
            return
        detail = asdict(self) | {
            "node": node_id,
            "flops_saved": self.flops_saved,
            "summary": self.summary(),
            "workflow": _running_workflow(server),
        }
        try:
            server.send_sync(EVENT, detail, client)
        except Exception:  # a closed browser must not end a run that has just finished
            logger.debug("RoPeSLR: the report could not be sent to the browser", exc_info=True)


def _running_workflow(server: Any) -> str | None:
    """The id of the workflow that runs, since the browser may show another by now; None if unknown.

    Read from the queue: a node's own hidden inputs are those of its first run, as long as ComfyUI
    keeps its output.
    """
    try:
        (item,) = server.prompt_queue.currently_running.values()
        return item[3]["extra_pnginfo"]["workflow"]["id"]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # queued by a script
        return None
