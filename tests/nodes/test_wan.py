"""The node on real Wan models: what sparse attention changes; every size and batch runs."""

import pytest
import torch

import comfy_host
from support.data.fields import relative_error
from support.host.sampling import (
    CHANGES,
    WAN,
    conditioning,
    full_density,
    load_model,
    report,
    sample,
    sparse,
)


@pytest.fixture(params=list(WAN))
def wan(request):
    """(model, sampling arguments, the dense latent) of one variant."""
    file, channels, image = WAN[request.param]
    model = load_model(file)
    arguments = dict(channels=channels, image=image)
    return model, arguments, sample(model, **arguments)


def test_sparsity_zero_is_dense(wan):
    model, arguments, dense = wan
    patched = sparse(model, sparsity=0.0)
    assert torch.equal(sample(patched, **arguments), dense)
    assert report(patched).dense_calls == {"sparsity leaves no block out": 6}


@pytest.mark.parametrize("order", ["cube", "raster"])
def test_the_sparse_path_with_every_block_equals_dense(wan, order, monkeypatch):
    full_density(monkeypatch)
    model, arguments, dense = wan
    patched = sparse(model, sparsity=0.0, block_order=order)
    found = sample(patched, **arguments)
    assert relative_error(found, dense) < 1e-5
    # 2 layers x 3 steps, none skipped.
    assert report(patched).sparse_calls == 6 and report(patched).density == 1.0


@pytest.mark.slow
def test_error_falls_as_density_rises_and_ropeslr_is_lowest(wan):
    model, arguments, dense = wan
    errors = {
        method: [
            relative_error(
                sample(sparse(model, method=method, sparsity=sparsity), **arguments), dense
            )
            for sparsity in (0.9, 0.7, 0.4, 0.0)
        ]
        for method in ("ropeslr", "top-k", "top-k plain")
    }
    for method, series in errors.items():
        assert all(more > less for more, less in zip(series, series[1:])), (method, series)
    for ours, pooled, plain in zip(*(errors[m][:-1] for m in ("ropeslr", "top-k", "top-k plain"))):
        assert ours <= pooled and ours <= plain


@pytest.mark.parametrize("latent", [(9, 16, 16), (5, 15, 17), (3, 9, 11), (1, 32, 18)])
@pytest.mark.parametrize("batch, cfg", [(1, 1.0), (2, 1.0), (1, 7.0), (2, 7.0)])
def test_odd_sizes_batches_and_guidance_run(latent, batch, cfg):
    model = load_model("tiny_wan21_t2v")
    arguments = dict(latent=latent, batch=batch, cfg=cfg, steps=2)
    patched = sparse(model, sparsity=0.5)
    found = sample(patched, **arguments)
    assert found.shape == (batch, 16, *latent) and torch.isfinite(found).all()
    assert relative_error(found, sample(model, **arguments)) < 0.5
    assert (
        report(patched).sparse_calls == 4 * report(patched).model_calls // 2
        and not report(patched).dense_calls
    )


@pytest.mark.parametrize("method", ["ropeslr", "top-k"])
def test_a_batch_gives_what_its_members_give(method):
    """Two videos in one batch, guided, against each of them sampled alone.

    The size of query blocks is a run's own choice, for all that it samples.
    """
    model = load_model("tiny_wan21_t2v")
    start = 5 * torch.randn(2, 16, 5, 16, 16, generator=torch.Generator().manual_seed(5))

    def run(latent):
        (sampler,) = comfy_host.run_node("KSamplerSelect", sampler_name="euler")
        out = comfy_host.run_node(
            "SamplerCustom",
            model=sparse(model, method=method, sparsity=0.6, query_block="64"),
            add_noise=False,
            noise_seed=0,
            cfg=7.0,
            positive=conditioning(1),
            negative=conditioning(2),
            sampler=sampler,
            sigmas=torch.tensor([0.8, 0.5, 0.2, 0.0]),
            latent_image={"samples": latent},
        )
        return out[0]["samples"]

    both = run(start)
    for i in range(2):
        assert relative_error(both[i : i + 1], run(start[i : i + 1])) < 1e-4
    assert relative_error(both[:1], both[1:]) > 0.1


@pytest.mark.parametrize("sampler", ["euler", "uni_pc", "dpm_2", "heun", "lcm", "res_multistep"])
def test_samplers_of_every_order_run_sparse(sampler):
    patched = sparse(load_model("tiny_wan21_t2v"))
    assert torch.isfinite(sample(patched, steps=4, sampler=sampler)).all()
    assert not report(patched).dense_calls


def test_text_of_as_many_tokens_as_the_video_is_not_taken_for_it(monkeypatch):
    full_density(monkeypatch)
    model = load_model("tiny_wan21_t2v")
    patched = sparse(model, sparsity=0.0)
    found = sample(patched, text_tokens=576)
    assert relative_error(found, sample(model, text_tokens=576)) < 1e-5
    assert report(patched).sparse_calls == 6 and report(patched).other_calls == {
        "cross-attention": 6
    }


def test_settings_take_effect():
    """Each option changes what runs, so that none is a widget without a wire."""
    model = load_model("tiny_wan21_t2v")
    base = sample(sparse(model), steps=2)
    for changed in CHANGES[1:]:
        assert not torch.equal(sample(sparse(model, **changed), steps=2), base), changed


def test_verbose_logs_every_model_call(caplog):
    with caplog.at_level("INFO"):
        sample(sparse(load_model("tiny_wan21_t2v"), verbose=True, dense_first_steps=1), steps=2)
    lines = [record.message for record in caplog.records if "sigma" in record.message]
    assert len(lines) == 2 and "dense first steps" in lines[0] and lines[1].endswith("sparse")


def test_lora_before_and_after_the_node_are_the_same():
    """A weight patch, as LoRA loaders make it, on either side of the node."""
    model = load_model("tiny_wan21_t2v")
    patch = {"diffusion_model.blocks.0.self_attn.q.weight": (torch.randn(256, 256) * 0.02,)}
    before = model.clone()
    before.add_patches(patch, 1.0)
    after = sparse(model)
    after.add_patches(patch, 1.0)
    plain = sample(sparse(model), steps=2)
    assert torch.equal(sample(sparse(before), steps=2), sample(after, steps=2))
    assert not torch.equal(sample(after, steps=2), plain)


def test_the_newest_plan_replaces_an_older_one():
    model = load_model("tiny_wan21_t2v")
    twice = sparse(sparse(model, sparsity=0.2), sparsity=0.9)
    assert torch.equal(sample(twice, steps=2), sample(sparse(model, sparsity=0.9), steps=2))
    assert report(twice).sparse_calls == 4 and report(twice).sparsity == 0.9


def test_the_pack_registers_its_node():
    comfy_host.pack()
    assert "RoPeSLRSparseAttention" in comfy_host.boot().NODE_CLASS_MAPPINGS


def test_image_models_without_an_image_attend_to_the_text_twice(monkeypatch):
    """Wan I2V without CLIP vision: two cross-attentions, whose text may be as long as the video."""
    full_density(monkeypatch)
    model = load_model("tiny_wan21_i2v")
    patched = sparse(model, sparsity=0.0)
    arguments = dict(image=True, text_tokens=576)
    assert relative_error(sample(patched, **arguments), sample(model, **arguments)) < 1e-5
    assert report(patched).sparse_calls == 6
    assert report(patched).other_calls == {"cross-attention": 12}
