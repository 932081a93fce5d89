"""The tests of this folder run inside a real ComfyUI; without one they say how to get it."""

import os

import pytest

if "COMFYUI_PATH" not in os.environ:
    pytest.exit("tests/nodes needs a ComfyUI: run `python dev.py test tests/nodes`", returncode=2)
