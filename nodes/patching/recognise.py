"""Which model this is, and whether its self-attention can run sparse."""

from __future__ import annotations

import math
from collections.abc import Hashable
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
    text_first: bool = False                # text and video share one sequence, the text in front
    double_layers: int = 0                  # of those, the ones that ComfyUI counts apart from the rest

    def video_tokens(self, latent_shape: torch.Size | tuple[int, ...]) -> int:
        """Tokens of a latent `(B, C, T, H, W)`."""
        return math.prod(self.grid(latent_shape))

    def grid(self, latent_shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Frames, rows, columns of tokens; sides that the patch does not divide are padded up by the model."""
        return tuple(-(-side // patch) for side, patch in zip(latent_shape[2:], self.patch_size))

    def layer_identities(self) -> list[Hashable]:
        """Identities of all layers, in order."""
        if not self.double_layers:
            return list(range(self.layers))
        single = range(self.layers - self.double_layers)
        return [("double", i) for i in range(self.double_layers)] + [("single", i) for i in single]

    def layer(self, options: dict) -> tuple[Hashable, int] | None:
        """Identity and number of the layer that transformer_options tell of; None outside the blocks."""
        index = options.get("block_index")
        if index is None or not self.double_layers:
            return None if index is None else (index, index)
        kind = options.get("block_type", "double")
        return (kind, index), index + (self.double_layers if kind == "single" else 0)


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
    if type(model) is HunyuanVideo and len(model.patch_size) == 3:
        double, single = len(model.double_blocks), len(model.single_blocks)
        width = model.hidden_size // model.num_heads
        return ModelFacts(name, None, double + single, width, model.num_heads, tuple(model.patch_size), True, double)
    if isinstance(model, (WanModel, HunyuanVideo)):
        return ModelFacts(name, f"{name} is not supported yet (Wan T2V, I2V, 5B, A14B and HunyuanVideo are)")
    return ModelFacts(name, f"{name} is not a Wan or HunyuanVideo model")
