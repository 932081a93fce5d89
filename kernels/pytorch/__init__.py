"""The portable path: every operation in plain PyTorch, for any device, with bounded memory.

Contracts as in `reference`; every function is differentiable. Half precision is computed in float32
per head: a bf16 score of 100 is off by a quarter.
"""

from .additive import (
    add_coarse,
    add_rms_low_rank,
    feature_energy,
    marginal_linear,
    rms_low_rank,
)
from .attention import block_sparse_attention, dense_attention
from .attention_backward import block_sparse_attention_backward
from .eight_bit import quantize_kv
from .fused import add_linear, block_sparse_linear, block_sparse_mixed, linear_read, mix_background
from .linear_map import add_mapped
from .pooling import block_pool, block_pool_state, low_rank_state
from .prefix import prefix_attention
from .selection import block_mass, block_select, dropped_mass, lists_from_bits

__all__ = [
    "add_coarse",
    "add_linear",
    "add_mapped",
    "add_rms_low_rank",
    "block_mass",
    "block_pool",
    "block_pool_state",
    "block_select",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "block_sparse_linear",
    "block_sparse_mixed",
    "dense_attention",
    "dropped_mass",
    "feature_energy",
    "linear_read",
    "lists_from_bits",
    "low_rank_state",
    "marginal_linear",
    "mix_background",
    "prefix_attention",
    "quantize_kv",
    "rms_low_rank",
]
