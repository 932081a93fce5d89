"""RoPeSLR Sparse Attention (Raylight): several workers make what one process makes.

The workers are processes on gloo, with a stand-in for Raylight; with Raylight, xfuser and yunchang
on the path, they run Raylight's own code.
"""

import importlib
import pickle
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
    "guided": (CAMERA, dict(sparsity=0.6), None),
    "first steps": (CAMERA, dict(method="adaspa", sparsity=0.6, dense_first_steps=1), None),
    "hunyuan": (HUNYUAN, dict(sparsity=0.6), None),
    "not finite": (CAMERA, dict(sparsity=0.6, allocation="uniform"), None),
    "guided not finite": (CAMERA, dict(sparsity=0.6, allocation="uniform"), None),
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
    del CASES["guided"], CASES["guided not finite"]  # its processes have one arrangement for good
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
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(get=waited.extend, put=bytes))

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
    for name in jobs:
        jobs[name]["guided"] = name.startswith("guided")
        if name.endswith("not finite"):
            jobs[name]["breaks"] = 1
    torch.save(jobs, tmp_path / "jobs.pt")
    processes.run(workers.__file__, 2, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for name, (variant, settings, kind) in CASES.items():
        variant = VARIANTS[variant]
        one = sparse(variant.model(), **settings, **weights(kind))
        expected = variant.sample(one, variant.odd, cfg=5.0)
        for part in parts:
            found, sparse_calls, dense_calls = part[name]
            if "breaks" in jobs[name]:  # a call of both is computed again, dense
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


def shared_by(size):
    """A share of one's own group as it is among more."""
    share = comfy_host.module(".attention.head_share").HeadShare
    return property(lambda self: share(0, size, lambda x: [x] * size))


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
@pytest.mark.parametrize("blocks", [0, 2])
def test_what_is_compiled_is_sparse_in_every_run_and_compiled_once(blocks, alone):
    expected, graphs = sample(alone()), []
    model = compiled(alone(), blocks=blocks)
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
    for name in ("xfuser", "xfuser.core", "xfuser.core.distributed"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoXfuser, *sys.meta_path])
    assert worker.find_peers() is None  # every worker by itself
    distributed = spread.stand_in_for_xfuser()
    core = types.SimpleNamespace(distributed=distributed)
    monkeypatch.setitem(sys.modules, "xfuser", types.SimpleNamespace(core=core))
    monkeypatch.setitem(sys.modules, "xfuser.core", core)
    assert worker.find_peers() is None
    monkeypatch.setattr(distributed, "get_classifier_free_guidance_world_size", lambda: 2)
    assert worker.find_peers() is not None
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


def test_methods_and_models_that_cannot_share_heads_are_refused_by_the_node(alone, monkeypatch):
    peers = comfy_host.module(".attention.parallel").Peers
    monkeypatch.setattr(peers, "share", shared_by(2))
    with pytest.raises(ValueError, match="vsa cannot share its heads"):
        alone(method="vsa")
    monkeypatch.setattr(peers, "share", shared_by(3))
    with pytest.raises(ValueError, match="2 heads cannot be shared by 3 processes"):
        alone()


def test_a_worker_holds_one_plan_and_none_when_switched_off(alone):
    worker = comfy_host.module(".nodes.raylight_worker")
    plan = comfy_host.module(".attention").SparsePlan
    model = load_model("tiny_wan21_t2v")
    plain = dict(model.wrappers)
    once = worker.patch(model, worker.Request(plan(), own_adapter("ropeslr"), "user"))
    twice = worker.patch(once, worker.Request(plan(), None, "user"))
    assert once.get_attachment("ropeslr") is None and not once.get_additional_models()
    assert importlib.import_module("folder_paths").get_user_directory() == "user"
    off = worker.patch(twice, worker.Request(plan(backend="dense"), None, "user"))
    assert off.get_attachment("ropeslr") is None and not any(off.wrappers.values()) and not plain


def test_a_model_that_fsdp_has_wrapped_is_known_by_its_own_class(alone, monkeypatch):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = alone()
    expected = sample(model)
    inner = model.model.diffusion_model
    for module in inner.modules():  # ComfyUI loads weights that FSDP cannot take as they are
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(weight.detach().clone(), requires_grad=False))
    fully_shard(inner, mesh=init_device_mesh("cpu", (1,)))
    assert type(inner).__name__ == "FSDPWanModel"
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # as Raylight samples
    assert torch.allclose(sample(model), expected, atol=1e-4)
    assert report(model).sparse_calls == 6


def sequence(**more):
    return comfy_host.module(".nodes.patching.token_layout").SequenceInfo((2, 3, 2), **more)


def test_where_the_tokens_of_the_whole_are():
    """Two processes: 12 tokens of video, and what stands beside them."""
    order = comfy_host.module(".nodes.patching.shared_model").whole_order
    assert order(sequence(), {}, (2, 6), False) == slice(12)
    assert order(sequence(), {"grid_sizes": (1, 3, 4)}, (2, 6), False) == slice(12)
    assert order(sequence(), {"grid_sizes": (1, 3, 3)}, (2, 5), False) == slice(9)
    assert order(sequence(reference=True), {}, (2, 9), False) == slice(18)
    # Nothing is cut off that is not known: the layout has to say so.
    assert order(sequence(), {}, (2, 7), False) == slice(14)
    assert order(sequence(after=True), {}, (2, 8), False) == slice(16)
    text = sequence(text_first=True)
    assert order(text, {"img_slice": [3, 8]}, (2, 8), False) == slice(15)
    double = order(text, {}, (2, 8), True)
    assert double.tolist() == [0, 1, 8, 9, *range(2, 8), *range(10, 16)]


def test_which_rows_are_ones_own_where_prompts_are_spread(monkeypatch):
    module = comfy_host.module(".nodes.patching.shared_model")
    facts = comfy_host.module(".nodes.patching.call").CallFacts
    guided = comfy_host.module(".attention.parallel").Peers(None, "guidance")
    for rank, (one, two) in enumerate([("a", ("a", 2)), ("b", ("b", 2))]):
        monkeypatch.setattr(module.dist, "get_rank", lambda group, own=rank: own)
        single = facts(1.0, (("a", 1), ("b", 1)))
        assert module.own_rows(single, 1, guided).conditioning == ((one, 1),)
        assert module.own_rows(single, 2, guided) is single
        double = facts(1.0, (("a", 2), ("b", 2)))
        assert module.own_rows(double, 2, guided).conditioning == (two,)


def test_what_a_worker_raises_is_said_once(ask, monkeypatch):
    reasons = comfy_host.module(".nodes.patching.dense_reason")
    error = reasons.SparseNotPossible("no tokens", "Add some.")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    wrapped = RuntimeError("a whole traceback")
    wrapped.cause = error

    def get(futures):
        raise wrapped

    monkeypatch.setattr(sys.modules["ray"], "get", get)
    with pytest.raises(reasons.SparseNotPossible, match="no tokens. Add some"):
        ask()
