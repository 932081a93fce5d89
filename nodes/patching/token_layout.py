"""Where the video's tokens lie in the sequence of a call, and which others a mask weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...attention import TokenLayout
from .dense_reason import MASK_SHAPE, MASK_VALUES, SINGLE_IMAGE, UNKNOWN_TOKENS, DenseReason
from .model_info import ModelInfo

HIDDEN = -1e4  # an additive mask below this leaves nothing
MOST_SPANS = 32  # of weighted keys, each of which is attended to by itself


@dataclass(frozen=True)
class SequenceInfo:
    """What one model call tells of its tokens, before any layer runs.

    grid: the video's, as its latent has it; what the model itself writes into transformer_options
    counts for more; two numbers for an image. text_first: everything that is not video stands
    before it. reference: a frame of reference tokens stands before it. after: what this call brings
    stands after it. images: one frame is an image, for which the model was made too. in_stream:
    reference tokens are part of the video's stream, as HunyuanVideo has them.
    """

    grid: tuple[int, ...]
    text_first: bool = False
    reference: bool = False
    after: bool = False
    images: bool = False
    in_stream: bool = False

    def sides(self, options: Mapping[str, Any]) -> tuple[int, ...]:
        """The grid, as the model itself writes it into transformer_options where it does."""
        found = self.grid if self.text_first else options.get("grid_sizes") or self.grid
        return tuple(int(side) for side in found)

    def layout(
        self, options: Mapping[str, Any], tokens: int, order: str
    ) -> TokenLayout | DenseReason:
        """The layout of a sequence of so many tokens; or why it is not known."""
        grid = self.sides(options)
        if len(grid) != 3 or (self.images and grid[0] == 1):
            return DenseReason(SINGLE_IMAGE)
        frames, height, width = grid
        held = math.prod((frames, height, width))
        extra = tokens - held
        before = extra if self.text_first else height * width if self.reference else 0
        after = extra - before
        if min(before, after) < 0 or (after and not self.after):
            found = (frames, height, width)
            return DenseReason(UNKNOWN_TOKENS.format(tokens=tokens, grid=found, held=held))
        segments = _segments(options, before) if self.text_first else ()
        return TokenLayout((frames, height, width), before, after, order, segments=segments)


def _segments(options: Mapping[str, Any], before: int) -> tuple[int, ...]:
    """Lengths of the stretches before the video, which newer ComfyUI tells of MiniMax H3."""
    spans = getattr(options.get("minimax_h3_layout"), "segments", ())
    found = tuple(int(stop) - int(start) for start, stop, *_ in spans if stop <= before)
    return found if sum(found) == before else ()


def sequence_info(
    info: ModelInfo, model: torch.nn.Module, latent: Tensor, conditions: Mapping[str, Any]
) -> SequenceInfo:
    """The tokens of a model call with a latent `(B, C, T, H, W)` and these conditionings.

    Models with several kinds of latents (video and sound) get them packed; their shapes are beside.
    """
    arrangement = info.arrangement
    shape = list(video_shape(latent.shape, conditions.get("latent_shapes")))
    more_frames = conditions.get("time_dim_concat")  # Phantom's subjects, as frames after the video
    if more_frames is not None and not arrangement.text_first:
        shape[2] += more_frames.shape[2]
    guides = conditions.get(arrangement.guides)
    if guides is not None:  # LTX: their tokens' positions `(B, 3, n, 2)`
        shape[2] -= guides.shape[2] // math.prod(info.grid(tuple(shape))[1:])
    has_reference = getattr(model, "ref_conv", None) is not None
    return SequenceInfo(
        info.grid(tuple(shape)),
        arrangement.text_first,
        has_reference and conditions.get("reference_latent") is not None,
        guides is not None or any(conditions.get(name) is not None for name in arrangement.after),
        arrangement.images,
        conditions.get("ref_latent") is not None,
    )


def video_shape(
    latent_shape: Sequence[int], packed: Sequence[Sequence[int]] | None
) -> tuple[int, ...]:
    """The shape of the video's latent: the first of those that are packed, if any are."""
    return tuple(packed[0] if packed else latent_shape)


def with_mask(layout: TokenLayout, mask: Tensor, alone: bool) -> TokenLayout | DenseReason:
    """The layout with what an additive mask says of the keys, or why it cannot be honoured.

    It can if it is the same for all queries and batch rows and leaves the video's keys as they are.
    It may hide text; and weight and hide what lies beside the video where the video's queries come
    alone, as LTX asks for its guides.
    """
    if mask.numel() != layout.tokens or not mask.dtype.is_floating_point:
        return DenseReason(MASK_SHAPE.format(shape=tuple(mask.shape)))
    values = mask.flatten().float().clamp(min=HIDDEN)
    starts = (torch.diff(values, prepend=values[:1] + 1) != 0).nonzero().flatten()
    edges = [*starts.tolist(), layout.tokens]
    spans = [
        (start, stop, weight)
        for start, stop, weight in zip(edges, edges[1:], values[starts].tolist())
        if weight
    ]
    video, last = layout.video, layout.tokens if alone else layout.before
    hidden = tuple((start, stop) for start, stop, weight in spans if weight == HIDDEN)
    weighted = tuple(span for span in spans if span[2] != HIDDEN)
    allowed = MOST_SPANS if alone else 0
    beside = all(stop <= video.start or start >= video.stop for start, stop, _ in spans)
    if not beside or any(stop > last for _, stop, _ in spans) or len(weighted) > allowed:
        return DenseReason(MASK_VALUES)
    return replace(layout, hidden=hidden, weighted=weighted)
