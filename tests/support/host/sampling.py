"""Short sampling runs of tiny models inside the test process, through ComfyUI's own nodes."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import comfy_host
import tiny_models

SLOT = "optimized_attention_override"
# Tiny models are short, and most tests look at the first step too.
SETTINGS = dict(dense_first_steps=0, min_tokens=64)
# Settings of the node of which each changes what runs; the first is the default.
CHANGES = (
    dict(),
    dict(method="top-k"),
    dict(method="adaspa"),
    dict(sparsity=0.5),
    dict(rank=32),
    dict(calibrate="off"),
    dict(calibrate_rows=16),
    dict(block_order="raster"),
    dict(keep_diagonal=True),
    dict(keep_first_frame=True),
    dict(key_block="64"),
    dict(allocation="uniform"),
    dict(target="error", error=0.3),
    dict(backend="dense"),
    dict(dense_layers="1"),
    dict(start_percent=0.5),
    dict(end_percent=0.1),
    dict(dense_first_steps=1),
    dict(dense_last_steps=1),
    dict(min_tokens=100_000),
    dict(sparsity=0.0),
)
# name -> (file, latent channels, whether a start image is concatenated)
WAN = {
    "2.1 T2V": ("tiny_wan21_t2v", 16, False),
    "2.1 I2V": ("tiny_wan21_i2v", 16, True),
    "2.2 5B": ("tiny_wan22_ti2v_5b", 48, False),
    "2.2 A14B": ("tiny_wan22_t2v_high_noise", 16, False),
}
LATENT = (9, 16, 16)  # 9 * 8 * 8 = 576 tokens: 9 blocks


def load_model(file: str):
    """A MODEL, by the stock loader; the tiny file is made when it is missing."""
    comfy_host.boot()
    if file in tiny_models.BUILT:
        return tiny_models.build(file)
    tiny_models.make(
        Path(os.environ["ROPESLR_TEST_BASE"]) / "models", [f"diffusion_models/{file}.safetensors"]
    )
    return comfy_host.run_node(
        "UNETLoader", unet_name=f"{file}.safetensors", weight_dtype="default"
    )[0]


def sparse(model, **settings):
    """The model behind the pack's node."""
    comfy_host.pack()
    return comfy_host.run_node("RoPeSLRSparseAttention", model=model, **(SETTINGS | settings))[0]


def with_override(model, override):
    """A clone of a MODEL with something else in the attention slot, as other packs put it there."""
    model = model.clone()
    model.model_options["transformer_options"][SLOT] = override
    return model


def own_adapter(method: str, layers: int = 2, heads: int = 2, width: int = 128, **more):
    """An adapter with random weights, as the pack that ComfyUI loaded makes it."""
    from support.data import adapters

    made = getattr(adapters, f"{method}_adapter")(layers, heads, width, **more)
    module = comfy_host.module(".attention.adapters")
    info = module.AdapterInfo(
        **{name: getattr(made.info, name) for name in made.info.__dataclass_fields__}
    )
    return module.Adapter(info, made.layers, made.name)


def conditioning(seed: int, tokens: int = 20, width: int = 768, **extra) -> list:
    """A CONDITIONING of random text features."""
    return [[torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)), extra]]


def k_sample(model, positive, negative, latent, mask=None, **widgets):
    """The latent that the stock KSampler makes of one; two Euler steps at CFG 1 by default."""
    settings = dict(seed=1, steps=2, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0)
    (out,) = comfy_host.run_node(
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image={"samples": latent} | ({} if mask is None else {"noise_mask": mask}),
        **(settings | widgets),
    )
    return out["samples"]


def sample(
    model,
    channels: int = 16,
    image: bool = False,
    latent=LATENT,
    batch: int = 1,
    cfg: float = 1.0,
    steps: int = 3,
    sampler: str = "euler",
    text_tokens: int = 20,
    pooled: bool = False,
) -> torch.Tensor:
    """Sample with the stock KSampler and return the latent."""
    shape = (batch, channels, *latent)
    extra = {}
    if image:
        generator = torch.Generator().manual_seed(7)
        extra = {
            "concat_latent_image": torch.randn(shape, generator=generator),
            "concat_mask": torch.ones(1, 1, *latent),
        }
    if pooled:
        extra["pooled_output"] = torch.randn(1, 768, generator=torch.Generator().manual_seed(8))
    return k_sample(
        model,
        conditioning(1, text_tokens, **extra),
        conditioning(2, text_tokens, **extra),
        torch.zeros(shape),
        steps=steps,
        cfg=cfg,
        sampler_name=sampler,
    )


def two_experts(
    split: int,
    high: dict,
    low: dict,
    steps: int = 6,
    sampler: str = "euler",
    scheduler: str = "simple",
):
    """Sample as Wan 2.2 does, high-noise then low-noise expert, one schedule: -> both reports."""
    latent = {"samples": torch.zeros(1, 16, 5, 16, 16)}
    common = dict(
        noise_seed=7,
        steps=steps,
        cfg=1.0,
        sampler_name=sampler,
        scheduler=scheduler,
        positive=conditioning(1),
        negative=conditioning(2),
    )
    high = sparse(load_model("tiny_wan22_t2v_high_noise"), **high)
    low = sparse(load_model("tiny_wan22_t2v_low_noise"), **low)
    (latent,) = comfy_host.run_node(
        "KSamplerAdvanced",
        model=high,
        add_noise="enable",
        latent_image=latent,
        start_at_step=0,
        end_at_step=split,
        return_with_leftover_noise="enable",
        **common,
    )
    (latent,) = comfy_host.run_node(
        "KSamplerAdvanced",
        model=low,
        add_noise="disable",
        latent_image=latent,
        start_at_step=split,
        end_at_step=10000,
        return_with_leftover_noise="disable",
        **common,
    )
    assert torch.isfinite(latent["samples"]).all()
    return report(high), report(low)


def full_density(monkeypatch) -> None:
    """Let sparsity 0, which the node leaves dense, run sparse with every block kept."""
    module = comfy_host.module(".nodes.patching.dense_reason")
    checks = tuple(check for check in module.CHECKS if check is not module._sparsity)
    assert len(checks) == len(module.CHECKS) - 1
    monkeypatch.setattr(module, "CHECKS", checks)


def report(model):
    """The report of the model's last run."""
    return comfy_host.module(".nodes.patching").last_report(model)


def dense_warnings(caplog) -> list[str]:
    """What was logged of attention that stayed dense."""
    return [record.message for record in caplog.records if "runs dense" in record.message]
