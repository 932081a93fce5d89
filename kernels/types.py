"""What the operations take besides q, k, v: token blocks, the block mask, and the background.

Shapes: B = batch, H = heads, L = tokens, D = head_dim, N = number of blocks, S = slots of a block,
r = rank. All of these are plain values: nothing here launches a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

INDEX_DTYPES = (torch.int16, torch.int32, torch.int64)


def blocks_needed(tokens: int, block_size: int) -> int:
    """How many blocks hold so many tokens; the last may be short."""
    return -(-tokens // block_size)


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """A sequence of tokens cut into blocks.

    tokens `(N, S)` int32: which tokens each block holds, -1 in its empty slots, which come last.
    A token is in one block or in none; a key in none is never attended to.
    num_tokens: length of the sequence. num_listed: how many of its tokens are in a block.

    Example: `TokenBlocks.cut(torch.arange(100), 64)` has a block of 64 and one of 36 tokens.
    Raises ValueError when the table does not fit the sequence; on a GPU only its shape is checked.
    """

    tokens: Tensor
    num_tokens: int
    num_listed: int

    def __post_init__(self) -> None:
        table = self.tokens
        if table.ndim != 2 or table.dtype not in INDEX_DTYPES:
            raise ValueError(
                f"tokens must be an integer table (blocks, slots); "
                f"found {tuple(table.shape)} {table.dtype}"
            )
        if not 0 < self.num_listed <= self.num_tokens:
            raise ValueError(
                f"num_listed must be from 1 to {self.num_tokens}, found {self.num_listed}"
            )
        if table.numel() < self.num_listed:
            raise ValueError(
                f"tokens has {table.numel()} slots, too few for {self.num_listed} tokens"
            )
        # Where looking is free. Other tables would make a kernel read out of bounds.
        if (
            table.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and type(table) is Tensor
        ):
            listed = table[table >= 0]
            found, last = listed.unique().numel(), int(table.max())
            if not listed.numel() == found == self.num_listed or last >= self.num_tokens:
                raise ValueError(
                    f"tokens lists {listed.numel()} tokens, {found} of them different, up to "
                    f"{last}; expected {self.num_listed}, each once, below {self.num_tokens}"
                )
            if ((table[:, :-1] < 0) & (table[:, 1:] >= 0)).any():
                raise ValueError(
                    "tokens must fill each block from the front; found a token behind -1"
                )

    @classmethod
    def cut(cls, order: Tensor, block_size: int, num_tokens: int | None = None) -> TokenBlocks:
        """Blocks of consecutive tokens of `order` `(n,)`; num_tokens where some are left out."""
        count = order.numel()
        table = order.new_full((blocks_needed(count, block_size), block_size), -1)
        table.view(-1)[:count] = order
        return cls(table.int(), count if num_tokens is None else num_tokens, count)

    @cached_property
    def num_blocks(self) -> int:
        return self.tokens.shape[0]

    @cached_property
    def block_size(self) -> int:
        """Slots of a block."""
        return self.tokens.shape[1]

    @cached_property
    def has_empty_slots(self) -> bool:
        return self.tokens.numel() != self.num_listed

    @cached_property
    def lists_every_token(self) -> bool:
        return self.num_listed == self.num_tokens

    @cached_property
    def sizes(self) -> Tensor:
        """Tokens of each block: `(N,)` int64."""
        return (self.tokens >= 0).sum(dim=-1)

    @cached_property
    def log2_sizes(self) -> Tensor:
        """log2 of the tokens of each block: `(N,)` float32."""
        return self.sizes.float().log2()

    @cached_property
    def num_full(self) -> Tensor:
        """How many blocks come before the first with an empty slot: a number on the device.

        int32 without dimensions, so that nobody has to ask.
        """
        short = (self.tokens[:, -1] < 0).int()  # blocks are filled from the front
        return (short.cumsum(dim=0) == 0).sum(dtype=torch.int32)

    @cached_property
    def slots(self) -> Tensor:
        """Token of every slot, 0 for empty ones: `(N * S,)` int64, to gather with."""
        return self.tokens.reshape(-1).long().clamp(min=0)

    @cached_property
    def empty(self) -> Tensor:
        """Which slots are empty: `(N, S)` bool."""
        return self.tokens < 0

    @cached_property
    def listed(self) -> Tensor:
        """Every token that is in a block: `(num_listed,)` int64, in block order."""
        return self.tokens[~self.empty].long()

    @cached_property
    def slot_of_token(self) -> Tensor:
        """Slot of every token: `(L,)` int64; `N * S` for tokens in no block."""
        flat = self.tokens.reshape(-1).long()
        slot = torch.full((self.num_tokens + 1,), flat.numel(), device=flat.device)
        slot[torch.where(flat < 0, self.num_tokens, flat)] = torch.arange(
            flat.numel(), device=flat.device
        )
        return slot[: self.num_tokens]

    @property
    def block_of_token(self) -> Tensor:
        """Block of every token: `(L,)` int64; N for tokens in no block."""
        return self.slot_of_token // self.block_size

    def to(self, device: torch.device | str) -> TokenBlocks:
        return TokenBlocks(self.tokens.to(device), self.num_tokens, self.num_listed)


class RequiredBlocks(NamedTuple):
    """Key blocks that are kept whatever their score, in addition to the best."""

    mask: Tensor  # (Nq, Nk) bool
    counts: Tensor  # (Nq,) int64 on the CPU, so that nobody has to ask the device

    @classmethod
    def of(cls, mask: Tensor) -> RequiredBlocks:
        return cls(mask, mask.sum(dim=-1).cpu())

    @property
    def most(self) -> int:
        """In the fullest row."""
        return int(self.counts.max())


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Queries and keys cut into blocks, before any block is chosen.

    The first key blocks hold the queries' own tokens, in the queries' order; blocks of other tokens
    (text, references) follow.
    """

    q_blocks: TokenBlocks
    kv_blocks: TokenBlocks
    required: RequiredBlocks | None = None

    def __post_init__(self) -> None:
        shape = (self.q_blocks.num_blocks, self.kv_blocks.num_blocks)
        if self.required is not None and self.required.mask.shape != shape:
            raise ValueError(
                f"required must have the shape {shape}; found {tuple(self.required.mask.shape)}"
            )

    @cached_property
    def required_bytes(self) -> Tensor | None:
        """What is required as kernels read it: `(Nq, Nk)` uint8; None where nothing is."""
        return None if self.required is None else self.required.mask.to(torch.uint8).contiguous()

    @cached_property
    def num_ranked(self) -> int:
        """How many key blocks hold the queries' own tokens: those that a score may keep or drop."""
        q, size = self.q_blocks, self.kv_blocks.block_size
        # Of one size they are the same blocks, any of which may be short.
        return q.num_blocks if q.block_size == size else blocks_needed(q.num_listed, size)

    @cached_property
    def kv_of_queries(self) -> TokenBlocks:
        """The key blocks that hold the queries' own tokens."""
        kv = self.kv_blocks
        return TokenBlocks(kv.tokens[: self.num_ranked], kv.num_tokens, self.q_blocks.num_listed)

    def list_width(self, topk: int) -> int:
        """The most blocks that a row keeps: its best `topk`, and the required ones."""
        most = 0 if self.required is None else self.required.most
        return min(self.kv_blocks.num_blocks, topk + most)

    def mask(self, kept: Tensor, topk: int) -> BlockMask:
        """The mask that keeps the required blocks and `kept` `(B, H, Nq, Nk)` bool.

        topk: the most blocks that a row of `kept` has.
        """
        if self.required is not None:
            kept = kept | self.required.mask
        return BlockMask.from_dense(self.q_blocks, self.kv_blocks, kept, self.list_width(topk))

    def widths(self, topk: Sequence[int]) -> list[int]:
        """The most blocks that a row of each head keeps."""
        return [self.list_width(each) for each in topk]

    def density(self, topk: int) -> float:
        """Kept blocks / all blocks when each row keeps its best `topk` and the required ones."""
        blocks = self.kv_blocks.num_blocks
        if self.required is None:
            return min(topk, blocks) / blocks
        kept = (self.required.counts + topk).clamp(max=blocks)
        return (kept.double().mean() / blocks).item()


def list_dtype(blocks: int) -> torch.dtype:
    """Of lists that name so many blocks; a row's unused entries hold that number itself."""
    return torch.int16 if blocks <= torch.iinfo(torch.int16).max else torch.int32


class Packing(NamedTuple):
    """Lists of a width per head behind each other in one tensor: head by head, row by row."""

    starts: Tensor  # (B * H + 1,) int64: where the lists of each head begin, and the end
    longest_first: Tensor  # (B * H,) int32: the heads, those with the longest lists first
    starts_on_cpu: Tensor  # as starts, so that nobody has to ask the device

    @classmethod
    def of(cls, widths: Sequence[int], rows: int, device: torch.device) -> Packing:
        """For `rows` lists of each head, as wide as `widths` says, batch row by batch row.

        Made once for the same numbers, which stand for some steps.
        """
        if torch.compiler.is_compiling():
            return _packing(tuple(widths), rows, device)
        return _known_packing(tuple(widths), rows, device, torch.is_inference_mode_enabled())

    @property
    def num_entries(self) -> int:
        return int(self.starts_on_cpu[-1])

    def of_head(self, flat: Tensor, head: int, rows: int) -> Tensor:
        """The lists `(rows, K)` of one of B * H heads in `flat`."""
        start, stop = self.starts_on_cpu[head : head + 2].tolist()
        return flat[start:stop].view(rows, (stop - start) // rows)


def _packing(widths: tuple[int, ...], rows: int, device: torch.device) -> Packing:
    starts = torch.tensor([0, *widths], dtype=torch.int64).cumsum(0) * rows
    longest_first = torch.tensor(widths).argsort(descending=True, stable=True).int()
    there = starts.to(device, non_blocking=True)
    return Packing(there, longest_first.to(device, non_blocking=True), starts)


@lru_cache(maxsize=1024)
def _known_packing(
    widths: tuple[int, ...], rows: int, device: torch.device, inference: bool
) -> Packing:
    """inference: tensors that are made in inference mode can be used there only."""
    return _packing(widths, rows, device)


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which key blocks each query block keeps, in FlexAttention's terms.

    kv_indices `(B, H, Nq, K)` int32, or int16 where its numbers fit: the kept key blocks of each
    row, ascending, each once; entries beyond a row's number may hold anything. kv_num_blocks
    `(B, H, Nq)` int32: how many it keeps. packing: for heads that keep differently many; kv_indices
    is then flat, each head's lists as wide as its own longest. Raises ValueError when the lists do
    not fit the blocks. Looking at every entry makes a GPU wait, so masks that this package's own
    selection made are trusted.
    """

    q_blocks: TokenBlocks
    kv_blocks: TokenBlocks
    kv_indices: Tensor
    kv_num_blocks: Tensor
    packing: Packing | None = None
    trusted: InitVar[bool] = False

    def __post_init__(self, trusted: bool) -> None:
        if self.packing is not None and trusted:
            return
        if self.packing is not None and self.kv_indices.shape != (self.packing.num_entries,):
            raise ValueError(
                f"packed kv_indices must have {self.packing.num_entries} entries; "
                f"found {tuple(self.kv_indices.shape)}"
            )
        lists, counts = self.padded().kv_indices, self.kv_num_blocks
        if not self.q_blocks.lists_every_token:
            raise ValueError(
                f"every query must be in a block; q_blocks lists {self.q_blocks.num_listed} "
                f"of {self.q_blocks.num_tokens}"
            )
        rows = self.q_blocks.num_blocks
        if lists.ndim != 4 or lists.shape[2] != rows or counts.shape != lists.shape[:3]:
            raise ValueError(
                f"kv_indices and kv_num_blocks must have {rows} rows per head, one per query "
                f"block; found {tuple(lists.shape)} and {tuple(counts.shape)}"
            )
        for name, x in (("kv_indices", lists), ("kv_num_blocks", counts)):
            if x.dtype not in INDEX_DTYPES:
                raise ValueError(f"{name} must be int16, int32 or int64; found {x.dtype}")
        if not (trusted or torch.compiler.is_compiling() or lists.device.type == "meta"):
            _check_entries(lists, counts, self.kv_blocks.num_blocks)

    def head_lists(self, b: int, h: int, unused: int) -> Tensor:
        """The lists of one head, `(Nq, K)` int64; `unused` in every place beyond a row's number."""
        if self.packing is None:
            lists = self.kv_indices[b, h]
        else:
            _, heads, rows = self.kv_num_blocks.shape
            lists = self.packing.of_head(self.kv_indices, b * heads + h, rows)
        return _fill_unused(lists, self.kv_num_blocks[b, h], unused)

    def fill_unused(self, value: int) -> Tensor:
        """All lists `(B, H, Nq, K)` int64 with `value` in every place beyond a row's number."""
        return _fill_unused(self.padded().kv_indices, self.kv_num_blocks, value)

    def padded(self) -> BlockMask:
        """The same with lists of one width, `(B, H, Nq, K)`."""
        if self.packing is None:
            return self
        batch, heads, rows = self.kv_num_blocks.shape
        parts = [self.packing.of_head(self.kv_indices, i, rows) for i in range(batch * heads)]
        width = max(part.shape[1] for part in parts)
        lists = torch.stack([F.pad(part, (0, width - part.shape[1])) for part in parts])
        lists = lists.view(batch, heads, rows, width)
        return BlockMask(self.q_blocks, self.kv_blocks, lists, self.kv_num_blocks, trusted=True)

    def to(self, device: torch.device | str) -> BlockMask:
        q_blocks, kv_blocks = self.q_blocks.to(device), self.kv_blocks.to(device)
        lists = self.kv_indices.to(device), self.kv_num_blocks.to(device)
        packing = self.packing and self.packing._replace(starts=self.packing.starts.to(device))
        return BlockMask(q_blocks, kv_blocks, *lists, packing, trusted=True)

    @classmethod
    def from_dense(
        cls,
        q_blocks: TokenBlocks,
        kv_blocks: TokenBlocks,
        kept: Tensor,
        list_width: int | None = None,
    ) -> BlockMask:
        """The mask that keeps what `kept` `(B, H, Nq, Nk)` bool says.

        list_width: at least the most blocks that a row keeps; without it a GPU is asked and waited
        for.
        """
        blocks = kv_blocks.num_blocks
        if kept.ndim != 4 or kept.shape[2:] != (q_blocks.num_blocks, blocks):
            raise ValueError(
                f"kept must be (B, H, {q_blocks.num_blocks}, {blocks}), query by key blocks; "
                f"found {tuple(kept.shape)}"
            )
        counts = kept.sum(dim=-1)
        column = torch.arange(blocks, device=kept.device).expand_as(kept)
        lists = torch.where(kept, column, blocks).sort(dim=-1).values
        width = list_width or max(1, int(counts.max()))
        # On a GPU nobody looks.
        if list_width and counts.device.type == "cpu" and (most := int(counts.max())) > width:
            raise ValueError(f"a row keeps {most} blocks; list_width is {width}")
        counts = counts.clamp(max=width)
        lists = lists[..., :width].to(list_dtype(blocks))
        return cls(q_blocks, kv_blocks, lists, counts.int(), trusted=True)

    def to_dense(self) -> Tensor:
        """`(B, H, Nq, Nk)` bool: whether a row keeps a block."""
        blocks = self.kv_blocks.num_blocks
        lists = self.fill_unused(blocks)
        kept = torch.zeros(*lists.shape[:-1], blocks + 1, dtype=torch.bool, device=lists.device)
        return kept.scatter_(-1, lists, True)[..., :blocks]


def _fill_unused(lists: Tensor, counts: Tensor, value: int) -> Tensor:
    place = torch.arange(lists.shape[-1], device=lists.device)
    return torch.where(place < counts[..., None], lists.long(), value)


def _check_entries(lists: Tensor, counts: Tensor, blocks: int) -> None:
    """Every entry in use names a block, and a row's entries ascend."""
    width = lists.shape[-1]
    if counts.numel() and not (0 <= int(counts.min()) and int(counts.max()) <= width):
        raise ValueError(
            f"kv_num_blocks must be from 0 to {width}; "
            f"found {int(counts.min())} to {int(counts.max())}"
        )
    used = torch.arange(width, device=lists.device) < counts[..., None]
    wrong = used & ((lists < 0) | (lists >= blocks))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"kv_indices must be from 0 to {blocks - 1}; found {int(lists[at])} at {at}"
        )
    falls = used[..., 1:] & (lists[..., 1:] <= lists[..., :-1])
    if falls.any():
        at = tuple(falls.nonzero()[0].tolist())
        row = lists[at[:-1]].tolist()
        raise ValueError(
            f"kv_indices must ascend within a row, each block once; row {at[:-1]} has {row[:8]} ..."
        )


class PooledKV(NamedTuple):
    """One pseudo-key and value per key block, for the blocks that a row drops."""

    k: Tensor  # (B, H, Nk, D)
    v: Tensor  # (B, H, Nk, D)


class EightBit(NamedTuple):
    """Keys and values in 8 bits and in block order: what a sparse kernel reads in their place.

    Scores are (q8 . k8) q_scale k_scale + q . k_mean; the kernel rounds q, with a scale per row.
    Values lie transposed; within 16 slots their order is that of `value_slots`. Empty slots hold 0.
    """

    k: Tensor  # (B, H, Nk, S, D) int8: (k - k_mean) / k_scale
    k_scale: Tensor  # (B, H, Nk) float32
    k_mean: Tensor  # (B, H, D) float32
    v: Tensor  # (B, H, Nk, D, S) int8 or float8_e4m3fn: (v - v_mean) / v_scale
    v_scale: Tensor  # (B, H, D) float32
    v_mean: Tensor  # (B, H, D) float32


# What weights are scaled by before they are rounded, log2, and the largest value of `EightBit.v`.
GAINS = {torch.int8: math.log2(127), torch.float8_e4m3fn: 8.0}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def value_slots(block_size: int) -> Tensor:
    """Which slot of a block stands at each place of `EightBit.v`: `(S,)` int64.

    A thread's weights of 16 keys, as one product leaves them, are then in the order in which the
    next one takes them.
    """
    place = torch.arange(block_size)
    return place // 16 * 16 + place // 2 % 2 * 8 + place % 16 // 4 * 2 + place % 2


class RankedBlocks(NamedTuple):
    """Key blocks in the order in which R queries would keep them."""

    blocks: TokenBlocks
    pooled_q: Tensor  # (B, H, R, D): what scores the blocks for a query, of its own block
    pooled_k: Tensor  # (B, H, Nk, D); the best are kept first
    required: Tensor | None = None  # (R, Nk) bool: kept in addition
    pooled: PooledKV | None = None  # one pseudo-key for every block that is dropped


class Prefixes(NamedTuple):
    """Attention of R queries over their best K key blocks, for P numbers K; and over all keys."""

    out: Tensor  # (P, B, H, R, D)
    lse: Tensor  # (P, B, H, R)
    dropped_lse: Tensor  # (P, B, H, R): log of the pooled mass of the other blocks
    exact_out: Tensor  # (B, H, R, D)
    exact_lse: Tensor  # (B, H, R)


class Gate(NamedTuple):
    """The background's share: g = sigmoid(slope (dropped_lse - LSE) + bias + logits).

    0 where a row drops nothing, 1 where it keeps nothing. Softmax attention is such a mix of its
    kept and its dropped part.
    """

    dropped_lse: Tensor  # (B, H, Nq): log of the pooled mass of the blocks that a row drops
    slope: Tensor  # (B, H)
    bias: Tensor  # (B, H)
    logits: Tensor | None = None  # (B, H, Lq): a term of each query's own

    def logit(self, lse: Tensor, dropped: Tensor) -> Tensor:
        """Of g `(B, H, Lq)`, by the LSE of what each query keeps, and that of what it drops.

        Minus infinity has a bound, since slope 0 times it would be no number.
        """
        gap = dropped.clamp(min=-1e30) - lse.clamp(min=-1e30)
        found = self.slope[..., None] * gap + self.bias[..., None]
        return found if self.logits is None else found + self.logits


class FirstOrder(NamedTuple):
    """The background v_mean + (channel_scale * q) cov, exact to first order in the logits."""

    v_mean: Tensor  # (B, H, D)
    cov: Tensor  # (B, H, r, D): mean((k - mean k)^T v)
    channel_scale: Tensor  # (B, H, r)
    channel_ids: Tensor | None = None  # (B, H, r) int64: the channels of q that are used; None: all


class FeatureMap(NamedTuple):
    """phi(x, p) = act(proj x + pe(p)), with x taken back to where it was before RoPE."""

    act: str  # one of ACTS
    proj: Tensor | None = None  # (H, r, D); None: the channels themselves are the logits, r = D
    rope_cos: Tensor | None = None  # (L, D / 2) float32, interleaved pairs; None: x was not rotated
    rope_sin: Tensor | None = None
    pe: Tensor | None = None  # (H, P, r) float32
    axis_ids: Tensor | None = None  # (L, 3) int32: pe(p) is the sum of these rows of pe

    def rank(self, head_dim: int) -> int:
        return head_dim if self.proj is None else self.proj.shape[1]


ACTS = ("softmax", "elu")


class SiluMap(NamedTuple):
    """phi(x, p) = rope(silu(proj x + pe(p))): x before RoPE; pairs of features are rotated anew."""

    proj: Tensor  # (H, r, D)
    rope_cos: Tensor  # (L, D / 2) float32, interleaved pairs
    rope_sin: Tensor
    pe: Tensor | None = None  # (H, P, r) float32
    axis_ids: Tensor | None = None  # (L, 3) int32: pe(p) is the sum of these rows of pe
    feature_cos: Tensor | None = None  # (L, T): the first 2 T features are rotated; None: none
    feature_sin: Tensor | None = None


class RmsLowRank(NamedTuple):
    """RoLA's branch: RMSNorm over D of phi_q (sum phi_k^T v)."""

    q_map: SiluMap
    k_map: SiluMap
    eps: float


class LinearState(NamedTuple):
    """What a linear branch reads: phi_q kv_state / (eps + phi_q normalizer), with token means."""

    kv_state: Tensor  # (B, H, r, D): mean(phi_k^T v)
    normalizer: Tensor  # (B, H, r): mean(phi_k)
    eps: float = 1e-5


class LowRank(NamedTuple):
    """A linear branch added to the background: background += scale (read - v_mean)."""

    feature_map: FeatureMap  # of the queries
    state: LinearState
    scale: Tensor  # (H,)


class Background(NamedTuple):
    """What replaces the dropped blocks, and its share of each query's output."""

    gate: Gate
    first_order: FirstOrder
    low_rank: LowRank | None = None


class LinearBranch(NamedTuple):
    """A linear branch added to the kept blocks (SLA), its projection folded into the state."""

    feature_map: FeatureMap
    state: LinearState
    bias: Tensor  # (D,)


class Forward(NamedTuple):
    """Inputs and results of block-sparse attention that its gradients need."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    mask: BlockMask
    pooled: PooledKV | None
    scale: float
