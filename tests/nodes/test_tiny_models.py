"""The tiny checkpoints are what they claim: stock loaders take each for the model it imitates."""

import os
from pathlib import Path

import pytest
import torch

import comfy_host
import tiny_models
from support.host.sampling import load_model

CLASSES = {
    "tiny_wan21_t2v": ("WAN21", "WanModel"),
    "tiny_wan_smallest": ("WAN21", "WanModel"),
    "tiny_wan22_t2v_high_noise": ("WAN21", "WanModel"),
    "tiny_wan22_t2v_low_noise": ("WAN21", "WanModel"),
    "tiny_wan22_ti2v_5b": ("WAN22", "WanModel"),
    "tiny_wan21_i2v": ("WAN21", "WanModel"),
    "tiny_wan22_i2v": ("WAN21", "WanModel"),
    "tiny_wan22_fun_control_ref": ("WAN21", "WanModel"),
    "tiny_wan21_vace": ("WAN21_Vace", "VaceWanModel"),
    "tiny_wan22_camera": ("WAN21_Camera", "CameraWanModel"),
    "tiny_wan22_s2v": ("WAN22_S2V", "WanModel_S2V"),
    "tiny_hunyuan_t2v": ("HunyuanVideo", "HunyuanVideo"),
    "tiny_hunyuan_i2v": ("HunyuanVideoI2V", "HunyuanVideo"),
    "tiny_hunyuan_skyreels_i2v": ("HunyuanVideoSkyreelsI2V", "HunyuanVideo"),
    "tiny_hunyuan15_t2v": ("HunyuanVideo15", "HunyuanVideo"),
    "tiny_flux": ("Flux", "Flux"),
    "tiny_hunyuan15_sr": ("HunyuanVideo15_SR_Distilled", "HunyuanVideo"),
    "tiny_wan21_flow_rvs": ("WAN21_FlowRVS", "WanModel"),
    "tiny_hunyuan_image": ("HunyuanImage21", "HunyuanVideo"),
    "tiny_wan21_humo": ("WAN21_HuMo", "HumoWanModel"),
    "tiny_wan22_animate": ("WAN22_Animate", "AnimateWanModel"),
    "tiny_wan21_scail": ("WAN21_SCAIL", "SCAILWanModel"),
    "tiny_wan21_scail2": ("WAN21_SCAIL2", "SCAIL2WanModel"),
    "tiny_wan22_wandancer": ("WAN22_WanDancer", "WanDancerModel"),
    "tiny_wan21_causal": ("WAN21_CausalAR", "CausalWanModel"),
    "tiny_minimax_h3": ("MiniMaxH3", "MiniMaxH3Model"),
    "tiny_ltxv": ("LTXV", "LTXVModel"),
    "tiny_ltx2": ("LTXAV", "LTXAVModel"),
    "tiny_kandinsky5": ("Kandinsky5", "Kandinsky5"),
    "tiny_cogvideox": ("CogVideoX", "CogVideoXTransformer3DModel"),
    "tiny_cogvideox15": ("CogVideoX", "CogVideoXTransformer3DModel"),
}


def test_every_checkpoint_is_tested():
    made = {Path(name).stem for name in tiny_models.FILES if name.startswith("diffusion_models/")}
    assert made == set(CLASSES)


@pytest.mark.parametrize("file", CLASSES)
def test_the_stock_loader_recognises_it(file):
    import comfy.model_base

    if not hasattr(comfy.model_base, CLASSES[file][0]):
        pytest.skip(f"this ComfyUI has no {CLASSES[file][0]}")
    model = load_model(file).model
    assert (type(model).__name__, type(model.diffusion_model).__name__) == CLASSES[file]
    heads = getattr(model.diffusion_model, "num_heads", 2)
    assert heads == (1 if file == "tiny_wan_smallest" else 2)
    assert sum(weight.numel() for weight in model.diffusion_model.parameters()) < 50e6


@pytest.mark.parametrize("name", [name for name in tiny_models.FILES if name.startswith("vae/")])
def test_the_stock_loader_takes_the_vae(name):
    comfy_host.boot()
    tiny_models.make(Path(os.environ["ROPESLR_TEST_BASE"]) / "models", [name])
    (vae,) = comfy_host.run_node("VAELoader", vae_name=Path(name).name)
    assert vae.first_stage_model is not None


def test_the_stock_loader_takes_the_text_encoder():
    comfy_host.boot()
    name = "text_encoders/tiny_clip_l.pt"
    models = Path(os.environ["ROPESLR_TEST_BASE"]) / "models"
    tiny_models.make(models, [name])
    (clip,) = comfy_host.run_node("CLIPLoader", clip_name="tiny_clip_l.pt", type="wan")
    (encoded,) = comfy_host.run_node("CLIPTextEncode", clip=clip, text="a red fox")
    assert encoded[0][0].shape == (1, 77, 768) and torch.isfinite(encoded[0][0]).all()
    assert (models / name).stat().st_size < 2e6
