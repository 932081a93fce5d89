"""A real ComfyUI server on the CPU and a real browser, both renderers; else skipped."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def server():
    import browser
    import comfy_host
    from comfy_server import ComfyServer
    from support.data import tiny_files

    if browser.find_chromium() is None:
        pytest.skip("no Chromium or Chrome was found; `python dev.py browser` says how to get one")
    base = Path(os.environ["ROPESLR_TEST_BASE"]) / "browser"
    comfy_host.boot()
    tiny_files.make(base)
    browser.placeholders(base)
    with ComfyServer(Path(os.environ["COMFYUI_PATH"]), base) as running:
        yield running


@pytest.fixture(scope="session")
def shipped(server):
    """Loads a shipped workflow by its name; skips where an older ComfyUI lacks a node of it."""
    import comfyui_version

    import graph_file
    from workflow import load

    known = {graph_file.NOTE, *server.get("/object_info")}

    def of_name(name):
        workflow = load(name)
        unknown = {node["type"] for node in workflow["nodes"]} - known
        if unknown and comfyui_version.__version__ != graph_file.CORE:
            pytest.skip(
                f"ComfyUI {comfyui_version.__version__} has no {', '.join(sorted(unknown))}"
            )
        return workflow

    return of_name


@pytest.fixture(scope="session", params=["classic", "vue"])
def page(request, server):
    """ComfyUI in a browser window; opened once for all tests, since that takes longest."""
    import browser

    with browser.window(server.url) as window:
        window.open(vue=request.param == "vue")
        window.renderer = request.param
        yield window


@pytest.fixture
def shown(page):
    """The window; a test that uses it fails when anything went wrong in the page."""
    page.errors.clear()
    page.close_dialogs()
    yield page
    assert not page.errors
