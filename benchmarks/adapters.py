"""Adapters with random weights, and their inputs: what they cost does not depend on the numbers."""

from __future__ import annotations

import torch

from . import load_pack

attention = load_pack(".attention")
adapters = load_pack(".attention.adapters")
rope = load_pack(".attention.rope")

RANK = 64


def random_adapter(method: str, heads: int, width: int, device: torch.device | str = "cpu"):
    """One layer of `rola`, `sla`, or of `ropeslr` with low rank and Fourier positions."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * width**-0.5).to(device)

    if method == "rola":
        weights = {
            "proj_q": noise(RANK, width),
            "proj_k": noise(RANK, width),
            "gate_weight": noise(1, width),
            "gate_bias": noise(1, heads, 1, 1) - 2,
        }
        facts = {"block_order": "raster", "fusion": "rms"}
    elif method == "sla":
        weights = {"weight": noise(width, width), "bias": noise(width)}
        facts = {"block_order": "raster"}
    else:
        weights = {name: noise(heads, RANK, width) for name in ("proj_q", "proj_k", "pe_q", "pe_k")}
        weights |= {
            "low_rank_scale": noise(heads) + 0.5,
            "gate_weight": noise(width),
            "channel_scale": noise(heads, width // 2).abs(),
        }
        facts = {"pe": "fourier"}
    info = adapters.AdapterInfo(method, 1, heads, width, 0 if method == "sla" else RANK, **facts)
    return adapters.Adapter(info, {"blocks.0.self_attn": weights})


def layer_inputs(
    grid: tuple[int, int, int],
    tokens: int,
    heads: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
):
    """A hidden state of all tokens, and Wan's RoPE of the video's."""
    positions = torch.stack(
        torch.meshgrid(*(torch.arange(float(n)) for n in grid), indexing="ij"), -1
    ).view(-1, 3)
    angles = torch.cat(
        [
            positions[:, i : i + 1] * 10000.0 ** (-torch.arange(pairs) / pairs)
            for i, pairs in enumerate(rope.rope_axes(width))
        ],
        dim=-1,
    ).to(device)
    x = torch.randn(1, tokens, heads * width, device=device, dtype=dtype)
    return attention.LayerInputs(x, attention.RopeTable(angles.cos(), angles.sin()))
