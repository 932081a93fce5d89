"""Reads and writes adapter files: safetensors with our header, written so that no half file is ever left."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .info import FORMAT, Adapter, AdapterError, AdapterInfo, group, validate


def read_adapter(path: str | os.PathLike, device: str = "cpu") -> Adapter:
    """Read one of our own files and check everything in it; an AdapterError names the file and what is wrong.

    Nothing in the file is executed: safetensors holds numbers only. Tensors keep their dtype.
    """
    path = Path(path)
    with naming(path):
        header, tensors = read_safetensors(path, device)
        if header.get("format") != FORMAT and any("proj_" in key for key in tensors):
            raise AdapterError("it is a whole checkpoint, not an adapter: use Load Sparse Checkpoint")
        info = AdapterInfo.from_header(header)
        layers = group(info.method, tensors)
        validate(info, layers)
        return Adapter(info, layers, path.name)


def write_adapter(adapter: Adapter, path: str | os.PathLike) -> Path:
    """Write an adapter; what stood there before is replaced only when the new file is complete. -> the path.

    Raises AdapterError when the adapter is not valid, before anything is written.
    """
    path = Path(path)
    with naming(path):
        validate(adapter.info, adapter.layers)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in adapter.tensors().items()}
    return write_safetensors(separate_storage(tensors), path, adapter.info.header())


def is_adapter(path: Path) -> bool:
    """Whether a file claims to be one of ours; False also where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError, ValueError):
        return False


def read_safetensors(path: Path, device: str = "cpu") -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a file."""
    if not path.is_file():
        raise AdapterError("there is no such file")
    with reading(), safe_open(path, framework="pt", device=device) as file:
        return dict(file.metadata() or {}), {
            # Copies: a file that is written over while it is mapped would change or end the process.
            key: file.get_tensor(key).clone() for key in file.keys()  # noqa: SIM118
        }


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Say in words that a safetensors file is broken."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"it is not a whole safetensors file ({error}). Download or save it again") from error


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str] | None = None) -> Path:
    """Write beside the target under another name, then move: readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.partial")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode       # what any new file gets; some versions of safetensors make it private
        save_file(dict(tensors), partial, dict(header or {}))
        partial.chmod(mode)
        os.replace(partial, path)
    except BaseException:                   # an interruption too must leave nothing behind
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    return path


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name before whatever is wrong with it."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{path.name}: {error}.") from error.__cause__


def separate_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that overlap in memory, which safetensors refuses to write; the others as they are."""
    seen: dict[int, str] = {}
    result = {}
    for key, tensor in tensors.items():
        start = tensor.untyped_storage().data_ptr()
        whole = tensor.is_contiguous() and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
        alone = whole and start not in seen
        seen.setdefault(start, key)
        result[key] = tensor if alone else tensor.contiguous().clone()
    return result
