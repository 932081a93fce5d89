"""ComfyUIs that the pack does not support: one sentence with both versions, no bare error."""

import asyncio
import re
from pathlib import Path

import pytest
import tomllib

import comfy_host
from support.host.sampling import load_model, report, sample, sparse

host = comfy_host.module(".nodes.host")


def test_a_host_without_what_the_schemas_use_is_told_what_is_needed(monkeypatch, caplog):
    """As ComfyUI 0.3.64, whose inputs know no `advanced`: the error came after loading, bare."""
    from comfy_api.latest import io

    def older(self, name, **kwargs):
        raise TypeError("Combo.Input.__init__() got an unexpected keyword argument 'advanced'")

    monkeypatch.setattr(io.Combo.Input, "__init__", older)
    monkeypatch.setattr(host, "comfyui_version", lambda: "0.3.64")
    with pytest.raises(TypeError):
        asyncio.run(comfy_host.pack().comfy_entrypoint())
    (record,) = [each for each in caplog.records if "could not be loaded" in each.message]
    assert "needs ComfyUI 0.18.2 or newer; this is 0.3.64" in record.message and record.exc_info


def test_the_version_that_is_needed_is_the_packages_own():
    text = (Path(comfy_host.ROOT) / "pyproject.toml").read_text(encoding="utf-8")
    assert tomllib.loads(text)["tool"]["comfy"]["requires-comfyui"] == f">={host.OLDEST}"
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", host.comfyui_version())


def test_a_fork_that_names_the_activations_dtype_otherwise_works():
    """Without the fallback every prompt ended with "'WAN21' object has no attribute ..."."""
    model = load_model("tiny_wan21_t2v")
    patch = comfy_host.module(".nodes.patching.install")

    class Fork:
        def __init__(self, base):
            self.get_dtype = base.get_dtype

    assert patch.inference_dtype(Fork(model.model)) == patch.inference_dtype(model.model)
    patched = sparse(model)
    sample(patched, steps=1)
    assert report(patched).sparse_calls == 2
