"""The trained tiny Wan in a real ComfyUI, through stock nodes: model, prompts, sampling, pictures.

Needs COMFYUI_PATH, and ROPESLR_TEST_BASE for ComfyUI's models folder.
"""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ROOT
from .moving_shapes import CHANNELS, unfold

FILE = "tiny_wan.safetensors"
DATA = ROOT / "benchmarks" / "data"
SHIFT = 5.0
PROMPTS = (
    "red discs on white",
    "blue rings on black",
    "green squares on brown",
    "yellow discs on black",
)


class Sampling(NamedTuple):
    """How a clip is sampled. grid: the latent's frames, height and width."""

    grid: tuple[int, int, int] = (8, 24, 32)
    steps: int = 20
    cfg: float = 1.0
    prompt: str = PROMPTS[0]
    seed: int = 0


@cache
def model(weights: Path = DATA / FILE) -> Any:
    """A MODEL, by stock nodes."""
    import comfy_host

    comfy_host.boot()
    folder = Path(os.environ["ROPESLR_TEST_BASE"]) / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(weights, folder / FILE)
    (loaded,) = comfy_host.run_node("UNETLoader", unet_name=FILE, weight_dtype="default")
    (shifted,) = comfy_host.run_node("ModelSamplingSD3", model=loaded, shift=SHIFT)
    return shifted


@cache
def _clip() -> Any:
    import comfy_host
    import tiny_models

    comfy_host.boot()
    models = Path(os.environ["ROPESLR_TEST_BASE"]) / "models"
    tiny_models.make(models, ["text_encoders/tiny_clip_l.pt"])
    return comfy_host.run_node("CLIPLoader", clip_name="tiny_clip_l.pt", type="wan")[0]


@cache
def conditioning(prompt: str) -> list:
    """A CONDITIONING, by the tiny text encoder; "" is no caption."""
    import comfy_host

    return comfy_host.run_node("CLIPTextEncode", clip=_clip(), text=prompt)[0]


def sample(patched: Any, how: Sampling) -> Tensor:
    """The latent `(16, T, H, W)` that the stock KSampler makes, in the model's own units."""
    import comfy_host

    (out,) = comfy_host.run_node(
        "KSampler",
        model=patched,
        positive=conditioning(how.prompt),
        negative=conditioning(""),
        latent_image={"samples": torch.zeros(1, CHANNELS, *how.grid)},
        seed=how.seed,
        steps=how.steps,
        cfg=how.cfg,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    return patched.model.process_latent_in(out["samples"])[0].float()


def pictures(latent: Tensor) -> Tensor:
    """A latent as frames `(4 T, 3, H, W)` from 0 to 1."""
    return (unfold(latent) / 4 + 0.5).clamp(0, 1)
