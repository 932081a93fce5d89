"""Train Sparse LoRA on tiny models, as ComfyUI's executor runs it."""

from __future__ import annotations

import torch

import comfy_host
from support.host.sampling import conditioning

SIZE = (5, 16, 16)


def levels(model, steps: int = 4, scheduler: str = "simple") -> torch.Tensor:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), scheduler, steps
    )


def train(model, **inputs):
    """-> (lora, loss_map, steps, adapter), by the node; a list for what the graph hands on as lists."""
    import comfy.samplers

    comfy_host.pack()
    own = dict(
        model=model,
        steps=3,
        rank=2,
        sparsity=0.6,
        samples=2,
        training_dtype="none",
        lora_dtype="fp32",
        existing_lora="[None]",
        sampler=comfy.samplers.sampler_object("euler"),
        sigmas=levels(model),
        latents=[{"samples": torch.zeros(1, 16, *SIZE)}],
        positive=[conditioning(1), conditioning(3)],
        evaluate_every=0,
        learning_rate=3e-3,
    )
    several = "latents", "positive", "negative"
    return comfy_host.run_node("RoPeSLRTrainSparseLoRA", *several, **own | inputs)


def weights(model) -> dict[str, torch.Tensor]:
    """Copies of a MODEL's own weights."""
    return {name: each.clone() for name, each in model.model.state_dict().items()}
