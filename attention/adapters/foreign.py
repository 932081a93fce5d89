"""Released checkpoints: a whole Wan model whose file also holds the weights of its sparse attention.

Recognised by keys: RoLA (SparkWan*) by `self_attn.proj_q.weight`, SLA (TurboWan*) by
`self_attn.attn_op.local_attn.proj_l.weight`, both perhaps behind `net.`, `net_ema.` or `model.diffusion_model.`.
A .safetensors is read lazily, a .pth by weights_only and mapped into memory; nothing in a file is ever executed.
Their patch embedding is a linear layer, `(dim, channels * 4)`; ComfyUI's is the same as a convolution. Linear layers of
the "-quant" files are int8 in blocks of 128 x 128 with a factor each. Source: thu-ml/TurboDiffusion, SparkDiffusion.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import naming, separate_storage, write_adapter, write_safetensors
from .format import SUFFIXES, Adapter, AdapterError, AdapterInfo, group, validate

PREFIXES = ("net_ema.", "net.", "model.diffusion_model.", "diffusion_model.", "module.", "")
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "ema", "generator")
MARKS = {"rola": ".self_attn.proj_q.weight", "sla": ".self_attn.attn_op.local_attn.proj_l.weight"}
TOP_LEVEL = (
    "patch_embedding.weight", "patch_embedding.bias", "text_embedding.0.weight", "text_embedding.2.weight",
    "time_embedding.0.weight", "time_embedding.2.weight", "time_projection.1.weight", "head.head.weight",
    "head.modulation",
)
IN_BLOCK = (
    "modulation", "self_attn.q.weight", "self_attn.k.weight", "self_attn.v.weight", "self_attn.o.weight",
    "self_attn.norm_q.weight", "self_attn.norm_k.weight", "cross_attn.q.weight", "cross_attn.o.weight", "ffn.0.weight",
    "ffn.2.weight",
)
BLOCK_KEY = re.compile(r"^blocks\.(\d+)\.(.+)$")
INT8, INT8_BLOCK = ".int8_weight", 128
SMALL = 1 << 20                             # numbers; larger tensors are not looked through for NaN at every start
SIZES = {(1536, 30): "1.3b", (5120, 40): "14b"}


@dataclass(frozen=True)
class Checkpoint:
    """An opened file: shapes by name, without prefix, and a function that reads one tensor."""

    path: Path
    method: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    header: Mapping[str, str]

    def adapter(self) -> Adapter:
        """The weights of the sparse attention. Raises AdapterError when some are missing, misshapen or not finite."""
        with naming(self.path):
            names = [name for name in self.shapes if self._is_sparse(name)]
            layers = group(self.method, {name: self.read(name).clone() for name in names})
            info = self._info()
            validate(info, layers)
            return Adapter(info, layers, self.path.name)

    def backbone(self, progress: Callable[[int, int], None] | None = None) -> dict[str, Tensor]:
        """Everything else in ComfyUI's layout, checked; tensors stay mapped to the file where they can.

        progress: called with (tensors done, tensors in all). Raises AdapterError where the model is not whole.
        """
        with naming(self.path):
            names = [name for name in self.shapes if not self._is_sparse(name)]
            weights: dict[str, Tensor] = {}
            for done, name in enumerate(names):
                if name.endswith(INT8):
                    target = name.removesuffix(INT8)
                    weights[f"{target}.weight"] = _dequantised(target, self.read(name), self.read(f"{target}.scale"))
                elif name.removesuffix(".scale") + INT8 not in self.shapes:
                    weights[name] = _comfy_layout(name, self.read(name))
                if progress is not None:
                    progress(done + 1, len(names))
            return weights

    def _is_sparse(self, name: str) -> bool:
        return any(f".self_attn.{suffix}" in name for suffix in SUFFIXES[self.method])

    def _info(self) -> AdapterInfo:
        dim = self.shapes["patch_embedding.bias"][0]
        name = "blocks.0" + MARKS[self.method]
        matrix = self.shapes.get(name)
        if matrix is None or len(matrix) != 2:
            raise AdapterError(f"{name} has the shape {matrix}; expected a matrix")
        rank, width = matrix if self.method == "rola" else (0, matrix[1])
        if not width or dim % width:
            raise AdapterError(f"its heads are {width} wide, which does not divide the model's width {dim}")
        trained = re.search(r"(0\.\d+)[ _-]?sparsity", self.path.name, re.IGNORECASE)
        return AdapterInfo(
            method=self.method, num_layers=_layers(self.shapes), num_heads=dim // width, head_dim=width, rank=rank,
            base_model=_base_model(self.shapes), block_order="raster",
            sparsity=float(trained.group(1)) if trained else 0.9, fusion="rms" if self.method == "rola" else "mass",
            source=self.path.name,
        )


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Open a released checkpoint without reading its weights; an AdapterError says why it is none."""
    path = Path(path)
    with naming(path):
        if not path.is_file():
            raise AdapterError("there is no such file")
        lazily = path.suffix.lower() in (".safetensors", ".sft")
        shapes, read, header = (_open_safetensors if lazily else _open_pickle)(path)
        prefix = _prefix(shapes)
        named = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        methods = [method for method, mark in MARKS.items() if any(name.endswith(mark) for name in named)]
        if len(methods) != 1:
            held = "weights of both RoLA and SLA" if methods else "no weights of RoLA (SparkWan) or SLA (TurboWan)"
            raise AdapterError(f"it holds {held}; load a stock model with Load Diffusion Model instead")
        _check_whole(named)
        return Checkpoint(path, methods[0], named, lambda name: read(prefix + name), header)


def convert(
    path: str | os.PathLike, out: str | os.PathLike, adapter_out: str | os.PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a checkpoint as one safetensors in ComfyUI's layout, its sparse weights included; and, with adapter_out,
    those alone as an adapter. -> out. Raises AdapterError before anything is written."""
    checkpoint = open_checkpoint(path)
    adapter, backbone = checkpoint.adapter(), checkpoint.backbone(progress)
    if adapter_out is not None:
        write_adapter(adapter, adapter_out)
    header = dict(checkpoint.header) | {"source": Path(path).name, "sparse_attention": adapter.info.method}
    return write_safetensors(separate_storage(backbone | adapter.tensors()), Path(out), header)


def _open_safetensors(path: Path):
    try:
        file = safe_open(path, framework="pt", device="cpu")
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}   # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"it is not a whole safetensors file ({error}). Download it again") from error
    return shapes, file.get_tensor, file.metadata() or {}


def _open_pickle(path: Path):
    try:
        mapped = zipfile.is_zipfile(path)   # the format before 2020 cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        words = str(error).partition("\n")[0]
        raise AdapterError(f"it holds more than numbers and was not run, or is no checkpoint ({words})") from error
    except Exception as error:              # a broken file fails in many ways: zip, unpickler, storages, text
        words = f"{type(error).__name__}: " + str(error).partition("\n")[0]
        raise AdapterError(f"it is not a whole checkpoint ({words}). Download it again") from error
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None and len(content) == 1:
            inner = next(iter(content.values()))
        content = inner
    if not isinstance(content, dict):
        raise AdapterError("it holds no table of weights")
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}, tensors.__getitem__, {}


def _prefix(shapes: Mapping[str, object]) -> str:
    for prefix in PREFIXES:
        if f"{prefix}patch_embedding.weight" in shapes:
            return prefix
    some = ", ".join(list(shapes)[:3]) or "nothing"
    raise AdapterError(f"it is not a Wan model: it has no patch_embedding.weight, but {some} and so on")


def _layers(shapes: Mapping[str, object]) -> int:
    return len({match.group(1) for match in map(BLOCK_KEY.match, shapes) if match})


def _check_whole(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Nothing missing: ComfyUI would fill a gap with whatever lies in memory, and paint noise."""
    layers = _layers(shapes)
    wanted = [*TOP_LEVEL, *(f"blocks.{i}.{name}" for i in range(layers) for name in IN_BLOCK)]
    missing = [name for name in wanted if name not in shapes and name.removesuffix(".weight") + INT8 not in shapes]
    if missing:
        raise AdapterError(f"it has no {missing[0]}, and lacks {len(missing)} weights in all. Download it again")
    first = {m.group(2): shape for name, shape in shapes.items() if (m := BLOCK_KEY.match(name)) and m.group(1) == "0"}
    for i in range(1, layers):
        for name, shape in first.items():
            found = shapes.get(f"blocks.{i}.{name}")
            if found != shape:
                raise AdapterError(f"blocks.{i}.{name} has the shape {found}; expected {shape}, as in block 0")
    dim = (shapes["patch_embedding.bias"] or (0,))[0]
    for name in ("self_attn.q.weight", "self_attn.k.weight", "self_attn.v.weight", "self_attn.o.weight"):
        found = first.get(name) or first.get(name.removesuffix(".weight") + INT8)
        if found != (dim, dim):
            raise AdapterError(f"blocks.0.{name} has the shape {found}; expected {(dim, dim)}")
    patch = shapes["patch_embedding.weight"]
    if len(patch) not in (2, 5) or patch[0] != dim or (len(patch) == 2 and patch[1] % 4):
        expected = f"({dim}, channels * 4) or ({dim}, channels, 1, 2, 2)"
        raise AdapterError(f"patch_embedding.weight has the shape {patch}; expected {expected}")
    for name, shape in shapes.items():
        if name.endswith(INT8) and name.removesuffix(INT8) + ".scale" not in shapes:
            raise AdapterError(f"{name} has no {name.removesuffix(INT8)}.scale beside it")
        if 0 in shape:
            raise AdapterError(f"{name} is empty: {shape}")


def _comfy_layout(name: str, tensor: Tensor) -> Tensor:
    if not (tensor.is_floating_point() or tensor.dtype == torch.int64):
        raise AdapterError(f"{name} is {tensor.dtype}, which no Wan model has")
    if tensor.numel() <= SMALL and tensor.element_size() > 1 and not torch.isfinite(tensor).all():
        raise AdapterError(f"{name} has values that are NaN or infinite")
    if name == "patch_embedding.weight" and tensor.ndim == 2:
        return tensor.reshape(tensor.shape[0], -1, 1, 2, 2)
    return tensor


def _dequantised(name: str, weight: Tensor, scale: Tensor) -> Tensor:
    rows, columns = (-(-side // INT8_BLOCK) for side in weight.shape)
    if tuple(scale.shape) != (rows, columns):
        raise AdapterError(f"{name}.scale has the shape {tuple(scale.shape)}; expected {(rows, columns)}")
    factors = scale.repeat_interleave(INT8_BLOCK, 0)[: weight.shape[0]].repeat_interleave(INT8_BLOCK, 1)
    return (weight.float() * factors[:, : weight.shape[1]]).bfloat16()


def _base_model(shapes: Mapping[str, tuple[int, ...]]) -> str:
    dim, layers = shapes["patch_embedding.bias"][0], _layers(shapes)
    patch = shapes["patch_embedding.weight"]
    channels = patch[1] // 4 if len(patch) == 2 else patch[1]
    if "img_emb.proj.0.bias" in shapes:
        kind = "wan2.1-i2v"
    else:
        kind = {36: "wan2.2-i2v", 48: "wan2.2-ti2v"}.get(channels, "wan2.1-t2v")
    return f"{kind}-{SIZES.get((dim, layers), f'{dim}x{layers}')}"
