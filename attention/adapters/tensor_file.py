"""A file of tensors, opened so that nothing large is read before the caller has looked at it."""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .info import AdapterError
from .text import shown

# Far more than an adapter or a Wan model needs, and read in well under a second.
MAX_HEADER = 16 << 20
MAX_TENSORS = 1 << 16


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class TensorFile:
    """Shapes by key, a function that reads one tensor, and the header.

    header: a safetensors file's `__metadata__`.
    """

    shapes: Mapping[str, tuple[int, ...]]
    header: Mapping[str, str]
    read: Callable[[str], Tensor]
    close: Callable[[], None] = _nothing


def open_safetensors(path: Path, device: str = "cpu") -> TensorFile:
    """Map a safetensors file into memory; tensors are read on demand and share its bytes."""
    check_readable(path)
    _check_header_size(path)
    with _in_words():
        file = safe_open(path, framework="pt", device=device)
        keys = list(file.keys())
    if len(keys) > MAX_TENSORS:
        raise AdapterError(
            f"its header lists {len(keys):,} tensors; expected at most {MAX_TENSORS:,}. "
            "It is not an adapter or a Wan model"
        )
    with _in_words():
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
        header = dict(file.metadata() or {})

    def read(key: str) -> Tensor:
        with _in_words():
            return file.get_tensor(key)

    def close() -> None:
        file.__exit__(None, None, None)

    return TensorFile(shapes, header, read, close)


def holds(path: Path, part: str) -> bool:
    """Whether a safetensors file has a tensor with `part` in its name; False for other files."""
    if path.suffix.lower() not in (".safetensors", ".sft"):
        return False
    try:
        with naming(path):
            file = open_safetensors(path)
    except AdapterError:
        return False
    with contextlib.closing(file):
        return any(part in key for key in file.shapes)


def check_readable(path: Path) -> None:
    """Raise AdapterError unless this is a regular file that may be read."""
    with _access_in_words():
        mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise AdapterError("it is a folder; expected a file")
    # Opening a pipe would wait for a writer, perhaps for ever.
    if not stat.S_ISREG(mode):
        raise AdapterError("it is a pipe, a socket or a device; expected a regular file")
    with _access_in_words():
        path.open("rb").close()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name before whatever is wrong with it."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{file_name(path)}: {error}.") from error.__cause__


def file_name(path: Path) -> str:
    """A file's name, printable: names too can hold escape codes."""
    return shown(path.name, limit=255)


def _check_header_size(path: Path) -> None:
    with path.open("rb") as file:
        prefix = file.read(8)
        size = os.fstat(file.fileno()).st_size
    if len(prefix) < 8:
        raise AdapterError("it is too short for a safetensors file. Download or save it again")
    (header,) = struct.unpack("<Q", prefix)
    if header > size:
        raise AdapterError(
            "it is not a safetensors file, or only the beginning of one. Download or save it again"
        )
    if header > MAX_HEADER:
        raise AdapterError(
            f"its safetensors header has {header:,} bytes; expected at most {MAX_HEADER:,}. "
            "It is not an adapter or a Wan model"
        )


@contextlib.contextmanager
def _access_in_words() -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise AdapterError(
            "no permission to read it. Give the user who runs ComfyUI read access to the file and "
            "its folder"
        ) from error
    except FileNotFoundError as error:
        raise AdapterError("there is no such file; check its name and folder") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(f"the system cannot open it ({shown(reason)})") from error


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """Say in words that a safetensors file is broken, which shows in many ways."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise AdapterError(
            f"the safetensors file is incomplete or corrupt ({shown(error)}). "
            "Download or save it again"
        ) from error
