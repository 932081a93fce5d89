"""Which model this is, and whether its self-attention can run sparse."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch

WAN, HUNYUAN = "comfy.ldm.wan.model", "comfy.ldm.hunyuan_video.model"


@dataclass(frozen=True)
class Arrangement:
    """How a class of models arranges a sequence: the video, and what may stand around it.

    behind: conditionings of a model call whose tokens follow the video's. text_first: everything else stands in front.
    """

    behind: tuple[str, ...] = ()
    text_first: bool = False


# Exact classes, by module and name: a subclass may arrange its tokens in another way, and older versions of ComfyUI
# have fewer of them. A frame of reference tokens in front is told by the model's own `ref_conv`.
ARRANGEMENTS = {
    (WAN, "WanModel"): Arrangement(behind=("context_latents",)),              # T2V, I2V, Fun, Phantom, 5B, A14B
    (WAN, "VaceWanModel"): Arrangement(),
    (WAN, "CameraWanModel"): Arrangement(),
    (WAN, "WanModel_S2V"): Arrangement(behind=("reference_latent", "reference_motion")),
    (WAN, "HumoWanModel"): Arrangement(behind=("reference_latent",)),
    (WAN, "SCAILWanModel"): Arrangement(behind=("pose_latents",)),            # its references are frames of the grid
    (WAN, "SCAIL2WanModel"): Arrangement(behind=("pose_latents",)),
    ("comfy.ldm.wan.model_animate", "AnimateWanModel"): Arrangement(),
    ("comfy.ldm.wan.model_wandancer", "WanDancerModel"): Arrangement(),
    (HUNYUAN, "HunyuanVideo"): Arrangement(text_first=True),
}
WHY_NOT = {
    ("comfy.ldm.wan.ar_model", "CausalWanModel"): "it makes a few frames at a time, from keys that it remembers",
    (HUNYUAN, "HunyuanVideo"): "HunyuanImage, which makes single pictures",   # where its patches are flat
}


@dataclass(frozen=True)
class ModelFacts:
    """What the patch has to know about a diffusion model."""

    name: str
    unsupported: str | None                 # why its self-attention stays dense; None = it can be sparse
    layers: int = 0
    head_width: int = 0
    heads: int = 0
    patch_size: tuple[int, ...] = ()
    arrangement: Arrangement = Arrangement()
    double_layers: int = 0                  # of those, the ones that ComfyUI counts apart from the rest
    control_layers: tuple[int, ...] = ()    # layers with a second block of their own number, for VACE's control video

    def video_tokens(self, latent_shape: torch.Size | tuple[int, ...]) -> int:
        """Tokens of a latent `(B, C, T, H, W)`."""
        return math.prod(self.grid(latent_shape))

    def grid(self, latent_shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Frames, rows, columns of tokens; sides that the patch does not divide are padded up by the model."""
        return tuple(-(-side // patch) for side, patch in zip(latent_shape[2:], self.patch_size))

    def layer_identities(self) -> list[Hashable]:
        """Identities of all layers, in order; control blocks are not among them."""
        if not self.double_layers:
            return list(range(self.layers))
        single = range(self.layers - self.double_layers)
        return [("double", i) for i in range(self.double_layers)] + [("single", i) for i in single]

    def expected_layers(self) -> set[Hashable]:
        """Identities of all self-attentions that every model call runs."""
        return {*self.layer_identities(), *(("control", i, 1) for i in self.control_layers)}

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


def blocks(diffusion_model: torch.nn.Module) -> list[torch.nn.Module]:
    """Every block of a model, as it stands there: behind a wrapper where blocks are compiled one by one."""
    model = unwrap(diffusion_model)
    lists = (getattr(model, name, ()) for name in ("blocks", "vace_blocks", "double_blocks", "single_blocks"))
    return [block for each in lists for block in each]


def recognise(diffusion_model: torch.nn.Module) -> ModelFacts:
    """Tell from the module's class what it is; nothing is read from its weights."""
    model = unwrap(diffusion_model)
    name, place = type(model).__name__, (type(model).__module__, type(model).__name__)
    arrangement = ARRANGEMENTS.get(place)
    if arrangement is None or len(model.patch_size) != 3:
        return ModelFacts(name, _why_not(model, place))
    size = {"patch_size": tuple(model.patch_size), "heads": model.num_heads, "arrangement": arrangement}
    if arrangement.text_first:
        double, single = len(model.double_blocks), len(model.single_blocks)
        return ModelFacts(
            name, None, double + single, model.hidden_size // model.num_heads, double_layers=double, **size,
        )
    control = tuple(getattr(model, "vace_layers_mapping", ()))
    return ModelFacts(
        name, None, len(model.blocks), model.dim // model.num_heads, control_layers=control, **size,
    )


def _why_not(model: torch.nn.Module, place: tuple[str, str]) -> str:
    if place in WHY_NOT:
        return f"{place[1]} runs dense: {WHY_NOT[place]}"
    ours = any((base.__module__, base.__name__) in ARRANGEMENTS for base in type(model).__mro__)
    if ours:
        return f"{place[1]} is a kind of Wan or HunyuanVideo whose token layout is not known"
    return f"{place[1]} is not a Wan or HunyuanVideo model"
