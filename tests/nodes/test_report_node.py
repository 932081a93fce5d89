"""The Report node: the last run in words and as a picture; its comparison changes nothing."""

import builtins
import dataclasses

import pytest
import torch

import comfy_host
from support.data.variants import VARIANTS
from support.host.sampling import conditioning, load_model, own_adapter, report, sample, sparse

plan = comfy_host.module(".attention.plan")


def run_report(model, latent, **widgets):
    """(latent, image, text) of the node."""
    comfy_host.pack()
    return comfy_host.run_node("RoPeSLRReport", model=model, latent={"samples": latent}, **widgets)


@pytest.fixture
def finished():
    model = sparse(load_model("tiny_wan21_t2v"), sparsity=0.6, dense_first_steps=1)
    return model, sample(model)


def test_it_passes_the_latent_on_and_tells_of_the_run(finished):
    model, latent = finished
    passed, image, text = run_report(model, latent)
    assert passed["samples"] is latent
    assert image.shape == (1, 850, 1700, 3) and 0 <= image.min() < image.max() <= 1
    assert text.startswith(report(model).summary()) and "Time in self-attention" in text


def test_every_method_is_compared_with_dense_attention(finished):
    model, latent = finished
    run = report(model)
    _, image, text = run_report(
        model, latent, positive=conditioning(1), compare="all methods", layer=1
    )
    rows = {
        line.split("  ")[1].strip(): line for line in text.splitlines() if line.startswith("  ")
    }
    weights = (*plan.NEED_WEIGHTS, plan.OF_THE_MODEL)
    assert set(rows) == {name for name in plan.METHODS[1:] if name not in weights}
    assert "on this model at this sparsity: ropeslr" in text
    assert report(model) is run  # the comparison is no run of the person's
    assert not torch.equal(image, run_report(model, latent)[1])
    _, _, text = run_report(model, latent, positive=conditioning(1), compare="this method")
    assert [line.split()[0] for line in text.splitlines() if line.startswith("  ")] == ["ropeslr"]


def test_the_errors_are_those_of_the_methods():
    """Sparsity 0.3 is closer to dense than 0.8 in every layer and method.

    An adapter adds its method.
    """
    module = comfy_host.module(".nodes.patching.compare")
    model, latent = load_model("tiny_wan21_t2v"), {"samples": torch.randn(1, 16, 9, 16, 16)}
    alike = dict(allocation="uniform", key_block="64")
    low, high = (
        module.compare(
            sparse(model, sparsity=sparsity, **alike), latent, conditioning(1), module.Request(True)
        )
        for sparsity in (0.3, 0.8)
    )
    for name in low.errors:
        assert set(low.errors[name]) == {0, 1}
        for part in ("relative", "absolute"):
            errors = [[getattr(x.errors[name][i], part) for i in (0, 1)] for x in (low, high)]
            assert errors[0][0] < errors[1][0] and errors[0][1] < errors[1][1], (name, part)
        assert low.saved[name] < high.saved[name]
    last = module.Request(layer=999, head=999)
    far = module.compare(sparse(model, sparsity=0.3, **alike), latent, conditioning(1), last)
    assert (far.selection.number, far.selection.head) == (1, 1)  # the last of both, and said so
    assert far.kept is not None
    assert low.kept.sum(dim=1).tolist() == [6] * 9 and high.kept.sum(dim=1).tolist() == [1] * 9
    fine = module.compare(
        sparse(model, sparsity=0.8, allocation="uniform"), latent, conditioning(1), module.Request()
    )
    assert fine.kept.shape == (9, 36) and fine.kept.sum(dim=1).tolist() == [7] * 9
    patched = sparse(model, adapter=own_adapter("rola"), sparsity=0.8)
    trained = module.compare(patched, latent, conditioning(1), module.Request(True))
    assert list(trained.errors)[0] == "rola"
    assert set(trained.errors) == {*low.errors, "rola"}


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_a_video_with_guides_is_compared_too(strength):
    """Its guides are held by a mask of the noise; their strength is what the methods see of it."""
    import comfy.ldm.lightricks.model

    if not hasattr(comfy.ldm.lightricks.model, "GuideAttentionMask"):
        pytest.skip("this ComfyUI weights guides with a mask over all queries")
    variant = VARIANTS["LTX-Video with a guide"]
    frames, height, width = variant.even
    entry = {
        "pre_filter_count": height * width,
        "strength": strength,
        "pixel_mask": None,
        "latent_shape": [1, height, width],
    }
    extra = variant.extra(variant.even) | {"guide_attention_entries": [entry]}
    mask = torch.ones(1, 1, frames + 1, 1, 1)
    mask[:, :, frames:] = 0
    latent = {
        "samples": torch.randn(1, variant.channels, frames + 1, height, width),
        "noise_mask": mask,
    }
    module = comfy_host.module(".nodes.patching.compare")
    found = module.compare(
        sparse(variant.model(), sparsity=0.6),
        latent,
        conditioning(1, width=variant.text, **extra),
        module.Request(True),
    )
    assert set(found.errors) == {"ropeslr", "adaspa", "top-k", "top-k plain"}
    for each in found.errors.values():
        assert len(each) == 2 and all(0 < error.relative < 0.8 for error in each.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Wan VACE", "HunyuanVideo 1.5 I2V with glyphs", "Wan SCAIL", "Wan 2.1 I2V"]
)
def test_other_models_are_compared_too(name):
    """Text first, references, control blocks: whatever the conditioning brings."""
    variant = VARIANTS[name]
    model = sparse(variant.model(), sparsity=0.6)
    latent = variant.sample(model, variant.even, 1.0)
    extra = conditioning(1, **variant.extra(variant.even))
    _, _, text = run_report(
        model, latent, positive=extra, compare="all methods", layer=999, head=999
    )
    assert "Closest to dense" in text and "failed" not in text


def test_a_comparison_that_was_not_asked_for_is_said(finished):
    """Conditioning is connected, so the person expects one."""
    model, latent = finished
    assert "compare is off" in run_report(model, latent, positive=conditioning(1))[2]
    assert "compare" not in run_report(model, latent)[2]


def test_comparing_leaves_the_random_state_alone(finished):
    model, latent = finished
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    run_report(model, latent, positive=conditioning(1), compare="this method")
    assert torch.equal(torch.randn(3), expected)


def test_heads_that_keep_as_many_need_no_picture_of_their_own():
    model = sparse(load_model("tiny_wan21_t2v"), allocation="uniform")
    latent = sample(model)
    assert report(model).heads is None
    assert run_report(model, latent)[1].shape == (1, 850, 1300, 3)


def test_allocation_is_compared_as_it_would_be_at_that_place(finished):
    model, latent = finished
    _, _, text = run_report(model, latent, positive=conditioning(1), compare="this method", at=0.3)
    assert "measured at this point of the schedule" in text
    alike = sparse(load_model("tiny_wan21_t2v"), allocation="uniform")
    latent = sample(alike)
    _, _, text = run_report(alike, latent, positive=conditioning(1), compare="this method")
    assert "measured at" not in text and "Error against dense" in text


def test_comparing_leaves_the_random_state_of_every_gpu_alone(finished, monkeypatch):
    """Making noise seeds them all; this machine has none, so what is saved is looked at."""
    saved, fork = [], torch.random.fork_rng

    def watched(devices):
        saved.append(list(devices))
        return fork(devices=[])

    monkeypatch.setattr(torch.random, "fork_rng", watched)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    model, latent = finished
    run_report(model, latent, positive=conditioning(1), compare="this method")
    assert saved == 2 * [[0, 1]]  # once to measure what heads need


@pytest.mark.slow  # matplotlib is the same in every ComfyUI
def test_drawing_leaves_no_folder_in_the_home_directory(tmp_path):
    """matplotlib makes one for its caches where nobody tells it a better place."""
    import os
    import subprocess
    import sys

    home = tmp_path / "home"
    home.mkdir()
    code = DRAW.format(support=[str(comfy_host.ROOT / name) for name in ("tests", "tools")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"HOME": str(home)},
    )
    assert done.returncode == 0, done.stderr
    assert not list(home.iterdir()), [str(path) for path in home.rglob("*")]


DRAW = """
import os, sys
sys.path[:0] = {support!r}
import comfy_host
from support.host.sampling import load_model, sample, sparse
model = sparse(load_model("tiny_wan21_t2v"), sparsity=0.6)
latent = sample(model, steps=1)
assert "matplotlib" not in sys.modules
comfy_host.run_node("RoPeSLRReport", model=model, latent={{"samples": latent}})
assert "matplotlib" in sys.modules and "MPLCONFIGDIR" not in os.environ
"""


def test_every_component_of_the_cost_is_drawn(finished, monkeypatch):
    """The bar of what was spent is as long as its title says, also when a step was recomputed."""
    figure, tally = (comfy_host.module(f".nodes.{name}") for name in ("figure", "patching.tally"))
    model, _ = finished
    last = dataclasses.replace(report(model), spent_parts=dict.fromkeys(tally.COMPONENTS, 1.0))
    lengths = []

    class Axes:
        def barh(self, names, widths, **_):
            lengths.append((names[0], widths[0]))

        def __getattr__(self, name):
            return lambda *_, **__: None

    figure._cost(Axes(), last)
    spent = [length for name, length in lengths if name == "spent"]
    assert len(spent) == len(tally.COMPONENTS) and len(set(spent)) == 1
    assert set(report(model).spent_parts) <= set(tally.COMPONENTS)


def test_comparing_leaves_the_model_as_it_was(finished):
    model, latent = finished
    plain = sample(load_model("tiny_wan21_t2v"))
    run_report(model, latent, positive=conditioning(1), compare="all methods")
    assert torch.equal(sample(model), latent)
    assert torch.equal(sample(load_model("tiny_wan21_t2v")), plain)


@pytest.mark.parametrize(
    "widgets, says",
    [
        (dict(compare="all methods"), "connect the sampler's positive"),
        (
            dict(compare="all methods", positive=[[torch.zeros(1, 3, 5), {}]]),
            "No comparison: it failed",
        ),
    ],
)
def test_a_comparison_that_cannot_be_made_does_not_cost_the_run(finished, widgets, says):
    model, latent = finished
    _, image, text = run_report(model, latent, **widgets)
    assert says in text and image.shape[1:] == (850, 1700, 3)


def test_a_model_that_cannot_be_sparse_and_one_that_never_ran():
    variant = VARIANTS["HunyuanImage 2.1"]
    model = sparse(variant.model())
    latent = variant.sample(model, variant.even, 1.0)
    text = run_report(
        model,
        latent,
        positive=conditioning(1, **variant.extra(variant.even)),
        compare="all methods",
    )[2]
    assert "single images" in text and "no attention of this model can be sparse" in text
    for never in (load_model("tiny_wan21_t2v"), sparse(load_model("tiny_wan21_t2v"))):
        assert "No run to report" in run_report(never, latent)[2]


def test_without_matplotlib_the_text_is_the_picture(finished, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if "figure" in name or name.startswith("matplotlib"):
            raise ImportError("no matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    _, image, text = run_report(*finished)
    assert "pip install matplotlib" in text and image.shape[2:] == (720, 3) and image.min() < 0.5
