"""Where the video's tokens lie in the sequence of one attention call, and which text tokens a mask hides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...attention import TokenLayout
from .recognise import ModelFacts

HIDDEN = -1e4                               # an additive mask below this leaves nothing


@dataclass(frozen=True)
class TokenPlaces:
    """What one model call tells of its tokens, before any layer runs.

    grid: the video's, as its latent has it; what the model itself writes into transformer_options counts for more.
    text_first: everything that is not video stands before it. reference: a frame of reference tokens stands before it.
    behind: what this call brings stands after it.
    """

    grid: tuple[int, ...]
    text_first: bool = False
    reference: bool = False
    behind: bool = False

    def layout(self, options: dict, tokens: int, order: str) -> tuple[TokenLayout | None, str | None]:
        """The layout of a sequence of so many tokens; or None and why it is not known."""
        grid = self.grid if self.text_first else options.get("grid_sizes") or self.grid
        grid = tuple(int(side) for side in grid)
        held = math.prod(grid)
        extra = tokens - held
        before = extra if self.text_first else grid[1] * grid[2] if self.reference else 0
        after = extra - before
        if min(before, after) < 0 or (after and not self.behind):
            return None, f"{tokens} tokens where the grid {grid} holds {held}: where the others stand is not known"
        return TokenLayout(grid, before, after, order), None


def token_places(facts: ModelFacts, model: torch.nn.Module, latent: torch.Tensor, conditions: dict) -> TokenPlaces:
    """What a model call with a latent `(B, C, T, H, W)` and such conditionings tells of its tokens."""
    shape = list(latent.shape)
    more_frames = conditions.get("time_dim_concat")                           # Phantom's subjects, as frames behind
    if more_frames is not None and not facts.arrangement.text_first:
        shape[2] += more_frames.shape[2]
    reference = getattr(model, "ref_conv", None) is not None and conditions.get("reference_latent") is not None
    return TokenPlaces(
        facts.grid(shape), facts.arrangement.text_first, reference,
        any(conditions.get(name) is not None for name in facts.arrangement.behind),
    )


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
