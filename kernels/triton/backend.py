"""The operations on Triton kernels, under the names and with the contracts of `pytorch`."""

from .additive import add_rms_low_rank
from .attention import block_sparse_attention, dense_attention
from .attention_backward import block_sparse_attention_backward
from .eight_bit import quantize_kv
from .fused import block_sparse_linear, block_sparse_mixed, mix_background
from .linear_map import add_mapped
from .pooling import block_pool, block_pool_state, low_rank_state
from .selection import block_mass, block_select, lists_from_bits

__all__ = [
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
    "lists_from_bits",
    "low_rank_state",
    "mix_background",
    "quantize_kv",
]
