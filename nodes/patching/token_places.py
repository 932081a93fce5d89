"""Where the video's tokens lie in the sequence of one attention call, and which text tokens a mask hides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...attention import TokenLayout

HIDDEN = -1e4                               # an additive mask below this leaves nothing


@dataclass(frozen=True)
class TokenPlaces:
    """What one model call tells of its tokens, before any layer runs.

    grid: the video's, where the model does not write it into transformer_options. text_first: everything that is not
    video stands before it. reference: a frame of reference tokens stands before it. context: references stand behind.
    """

    grid: tuple[int, ...] | None = None
    text_first: bool = False
    reference: bool = False
    context: bool = False

    def layout(self, options: dict, tokens: int, order: str) -> tuple[TokenLayout | None, str | None]:
        """The layout of a sequence of so many tokens; or None and why it is not known."""
        grid = self.grid if self.text_first else options.get("grid_sizes")
        if grid is None:
            return None, "the model does not tell its token grid"
        grid = tuple(int(side) for side in grid)
        held = math.prod(grid)
        extra = tokens - held
        before = extra if self.text_first else grid[1] * grid[2] if self.reference else 0
        after = extra - before
        if min(before, after) < 0 or (after and not self.context):
            return None, f"{tokens} tokens where the grid {grid} holds {held}: where the others stand is not known"
        return TokenLayout(grid, before, after, order), None


def visible_tokens(mask: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor | None, str | None]:
    """Tokens that an additive mask leaves, ascending `(n,)` int64, or None for all; and why a mask cannot be used.

    Usable is one that is the same for every query and every batch row, and hides nothing but text.
    """
    if mask.numel() != layout.tokens or not mask.dtype.is_floating_point:
        return None, f"an attention mask of shape {tuple(mask.shape)} is set"
    values = mask.flatten()
    hidden = values < HIDDEN
    if bool((values[~hidden] != 0).any()) or bool(hidden[layout.before :].any()):
        return None, "an attention mask that weighs tokens, or hides some of the video, is set"
    if not bool(hidden.any()):
        return None, None
    return torch.nonzero(~hidden).flatten(), None
