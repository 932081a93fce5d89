"""Which model this is, and whether its self-attention can run sparse."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .arrangement import ARRANGEMENTS, WHY_NOT, Arrangement, Identity
from .dense_reason import NOT_OURS, UNKNOWN_LAYOUT, UNSUPPORTED


class Layer(NamedTuple):
    """A self-attention layer: who remembers, and the number that people count by."""

    identity: Hashable
    number: int


@dataclass(frozen=True)
class ModelInfo:
    """What the patch has to know about a diffusion model.

    unsupported: why its self-attention stays dense; None = it can be sparse. double_layers: those
    that ComfyUI counts apart from the rest. control_layers: layers with a second block of their own
    number, for VACE's control video.
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

    def layer(self, place: int, index: int) -> Layer:
        """The layer of a block: the list of blocks it is in, and its place there."""
        if not self.double_layers:
            return Layer(index, index)
        kind = ("double", "single")[place]
        return Layer((kind, index), index + place * self.double_layers)

    def expected_layers(self) -> set[Hashable]:
        """Identities of all self-attentions that every model call runs."""
        return {*self.layer_identities(), *(("control", i, 1) for i in self.control_layers)}


def unwrap(diffusion_model: Any) -> Any:
    """The module behind a torch.compile wrapper."""
    return getattr(diffusion_model, "_orig_mod", diffusion_model)


def blocks(diffusion_model: torch.nn.Module) -> list[torch.nn.Module]:
    """Every block of a model; a wrapper where blocks are compiled one by one."""
    model = unwrap(diffusion_model)
    known = ARRANGEMENTS.get(_identity(model), Arrangement())
    names = (*(name for name, _ in known.layers), "vace_blocks")
    return [block for name in names for block in getattr(model, name, ())]


def self_attentions(
    diffusion_model: torch.nn.Module, info: ModelInfo
) -> dict[torch.nn.Module, Layer]:
    """The modules that are a model's self-attention, whose hooks tell which layer calls.

    A control block of VACE has the number of the layer that it belongs to. Blocks that another node
    has put in place of the model's own have no such module, and are left out.
    """
    model, lists = unwrap(diffusion_model), info.arrangement.layers
    every = [
        (inside(block, attention), info.layer(place, index))
        for place, (name, attention) in enumerate(lists)
        for index, block in enumerate(getattr(model, name))
    ]
    _, attention = lists[0]
    every += [
        (inside(block, attention), Layer(("control", number, 1), number))
        for number, block in zip(info.control_layers, getattr(model, "vace_blocks", ()))
    ]
    return {module: layer for module, layer in every if module is not None}


def coarse_gate(attention: torch.nn.Module) -> torch.nn.Module | None:
    """The gate of VSA's coarse branch, which newer ComfyUI loads with a checkpoint that has one."""
    return getattr(attention, "to_gate_compress", None)


def inside(block: torch.nn.Module, attention: str) -> torch.nn.Module | None:
    """A block's self-attention, see `Arrangement.layers`; None where it has no such module."""
    inner = unwrap(block)
    return unwrap(getattr(inner, attention, None)) if attention else inner


def _kind(model: torch.nn.Module) -> type:
    """A model's class, without what FSDP puts in front of it."""
    kinds = type(model).__mro__
    return next(each for each in kinds if not each.__module__.startswith("torch.distributed."))


def _identity(model: torch.nn.Module) -> Identity:
    return _kind(model).__module__, _kind(model).__name__


def model_info(diffusion_model: torch.nn.Module) -> ModelInfo:
    """Tell from the module's class what it is; nothing is read from its weights."""
    model = unwrap(diffusion_model)
    identity = _identity(model)
    arrangement = ARRANGEMENTS.get(identity)
    patch = () if arrangement is None else patch_size(model)
    if arrangement is None or len(patch) != 3:
        return ModelInfo(identity[1], _why_not(_kind(model), identity))
    lists = [getattr(model, name) for name, _ in arrangement.layers]
    heads, head_dim = head_sizes(model, arrangement)
    return ModelInfo(
        identity[1],
        num_layers=sum(map(len, lists)),
        head_dim=head_dim,
        num_heads=heads,
        patch_size=patch,
        arrangement=arrangement,
        double_layers=len(lists[0]) if len(lists) > 1 else 0,
        control_layers=tuple(getattr(model, "vace_layers_mapping", ())),
    )


def patch_size(model: Any) -> tuple[int, ...]:
    """Latent frames, height and width that make a token; fewer numbers where it is no video."""
    if hasattr(model, "patch_spatial"):
        return model.patch_temporal, model.patch_spatial, model.patch_spatial
    size = getattr(model, "patch_size", 1)  # LTX takes every latent pixel
    if isinstance(size, int):
        return getattr(model, "patch_size_t", None) or 1, size, size
    return tuple(size)


HEADS = ("num_heads", "num_attention_heads", "heads", "n_heads")
HEAD_DIM = ("head_dim", "attention_head_dim", "dim_head")
WIDTH = ("dim", "hidden_size")  # of all heads together


def head_sizes(model: Any, arrangement: Arrangement) -> tuple[int, int]:
    """Heads and channels of a head: what the self-attention says of itself, or else the model."""
    name, attention = arrangement.layers[0]
    known = (inside(block, attention) for block in getattr(model, name))
    first = next((module for module in known if module is not None), model)
    holders = (first, model) if attention else (model, first)

    def read(names: tuple[str, ...]) -> int:
        return next((getattr(x, n) for x in holders for n in names if hasattr(x, n)), 0)

    heads = read(HEADS)
    return heads, read(HEAD_DIM) or read(WIDTH) // heads


def _why_not(kind: type, identity: Identity) -> str:
    name = identity[1]
    if identity in WHY_NOT:
        return UNSUPPORTED.format(name=name, why=WHY_NOT[identity])
    ours = any((base.__module__, base.__name__) in ARRANGEMENTS for base in kind.__mro__)
    return (UNKNOWN_LAYOUT if ours else NOT_OURS).format(name=name)
