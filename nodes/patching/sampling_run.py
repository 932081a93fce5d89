"""One sampling run of a patched model: its schedule, its method's memory, its counts."""

from __future__ import annotations

import contextlib
import logging
import statistics
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...attention import AttentionRun, ResolvedPlan
from ...attention.adapters import Adapter, AdapterInfo
from ...attention.backend import backend_of, shape_reason, tuned
from ...attention.learned import Lesson, learned_adapter
from ...attention.parallel import Peers
from ...attention.run import Attention
from ...attention.schedule import StepSchedule
from ...attention.training import TrainingRun
from .dense_reason import BACKEND_DENSE, TRAINING, DenseReason, SparseNotPossible, too_short
from .model_info import ModelInfo
from .notices import Notices
from .recompile import Recompiler
from .run_report import RunReport
from .tally import Tally
from .timing import AttentionTiming

logger = logging.getLogger(__name__)

SLOW_BACKEND = (
    "sparse attention runs in plain PyTorch, which may be slower than dense attention on {device}: "
    "{why}"
)
NOT_FINITE_HERE = "a sparse output was not finite (NaN or infinite)"
MAKE_LONGER = "Lower min_tokens, make the video larger or longer, or switch strict off."


class SamplingRun:
    """Made when a sampler starts and dropped when it ends; nothing outlives it but its report and
    what it has learned.

    Clones on several GPUs share a run, each in a thread of its own.
    """

    def __init__(
        self,
        plan: ResolvedPlan,
        info: ModelInfo,
        schedule: StepSchedule,
        notices: Notices,
        recompiler: Recompiler,
        make_attention: Callable[[ResolvedPlan], Attention] = AttentionRun,
    ) -> None:
        self.plan = plan
        self.info = info
        self.models: list[Any] = []  # the BaseModels that it samples with, one per GPU
        # The processes that compute the same model calls, each with a share of the heads.
        self.peers: Peers | None = None
        self.schedule = schedule
        self.notices = notices
        self.recompiler = recompiler
        self.attention = make_attention(plan)
        self.tally = Tally()
        self.timing = AttentionTiming()
        self.previous = ""  # who else had set an override
        # Conditionings whose output dense attention makes infinite too.
        self.unguarded: set[Hashable] = set()
        self.started = time.perf_counter()
        self._make_attention = make_attention
        self.training = TrainingRun(plan)
        # Of models that are trained through: a checkpoint's layers run again after their call.
        self._kept_hooks = contextlib.ExitStack()
        self._hooked: set[Any] = set()
        # The first device takes the attention that is there already.
        self._spare: Attention | None = self.attention
        self._attentions: dict[torch.device, Attention] = {}
        self.override_called = False  # by any attention, in any model call so far
        self.layers_seen: set[Hashable] = set()  # those that called it
        self._warned_not_finite = False
        self._lock = threading.Lock()

    @property
    def needs_inputs(self) -> bool:
        """Whether the method asks for more of a layer than q, k and v."""
        return self.attention.needs_x or self.attention.needs_rope

    def is_of(self, base_model: Any) -> bool:
        """Whether the run samples with a model."""
        return any(base_model is each for each in self.models)

    def refuse_hopeless(self, latent_shape: tuple[int, ...]) -> None:
        """Raise before the first step if no call can be sparse, for a reason that nobody chose.

        latent_shape: of the video's latent; guide frames count, so that some calls may still be too
        short.
        """
        if self.info.unsupported:
            raise SparseNotPossible(self.info.unsupported)
        if len(latent_shape) == 5 and not self.attention.always:
            short = too_short(self.info.video_tokens(latent_shape), self.plan.min_tokens)
            if short is not None:
                raise SparseNotPossible(short, MAKE_LONGER)
        heads = self.info.num_heads
        unable = shape_reason(self.info.head_dim, heads, heads)
        if unable:
            raise SparseNotPossible(unable)

    @property
    def trains(self) -> bool:
        """Whether what runs now is trained through, as the plan allows."""
        return self.plan.training == "sparse" and (in_training() or torch.is_grad_enabled())

    def call_reason(self, sigma: float) -> DenseReason | None:
        """Why a whole model call stays dense; None where its layers may be sparse."""
        if self.plan.backend == "dense":
            return DenseReason(BACKEND_DENSE, chosen=True)
        if self.trains:  # at levels that belong to no schedule
            return None
        if in_training():
            return DenseReason(TRAINING)
        step = self.schedule.before + self.schedule.step(sigma)
        text = self.schedule.dense_reason(sigma) or self.attention.dense_reason(
            step, self.schedule.full_steps
        )
        return None if text is None else DenseReason(text, chosen=True)

    def attention_on(self, device: torch.device) -> Attention:
        """Each device has a memory of its own, which one thread alone uses."""
        with self._lock:
            if device not in self._attentions:
                found, self._spare = self._spare, None
                self._attentions[device] = found or self._make_attention(self.plan)
            return self._attentions[device]

    def hooks(
        self, model: Any, make: Callable[[], contextlib.AbstractContextManager], keep: bool
    ) -> contextlib.AbstractContextManager:
        """A model's hooks for one call; or, where they are kept, to the run's end."""
        with self._lock:
            if keep and model not in self._hooked:
                self._hooked.add(model)
                self._kept_hooks.enter_context(make())
            return contextlib.nullcontext() if model in self._hooked else make()

    def drop_hooks(self) -> None:
        """Take off those that were kept."""
        self._kept_hooks.close()
        self._hooked.clear()

    def forget(self, device: torch.device) -> None:
        """Drop what the method has learned on a device so far in this run."""
        with self._lock:
            self._attentions[device] = self._make_attention(self.plan)

    def backend_of(self, q: Tensor) -> str:
        """The backend that attends for q; logged where it may be slow."""
        backend, obstacle = backend_of(self.plan, q)
        if backend == "pytorch" and q.device.type != "cpu" and self.plan.backend == "auto":
            self.notices.once(SLOW_BACKEND.format(device=q.device.type, why=obstacle))
        return backend

    def begin_call(self, previous: Callable | None) -> None:
        """Count a model call. previous: the override set before, which gets dense calls."""
        with self._lock:
            self.tally.model_calls += 1
            first = self.tally.model_calls == 1
        if first and previous is not None:
            self.previous = override_name(previous)
            logger.info("RoPeSLR: dense attention is handled by %s", self.previous)

    def end_call(self, tally: Tally) -> None:
        """Add what one model call counted."""
        with self._lock:
            self.tally += tally

    def warn_not_finite(self) -> None:
        """Log, once per run, that a model call is recomputed dense."""
        if self.plan.strict:
            raise SparseNotPossible(NOT_FINITE_HERE)
        if not self._warned_not_finite:
            self._warned_not_finite = True
            logger.warning(
                "RoPeSLR: %s; recomputing this model call with dense attention", NOT_FINITE_HERE
            )

    @property
    def query_block(self) -> int:
        """Queries that keep the same key blocks, as the run's devices found."""
        known = [each.query_block for each in self._attentions.values()]
        return max(known, default=self.plan.query_tokens)

    def _tuned(self) -> str:
        """Whether the kernels that ran were tuned here, in words."""
        devices = list(self._attentions)
        return tuned(devices[0]) if devices and self.tally.backend == "triton" else ""

    def learned(self) -> Adapter | None:
        """What the run has learned, on all devices, as an adapter on the CPU; None for nothing.

        Nor where other processes have learned the rest of it.
        """
        lessons: dict[Hashable, list[Lesson]] = {}
        for attention in self._attentions.values():
            for layer, found in attention.lessons.items():
                lessons.setdefault(layer, []).extend(found)
        if not lessons or self.peers is not None:
            return None
        plan, info = self.plan, self.info
        facts = AdapterInfo(
            plan.method,
            info.num_layers,
            info.num_heads,
            info.head_dim,
            plan.adapter.info.rank if plan.adapter else 0,
            base_model=info.name,
            block_q=self.query_block,
            block_k=plan.key_tokens,
            block_order=plan.block_order,
            sparsity=plan.sparsity,
            source="learned in a run",
            steps=self.schedule.full_steps,
        )
        if plan.adapter is not None:  # what it says of its own tensors
            own = plan.adapter.info
            facts = replace(facts, act=own.act, pe=own.pe, pe_grid=own.pe_grid, fusion=own.fusion)
        return learned_adapter(lessons, info.layer_identities(), facts, plan.adapter)

    def report(self, completed: bool) -> RunReport:
        """The run in numbers."""
        tally, plan = self.tally, self.plan
        spans = self.timing.spans() if completed else {}
        sums = {kind: sum(spans.get(kind, ())) for kind in ("sparse", "dense")}
        medians = {kind: statistics.median(each) for kind, each in spans.items()}
        return RunReport(
            model=self.info.name,
            method=plan.method,
            adapter=plan.adapter.name if plan.adapter else "",
            sparsity=plan.sparsity,
            block_order=plan.block_order,
            key_block=plan.key_tokens,
            query_block=self.query_block,
            tuned=self._tuned(),
            eight_bit_calls=sum(each.precision.calls for each in self._attentions.values()),
            sixteen_bit_layers=max(
                (each.precision.refused for each in self._attentions.values()), default=0
            ),
            backend=tally.backend,
            sparse_calls=tally.sparse_calls,
            dense_calls=dict(tally.dense_calls),
            other_calls=dict(tally.other_calls),
            density=tally.density / tally.sparse_calls if tally.sparse_calls else 1.0,
            dense_tflop=tally.dense_flops / 1e12,
            spent_tflop=tally.spent.total() / 1e12,
            recall=tally.recall / tally.measured if tally.measured else None,
            calibrations=tally.calibrations,
            model_calls=tally.model_calls,
            previous=self.previous,
            seconds=time.perf_counter() - self.started,
            completed=completed,
            tokens=tally.tokens,
            attention_seconds=sums if spans else None,
            call_seconds=medians or None,
            spent_parts={name: flops / 1e12 for name, flops in tally.spent.items()},
            map=tally.map(self.info.num_layers),
            heads=tally.head_map(self.info.num_layers),
        )


def in_training() -> bool:
    """Whether ComfyUI's own training nodes are at work; False in versions without them."""

    return bool(getattr(comfy.model_management, "in_training", False))


def override_name(override: Callable) -> str:
    """A function's name, with that of the node pack it comes from."""
    function = getattr(override, "func", override)  # behind a functools.partial
    module = getattr(function, "__module__", None) or ""
    name = getattr(function, "__qualname__", type(function).__name__).replace(".<locals>", "")
    pack = module.replace("\\", "/").partition("custom_nodes/")[2].partition(".")[0] or module
    return f"{name} of {pack}" if pack else name
