"""Checkpoints trained with VSA: their gate is used, or a person is told that it is not."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...attention import SparsePlan
from ...attention.adapters import holds
from ...attention.plan import OF_THE_MODEL
from .dense_reason import SparseNotPossible
from .model_info import ModelInfo, coarse_gate, self_attentions
from .notices import warn

GATE = ".to_gate_compress."
NOT_LOADED = (
    "'{file}' was trained with VSA, and this ComfyUI does not load its gate: the video will be "
    "noise, with this node and without it. ComfyUI 0.35 and newer load it"
)
LEFT_OUT = (
    "the checkpoint was trained with VSA, and {method} leaves out its gated branch: the video may "
    "be noise. Set method to vsa"
)
NO_GATE = "the model has no gate of VSA, so only block-sparse attention runs, in VSA's tiles"
OTHER_METHOD = "Set method to auto."


def for_gates(model: Any, info: ModelInfo, plan: SparsePlan, has_adapter: bool) -> SparsePlan:
    """The plan with what "auto" means for a MODEL with gates; warns where they go unused.

    Raises SparseNotPossible where a strict plan asks for VSA and there is none.
    """
    gated = any(coarse_gate(each) is not None for each in self_attentions(_net(model), info))
    if gated and plan.method == "auto" and not has_adapter:
        return replace(plan, method=OF_THE_MODEL)
    if gated and plan.method != OF_THE_MODEL:
        method = "the adapter's method" if plan.method == "auto" else plan.method
        warn(LEFT_OUT.format(method=method))
    path = None if gated else _file(model)
    if path is not None and _has_gates(path):
        warn(NOT_LOADED.format(file=path.name))
    elif not gated and plan.method == OF_THE_MODEL:
        if plan.strict and plan.backend != "dense":
            raise SparseNotPossible(NO_GATE, OTHER_METHOD)
        warn(f"{NO_GATE}. {OTHER_METHOD}")
    return plan


def _net(model: Any) -> Any:
    return model.model.diffusion_model


def _file(model: Any) -> Path | None:
    """The file that a MODEL was loaded from, where ComfyUI remembers it."""
    remembered = getattr(model, "cached_patcher_init", None)
    arguments = remembered[1] if isinstance(remembered, tuple) and len(remembered) > 1 else ()
    path = arguments[0] if isinstance(arguments, tuple) and arguments else None
    return Path(path) if isinstance(path, str) else None


@lru_cache(maxsize=64)
def _has_gates(path: Path) -> bool:
    return holds(path, GATE)
