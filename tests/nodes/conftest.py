"""The tests of this folder run inside a real ComfyUI."""

import importlib

import pytest


@pytest.fixture(scope="session", autouse=True)
def _comfyui():
    """ComfyUI's modules can be imported by every test here, whichever runs first."""
    import comfy_host

    comfy_host.boot()


@pytest.fixture
def adapter_folder(tmp_path, monkeypatch):
    """models/ropeslr, empty and in a place of its own."""
    import comfy_host

    comfy_host.pack()
    paths = importlib.import_module("folder_paths")
    folder = tmp_path / "models" / "ropeslr"
    folder.mkdir(parents=True)
    monkeypatch.setitem(paths.folder_names_and_paths, "ropeslr", ([str(folder)], {".safetensors"}))
    monkeypatch.setattr(paths, "filename_list_cache", {})
    return folder
