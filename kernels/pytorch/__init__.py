"""The portable path: every operation in plain PyTorch, for any device, differentiable, with bounded memory.

Contracts as in `reference`. Half precision is computed in float32 per head: a bf16 score of 100 is off by a quarter.
"""

from .additive import add_rms_low_rank, feature_energy, marginal_linear, rms_low_rank
from .attention import block_sparse_attention, block_sparse_attention_backward, dense_attention
from .background import (
    add_linear,
    block_pool_state,
    block_sparse_linear,
    block_sparse_mixed,
    linear_read,
    low_rank_state,
    mix_background,
)
from .routing import block_mass, block_pool, block_select, lists_from_bits

__all__ = [
    "add_linear", "add_rms_low_rank", "block_mass", "block_pool", "block_pool_state", "block_select",
    "block_sparse_attention", "block_sparse_attention_backward", "block_sparse_linear", "block_sparse_mixed",
    "dense_attention", "feature_energy", "linear_read", "lists_from_bits", "low_rank_state", "marginal_linear",
    "mix_background", "rms_low_rank",
]
