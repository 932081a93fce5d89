"""ComfyUI's own training: dense with a reason, or through sparse attention where asked."""

import math

import pytest
import torch

import comfy_host
from support.data.variants import VARIANTS
from support.host.sampling import conditioning, load_model, report, sample, sparse

reasons = comfy_host.module(".nodes.patching.dense_reason")


def train(patched, checkpointing, latent, steps=3, positive=None, **more):
    """Core's own training node; -> the LoRA, its losses, and the steps."""
    if "TrainLoraNode" not in comfy_host.boot().NODE_CLASS_MAPPINGS:
        pytest.skip("this ComfyUI has no training node")
    lora, losses, done = comfy_host.run_node(
        "TrainLoraNode", model=patched, latents=latent, positive=positive or conditioning(1),
        steps=steps, rank=2, gradient_checkpointing=checkpointing, training_dtype="fp32", lora_dtype="fp32",
        existing_lora="[None]", batch_size=1, **more,
    )  # fmt: skip
    return lora, losses["loss"], done


def video(*shape):
    return {"samples": torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settings", [dict(), dict(method="adaspa")])
def test_train_lora_runs_on_a_patched_model(settings, checkpointing):
    """A calibration remembered with its graph ended it; recomputed layers took another path."""
    patched = sparse(load_model("tiny_wan21_t2v"), dense_first_steps=0, **settings)
    train(patched, checkpointing, video(16, 5, 16, 16))
    last = report(patched)
    assert last.sparse_calls == 0 and set(last.dense_calls) == {reasons.TRAINING}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, method",
    [
        ("Wan 2.1 T2V", "ropeslr"),
        ("HunyuanVideo T2V", "ropeslr"),
        pytest.param("Wan 2.1 T2V", "adaspa", marks=pytest.mark.slow("thorough")),
        pytest.param("Wan 2.1 T2V", "top-k", marks=pytest.mark.slow("thorough")),
        pytest.param("LTX-Video", "ropeslr", marks=pytest.mark.slow("thorough")),
    ],
)
def test_train_lora_trains_through_sparse_attention_where_asked(name, method, thorough):
    """Losses are finite and fall; checkpoints change nothing; the model is as it was."""
    variant = VARIANTS[name]
    model, loras = variant.model(), []
    before = variant.sample(model, variant.even, 1.0)

    def trained(learning_rate, depth):
        patched = sparse(model, method=method, sparsity=0.6, training="sparse")
        torch.manual_seed(0)
        lora, losses, steps = train(
            patched,
            depth > 0,
            video(variant.channels, *variant.even),
            8,
            learning_rate=learning_rate,
            checkpoint_depth=max(1, depth),
            positive=conditioning(1, width=variant.text, **variant.extra(variant.even)),
        )
        last = report(patched)
        assert steps == 8 and all(math.isfinite(loss) for loss in losses)
        assert last.sparse_calls == variant.calls * last.model_calls and not last.dense_calls
        return lora, sum(losses[-4:])  # at the same noise, whatever was learned

    wan = name.startswith("Wan")
    _, untrained = trained(1e-7, 1 if wan else 2)
    # No checkpoints; of the whole model, its blocks, their parts. Others than Wan add in place, so
    # that ComfyUI's own gradients differ between these.
    depths = (0, 1, 2, 3) if thorough else (0, 3)
    for depth in depths if wan else (2,):
        lora, loss = trained(3e-3, depth)
        assert loss < 0.9 * untrained
        loras.append(lora)
    one, *others = loras
    assert any(float(each.abs().max()) > 1e-3 for each in one.values())
    for other in others:
        assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)
    assert torch.equal(variant.sample(model, variant.even, 1.0), before)
    assert not [m for m in model.model.diffusion_model.modules() if m._forward_pre_hooks]


def test_a_run_while_comfyui_trains_stays_dense_and_says_so(monkeypatch, caplog):
    import comfy.model_management

    model = load_model("tiny_wan21_t2v")
    dense = sample(model)
    monkeypatch.setattr(comfy.model_management, "in_training", True, raising=False)
    patched = sparse(model)
    assert torch.equal(sample(patched), dense)
    assert report(patched).dense_calls == {reasons.TRAINING: 6}
    assert any(reasons.TRAINING in record.message for record in caplog.records)
