"""Which model this is, and whether its self-attention can run sparse."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from comfy.ldm.hunyuan_video.model import HunyuanVideo
from comfy.ldm.wan.model import WanModel

SPARSE_CLASSES = (WanModel,)                # exact classes: a subclass may arrange its tokens in another way


@dataclass(frozen=True)
class ModelFacts:
    """What the patch has to know about a diffusion model."""

    name: str
    unsupported: str | None                 # why its self-attention stays dense; None = it can be sparse
    layers: int = 0
    head_width: int = 0
    heads: int = 0
    patch_size: tuple[int, ...] = ()

    def video_tokens(self, latent_shape: torch.Size | tuple[int, ...]) -> int:
        """Tokens of a latent `(B, C, T, H, W)`; sides that the patch does not divide are padded up by the model."""
        return math.prod(-(-side // patch) for side, patch in zip(latent_shape[2:], self.patch_size))


def unwrap(diffusion_model: torch.nn.Module) -> torch.nn.Module:
    """The module behind a torch.compile wrapper."""
    return getattr(diffusion_model, "_orig_mod", diffusion_model)


def recognise(diffusion_model: torch.nn.Module) -> ModelFacts:
    """Tell from the module's class what it is; nothing is read from its weights."""
    model = unwrap(diffusion_model)
    name = type(model).__name__
    if type(model) in SPARSE_CLASSES:
        width = model.dim // model.num_heads
        return ModelFacts(name, None, len(model.blocks), width, model.num_heads, tuple(model.patch_size))
    if isinstance(model, (WanModel, HunyuanVideo)):
        return ModelFacts(name, f"{name} is not supported yet (Wan T2V, I2V, 5B and A14B are)")
    return ModelFacts(name, f"{name} is not a Wan or HunyuanVideo model")
