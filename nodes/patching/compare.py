"""One dense model call on a finished latent, with every method tried beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.sample
import comfy.samplers
import torch

from ...attention import ResolvedPlan, SparsePlan
from ...attention.compare import MapSelection, MethodComparison
from ...attention.plan import METHODS, NEED_WEIGHTS, OF_THE_MODEL
from .model_info import model_info
from .patch import KEY, SilentPatch, SparsePatch, put_on


@dataclass(frozen=True)
class Request:
    """What to compare: all methods or one, where in the schedule (0-1), whose blocks to draw."""

    every_method: bool = False
    at: float = 0.5
    layer: int = 0
    head: int = 0


def compare(
    model: Any, latent: Mapping[str, Any], positive: list, request: Request
) -> MethodComparison | None:
    """Put noise on the first of a LATENT's `(B, C, ...)` and denoise it once, or once to learn.

    Uses the plan and the adapter of the RoPeSLR node on MODEL, default settings without one; steps,
    layers and lengths that the plan leaves dense are tried too. None where the model cannot run
    sparse, or nothing is left out. PyTorch's random state is left as it was.
    """
    info = model_info(model.model.diffusion_model)
    if info.unsupported:
        return None
    identities = info.layer_identities()
    number = min(request.layer, len(identities) - 1)
    selection = MapSelection(identities[number], number, request.head)
    plans = _plans(model.get_attachment(KEY), request.every_method)
    comparison = MethodComparison(plans, selection)
    compared = model.clone()
    put_on(compared, SilentPatch(comparison.plan, None, lambda _: comparison))
    if comparison.learns:
        comparison.learning = True
        _denoise_once(compared, latent, positive, request.at)
        comparison.learning = False
    _denoise_once(compared, latent, positive, request.at)
    return comparison if any(comparison.errors.values()) else None


def _plans(patch: SparsePatch | None, every_method: bool) -> dict[str, ResolvedPlan]:
    """The plans to try, by method; the first is the node's own."""
    plan = SparsePlan().resolve() if patch is None else patch.plan
    plan = replace(
        plan,
        dense_first_steps=0,
        dense_last_steps=0,
        start_percent=0.0,
        end_percent=1.0,
        dense_layers=frozenset(),
        min_tokens=0,
        strict=False,
        verbose=False,
        backend="auto" if plan.backend == "dense" else plan.backend,
    )
    plans = {plan.method: plan}
    if every_method:
        trained = plan.adapter.info.method if plan.adapter is not None else None
        weights = (*NEED_WEIGHTS, OF_THE_MODEL)  # without which a method is another
        names = [name for name in METHODS[1:] if name == trained or name not in weights]
        plans |= {name: plan.by_method(name) for name in names if name not in plans}
    return plans


def _denoise_once(model: Any, latent: Mapping[str, Any], positive: list, at: float) -> None:
    samples, mask = latent["samples"][:1], latent.get("noise_mask")
    sigma = float(model.get_model_object("model_sampling").percent_to_sigma(at))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # noise seeds all of them
        comfy.sample.sample_custom(
            model,
            comfy.sample.prepare_noise(samples, 0),
            1.0,
            comfy.samplers.sampler_object("euler"),
            torch.tensor([sigma, 0.0]),
            positive,
            positive,
            samples,
            noise_mask=None if mask is None else mask[:1],
            disable_pbar=True,
            seed=0,
        )
