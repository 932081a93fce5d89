"""One sampling run of a patched model: schedule, what the method remembers, and the count of what happened."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch

from ...attention import AttentionRun, LayerInputs, SparsePlan, TokenLayout
from ...attention.accounting import dense_flops
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


class SamplingRun:
    """Made when a sampler starts and dropped when it ends; nothing outlives it but its report."""

    def __init__(
        self, plan: SparsePlan, facts: ModelFacts, noise: torch.Tensor, sigmas: torch.Tensor, model_sampling: object,
        already_said: set[str], adapter: Adapter | None = None, make_attention: Callable = AttentionRun,
    ) -> None:
        self.make_attention = make_attention
        self.attention = make_attention(plan, adapter)
        self.plan = plan = self.attention.plan
        self.adapter = adapter
        self.facts = facts
        self.schedule = _schedule(plan, noise, sigmas, model_sampling)
        self.tally = Tally()
        self.already_said = already_said
        self.guarded = True                 # non-finite output is looked for
        self.clock = AttentionClock()
        self.compiled_anew = False
        self.below = ""
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
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, layer: Hashable, number: int,
        sigma: float, conditioning: tuple[tuple[Hashable, int], ...], part: Hashable, scale: float | None,
        inputs: LayerInputs, visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sparse self-attention, counted: q, k, v `(B, H, L, D)` -> `(B, H, L, D)`.

        visible `(n,)`: tokens that a mask leaves; the others, text all of them, attend to nothing and give out 0.
        """
        whole = q
        if visible is not None:
            q, k, v = (x.index_select(2, visible) for x in (q, k, v))
            layout = replace(layout, before=layout.before - (whole.shape[2] - visible.numel()))
        out, cost = self.attention.attend(
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
        self.tally.sparse(cost, backend, layout.tokens, self.schedule.step(sigma), number)
        return out

    def stay_dense(
        self, reason: str, number: int, sigma: float, batch: int, tokens: int, width: int, heads: int
    ) -> None:
        """Count a self-attention call that stays dense."""
        cost = batch * dense_flops(tokens, width, heads)
        self.tally.dense(reason, cost, self.schedule.step(sigma), number)

    def place(self, sigma: float) -> int:
        """The step of the whole schedule that a noise level belongs to."""
        return self.schedule.before + self.schedule.step(sigma)

    def leave_dense(self, reason: str, calls: int = 1) -> None:
        """Count and say calls that stay dense unseen, so that their cost is not known."""
        self.warn_dense(reason)
        self.tally.dense_calls[reason] += calls

    def forget(self) -> None:
        """Drop what the method has learned so far in this run."""
        self.attention = self.make_attention(self.plan, self.adapter)

    def not_finite(self, dense_too: bool) -> None:
        """A model call's sparse output was not finite; it has been computed again, dense."""
        if dense_too:
            self.guarded = False            # to compute every call twice would not help
            self.say_once("the model gives out numbers that are not finite, with dense attention too")
        else:
            self.warn_dense("a sparse output was not finite (NaN or infinite); that model call was computed again")

    def look_below(self, holder: Callable | None) -> None:
        """Say who held the attention slot before, and gets the calls that stay dense."""
        if holder is not None:
            self.below = _holder_name(holder)
            logger.info("RoPeSLR: attention that stays dense goes on to %s", self.below)

    def warn_dense(self, reason: str, with_traceback: bool = False) -> None:
        """Say that calls run dense for a reason that the person did not choose; strict makes it an error."""
        if self.plan.strict:
            raise SparseNotPossible(reason)
        self.say_once(f"attention runs dense: {reason}", with_traceback)

    def say_once(self, text: str, with_traceback: bool = False) -> None:
        """Log what the person should know, once for each patched model."""
        if text not in self.already_said:
            self.already_said.add(text)
            logger.warning("RoPeSLR: %s", text, exc_info=with_traceback)

    def report(self, completed: bool) -> RunReport:
        """The run in numbers."""
        tally = self.tally
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
            attention_seconds=self.clock.seconds() if completed else None, map=tally.map(self.facts.layers),
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
