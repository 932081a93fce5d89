"""What a file is, in lines for a person: an adapter, a released checkpoint, or why it is neither."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import fields
from pathlib import Path

from .checkpoint import Checkpoint, open_checkpoint
from .files import is_adapter, read_adapter
from .info import Adapter

FAMILIES = {"rola": "RoLA (SparkWan)", "sla": "SLA (TurboWan)", "ropeslr": "RoPeSLR"}


def describe(path: str | os.PathLike) -> list[str]:
    """Lines about a file, after the same checks that loading it makes. Raises AdapterError as loading would."""
    path = Path(path)
    if path.suffix.lower() == ".safetensors" and is_adapter(path):
        return _about_adapter(read_adapter(path), path)
    return _about_checkpoint(open_checkpoint(path), path)


def _about_adapter(adapter: Adapter, path: Path) -> list[str]:
    lines = [f"{path.name}: an adapter of {FAMILIES[adapter.info.method]}, {_size(path)}"]
    lines += [
        f"  {each.name:13} {value}" for each in fields(adapter.info)
        if (value := getattr(adapter.info, each.name)) not in ("", ())
    ]
    return [*lines, *_about_weights(adapter)]


def _about_checkpoint(checkpoint: Checkpoint, path: Path) -> list[str]:
    adapter = checkpoint.adapter()
    info, numbers, kinds, patches = adapter.info, 0, Counter(), None
    for name, tensor in checkpoint.tensors():                                 # one by one: a model may be large
        numbers += tensor.numel()
        kinds[str(tensor.dtype).removeprefix("torch.")] += 1
        patches = tuple(tensor.shape) if name == "patch_embedding.weight" else patches
    return [
        f"{path.name}: a Wan checkpoint with weights of {FAMILIES[info.method]}, {_size(path)}",
        f"  model         {info.base_model}: {info.num_layers} layers, {info.num_heads} heads of {info.head_dim}, "
        f"{numbers / 1e9:.2f} billion numbers, {', '.join(f'{n} tensors {kind}' for kind, n in kinds.most_common())}",
        f"  patches       {patches} as ComfyUI has them",
        f"  trained at    sparsity {info.sparsity}, {info.block_order} order, blocks {info.block_q} x {info.block_k}",
        *([f"  rank          {info.rank}"] if info.rank else []),
        *_about_weights(adapter),
    ]


def _about_weights(adapter: Adapter) -> list[str]:
    names: dict[str, tuple] = {}
    for weights in adapter.layers.values():
        for name, tensor in weights.items():
            names.setdefault(name, (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")))
    lines = [f"  {name:13} {shape} {dtype} in each layer" for name, (shape, dtype) in names.items()]
    if adapter.sparse_only:
        lines.append("  The projection is zero: with these weights SLA computes the kept blocks and nothing else.")
    return lines


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:,.1f} MB"
