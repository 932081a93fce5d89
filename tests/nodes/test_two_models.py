"""Guiders with two models: each follows its own node, and one without a node stays as it is."""

import pytest
import torch

import comfy_host
from support.data.fields import relative_error
from support.host.sampling import conditioning, load_model, own_adapter, report, sparse

reasons = comfy_host.module(".nodes.patching.dense_reason")


@pytest.fixture(autouse=True)
def _needs_the_guider():
    if "DualModelGuider" not in comfy_host.boot().NODE_CLASS_MAPPINGS:
        pytest.skip("this ComfyUI has no guider with two models")


def guided(first, second, steps=2, start=1.0, noise="RandomNoise"):
    """Sample with one model for the positive pass and one for the negative."""
    run = comfy_host.run_node
    (guider,) = run(
        "DualModelGuider",
        model=first,
        model_negative=second,
        positive=conditioning(1),
        negative=conditioning(2),
        cfg=3.0,
    )
    (made,), (sampler,) = (
        run(noise, **({"noise_seed": 3} if noise == "RandomNoise" else {})),
        run("KSamplerSelect", sampler_name="euler"),
    )
    sigmas = torch.linspace(start, 0.0, steps + 1)
    latent = {"samples": torch.zeros(1, 16, 5, 16, 16)}
    out = run(
        "SamplerCustomAdvanced",
        noise=made,
        guider=guider,
        sampler=sampler,
        sigmas=sigmas,
        latent_image=latent,
    )
    assert torch.isfinite(out[0]["samples"]).all()
    return out[0]["samples"]


@pytest.fixture
def models():
    """Two models of one class and as many layers: only their identity tells them apart."""
    return load_model("tiny_wan22_t2v_high_noise"), load_model("tiny_wan22_t2v_low_noise")


def test_a_node_on_the_first_model_leaves_the_second_dense(models):
    high, low = models
    first = sparse(high, sparsity=0.6)
    found = guided(first, low)
    assert report(first).sparse_calls == 4
    (reason,) = report(first).dense_calls
    assert reason == reasons.OTHER_MODEL.format(name="WanModel")
    both = guided(sparse(high, sparsity=0.6), sparse(low, sparsity=0.6))
    assert relative_error(both, found) > 1e-4  # the second one was dense before


def test_a_node_on_the_second_model_alone_takes_effect(models):
    high, low = models
    second = sparse(low, sparsity=0.6)
    dense, found = guided(high, low), guided(high, second)
    assert 1e-4 < relative_error(found, dense) < 0.5
    assert report(second).sparse_calls == 4 and report(second).completed


def test_each_of_two_nodes_counts_and_decides_for_its_own_model(models):
    high, low = models
    first = sparse(high, sparsity=0.6, adapter=own_adapter("sla"))
    second = sparse(low, method="top-k", sparsity=0.8, dense_layers="1")
    for _ in range(2):
        guided(first, second, steps=3)
        last, other = report(first), report(second)
        assert last.method == "sla" and last.sparse_calls == 6 and not last.dense_calls
        assert other.method == "top-k" and other.sparse_calls == 3
        assert other.dense_calls == {"dense layers": 3}


def test_nothing_of_a_run_with_two_models_stays_behind(models):
    high, low = models
    plain = guided(high, low)
    guided(sparse(high), sparse(low, adapter=own_adapter("rola")))
    assert torch.equal(guided(high, low), plain)
    modules = [*high.model.modules(), *low.model.modules()]
    assert not any(module._forward_pre_hooks for module in modules)


def test_both_models_stand_at_the_same_step_of_a_schedule_that_goes_on(models):
    """A second sampler that continues another's: neither model's first step is a first step."""
    patched = [sparse(model, dense_first_steps=1, sparsity=0.6) for model in models]
    guided(*patched, steps=4, start=0.5, noise="DisableNoise")
    first, second = (report(model) for model in patched)
    assert first.dense_calls == second.dense_calls
    assert first.sparse_calls == second.sparse_calls > 0
