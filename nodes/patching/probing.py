"""One dense model call on a finished latent, with every method tried beside it: which one suits this model?"""

from __future__ import annotations

from dataclasses import replace

import comfy.sample
import comfy.samplers
import torch

from ...attention import SparsePlan
from ...attention.plan import TRAINED_METHODS
from ...attention.probe import Look, Probe
from .patch import KEY, SparsePatch, put_on
from .recognise import recognise

METHODS = ("ropeslr", "top-k", "top-k plain", "adaspa")                       # those that need no weights


class Quiet(SparsePatch):
    """A patch whose run is no run of a person's."""

    def tell(self, report) -> None:
        pass


def probe(
    model, latent: torch.Tensor, positive: list, every_method: bool, at: float, layer: int, head: int
) -> Probe | None:
    """Put noise on the first of some latents `(B, C, ...)`, up to a place (0-1) of the schedule, and denoise it once.

    Uses the plan and the adapter of the RoPeSLR node on MODEL, default settings without one; steps, layers and lengths
    that the plan leaves dense are tried too. None where the model cannot run sparse, or nothing is left out.
    """
    facts = recognise(model.model.diffusion_model)
    if facts.unsupported:
        return None
    patch = model.get_attachment(KEY)
    plan, adapter = (SparsePlan().resolve(), None) if patch is None else (patch.plan, patch.adapter)
    plan = replace(
        plan, dense_first_steps=0, dense_last_steps=0, start_percent=0.0, end_percent=1.0, dense_layers=frozenset(),
        min_tokens=0, strict=False, verbose=False, backend="auto" if plan.backend == "dense" else plan.backend,
    )
    plans = {plan.method: plan}
    if every_method:
        own = adapter.info.method if adapter is not None else None
        names = [name for name in (*METHODS, *TRAINED_METHODS) if name in METHODS or name == own]
        plans |= {name: _as_method(plan, name) for name in names if name not in plans}
    identities = facts.layer_identities()
    number = min(layer, len(identities) - 1)
    made = Probe(plans, adapter, Look(identities[number], number, head))
    probed = model.clone()
    put_on(probed, Quiet(plan, None, adapter, lambda *_: made))
    sampling = probed.get_model_object("model_sampling")
    sigma = float(sampling.percent_to_sigma(at))
    samples = latent[:1]
    comfy.sample.sample_custom(
        probed, comfy.sample.prepare_noise(samples, 0), 1.0, comfy.samplers.sampler_object("euler"),
        torch.tensor([sigma, 0.0]), positive, positive, samples, disable_pbar=True, seed=0,
    )
    return made if any(made.errors.values()) else None


def _as_method(plan: SparsePlan, method: str) -> SparsePlan:
    """The same settings by another method, with that method's own choices where the plan's were its method's."""
    return replace(plan, method=method, block_order="auto", calibrate="auto", rank=0).resolve()
