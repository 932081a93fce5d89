"""What is trained on where nobody brings videos: the teacher's own, kept for a while.

And the table: how many blocks heads keep at which noise, found out in short sparse runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sample
import folder_paths
import torch
import torch.distributed as dist
from torch import Tensor

from ...attention.adapters import Adapter, AdapterError, open_safetensors, write_safetensors
from ...attention.learned import mean_adapter
from ...training.crowd import SHARDED, rank_and_size
from ..patching.patch import last_learned, makes_own_steps, silent
from .distillation import Trajectory

logger = logging.getLogger(__name__)

TABLE_RUNS = 2  # sparse runs that a table is the mean of
PARTS = ("states", "video")  # of a trajectory
AHEAD = 10_000  # seeds of those runs, beyond those of the videos
CACHE = "ropeslr_training"  # in ComfyUI's temp folder, which is emptied when it starts
NOT_KEPT = "RoPeSLR: the videos to learn from could not be kept for the next run: %s"


@dataclass(frozen=True)
class Use:
    """How the LoRA will be sampled with. prompts: CONDITIONINGs; blank: an empty latent."""

    sampler: Any
    sigmas: Tensor
    cfg: float
    prompts: Sequence[list]
    negative: list | None
    blank: Tensor
    mask: Tensor | None = None

    def numbered(self, model: Any, number: int, seed: int) -> Trajectory:
        """Video `number` of those that a MODEL makes by itself, prompt after prompt."""
        return self.sample(model, number % len(self.prompts), seed + number)

    def sample(self, model: Any, prompt: int, seed: int, start: Tensor | None = None) -> Trajectory:
        """What the sampler goes through: from noise, or from a finished video with noise on it."""
        latent = self.blank if start is None else start
        positive = self.prompts[prompt]
        seed %= 2**63
        levels = [float(each) for each in self.sigmas]
        states: dict[float, Tensor] = {}

        def note(step: int, _: Tensor, x: Tensor, total: int) -> None:
            if step < len(levels) - 1:
                states[levels[step]] = x.detach()[0].to("cpu", torch.float16)

        made = comfy.sample.sample_custom(
            model,
            comfy.sample.prepare_noise(latent, seed),
            self.cfg,
            self.sampler,
            self.sigmas,
            positive,
            positive if self.negative is None else self.negative,
            latent,
            noise_mask=self.mask,
            callback=note,
            disable_pbar=True,
            seed=seed,
        )
        video = made.cpu().float()
        if not states or makes_own_steps(self.sampler):  # at levels nobody tells
            return Trajectory.unknown(video)
        return Trajectory(tuple(states), torch.stack(list(states.values())), video)


def digest(*things: Any) -> str:
    """A hash of tensors and what can be printed, nested in lists and dictionaries."""
    found = hashlib.sha256()

    def add(thing: Any) -> None:
        if isinstance(thing, Tensor):
            found.update(str((tuple(thing.shape), thing.dtype)).encode())
            found.update(thing.detach().float().cpu().contiguous().numpy().tobytes())
        elif isinstance(thing, dict):
            for key in sorted(thing, key=str):
                add(str(key))
                add(thing[key])
        elif isinstance(thing, (list, tuple)):
            for each in thing:
                add(each)
        elif thing is None or isinstance(thing, (str, int, float, bool, bytes)):
            found.update(repr(thing).encode())
        else:  # a ControlNet, for one: its own identity says nothing that lasts
            found.update(type(thing).__name__.encode())

    add(list(things))
    return found.hexdigest()[:32]


def own_samples(
    model: Any, use: Use, count: int, seed: int, step: Callable[[int], None]
) -> list[Trajectory]:
    """How a dense MODEL makes videos, prompt after prompt; made once for the same input.

    Processes that train together make a share each. step: told how many are done; it may raise.
    """
    rank, size = (0, 1) if SHARDED.get() else rank_and_size()
    path = _place(model, use, count, seed)
    kept = None if size > 1 or SHARDED.get() else _read(path, count)
    if kept is not None:
        return kept
    own = {}
    for index in range(rank, count, size):
        step(index)
        own[index] = use.numbered(model, index, seed)
    if size > 1:
        shares: list[Any] = [None] * size
        dist.all_gather_object(shares, own)
        own = {index: each for share in shares for index, each in share.items()}
    made = [own[index] for index in range(count)]
    if rank_and_size()[0] == 0:
        _keep(path, made)
    return made


def own_videos(
    model: Any, use: Use, count: int, seed: int, numbers: Iterable[int]
) -> dict[int, Tensor]:
    """Some of these videos, by their numbers; made anew where none are kept."""
    kept = _read(_place(model, use, count, seed), count)
    return {
        number: (use.numbered(model, number, seed) if kept is None else kept[number]).video
        for number in numbers
    }


def _place(model: Any, use: Use, count: int, seed: int) -> Path:
    """The file of what a MODEL makes: another where anything is different."""
    identity = str(model.patches_uuid), sorted(model.object_patches)
    sampler = getattr(use.sampler, "sampler_function", use.sampler)
    name = getattr(sampler, "__qualname__", type(sampler).__name__)
    options = getattr(use.sampler, "extra_options", {})
    how = use.sigmas, use.cfg, use.prompts, use.negative, use.blank, use.mask
    key = digest(identity, name, options, *how, count, seed)
    return Path(folder_paths.get_temp_directory()) / CACHE / f"{key}.safetensors"


def _read(path: Path, count: int) -> list[Trajectory] | None:
    try:
        with contextlib.closing(open_safetensors(path)) as file:
            levels = tuple(file.read("levels").tolist())
            return [
                Trajectory(levels, *(file.read(f"{part}.{index}").clone() for part in PARTS))
                for index in range(count)
            ]
    except (AdapterError, OSError):  # not there, or not whole
        return None


def _keep(path: Path, made: Sequence[Trajectory]) -> None:
    """Of all that was ever made, the last set stays."""
    try:
        tensors = {
            f"{part}.{index}": getattr(each, part)
            for index, each in enumerate(made)
            for part in PARTS
        }
        levels = torch.tensor(made[0].levels, dtype=torch.float64)
        write_safetensors({"levels": levels, **tensors}, path)
        for other in path.parent.glob("*.safetensors"):
            if other != path:
                other.unlink()
    except OSError as error:
        logger.warning(NOT_KEPT, error)


def learn_table(
    sparse: Any,
    use: Use,
    starts: Sequence[tuple[int, Tensor | None]],
    seed: int,
    step: Callable[[int], None],
) -> Adapter | None:
    """What sparse runs of a patched MODEL learn; None where its method learns nothing.

    starts: prompt and finished video of each run; without a video it starts from noise.
    """
    found = []
    for number, (prompt, start) in enumerate(starts):
        step(number)
        model = silent(sparse)
        use.sample(model, prompt, seed + AHEAD + number, start)
        learned = last_learned(model)
        if learned is None:
            return None
        found.append(learned)
    table = mean_adapter(found)
    return table if table is not None and table.has("allocation") else None
