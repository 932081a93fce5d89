"""One attention call: everything but q, k, v. Made once by the host, and handed through whole."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .block_layout import TokenLayout
from .rope import RopeTable


class LayerInputs(NamedTuple):
    """What a host knows of a layer besides q, k, v; None where it does not."""

    x: Tensor | None = None  # (B, L, H*D): the hidden state that enters the attention
    rope: RopeTable | None = None  # of the video's tokens
    # The model's own gate of VSA's coarse branch: x -> (B, L, H*D).
    gate: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class AttentionCall:
    """Where the tokens of one self-attention call lie, and where in a sampling run it stands.

    layer and conditioning name what may be remembered for whom: conditioning is ((key, batch rows),
    ...) in batch order, empty for one that has the whole batch. step of num_steps: place in the
    whole sampling schedule. sigma: 1 = pure noise. window: which frames of a longer video these
    tokens are. scale: of the softmax, 1 / sqrt(head_dim) when None.
    """

    layout: TokenLayout
    layer: Hashable = 0
    step: int = 0
    num_steps: int = 1
    sigma: float | None = None
    conditioning: tuple[tuple[Hashable, int], ...] = ()
    window: Hashable = ()
    scale: float | None = None
    inputs: LayerInputs = LayerInputs()

    def softmax_scale(self, head_dim: int) -> float:
        return head_dim**-0.5 if self.scale is None else self.scale

    def conditionings(self, batch: int) -> list[tuple[Hashable, slice]]:
        """Each conditioning's key with its rows of the batch.

        Raises ValueError where they do not add up to the batch.
        """
        if not self.conditioning:
            return [("all", slice(0, batch))]
        found, start = [], 0
        for key, count in self.conditioning:
            found.append((key, slice(start, start + count)))
            start += count
        if start != batch:
            raise ValueError(
                f"conditioning {self.conditioning} does not add up to a batch of {batch}"
            )
        return found

    @property
    def video(self) -> slice:
        """The video's tokens in the sequence."""
        return self.layout.video
