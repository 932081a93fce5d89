"""The header of an adapter: facts about the model and the training that its weights belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..plan import BLOCK, KEY_BLOCKS, QUERY_BLOCKS, TRAINED_METHODS
from ..rope import rope_axes
from .text import quoted, shown

FORMAT = "ropeslr-adapter"
VERSION = "1"

# Of layers, heads, channels and rank: a number that no real file comes near.
LIMIT = 4096
# Of characters in one header entry.
MAX_ENTRY = 1 << 16

ACTS = ("softmax", "elu")
PES = ("fourier", "table", "none")
FUSIONS = ("mass", "rms")
BLOCK_ORDERS = ("raster", "cube")

CHOICES: Mapping[str, tuple[str, ...]] = {
    "method": TRAINED_METHODS,
    "block_order": BLOCK_ORDERS,
    "act": ACTS,
    "pe": PES,
    "fusion": FUSIONS,
}
# The one value that a method can run with, where CHOICES has more.
FIXED: Mapping[str, Mapping[str, str]] = {
    "ropeslr": {},
    "rola": {"fusion": "rms"},
    "sla": {"fusion": "mass", "act": "softmax"},
}
REQUIRED = ("method", "num_layers", "num_heads", "head_dim", "rank")

INTEGERS = ("num_layers", "num_heads", "head_dim", "rank", "block_q", "block_k", "steps")
REALS = ("sparsity",)
INTEGER_LISTS = ("pe_grid", "rope_axes", "grid")
REAL_LISTS = ("noise_levels",)


class AdapterError(ValueError):
    """A file that cannot be used: what was found, what was expected, what to do."""


@dataclass(frozen=True)
class AdapterInfo:
    """The facts in an adapter's header, checked on construction: an AdapterError names the field.

    sparsity: the sparsity that the weights were trained at.
    noise_levels: the flow-matching noise (1 = noise) of each noise bin, ascending.
    pe_grid: the sides (T, height, width) of `table` positions.
    grid, steps: the video (T, height, width in tokens) and the length of the run that they were
        learned in; () and 0 for weights of a training.
    fusion: "mass" weighs the low-rank branch by softmax mass; "rms" is RoLA's additive form with
        SiLU features.

    >>> AdapterInfo("sla", num_layers=30, num_heads=12, head_dim=128, rank=0).block_q
    64
    """

    method: str
    num_layers: int
    num_heads: int
    head_dim: int
    rank: int
    base_model: str = "unknown"
    block_q: int = BLOCK
    block_k: int = BLOCK
    block_order: str = "cube"
    sparsity: float = 0.9
    act: str = "softmax"
    pe: str = "none"
    pe_grid: tuple[int, ...] = ()
    noise_levels: tuple[float, ...] = ()
    fusion: str = "mass"
    created_by: str = "ComfyUI-RoPeSLR"
    source: str = ""
    grid: tuple[int, ...] = ()
    steps: int = 0

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_sizes()
        self._check_training()

    def _check_choices(self) -> None:
        for name, options in CHOICES.items():
            value = getattr(self, name)
            if value not in options:
                raise AdapterError(
                    f"{name} is {quoted(value)}; expected one of: {', '.join(options)}"
                )
        for name, expected in FIXED[self.method].items():
            value = getattr(self, name)
            if value != expected:
                raise AdapterError(
                    f"{name} is {quoted(value)}; {self.method} runs with {quoted(expected)} only"
                )

    def _check_sizes(self) -> None:
        for name in ("num_layers", "num_heads", "head_dim"):
            self._check_integer(name, minimum=1)
        self._check_integer("rank", minimum=0)
        if self.method == "rola" and (self.rank < 2 or self.rank % 2):
            raise AdapterError(
                f"rank is {self.rank}; rola rotates pairs of features, so expected an even number "
                "of at least 2"
            )
        if self.head_dim % 2:
            raise AdapterError(f"head_dim is {self.head_dim}; RoPE needs an even number")
        for name, known in (("block_q", QUERY_BLOCKS[1:]), ("block_k", KEY_BLOCKS[1:])):
            if str(getattr(self, name)) not in known:
                found = shown(getattr(self, name))
                raise AdapterError(f"{name} is {found}; expected one of: {', '.join(known)}")

    def _check_integer(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or not minimum <= value <= LIMIT:
            raise AdapterError(
                f"{name} is {shown(value)}; expected a whole number from {minimum} to {LIMIT}"
            )

    def _check_training(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise AdapterError(f"sparsity is {self.sparsity}; expected 0 or more and less than 1")
        if self.pe == "table":
            sides = self.pe_grid
            if len(sides) != 3 or not all(1 <= side <= LIMIT for side in sides):
                raise AdapterError(
                    f"pe_grid is {shown(sides)}; pe 'table' needs three sides (T, height, width)"
                )
        if self.grid and (len(self.grid) != 3 or not all(1 <= side for side in self.grid)):
            raise AdapterError(
                f"grid is {shown(self.grid)}; expected three sides (T, height, width) or none"
            )
        if self.steps < 0:
            raise AdapterError(f"steps is {shown(self.steps)}; expected 0 or more")
        levels = self.noise_levels
        rising = all(low < high for low, high in zip(levels, levels[1:]))
        if not rising or not all(0.0 <= level <= 1.0 for level in levels):
            raise AdapterError(
                f"noise_levels are {shown(levels)}; expected rising numbers from 0 to 1"
            )

    @property
    def rope_axes(self) -> tuple[int, ...]:
        """Channels of a head that RoPE gives to time, height and width."""
        return tuple(2 * pairs for pairs in rope_axes(self.head_dim))

    def header(self) -> dict[str, str]:
        """The facts as a safetensors `__metadata__`, which holds text only."""
        entries = {"format": FORMAT, "format_version": VERSION}
        entries["rope_axes"] = _written(self.rope_axes)
        for field in fields(self):
            entries[field.name] = _written(getattr(self, field.name))
        return entries

    @classmethod
    def from_header(cls, header: Mapping[str, str]) -> AdapterInfo:
        """Read a `__metadata__`. Unknown entries are ignored; wrong or missing ones are refused."""
        _check_format(header)
        values: dict[str, Any] = {}
        for field in fields(cls):
            if field.name in header:
                values[field.name] = _parsed(field.name, header[field.name])
            elif field.name in REQUIRED:
                raise AdapterError(f"the header has no {field.name}")
        info = cls(**values)
        if "rope_axes" in header:
            found = _parsed("rope_axes", header["rope_axes"])
            if found != info.rope_axes:
                raise AdapterError(
                    f"rope_axes are {shown(found)}; expected {info.rope_axes} for a head_dim of "
                    f"{info.head_dim}"
                )
        return info


def _check_format(header: Mapping[str, str]) -> None:
    found = header.get("format")
    if found != FORMAT:
        named = "no format" if found is None else f"the format {quoted(found)}"
        raise AdapterError(f"it is not an adapter: the header has {named}; expected '{FORMAT}'")
    version = header.get("format_version")
    if version != VERSION:
        named = "missing" if version is None else quoted(version)
        raise AdapterError(
            f"format_version is {named}; this version reads '{VERSION}'. Update ComfyUI-RoPeSLR"
        )


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)


def _parsed(name: str, text: str) -> int | float | str | tuple[int, ...] | tuple[float, ...]:
    if len(text) > MAX_ENTRY:
        raise AdapterError(
            f"{name} in the header is {len(text):,} characters long; expected at most {MAX_ENTRY:,}"
        )
    try:
        if name in INTEGERS:
            return int(text)
        if name in REALS:
            return float(text)
        if name in INTEGER_LISTS:
            return tuple(int(each) for each in text.split(",") if each)
        if name in REAL_LISTS:
            return tuple(float(each) for each in text.split(",") if each)
    except ValueError:
        raise AdapterError(
            f"{name} in the header is {quoted(text)}, which is not a number"
        ) from None
    return text
