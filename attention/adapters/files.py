"""Reads and writes adapter files: safetensors with our header."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from .adapter import Adapter, group_by_layer
from .atomic import separate_storage, write_safetensors
from .info import FORMAT, AdapterError, AdapterInfo
from .tensor_file import TensorFile, file_name, naming, open_safetensors
from .validate import validate, validate_numbers, validate_shapes


def read_adapter(path: str | os.PathLike[str], device: str = "cpu") -> Adapter:
    """Read one of our own files and check everything in it; an AdapterError says what is wrong.

    Header, keys and shapes are checked before any tensor is read. Nothing in the file is executed.
    Tensors keep their dtype.

    >>> read_adapter("file.safetensors").info.method
    'rola'
    """
    path = Path(path)
    with naming(path), contextlib.closing(open_safetensors(path, device)) as file:
        info, keys = _checked_header(file)
        layers = {}
        for layer, names in keys.items():
            layers[layer] = {}
            for name, key in names.items():
                # A copy: writing over a file while it is mapped changes or ends this process.
                tensor = file.read(key).clone()
                validate_numbers(f"{layer} {name}", tensor)
                layers[layer][name] = tensor
    return Adapter(info, layers, file_name(path))


def write_adapter(adapter: Adapter, path: str | os.PathLike[str]) -> Path:
    """Write an adapter. -> path. A file that was there is replaced once the new one is complete.

    Raises AdapterError when the adapter is not valid, before anything is written, and OSError when
    the file cannot be written.
    """
    path = Path(path)
    with naming(path):
        validate(adapter.info, adapter.layers)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in adapter.tensors().items()}
    return write_safetensors(separate_storage(tensors), path, adapter.info.header())


def is_adapter(path: Path) -> bool:
    """Whether a file claims to be one of ours; False also where it cannot be read."""
    try:
        with contextlib.closing(open_safetensors(path)) as file:
            return file.header.get("format") == FORMAT
    except AdapterError:
        return False


def _checked_header(file: TensorFile) -> tuple[AdapterInfo, dict[str, dict[str, str]]]:
    """The facts, and the keys by layer and name, of a file whose shapes are as they should be."""
    if file.header.get("format") != FORMAT and any("proj_" in key for key in file.shapes):
        raise AdapterError(
            "it is a whole checkpoint, not an adapter. Move it to models/diffusion_models and use "
            "Load Sparse Checkpoint"
        )
    info = AdapterInfo.from_header(file.header)
    keys = group_by_layer(info.method, {key: key for key in file.shapes})
    validate_shapes(
        info,
        {
            layer: {name: file.shapes[key] for name, key in names.items()}
            for layer, names in keys.items()
        },
    )
    return info, keys
