"""ComfyUI's MultiGPU CFG Split on two made-up devices: threads, models and options are its own.

A tensor on "cpu:1" says that it is on "cpu", so each thread is told here which device is its own.
"""

import gc
import threading

import pytest
import torch

import comfy_host
from support.host.sampling import load_model, own_adapter, report, sample, sparse


@pytest.fixture
def split(monkeypatch):
    """A MODEL -> the same for two devices."""
    nodes = comfy_host.boot().NODE_CLASS_MAPPINGS
    if "MultiGPU_WorkUnits" not in nodes:
        pytest.skip("this ComfyUI has no MultiGPU CFG Split")
    comfy_host.pack()
    import comfy.model_management as management

    devices = [torch.device("cpu"), torch.device("cpu", 1)]
    monkeypatch.setattr(management, "get_all_torch_devices", lambda **_: devices)
    own = {}
    monkeypatch.setattr(
        management, "set_torch_device", lambda device: own.update({threading.get_ident(): device})
    )
    run = comfy_host.module(".nodes.patching.sampling_run").SamplingRun
    attention_on = run.attention_on

    def on_own(self, device):
        return attention_on(self, own.get(threading.get_ident(), device))

    monkeypatch.setattr(run, "attention_on", on_own)
    runs = []
    end = run.drop_hooks
    monkeypatch.setattr(run, "drop_hooks", lambda self: (runs.append(self), end(self))[1])

    def make(model):
        # ComfyUI's split models are held by a cycle, and its node fails on one half collected.
        gc.collect()
        (found,) = comfy_host.run_node("MultiGPU_WorkUnits", model=model, max_gpus=2)
        assert len(found.get_additional_models_with_key("multigpu")) == 1
        return found

    make.runs = runs
    return make


@pytest.mark.parametrize("order", ["split first", "node first"])
@pytest.mark.parametrize(
    "settings, adapter",
    [
        (dict(), None),
        (dict(allocation="uniform"), None),
        (dict(), "rola"),
    ],
)
def test_two_devices_make_what_one_makes(settings, adapter, order, split):
    """Positive and negative apart, each with calibration and allocation of its own; adapters too."""
    weights = {} if adapter is None else dict(adapter=own_adapter(adapter))
    settings = dict(sparsity=0.6, query_block="64") | settings | weights
    model = load_model("tiny_wan21_t2v")
    one = sparse(model, **settings)
    expected = sample(one, cfg=5.0)
    if order == "node first":
        two = split(sparse(model, **settings))
    else:
        two = sparse(split(model), **settings)
    split.runs.clear()
    found = sample(two, cfg=5.0)
    assert torch.allclose(found, expected, atol=1e-4)
    (run,) = split.runs
    assert {str(device) for device in run._attentions} == {"cpu", "cpu:1"}
    both = report(two)
    assert both.sparse_calls == 2 * report(one).sparse_calls  # not batched any more
    if adapter is None:
        calibrated = [each.method.lessons for each in run._attentions.values()]
        assert all(calibrated) or settings["allocation"] == "uniform"
