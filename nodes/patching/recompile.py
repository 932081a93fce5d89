"""Recompiles a model that was compiled without the node: its graphs never call the override.

torch.compile nodes drop the guards on transformer_options: a graph, of the whole model or of one
block, that was made without this node is used again and never calls the override. Layers that other
nodes skip do not either; so a shape that once was complete is believed, and layers that stay silent
when compiled anew are known from then on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from .model_info import blocks, unwrap

logger = logging.getLogger(__name__)

Layers = frozenset[Hashable]


class Recompiler:
    """Of one sampling run; drops the graphs at most once."""

    def __init__(self, known_missing: set[Layers]) -> None:
        self.known_missing = known_missing  # of the patched model, over all of its runs
        self._complete: set[torch.Size] = set()  # latents of which some call heard every layer
        self._done = False
        self._lock = threading.Lock()

    def needed(self, shape: torch.Size, missing: Layers) -> bool:
        """Whether a compiled model is to be run again; the first time its graphs are dropped."""
        if not missing:
            self._complete.add(shape)
        if not missing or shape in self._complete or missing in self.known_missing:
            return False
        with self._lock:
            if not self._done:  # what is compiled from now on calls the override
                self._done = True
                logger.info("RoPeSLR: the model was compiled without this node; compiling it again")
                torch.compiler.reset()
        return True

    def settle(self, missing: Layers) -> None:
        """Layers silent in a graph made with the override stay silent in this model."""
        if missing:
            self.known_missing.add(missing)


def is_compiled(base_model: Any, options: Mapping[str, Any]) -> bool:
    """Whether any of a model runs in torch.compile's graphs."""
    module = base_model.diffusion_model
    wrappers = options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    if unwrap(module) is not module or "torch.compile" in wrappers:
        return True
    return any(unwrap(block) is not block for block in blocks(module))
