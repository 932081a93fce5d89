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
