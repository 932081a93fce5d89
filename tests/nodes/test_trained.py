"""The trained tiny Wan of the benchmarks: it loads, its frames can be seen, methods keep their order."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import comfy_host
import tiny_models

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmarks():
    sys.path.append(str(ROOT))
    try:
        from benchmarks import moving_shapes, quality, tiny_wan

        yield moving_shapes, quality, tiny_wan
    finally:
        sys.path.remove(str(ROOT))


def test_a_latent_unfolds_to_the_frames_that_were_folded(benchmarks):
    shapes, _, _ = benchmarks
    clip = shapes.video("red discs on white", (3, 24, 32), torch.Generator().manual_seed(1))
    assert torch.equal(shapes.unfold(shapes.fold(clip)), clip)


def test_the_decoder_shows_those_frames(benchmarks):
    """ComfyUI's scaling and its soft clamp undone, eight times as large, without the first three."""
    import comfy.latent_formats

    shapes, _, _ = benchmarks
    base = Path(os.environ["ROPESLR_TEST_BASE"]) / "models"
    tiny_models.make(base, ["vae/unfolding.safetensors"])
    latent = shapes.latents(["blue rings on black"], (4, 24, 32), torch.Generator().manual_seed(2))
    expected = (shapes.unfold(latent)[0] / 4 + 0.5).clamp(0, 1)[3:].movedim(1, -1)
    (vae,) = comfy_host.run_node("VAELoader", vae_name="unfolding.safetensors")
    raw = comfy.latent_formats.Wan21().process_out(latent)
    (shown,) = comfy_host.run_node("VAEDecode", vae=vae, samples={"samples": raw})
    assert shown.shape == (13, 192, 256, 3)
    small = shown.view(13, 24, 8, 32, 8, 3).mean(dim=(2, 4))[:, 2:-2, 2:-2]  # its border darkens
    assert (small - expected[:, 2:-2, 2:-2]).abs().mean() < 0.02


def test_its_record_says_how_it_was_made(benchmarks):
    _, _, tiny = benchmarks
    record = json.loads((tiny.DATA / "tiny_wan.json").read_text(encoding="utf-8"))
    assert record["made_by"] == "python -m benchmarks.train_tiny_wan"
    assert (tiny.DATA / tiny.FILE).stat().st_size < 10e6
    loaded = tiny.model().model.diffusion_model
    assert sum(weight.numel() for weight in loaded.parameters()) == record["weights"]


@pytest.mark.slow
def test_captions_count(benchmarks):
    """Discs that were asked for in red are redder than those asked for in blue."""
    _, _, tiny = benchmarks
    red, blue = (
        tiny.pictures(tiny.sample(tiny.model(), tiny.Sampling(prompt=text, cfg=2.0, steps=4)))
        for text in ("red discs on white", "blue discs on white")
    )
    assert red[:, 0].mean() - red[:, 2].mean() > blue[:, 0].mean() - blue[:, 2].mean() + 0.05


@pytest.mark.slow
def test_methods_keep_their_order():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.quality", "--quick", "--seeds", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
