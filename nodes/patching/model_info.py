"""Which model this is, and whether its self-attention can run sparse."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .dense_reason import NOT_OURS, UNKNOWN_LAYOUT, UNSUPPORTED

WAN, HUNYUAN = "comfy.ldm.wan.model", "comfy.ldm.hunyuan_video.model"
Identity = tuple[str, str]  # a class's module and name


@dataclass(frozen=True)
class Arrangement:
    """How a class of models arranges a sequence: the video, and what may stand around it.

    after: conditionings of a model call whose tokens follow the video's. text_first: everything
    else stands in front.
    """

    after: tuple[str, ...] = ()
    text_first: bool = False


# Exact classes, by module and name: a subclass may arrange its tokens in another way, and older
# versions of ComfyUI have fewer of them. A model's `ref_conv` shows that a frame of
# reference tokens comes first.
ARRANGEMENTS: dict[Identity, Arrangement] = {
    # T2V, I2V, Fun, Phantom, 5B, A14B
    (WAN, "WanModel"): Arrangement(after=("context_latents",)),
    (WAN, "VaceWanModel"): Arrangement(),
    (WAN, "CameraWanModel"): Arrangement(),
    (WAN, "WanModel_S2V"): Arrangement(after=("reference_latent", "reference_motion")),
    (WAN, "HumoWanModel"): Arrangement(after=("reference_latent",)),
    # Its references are frames of the grid.
    (WAN, "SCAILWanModel"): Arrangement(after=("pose_latents",)),
    (WAN, "SCAIL2WanModel"): Arrangement(after=("pose_latents",)),
    ("comfy.ldm.wan.model_animate", "AnimateWanModel"): Arrangement(),
    ("comfy.ldm.wan.model_wandancer", "WanDancerModel"): Arrangement(),
    (HUNYUAN, "HunyuanVideo"): Arrangement(text_first=True),
}
WHY_NOT: dict[Identity, str] = {
    ("comfy.ldm.wan.ar_model", "CausalWanModel"): (
        "it generates a few frames at a time, from cached keys"
    ),
    # Where its patches are flat.
    (HUNYUAN, "HunyuanVideo"): "HunyuanImage generates single images",
}


class Layer(NamedTuple):
    """A self-attention layer: who remembers, and the number that people count by."""

    identity: Hashable
    number: int


@dataclass(frozen=True)
class ModelInfo:
    """What the patch has to know about a diffusion model.

    unsupported: why its self-attention stays dense; None = it can be sparse. double_layers: those
    that ComfyUI counts apart from the rest. control_layers: layers with a second block of their own
    number, for VACE's control video. image_attention: blocks attend to the text a second time, for
    images.
    """

    name: str
    unsupported: str | None = None
    num_layers: int = 0
    head_dim: int = 0
    num_heads: int = 0
    patch_size: tuple[int, ...] = ()
    arrangement: Arrangement = Arrangement()
    double_layers: int = 0
    control_layers: tuple[int, ...] = ()
    image_attention: bool = False

    def video_tokens(self, latent_shape: torch.Size | tuple[int, ...]) -> int:
        """Tokens of a latent `(B, C, T, H, W)`."""
        return math.prod(self.grid(latent_shape))

    def grid(self, latent_shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Frames, height, width in tokens; the model pads sides that its patch does not divide."""
        return tuple(-(-side // patch) for side, patch in zip(latent_shape[2:], self.patch_size))

    def layer_identities(self) -> list[Hashable]:
        """Identities of all layers, in order; control blocks are not among them."""
        if not self.double_layers:
            return list(range(self.num_layers))
        single = range(self.num_layers - self.double_layers)
        double = range(self.double_layers)
        return [*(("double", i) for i in double), *(("single", i) for i in single)]

    def expected_layers(self) -> set[Hashable]:
        """Identities of all self-attentions that every model call runs."""
        return {*self.layer_identities(), *(("control", i, 1) for i in self.control_layers)}

    def layer(self, options: Mapping[str, Any]) -> Layer | None:
        """The layer named in transformer_options; None outside the blocks."""
        index = options.get("block_index")
        if index is None:
            return None
        if not self.double_layers:
            return Layer(index, index)
        kind = options.get("block_type", "double")
        return Layer((kind, index), index + (self.double_layers if kind == "single" else 0))


def unwrap(diffusion_model: Any) -> Any:
    """The module behind a torch.compile wrapper."""
    return getattr(diffusion_model, "_orig_mod", diffusion_model)


def blocks(diffusion_model: torch.nn.Module) -> list[torch.nn.Module]:
    """Every block of a model; a wrapper where blocks are compiled one by one."""
    model = unwrap(diffusion_model)
    names = ("blocks", "vace_blocks", "double_blocks", "single_blocks")
    return [block for name in names for block in getattr(model, name, ())]


def model_info(diffusion_model: torch.nn.Module) -> ModelInfo:
    """Tell from the module's class what it is; nothing is read from its weights."""
    model = unwrap(diffusion_model)
    identity = (type(model).__module__, type(model).__name__)
    arrangement = ARRANGEMENTS.get(identity)
    if arrangement is None or len(model.patch_size) != 3:
        return ModelInfo(identity[1], _why_not(type(model), identity))
    common: dict[str, Any] = {
        "patch_size": tuple(model.patch_size),
        "num_heads": model.num_heads,
        "arrangement": arrangement,
    }
    if arrangement.text_first:
        double, single = len(model.double_blocks), len(model.single_blocks)
        return ModelInfo(
            identity[1],
            num_layers=double + single,
            head_dim=model.hidden_size // model.num_heads,
            double_layers=double,
            **common,
        )
    return ModelInfo(
        identity[1],
        num_layers=len(model.blocks),
        head_dim=model.dim // model.num_heads,
        control_layers=tuple(getattr(model, "vace_layers_mapping", ())),
        image_attention=_attends_to_images(model.blocks),
        **common,
    )


def _attends_to_images(wan_blocks: Any) -> bool:
    first = unwrap(wan_blocks[0]) if len(wan_blocks) else None
    return hasattr(getattr(first, "cross_attn", None), "k_img")


def _why_not(kind: type, identity: Identity) -> str:
    name = identity[1]
    if identity in WHY_NOT:
        return UNSUPPORTED.format(name=name, why=WHY_NOT[identity])
    ours = any((base.__module__, base.__name__) in ARRANGEMENTS for base in kind.__mro__)
    return (UNKNOWN_LAYOUT if ours else NOT_OURS).format(name=name)
