"""What shipped workflows load beside the tiny models: SparkWan file, CLIP vision, start image."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

import browser
import tiny_models
from support.data import checkpoints
from workflow import LORA, TINY, TRAINED_VAE

SPARKWAN, CLIP_VISION = (
    "diffusion_models/tiny_sparkwan.safetensors",
    "clip_vision/tiny_clip_vision_h.pt",
)
WANTED = {*TINY.values(), TRAINED_VAE}
STAND_INS = Path(tiny_models.__file__).with_name("stand_ins.py")
H3 = "diffusion_models/tiny_minimax_h3.safetensors"
# CLIP-ViT-H as Wan 2.1 needs it: its sizes are fixed.
WIDTH, HIDDEN, LAYERS, PATCH, TOKENS, PROJECTED = 1280, 5120, 32, 14, 257, 1024


def make(base: Path) -> None:
    """Write what a shipped workflow needs below a ComfyUI's base folder.

    Files that exist are kept, but for what earlier trainings left: a new one would go on with it.
    """
    for trained in (base / "models").rglob(f"{LORA}*"):
        trained.unlink()
    wanted = [name for name in tiny_models.FILES if name.rpartition("/")[2] in WANTED]
    if importlib.util.find_spec("comfy.ldm.minimax") is None:  # an older ComfyUI
        wanted.remove(H3)
    tiny_models.make(base / "models", wanted)
    for name, write in ((SPARKWAN, _sparkwan), (CLIP_VISION, _clip_vision)):
        path = base / "models" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name("partial-" + path.name)
            write(partial)
            partial.replace(path)
    browser.start_image(base / "input" / "example.png")
    (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
    shutil.copy(STAND_INS, base / "custom_nodes")


def _sparkwan(path: Path) -> None:
    """SparkWan's names and shapes but for the width of the texts, which is CLIP-L's."""
    weights = checkpoints.sparkwan(dtype=torch.float32)
    name = "text_embedding.0.weight"
    weights[name] = weights[name][:, : tiny_models.TEXT_WIDTH].contiguous()
    metadata = {"config": json.dumps({"transformer": {"text_dim": tiny_models.TEXT_WIDTH}})}
    save_file(weights, path, metadata)


def _clip_vision(path: Path) -> None:
    """630 M parameters in a small file: all matrices are overlapping views of the same numbers."""
    small = (torch.randn(60000, generator=torch.Generator().manual_seed(0)) * 0.02).half()
    weights = {
        "vision_model.embeddings.class_embedding": small[:WIDTH].clone(),
        "vision_model.embeddings.patch_embedding.weight": small.as_strided(
            (WIDTH, 3, PATCH, PATCH), (7, 196, 14, 1)
        ),
        "vision_model.embeddings.position_embedding.weight": small.as_strided(
            (TOKENS, WIDTH), (31, 1)
        ),
        "visual_projection.weight": small.as_strided((PROJECTED, WIDTH), (37, 1)),
    }
    norms = ["vision_model.pre_layrnorm", "vision_model.post_layernorm"]
    for i in range(LAYERS):
        layer = f"vision_model.encoder.layers.{i}."
        norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
        for j, name in enumerate(("q_proj", "k_proj", "v_proj", "out_proj")):
            weights[f"{layer}self_attn.{name}.weight"] = small.as_strided(
                (WIDTH, WIDTH), (39 + 2 * j, 1), 7 * i
            )
            weights[f"{layer}self_attn.{name}.bias"] = torch.zeros(WIDTH).half()
        weights[f"{layer}mlp.fc1.weight"] = small.as_strided((HIDDEN, WIDTH), (11, 1), 13 * i)
        weights[f"{layer}mlp.fc1.bias"] = torch.zeros(HIDDEN).half()
        weights[f"{layer}mlp.fc2.weight"] = small.as_strided((WIDTH, HIDDEN), (19, 1), 5 * i)
        weights[f"{layer}mlp.fc2.bias"] = torch.zeros(WIDTH).half()
    for name in norms:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = (
            torch.ones(WIDTH).half(),
            torch.zeros(WIDTH).half(),
        )
    torch.save(weights, path)
