"""Under torch.compile every setting takes effect at the next run: whole model or per block."""

import shutil

import pytest
import torch

import comfy_host
from support.data.fields import relative_error
from support.data.variants import VARIANTS
from support.host.compiling import compiled
from support.host.sampling import CHANGES, load_model, own_adapter, report, sample, sparse

FEW = (CHANGES[0], CHANGES[1], dict(dense_layers="0", dense_first_steps=1))
SOME_OR_ALL = None  # FEW, and CHANGES when thorough


@pytest.fixture(autouse=True)
def _graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def use(monkeypatch, attention):
    """Let Wan use one of ComfyUI's attentions. With PyTorch's, the dense model is ONE graph, which never looks
    into the slot again; the other, which ComfyUI takes on a CPU, breaks graphs by itself."""
    import comfy.ldm.modules.attention
    import comfy.ldm.wan.model

    monkeypatch.setattr(
        comfy.ldm.wan.model, "optimized_attention", getattr(comfy.ldm.modules.attention, attention)
    )


@pytest.mark.parametrize(
    "attention, blocks, node_first, changes",
    [
        ("attention_pytorch", 0, False, SOME_OR_ALL),
        pytest.param("attention_pytorch", 2, True, FEW, marks=pytest.mark.slow),
        pytest.param("attention_sub_quad", 0, True, FEW, marks=pytest.mark.slow("thorough")),
        pytest.param("attention_pytorch", 0, True, CHANGES, marks=pytest.mark.slow("thorough")),
        pytest.param("attention_pytorch", 2, False, FEW, marks=pytest.mark.slow("thorough")),
        pytest.param("attention_sub_quad", 0, False, FEW, marks=pytest.mark.slow("thorough")),
    ],
)
def test_settings_take_effect(attention, blocks, node_first, changes, monkeypatch, thorough):
    """A graph compiled without the node must not be used with it, nor the other way round."""
    use(monkeypatch, attention)
    check("eager", blocks, node_first, changes or (CHANGES if thorough else FEW))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler on a CPU")
@pytest.mark.parametrize(
    "blocks, node_first, changes",
    [(0, False, SOME_OR_ALL), pytest.param(2, True, FEW, marks=pytest.mark.slow("thorough"))],
)
def test_settings_take_effect_with_inductor(blocks, node_first, changes, monkeypatch, thorough):
    use(monkeypatch, "attention_pytorch")
    check("inductor", blocks, node_first, changes or (CHANGES if thorough else FEW))


def check(backend, blocks, node_first, changes):
    model = load_model("tiny_wan21_t2v" if blocks else "tiny_wan_smallest")
    around = compiled(model, backend, blocks)

    def both(**settings):
        return (
            compiled(sparse(model, **settings), backend, blocks)
            if node_first
            else sparse(around, **settings)
        )

    dense = sample(model)
    assert relative_error(sample(around), dense) < 1e-5
    for settings in changes:
        patched, alone = both(**settings), sparse(model, **settings)
        assert relative_error(sample(patched), sample(alone)) < 1e-5, settings
        for name in ("sparse_calls", "dense_calls", "density"):
            assert getattr(report(patched), name) == getattr(report(alone), name), settings
    assert relative_error(sample(around), dense) < 1e-5
    assert relative_error(sample(both()), sample(sparse(model))) < 1e-5


@pytest.mark.slow
def test_an_adapter_that_is_connected_later_takes_effect(monkeypatch):
    use(monkeypatch, "attention_pytorch")
    model = load_model("tiny_wan_smallest")
    around = compiled(model)
    for adapter in (None, own_adapter("rola", 1, 1), own_adapter("ropeslr", 1, 1), None):
        assert (
            relative_error(
                sample(sparse(around, adapter=adapter)), sample(sparse(model, adapter=adapter))
            )
            < 1e-5
        )


@pytest.mark.slow
def test_a_lora_and_another_size_do_not_freeze_a_compiled_model(monkeypatch):
    use(monkeypatch, "attention_pytorch")
    model = load_model("tiny_wan_smallest")
    around = compiled(model)
    sample(around)
    change = {"diffusion_model.blocks.0.self_attn.q.weight": (0.02 * torch.randn(128, 128),)}
    for latent in ((9, 16, 16), (5, 15, 17)):
        for settings in (dict(sparsity=0.6), dict(method="top-k")):
            patched, alone = sparse(around, **settings), sparse(model, **settings)
            for each in (patched, alone):
                each.add_patches(change, 1.0)
            assert (
                relative_error(sample(patched, latent=latent), sample(alone, latent=latent)) < 1e-5
            )
            assert report(patched).sparse_calls == report(alone).sparse_calls == 3


@pytest.mark.slow
def test_a_graph_of_another_size_that_is_older_than_the_node_is_found(monkeypatch):
    """Windows of two lengths: the first is compiled with the node, the last before it was there."""
    use(monkeypatch, "attention_pytorch")
    model = load_model("tiny_wan_smallest")
    around = compiled(model)

    def call(model, latent):
        return sample(model, steps=1, latent=latent)

    plain = call(around, (5, 15, 17))
    patched = sparse(around, sparsity=0.6)
    call(patched, (9, 16, 16))
    assert report(patched).sparse_calls == 1
    found = call(patched, (5, 15, 17))
    assert report(patched).sparse_calls == 1 and not torch.equal(found, plain)
    assert relative_error(found, call(sparse(model, sparsity=0.6), (5, 15, 17))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "neighbour",
    [
        "EasyCache",
        pytest.param("SkipLayerGuidanceDiT", marks=pytest.mark.slow("thorough")),
        pytest.param("a block replaced", marks=pytest.mark.slow("thorough")),
    ],
)
def test_a_node_that_skips_blocks_is_not_taken_for_an_old_graph(neighbour, monkeypatch):
    """Else every run would recompile, minutes on a real model, and run the skipping node twice."""
    use(monkeypatch, "attention_pytorch")
    model = load_model("tiny_wan_smallest" if neighbour == "EasyCache" else "tiny_wan21_t2v")
    if neighbour == "EasyCache":
        (skipping,) = comfy_host.run_node(
            "EasyCache",
            model=model,
            reuse_threshold=3.0,
            start_percent=0.1,
            end_percent=0.95,
            verbose=False,
        )
    elif neighbour == "SkipLayerGuidanceDiT":
        (skipping,) = comfy_host.run_node(
            "SkipLayerGuidanceDiT",
            model=model,
            double_layers="0",
            single_layers="",
            scale=3.0,
            start_percent=0.01,
            end_percent=0.9,
            rescaling_scale=0.0,
        )
    else:
        skipping = model.clone()
        skipping.set_model_patch_replace(
            lambda args, more: {"img": args["img"]}, "dit", "double_block", 0
        )
    resets, reset = [], torch.compiler.reset
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1) or reset())
    alone = sparse(skipping, sparsity=0.6)
    patched = sparse(compiled(skipping), sparsity=0.6)
    arguments = dict(steps=6, cfg=3.0, latent=(3, 16, 16))
    expected = sample(alone, **arguments)
    found = sample(patched, **arguments)
    # Which torch.compile nodes freeze by themselves, sparse or dense.
    if neighbour != "SkipLayerGuidanceDiT":
        assert relative_error(found, expected) < 1e-5
        assert report(patched).sparse_calls == report(alone).sparse_calls
    first = len(resets)
    sample(patched, **arguments)
    assert first <= 1 and len(resets) == first


@pytest.mark.slow
def test_control_blocks_are_told_apart_in_a_compiled_model(monkeypatch):
    use(monkeypatch, "attention_pytorch")
    variant = VARIANTS["Wan VACE"]
    model = variant.model()
    around = compiled(model)
    for adapter in (None, own_adapter("rola"), None):
        settings = dict(sparsity=0.6, adapter=adapter)
        patched, alone = sparse(around, **settings), sparse(model, **settings)
        found = variant.sample(patched, variant.even, 1.0)
        assert relative_error(found, variant.sample(alone, variant.even, 1.0)) < 1e-5
        assert report(patched).dense_calls == report(alone).dense_calls
