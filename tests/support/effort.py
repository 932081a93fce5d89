"""How much is tried: a cross-section by default, everything with `python dev.py test --thorough`."""

from __future__ import annotations

import os

import pytest

THOROUGH = bool(os.environ.get("ROPESLR_THOROUGH"))
thorough = pytest.mark.skipif(not THOROUGH, reason="python dev.py test --thorough tries this too")
