"""What a person asked for: one frozen object, validated once, that everything below only reads."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

METHODS = ("auto", "ropeslr", "rola", "sla", "adaspa", "top-k", "top-k plain")
TRAINED_METHODS = ("ropeslr", "rola", "sla")                                  # adapters exist for these
CALIBRATE = ("auto", "first step", "every step", "off", "on top")
SLA_VARIANTS = ("released", "paper")
AUTO = -1
BACKENDS = ("auto", "triton", "pytorch", "dense")
BLOCK_ORDERS = ("auto", "raster", "cube")
MAX_SPARSITY = 0.98
MAX_RANK = 128
MAX_CALIBRATE_ROWS = 4096
CALIBRATE_EVERY = 5
BLOCK = 64


@dataclass(frozen=True)
class SparsePlan:
    """Settings of sparse attention for one model.

    sparsity: share of key blocks that is not computed. rank: channels of the background per head, 0 = all that there
    are. start_percent, end_percent: the part of the sampling schedule that runs sparse, which may be empty.
    dense_first_steps (-1 = auto), dense_last_steps: steps of the whole schedule that stay dense. dense_layers: layers
    that stay dense.
    Every field is checked on construction; a ValueError names the field, what was found and what was expected.
    `resolve` replaces every "auto" by what it means.
    """

    method: str = "auto"
    sparsity: float = 0.90
    rank: int = 0
    start_percent: float = 0.0
    end_percent: float = 1.0
    dense_first_steps: int = AUTO
    dense_last_steps: int = 0
    dense_layers: frozenset[int] = field(default_factory=frozenset)
    calibrate: str = "auto"
    calibrate_rows: int = 128
    backend: str = "auto"
    block_order: str = "auto"
    min_tokens: int = 4096
    keep_diagonal: bool = False
    keep_first_frame: bool = False
    strict: bool = False
    verbose: bool = False
    sla_variant: str = "released"

    def __post_init__(self) -> None:
        for name, options in (
            ("method", METHODS), ("calibrate", CALIBRATE), ("backend", BACKENDS), ("block_order", BLOCK_ORDERS),
            ("sla_variant", SLA_VARIANTS),
        ):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of: {', '.join(options)}.")
        for name, low, high in (
            ("sparsity", 0.0, MAX_SPARSITY), ("rank", 0, MAX_RANK), ("start_percent", 0.0, 1.0),
            ("end_percent", 0.0, 1.0), ("dense_first_steps", AUTO, math.inf), ("dense_last_steps", 0, math.inf),
            ("calibrate_rows", 1, MAX_CALIBRATE_ROWS), ("min_tokens", 0, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high:                                      # also catches NaN
                bounds = f"from {low} to {high}" if high < math.inf else f"{low} or more"
                raise ValueError(f"{name} is {value}; it must be {bounds}.")
        if any(layer < 0 for layer in self.dense_layers):
            raise ValueError(f"dense_layers has {min(self.dense_layers)}; layers are counted from 0.")

    def resolve(self, trained: str | None = None, trained_order: str = "cube") -> SparsePlan:
        """The same plan without an "auto", for an adapter of the method `trained` (None = no adapter).

        Raises ValueError when the plan asks for a method that the adapter was not trained for.
        """
        method = self.method if self.method != "auto" else trained or "ropeslr"
        if trained and method != trained and method in TRAINED_METHODS:
            raise ValueError(
                f"method is {method}, but the adapter was trained for {trained}. Set method to auto or {trained}, or "
                "disconnect the adapter."
            )
        fitted = trained if method == trained else None
        order = self.block_order
        if order == "auto":                 # training-free methods gain from compact blocks, weights know their own
            order = trained_order if fitted else "raster" if method in ("rola", "sla") else "cube"
        first = self.dense_first_steps
        if first == AUTO:                   # the first step decides the layout; weights trained sparse need no help
            first = 0 if fitted in ("rola", "sla") or method == "adaspa" else 1       # AdaSpa warms up by itself
        calibrate = self.calibrate
        if calibrate == "auto" and fitted:  # an adapter's values stand
            calibrate = "off"
        return replace(self, method=method, block_order=order, dense_first_steps=first, calibrate=calibrate)

    def kept_blocks(self, blocks: int) -> int:
        """Key blocks that each row keeps by score, out of `blocks`."""
        return kept_blocks(self.sparsity, blocks)


def kept_blocks(sparsity: float, blocks: int) -> int:
    """Key blocks that a row keeps out of `blocks`: at least one."""
    return max(1, math.floor((1.0 - sparsity) * blocks + 1e-6))               # 1 - 0.9 is a little less than 0.1


def parse_layers(text: str) -> frozenset[int]:
    """Layer numbers from a list such as "0, 1, 38-39"; an empty text is no layer.

    Raises ValueError naming every piece that cannot be read.
    """
    layers: set[int] = set()
    unreadable: list[str] = []
    for piece in (part.strip() for part in text.split(",")):
        ends = [end.strip() for end in piece.split("-")]
        if not piece:
            continue
        if len(ends) > 2 or not all(end.isascii() and end.isdigit() and len(end) <= 4 for end in ends):
            unreadable.append(piece)
        elif int(ends[0]) > int(ends[-1]):
            unreadable.append(piece)
        else:
            layers.update(range(int(ends[0]), int(ends[-1]) + 1))
    if unreadable:
        raise ValueError(
            f"dense_layers is {text!r}, where {', '.join(map(repr, unreadable))} cannot be read; "
            'write layer numbers and rising ranges, as in "0, 1, 38-39".'
        )
    return frozenset(layers)
