"""The tensors of a Wan model by name and shape, and the check that a checkpoint has all of them.

ComfyUI fills a missing tensor with whatever lies in memory, and the video is noise; so nothing may
be missing. Source: the released checkpoints of Wan 2.1 and 2.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .info import AdapterError
from .text import quoted, shown

Shape = tuple[int, ...]
# A side of a tensor: a number, ANY, or one of the model's own sizes.
Side = int | str

# The model's width, six times that, and the width of its feed-forward part.
DIM, DIM_6, FFN = "dim", "6 dim", "ffn"
ANY = -1

TOP_LEVEL: Mapping[str, tuple[Side, ...]] = {
    "patch_embedding.bias": (DIM,),
    "text_embedding.0.weight": (DIM, ANY),
    "text_embedding.0.bias": (DIM,),
    "text_embedding.2.weight": (DIM, DIM),
    "text_embedding.2.bias": (DIM,),
    "time_embedding.0.weight": (DIM, ANY),
    "time_embedding.0.bias": (DIM,),
    "time_embedding.2.weight": (DIM, DIM),
    "time_embedding.2.bias": (DIM,),
    "time_projection.1.weight": (DIM_6, DIM),
    "time_projection.1.bias": (DIM_6,),
    "head.head.weight": (ANY, DIM),
    "head.head.bias": (ANY,),
    "head.modulation": (1, 2, DIM),
}

IN_BLOCK: Mapping[str, tuple[Side, ...]] = {
    "modulation": (1, 6, DIM),
    "norm3.weight": (DIM,),
    "norm3.bias": (DIM,),
    "ffn.0.weight": (FFN, DIM),
    "ffn.0.bias": (FFN,),
    "ffn.2.weight": (DIM, FFN),
    "ffn.2.bias": (DIM,),
    **{f"{kind}_attn.{name}.weight": (DIM, DIM) for kind in ("self", "cross") for name in "qkvo"},
    **{f"{kind}_attn.{name}.bias": (DIM,) for kind in ("self", "cross") for name in "qkvo"},
    **{f"{kind}_attn.norm_{name}.weight": (DIM,) for kind in ("self", "cross") for name in "qk"},
}

# Added where a model takes CLIP's image features.
IMAGE: Mapping[str, tuple[Side, ...]] = {
    "img_emb.proj.0.weight": (ANY,),
    "img_emb.proj.0.bias": (ANY,),
    "img_emb.proj.1.weight": (ANY, ANY),
    "img_emb.proj.1.bias": (ANY,),
    "img_emb.proj.3.weight": (DIM, ANY),
    "img_emb.proj.3.bias": (DIM,),
    "img_emb.proj.4.weight": (DIM,),
    "img_emb.proj.4.bias": (DIM,),
}

IMAGE_IN_BLOCK: Mapping[str, tuple[Side, ...]] = {
    **{f"cross_attn.{name}_img.weight": (DIM, DIM) for name in "kv"},
    **{f"cross_attn.{name}_img.bias": (DIM,) for name in "kv"},
    "cross_attn.norm_k_img.weight": (DIM,),
}

# In the "-quant" files a linear layer's weight is int8, with a `.scale` beside it.
INT8_WEIGHT, INT8_SCALE = ".int8_weight", ".scale"

PREFIXES = ("net_ema.", "net.", "model.diffusion_model.", "diffusion_model.", "module.", "")

# (dim, layers) of the released sizes.
SIZES: Mapping[tuple[int, int], str] = {(1536, 30): "1.3b", (5120, 40): "14b"}
# Input channels of the models without CLIP features.
KINDS: Mapping[int, str] = {16: "wan2.1-t2v", 36: "wan2.2-i2v", 48: "wan2.2-ti2v"}

_BLOCK_KEY = re.compile(r"blocks\.(\d+)\..+", re.ASCII)


def find_prefix(keys: Iterable[str]) -> str:
    """What stands before every name. An average of the weights is preferred to the last step's."""
    keys = list(keys)
    known = set(keys)
    for prefix in PREFIXES:
        if f"{prefix}patch_embedding.weight" in known:
            return prefix
    found = ", ".join(quoted(key) for key in keys[:3])
    raise AdapterError(
        "it is not a Wan model: it has no patch_embedding.weight"
        + (f", but {found} and others" if found else " and no other tensor")
    )


def count_layers(keys: Iterable[str]) -> int:
    """How many transformer blocks the keys name."""
    return len({match.group(1) for match in map(_BLOCK_KEY.fullmatch, keys) if match})


def base_model(shapes: Mapping[str, Shape]) -> str:
    """The model's kind and size, for people: `wan2.1-t2v-1.3b`."""
    dim, layers = shapes["patch_embedding.bias"][0], count_layers(shapes)
    patch = shapes["patch_embedding.weight"]
    channels = patch[1] // 4 if len(patch) == 2 else patch[1]
    if "img_emb.proj.0.bias" in shapes:
        kind = "wan2.1-i2v"
    else:
        kind = KINDS.get(channels, "wan2.1-t2v")
    return f"{kind}-{SIZES.get((dim, layers), f'{dim}x{layers}')}"


def check_complete(shapes: Mapping[str, Shape]) -> None:
    """Raise AdapterError unless all of a Wan model's tensors are there, in consistent shapes."""
    present = _without_int8(shapes)
    expected = _expected(present)
    missing = [name for name in expected if name not in present]
    if missing:
        others = len(missing) - 1
        found = f"and {others} others are" if others else "is"
        raise AdapterError(f"{missing[0]} {found} missing. Download it again")
    _check_patch_embedding(present)
    sizes = _sizes(present)
    for name, sides in expected.items():
        shape = tuple(sizes.get(side, side) for side in sides)
        if not _matches(present[name], shape):
            text = str(shape).replace(str(ANY), "any")
            raise AdapterError(f"{name} has the shape {shown(present[name])}; expected {text}")
    for name in shapes:
        scale = name.removesuffix(INT8_WEIGHT) + INT8_SCALE
        if name.endswith(INT8_WEIGHT) and scale not in shapes:
            raise AdapterError(f"{shown(name)} has no {shown(scale)}. Download it again")


def _without_int8(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes by the names that the weights have in a file that is not quantized."""
    return {
        f"{name.removesuffix(INT8_WEIGHT)}.weight" if name.endswith(INT8_WEIGHT) else name: shape
        for name, shape in shapes.items()
    }


def _expected(present: Mapping[str, Shape]) -> dict[str, tuple[Side, ...]]:
    expected, block = dict(TOP_LEVEL), dict(IN_BLOCK)
    if any(name.startswith("img_emb.") for name in present):
        expected |= IMAGE
        block |= IMAGE_IN_BLOCK
    # A file without any block is told what it lacks: at least one.
    for index in range(max(1, count_layers(present))):
        expected |= {f"blocks.{index}.{name}": sides for name, sides in block.items()}
    return expected


def _sizes(present: Mapping[str, Shape]) -> dict[Side, int]:
    dim = next(iter(present["patch_embedding.bias"]), 0)
    ffn = next(iter(present["blocks.0.ffn.0.bias"]), 0)
    return {DIM: dim, DIM_6: 6 * dim, FFN: ffn}


def _matches(found: Shape, expected: tuple[Side, ...]) -> bool:
    if len(found) != len(expected) or 0 in found:
        return False
    return all(side in (ANY, size) for size, side in zip(found, expected))


def _check_patch_embedding(present: Mapping[str, Shape]) -> None:
    dim = next(iter(present["patch_embedding.bias"]), 0)
    patch = present["patch_embedding.weight"]
    linear = len(patch) == 2 and patch[1] % 4 == 0
    if not (linear or len(patch) == 5) or patch[0] != dim or 0 in patch:
        raise AdapterError(
            f"patch_embedding.weight has the shape {shown(patch)}; expected "
            f"({dim}, channels * 4) or ({dim}, channels, 1, 2, 2)"
        )
