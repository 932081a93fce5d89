"""The tests of this folder run inside a real ComfyUI."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _comfyui():
    """ComfyUI's modules can be imported by every test here, whichever runs first."""
    import comfy_host

    comfy_host.boot()
