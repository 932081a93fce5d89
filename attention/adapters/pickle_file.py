"""Opens a .pth without executing anything in it, and without trusting the sizes that it claims.

PyTorch's format is a zip archive, stored without compression, of one small pickle and the numbers
of each tensor. The archive's table of contents is checked first; then torch reads the pickle with
`weights_only` and maps the numbers into memory.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .info import AdapterError
from .tensor_file import TensorFile, check_readable
from .text import quoted, shown

MB = 1 << 20
# Of everything that is read into memory at once; the pickle of a 14B model has half a megabyte.
MAX_PICKLE = 64 * MB
MAX_MEMBERS = 1 << 16
# Tables within tables, and the names under which the weights are found in them.
MAX_DEPTH = 4
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "ema", "generator")

DOWNLOAD_AGAIN = "Download it again"
# How torch names the object that it refused.
_GLOBAL = re.compile(r"GLOBAL (\S+)")
# A tensor's numbers: these are mapped, not read.
_STORAGE = re.compile(r"[^/]+/data/.+", re.DOTALL)


def open_pickle(path: Path) -> TensorFile:
    """Map a .pth into memory. It has no header. Raises AdapterError for anything but tensors."""
    check_readable(path)
    _check_archive(path)
    weights = _state_dict(_load(path))
    tensors = {
        key: value
        for key, value in weights.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    for key, tensor in tensors.items():
        _check_plain(key, tensor)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return TensorFile(shapes, {}, tensors.__getitem__)


def _check_archive(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise AdapterError(
            "it is incomplete, or in PyTorch's format from before 2020, which is not supported. "
            f"{DOWNLOAD_AGAIN}"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    # A broken archive fails in many ways.
    except Exception as error:
        raise AdapterError(
            f"the archive is incomplete or corrupt ({shown(error)}). {DOWNLOAD_AGAIN}"
        ) from error
    if len(members) > MAX_MEMBERS:
        raise AdapterError(
            f"the archive has {len(members):,} members; expected at most {MAX_MEMBERS:,}. "
            "It is not a Wan model"
        )
    for member in members:
        _check_member(member, path)


def _check_member(member: zipfile.ZipInfo, path: Path) -> None:
    name = member.filename
    if member.file_size > MAX_PICKLE and not _STORAGE.fullmatch(name):
        raise AdapterError(
            f"{quoted(name)} in the archive unpacks to {member.file_size / MB:,.0f} MB; expected "
            f"at most {MAX_PICKLE // MB}. It is not a Wan model"
        )
    if member.compress_type != zipfile.ZIP_STORED:
        file = shown(repr(path.name), limit=255)
        raise AdapterError(
            f"{quoted(name)} in the archive is compressed, so it cannot be mapped into memory. "
            "If you trust the file, save it again, in Python and its folder: "
            f"torch.save(torch.load({file}, weights_only=True), 'new.pth')"
        )
    if member.compress_size != member.file_size:
        raise AdapterError(
            f"the archive is corrupt: {quoted(name)} is stored in {member.compress_size:,} bytes "
            f"and claims {member.file_size:,}. {DOWNLOAD_AGAIN}"
        )
    if name.endswith("constants.pkl"):
        raise AdapterError(
            "it is a TorchScript program, not a checkpoint; nothing was executed. Use the file "
            "that holds the model's weights"
        )


def _load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise AdapterError(
            f"it {_refused(error)}; nothing was executed. Use a file that contains tensors only, "
            "for example a .safetensors"
        ) from error
    # A broken file fails in many ways: zip, unpickler, storages, text.
    except Exception as error:
        reason = shown(f"{type(error).__name__}: {error}".partition("\n")[0])
        raise AdapterError(f"it is incomplete or corrupt ({reason}). {DOWNLOAD_AGAIN}") from error


def _refused(error: pickle.UnpicklingError) -> str:
    """What was found. Not in torch's own words: they advise to load the file without protection."""
    found = _GLOBAL.search(str(error))
    if found is None:
        return "is corrupt, or contains objects other than tensors"
    return f"contains objects other than tensors ({quoted(found.group(1))})"


def _state_dict(content: object) -> Mapping[object, object]:
    for _ in range(MAX_DEPTH):
        if not isinstance(content, dict) or _has_tensors(content):
            break
        wrapped = [content[key] for key in WRAPPERS if isinstance(content.get(key), dict)]
        if wrapped:
            content = wrapped[0]
        else:
            content = next(iter(content.values())) if len(content) == 1 else None
    if not isinstance(content, dict):
        raise AdapterError("it contains no state dict. Use the file that holds the model's weights")
    return content


def _has_tensors(content: Mapping[object, object]) -> bool:
    return any(isinstance(value, Tensor) for value in content.values())


def _check_plain(key: str, tensor: Tensor) -> None:
    on_cpu = tensor.device.type == "cpu"
    plain = on_cpu and tensor.layout == torch.strided and not tensor.is_quantized
    # A few bytes that claim to be a large tensor would fill the memory once they are copied.
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise AdapterError(
            f"{quoted(key)} is no plain tensor with numbers of its own. {DOWNLOAD_AGAIN}"
        )
