"""Runs one model call with the override set, and again where its result cannot stand."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .call import CallFacts, Conditioning, ModelCall, Override
from .dense_reason import NOT_FINITE, OTHER_MODEL, DenseReason
from .hooks import CALL, watching
from .model_info import model_info, self_attentions, unwrap
from .override import sparse_override
from .recompile import is_compiled
from .sampling_run import SamplingRun
from .tally import COMPUTED_AGAIN
from .token_layout import sequence_info
from .unseen_layers import unseen_layers

logger = logging.getLogger(__name__)

SLOT = "optimized_attention_override"
MODEL_NOT_FINITE = "the model's output is not finite, with dense attention too"


class ApplyArguments(NamedTuple):
    """The arguments of BaseModel.apply_model."""

    x: Tensor
    t: Tensor
    c_concat: Tensor | None
    c_crossattn: Tensor | None
    control: Any
    options: dict[str, Any]  # transformer_options
    conditions: dict[str, Any]


class Result(NamedTuple):
    """What a model call gave, and what was seen in it."""

    out: Tensor
    call: ModelCall


def apply_model(run: SamplingRun, executor: Any, request: ApplyArguments) -> Tensor:
    """Run the model with the override set for the length of this call."""
    base = executor.class_obj
    facts = call_facts(run, base, request)
    run.begin_call(facts.previous)
    untouched = request.x.clone()  # some nodes write into it, and it may be needed again

    def execute(x: Tensor, reason: DenseReason | None = None) -> Result:
        return run_once(run, executor, request._replace(x=x), facts, reason)

    result = execute(request.x)
    missing = result.call.missing_layers()
    compiled = bool(missing) and is_compiled(base, request.options)
    if (compiled or not missing) and run.recompiler.needed(untouched.shape, missing):
        run.forget(request.x.device)  # some layers did call the override, after dense ones
        result = execute(untouched.clone())
        run.recompiler.settle(result.call.missing_layers())
    if run.plan.verbose:
        log_call(result.call)
    note_unseen_layers(result.call, base, request.options)
    result = retry_dense_if_not_finite(result, untouched, execute)
    run.end_call(result.call.tally)
    return result.out


def run_once(
    run: SamplingRun,
    executor: Any,
    request: ApplyArguments,
    facts: CallFacts,
    reason: DenseReason | None,
) -> Result:
    """One execution of the model. reason: why all of it stays dense."""
    # The modules that run now: other nodes put theirs in place when the model is loaded.
    model = executor.class_obj.diffusion_model
    layers = {} if facts.unsupported else self_attentions(model, run.info)
    call = ModelCall(run, facts, layers, reason)
    options = {**request.options, CALL: call, SLOT: sparse_override}
    with run.hooks(model, lambda: watching(layers, model), keep=call.trains):
        out = executor(
            request.x,
            request.t,
            request.c_concat,
            request.c_crossattn,
            request.control,
            options,
            **request.conditions,
        )
    call.overwritten = options.get(SLOT) is not sparse_override
    return Result(out, call)


def retry_dense_if_not_finite(
    result: Result, x: Tensor, execute: Callable[[Tensor, DenseReason | None], Result]
) -> Result:
    """The result, or that of dense attention where sparse attention made it infinite or NaN."""
    call, run = result.call, result.call.run
    guarded = (tuple(key for key, _ in call.conditioning), call.window)
    if guarded in run.unguarded or call.finite(x.device):
        return result
    wasted = call.tally.spent.total()
    run.forget(result.out.device)  # what it learned in this call may be spoiled
    again = execute(x, DenseReason(NOT_FINITE, chosen=True))
    again.call.tally.spent[COMPUTED_AGAIN] += wasted
    if torch.isfinite(again.out).all():
        run.warn_not_finite()
    else:  # computing every such call twice would not help
        run.unguarded.add(guarded)
        run.notices.once(MODEL_NOT_FINITE)
    return again


def note_unseen_layers(call: ModelCall, base: Any, options: Mapping[str, Any]) -> None:
    """Log and count layers that never called the override: nothing else would show it."""
    run = call.run
    if call.facts.unsupported:
        if not call.tally.dense_calls:
            call.leave_dense(call.facts.unsupported)
        return
    if call.saw_attention:
        run.override_called = True
    elif run.override_called:  # a cache has skipped the model; nothing of it ran, dense or sparse
        return
    for reason, layers in unseen_layers(call, base, options).items():
        call.leave_dense(reason, layers)
    run.layers_seen |= call.layers_seen


def log_call(call: ModelCall) -> None:
    """The line of `verbose`."""
    what = call.facts.unsupported or call.reason or "sparse"
    logger.info(
        "RoPeSLR: sigma %.4f, step %d of %d: %s",
        call.sigma,
        call.step + 1,
        call.run.schedule.steps,
        what,
    )


def call_facts(run: SamplingRun, base: Any, request: ApplyArguments) -> CallFacts:
    """What holds for every execution of one model call."""
    options, conditions = request.options, request.conditions
    facts = CallFacts(
        sigma=float(options["sigmas"][0].detach()),
        conditioning=_conditioning(options, request.x.shape[0]),
        window=tuple(getattr(options.get("context_window"), "index_list", None) or ()),
        unsupported=_unsupported(run, base),
        previous=_previous(options),
    )
    if facts.unsupported:
        return facts
    model = unwrap(base.diffusion_model)
    return replace(
        facts,
        sequence=sequence_info(run.info, model, request.x, conditions),
    )


def _previous(options: Mapping[str, Any]) -> Override | None:
    """The override that was set before; where this is a call within our own, what was before that.

    Another pack may copy options with our wrapper in them into options that have it too.
    """
    found = options.get(SLOT)
    return options[CALL].facts.previous if found is sparse_override else found


def _unsupported(run: SamplingRun, base: Any) -> DenseReason | None:
    """Why nothing of a model can be sparse in this run."""
    if not run.is_of(base):  # guiders with two models hand the first one's options to the second
        name = model_info(base.diffusion_model).name
        return DenseReason(OTHER_MODEL.format(name=name))
    return DenseReason(run.info.unsupported) if run.info.unsupported else None


def _conditioning(options: Mapping[str, Any], batch: int) -> Conditioning:
    """Which rows of the batch belong to which conditioning."""
    keys = options.get("uuids") or options.get("cond_or_uncond") or ["all"]
    if batch % len(keys):
        return (("all", batch),)
    return tuple((key, batch // len(keys)) for key in keys)
