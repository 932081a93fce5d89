"""Where every token of a sequence belongs: the video's (T, H, W) grid, the tokens around it, and blocks over both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import BLOCK

TILE = 4                                    # a cube of 4 x 4 x 4 tokens is one block of 64


class BlockTables(NamedTuple):
    """Blocks of one layout on one device. Video query blocks come first among the key blocks, in the same order."""

    video: Tensor                           # (Nq, S) int32: query blocks, as token numbers within the video
    keys: Tensor                            # (Nk, S) int32: key blocks over the whole sequence; -1 = empty slot
    key_sizes: Tensor                       # (Nk,) int64: real tokens per key block
    forced: Tensor | None                   # (Nq, Nk) bool: blocks kept whatever their score
    forced_counts: Tensor                   # (Nq,) int64, on the CPU: how many those are

    def density(self, keep: int) -> float:
        """Kept blocks / all blocks when each row keeps `keep` blocks by score, the forced ones in addition."""
        all_blocks = self.keys.shape[0]
        return ((self.forced_counts + keep).clamp(max=all_blocks).double().mean() / all_blocks).item()


@dataclass(frozen=True)
class TokenLayout:
    """A sequence of `before` tokens (text, references), a video grid in raster order (t, h, w), and `after` tokens.

    order "raster" cuts the video into blocks as it lies; "cube" cuts a walk through it that keeps each block compact in
    time and space. Either way only the video's last block may be short, and no token is added.
    """

    grid: tuple[int, int, int]
    before: int = 0
    after: int = 0
    order: str = "cube"
    block: int = BLOCK

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(f"grid must be (frames, rows, columns), each at least 1; found {self.grid}")
        if self.before < 0 or self.after < 0:
            raise ValueError(f"before and after count tokens; found {self.before} and {self.after}")
        if self.order not in ("raster", "cube"):
            raise ValueError(f"order must be raster or cube; found {self.order!r}")

    @property
    def video_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        return self.before + self.video_tokens + self.after

    def walk(self) -> Tensor:
        """Video tokens in block order: -> `(T*H*W,)` int64, a permutation of the raster numbers."""
        if self.order == "raster":
            return torch.arange(self.video_tokens)
        return _bar_walk(self.grid)

    def tables(self, keep_diagonal: bool, keep_first_frame: bool, device: torch.device | str = "cpu") -> BlockTables:
        """Build the block tables; text and reference tokens get blocks of their own, which every query keeps."""
        video = _cut(self.walk(), self.block)
        front, back = torch.arange(self.before), torch.arange(self.before + self.video_tokens, self.tokens)
        extra = _cut(torch.cat((front, back)), self.block)
        keys = torch.cat((torch.where(video < 0, -1, video + self.before), extra))
        n_q, n_k = video.shape[0], keys.shape[0]

        forced = torch.zeros(n_q, n_k, dtype=torch.bool)
        forced[:, n_q:] = True
        if keep_diagonal:
            forced[:, :n_q] |= torch.eye(n_q, dtype=torch.bool)
        if keep_first_frame:
            first = (video >= 0) & (video < self.grid[1] * self.grid[2])
            forced[:, :n_q] |= first.any(dim=1)
        return BlockTables(
            video.int().to(device), keys.int().to(device), (keys >= 0).sum(dim=1).to(device),
            forced.to(device) if forced.any() else None, forced.sum(dim=1),
        )


def _cut(order: Tensor, block: int) -> Tensor:
    """Cut a list of tokens into blocks: `(L,)` -> `(ceil(L / block), block)`, -1 behind the last token."""
    table = order.new_full((-(-order.numel() // block), block), -1)
    table.view(-1)[: order.numel()] = order
    return table


def _bar_walk(grid: tuple[int, int, int]) -> Tensor:
    """Walk the grid bar by bar: a bar is 4 x 4 tokens across (frames x rows) and runs along the columns.

    Inside a bar the walk goes slice by slice, so that ANY 64 consecutive tokens are a compact piece of it, wherever
    the cut falls; it snakes through the bars, so that a block on a turn stays in one place. Sides that 4 does not
    divide are split evenly (21 = 4+4+4+3+3+3 rather than five 4s and a sliver of 1).
    """
    frames, rows, columns = grid
    numbers = torch.arange(frames * rows * columns).view(grid)
    pieces, down, right = [], True, True
    for t0, t1 in _even_spans(frames):
        spans = _even_spans(rows)
        for h0, h1 in spans if down else reversed(spans):
            bar = numbers[t0:t1, h0:h1]
            pieces.append((bar if right else bar.flip(2)).permute(2, 0, 1).reshape(-1))
            right = not right
        down = not down
    return torch.cat(pieces)


def _even_spans(length: int) -> list[tuple[int, int]]:
    parts = -(-length // TILE)
    edges = [length * i // parts for i in range(parts + 1)]
    return list(zip(edges, edges[1:]))
