"""Released checkpoints, rebuilt: real key names, shapes, dtypes and quirks, random weights.

A SparkWan file is a Wan model with RoLA's four tensors in each self-attention, a TurboWan file one
with SLA's two. The patch embedding is a matrix there, and names may stand behind `net.` or
`net_ema.`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH = 128  # of a head
TEXT_WIDTH, FREQUENCIES = 4096, 256


def wan_weights(
    dim: int,
    layers: int,
    ffn: int,
    channels: int = 16,
    out_channels: int = 16,
    image: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    sharpness: float = 2.0,
) -> dict[str, Tensor]:
    """A Wan model in the original layout, patch embedding as a matrix `(dim, channels * 4)`."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}

    def linear(name: str, out: int, inner: int) -> None:
        weights[f"{name}.weight"] = torch.randn(out, inner, generator=generator) * inner**-0.5
        weights[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.02

    linear("patch_embedding", dim, channels * 4)
    linear("text_embedding.0", dim, TEXT_WIDTH)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, FREQUENCIES)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    linear("head.head", 4 * out_channels, dim)
    weights["head.modulation"] = torch.randn(1, 2, dim, generator=generator) * 0.3
    if image:
        for name, size in (("img_emb.proj.0", 1280), ("img_emb.proj.4", dim)):
            weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.ones(size), torch.zeros(size)
        linear("img_emb.proj.1", 1280, 1280)
        linear("img_emb.proj.3", dim, 1280)
    for i in range(layers):
        block = f"blocks.{i}."
        weights[f"{block}modulation"] = torch.randn(1, 6, dim, generator=generator) * 0.3
        weights[f"{block}norm3.weight"], weights[f"{block}norm3.bias"] = (
            torch.ones(dim),
            torch.zeros(dim),
        )
        for kind in ("self_attn", "cross_attn"):
            for part in ("q", "k", "v", "o") + (
                ("k_img", "v_img") if image and kind == "cross_attn" else ()
            ):
                linear(f"{block}{kind}.{part}", dim, dim)
            for part in ("norm_q", "norm_k") + (
                ("norm_k_img",) if image and kind == "cross_attn" else ()
            ):
                sharp = sharpness if (kind, part) == ("self_attn", "norm_q") else 1.0
                weights[f"{block}{kind}.{part}.weight"] = torch.full((dim,), sharp)
        linear(f"{block}ffn.0", ffn, dim)
        linear(f"{block}ffn.2", dim, ffn)
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def rola_weights(
    dim: int, layers: int, rank: int = 64, dtype: torch.dtype = torch.bfloat16, seed: int = 1
):
    """RoLA's tensors of every layer, named and shaped as in SparkWan files.

    Gates about 1/8, as trained.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for i in range(layers):
        layer = f"blocks.{i}.self_attn."
        weights[f"{layer}proj_q.weight"] = (
            torch.randn(rank, WIDTH, generator=generator) * WIDTH**-0.5
        )
        weights[f"{layer}proj_k.weight"] = (
            torch.randn(rank, WIDTH, generator=generator) * WIDTH**-0.5
        )
        weights[f"{layer}gate_proj.weight"] = (
            torch.randn(1, WIDTH, generator=generator) * 0.3 * WIDTH**-0.5
        )
        weights[f"{layer}gate_bias"] = -1.946 + 0.3 * torch.randn(
            1, dim // WIDTH, 1, 1, generator=generator
        )
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def sla_weights(layers: int, dtype: torch.dtype = torch.bfloat16, seed: int = 2):
    """SLA's tensors of every layer, names and shapes as in TurboWan files."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for i in range(layers):
        layer = f"blocks.{i}.self_attn.attn_op.local_attn.proj_l."
        weights[f"{layer}weight"] = (
            0.5 * torch.randn(WIDTH, WIDTH, generator=generator) * WIDTH**-0.5
        )
        weights[f"{layer}bias"] = 0.02 * torch.randn(WIDTH, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def quantised(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As in "-quant" files: linear layers of the blocks int8, one factor per 128 x 128 piece."""
    result = {}
    for name, tensor in weights.items():
        if (
            not (name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2)
            or "proj" in name
        ):
            result[name] = tensor
            continue
        rows, columns = tensor.shape
        scale = torch.zeros(-(-rows // 128), -(-columns // 128))
        numbers = torch.zeros(rows, columns, dtype=torch.int8)
        for r in range(scale.shape[0]):
            for c in range(scale.shape[1]):
                part = slice(128 * r, 128 * r + 128), slice(128 * c, 128 * c + 128)
                scale[r, c] = tensor[part].float().abs().max() / 127
                numbers[part] = (tensor[part].float() / scale[r, c]).round().to(torch.int8)
        base = name.removesuffix(".weight")
        result[f"{base}.int8_weight"], result[f"{base}.scale"] = numbers, scale
    return result


def save(weights: dict[str, Tensor], path: Path, prefix: str = "", wrap: str | None = None) -> Path:
    """Write by the path's ending: .safetensors, or .pth by torch.save, perhaps nested."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {prefix + name: tensor.contiguous() for name, tensor in weights.items()}
    if path.suffix == ".safetensors":
        save_file(named, path)
    else:
        torch.save({wrap: named} if wrap else named, path)
    return path


def sparkwan(
    dim: int = 256, layers: int = 2, dtype: torch.dtype = torch.bfloat16, **model
) -> dict[str, Tensor]:
    """The weights of a small SparkWan file."""
    return wan_weights(dim, layers, 2 * dim, dtype=dtype, **model) | rola_weights(
        dim, layers, dtype=dtype
    )


def turbowan(
    dim: int = 256, layers: int = 2, dtype: torch.dtype = torch.bfloat16, **model
) -> dict[str, Tensor]:
    """The weights of a small TurboWan file."""
    return wan_weights(dim, layers, 2 * dim, dtype=dtype, **model) | sla_weights(
        layers, dtype=dtype
    )
