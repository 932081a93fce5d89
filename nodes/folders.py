"""The folder models/ropeslr in ComfyUI's lists, and the names that a new file in it can have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from ..attention.adapters import PARTIAL_BYTES, quoted

ADAPTERS = "ropeslr"
CHECKPOINTS = "diffusion_models"
LORAS = "loras"
SUFFIX = ".safetensors"
EXTENSIONS = {SUFFIX}

# A name that is taken gets a number: NAME_00002 to NAME_99999.
NUMBER = "_{:05}"
MAX_NUMBER = 99_999

# File systems take names of 255 bytes. The longest that a save needs is that of the folder in
# which NAME_99999.safetensors is written, or of that file.
MAX_NAME_BYTES = 255
MAX_STEM_BYTES = MAX_NAME_BYTES - len(NUMBER.format(MAX_NUMBER)) - max(PARTIAL_BYTES, len(SUFFIX))

# Windows takes these for devices, with any ending; a file may be copied there.
DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789\u00b9\u00b2\u00b3"
}
FORBIDDEN = set('<>:"|?*') | {chr(code) for code in range(32)}


def register() -> None:
    """Add models/ropeslr; paths that an extra_model_paths.yaml gave stay, and stay first."""
    known = ADAPTERS in folder_paths.folder_names_and_paths
    folder = os.path.join(folder_paths.models_dir, ADAPTERS)
    folder_paths.add_model_folder_path(ADAPTERS, folder)
    paths, extensions = folder_paths.folder_names_and_paths[ADAPTERS]
    # An empty set would list every file.
    if not known or not extensions:
        folder_paths.folder_names_and_paths[ADAPTERS] = (paths, set(EXTENSIONS))


def tuning_file() -> Path:
    """Where RoPeSLR Doctor keeps what it measured: in ComfyUI's user folder."""
    return Path(folder_paths.get_user_directory()) / "ropeslr" / "tuning.json"


def free_path(folder: str, name: str) -> Path:
    """A path in a model folder where no file is: `name`, or `name` with a number.

    Raises ValueError where a file of this name cannot be saved, or would lie outside the folder.
    """
    return next(path for path in numbered_paths(folder, name) if not path.exists())


def numbered_paths(folder: str, name: str) -> Iterator[Path]:
    """`name` in a model folder, then `name` with every number. Raises ValueError as `free_path`."""
    base = Path(folder_paths.get_folder_paths(folder)[0]).resolve()
    parts = name.strip().removesuffix(SUFFIX).replace("\\", "/").split("/")
    why = _why_not(parts) or _why_not_there(base, parts)
    if why:
        raise ValueError(
            f"The name {quoted(name)} cannot be used: {why}. Write a plain file name, or "
            f"subfolder/name; it is saved in {base}."
        )
    path = base.joinpath(*parts)
    for number in range(1, MAX_NUMBER + 1):
        suffix = NUMBER.format(number) if number > 1 else ""
        yield path.with_name(f"{path.name}{suffix}{SUFFIX}")
    raise ValueError(
        f"{path} and {MAX_NUMBER - 1:,} numbered names are taken; choose another name."
    )


def _why_not(parts: list[str]) -> str | None:
    if parts == [""]:
        return "it is empty"
    for part in parts:
        if part in ("", ".", ".."):
            return f"it has the part {quoted(part)}"
        if FORBIDDEN & set(part):
            return 'it has a control character or one of < > : " | ? *'
        if part[-1] in ". ":
            return "a part of it ends with a dot or a space"
        if part.split(".")[0].rstrip().lower() in DEVICES:
            return f"{quoted(part)} is a device on Windows"
        try:
            size = len(part.encode("utf-8"))
        except UnicodeEncodeError:
            return "it contains half of a character (a lone surrogate)"
        if size > MAX_STEM_BYTES:
            return f"a part of it is {size:,} bytes long; at most {MAX_STEM_BYTES} are possible"
    return None


def _why_not_there(base: Path, parts: list[str]) -> str | None:
    """What the file system says about the longest path that a save may need."""
    longest = parts[-1] + "x" * (MAX_NAME_BYTES - MAX_STEM_BYTES)
    try:
        os.lstat(base.joinpath(*parts[:-1], longest))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return "its subfolder is a file"
    except OSError as error:
        return f"the file system does not take it ({error.strerror})"
    return None
