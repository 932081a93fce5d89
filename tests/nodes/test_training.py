"""ComfyUI's own training runs dense, with a reason: a run's memory fits no second pass."""

import pytest
import torch

import comfy_host
from support.host.sampling import conditioning, load_model, report, sample, sparse

reasons = comfy_host.module(".nodes.patching.dense_reason")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settings", [dict(), dict(method="adaspa")])
def test_train_lora_runs_on_a_patched_model(settings, checkpointing):
    """A calibration remembered with its graph ended it; recomputed layers took another path."""
    nodes = comfy_host.boot().NODE_CLASS_MAPPINGS
    if "TrainLoraNode" not in nodes:
        pytest.skip("this ComfyUI has no training node")
    patched = sparse(load_model("tiny_wan21_t2v"), dense_first_steps=0, **settings)
    latent = {"samples": torch.randn(1, 16, 5, 16, 16, generator=torch.Generator().manual_seed(0))}
    inputs = {
        each.id: each.default
        for each in nodes["TrainLoraNode"].GET_SCHEMA().inputs
        if hasattr(each, "default")
    }
    inputs |= dict(
        steps=3, rank=2, gradient_checkpointing=checkpointing, training_dtype="fp32", lora_dtype="fp32",
        existing_lora="[None]", batch_size=1,
    )  # fmt: skip
    widgets = {name: [value] for name, value in inputs.items() if value is not None}
    widgets |= dict(model=[patched], latents=[latent], positive=[conditioning(1)])
    nodes["TrainLoraNode"].EXECUTE_NORMALIZED(**widgets)
    last = report(patched)
    assert last.sparse_calls == 0 and set(last.dense_calls) == {reasons.TRAINING}


def test_a_run_while_comfyui_trains_stays_dense_and_says_so(monkeypatch, caplog):
    import comfy.model_management

    model = load_model("tiny_wan21_t2v")
    dense = sample(model)
    monkeypatch.setattr(comfy.model_management, "in_training", True, raising=False)
    patched = sparse(model)
    assert torch.equal(sample(patched), dense)
    assert report(patched).dense_calls == {reasons.TRAINING: 6}
    assert any(reasons.TRAINING in record.message for record in caplog.records)
