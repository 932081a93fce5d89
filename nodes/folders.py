"""The folder models/ropeslr in ComfyUI's lists, beside whatever a person has set up under that name."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

ADAPTERS = "ropeslr"
CHECKPOINTS = "diffusion_models"
EXTENSIONS = {".safetensors"}


def register() -> None:
    """Add models/ropeslr; paths that an extra_model_paths.yaml gave already stay, and stay first."""
    known = ADAPTERS in folder_paths.folder_names_and_paths
    folder_paths.add_model_folder_path(ADAPTERS, os.path.join(folder_paths.models_dir, ADAPTERS))
    paths, extensions = folder_paths.folder_names_and_paths[ADAPTERS]
    if not known or not extensions:         # an empty set would list every file
        folder_paths.folder_names_and_paths[ADAPTERS] = (paths, set(EXTENSIONS))


def free_path(folder: str, name: str) -> Path:
    """A path below a model folder that nothing stands at: `name`, or with a number behind it.

    Raises ValueError where the name is empty or leads out of the folder.
    """
    base = Path(folder_paths.get_folder_paths(folder)[0]).resolve()
    name = name.strip().removesuffix(".safetensors")
    parts = name.replace("\\", "/").split("/")
    bad = set('<>:"|?*') | {chr(i) for i in range(32)}
    if not name or any(part in ("", ".", "..") or bad & set(part) or part[-1] in ". " for part in parts):
        raise ValueError(
            f"The name {name!r} cannot be used. Write a plain file name, or subfolder/name; it is saved in {base}."
        )
    path = base.joinpath(*parts)
    for number in range(1, 100_000):
        candidate = path.with_name(path.name + ("" if number == 1 else f"_{number:05}") + ".safetensors")
        if not candidate.exists():
            return candidate
    raise ValueError(f"{path} and 99,998 numbered names are taken")
