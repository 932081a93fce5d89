"""The files of a training: the LoRA, the adapter that belongs to it, and what to go on from.

models/loras/NAME_100_steps.safetensors     on the way, the last few
models/loras/NAME.safetensors               at the end: that of the lowest held-out error
models/ropeslr/NAME.safetensors             the table and calibration that belong to it
models/ropeslr/training/NAME.state          everything to go on with
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...attention.adapters import Adapter, read_adapter, write_adapter, write_safetensors
from ...training import State, read_state, write_state
from ..folders import ADAPTERS, LORAS, numbered_paths

HEADER = "ropeslr_lora"
USE = "ropeslr_use"
NO_ROOM = (
    "{folder} has {free:.1f} GB left, and this training may need {needed:.1f} GB. Make room, or "
    "lower rank or keep_last."
)


@dataclass(frozen=True)
class Files:
    """Where one training keeps what it makes."""

    loras: Path
    adapters: Path
    stem: str

    @property
    def state(self) -> Path:
        return self.adapters / "training" / f"{self.stem}.state"

    @property
    def lora(self) -> Path:
        return self.loras / f"{self.stem}.safetensors"

    @property
    def adapter(self) -> Path:
        return self.adapters / f"{self.stem}.safetensors"

    def on_the_way(self, step: int) -> Path:
        """Of the LoRA after a step."""
        return self.loras / f"{self.stem}_{step}_steps.safetensors"

    def taken(self) -> bool:
        """Whether any of the names is in use."""
        return self.state.exists() or self.lora.exists() or self.adapter.exists()

    def check_room(self, needed: int) -> None:
        """Raise OSError where a disk has less than so many bytes left."""
        for folder in (self.loras, self.adapters):
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise OSError(NO_ROOM.format(folder=folder, free=free / 1e9, needed=needed / 1e9))

    def save_adapter(self, adapter: Adapter | None, sentence: str) -> None:
        """Write the table, once."""
        if adapter is not None and not self.adapter.exists():
            info = replace(adapter.info, source=sentence)
            write_adapter(replace(adapter, info=info), self.adapter)

    def read_adapter(self) -> Adapter | None:
        """What `save_adapter` wrote."""
        return read_adapter(self.adapter) if self.adapter.exists() else None

    def save_on_the_way(
        self, state: State, tensors: Mapping[str, Tensor], facts: LoraFacts, keep: int
    ) -> None:
        """What to go on with, and the LoRA as it is; of earlier ones the last `keep` - 1 stay."""
        write_state(state, self.state)
        if state.step:
            write_safetensors(dict(tensors), self.on_the_way(state.step), facts.header())
        saved = self._saved()
        for step in sorted(saved)[: max(0, len(saved) - keep)]:
            with contextlib.suppress(OSError):
                saved[step].unlink()

    def _saved(self) -> dict[int, Path]:
        prefix, suffix = f"{self.stem}_", "_steps.safetensors"
        names = [path.name for path in self.loras.glob(f"*{suffix}")]
        steps = [n[len(prefix) : -len(suffix)] for n in names if n.startswith(prefix)]
        return {int(step): self.on_the_way(int(step)) for step in steps if step.isdecimal()}


@dataclass(frozen=True)
class LoraFacts:
    """What a LoRA was trained with, in its file's header."""

    method: str
    sparsity: float
    allocation: str
    key_block: int
    query_block: int
    block_order: str
    adapter: str = ""  # the file's, where there is a table
    model: str = ""

    def sentence(self) -> str:
        """For a person who looks into the file."""
        table = f", with the table in models/ropeslr/{self.adapter}" if self.adapter else ""
        return (
            f"Trained for RoPeSLR Sparse Attention on {self.model}: method {self.method}, sparsity "
            f"{self.sparsity:g} (it computes {100 * (1 - self.sparsity):.0f} % of the blocks), "
            f"allocation {self.allocation}{table}. Use it with the same."
        )

    def header(self) -> dict[str, str]:
        """Of a safetensors file."""
        return {HEADER: json.dumps(vars(self)), USE: self.sentence()}

    @classmethod
    def from_header(cls, header: Mapping[str, str]) -> LoraFacts | None:
        """What a file says; None where it was not made here."""
        try:
            return cls(**json.loads(header[HEADER]))
        except (KeyError, TypeError, ValueError):
            return None


def claim(name: str, facts: Mapping[str, Any], resume: bool) -> tuple[Files, State | None]:
    """Files that a training may use, and the state of an earlier one to go on with.

    Earlier: of the same name and facts. A name that is in use by anything else gets a number.
    Raises ValueError for one that no file can have.
    """
    loras, adapters = (numbered_paths(each, name) for each in (LORAS, ADAPTERS))
    for lora, adapter in zip(loras, adapters):
        files = Files(lora.parent, adapter.parent, lora.stem)
        state = read_state(files.state) if resume else None
        if not files.taken() or (state is not None and not state.differences(facts)):
            return files, state
    raise AssertionError("numbered_paths raises at its end")
