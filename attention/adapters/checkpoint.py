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
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .files import naming, reading, separate_storage, write_adapter, write_safetensors
from .info import SUFFIXES, Adapter, AdapterError, AdapterInfo, group, validate, validate_shapes

PREFIXES = ("net_ema.", "net.", "model.diffusion_model.", "diffusion_model.", "module.", "")
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "ema", "generator")
MARKS = {"rola": ".self_attn.proj_q.weight", "sla": ".self_attn.attn_op.local_attn.proj_l.weight"}
# Every name of a Wan model with its shape; D is the model's width, F that of its feed-forward part, -1 any size.
TOP_LEVEL = {
    "patch_embedding.bias": ("D",), "text_embedding.0.weight": ("D", -1), "text_embedding.0.bias": ("D",),
    "text_embedding.2.weight": ("D", "D"), "text_embedding.2.bias": ("D",), "time_embedding.0.weight": ("D", -1),
    "time_embedding.0.bias": ("D",), "time_embedding.2.weight": ("D", "D"), "time_embedding.2.bias": ("D",),
    "time_projection.1.weight": ("6D", "D"), "time_projection.1.bias": ("6D",), "head.head.weight": (-1, "D"),
    "head.head.bias": (-1,), "head.modulation": (1, 2, "D"),
}
IN_BLOCK = {
    "modulation": (1, 6, "D"), "norm3.weight": ("D",), "norm3.bias": ("D",), "ffn.0.weight": ("F", "D"),
    "ffn.0.bias": ("F",), "ffn.2.weight": ("D", "F"), "ffn.2.bias": ("D",),
    **{f"{kind}_attn.{part}.weight": ("D", "D") for kind in ("self", "cross") for part in "qkvo"},
    **{f"{kind}_attn.{part}.bias": ("D",) for kind in ("self", "cross") for part in "qkvo"},
    **{f"{kind}_attn.norm_{part}.weight": ("D",) for kind in ("self", "cross") for part in "qk"},
}
IMAGE = {                                   # besides, where a model takes CLIP's image features
    "img_emb.proj.0.weight": (-1,), "img_emb.proj.0.bias": (-1,), "img_emb.proj.1.weight": (-1, -1),
    "img_emb.proj.1.bias": (-1,), "img_emb.proj.3.weight": ("D", -1), "img_emb.proj.3.bias": ("D",),
    "img_emb.proj.4.weight": ("D",), "img_emb.proj.4.bias": ("D",),
}
IMAGE_IN_BLOCK = {
    **{f"cross_attn.{part}_img.weight": ("D", "D") for part in "kv"},
    **{f"cross_attn.{part}_img.bias": ("D",) for part in "kv"}, "cross_attn.norm_k_img.weight": ("D",),
}
BLOCK_KEY = re.compile(r"^blocks\.(\d+)\.(.+)$")
INT8, INT8_BLOCK = ".int8_weight", 128
DEEPEST = 4                                 # tables within tables in a .pth
TRAINED_AT = re.compile(r"(?<![\d.])0\.[5-9]\d?(?!\d)")                      # in a file's name
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
            info = self._info()
            names = group(self.method, {name: name for name in self.shapes if self._is_sparse(name)})
            validate_shapes(info, {
                layer: {short: self.shapes[name] for short, name in found.items()} for layer, found in names.items()
            })
            layers = {
                layer: {short: self.read(name).clone() for short, name in found.items()}
                for layer, found in names.items()
            }
            validate(info, layers)
            return Adapter(info, layers, self.path.name)

    def backbone(self, progress: Callable[[int, int], None] | None = None) -> dict[str, Tensor]:
        """Everything else in ComfyUI's layout, checked; tensors stay mapped to the file where they can.

        progress: called with (tensors done, tensors in all). Raises AdapterError where a tensor cannot be used.
        """
        return dict(self.tensors(progress))

    def tensors(self, progress: Callable[[int, int], None] | None = None) -> Iterator[tuple[str, Tensor]]:
        """What `backbone` holds, one by one."""
        names = [name for name in self.shapes if not self._is_sparse(name)]
        for done, name in enumerate(names):
            with naming(self.path):
                base = name.removesuffix(INT8)
                if base != name:
                    found = (f"{base}.weight", _dequantised(base, self.read(name), self.read(f"{base}.scale")))
                elif name.removesuffix(".scale") + INT8 in self.shapes:
                    found = None
                else:
                    found = (name, _comfy_layout(name, self.read(name)))
            if progress is not None:
                progress(done + 1, len(names))
            if found is not None:
                yield found

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
        trained = TRAINED_AT.search(self.header.get("sparsity", "") or self.path.name)
        return AdapterInfo(
            method=self.method, num_layers=_layers(self.shapes), num_heads=dim // width, head_dim=width, rank=rank,
            base_model=_base_model(self.shapes), block_order="raster",
            sparsity=float(trained.group()) if trained else 0.9, fusion="rms" if self.method == "rola" else "mass",
            source=self.header.get("source", self.path.name),
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
    those alone as an adapter. -> out. Raises AdapterError before anything is written, OSError where it cannot be."""
    checkpoint = open_checkpoint(path)
    adapter, out = checkpoint.adapter(), Path(out)
    weights = checkpoint.backbone(progress) | adapter.tensors()
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < size:
        raise OSError(f"{out.parent} has {free / 1e9:.1f} GB free; {size / 1e9:.1f} GB are needed for {out.name}")
    if adapter_out is not None:
        write_adapter(adapter, adapter_out)
    info = adapter.info
    header = {"source": info.source, "sparse_attention": info.method, "sparsity": str(info.sparsity)}
    return write_safetensors(separate_storage(weights), out, dict(checkpoint.header) | header)


def _open_safetensors(path: Path):
    with reading():
        file = safe_open(path, framework="pt", device="cpu")
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}   # noqa: SIM118
    return shapes, file.get_tensor, file.metadata() or {}


def _open_pickle(path: Path):
    if not zipfile.is_zipfile(path):
        raise AdapterError("it is not a whole checkpoint, or one of a format from before 2020. Download it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        words = str(error).partition("\n")[0]
        raise AdapterError(f"it holds more than numbers and was not run, or is no checkpoint ({words})") from error
    except Exception as error:              # a broken file fails in many ways: zip, unpickler, storages, text
        words = f"{type(error).__name__}: " + str(error).partition("\n")[0]
        raise AdapterError(f"it is not a whole checkpoint ({words}). Download it again") from error
    for _ in range(DEEPEST):
        if not isinstance(content, dict) or any(isinstance(value, Tensor) for value in content.values()):
            break
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        content = next(iter(content.values())) if inner is None and len(content) == 1 else inner
    if not isinstance(content, dict):
        raise AdapterError("it holds no table of weights")
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    for key, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        # A few bytes that claim to be a large tensor would fill the memory when they are copied.
        if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise AdapterError(f"{key} is no plain tensor with numbers of its own")
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
    """Nothing missing and nothing misshapen: ComfyUI would fill a gap with whatever lies in memory, and paint noise."""
    image = any(name.startswith("img_emb.") for name in shapes)
    top, block = TOP_LEVEL | (IMAGE if image else {}), IN_BLOCK | (IMAGE_IN_BLOCK if image else {})
    wanted = top | {f"blocks.{i}.{name}": shape for i in range(_layers(shapes)) for name, shape in block.items()}
    held = {name.removesuffix(INT8) + ".weight" if name.endswith(INT8) else name: x for name, x in shapes.items()}
    missing = [name for name in wanted if name not in held]
    if missing or not wanted.keys() - top.keys():
        what = missing[0] if missing else "blocks.0"
        raise AdapterError(f"it has no {what}, and lacks {max(1, len(missing))} weights in all. Download it again")
    dim = (held["patch_embedding.bias"] or (0,))[0]
    feed = (held["blocks.0.ffn.0.bias"] or (0,))[0]
    sizes = {"D": dim, "6D": 6 * dim, "F": feed}
    for name, shape in wanted.items():
        expected = tuple(sizes.get(side, side) for side in shape)
        found = held[name]
        if len(found) != len(expected) or any(b not in (-1, a) for a, b in zip(found, expected)) or 0 in found:
            raise AdapterError(f"{name} has the shape {found}; expected {str(expected).replace('-1', 'any')}")
    patch = held["patch_embedding.weight"]
    if len(patch) not in (2, 5) or patch[0] != dim or 0 in patch or (len(patch) == 2 and patch[1] % 4):
        expected = f"({dim}, channels * 4) or ({dim}, channels, 1, 2, 2)"
        raise AdapterError(f"patch_embedding.weight has the shape {patch}; expected {expected}")
    for name in shapes:
        if name.endswith(INT8) and name.removesuffix(INT8) + ".scale" not in shapes:
            raise AdapterError(f"{name} has no {name.removesuffix(INT8)}.scale beside it")


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
    if not torch.isfinite(scale).all():
        raise AdapterError(f"{name}.scale has values that are NaN or infinite")
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
