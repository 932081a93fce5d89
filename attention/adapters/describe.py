"""What a file is, in lines for a person: an adapter, a released checkpoint, or neither and why."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from .adapter import Adapter
from .checkpoint import SAFETENSORS, Checkpoint, open_checkpoint
from .files import is_adapter, read_adapter
from .tensor_file import file_name
from .text import shown

FAMILIES = {"rola": "RoLA (SparkWan)", "sla": "SLA (TurboWan)", "ropeslr": "RoPeSLR"}
SPARSE_ONLY = "  The projection is zero: with these weights SLA computes only the kept blocks."


def describe(path: str | os.PathLike[str]) -> list[str]:
    """Lines about a file, after the checks that loading it makes. Raises AdapterError as loading.

    >>> describe("file.safetensors")[0]
    'file.safetensors: an adapter of RoLA (SparkWan), 2.2 MB'
    """
    path = Path(path)
    if path.suffix.lower() in SAFETENSORS and is_adapter(path):
        return _about_adapter(read_adapter(path), path)
    return _about_checkpoint(open_checkpoint(path), path)


def _about_adapter(adapter: Adapter, path: Path) -> list[str]:
    family = FAMILIES[adapter.info.method]
    lines = [f"{file_name(path)}: an adapter of {family}, {_size(path)}"]
    for field in fields(adapter.info):
        value = getattr(adapter.info, field.name)
        if value not in ("", ()):
            lines.append(f"  {field.name:13} {shown(value)}")
    return lines + _about_weights(adapter)


def _about_checkpoint(checkpoint: Checkpoint, path: Path) -> list[str]:
    adapter = checkpoint.adapter()
    info = adapter.info
    numbers, dtypes, patches = 0, Counter[str](), ()
    # One by one: a model may be larger than the memory.
    for name, tensor in checkpoint.tensors():
        numbers += tensor.numel()
        dtypes[_dtype(tensor)] += 1
        if name == "patch_embedding.weight":
            patches = tuple(tensor.shape)
    kinds = ", ".join(f"{count} tensors {dtype}" for dtype, count in dtypes.most_common())
    family = FAMILIES[info.method]
    lines = [
        f"{file_name(path)}: a Wan checkpoint with weights of {family}, {_size(path)}",
        f"  model         {info.base_model}: {info.num_layers} layers, {info.num_heads} heads of "
        f"{info.head_dim}, {numbers / 1e9:.2f} billion numbers, {kinds}",
        f"  patches       {patches} in ComfyUI's layout",
        f"  trained at    sparsity {info.sparsity}, {info.block_order} order, "
        f"blocks {info.block_q} x {info.block_k}",
    ]
    if info.rank:
        lines.append(f"  rank          {info.rank}")
    return lines + _about_weights(adapter)


def _about_weights(adapter: Adapter) -> list[str]:
    first: dict[str, Tensor] = {}
    for weights in adapter.layers.values():
        first = {**weights, **first}
    lines = [
        f"  {name:13} {tuple(tensor.shape)} {_dtype(tensor)} in each layer"
        for name, tensor in first.items()
    ]
    if adapter.sparse_only:
        lines.append(SPARSE_ONLY)
    return lines


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:,.1f} MB"
