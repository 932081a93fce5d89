"""Counts the passes over whole tensors that an attention call makes on its way."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import comfy_host


class WholePasses(TorchDispatchMode):
    """Operations whose result is as large as all of q, by name; views and empty memory are none."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name, changes = function._schema.name, function._schema.is_mutable
        inputs = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in (each for each in tree_leaves(out) if isinstance(each, torch.Tensor)):
            writes = changes or _memory(x) not in inputs
            if x.numel() >= self.size and writes and "empty" not in name:
                self.found[name.removeprefix("aten::")] += 1
        return out


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def count_passes(monkeypatch) -> list[Counter[str]]:
    """From now on, the passes of every self-attention call that reaches the override."""
    module = comfy_host.module(".nodes.patching.apply_model")
    override, counted = module.sparse_override, []

    def watched(func, q, k, v, heads, *args, **kwargs):
        if q.shape[-2] != k.shape[-2] or q.shape[-2] < 256:  # cross-attention, text alone
            return override(func, q, k, v, heads, *args, **kwargs)
        with WholePasses(int(0.9 * q.numel())) as passes:
            out = override(func, q, k, v, heads, *args, **kwargs)
        counted.append(passes.found)
        return out

    monkeypatch.setattr(module, "sparse_override", watched)
    return counted
