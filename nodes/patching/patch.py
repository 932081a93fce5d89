"""Installs the plan on a clone of a MODEL: one wrapper around a sampling run, one around each model call.

The model itself is never touched, so bypassing or deleting the node leaves nothing behind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from comfy.patcher_extension import WrappersMP

from ...attention import AttentionRun, SparsePlan
from ...attention.adapters import Adapter, check_model
from ...attention.run import check_triton, resolved
from .layer_inputs import watching
from .model_call import call_model
from .recognise import recognise
from .report import RunReport
from .sampling_run import Said, SamplingRun, SparseNotPossible
from .weights import carried

logger = logging.getLogger(__name__)

KEY = "ropeslr"
RUN = "ropeslr_run"


class SparsePatch:
    """A plan on one model, shared by the model's clones; remembers the report of the last run."""

    def __init__(
        self, plan: SparsePlan, node_id: str | None, adapter: Adapter | None = None,
        make_attention: Callable = AttentionRun,
    ) -> None:
        self.plan = plan
        self.adapter = adapter
        self.make_attention = make_attention
        self.node_id = node_id
        self.last_report: RunReport | None = None
        self.said = Said()

    def outer_sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE wrapper: args are (noise, latent image, sampler, sigmas, ...). A run begins and ends here."""
        guider = executor.class_obj
        patcher = guider.model_patcher
        self.last_report = None             # a run that strict refuses must not show the report of the one before
        run = SamplingRun(
            self.plan, recognise(patcher.model.diffusion_model), args[0], args[3],
            patcher.get_model_object("model_sampling"), self.said, self.adapter, self.make_attention,
        )
        method = run.attention.method
        guider.model_options.setdefault("transformer_options", {})[RUN] = run     # a copy that ends with the run
        completed = False
        try:
            models = [patcher, *patcher.get_additional_models_with_key("multigpu")]
            needed = method.needs_x or method.needs_positions
            with watching([each.model.diffusion_model for each in models], needed):
                result = executor(*args, **kwargs)
            completed = True
            return result
        finally:
            self.last_report = run.report(completed)
            self.tell(self.last_report)

    def tell(self, report: RunReport) -> None:
        """One line in the log, and an event for the browser."""
        logger.info(report.summary())
        report.send(self.node_id)

    def apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs
    ):
        """APPLY_MODEL wrapper: see `call_model`."""
        run = transformer_options.get(RUN)
        if run is None:                     # not inside a sampling run of ours, a training node for example
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        return call_model(run, executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


def install(model, plan: SparsePlan, node_id: str | None = None, adapter: Adapter | None = None):
    """A clone of MODEL that samples as the plan says; a plan installed before by this node is replaced.

    Raises SparseNotPossible when the plan is strict and the model or method cannot run sparse as asked, ValueError when
    the adapter fits neither the plan's method nor the model, TritonNotUsable when the plan demands Triton in vain.
    """
    facts = recognise(model.model.diffusion_model)
    plan = resolved(plan, adapter)
    if adapter is not None and not facts.unsupported:
        check_model(adapter, facts.layer_identities(), facts.heads, facts.head_width, f"this {facts.name}")
    if plan.strict and facts.unsupported:
        raise SparseNotPossible(facts.unsupported)
    _say_what_is_missing(plan, adapter)
    if adapter is not None and adapter.info.method != plan.method:
        adapter = None
    if not facts.unsupported:
        check_triton(plan, model.load_device, model.model.get_dtype_inference(), facts.head_width)
    beyond = sorted(layer for layer in plan.dense_layers if layer >= facts.layers) if not facts.unsupported else []
    if beyond:
        logger.warning(
            "RoPeSLR: dense_layers has %s; %s has %d layers, counted 0-%d", ", ".join(map(str, beyond)), facts.name,
            facts.layers, facts.layers - 1,
        )
    patched = model.clone()
    patched.remove_additional_models(KEY)
    if adapter is not None:
        patcher, adapter = carried(adapter, patched)
        patched.set_additional_models(KEY, [patcher])
    put_on(patched, SparsePatch(plan, node_id, adapter))
    return patched


def put_on(model, patch: SparsePatch) -> None:
    """Let a MODEL sample through a patch, in place of one that it had."""
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, patch.outer_sample), (WrappersMP.APPLY_MODEL, patch.apply_model)):
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, wrapper)
    model.set_attachments(KEY, patch)


def _say_what_is_missing(plan: SparsePlan, adapter: Adapter | None) -> None:
    """Where a method runs as less than its name: without weights, or with weights that it has no use for."""
    if adapter is None and plan.method in ("rola", "sla"):
        if plan.strict and plan.backend != "dense":
            raise SparseNotPossible(
                f"{plan.method} has no adapter, and without its weights it is the kept blocks alone",
                "Connect an adapter (Load Sparse Checkpoint), or choose ropeslr, which needs none.",
            )
        logger.warning(
            "RoPeSLR: %s has no adapter, so its low-rank branch has no weights: the kept blocks run alone. Connect an "
            "adapter (Load Sparse Checkpoint), or choose ropeslr, which needs none", plan.method,
        )
    elif adapter is not None and adapter.info.method != plan.method:
        logger.warning("RoPeSLR: %s takes no adapter; '%s' plays no part", plan.method, adapter.name)
    elif adapter is not None and adapter.sparse_only:
        logger.warning("RoPeSLR: the projection in '%s' is zero: the kept blocks run alone", adapter.name)


def last_report(model) -> RunReport | None:
    """The report of the last sampling run of a patched MODEL or any of its clones; None before the first."""
    patch = model.get_attachment(KEY)
    return None if patch is None else patch.last_report
