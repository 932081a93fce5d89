"""Released checkpoints: a whole Wan model together with the weights of its sparse attention.

Recognised by keys: RoLA (SparkWan*) by `self_attn.proj_q.weight`, SLA (TurboWan*) by
`self_attn.attn_op.local_attn.proj_l.weight`, both perhaps after a prefix such as `net.`. Weights
are mapped into memory and nothing in a file is ever executed.

Two things differ from ComfyUI's layout. The patch embedding is a linear layer, `(dim, channels *
4)`; ComfyUI's has the same numbers as a convolution. Linear layers of the "-quant" files are int8,
with a factor for each 128 x 128 of them. Source: thu-ml/TurboDiffusion, SparkDiffusion.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .adapter import SUFFIXES, Adapter, group_by_layer
from .atomic import separate_storage, write_safetensors
from .files import write_adapter
from .info import AdapterError, AdapterInfo
from .pickle_file import open_pickle
from .tensor_file import file_name, naming, open_safetensors
from .text import shown
from .validate import count_not_finite, validate, validate_shapes
from .wan_keys import INT8_SCALE, INT8_WEIGHT, base_model, check_complete, count_layers, find_prefix

# Called with (tensors done, tensors in all).
Progress = Callable[[int, int], None]

SAFETENSORS = (".safetensors", ".sft")
MARKS: Mapping[str, str] = {
    "rola": ".self_attn.proj_q.weight",
    "sla": ".self_attn.attn_op.local_attn.proj_l.weight",
}
INT8_BLOCK = 128
# Larger tensors are not searched for NaN: that would read the whole file at every start.
MAX_SEARCHED = 1 << 20
# The sparsity in a file's name or header.
_TRAINED_AT = re.compile(r"(?<![\d.])0\.[5-9]\d?(?!\d)", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """An opened file: shapes by name, without prefix, and a function that reads one tensor."""

    path: Path
    method: str
    shapes: Mapping[str, tuple[int, ...]]
    header: Mapping[str, str]
    read: Callable[[str], Tensor]

    def adapter(self) -> Adapter:
        """The weights of the sparse attention; AdapterError unless complete and finite."""
        with naming(self.path):
            info = self._info()
            sparse = {name: name for name in self.shapes if self._is_sparse(name)}
            grouped = group_by_layer(self.method, sparse)
            shapes = {
                layer: {short: self.shapes[name] for short, name in names.items()}
                for layer, names in grouped.items()
            }
            validate_shapes(info, shapes)
            layers = {
                layer: {short: self.read(name).clone() for short, name in names.items()}
                for layer, names in grouped.items()
            }
            validate(info, layers)
        return Adapter(info, layers, file_name(self.path))

    def backbone(self, progress: Progress | None = None) -> dict[str, Tensor]:
        """Everything else, checked, in ComfyUI's layout; mapped to the file where possible.

        Raises AdapterError where a tensor cannot be used.
        """
        return dict(self.tensors(progress))

    def tensors(self, progress: Progress | None = None) -> Iterator[tuple[str, Tensor]]:
        """What `backbone` holds, one by one."""
        names = [name for name in self.shapes if not self._is_sparse(name)]
        for done, name in enumerate(names, start=1):
            with naming(self.path):
                found = self._comfy_tensor(name)
            if progress is not None:
                progress(done, len(names))
            if found is not None:
                yield found

    def _comfy_tensor(self, name: str) -> tuple[str, Tensor] | None:
        """A tensor under ComfyUI's name; None for the factors of another one."""
        if name.endswith(INT8_WEIGHT):
            base = name.removesuffix(INT8_WEIGHT)
            scale = self.read(base + INT8_SCALE)
            return f"{base}.weight", _dequantized(base, self.read(name), scale)
        if name.endswith(INT8_SCALE) and name.removesuffix(INT8_SCALE) + INT8_WEIGHT in self.shapes:
            return None
        return name, _comfy_layout(name, self.read(name))

    def _is_sparse(self, name: str) -> bool:
        return any(f".self_attn.{suffix}" in name for suffix in SUFFIXES[self.method])

    def _info(self) -> AdapterInfo:
        dim = self.shapes["patch_embedding.bias"][0]
        name = "blocks.0" + MARKS[self.method]
        shape = self.shapes.get(name)
        if shape is None or len(shape) != 2:
            found = "is missing" if shape is None else f"has the shape {shown(shape)}"
            raise AdapterError(f"{name} {found}; expected a matrix")
        rank, head_dim = (shape[0] if self.method == "rola" else 0), shape[1]
        if not head_dim or dim % head_dim:
            raise AdapterError(
                f"{name} has the shape {shown(shape)}; expected a second side that divides the "
                f"model's width, {dim}"
            )
        trained = _TRAINED_AT.search(self.header.get("sparsity", "") or self.path.name)
        return AdapterInfo(
            method=self.method,
            num_layers=count_layers(self.shapes),
            num_heads=dim // head_dim,
            head_dim=head_dim,
            rank=rank,
            base_model=base_model(self.shapes),
            block_order="raster",
            sparsity=float(trained.group()) if trained else 0.9,
            fusion="rms" if self.method == "rola" else "mass",
            source=self.header.get("source", self.path.name),
        )


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a released checkpoint without reading its weights; AdapterError where it is none."""
    path = Path(path)
    with naming(path):
        opened = open_safetensors if path.suffix.lower() in SAFETENSORS else open_pickle
        file = opened(path)
        prefix = find_prefix(file.shapes)
        shapes = {
            name.removeprefix(prefix): shape
            for name, shape in file.shapes.items()
            if name.startswith(prefix)
        }
        method = _method(shapes)
        check_complete(shapes)

    def read(name: str) -> Tensor:
        return file.read(prefix + name)

    return Checkpoint(path, method, shapes, file.header, read)


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    adapter_out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint as one safetensors in ComfyUI's layout, sparse weights included. -> out.

    adapter_out: also write the sparse weights alone, as an adapter.
    Raises AdapterError before anything is written, and OSError where a file cannot be written.
    """
    checkpoint = open_checkpoint(path)
    adapter, out = checkpoint.adapter(), Path(out)
    weights = checkpoint.backbone(progress) | adapter.tensors()
    _check_space(out, sum(each.numel() * each.element_size() for each in weights.values()))
    if adapter_out is not None:
        write_adapter(adapter, adapter_out)
    info = adapter.info
    header = {
        **checkpoint.header,
        "source": info.source,
        "sparse_attention": info.method,
        "sparsity": str(info.sparsity),
    }
    return write_safetensors(separate_storage(weights), out, header)


def _method(shapes: Mapping[str, object]) -> str:
    methods = [
        method for method, mark in MARKS.items() if any(name.endswith(mark) for name in shapes)
    ]
    if len(methods) == 1:
        return methods[0]
    if methods:
        raise AdapterError("it has weights of both RoLA and SLA; expected one of them")
    raise AdapterError(
        "it has no weights of RoLA (SparkWan) or SLA (TurboWan). Load a stock model with Load "
        "Diffusion Model"
    )


def _check_space(out: Path, size: int) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < size:
        raise OSError(
            f"{file_name(out)} needs {size / 1e9:.1f} GB; {out.parent} has {free / 1e9:.1f} GB free"
        )


def _comfy_layout(name: str, tensor: Tensor) -> Tensor:
    if not (tensor.is_floating_point() or tensor.dtype == torch.int64):
        raise AdapterError(f"{shown(name)} is {tensor.dtype}, which no Wan model has")
    searched = tensor.numel() <= MAX_SEARCHED and tensor.element_size() > 1
    if searched and count_not_finite(tensor):
        raise AdapterError(f"{shown(name)} has values that are NaN or infinite. Download it again")
    if name == "patch_embedding.weight" and tensor.ndim == 2:
        return tensor.reshape(tensor.shape[0], -1, 1, 2, 2)
    return tensor


def _dequantized(name: str, weight: Tensor, scale: Tensor) -> Tensor:
    if weight.ndim != 2:
        found = shown(tuple(weight.shape))
        raise AdapterError(f"{shown(name)}{INT8_WEIGHT} has the shape {found}; expected a matrix")
    height, width = weight.shape
    expected = (-(-height // INT8_BLOCK), -(-width // INT8_BLOCK))
    if tuple(scale.shape) != expected:
        found = shown(tuple(scale.shape))
        raise AdapterError(f"{shown(name)}.scale has the shape {found}; expected {expected}")
    if count_not_finite(scale):
        raise AdapterError(f"{shown(name)}.scale has values that are NaN or infinite")
    factors = scale.repeat_interleave(INT8_BLOCK, 0)[:height].repeat_interleave(INT8_BLOCK, 1)
    return (weight.float() * factors[:, :width]).bfloat16()
