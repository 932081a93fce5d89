"""RoPeSLR Sparse Attention (Raylight): several workers make what one process makes.

The workers are processes on gloo, with a stand-in for Raylight; with Raylight, xfuser and yunchang
on the path, they run Raylight's own code.
"""

import sys
import types

import pytest
import torch
import torch.distributed as dist

import comfy_host
from support import processes, spread, workers
from support.data.variants import VARIANTS
from support.host.compiling import compiled
from support.host.sampling import SETTINGS, load_model, own_adapter, report, sample, sparse

# name -> whose model, settings of the node, whose adapter; 189 tokens, two prompts in a batch
CAMERA, HUNYUAN = "Wan Fun Camera", "HunyuanVideo T2V"
CASES = {
    "ropeslr": (CAMERA, dict(sparsity=0.6, query_block="64"), None),
    "ropeslr with weights": (CAMERA, dict(sparsity=0.6), "ropeslr"),
    "rola": (CAMERA, dict(sparsity=0.6), "rola"),
    "dense": (CAMERA, dict(backend="dense"), None),
    "first steps": (CAMERA, dict(method="adaspa", sparsity=0.6, dense_first_steps=1), None),
    "hunyuan": (HUNYUAN, dict(sparsity=0.6), None),
    "not finite": (CAMERA, dict(sparsity=0.6, allocation="uniform"), None),
}
# Raylight 1.5.1 fails at the others by itself, or makes something else of them than ComfyUI.
ITS_OWN = (
    "Wan 2.1 T2V",
    "Wan 2.1 I2V",
    "Wan 2.2 T2V A14B",
    "Wan 2.2 I2V A14B",
    "Wan 2.2 TI2V 5B",
    "Wan FlowRVS",
    "Wan Fun Control with a reference",
    "Wan Phantom",
    "Wan with in-context references",
    "Wan VACE",
    "Wan VACE, two controls",
    "Wan Animate, without a face",
    "Wan SCAIL",
    "Wan SCAIL-2, animation",
    "HunyuanVideo I2V",
    "SkyReels I2V",
    "HunyuanVideo 1.5 T2V",
    "HunyuanVideo 1.5 upscaler",
)
if workers.raylight_is_here():
    CASES |= {name: (name, dict(sparsity=0.6), None) for name in ITS_OWN}


class Worker:
    """Remembers what Ray is told to run in it."""

    def __init__(self) -> None:
        self.model_function_runner = types.SimpleNamespace(remote=self.remember)
        self.jobs = []

    def remember(self, function, *arguments):
        self.jobs.append((workers.sent(function), *arguments))
        return "future"


@pytest.fixture
def ask(monkeypatch):
    """Settings of the node -> what every worker is sent."""
    comfy_host.pack()
    waited = []
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(get=waited.extend))

    def run(**settings):
        actors = {"workers": [Worker(), Worker()]}
        (out,) = comfy_host.run_node("RoPeSLRRaylight", ray_actors=actors, **settings)
        assert out is actors and waited == ["future"] * 2
        waited.clear()
        (one,), (other,) = (each.jobs for each in actors["workers"])
        assert one == other
        return one

    return run


def weights(kind):
    return {} if kind is None else dict(adapter=own_adapter(kind))


@pytest.mark.slow
def test_workers_make_what_one_process_makes(ask, tmp_path):
    """With padding, two prompts in a batch, weights by head, text in front; a NaN in one of two."""
    jobs = {}
    for name, (variant, settings, kind) in CASES.items():
        work, request = ask(**(SETTINGS | settings | weights(kind)))
        jobs[name] = dict(variant=variant, work=work, request=request)
    jobs["not finite"]["breaks"] = 1
    torch.save(jobs, tmp_path / "jobs.pt")
    processes.run(workers.__file__, 2, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for name, (variant, settings, kind) in CASES.items():
        variant = VARIANTS[variant]
        one = sparse(variant.model(), **settings, **weights(kind))
        expected = variant.sample(one, variant.odd, cfg=5.0, steps=3)
        for part in parts:
            found, sparse_calls, dense_calls = part[name]
            if name == "not finite":  # a call of both is computed again, dense
                assert torch.isfinite(found).all() and sparse_calls < report(one).sparse_calls
                assert any("not finite" in reason for reason in dense_calls)
                continue
            assert torch.allclose(found, expected, atol=1e-4), name
            assert sparse_calls == report(one).sparse_calls, name
            assert dense_calls == dict(report(one).dense_calls), name
        assert torch.equal(parts[0][name][0], parts[1][name][0]), name


@pytest.fixture
def alone(tmp_path):
    """A group of one process -> a MODEL that is spread over it, with the pack's patch."""
    comfy_host.pack()
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )

    def make(**settings):
        model = load_model("tiny_wan21_t2v")
        spread.spread(model.model.diffusion_model)
        patching, plans = comfy_host.module(".nodes.patching"), comfy_host.module(".attention")
        peers = comfy_host.module(".attention.parallel").Peers()
        plan = plans.SparsePlan(**(SETTINGS | dict(sparsity=0.6) | settings))
        return patching.install(model, plan, None, None, peers)

    yield make
    dist.destroy_process_group()


def test_a_model_call_leaves_nothing_in_the_place_of_raylights_attention(alone, monkeypatch):
    before = spread.xfuser_optimized_attention
    model = alone()
    sample(model)
    assert report(model).sparse_calls == 6 and spread.xfuser_optimized_attention is before

    def fails(*_):
        raise ValueError("out of luck")

    module = comfy_host.module(".attention.run")
    monkeypatch.setattr(module.AttentionRun, "attend", fails)
    with pytest.raises(ValueError, match="out of luck"):  # one process alone cannot go on dense
        sample(model)
    assert spread.xfuser_optimized_attention is before


@pytest.mark.slow
def test_compiled_layers_are_sparse_in_every_run_and_compiled_once(alone):
    expected, graphs = sample(alone()), []
    model = compiled(alone(), blocks=2)
    for _ in range(2):
        assert torch.allclose(sample(model), expected, atol=1e-4)
        assert report(model).sparse_calls == 6
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


@pytest.mark.parametrize("strict", [False, True])
def test_a_raylight_that_is_not_known_runs_dense_and_says_so(alone, strict, monkeypatch):
    module = comfy_host.module(".nodes.patching.shared_model")
    monkeypatch.setattr(module, "ATTENTION", "another_name")
    model = alone(strict=strict)
    if strict:
        with pytest.raises(RuntimeError, match="a way of Raylight's own"):
            sample(model)
        return
    found = sample(model)
    last = report(model)
    assert last.sparse_calls == 0 and "a way of Raylight's own" in str(last.dense_calls)
    assert torch.allclose(found, sample(load_model("tiny_wan21_t2v")), atol=1e-4)


def test_what_workers_cannot_do_is_refused_in_words(alone, monkeypatch):
    worker = comfy_host.module(".nodes.raylight_worker")
    with pytest.raises(ValueError, match="hold no model yet"):
        worker.patch(None, None)
    with pytest.raises(ValueError, match="vsa cannot share its heads"):
        sample(alone(method="vsa"))
    for name in ("xfuser", "xfuser.core", "xfuser.core.distributed"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoXfuser, *sys.meta_path])
    assert worker.find_peers() is None  # every worker by itself
    distributed = spread.stand_in_for_xfuser()
    core = types.SimpleNamespace(distributed=distributed)
    monkeypatch.setitem(sys.modules, "xfuser", types.SimpleNamespace(core=core))
    monkeypatch.setitem(sys.modules, "xfuser.core", core)
    assert worker.find_peers().guidance is None
    for name, words in (("ring", "ring_degree is 2"), ("pipeline", "PipeFusion")):
        monkeypatch.setattr(distributed, f"get_{name}_parallel_world_size", lambda: 2)
        with pytest.raises(ValueError, match=words):
            worker.find_peers()
        monkeypatch.setattr(distributed, f"get_{name}_parallel_world_size", lambda: 1)
    monkeypatch.setattr(distributed, "model_parallel_is_initialized", lambda: False)
    assert worker.find_peers() is None


class NoXfuser:
    """An importer that knows of no xfuser, whatever the machine has."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "xfuser":
            raise ModuleNotFoundError(name)


def test_the_node_says_what_is_missing(ask, monkeypatch):
    with pytest.raises(ValueError, match="sparsity"):  # before any worker is asked
        ask(sparsity=2.0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeError, match="Ray is not installed"):
        ask()
