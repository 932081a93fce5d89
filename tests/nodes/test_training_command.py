"""`python -m training`: the node of a workflow, run without a server by one process and by two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import comfy_host
import tiny_models

ROOT = Path(__file__).resolve().parents[2]
FILES = ("diffusion_models/tiny_wan21_t2v.safetensors", "text_encoders/tiny_clip_l.pt")


def workflow(name: str) -> dict:
    """In ComfyUI's API format."""
    comfy_host.pack()
    node = "RoPeSLRTrainSparseLoRA"
    widgets = comfy_host.widget_defaults(node) | dict(
        steps=3, rank=2, batch_size=2, learning_rate=3e-3, sparsity=0.6, samples=3, evaluate_every=2,
        training_dtype="none", lora_dtype="fp32", existing_lora="[None]", name=name,
    )  # fmt: skip
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "tiny_wan21_t2v.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "CLIPLoader", "inputs": {"clip_name": "tiny_clip_l.pt", "type": "wan"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["2", 0], "text": "red discs on white"}},
        "4": {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 128, "height": 128, "length": 17, "batch_size": 1}},
        "5": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "6": {"class_type": "BasicScheduler", "inputs": {"model": ["1", 0], "scheduler": "simple", "steps": 4, "denoise": 1.0}},
        "7": {"class_type": node, "inputs": {
            "model": ["1", 0], "latents": ["4", 0], "positive": ["3", 0], "sampler": ["5", 0], "sigmas": ["6", 0], **widgets,
        }},
        "8": {"class_type": "LossGraphNode", "inputs": {"loss": ["7", 1], "filename_prefix": "x"}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """ComfyUI's base folder, with the models."""
    folder = tmp_path_factory.mktemp("base")
    comfy_host.boot()
    tiny_models.make(folder / "models", FILES)
    return folder


def run(base, name, *more, processes=1, code=0):
    """-> (the finished or last LoRA, everything that was printed)."""
    path = base / f"{name}.json"
    path.write_text(json.dumps(workflow(name)), encoding="utf-8")
    program = [sys.executable, "-m", "training"]
    if processes > 1:
        many = ["--standalone", "--nproc-per-node", str(processes)]
        program = [sys.executable, "-m", "torch.distributed.run", *many, "-m", "training"]
    done = subprocess.run(
        [*program, str(path), "--cpu", "--base-directory", str(base), *more],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tools" / "cpu_shim"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == code, done.stdout[-4000:]
    files = sorted((base / "models" / "loras").glob(f"{name}_*_steps.safetensors"))
    return (load_file(files[-1]) if files else None), done.stdout


@pytest.fixture(scope="module")
def one(base):
    """The LoRA of one process."""
    return run(base, "one")[0]


@pytest.mark.slow
def test_two_processes_train_the_lora_that_one_does(base, one):
    """Then one process goes on with what two have saved."""
    two, text = run(base, "two", processes=2)
    assert "2 processes train together" in text
    assert one.keys() == two.keys() and any(bool(x.any()) for k, x in one.items() if "up" in k)
    for key in one:
        assert torch.allclose(one[key], two[key], atol=1e-5), key
    more, text = run(base, "two", "--set", "steps=4")
    assert "Going on after step 3" in text and any(not torch.equal(more[k], two[k]) for k in two)


@pytest.mark.slow("thorough")
def test_a_model_spread_over_two_processes_trains_the_same(base, one):
    if comfy_host.module(".nodes.host").comfyui_version().startswith("0.18"):
        pytest.skip("this ComfyUI asks for all weights at once")
    spread, text = run(base, "spread", "--shard", processes=2)
    assert "spread over 2 processes; 50 % are here" in text
    for key in one:
        assert torch.allclose(one[key], spread[key], atol=1e-5), key


@pytest.mark.slow
def test_what_is_wrong_is_said_in_words(base):
    _, text = run(base, "wrong", "--set", "speed=4", code=1)
    assert "--set speed: the node has no such widget" in text
    _, text = run(base, "wrong", "--set", "sparsity=0", code=1)
    assert "With these settings no step would be sparse" in text
    nothing = base / "nothing"
    nothing.mkdir()
    _, text = run(base, "wrong", "--comfyui", str(nothing), code=1)
    assert "is no ComfyUI" in text
