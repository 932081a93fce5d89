"""Writes safetensors so that a reader sees the old file or the new one, and never a part.

A file is written in a folder of its own beside the target, then moved. (A folder, since safetensors
writes to another temporary file first.) Its name says which process writes there: what a killed
process left behind is removed by the next save of the same target.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .text import shown

# After the target's name without extension: {machine}-{process}-{random}.
_PARTIAL = re.compile(r"\.([0-9a-f]{6})-(\d{1,10})-[0-9a-f]{6}\.partial", re.ASCII)
PARTIAL_BYTES = len(".123456-1234567890-123456.partial")

# What another machine writes, on a shared drive, is left alone for so long after its last write.
DAY = 24 * 60 * 60.0


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str] | None = None
) -> Path:
    """Write a file whole or not at all. -> path. Raises OSError, which names the file."""
    with _naming_failures(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            remove_abandoned(path)
        with _partial_folder(path) as folder:
            # No ending that ComfyUI would list as a model.
            partial = folder / "tensors"
            partial.touch()
            # The mode of any new file; some versions of safetensors make theirs private.
            mode = partial.stat().st_mode
            save_file(dict(tensors), partial, dict(header or {}))
            partial.chmod(mode)
            os.replace(partial, path)
    return path


def remove_abandoned(path: Path) -> None:
    """Remove what killed processes left of earlier saves of this target."""
    for found in path.parent.iterdir():
        if not found.name.startswith(path.stem):
            continue
        match = _PARTIAL.fullmatch(found.name.removeprefix(path.stem))
        if match is None or found.is_symlink():
            continue
        # What cannot be removed must not cost the save: it is tried again the next time.
        with contextlib.suppress(OSError):
            if _is_abandoned(found, match.group(1), int(match.group(2))):
                _remove(found)


def separate_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share memory, which safetensors does not write; the rest as it is."""
    seen: set[int] = set()
    separate = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage()
        fills_it = tensor.numel() * tensor.element_size() == storage.nbytes()
        alone = tensor.is_contiguous() and fills_it and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        separate[key] = tensor if alone else tensor.contiguous().clone()
    return separate


@contextlib.contextmanager
def _naming_failures(path: Path) -> Iterator[None]:
    try:
        yield
    # safetensors reports a full disk as an error of its own, which is no OSError.
    except (OSError, SafetensorError) as error:
        name, folder = shown(path.name, limit=255), shown(path.parent, limit=1000)
        reason = getattr(error, "strerror", None) or shown(error, limit=200)
        raise OSError(f"{name} could not be written to {folder}: {reason}") from error


@contextlib.contextmanager
def _partial_folder(path: Path) -> Iterator[Path]:
    """A new folder beside the target, removed at the end: an interruption leaves nothing either."""
    suffix = f".{_machine()}-{os.getpid()}-{secrets.token_hex(3)}.partial"
    folder = path.with_name(path.stem + suffix)
    folder.mkdir()
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            _remove(folder)


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def _is_abandoned(folder: Path, machine: str, process: int) -> bool:
    # A container often gives a process the number of the one before it: ours proves nothing.
    if machine == _machine() and process != os.getpid() and os.name == "posix":
        return not _is_alive(process)
    last_write = max(each.stat().st_mtime for each in (folder, *folder.iterdir()))
    return time.time() - last_write > DAY


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def _machine() -> str:
    """Six digits for the place where a process number means something: a machine or a container."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    place = f"{platform.node()} {namespace}"
    return hashlib.sha256(place.encode(errors="replace")).hexdigest()[:6]
