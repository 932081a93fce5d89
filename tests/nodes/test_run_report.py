"""What a run reports besides its counts: a map of layers and steps, and time; all fit for JSON."""

import json
from dataclasses import asdict

import pytest
import torch

import comfy_host
from support.data.variants import VARIANTS
from support.host.sampling import load_model, report, sample, sparse, two_experts


def test_the_map_tells_layers_and_steps_apart():
    patched = sparse(
        load_model("tiny_wan21_t2v"), sparsity=0.6, dense_first_steps=1, dense_layers="1"
    )
    sample(patched, cfg=5.0)
    last = report(patched)
    cell = pytest.approx(last.density, abs=1e-4)
    assert last.map == {
        "layers": 2,
        "steps": [0, 1, 2],
        "density": [[1.0, 1.0], [cell, 1.0], [cell, 1.0]],
    }
    assert 0.2 < last.density < 0.5
    assert last.tokens == 576
    assert json.loads(json.dumps(asdict(last)))["map"]["density"][1][1] == 1.0


def test_steps_are_those_of_the_sampler():
    """Two experts share one schedule, of which each runs a part and reports it."""
    high, low = two_experts(2, high=dict(sparsity=0.6), low=dict(sparsity=0.6, dense_first_steps=3))
    assert high.map["steps"] == [0, 1] and low.map["steps"] == [0, 1, 2, 3]
    assert low.map["density"][0] == [1.0, 1.0] and low.map["density"][1][0] < 1


def test_layers_that_never_asked_are_not_in_the_map():
    model = load_model("tiny_wan21_t2v")
    attention = model.model.diffusion_model.blocks[0].self_attn
    patched = sparse(model, sparsity=0.6)
    patched.add_object_patch(
        "diffusion_model.blocks.0.self_attn.forward", lambda x, *_, **__: attention.o(x)
    )
    sample(patched, steps=1)
    assert report(patched).map["density"] == [
        [None, pytest.approx(report(patched).density, abs=1e-4)]
    ]
    sample(model, steps=1)  # puts the module's own forward back


def test_time_is_told_for_sparse_and_dense_calls_apart():
    patched = sparse(load_model("tiny_wan21_t2v"), sparsity=0.6, dense_first_steps=1)
    sample(patched)
    spent = report(patched).attention_seconds
    assert (
        spent["sparse"] > 0 and spent["dense"] > 0 and sum(spent.values()) < report(patched).seconds
    )


def test_a_run_without_attention_of_its_own_has_neither():
    variant = VARIANTS["HunyuanImage 2.1"]
    patched = sparse(variant.model())
    variant.sample(patched, variant.even, 1.0)
    assert report(patched).map is None and report(patched).attention_seconds is None


def test_an_event_clock_waits_for_the_device_only_at_the_end(monkeypatch):
    """With stand-ins for CUDA's events: recorded around each call, read once."""
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            said.append("record")

        def synchronize(self):
            said.append("wait")

        def elapsed_time(self, end):
            return 250.0

    clock = comfy_host.module(".nodes.patching.timing").AttentionTiming()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    for kind in ("dense", "sparse", "sparse"):
        with clock.measure(kind, torch.device("cuda")):
            assert said[-1] == "record"
    with pytest.raises(ArithmeticError), clock.measure("sparse", torch.device("cuda")):
        raise ArithmeticError
    assert said.count("record") == 7 and "wait" not in said
    spans = clock.spans()
    assert {kind: sum(each) for kind, each in spans.items()} == {"sparse": 0.5, "dense": 0.25}
    assert said.count("wait") == 3
