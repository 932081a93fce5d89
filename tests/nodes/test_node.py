"""The node's face: schema, validation before a run, the summary, the event."""

import asyncio
import inspect
import logging

import pytest

import comfy_host
from support.host.sampling import SETTINGS, load_model, report, sample, sparse

NODE = "RoPeSLRSparseAttention"


def schema():
    comfy_host.pack()
    return comfy_host.boot().NODE_CLASS_MAPPINGS[NODE].GET_SCHEMA()


def test_every_input_has_a_tooltip():
    """Their order, which saved workflows rely on, is frozen in test_schemas.py."""
    assert all(each.tooltip for each in schema().inputs)
    assert schema().node_id == NODE


def test_every_option_of_the_plan_is_an_input_and_the_defaults_agree():
    plan = comfy_host.module(".attention").SparsePlan
    fields = {name: field.default for name, field in plan.__dataclass_fields__.items()}
    inputs = {each.id: each for each in schema().inputs}
    assert set(fields) == set(inputs) - {"model", "adapter"}
    different = {name for name in fields if getattr(inputs[name], "default", None) != fields[name]}
    assert different == {"dense_layers"}  # the plan holds numbers, the node text


def prompt(**inputs):
    comfy_host.pack()
    defaults = comfy_host.widget_defaults(NODE) | SETTINGS | inputs
    return {
        "1": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": "tiny_wan21_t2v.safetensors", "weight_dtype": "default"},
        },
        "2": {"class_type": NODE, "inputs": {"model": ["1", 0], **defaults}},
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["2", 0],
                "seed": 1,
                "steps": 2,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "positive": ["4", 0],
                "negative": ["4", 0],
                "latent_image": ["5", 0],
                "denoise": 1.0,
            },
        },
        "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["6", 0]}},
        "5": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": 128, "height": 128, "length": 17, "batch_size": 1},
        },
        "6": {
            "class_type": "CLIPLoader",
            "inputs": {"clip_name": "tiny_clip_l.pt", "type": "wan", "device": "default"},
        },
        "7": {
            "class_type": "SaveLatent",
            "inputs": {"samples": ["3", 0], "filename_prefix": "test"},
        },
    }


def validate(**inputs):
    """ComfyUI's own validation: -> (accepted, everything it says)."""
    import os
    from pathlib import Path

    import execution

    import tiny_models

    comfy_host.pack()
    models = Path(os.environ["ROPESLR_TEST_BASE"]) / "models"
    tiny_models.make(
        models, ["diffusion_models/tiny_wan21_t2v.safetensors", "text_encoders/tiny_clip_l.pt"]
    )
    accepted, _, _, node_errors = asyncio.run(
        execution.validate_prompt("id", prompt(**inputs), None)
    )
    said = [
        f"{each['message']} {each['details']}"
        for node in node_errors.values()
        for each in node["errors"]
    ]
    return accepted, " ".join(said)


def test_a_good_prompt_is_accepted():
    accepted, said = validate()
    assert accepted, said


@pytest.mark.parametrize(
    "inputs, says",
    [
        (dict(method="magic"), ["magic", "ropeslr", "top-k"]),
        (dict(sparsity=1.5), ["1.5", "0.98", "sparsity"]),
        (dict(sparsity=-0.1), ["-0.1", "sparsity"]),
        (dict(dense_layers="0,x,9-"), ["dense_layers", "'x'", "'9-'", "0, 1, 38-39"]),
        (dict(start_percent=1.5), ["1.5", "1.0", "start_percent"]),
        (dict(rank=300), ["300", "128", "rank"]),
        (dict(backend="cuda"), ["cuda", "pytorch"]),
        (dict(min_tokens="many"), ["many", "min_tokens"]),
    ],
)
def test_bad_input_is_refused_before_the_run_with_found_and_expected(inputs, says):
    accepted, said = validate(**inputs)
    assert not accepted
    assert all(piece in said for piece in says), said


@pytest.mark.parametrize(
    "inputs, says",
    [
        (dict(method="magic"), "method is 'magic'; it must be one of"),
        (dict(sparsity=1.5), "sparsity is 1.5; it must be from 0.0 to 0.98"),
        (dict(dense_layers="0,x,9-"), "'x', '9-' cannot be read"),
        (dict(start_percent=1.5), "start_percent is 1.5; it must be from 0.0 to 1.0"),
    ],
)
def test_the_node_itself_refuses_what_validation_did_not_see(inputs, says):
    """Linked inputs and direct calls come past the prompt's validation."""
    with pytest.raises(ValueError, match=says):
        sparse(load_model("tiny_wan21_t2v"), **inputs)


def test_one_summary_line_after_each_run(caplog):
    patched = sparse(load_model("tiny_wan21_t2v"), dense_first_steps=1)
    with caplog.at_level(logging.INFO):
        sample(patched)
    (line,) = [
        record.message
        for record in caplog.records
        if "self-attention calls sparse" in record.message
    ]
    for piece in (
        "RoPeSLR ropeslr on WanModel: 4 of 6 self-attention calls sparse",
        "density 0.083",
        "by head",
        "cube order",
        "4 calibrated",
        "attention FLOPs saved",
        "dense: 2 (dense first steps)",
    ):
        assert piece in line
    assert line == report(patched).summary()


def test_the_report_adds_up():
    alike = dict(allocation="uniform", key_block="64")
    patched = sparse(load_model("tiny_wan21_t2v"), method="top-k plain", dense_layers="0", **alike)
    sample(patched)
    found = report(patched)
    tokens = 576
    assert found.sparse_calls == 3 and found.dense_calls == {"dense layers": 3}
    assert found.other_calls == {"cross-attention": 6} and found.model_calls == 3
    assert found.dense_tflop == pytest.approx(6 * 4 * tokens**2 * 256 / 1e12)
    assert 1 - found.flops_saved == pytest.approx((1 + found.density) / 2, rel=0.05)
    assert found.completed and found.seconds > 0


def test_the_report_is_sent_to_the_browser_that_queued_the_run(monkeypatch):
    import server

    sent = []

    class Instance:
        client_id = "browser"

        @staticmethod
        def send_sync(*message):
            sent.append(message)

    monkeypatch.setattr(server.PromptServer, "instance", Instance, raising=False)
    patching = comfy_host.module(".nodes.patching")
    plan = comfy_host.module(".attention").SparsePlan(min_tokens=64, dense_first_steps=0)
    patched = patching.install(load_model("tiny_wan21_t2v"), plan, node_id="12:7")
    sample(patched)
    ((event, detail, client),) = sent
    assert event == "ropeslr.report" and client == "browser" and detail["node"] == "12:7"
    assert detail["sparse_calls"] == 6 and detail["summary"] == report(patched).summary()


def test_a_report_of_a_prompt_that_no_browser_queued_goes_to_nobody(monkeypatch):
    """A script's prompt has no client; sent to None, its report went to every browser."""
    import server

    sent = []

    class Instance:
        client_id = None

        @staticmethod
        def send_sync(*message):
            sent.append(message)

    monkeypatch.setattr(server.PromptServer, "instance", Instance, raising=False)
    plan = comfy_host.module(".attention").SparsePlan(min_tokens=64, dense_first_steps=0)
    patched = comfy_host.module(".nodes.patching").install(
        load_model("tiny_wan21_t2v"), plan, node_id="1"
    )
    sample(patched)
    assert not sent and report(patched).sparse_calls == 6


def test_a_browser_that_is_gone_does_not_end_the_run(monkeypatch):
    import server

    class Instance:
        client_id = "browser"

        @staticmethod
        def send_sync(*message):
            raise ConnectionError

    monkeypatch.setattr(server.PromptServer, "instance", Instance, raising=False)
    plan = comfy_host.module(".attention").SparsePlan(min_tokens=64, dense_first_steps=0)
    patched = comfy_host.module(".nodes.patching").install(
        load_model("tiny_wan21_t2v"), plan, node_id="1"
    )
    assert sample(patched) is not None and report(patched).completed


def test_a_failing_import_is_logged_with_its_traceback(monkeypatch, caplog):
    """ComfyUI shows one line without a traceback; a person needs something to send us."""
    import sys

    pack = comfy_host.pack()
    monkeypatch.setitem(sys.modules, f"{pack.__name__}.nodes.extension", None)
    with pytest.raises(ImportError):
        asyncio.run(pack.comfy_entrypoint())
    (record,) = [each for each in caplog.records if "could not be loaded" in each.message]
    assert record.exc_info is not None
    assert inspect.iscoroutinefunction(pack.comfy_entrypoint) and not hasattr(
        pack, "NODE_CLASS_MAPPINGS"
    )
