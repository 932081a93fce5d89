"""A plan on a MODEL: wrappers around its sampling runs and model calls.

The model itself is never touched, so bypassing or deleting the node leaves nothing behind.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from comfy.patcher_extension import CallbacksMP, WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...attention import AttentionRun, ResolvedPlan
from ...attention.adapters import Adapter
from ...attention.parallel import Peers
from ...attention.run import Attention
from .apply_model import ApplyArguments, apply_model
from .full_schedule import adds_noise, step_schedule
from .model_info import model_info
from .notices import Notices
from .recompile import Recompiler
from .run_report import RunReport
from .sampling_run import SamplingRun
from .shared_model import SharedModel
from .token_layout import video_shape

logger = logging.getLogger(__name__)

KEY = "ropeslr"
RUNS = "ropeslr_runs"
OWN_STEPS = {"dpm_fast_function": "dpm_fast", "dpm_adaptive_function": "dpm_adaptive"}

NOT_LEARNED = "what this run has learned cannot be saved"
OWN_HEADS = " (of the heads of one of {count} GPUs)"
LAST_STEPS_UNKNOWN = "dense_last_steps has no effect with {sampler}, which makes its own steps"


@dataclass
class Runs:
    """The sampling runs under way, found through transformer_options."""

    main: SamplingRun | None = None  # of the guider's own model
    by_model: dict[Any, SamplingRun | None] = field(default_factory=dict)
    starts: bool = True  # from noise of the sampler's own, as far as is known

    def of(self, base_model: Any) -> SamplingRun | None:
        """A model's own run; a model without a node is counted in the guider's run."""
        return self.by_model.get(base_model) or self.main


class SparsePatch:
    """A plan on one model, shared by the model's clones; remembers what the last run did
    and learned."""

    def __init__(
        self,
        plan: ResolvedPlan,
        node_id: str | None = None,
        make_attention: Callable[[ResolvedPlan], Attention] = AttentionRun,
        peers: Peers | None = None,
    ) -> None:
        self.plan = plan
        self.node_id = node_id
        self.make_attention = make_attention
        self.peers = peers
        self.last_report: RunReport | None = None
        self.last_learned: Adapter | None = None
        self.notices = Notices(plan.strict)
        # Layers that stay silent when compiled.
        self.known_missing: set[frozenset[Hashable]] = set()
        self._guest: SamplingRun | None = None  # begun in another model's sampling

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """OUTER_SAMPLE wrapper: args are (noise, latent image, sampler, sigmas, ...).

        A run begins and ends here.
        """
        guider = executor.class_obj
        noise, _, sampler, sigmas = args[:4]
        self._check_sampler(sampler)
        starts = adds_noise(noise)
        run = self._begin(guider.model_patcher, sigmas, starts)
        if self.plan.strict and self.plan.backend != "dense":
            run.refuse_hopeless(video_shape(noise.shape, kwargs.get("latent_shapes")))
        options = guider.model_options.setdefault("transformer_options", {})
        # In a copy that ends with the run.
        options[RUNS] = Runs(run, dict.fromkeys(run.models, run), starts)
        completed = False
        try:
            result = executor(*args, **kwargs)
            completed = True
            return result
        finally:
            self._end(run, completed)

    def prepare_state(
        self, patcher: Any, timestep: Any, model_options: Any = None, *_: Any
    ) -> None:
        """ON_PREPARE_STATE callback, before the model calls of a step.

        A guider with two models hands the first one's options to the second, whose own wrappers
        nobody calls: the second one's run begins here, so that it follows its own node.
        """
        if not isinstance(model_options, dict):  # an older ComfyUI, which has no such guider
            return
        options = model_options.setdefault("transformer_options", {})
        sigmas = options.get("sample_sigmas")
        runs: Runs | None = options.get(RUNS)
        if sigmas is None or (runs is not None and patcher.model in runs.by_model):
            return
        if runs is None:
            runs = options[RUNS] = Runs()
            add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, wrapped_apply_model, options)
        self._guest = self._begin(patcher, sigmas, runs.starts)
        runs.by_model.update(dict.fromkeys(self._guest.models, self._guest))

    def clean_up(self, patcher: Any) -> None:
        """ON_CLEANUP callback: ends the run that `prepare_state` began."""
        if self._guest is not None:
            run, self._guest = self._guest, None
            self._end(run, completed=sys.exc_info()[0] is None)

    def _begin(self, patcher: Any, sigmas: Tensor, starts: bool) -> SamplingRun:
        """A run with a MODEL. starts: its sampler begins a schedule with noise of its own."""
        self.last_learned = None
        self.last_report = None  # a run that strict refuses must not show the report before
        models = [patcher, *patcher.get_additional_models_with_key("multigpu")]
        sampling = patcher.get_model_object("model_sampling")
        run = SamplingRun(
            self.plan,
            model_info(patcher.model.diffusion_model),
            step_schedule(self.plan, sigmas, starts, sampling),
            self.notices,
            Recompiler(self.known_missing),
            self.make_attention,
        )
        run.peers = self.peers
        run.models = [each.model for each in models]
        return run

    def _end(self, run: SamplingRun, completed: bool) -> None:
        run.drop_hooks()
        self.last_report = run.report(completed)
        try:
            self.last_learned = run.learned() if completed else None
        except (
            Exception
        ):  # the video is finished: what the next run may start from must not cost it
            logger.warning("RoPeSLR: %s", NOT_LEARNED, exc_info=True)
        self.publish(self.last_report)

    def publish(self, report: RunReport) -> None:
        """One line in the log, and an event for the browser."""
        size = 1 if self.peers is None else self.peers.share.size
        of = OWN_HEADS.format(count=size) if size > 1 else ""
        logger.info("%s%s", report.summary(), of)
        report.send(self.node_id)

    def _check_sampler(self, sampler: Any) -> None:
        name = makes_own_steps(sampler)
        if name and self.plan.dense_last_steps:
            self.notices.once(LAST_STEPS_UNKNOWN.format(sampler=name))


class SilentPatch(SparsePatch):
    """A patch whose run is no run of a person's."""

    def publish(self, report: RunReport) -> None:
        """Nothing."""


def makes_own_steps(sampler: Any) -> str | None:
    """The name of a sampler that goes through other noise levels than the sigmas; else None."""
    function = getattr(sampler, "sampler_function", None)
    return OWN_STEPS.get(getattr(function, "__name__", ""))


def wrapped_apply_model(  # ComfyUI's own signature, passed on as it is
    executor: Any,
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None = None,
    c_crossattn: Tensor | None = None,
    control: Any = None,
    transformer_options: dict[str, Any] = {},  # noqa: B006
    **kwargs: Any,
) -> Any:
    """APPLY_MODEL wrapper: see `apply_model`."""
    runs: Runs | None = transformer_options.get(RUNS)
    run = None if runs is None else runs.of(executor.class_obj)
    request = ApplyArguments(x, t, c_concat, c_crossattn, control, transformer_options, kwargs)
    if run is None:  # not inside a sampling run of ours
        return executor(*request[:-1], **kwargs)
    return apply_model(run, executor, request)


def put_on(model: Any, patch: SparsePatch) -> None:
    """Let a MODEL sample through a patch, in place of one that it had."""
    take_off(model)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, patch.outer_sample)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, wrapped_apply_model)
    if patch.peers is not None:
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, SharedModel(patch.peers))
    model.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, KEY, patch.prepare_state)
    model.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, patch.clean_up)
    model.set_attachments(KEY, patch)


def silent(model: Any) -> Any:
    """A clone of a patched MODEL whose runs are no runs of a person's."""
    clone = model.clone()
    put_on(clone, SilentPatch(installed_plan(model)))
    return clone


def take_off(model: Any) -> None:
    """Let a MODEL sample as it would without a patch."""
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL):
        model.remove_wrappers_with_key(kind, KEY)
    for kind in (CallbacksMP.ON_PREPARE_STATE, CallbacksMP.ON_CLEANUP):
        model.remove_callbacks_with_key(kind, KEY)
    model.remove_attachments(KEY)


def clear(model: Any) -> None:
    """Take off a MODEL's patch, with the weights that it brought."""
    take_off(model)
    model.remove_additional_models(KEY)


def installed_plan(model: Any) -> ResolvedPlan:
    """What a patched MODEL samples by; AttributeError where it is none."""
    return model.get_attachment(KEY).plan


def last_learned(model: Any) -> Adapter | None:
    """What the last sampling run of a patched MODEL or its clones learned; None for nothing."""
    patch: SparsePatch | None = model.get_attachment(KEY)
    return None if patch is None else patch.last_learned


def last_report(model: Any) -> RunReport | None:
    """The report of the last sampling run of a patched MODEL or its clones; None before it."""
    patch: SparsePatch | None = model.get_attachment(KEY)
    return None if patch is None else patch.last_report
