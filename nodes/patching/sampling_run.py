"""One sampling run of a patched model: schedule, what the method remembers, and the count of what happened."""

from __future__ import annotations

import logging
import math
import statistics
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import torch

from ...attention import AttentionRun, LayerInputs, SparsePlan, TokenLayout
from ...attention.accounting import AttentionCost
from ...attention.adapters import Adapter
from ...attention.plan import BLOCK
from ...attention.schedule import StepSchedule
from ...kernels import ops
from .clock import AttentionClock
from .recognise import ModelFacts
from .report import RunReport, Tally
from .whole_schedule import adds_noise, steps_outside

logger = logging.getLogger(__name__)

BACKEND_DENSE = "backend is set to dense"
NOTHING_TO_SKIP = "sparsity leaves no block out"
DENSE_LAYER = "dense layers"
CROSS_ATTENTION = "cross-attention"
OUTSIDE_BLOCKS = "outside the transformer blocks"
NOT_FINITE = "computed again, since the sparse output was not finite"


class SparseNotPossible(RuntimeError):
    """Raised instead of a dense fallback where the person asked for strict."""

    def __init__(self, reason: str, remedy: str = "Switch strict off to run such calls dense.") -> None:
        super().__init__(f"RoPeSLR (strict): this run cannot be sparse: {reason}. {remedy}")


@dataclass
class Said:
    """What one patched model has told already, over all of its runs."""

    texts: set[str] = field(default_factory=set)
    excused: set[frozenset] = field(default_factory=set)                      # layers that do not ask, however compiled


class SamplingRun:
    """Made when a sampler starts and dropped when it ends; nothing outlives it but its report."""

    def __init__(
        self, plan: SparsePlan, facts: ModelFacts, noise: torch.Tensor, sigmas: torch.Tensor, model_sampling: object,
        said: Said, adapter: Adapter | None = None, make_attention: Callable = AttentionRun,
    ) -> None:
        self.make_attention = make_attention
        self.attention = make_attention(plan, adapter)
        self.plan = plan = self.attention.plan
        self.adapter = adapter
        self.facts = facts
        self.schedule = _schedule(plan, noise, sigmas, model_sampling)
        self.tally = Tally()
        self.said = said
        self.clock = AttentionClock()
        self.below = ""
        self.unguarded: set[Hashable] = set()         # conditionings that are not finite with dense attention either
        self.complete_shapes: set[torch.Size] = set() # latents of which some call heard every layer
        self._compiled_anew = self._said_not_finite = False
        self._attentions: dict[torch.device, AttentionRun] = {}
        self._lock = threading.Lock()       # clones on several GPUs share a run, each in a thread of its own
        self.started = time.perf_counter()
        if plan.strict and plan.backend != "dense":
            self._refuse_hopeless(noise)

    def _refuse_hopeless(self, noise: torch.Tensor) -> None:
        """Raise before the first step if no call of the run could be sparse for a reason the person did not choose."""
        if self.facts.unsupported:
            raise SparseNotPossible(self.facts.unsupported)
        if noise.ndim == 5:
            tokens = self.facts.video_tokens(noise.shape)
            if tokens < self.plan.min_tokens:
                raise SparseNotPossible(
                    _too_short(tokens, self.plan.min_tokens),
                    "Lower min_tokens, make the video larger or longer, or switch strict off.",
                )
        unable = ops.why_not(self.facts.head_width, self.facts.heads, self.facts.heads)
        if unable:
            raise SparseNotPossible(unable)

    def call_reason(self, sigma: float) -> str | None:
        """Why a whole model call stays dense; None where its layers may be sparse."""
        if self.plan.backend == "dense":
            return BACKEND_DENSE
        return self.schedule.dense_reason(sigma) or self.attention.method.dense_reason(
            self.place(sigma), self.schedule.whole_steps
        )

    def input_reason(self, layer: Hashable, inputs: LayerInputs) -> str | None:
        """Why a call stays dense for want of what an adapter has, or needs."""
        if self.adapter is not None and not self.adapter.knows(layer):
            return f"'{self.adapter.name}' has no weights for control blocks"
        missing = self.attention.missing(inputs)
        return missing and f"{missing} (is the layer's self-attention replaced by another node?)"

    def layer_reason(self, layer: int, head_width: int, heads: int, kv_heads: int) -> tuple[str | None, bool]:
        """Why a layer stays dense, and whether the person chose that."""
        if layer in self.plan.dense_layers:
            return DENSE_LAYER, True
        return ops.why_not(head_width, heads, kv_heads), False

    def length_reason(self, layout: TokenLayout) -> tuple[str | None, bool]:
        """Why a video of such a length stays dense, and whether the person chose that."""
        if layout.video_tokens < self.plan.min_tokens:
            return _too_short(layout.video_tokens, self.plan.min_tokens), False
        blocks = -(-layout.video_tokens // BLOCK)
        return (NOTHING_TO_SKIP if self.plan.kept_blocks(blocks) >= blocks else None), True

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, layer: Hashable, sigma: float,
        conditioning: tuple[tuple[Hashable, int], ...], part: Hashable, scale: float | None, inputs: LayerInputs,
        visible: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, AttentionCost, str]:
        """Sparse self-attention: q, k, v `(B, H, L, D)` -> `(B, H, L, D)`, its cost, and the backend it ran on.

        visible `(n,)`: tokens that a mask leaves; the others, text all of them, attend to nothing and give out 0.
        """
        whole = q
        if visible is not None:
            q, k, v = (x.index_select(2, visible) for x in (q, k, v))
            layout = replace(layout, before=layout.before - (whole.shape[2] - visible.numel()))
        out, cost = self._attention_on(q.device).attend(
            q, k, v, layout, layer, self.place(sigma), conditioning, scale, self.schedule.whole_steps, sigma, inputs,
            part,
        )
        if visible is not None:
            out = whole.new_zeros(whole.shape).index_copy_(2, visible, out)
        backend, why = ops.backend_for(q, self.plan.backend, BLOCK)
        if backend == "pytorch" and q.device.type != "cpu" and self.plan.backend == "auto":
            self.say_once(
                f"sparse attention runs in plain PyTorch, which may be slower on {q.device.type} than dense attention: "
                f"{why}"
            )
        return out, cost, backend

    def _attention_on(self, device: torch.device) -> AttentionRun:
        """Each device has a memory of its own, which one thread alone uses."""
        with self._lock:
            if device not in self._attentions:
                spare = self.attention if not self._attentions else None
                self._attentions[device] = spare or self.make_attention(self.plan, self.adapter)
            return self._attentions[device]

    def forget(self, device: torch.device) -> None:
        """Drop what the method has learned on a device so far in this run."""
        with self._lock:
            self._attentions[device] = self.make_attention(self.plan, self.adapter)

    def begin_call(self, below: Callable | None) -> bool:
        """Count a model call; whether it is the first. below: who held the attention slot, and gets dense calls."""
        with self._lock:
            self.tally.model_calls += 1
            first = self.tally.model_calls == 1
        if first and below is not None:
            self.below = _holder_name(below)
            logger.info("RoPeSLR: attention that stays dense goes on to %s", self.below)
        return first

    def end_call(self, tally: Tally) -> None:
        """Add what one model call counted."""
        with self._lock:
            self.tally.add(tally)

    def compiles_anew(self, shape: torch.Size, missing: frozenset) -> bool:
        """Whether a compiled model that left out some layers is to be run again, after dropping its graphs once.

        torch.compile nodes drop the guards on transformer_options: a graph, of the whole model or of one block, that
        was made without this node is used again and never asks the slot. Layers that other nodes skip do not either;
        so a shape that once was complete is believed, and layers that stay silent when compiled anew are excused.
        """
        if shape in self.complete_shapes or missing in self.said.excused:
            return False
        with self._lock:
            if not self._compiled_anew:     # what is compiled from now on asks the slot
                self._compiled_anew = True
                logger.info("RoPeSLR: the model was compiled without this node; compiling it again")
                torch.compiler.reset()
        return True

    def excuse(self, missing: frozenset) -> None:
        """Layers that do not ask the slot in a graph made with it: that is how this model runs."""
        if missing:
            self.said.excused.add(missing)

    def place(self, sigma: float) -> int:
        """The step of the whole schedule that a noise level belongs to."""
        return self.schedule.before + self.schedule.step(sigma)

    def say_not_finite(self) -> None:
        """A model call was computed again, dense; said once in every run."""
        text = "a sparse output was not finite (NaN or infinite)"
        if self.plan.strict:
            raise SparseNotPossible(text)
        if not self._said_not_finite:
            self._said_not_finite = True
            logger.warning("RoPeSLR: %s; that model call is computed again with dense attention", text)

    def warn_dense(self, reason: str) -> None:
        """Say that calls run dense for a reason that the person did not choose; strict makes it an error."""
        if self.plan.strict:
            raise SparseNotPossible(reason)
        self.say_once(f"attention runs dense: {reason}")

    def say_once(self, text: str, with_traceback: bool = False) -> None:
        """Log what the person should know, once for each patched model."""
        if text not in self.said.texts:
            self.said.texts.add(text)
            logger.warning("RoPeSLR: %s", text, exc_info=with_traceback)

    def report(self, completed: bool) -> RunReport:
        """The run in numbers."""
        tally, spans = self.tally, self.clock.spans() if completed else {}
        return RunReport(
            model=self.facts.name, method=self.plan.method, adapter=self.adapter.name if self.adapter else "",
            sparsity=self.plan.sparsity, block_order=self.plan.block_order, backend=tally.backend,
            sparse_calls=tally.sparse_calls,
            dense_calls=dict(tally.dense_calls), other_calls=dict(tally.other_calls),
            density=tally.density / tally.sparse_calls if tally.sparse_calls else 1.0,
            dense_tflop=tally.dense_flops / 1e12, spent_tflop=tally.spent.total() / 1e12,
            spent_parts={part: flops / 1e12 for part, flops in tally.spent.items()},
            recall=tally.recall / tally.measured if tally.measured else None, calibrations=tally.calibrations,
            model_calls=tally.model_calls,
            below=self.below, seconds=time.perf_counter() - self.started, completed=completed, tokens=tally.tokens,
            attention_seconds={kind: sum(spans.get(kind, ())) for kind in ("sparse", "dense")} if spans else None,
            call_seconds={kind: statistics.median(each) for kind, each in spans.items()} or None,
            map=tally.map(self.facts.layers),
        )


def _schedule(plan: SparsePlan, noise: torch.Tensor, sigmas: torch.Tensor, model_sampling: object) -> StepSchedule:
    levels = [float(s) for s in sigmas]
    before, after = steps_outside(
        levels, adds_noise(noise), model_sampling, plan.dense_first_steps > 0 or plan.method == "adaspa",
        plan.dense_last_steps > 0 or plan.method == "adaspa",
    )
    return StepSchedule(
        tuple(levels),
        # The ends of the schedule mean "no limit"; samplers may start a little above the model's own maximum.
        math.inf if plan.start_percent <= 0.0 else float(model_sampling.percent_to_sigma(plan.start_percent)),
        -math.inf if plan.end_percent >= 1.0 else float(model_sampling.percent_to_sigma(plan.end_percent)),
        plan.dense_first_steps, plan.dense_last_steps, before, after,
    )


def _too_short(tokens: int, least: int) -> str:
    return f"{tokens} tokens are fewer than min_tokens {least}"


def _holder_name(holder: Callable) -> str:
    """A function's name, with that of the node pack it comes from."""
    function = getattr(holder, "func", holder)                                # behind a functools.partial
    module = getattr(function, "__module__", None) or ""
    name = getattr(function, "__qualname__", type(function).__name__).replace(".<locals>", "")
    pack = module.replace("\\", "/").partition("custom_nodes/")[2].partition(".")[0] or module
    return f"{name} of {pack}" if pack else name
