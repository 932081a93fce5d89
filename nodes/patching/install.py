"""A patched clone of a MODEL from a plan and an adapter, after checking that all three fit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from ...attention import AttentionRun, ResolvedPlan, SparsePlan
from ...attention.adapters import Adapter, check_model
from ...attention.backend import check_triton, use_tuning
from ...attention.parallel import Peers
from ...attention.plan import ALLOCATED, NEED_WEIGHTS
from ...attention.run import Attention
from ..folders import tuning_file
from .adapter_weights import as_comfy_weights
from .dense_reason import SparseNotPossible
from .model_info import ModelInfo, model_info
from .notices import warn
from .patch import KEY, SparsePatch, put_on
from .trained_gates import for_gates

logger = logging.getLogger(__name__)

NO_WEIGHTS = "{method} has no adapter, and without its weights only block-sparse attention runs"
CONNECT_ADAPTER = (
    "Connect an adapter (Load Sparse Checkpoint), or choose ropeslr, which needs none."
)
ADAPTER_IGNORED = "{method} takes no adapter; '{adapter}' is ignored"
PROJECTION_ZERO = "the projection in '{adapter}' is zero: only block-sparse attention runs"
NO_ERROR_TARGET = (
    "target is error, but {why}: sparsity decides. Set allocation to auto with ropeslr or top-k"
)
NO_SUCH_LAYERS = "dense_layers has {beyond}; {model} has {count} layers, counted 0-{last}"
EMPTY_WINDOW = "start_percent {start:g} is not below end_percent {end:g}, so no step runs sparse"
NOT_AN_ADAPTER = (
    "adapter is a {kind}; connect the output of Load RoPeSLR Adapter or Load Sparse Checkpoint."
)


def install(
    model: Any,
    plan: SparsePlan,
    node_id: str | None = None,
    adapter: Adapter | None = None,
    peers: Peers | None = None,
) -> Any:
    """A clone of MODEL that samples as the plan says; a plan that this node set before is replaced.

    peers: the processes that compute each model call with this one, where there are any.
    Raises SparseNotPossible when the plan is strict and the model or method cannot run sparse as
    asked, ValueError when the adapter fits neither the plan's method nor the model, TritonNotUsable
    when the plan demands Triton in vain.
    """
    if adapter is not None and not isinstance(adapter, Adapter):
        raise ValueError(NOT_AN_ADAPTER.format(kind=type(adapter).__name__))
    _go_by_tuning(model.load_device)
    info = model_info(model.model.diffusion_model)
    if not info.unsupported:
        plan = for_gates(model, info, plan, adapter is not None)
    resolved = plan.resolve(adapter)
    if info.unsupported:
        if resolved.strict:
            raise SparseNotPossible(info.unsupported)
    else:
        _check_fit(model, info, resolved, adapter)
    _log_what_is_ignored(resolved, adapter)
    patched = model.clone()
    patched.remove_additional_models(KEY)
    attention: Callable[[ResolvedPlan], Attention] = AttentionRun
    if peers is not None and peers.share.size > 1:
        share = peers.share
        if not info.unsupported:
            share.own(info.num_heads)
        attention = partial(AttentionRun, share=share)
        if resolved.adapter is not None:
            resolved = replace(resolved, adapter=share.adapter(resolved.adapter))
        attention(resolved)  # a method that cannot share its heads says so now
    if resolved.adapter is not None:
        patcher, adapter = as_comfy_weights(resolved.adapter, patched)
        resolved = replace(resolved, adapter=adapter)
        patched.set_additional_models(KEY, [patcher])
    put_on(patched, SparsePatch(resolved, node_id, attention, peers))
    return patched


@cache
def _go_by_tuning(device: torch.device) -> None:
    """What RoPeSLR Doctor measured on this GPU, read once."""
    if device.type == "cuda":
        logger.info("RoPeSLR: kernels %s", use_tuning(tuning_file(), device))


def _check_fit(model: Any, info: ModelInfo, plan: ResolvedPlan, adapter: Adapter | None) -> None:
    """The adapter, the backend and the layer numbers against a supported model."""
    if adapter is not None:
        identities = info.layer_identities()
        check_model(adapter, identities, info.num_heads, info.head_dim, f"this {info.name}")
    check_triton(plan, model.load_device, inference_dtype(model.model), info.head_dim)
    beyond = sorted(layer for layer in plan.dense_layers if layer >= info.num_layers)
    if beyond:
        warn(
            NO_SUCH_LAYERS.format(
                beyond=ranges(beyond),
                model=info.name,
                count=info.num_layers,
                last=info.num_layers - 1,
            )
        )


def inference_dtype(base_model: Any) -> torch.dtype:
    """The dtype of the activations; some forks of ComfyUI name it otherwise."""
    method = getattr(base_model, "get_dtype_inference", None) or base_model.get_dtype
    return method()


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as "2, 5-7, 40"."""
    stretches: list[list[int]] = []
    for number in numbers:
        if stretches and number == stretches[-1][1] + 1:
            stretches[-1][1] = number
        else:
            stretches.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in stretches)


def _log_what_is_ignored(plan: ResolvedPlan, adapter: Adapter | None) -> None:
    """Where a run does less than the settings seem to say."""
    if plan.error_target is not None and not plan.probes:
        why = "allocation is uniform"
        if plan.method not in ALLOCATED:
            why = f"{plan.method} does not measure what its heads need"
        elif plan.allocates and plan.adapter is not None:
            why = f"'{plan.adapter.name}' says what its heads keep, and calibrate is off"
        warn(NO_ERROR_TARGET.format(why=why))
    if plan.start_percent >= plan.end_percent:
        warn(EMPTY_WINDOW.format(start=plan.start_percent, end=plan.end_percent))
    if adapter is None and plan.method in NEED_WEIGHTS:
        text = NO_WEIGHTS.format(method=plan.method)
        if plan.strict and plan.backend != "dense":
            raise SparseNotPossible(text, CONNECT_ADAPTER)
        warn(f"{text}. {CONNECT_ADAPTER}")
    elif adapter is not None and plan.adapter is None:
        warn(ADAPTER_IGNORED.format(method=plan.method, adapter=adapter.name))
    elif adapter is not None and adapter.sparse_only:
        warn(PROJECTION_ZERO.format(adapter=adapter.name))
