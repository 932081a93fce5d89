"""Attention of few queries, split over the keys so that the whole GPU works, and merged by LSE.

A program goes through all keys of its query block, so a block or two for each head (calibration's
rows, text) would leave most multiprocessors idle. Here each block is begun several times, each time
over a share of the keys:

    out = sum_p exp(LSE_p - LSE) out_p,   LSE = log sum_p exp(LSE_p)

the second half of FlashDecoding (Dao et al. 2023).
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

PROGRAMS = 2  # that a multiprocessor runs at once
FEWEST_KEYS = 1024  # of a share: 16 tiles, beside which starting and merging stay small


@cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has; 1 on a CPU, where kernels are only simulated."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def shares(programs: int, keys: int, device: torch.device) -> int:
    """Into how many shares the keys go, so that everything is still begun at once."""
    most = PROGRAMS * multiprocessors(device) // programs
    return max(1, min(most, keys // FEWEST_KEYS))


class Split(NamedTuple):
    """Blocks of queries and lists of key blocks, as `attention.Tables` takes them."""

    q_table: Tensor  # (Nq * parts, block) int32: a block's copies follow each other, -1 on no token
    lists: Tensor  # (B * H, Nq * parts, K) int32: the key blocks of every copy
    counts: Tensor  # (B * H, Nq * parts) int32: how many those are


def split(q: Tensor, block: int, kv_blocks: int, parts: int) -> Split:
    """For queries `(B, H, L, D)` whose copies stand one after the other: `(B, H, parts * L, D)`."""
    heads, tokens = q.shape[0] * q.shape[1], q.shape[2]
    return _split(
        heads, tokens, block, kv_blocks, parts, q.device, torch.is_inference_mode_enabled()
    )


@lru_cache(maxsize=16)
def _split(
    heads: int,
    tokens: int,
    block: int,
    kv_blocks: int,
    parts: int,
    device: torch.device,
    inference: bool,
) -> Split:
    """inference: tensors that are made in inference mode can be used there only."""
    n_q, width = -(-tokens // block), -(-kv_blocks // parts)
    part = torch.arange(parts)[:, None]
    slots = torch.arange(n_q * block).view(n_q, 1, block)
    q_table = torch.where(slots < tokens, slots + tokens * part, -1).flatten(0, 1)
    lists = (width * part + torch.arange(width)).repeat(n_q, 1).expand(heads, -1, -1)
    counts = (kv_blocks - width * part[:, 0]).clamp(min=0, max=width).repeat(n_q).expand(heads, -1)
    return Split(
        *(x.int().contiguous().to(device, non_blocking=True) for x in (q_table, lists, counts))
    )


def merged(out: Tensor, lse: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Copies `(B, H, parts * L, D)`, LSE `(B, H, parts * L)` -> out `(B, H, L, D)` float32, LSE."""
    out, lse = (x.unflatten(2, (parts, -1)) for x in (out, lse))
    total = lse.logsumexp(dim=2)
    # The bound keeps rows without any key from being -inf + inf.
    share = (lse - total.clamp(min=-1e30)[:, :, None]).exp()
    return (out.float() * share[..., None]).sum(dim=2), total
