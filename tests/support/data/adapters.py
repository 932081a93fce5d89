"""Adapters with random weights of every method, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from pack_loader import load

adapters = load(".attention.adapters")
PE_GRID = (3, 5, 7)
SHAPES = (
    "channel_scale",
    "gate_slope",
    "gate_bias",
    "gate_weight",
    "proj_q",
    "proj_k",
    "low_rank_scale",
)


def ropeslr_adapter(
    layers: int,
    heads: int,
    width: int,
    rank: int = 24,
    act: str = "softmax",
    pe: str = "fourier",
    fusion: str = "mass",
    noise_levels: tuple[float, ...] = (),
    without: str | set = (),
    seed: int = 3,
):
    """All tensors a RoPeSLR adapter may have but those in `without`, near their initial values."""
    generator = torch.Generator().manual_seed(seed)
    without = {without} if isinstance(without, str) else set(without)

    def near(value: float, spread: float, *shape: int) -> Tensor:
        return value + spread * torch.randn(*shape, generator=generator)

    bins = (len(noise_levels),) if noise_levels else ()
    contents = {}
    for i in range(layers):
        weights = {
            "channel_scale": near(width**-0.5, 0.4 * width**-0.5, *bins, heads, width // 2),
            "gate_slope": near(1.0, 0.2, *bins, heads),
            "gate_bias": near(0.3, 0.3, *bins, heads),
            "gate_weight": near(0.0, 0.5 * width**-0.5, width),
            "proj_q": near(0.0, width**-0.5, heads, rank, width),
            "proj_k": near(0.0, width**-0.5, heads, rank, width),
            "low_rank_scale": near(0.5, 0.1, heads),
        }
        for name in ("pe_q", "pe_k") if pe != "none" else ():
            shape = (heads, sum(PE_GRID), rank) if pe == "table" else (heads, rank, width)
            weights[name] = near(0.0, 0.1, *shape)
        if fusion == "rms":
            weights = {
                name: weights[name]
                for name in weights
                if name not in ("channel_scale", "gate_slope", "low_rank_scale")
            }
            weights["gate_bias"] = weights["gate_bias"] - 1.5
        contents[f"blocks.{i}.self_attn"] = {
            name: x for name, x in weights.items() if name not in without
        }
    info = adapters.AdapterInfo(
        "ropeslr",
        layers,
        heads,
        width,
        rank,
        act=act,
        pe=pe,
        pe_grid=PE_GRID if pe == "table" else (),
        fusion=fusion,
        noise_levels=noise_levels,
        base_model="random",
        sparsity=0.5,
    )
    return adapters.Adapter(info, contents, "random.safetensors")


def rola_adapter(
    layers: int, heads: int, width: int, rank: int = 64, gate: float = -1.0, seed: int = 4
):
    """RoLA's tensors in their released shapes; gate: the mean of the gate's bias."""
    generator = torch.Generator().manual_seed(seed)
    contents = {
        f"blocks.{i}.self_attn": {
            "proj_q": torch.randn(rank, width, generator=generator) * width**-0.5,
            "proj_k": torch.randn(rank, width, generator=generator) * width**-0.5,
            "gate_weight": torch.randn(1, width, generator=generator) * width**-0.5,
            "gate_bias": gate + 0.3 * torch.randn(1, heads, 1, 1, generator=generator),
        }
        for i in range(layers)
    }
    info = adapters.AdapterInfo(
        "rola", layers, heads, width, rank, block_order="raster", fusion="rms"
    )
    return adapters.Adapter(info, contents, "rola.safetensors")


def sla_adapter(layers: int, heads: int, width: int, size: float = 0.5, seed: int = 5):
    """SLA's projection, `size` times an orthogonal one in scale."""
    generator = torch.Generator().manual_seed(seed)
    contents = {
        f"blocks.{i}.self_attn": {
            "weight": size * torch.randn(width, width, generator=generator) * width**-0.5,
            "bias": 0.05 * size * torch.randn(width, generator=generator),
        }
        for i in range(layers)
    }
    info = adapters.AdapterInfo("sla", layers, heads, width, 0, block_order="raster")
    return adapters.Adapter(info, contents, "sla.safetensors")


def single(adapter) -> dict[str, Tensor]:
    """The weights of an adapter's first layer."""
    return dict(next(iter(adapter.layers.values())))


def layer_x(tokens: int, channels: int, dtype: torch.dtype, seed: int = 6) -> Tensor:
    """A hidden state `(1, L, H*D)`."""
    return torch.randn(1, tokens, channels, generator=torch.Generator().manual_seed(seed)).to(dtype)
