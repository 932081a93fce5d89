"""What models other than Wan and HunyuanVideo bring with them: packed latents, stages, images."""

from dataclasses import replace

import pytest
import torch

import comfy_host
from support.data.fields import relative_error
from support.data.variants import VARIANTS, nested
from support.host.sampling import full_density, report, sparse


@pytest.fixture
def ltx2():
    variant = VARIANTS["LTX-2"]
    if variant.missing():
        pytest.skip(variant.missing())
    return variant, variant.model()


def test_the_video_of_a_packed_latent_is_what_strict_measures(ltx2):
    """The latent that a sampler gets is flat; the shapes beside it tell the video's tokens."""
    variant, model = ltx2
    with pytest.raises(RuntimeError, match="192 tokens are fewer than min_tokens 1000"):
        variant.sample(sparse(model, strict=True, min_tokens=1000), (3, 8, 8), 1.0)
    patched = sparse(model, strict=True, min_tokens=192)
    variant.sample(patched, (3, 8, 8), 1.0)
    assert report(patched).sparse_calls == 4 and report(patched).tokens == 192


@pytest.mark.parametrize("first", [-1, 1])
def test_a_second_stage_loses_no_step_unless_it_is_asked_to(first, ltx2):
    """LTX-2: eight steps at half size, then a few from levels below the highest, with new noise."""
    variant, model = ltx2
    (guider,) = comfy_host.run_node(
        "BasicGuider", model=(patched := sparse(model, dense_first_steps=first)),
        conditioning=variant_text(variant),
    )  # fmt: skip
    (sampler,) = comfy_host.run_node("KSamplerSelect", sampler_name="euler")
    (source,) = comfy_host.run_node("RandomNoise", noise_seed=3)
    for sigmas, dense in (((1.0, 0.9, 0.7, 0.0), 2), ((0.85, 0.725, 0.4219, 0.0), 2 * (first > 0))):
        latent = nested(torch.zeros(1, 128, 3, 8, 8), torch.zeros(1, 8, 12, 16))
        comfy_host.run_node(
            "SamplerCustomAdvanced",
            noise=source,
            guider=guider,
            sampler=sampler,
            sigmas=torch.tensor(sigmas),
            latent_image={"samples": latent},
        )
        assert sum(report(patched).dense_calls.values()) == dense
        assert report(patched).sparse_calls == 6 - dense


@pytest.mark.parametrize("name", ["CogVideoX", "Cosmos Predict2", "Wan 2.1 T2V"])
def test_what_counts_as_begun_elsewhere_is_the_share_of_noise(name):
    """Not every model's highest level is 1, and not every schedule starts at it."""
    if VARIANTS[name].missing():
        pytest.skip(VARIANTS[name].missing())
    import comfy.samplers

    module = comfy_host.module(".nodes.patching.full_schedule")
    sampling = VARIANTS[name].model().get_model_object("model_sampling")
    for scheduler in ("simple", "ddim_uniform", "karras"):
        levels = comfy.samplers.calculate_sigmas(sampling, scheduler, 20).tolist()
        assert not module.begun_elsewhere(levels, sampling), scheduler
        assert module.begun_elsewhere(levels[-5:], sampling), scheduler
        assert not module.begun_elsewhere(levels[::-1], sampling)


def variant_text(variant):
    from support.host.sampling import conditioning

    return conditioning(1, width=variant.text, **variant.extra((3, 8, 8)))


def guided(strength, pixels=None):
    """LTX-Video with a guide of some strength, for all pixels or those of a mask."""
    variant = VARIANTS["LTX-Video with a guide"]

    def extra(latent):
        _, height, width = latent
        entry = {
            "pre_filter_count": height * width,
            "strength": strength,
            "pixel_mask": pixels,
            "latent_shape": [1, height, width],
        }
        return variant.extra(latent) | {"guide_attention_entries": [entry]}

    return replace(variant, extra=extra)


def splits_queries():
    """Whether this ComfyUI asks for the video's queries apart from the guides'."""
    import comfy.ldm.lightricks.model

    return hasattr(comfy.ldm.lightricks.model, "GuideAttentionMask")


@pytest.mark.parametrize("strength", [0.7, 1.5, 0.0])
def test_guides_of_another_strength_run_sparse(strength, monkeypatch):
    """ComfyUI asks for the video's queries apart, and weights the guide's keys with a mask."""
    if not splits_queries():
        pytest.skip("this ComfyUI weights guides with a mask over all queries")
    weaker = guided(strength)
    model = weaker.model()
    dense = weaker.sample(model, weaker.even, 1.0)
    assert (
        relative_error(VARIANTS["LTX-Video with a guide"].sample(model, weaker.even, 1.0), dense)
        > 1e-3
    )
    errors = []
    for method in ("ropeslr", "top-k", "top-k plain", "adaspa"):
        patched = sparse(model, sparsity=0.6, method=method, strict=True)
        errors.append(relative_error(weaker.sample(patched, weaker.even, 1.0), dense))
        assert report(patched).sparse_calls == 4 and not report(patched).dense_calls
    assert 1e-5 < min(errors) and max(errors) < 0.5
    full_density(monkeypatch)
    for cfg in (1.0, 5.0):
        dense = weaker.sample(model, weaker.odd, cfg)
        found = weaker.sample(sparse(model, sparsity=0.0), weaker.odd, cfg)
        assert relative_error(found, dense) < 1e-5


def test_guides_that_cannot_be_weighted_stay_dense_with_a_reason():
    """Each pixel with a strength of its own; and a ComfyUI that weights them for all queries."""
    weaker = guided(0.7, torch.rand(1, 1, 8, 64, 64) if splits_queries() else None)
    model = weaker.model()
    patched = sparse(model)
    found = weaker.sample(patched, weaker.even, 1.0)
    assert torch.equal(found, weaker.sample(model, weaker.even, 1.0))
    ((reason, count),) = report(patched).dense_calls.items()
    assert count == 4 and "attention mask" in reason
    with pytest.raises(RuntimeError, match="strict"):
        weaker.sample(sparse(model, strict=True), weaker.even, 1.0)


@pytest.mark.parametrize(
    "module, name, why",
    [
        ("comfy.ldm.wan.model_animate2", "WanAnimate2Model", "it attends frame by frame"),
        ("comfy.ldm.seedvr.model", "NaDiT", "windows of the video"),
        ("comfy.ldm.wan.model_of_tomorrow", "NextWan", "none of the video models"),
    ],
)
def test_models_that_ask_in_another_form_have_the_true_reason(module, name, why):
    """By their classes' names: this ComfyUI need not have them."""
    kind = type(name, (torch.nn.Module,), {"__module__": module})
    comfy_host.pack()
    info = comfy_host.module(".nodes.patching.model_info").model_info(kind())
    assert info.name == name and why in info.unsupported


@pytest.mark.parametrize("name", ["Kandinsky 5", "Cosmos Predict2"])
def test_single_images_of_a_video_model_stay_dense_with_a_reason(name):
    variant = VARIANTS[name]
    model = variant.model()
    dense = variant.sample(model, (1, 32, 32), 1.0)
    patched = sparse(model)
    assert torch.equal(variant.sample(patched, (1, 32, 32), 1.0), dense)
    reason = comfy_host.module(".nodes.patching.dense_reason").SINGLE_IMAGE
    assert report(patched).dense_calls == {reason: 4}


def test_sound_is_attended_to_as_before(ltx2, monkeypatch):
    """LTX-2's sound has blocks of attention of its own; with every block kept nothing changes."""
    full_density(monkeypatch)
    variant, model = ltx2
    dense = variant.sample(model, variant.even, 5.0)
    found = variant.sample(sparse(model, sparsity=0.0), variant.even, 5.0)
    assert relative_error(found, dense) < 1e-5


THOROUGH = pytest.mark.slow("thorough")
COMPILED = [
    ("MiniMax H3", "eager", True),
    ("MiniMax H3", "eager", False),
    pytest.param("LTX-2", "eager", False, marks=THOROUGH),
    ("Kandinsky 5", "eager", True),
    ("Kandinsky 5", "eager", False),
    pytest.param("LTX-2", "eager", True, marks=THOROUGH),  # takes as long as all the others
    *(
        pytest.param(name, "eager", whole, marks=THOROUGH)
        for name in ("LTX-Video with a guide", "Cosmos Predict2", "Mochi", "CogVideoX")
        for whole in (True, False)
    ),
    *(
        pytest.param(name, "inductor", whole, marks=THOROUGH)
        for name in ("MiniMax H3", "LTX-2", "Kandinsky 5")
        for whole in (True, False)
    ),
]


@pytest.mark.parametrize("name, backend, whole", COMPILED)
def test_compiled_models_run_sparse_and_alike(name, backend, whole, monkeypatch):
    variant = VARIANTS[name]
    if variant.missing():
        pytest.skip(variant.missing())
    model = variant.model()
    expected = variant.sample(sparse(model), variant.even, 1.0)
    patched = sparse(model)
    net = model.model.diffusion_model
    if whole:
        compiled = torch.compile(net, backend=backend)
        patched.add_object_patch("diffusion_model", compiled)
    else:
        (list_name, _), *_ = (
            comfy_host.module(".nodes.patching.model_info").model_info(net).arrangement.layers
        )
        for i, block in enumerate(getattr(net, list_name)):
            patched.add_object_patch(
                f"diffusion_model.{list_name}.{i}", torch.compile(block, backend=backend)
            )
    found = variant.sample(patched, variant.even, 1.0)
    last = report(patched)
    assert last.sparse_calls == 4 and not last.dense_calls
    assert relative_error(found, expected) < 1e-5
    variant.sample(model, variant.even, 1.0, steps=1)  # takes the patches off again


@pytest.mark.parametrize(
    "name",
    ["MiniMax H3", "LTX-2", "LTX-Video with a guide", "Kandinsky 5", "Mochi", "CogVideoX"],
)
def test_removing_the_node_gives_bit_identical_latents(name):
    variant = VARIANTS[name]
    if variant.missing():
        pytest.skip(variant.missing())
    model = variant.model()
    never = variant.sample(model, variant.even, 1.0)
    variant.sample(sparse(model), variant.even, 1.0)
    assert torch.equal(variant.sample(model, variant.even, 1.0), never)
