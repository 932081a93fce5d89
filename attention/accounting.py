"""FLOPs of a call, 2 per multiply-add: dense attention and every part that replaces it.

tokens = L, head_dim = D, heads = H; q_blocks, kv_blocks = number of query and key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionCost:
    """FLOPs of one replaced attention call, and the share of key blocks that it kept.

    density: a mean over query blocks and heads. dense: what dense attention would have cost.
    """

    density: float
    dense: float
    sparse: float  # scores and values of the kept blocks
    routing: float = 0.0  # pooling and block scores
    background: float = 0.0  # low rank, first order or pooled keys
    calibration: float = 0.0  # exact queries or exact search, on the steps that do it
    recall: float | None = None  # softmax mass kept, where it was measured
    heads: tuple[float, ...] = ()  # density of each head, mean over the batch, where they differ

    @property
    def total(self) -> float:
        return self.sparse + self.routing + self.background + self.calibration


def dense_flops(tokens: int, head_dim: int, heads: int) -> float:
    """Dense self-attention: 4 L^2 D per head."""
    return 4.0 * tokens * tokens * head_dim * heads


def sparse_flops(tokens: int, head_dim: int, heads: int, density: float) -> float:
    """The kept blocks: 4 L * density L * D per head."""
    return dense_flops(tokens, head_dim, heads) * density


def routing_flops(tokens: int, head_dim: int, heads: int, q_blocks: int, kv_blocks: int) -> float:
    """Block scores 2 Nq Nk D per head, and one addition per element of q and k for their means."""
    return (2.0 * q_blocks * kv_blocks * head_dim + 2.0 * tokens * head_dim) * heads


def first_order_flops(
    tokens: int, head_dim: int, heads: int, rank: int, state_rank: int | None = None
) -> float:
    """First-order background: state and readout, 2 L r D each per head.

    state_rank: of the state alone, which has all channels at a layer's first call.
    """
    state_rank = rank if state_rank is None else state_rank
    return 2.0 * tokens * (rank + state_rank) * head_dim * heads


def low_rank_flops(tokens: int, head_dim: int, heads: int, rank: int) -> float:
    """Learned low-rank branch: projections 4 L D r, state 2 L r D, readout 2 L r D per head."""
    return 8.0 * tokens * rank * head_dim * heads


def coarse_flops(tokens: int, head_dim: int, heads: int, tiles: int, width: int) -> float:
    """VSA's branch: the gate 2 L C D, the tiles' attention 4 N^2 D, and its sum per head."""
    return (2.0 * tokens * width + 4.0 * tiles * tiles + 2.0 * tokens) * head_dim * heads


def pooled_flops(tokens: int, head_dim: int, heads: int, kv_blocks: int) -> float:
    """One pooled key per block and query: 4 L Nk D per head."""
    return 4.0 * tokens * kv_blocks * head_dim * heads


def calibration_flops(tokens: int, head_dim: int, heads: int, queries: int) -> float:
    """Exact attention of R queries: 4 R L D per head."""
    return 4.0 * queries * tokens * head_dim * heads


def correction_flops(
    head_dim: int, heads: int, queries: int, features: int, penalties: int
) -> float:
    """Ridge regression of D outputs on p features: R p^2 once; for each penalty p^3 / 3 of
    factorising, R p^2 of solving, 4 R p D of weights and predictions."""
    each = features**3 / 3 + queries * features * (features + 4.0 * head_dim)
    return heads * (queries * features**2 + penalties * each)


def mapping_flops(tokens: int, head_dim: int, heads: int) -> float:
    """A D x D matrix on L values: 2 L D^2 per head."""
    return 2.0 * tokens * head_dim * head_dim * heads


def probe_flops(tokens: int, head_dim: int, heads: int, queries: int, counts: int) -> float:
    """Exact attention of R queries, and their values over P prefixes: 2 R L D (2 + P) per head."""
    return 2.0 * queries * tokens * head_dim * heads * (2 + counts)


def linear_flops(tokens: int, head_dim: int, heads: int) -> float:
    """SLA's linear branch: state and readout, 2 L D^2 each per head; W is folded into the state."""
    return 4.0 * tokens * head_dim * head_dim * heads


def marginal_flops(tokens: int, head_dim: int, heads: int, q_blocks: int, kv_blocks: int) -> float:
    """SLA's branch over some blocks: a state per key block, their sums 2 Nq Nk D^2, readout, W."""
    return (6.0 * tokens + 2.0 * q_blocks * kv_blocks) * head_dim * head_dim * heads


def search_flops(tokens: int, head_dim: int, heads: int) -> float:
    """Exact search of block mass: the scores once more, 2 L^2 D per head."""
    return dense_flops(tokens, head_dim, heads) / 2
