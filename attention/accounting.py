"""What a call costs: FLOPs, counted as 2 per multiply-add, of dense attention and of every part that replaces it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionCost:
    """FLOPs of one replaced attention call, and the share of key blocks that it kept (a mean over rows and heads)."""

    density: float
    dense: float                            # what dense attention would have cost
    sparse: float                           # scores and values of the kept blocks
    routing: float = 0.0                    # pooling and block scores
    background: float = 0.0                 # low rank, first order or pooled tail
    calibration: float = 0.0                # exact rows or exact search, on the steps that do it
    recall: float | None = None             # softmax mass kept, where it was measured

    @property
    def total(self) -> float:
        return self.sparse + self.routing + self.background + self.calibration


def dense_flops(tokens: int, width: int, heads: int) -> float:
    """Dense self-attention: 4 L^2 D per head."""
    return 4.0 * tokens * tokens * width * heads


def sparse_flops(tokens: int, width: int, heads: int, density: float) -> float:
    """The kept blocks: 4 L * density L * D per head."""
    return dense_flops(tokens, width, heads) * density


def routing_flops(tokens: int, width: int, heads: int, q_blocks: int, k_blocks: int) -> float:
    """Block scores 2 Nq Nk D per head, and the means of q and k: one addition per element of both."""
    return (2.0 * q_blocks * k_blocks * width + 2.0 * tokens * width) * heads


def first_order_flops(tokens: int, width: int, heads: int, rank: int, state_rank: int | None = None) -> float:
    """First-order background: state and readout, 2 L r D each per head; the state of the first step has full rank."""
    return 2.0 * tokens * (rank + (rank if state_rank is None else state_rank)) * width * heads


def low_rank_flops(tokens: int, width: int, heads: int, rank: int) -> float:
    """Learned low-rank branch: projections of q and k 4 L D r, state 2 L r D, readout 2 L r D per head."""
    return 8.0 * tokens * rank * width * heads


def pooled_tail_flops(tokens: int, width: int, heads: int, k_blocks: int) -> float:
    """One pseudo-key per block and query: 4 L Nk D per head."""
    return 4.0 * tokens * k_blocks * width * heads


def calibration_flops(tokens: int, width: int, heads: int, rows: int) -> float:
    """Exact attention of R rows: 4 R L D per head."""
    return 4.0 * rows * tokens * width * heads


def linear_flops(tokens: int, width: int, heads: int) -> float:
    """SLA's linear branch: state and readout, 2 L D^2 each per head; its projection is folded into the state."""
    return 4.0 * tokens * width * width * heads


def marginal_flops(tokens: int, width: int, heads: int, q_blocks: int, k_blocks: int) -> float:
    """SLA's linear branch over some blocks: a state per key block, their sums 2 Nq Nk D^2, readout, projection."""
    return (6.0 * tokens + 2.0 * q_blocks * k_blocks) * width * width * heads


def search_flops(tokens: int, width: int, heads: int) -> float:
    """Exact search of block mass: the scores once more, 2 L^2 D per head."""
    return dense_flops(tokens, width, heads) / 2


def mask_cache_bytes(heads: int, tokens: int, q_blocks: int, k_blocks: int, searches_again: bool = True) -> int:
    """What AdaSpa keeps per layer and conditioning: one bit per block pair, in words of 32; and two bytes per token
    until its last search."""
    return heads * (4 * q_blocks * -(-k_blocks // 32) + 2 * tokens * searches_again)
