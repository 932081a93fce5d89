"""Keeps this pack's device memory out of ComfyUI's memory compiler, where there is one."""

from __future__ import annotations

import contextlib

try:
    from comfy import model_prefetch
except ImportError:  # older than it
    model_prefetch = None


def unrecorded() -> contextlib.AbstractContextManager:
    """A context whose allocations may outlive the block of the model that they were made in.

    Newer ComfyUI records what every block allocates and expects it all to be free again at the
    block's end; what a run remembers from step to step is not.
    """
    pause = getattr(model_prefetch, "pause_malloc_graph", None)
    return contextlib.nullcontext() if pause is None else pause()
