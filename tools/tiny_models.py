"""Tiny checkpoints of real architectures: random weights, 2 heads of 128 channels, 2 layers.

ComfyUI's stock loaders recognise and load them like the released files. Needs a booted ComfyUI
(comfy_host.boot). `python tiny_models.py FOLDER [NAME ...]` writes them below FOLDER, as ComfyUI's
models folder is laid out.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HEADS = 2
LAYERS = 2
WIDTH = 128 * HEADS
SHARPNESS = 2.0  # sd of the attention logits; random projections alone attend to everything
# The norm of a video self-attention's queries, in every model.
SHARP = (
    "self_attn.norm_q.weight",
    "blocks.0.attn.q_norm.weight",
    "blocks.1.attn.q_norm.weight",
    "attn1.q_norm.weight",
    "self_attention.query_norm.weight",
    "self_attn.q_norm.weight",
)
TEXT_WIDTH = 768  # CLIP-L's; Wan's own 4096 would need a text encoder of 5.7 B parameters


def make(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write the named files (all by default) below `folder`; files that exist are kept."""
    for name in names or FILES:
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            FILES[name](partial)
            partial.replace(path)  # an interrupted run leaves no half file under the final name


def _fill(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Deterministic weights of a size that keeps activations near 1.

    Fan-in scaled matrices, norms about 1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if 0 in weight.stride():  # a constant, seen many times
                continue
            if not weight.is_floating_point():
                weight.zero_()
                continue
            noise = torch.randn(weight.shape, generator=generator)
            leaf = name.rsplit(".", 1)[-1]
            if name.endswith(SHARP):
                noise = SHARPNESS + 0.02 * noise
            elif leaf == "gamma" or (weight.ndim == 1 and leaf in ("weight", "scale")):
                noise = 1 + 0.02 * noise
            elif weight.ndim <= 1:
                noise *= 0.02
            elif "modulation" in name:
                noise *= 0.3
            elif leaf == "weight":
                noise *= weight[0].numel() ** -0.5
            else:
                noise *= 0.05
            weight.copy_(noise)
    return model


def _wan(
    seed: int, kind: str = "WanModel", module: str = "model", extra: dict | None = None, **config
) -> Callable[[Path], None]:
    """A class of comfy.ldm.wan.

    `extra` goes into the file's metadata, for what the weights do not show.
    """

    def write(path: Path) -> None:
        import comfy.ops

        settings = dict(
            model_type="t2v",
            dim=WIDTH,
            ffn_dim=2 * WIDTH,
            num_heads=HEADS,
            num_layers=LAYERS,
            text_dim=TEXT_WIDTH,
            dtype=torch.float32,
        )
        model = getattr(importlib.import_module(f"comfy.ldm.wan.{module}"), kind)(
            device="cpu", operations=comfy.ops.disable_weight_init, **(settings | config)
        )
        # The text width is the one size that ComfyUI does not read off the weights, but it heeds
        # the file's metadata.
        metadata = {"config": json.dumps({"transformer": {"text_dim": TEXT_WIDTH} | (extra or {})})}
        save_file(_fill(model, seed).state_dict(), path, metadata)

    return write


def _model(seed: int, place: str, metadata: dict | None = None, **config) -> Callable[[Path], None]:
    """A class of comfy.ldm; place: its module and name.

    `metadata` goes into the file, for what the weights do not show.
    """

    def write(path: Path) -> None:
        model = _made(seed, place, **(config | (metadata or {})))
        told = {"config": json.dumps({"transformer": metadata})} if metadata else None
        save_file(model.state_dict(), path, told)

    return write


def _made(seed: int, place: str, **config) -> torch.nn.Module:
    import comfy.ops

    module, _, kind = place.rpartition(".")
    model = getattr(importlib.import_module(f"comfy.ldm.{module}"), kind)(
        device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init, **config
    )
    _fill(model, seed)
    if hasattr(getattr(model, "rope", None), "inv_freq"):  # what it is in released files
        count = len(model.rope.inv_freq)
        model.rope.inv_freq.copy_(10000.0 ** -(torch.arange(count) / count))
    return model


HUNYUAN_SIZES: dict[str, Any] = dict(
    in_channels=16,
    out_channels=16,
    vec_in_dim=768,
    context_in_dim=TEXT_WIDTH,
    hidden_size=WIDTH,
    mlp_ratio=4.0,
    num_heads=HEADS,
    depth=LAYERS,
    depth_single_blocks=LAYERS,
    axes_dim=[16, 56, 56],
    theta=256,
    patch_size=[1, 2, 2],
    qkv_bias=True,
    guidance_embed=True,
    byt5=False,
    meanflow=False,
    use_cond_type_embedding=False,
    vision_in_dim=None,
    meanflow_sum=False,
)
HUNYUAN_15: dict[str, Any] = dict(
    out_channels=32,
    patch_size=[1, 1, 1],
    vec_in_dim=None,
    guidance_embed=False,
    byt5=True,
    use_cond_type_embedding=True,
    vision_in_dim=1152,
    meanflow_sum=True,
    depth_single_blocks=0,
)


def _hunyuan(seed: int, **config) -> Callable[[Path], None]:
    return _model(seed, "hunyuan_video.model.HunyuanVideo", **(HUNYUAN_SIZES | config))


def _cogvideo(seed: int, **config) -> Callable[[Path], None]:
    return _model(
        seed,
        "cogvideo.model.CogVideoXTransformer3DModel",
        num_attention_heads=HEADS,
        num_layers=LAYERS,
        text_embed_dim=TEXT_WIDTH,
        use_rotary_positional_embeddings=True,
        **config,
    )


LTX_SIZES = dict(
    num_attention_heads=HEADS,
    attention_head_dim=128,
    cross_attention_dim=WIDTH,
    caption_channels=TEXT_WIDTH,
    positional_embedding_max_pos=[20, 2048, 2048],
    causal_temporal_positioning=True,
    use_middle_indices_grid=True,
)
LTX2 = "lightricks.av_model.LTXAVModel"
LTX2_SIZES = LTX_SIZES | dict(
    audio_num_attention_heads=HEADS,
    audio_attention_head_dim=64,
    audio_cross_attention_dim=64 * HEADS,
    connector_num_attention_heads=TEXT_WIDTH // 128,
    connector_num_layers=1,
    rope_type="split",
)
# A pixel of its latents is 32 x 32 pixels of 8 frames, and 128 numbers are four of sound.
LTX2_VAE: dict[str, Any] = dict(
    dims=3,
    latent_channels=128,
    encoder_blocks=[["compress_all", {}]] * 3,
    decoder_blocks=[*[["compress_all", {}]] * 3, ["res_x", {"num_layers": 1}]],
    encoder_base_channels=16,
    decoder_base_channels=16,
    patch_size=4,
    norm_layer="pixel_norm",
    latent_log_var="uniform",
)
LTX2_SOUND: dict[str, Any] = dict(
    double_z=True,
    mel_bins=64,
    z_channels=8,
    resolution=256,
    in_channels=2,
    out_ch=2,
    ch=8,
    ch_mult=[1, 1, 1],
    num_res_blocks=1,
    attn_resolutions=[],
    dropout=0.0,
    mid_block_add_attention=False,
    norm_type="pixel",
    causality_axis="height",
)
LTX2_VOCODER: dict[str, Any] = dict(
    upsample_initial_channel=32,
    resblock_kernel_sizes=[3],
    resblock_dilation_sizes=[[1, 3, 5]],
)


def _ltx2_checkpoint(path: Path) -> None:
    """LTX-2 is one file: the model, the decoders of pictures and of sound, and their sizes."""
    from comfy.ldm.lightricks.vae import audio_vae, causal_video_autoencoder

    config = dict(
        transformer=LTX2_SIZES,
        vae=LTX2_VAE,
        audio_vae={"model": {"params": {"ddconfig": LTX2_SOUND}}},
        vocoder=LTX2_VOCODER,
    )
    told = {"config": json.dumps(config)}
    pictures = causal_video_autoencoder.VideoVAE(config=LTX2_VAE)
    sound = audio_vae.CausalAudioAutoencoder(config["audio_vae"])
    parts = {
        "model.diffusion_model.": _made(42, LTX2, **LTX2_SIZES, num_layers=LAYERS),
        "vae.": _fill(pictures, 46),
        "audio_vae.": _fill(sound, 47),
        "vocoder.": _fill(audio_vae.Vocoder(LTX2_VOCODER), 48),
    }
    weights = {
        prefix + name: weight.float().contiguous()
        for prefix, part in parts.items()
        for name, weight in part.state_dict().items()
    }
    for name in weights:  # what it divides by
        if name.endswith("std-of-means"):
            weights[name] = torch.ones_like(weights[name])
    save_file(weights, path, told)


def _ltx2_upscaler(path: Path) -> None:
    """Twice the height and width of LTX-2's latents."""
    import comfy.ldm.lightricks.latent_upsampler as upsampler
    import comfy.ops

    config = dict(in_channels=128, mid_channels=32, num_blocks_per_stage=1, dims=3)
    known = inspect.signature(upsampler.LatentUpsampler).parameters  # older ones make plain layers
    layers: dict[str, Any] = {}
    if "operations" in known:
        layers["operations"] = comfy.ops.disable_weight_init
    model = upsampler.LatentUpsampler(**config, **layers)
    save_file(_fill(model, 49).state_dict(), path, {"config": json.dumps(config)})


def _lora(seed: int, layer: str, wide: int) -> Callable[[Path], None]:
    """Two ranks of one layer, from WIDTH channels to `wide`."""

    def write(path: Path) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"A": (2, WIDTH), "B": (wide, 2)}
        weights = {
            f"diffusion_model.{layer}.lora_{part}.weight": 0.1
            * torch.randn(shape, generator=generator)
            for part, shape in shapes.items()
        }
        save_file(weights, path)

    return write


def _wan_vae(path: Path) -> None:
    """Width 2: PyTorch's 3-D convolution on a CPU would take most of a test's time otherwise."""
    import comfy.ldm.wan.vae

    model = comfy.ldm.wan.vae.WanVAE(
        dim=2,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        image_channels=3,
        conv_out_channels=3,
        dropout=0.0,
    )
    save_file({name: weight.float() for name, weight in _fill(model, 0).state_dict().items()}, path)


def _taehv(seed: int, latent_channels: int, dtype: torch.dtype) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import comfy.taesd.taehv

        model = _fill(comfy.taesd.taehv.TAEHV(latent_channels=latent_channels), seed)
        save_file(
            {name: weight.to(dtype).contiguous() for name, weight in model.state_dict().items()},
            path,
        )

    return write


def _unfolding_vae(path: Path) -> None:
    """A decoder with weights set by hand, for latents whose pixels hold four frames of one pixel.

    Those of benchmarks/moving_shapes.py, which the trained tiny Wan makes: a decoder that takes
    ComfyUI's scaling and its soft clamp off again, unfolds the frames and enlarges them 8 times.
    Half precision is what tells ComfyUI which scaling this kind of decoder expects.
    """
    import comfy.latent_formats
    import comfy.taesd.taehv

    wan, scaling = comfy.latent_formats.Wan21(), comfy.latent_formats.HunyuanVideo().scale_factor
    weights = {
        name: torch.zeros_like(weight)
        for name, weight in comfy.taesd.taehv.TAEHV(latent_channels=16).state_dict().items()
    }
    # The hidden units of the first layer are the corners of a line that undoes the clamp.
    corners = torch.linspace(-3.2, 3.2, 20)
    first, bias, second = (
        weights[f"decoder.{name}"] for name in ("1.weight", "1.bias", "8.weight")
    )
    constant = first.shape[0] - 1
    bias[constant] = 1.0
    for channel in range(12):
        mean, std = (float(x.flatten()[channel]) for x in (wan.latents_mean, wan.latents_std))
        clamped = 3 * torch.tanh(scaling * (corners * std + mean) / 3)
        slopes = corners.diff() / clamped.diff()
        units = slice(channel * len(corners), channel * len(corners) + len(slopes))
        first[units, channel, 1, 1] = 1.0
        bias[units] = -clamped[:-1]
        turns = torch.cat((slopes[:1], slopes.diff()))
        second[channel, units] = 0.25 * turns[:, None, None] * _binomial()
        second[channel, constant] = (0.5 + 0.25 * corners[0]) * _binomial()
    same = torch.eye(256)
    weights["decoder.7.conv.weight"][:, :, 0, 0] = same
    for i, (width, held) in {13: (128, 6), 19: (64, 3)}.items():
        for part in range(2):  # frames that come apart
            own = slice(part * width, part * width + held)
            kept = slice(part * held, part * held + held)
            weights[f"decoder.{i}.conv.weight"][own, kept, 0, 0] = torch.eye(held)
    for i, held in {14: 6, 20: 3}.items():
        weights[f"decoder.{i}.weight"][:held, :held] = (
            torch.eye(held)[..., None, None] * _binomial()
        )
    weights["decoder.22.weight"][:, :3, 1, 1] = torch.eye(3)
    save_file({name: weight.half().contiguous() for name, weight in weights.items()}, path)


def _binomial() -> torch.Tensor:
    line = torch.tensor([0.25, 0.5, 0.25])
    return torch.outer(line, line)


def _clip_l(path: Path) -> None:
    """CLIP-L's sizes are fixed (124 M parameters): every matrix is a view of one small storage."""
    base = torch.randn(60000, generator=torch.Generator().manual_seed(0)).half()
    small = (base * 0.03).half()
    width, hidden = 768, 3072
    weights = {
        "text_model.embeddings.token_embedding.weight": base.as_strided((49408, width), (1, 1)),
        "text_model.embeddings.position_embedding.weight": small.as_strided(
            (77, width), (width, 1)
        ),
        "text_model.final_layer_norm.weight": torch.ones(width).half(),
        "text_model.final_layer_norm.bias": torch.zeros(width).half(),
        "text_projection.weight": small.as_strided((width, width), (37, 1)),
    }
    for i in range(12):
        layer = f"text_model.encoder.layers.{i}."
        for norm in ("layer_norm1", "layer_norm2"):
            weights[f"{layer}{norm}.weight"] = torch.ones(width).half()
            weights[f"{layer}{norm}.bias"] = torch.zeros(width).half()
        for j, name in enumerate(("q_proj", "k_proj", "v_proj", "out_proj")):
            weights[f"{layer}self_attn.{name}.weight"] = small.as_strided(
                (width, width), (41 + 2 * j, 1), 7 * i
            )
            weights[f"{layer}self_attn.{name}.bias"] = torch.zeros(width).half()
        weights[f"{layer}mlp.fc1.weight"] = small.as_strided((hidden, width), (11, 1), 13 * i)
        weights[f"{layer}mlp.fc1.bias"] = torch.zeros(hidden).half()
        weights[f"{layer}mlp.fc2.weight"] = small.as_strided((width, hidden), (17, 1), 5 * i)
        weights[f"{layer}mlp.fc2.bias"] = torch.zeros(width).half()
    torch.save(weights, path)


FILES: dict[str, Callable[[Path], None]] = {
    "diffusion_models/tiny_wan21_t2v.safetensors": _wan(0),
    "diffusion_models/tiny_wan_smallest.safetensors": _wan(
        19, dim=128, ffn_dim=128, num_heads=1, num_layers=1
    ),
    # Wan 2.2 A14B is two files of the Wan 2.1 layout: the experts for high and for low noise.
    "diffusion_models/tiny_wan22_t2v_high_noise.safetensors": _wan(1),
    "diffusion_models/tiny_wan22_t2v_low_noise.safetensors": _wan(2),
    "diffusion_models/tiny_wan22_ti2v_5b.safetensors": _wan(3, in_dim=48, out_dim=48),
    "diffusion_models/tiny_wan21_i2v.safetensors": _wan(4, model_type="i2v", in_dim=36),
    "diffusion_models/tiny_wan22_i2v.safetensors": _wan(5, in_dim=36),
    "diffusion_models/tiny_wan22_fun_control_ref.safetensors": _wan(
        6, in_dim=52, in_dim_ref_conv=16
    ),
    "diffusion_models/tiny_wan21_vace.safetensors": _wan(
        7, "VaceWanModel", model_type="vace", vace_layers=1, vace_in_dim=96
    ),
    "diffusion_models/tiny_wan22_camera.safetensors": _wan(
        8, "CameraWanModel", model_type="camera_2.2", in_dim=36
    ),
    "diffusion_models/tiny_wan22_s2v.safetensors": _wan(9, "WanModel_S2V", model_type="s2v"),
    "diffusion_models/tiny_wan21_humo.safetensors": _wan(
        20, "HumoWanModel", model_type="humo", dtype=torch.bfloat16
    ),
    "diffusion_models/tiny_wan22_animate.safetensors": _wan(
        21,
        "AnimateWanModel",
        "model_animate",
        model_type="animate",
        in_dim=36,
        num_layers=5,
        dtype=torch.bfloat16,
    ),
    "diffusion_models/tiny_wan21_scail.safetensors": _wan(
        22, "SCAILWanModel", model_type="scail", in_dim=20
    ),
    "diffusion_models/tiny_wan21_scail2.safetensors": _wan(
        23, "SCAIL2WanModel", model_type="scail2", in_dim=20
    ),
    "diffusion_models/tiny_wan22_wandancer.safetensors": _wan(
        24,
        "WanDancerModel",
        "model_wandancer",
        {"audio_inject_layers": [0]},
        model_type="wandancer",
        in_dim=36,
        audio_inject_layers=[0],
    ),
    "diffusion_models/tiny_wan21_flow_rvs.safetensors": _wan(27, extra={"model_type": "flow_rvs"}),
    "diffusion_models/tiny_wan21_causal.safetensors": _wan(
        25, "CausalWanModel", "ar_model", {"causal_ar": True}, model_type="t2v"
    ),
    "diffusion_models/tiny_hunyuan_t2v.safetensors": _hunyuan(10),
    "diffusion_models/tiny_hunyuan_i2v.safetensors": _hunyuan(11, in_channels=33),
    "diffusion_models/tiny_hunyuan_skyreels_i2v.safetensors": _hunyuan(12, in_channels=32),
    "diffusion_models/tiny_hunyuan15_t2v.safetensors": _hunyuan(
        13,
        in_channels=65,
        **HUNYUAN_15,
    ),
    "diffusion_models/tiny_hunyuan15_sr.safetensors": _hunyuan(
        17,
        in_channels=98,
        **HUNYUAN_15,
    ),
    "diffusion_models/tiny_hunyuan_image.safetensors": _hunyuan(
        18, in_channels=64, out_channels=64, patch_size=[1, 1], vec_in_dim=None, axes_dim=[64, 64]
    ),
    "diffusion_models/tiny_minimax_h3.safetensors": _model(
        40,
        "minimax.model.MiniMaxH3Model",
        hidden_size=WIDTH,
        num_layers=LAYERS,
        token_refiner_num_layers=1,
        num_attention_heads=HEADS,
        attention_head_dim=128,
        ffn_hidden_size=2 * WIDTH,
        text_dim=TEXT_WIDTH,
        time_embed_hidden_size=WIDTH,
        time_embed_dim=WIDTH,
    ),
    "diffusion_models/tiny_ltxv.safetensors": _model(
        41, "lightricks.model.LTXVModel", LTX_SIZES, num_layers=LAYERS
    ),
    "diffusion_models/tiny_ltx2.safetensors": _model(42, LTX2, LTX2_SIZES, num_layers=LAYERS),
    "checkpoints/tiny_ltx2.safetensors": _ltx2_checkpoint,
    "latent_upscale_models/tiny_ltx2_spatial_x2.safetensors": _ltx2_upscaler,
    "loras/tiny_ltx2_lora.safetensors": _lora(51, "transformer_blocks.0.attn1.to_q", WIDTH),
    "loras/tiny_minimax_h3_lora.safetensors": _lora(52, "blocks.0.attn.qkv_proj", 3 * WIDTH),
    "diffusion_models/tiny_kandinsky5.safetensors": _model(
        43,
        "kandinsky5.model.Kandinsky5",
        model_dim=64 * HEADS,
        ff_dim=128 * HEADS,
        time_dim=128,
        num_text_blocks=1,
        num_visual_blocks=LAYERS,
    ),
    "diffusion_models/tiny_cogvideox.safetensors": _cogvideo(44),
    "diffusion_models/tiny_cogvideox15.safetensors": _cogvideo(45, patch_size_t=2),
    # A model of another family, which the pack has to leave alone.
    "diffusion_models/tiny_flux.safetensors": _model(
        30,
        "flux.model.Flux",
        in_channels=16,
        out_channels=16,
        vec_in_dim=768,
        context_in_dim=4096,
        hidden_size=WIDTH,
        mlp_ratio=4.0,
        num_heads=HEADS,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[16, 56, 56],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=True,
        txt_ids_dims=[],
    ),
    "vae/tiny_wan_vae.safetensors": _wan_vae,
    "vae/tiny_taehv_hunyuan.safetensors": _taehv(14, 16, torch.float16),
    "vae/tiny_taew22.safetensors": _taehv(15, 48, torch.float32),
    "vae/tiny_lighttae_hv15.safetensors": _taehv(16, 32, torch.float32),
    "vae/unfolding.safetensors": _unfolding_vae,
    "text_encoders/tiny_clip_l.pt": _clip_l,
}

# Models whose sizes ComfyUI does not read off the weights: the class of comfy.supported_models, and
# what it is made with instead.
BUILT: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny_mochi": (
        "GenmoMochi",
        dict(
            image_model="mochi_preview",
            depth=LAYERS,
            patch_size=2,
            num_heads=HEADS,
            hidden_size_x=WIDTH,
            hidden_size_y=128,
            mlp_ratio_x=12288 / WIDTH,  # the class knows one width
            mlp_ratio_y=2.0,
            learn_sigma=False,
            in_channels=12,
            qk_norm=True,
            qkv_bias=False,
            out_bias=True,
            attn_drop=0.0,
            posenc_preserve_area=True,
            timestep_scale=1000.0,
            use_t5=True,
            t5_feat_dim=TEXT_WIDTH,
            t5_token_length=20,
        ),
    ),
    "tiny_cosmos_predict2": (
        "CosmosT2IPredict2",
        dict(
            image_model="cosmos_predict2",
            max_img_h=240,
            max_img_w=240,
            max_frames=128,
            in_channels=16,
            out_channels=16,
            patch_spatial=2,
            patch_temporal=1,
            model_channels=WIDTH,
            concat_padding_mask=True,
            crossattn_emb_channels=TEXT_WIDTH,
            pos_emb_cls="rope3d",
            pos_emb_learnable=True,
            pos_emb_interpolation="crop",
            min_fps=1,
            max_fps=30,
            use_adaln_lora=True,
            adaln_lora_dim=64,
            num_blocks=LAYERS,
            num_heads=HEADS,
            rope_h_extrapolation_ratio=4.0,
            rope_w_extrapolation_ratio=4.0,
            rope_t_extrapolation_ratio=1.0,
        ),
    ),
}


def build(name: str) -> Any:
    """One of `BUILT` as a MODEL; no loader would make it this small."""
    import comfy.model_patcher
    import comfy.supported_models

    kind, config = BUILT[name]
    known = getattr(comfy.supported_models, kind)(dict(config))
    known.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    model = known.get_model({}, device=cpu)
    _fill(model.diffusion_model, 50)
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


if __name__ == "__main__":
    import comfy_host

    comfy_host.boot()
    make(Path(sys.argv[1]), sys.argv[2:] or None)
