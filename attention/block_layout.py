"""Where every token of a sequence belongs: the video's grid, the tokens around it, blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..kernels.types import BlockLayout, RequiredBlocks, TokenBlocks
from .plan import BLOCK

TILE = 4  # a cube of 4 x 4 x 4 tokens is one query block
ORDERS = ("raster", "cube", "tile")


@dataclass(frozen=True)
class TokenLayout:
    """A sequence of `before` tokens (text, references), a video grid (t, h, w), `after` tokens.

    order: "raster" cuts the video into blocks as it lies in memory; "cube" cuts a tile order that
    keeps each block compact in time and space. Either way only the video's last block may be short,
    and no token is added. "tile": every block is one cube of 4 x 4 x 4 tokens, cut off at the
    grid's far sides, as VSA has it; blocks of 64 only. segments: the lengths of the stretches that
    `before` is made of; in order "tile" no block holds tokens of two. hidden: spans (start, stop)
    of tokens beside the video that no query may attend to, ascending. weighted: spans (start, stop,
    w) of tokens beside the video, ascending, whose scores have w added for the video's queries.
    """

    grid: tuple[int, int, int]
    before: int = 0
    after: int = 0
    order: str = "cube"
    hidden: tuple[tuple[int, int], ...] = ()
    weighted: tuple[tuple[int, int, float], ...] = ()
    segments: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(
                f"grid must be (frames, height, width), each at least 1; found {self.grid}"
            )
        if self.before < 0 or self.after < 0:
            raise ValueError(f"before and after count tokens; found {self.before} and {self.after}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}; found {self.order!r}")
        if self.segments and (min(self.segments) < 0 or sum(self.segments) != self.before):
            raise ValueError(
                f"segments must be lengths that add up to before = {self.before}; "
                f"found {self.segments}"
            )
        for name in ("hidden", "weighted"):
            self._check_spans(name)

    def _check_spans(self, name: str) -> None:
        spans, last = getattr(self, name), 0
        for start, stop, *_ in spans:
            beside = stop <= self.video.start or start >= self.video.stop
            if not (last <= start < stop <= self.tokens and beside):
                raise ValueError(
                    f"{name} must be ascending spans (start, stop) before or after the video; "
                    f"found {spans}"
                )
            last = stop

    @cached_property
    def video_tokens(self) -> int:
        return math.prod(self.grid)

    @cached_property
    def tokens(self) -> int:
        return self.before + self.video_tokens + self.after

    @cached_property
    def attended_tokens(self) -> int:
        """Those that are not hidden."""
        return self.tokens - sum(stop - start for start, stop in self.hidden)

    @cached_property
    def listed_tokens(self) -> int:
        """Those that key blocks hold: attended to, and not weighted."""
        return self.attended_tokens - sum(stop - start for start, stop, _ in self.weighted)

    @cached_property
    def video(self) -> slice:
        """The video's tokens in the sequence."""
        return slice(self.before, self.before + self.video_tokens)

    def video_rows(self, queries: int) -> slice:
        """The video's among so many queries: of the sequence, or the video's alone."""
        return slice(0, queries) if queries == self.video_tokens else self.video

    def token_order(self) -> Tensor:
        """Video tokens in block order: -> `(T*H*W,)` int64, a permutation of the raster numbers."""
        if self.order == "raster":
            return torch.arange(self.video_tokens)
        if self.order == "tile":
            return _tiles(self.grid).listed
        return _tile_order(self.grid)

    def blocks(
        self,
        keep_diagonal: bool = False,
        keep_first_frame: bool = False,
        device: torch.device | str = "cpu",
        key_block: int = BLOCK,
        query_block: int = BLOCK,
    ) -> BlockLayout:
        """The video's queries and all keys in blocks.

        Text and reference tokens get blocks of their own, which every query keeps. Query blocks
        name tokens within the video, key blocks tokens of the whole sequence. key_block,
        query_block: tokens of a block; the former must divide the latter.
        """
        if key_block < 1 or query_block % key_block:
            raise ValueError(f"key_block must divide {query_block}; found {key_block}")
        if self.order == "tile":
            if key_block != BLOCK or query_block != BLOCK:
                raise ValueError(
                    f"order tile has blocks of {BLOCK}; found {query_block} and {key_block}"
                )
            q_blocks = own = _tiles(self.grid)
        else:
            order = self.token_order()
            q_blocks, own = (TokenBlocks.cut(order, size) for size in (query_block, key_block))
        kv_blocks = self._kv_blocks(own)
        n_q, n_own = q_blocks.num_blocks, own.num_blocks
        required = torch.zeros(n_q, kv_blocks.num_blocks, dtype=torch.bool)
        required[:, n_own:] = True
        if keep_diagonal:
            block_of_own = torch.arange(n_own) // (query_block // key_block)
            required[:, :n_own] |= block_of_own == torch.arange(n_q)[:, None]
        if keep_first_frame:
            first = ~own.empty & (own.tokens < self.grid[1] * self.grid[2])
            required[:, :n_own] |= first.any(dim=1)
        found = None
        if required.any():
            found = RequiredBlocks(required.to(device), required.sum(dim=1))
        return BlockLayout(q_blocks.to(device), kv_blocks.to(device), found)

    def _kv_blocks(self, own: TokenBlocks) -> TokenBlocks:
        """Key blocks: those of the video, then those of the tokens beside it."""
        video = torch.where(own.empty, -1, own.tokens + self.before)
        seen = torch.ones(self.tokens, dtype=torch.bool)
        seen[self.video] = False
        for start, stop, *_ in (*self.hidden, *self.weighted):
            seen[start:stop] = False
        stretches = [seen]
        if self.order == "tile":  # the stretches in front, the video, what is behind
            lengths = self.segments or (self.before,)
            stretches = seen.split([*lengths, self.video_tokens, self.after])
        tables, start = [video], 0
        for stretch in stretches:
            beside = start + torch.nonzero(stretch).flatten()
            start += stretch.numel()
            if beside.numel():
                tables.append(TokenBlocks.cut(beside, own.block_size, self.tokens).tokens)
        return TokenBlocks(torch.cat(tables), self.tokens, self.listed_tokens)


def _tiles(grid: tuple[int, int, int]) -> TokenBlocks:
    """A block for every cube, one after the other through the grid, but whole ones first.

    Kernels need no mask before the first block that is short.
    """
    numbers = torch.arange(math.prod(grid)).view(grid)
    cubes = [
        cube.flatten()
        for slab in numbers.split(TILE)
        for column in slab.split(TILE, dim=1)
        for cube in column.split(TILE, dim=2)
    ]
    cubes.sort(key=lambda cube: cube.numel() < BLOCK)  # stable
    table = numbers.new_full((len(cubes), BLOCK), -1)
    for row, cube in zip(table, cubes):
        row[: cube.numel()] = cube
    return TokenBlocks(table.int(), numbers.numel(), numbers.numel())


def _tile_order(grid: tuple[int, int, int]) -> Tensor:
    """Go through the grid in columns of tiles that are 4 x 4 tokens across (frames x height).

    Inside such a column the order goes slice by slice along the width, so that ANY 64 consecutive
    tokens are a compact piece of it, wherever the cut falls; the columns follow in snake order, so
    that a block on a turn stays in one place. Sides that 4 does not divide are split evenly
    (21 = 4+4+4+3+3+3 rather than five 4s and a sliver of 1).
    """
    frames, height, width = grid
    numbers = torch.arange(frames * height * width).view(grid)
    pieces, down, right = [], True, True
    for t0, t1 in _even_spans(frames):
        spans = _even_spans(height)
        for h0, h1 in spans if down else reversed(spans):
            column = numbers[t0:t1, h0:h1]
            pieces.append((column if right else column.flip(2)).permute(2, 0, 1).reshape(-1))
            right = not right
        down = not down
    return torch.cat(pieces)


def _even_spans(length: int) -> list[tuple[int, int]]:
    count = -(-length // TILE)
    edges = [length * i // count for i in range(count + 1)]
    return list(zip(edges, edges[1:]))
