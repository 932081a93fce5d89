"""The tests of this folder run inside a real ComfyUI; without one they say how to get it."""

import os

import pytest

if "COMFYUI_PATH" not in os.environ:
    pytest.exit("tests/nodes needs a ComfyUI: run `python dev.py test tests/nodes`", returncode=2)


@pytest.fixture(scope="session", autouse=True)
def _comfyui():
    """ComfyUI's modules can be imported by every test here, whichever runs first."""
    import comfy_host

    comfy_host.boot()
