"""The plan: what a person asked for, validated once and resolved once; all below only reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from ..kernels.types import blocks_needed

if TYPE_CHECKING:
    from .adapters import Adapter

METHODS = ("auto", "ropeslr", "rola", "sla", "adaspa", "top-k", "top-k plain", "vsa")
TRAINED_METHODS = ("ropeslr", "rola", "sla")  # adapters exist for these
NEED_WEIGHTS = ("rola", "sla")
OF_THE_MODEL = "vsa"  # whose weights are in the model itself, where it has any
CALIBRATE = ("auto", "first step", "every step", "off", "refine")
SLA_VARIANTS = ("released", "paper")
AUTO = -1
BACKENDS = ("auto", "triton", "pytorch", "dense")
BLOCK_ORDERS = ("auto", "raster", "cube")
MAX_SPARSITY = 0.98
MAX_RANK = 128
MAX_CALIBRATE_ROWS = 4096
CALIBRATE_EVERY = 5
FEW_STEPS = 8  # a step of a run this short is a large one
BLOCK = 64
FINE = 16  # tokens of a key block where nothing asks for BLOCK
KEY_BLOCKS = ("auto", "16", "32", "64")
QUERY_BLOCKS = ("auto", "64", "128")
PRECISIONS = ("auto", "16-bit", "8-bit")
ALLOCATIONS = ("auto", "uniform")
TARGETS = ("sparsity", "error")
TRAININGS = ("dense", "sparse")
ALLOCATED = ("ropeslr", "top-k", "top-k plain")  # methods whose heads find their own share
MAX_LAYERS_TEXT = 1000  # characters of dense_layers


@dataclass(frozen=True)
class _Settings:
    """The settings themselves; the node's tooltips explain each."""

    method: str = "auto"
    sparsity: float = 0.90
    rank: int = 0
    start_percent: float = 0.0
    end_percent: float = 1.0
    dense_first_steps: int = AUTO
    dense_last_steps: int = 0
    dense_layers: frozenset[int] = field(default_factory=frozenset)
    calibrate: str = "auto"
    calibrate_rows: int = 512
    backend: str = "auto"
    block_order: str = "auto"
    min_tokens: int = 4096
    keep_diagonal: bool = False
    keep_first_frame: bool = False
    strict: bool = False
    verbose: bool = False
    sla_variant: str = "released"
    key_block: str = "auto"
    allocation: str = "auto"
    target: str = "sparsity"
    error: float = 0.05
    query_block: str = "auto"
    precision: str = "auto"
    training: str = "dense"


CHOICES = {
    "method": METHODS,
    "calibrate": CALIBRATE,
    "backend": BACKENDS,
    "block_order": BLOCK_ORDERS,
    "sla_variant": SLA_VARIANTS,
    "key_block": KEY_BLOCKS,
    "query_block": QUERY_BLOCKS,
    "precision": PRECISIONS,
    "allocation": ALLOCATIONS,
    "target": TARGETS,
    "training": TRAININGS,
}
RANGES = {
    "sparsity": (0.0, MAX_SPARSITY),
    "rank": (0, MAX_RANK),
    "start_percent": (0.0, 1.0),
    "end_percent": (0.0, 1.0),
    "dense_first_steps": (AUTO, math.inf),
    "dense_last_steps": (0, math.inf),
    "calibrate_rows": (1, MAX_CALIBRATE_ROWS),
    "min_tokens": (0, math.inf),
    "error": (0.0, 1.0),
}


@dataclass(frozen=True)
class SparsePlan(_Settings):
    """Settings of sparse attention for one model, as a person set them.

    sparsity: share of key blocks that is not computed. rank: channels of the background per head, 0
    = all that there are. start_percent, end_percent: the part of the sampling schedule that runs
    sparse, which may be empty. dense_first_steps (-1 = auto), dense_last_steps: steps of the whole
    schedule that stay dense. dense_layers: layers that stay dense. key_block: tokens of a key
    block. query_block: queries that keep the same key blocks. allocation: "auto" lets layers and
    heads share what sparsity leaves, "uniform" gives all the same. target "error": as many blocks
    as keep the outputs' lost energy at `error` of theirs. precision: of keys and values; "auto": 8
    bits where they were measured to be faster, for the layers that lose little by it. training: how
    attention runs where gradients are required.

    Every field is checked on construction; a ValueError names the field, what was found and what
    was expected. `resolve` replaces every "auto" by what it means.
    """

    def __post_init__(self) -> None:
        for name, options in CHOICES.items():
            if getattr(self, name) not in options:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of: {', '.join(options)}."
                )
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:  # also catches NaN
                bounds = f"from {low} to {high}" if high < math.inf else f"{low} or more"
                raise ValueError(f"{name} is {value}; it must be {bounds}.")
        if any(layer < 0 for layer in self.dense_layers):
            raise ValueError(
                f"dense_layers has {min(self.dense_layers)}; layers are counted from 0."
            )

    def resolve(self, adapter: Adapter | None = None) -> ResolvedPlan:
        """The plan as it runs, with the adapter where it is the method's own.

        Raises ValueError when the plan asks for a method that the adapter was not trained for.
        """
        trained = None if adapter is None else adapter.info.method
        method = self.method if self.method != "auto" else trained or "ropeslr"
        if trained and method != trained and method in TRAINED_METHODS:
            raise ValueError(
                f"method is {method}, but the adapter was trained for {trained}. Set method to "
                f"auto or {trained}, or disconnect the adapter."
            )
        if method != trained:
            adapter = None
        values = {each.name: getattr(self, each.name) for each in fields(_Settings)}
        values |= {
            "method": method,
            "block_order": self._order(method, adapter),
            "key_block": self._key_block(method, adapter),
            "query_block": self._query_block(method, adapter),
        }
        if method not in ALLOCATED or not (adapter is None or adapter.has("allocation")):
            values["allocation"] = "uniform"  # AdaSpa has a rule of its own; weights know no other
        if values["allocation"] == "uniform" and values["query_block"] == "auto":
            values["query_block"] = str(BLOCK)  # nothing would measure what larger ones cost
        if self.dense_first_steps == AUTO:
            # The first step decides the composition. Weights trained sparse need no help, and
            # AdaSpa is dense until its first search.
            trained_sparse = method == OF_THE_MODEL or (adapter and method in NEED_WEIGHTS)
            values["dense_first_steps"] = 0 if method == "adaspa" or trained_sparse else 1
        if self.calibrate == "auto":
            # What a run has learned is a start: measured, it suits no other prompt as it stands.
            known = "refine" if adapter is not None and adapter.has("allocation") else "off"
            values["calibrate"] = "periodic" if adapter is None else known
        if adapter is not None:
            values["rank"] = self.rank or adapter.use_rank
        return ResolvedPlan(**values, adapter=adapter, asked=self)

    def _order(self, method: str, adapter: Adapter | None) -> str:
        """Training-free methods gain from compact blocks; weights know their own order."""
        if method == OF_THE_MODEL:  # its tiles are part of it
            return "tile"
        if self.block_order != "auto":
            return self.block_order
        if adapter is not None:
            return adapter.info.block_order
        return "raster" if method in NEED_WEIGHTS else "cube"

    def _key_block(self, method: str, adapter: Adapter | None) -> str:
        """Small key blocks choose better; weights know what they were trained with."""
        if method == OF_THE_MODEL:
            return str(BLOCK)
        if self.key_block != "auto":
            return self.key_block
        if adapter is not None:
            return str(adapter.info.block_k)
        return str(FINE if method in ALLOCATED else BLOCK)

    def _query_block(self, method: str, adapter: Adapter | None) -> str:
        if method == OF_THE_MODEL:
            return str(BLOCK)
        if self.query_block != "auto":
            return self.query_block
        if adapter is not None:
            return str(adapter.info.block_q)
        return "auto" if method in ALLOCATED else str(BLOCK)


@dataclass(frozen=True)
class ResolvedPlan(_Settings):
    """A plan as it runs, with the adapter that its method uses. "auto" are only backend, precision,
    and what the run finds out: allocation and, with it, query_block.

    calibrate: "off", "first step", "every step", "periodic" or "refine". asked: what it was before.
    """

    adapter: Adapter | None = None
    asked: SparsePlan = field(default_factory=SparsePlan)

    @property
    def key_tokens(self) -> int:
        """Tokens of a key block."""
        return int(self.key_block)

    @property
    def query_tokens(self) -> int:
        """Queries that keep the same key blocks; where that is open, those of the first steps."""
        return BLOCK if self.query_block == "auto" else int(self.query_block)

    @property
    def allocates(self) -> bool:
        """Whether each layer and head finds its own number of kept blocks during the run."""
        return self.allocation == "auto"

    @property
    def probes(self) -> bool:
        """Whether the run measures what heads need; else an adapter's table says it."""
        return self.allocates and (self.adapter is None or self.calibrates)

    @property
    def probe_interval(self) -> int | None:
        """The most steps after which that number is found anew; None: never."""
        return None if self.calibrate == "first step" else CALIBRATE_EVERY

    @property
    def error_target(self) -> float | None:
        """The share of the outputs' energy that may be lost; None where sparsity is the target."""
        return self.error if self.target == "error" else None

    @property
    def calibrates(self) -> bool:
        return self.calibrate != "off"

    def calibration_interval(self, num_steps: int) -> int | None:
        """Steps after which a calibration is made anew, in a run of so many; None: never."""
        if self.calibrate == "periodic" and num_steps <= FEW_STEPS:
            return 1
        every = {"every step": 1, "periodic": CALIBRATE_EVERY, "refine": CALIBRATE_EVERY}
        return every.get(self.calibrate)

    def by_method(self, method: str) -> ResolvedPlan:
        """The same settings by another method, whose own choices replace those of this one."""
        values = {each.name: getattr(self, each.name) for each in fields(_Settings)}
        values |= {"method": method, "block_order": "auto", "calibrate": "auto", "rank": 0}
        values |= {
            name: getattr(self.asked, name) for name in ("allocation", "key_block", "query_block")
        }
        adapter = self.adapter
        return SparsePlan(**values).resolve(
            adapter if adapter is not None and adapter.info.method == method else None
        )

    def topk(self, blocks: int) -> int:
        """Key blocks that each row keeps by score, out of `blocks` of the video."""
        return topk_of(self.sparsity, blocks)

    def drops_nothing(self, tokens: int) -> bool:
        """Whether every key block of a video of so many tokens is kept."""
        blocks = blocks_needed(tokens, self.key_tokens)
        return self.topk(blocks) >= blocks


def topk_of(sparsity: float, blocks: int) -> int:
    """Key blocks that a row keeps out of `blocks`: at least one."""
    return max(1, math.floor((1.0 - sparsity) * blocks + 1e-6))  # 1 - 0.9 is a little below 0.1


def parse_layers(text: str) -> frozenset[int]:
    """Layer numbers from a list such as "0, 1, 38-39"; an empty text is no layer.

    Raises ValueError naming the pieces that cannot be read.
    """
    if len(text) > MAX_LAYERS_TEXT:
        raise ValueError(
            f"dense_layers is {len(text)} characters long; at most {MAX_LAYERS_TEXT} are read."
        )
    layers: set[int] = set()
    unreadable: list[str] = []
    for piece in (part.strip() for part in text.split(",")):
        if not piece:
            continue
        ends = [end.strip() for end in piece.split("-")]
        numbers = all(end.isascii() and end.isdigit() and len(end) <= 4 for end in ends)
        if len(ends) > 2 or not numbers or int(ends[0]) > int(ends[-1]):
            unreadable.append(piece)
        else:
            layers.update(range(int(ends[0]), int(ends[-1]) + 1))
    if unreadable:
        raise ValueError(
            f"dense_layers is {text!r}, where {', '.join(map(repr, unreadable))} cannot be read; "
            'write layer numbers and rising ranges, as in "0, 1, 38-39".'
        )
    return frozenset(layers)
