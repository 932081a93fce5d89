"""RoLA's branch: a state of SiLU features, read, normalised and added to the sparse output.

The first pass reads k and v, the second q and the sparse output, in whose place the result is
written: five rows of D numbers per token and head, where plain PyTorch moves several times as many
in float32.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ..pytorch.additive import SIZE_EPS
from ..types import RmsLowRank, SiluMap
from .attention import normalised
from .features import silu_tile
from .launch import aligned, as_operand, kernel, launch_options, padded, strides
from .tiles import block_tokens, head_ptr, load_rows, store_rows

BLOCK = 64  # tokens at a time
TOKENS_PER_PROGRAM = 4096  # that one program sums into its part of the state


def add_rms_low_rank(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sparse: Tensor,
    gate: Tensor,
    branch: RmsLowRank,
    out: Tensor | None = None,
) -> Tensor:
    """See `reference.add_rms_low_rank`; written in place of `sparse` where it can be."""
    batch, heads, tokens, head_dim = q.shape
    q, k, v = aligned(q), aligned(k), aligned(v)
    found = sparse if aligned(sparse) is sparse else sparse.contiguous()
    rank = branch.q_map.proj.shape[1]
    state, size = normalised(_state(k, v, branch.k_map), q.dtype)
    _read[(-(-tokens // BLOCK), batch * heads)](
        q,
        found,
        state,
        size,
        gate.float().contiguous(),
        *_pointers(branch.q_map),
        *strides(q),
        *strides(found),
        heads,
        tokens,
        rank,
        *_numbers(branch.q_map),
        branch.eps,
        SIZE_EPS,
        **_shape(head_dim, rank),
        **launch_options("features"),
    )
    return found if out is None or out is found else out.copy_(found)


def _state(k: Tensor, v: Tensor, silu_map: SiluMap) -> Tensor:
    """sum phi_k^T v `(B, H, r, D)` float32."""
    batch, heads, tokens, head_dim = k.shape
    rank, programs = silu_map.proj.shape[1], -(-tokens // TOKENS_PER_PROGRAM)
    products = k.new_empty(batch, heads, programs, rank, head_dim, dtype=torch.float32)
    _silu_state[(programs, batch * heads)](
        k,
        v,
        products,
        *_pointers(silu_map),
        *strides(k),
        *strides(v),
        heads,
        tokens,
        rank,
        *_numbers(silu_map),
        TOKENS_PER_PROGRAM // BLOCK,
        programs,
        **_shape(head_dim, rank),
        **launch_options("features"),
    )
    return products.sum(dim=2)


def _pointers(silu_map: SiluMap) -> list[Tensor | None]:
    proj, cos, sin, pe, axis_ids, turn_cos, turn_sin = (as_operand(x) for x in silu_map)
    return [proj, cos, sin, pe, axis_ids, turn_cos, turn_sin]


def _numbers(silu_map: SiluMap) -> tuple[int, int]:
    """Pairs of features that are rotated, and rows of the learned positions."""
    turned = 0 if silu_map.feature_cos is None else silu_map.feature_cos.shape[1]
    return turned, 0 if silu_map.pe is None else silu_map.pe.shape[1]


def _shape(head_dim: int, rank: int) -> dict[str, int]:
    return {"D": head_dim, "DP": padded(head_dim), "RP": padded(rank), "BLOCK": BLOCK}


@kernel
def _silu_state(
    k_ptr, v_ptr, products_ptr,
    proj_ptr, cos_ptr, sin_ptr, pe_ptr, axis_ids_ptr, turn_cos_ptr, turn_sin_ptr,
    k_batch, k_head, k_row, v_batch, v_head, v_row,
    heads, tokens, rank, turned, pe_rows, per_program, programs,
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """phi^T v `(B*H, programs, rank, D)` float32."""
    program = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    k_ptr = head_ptr(k_ptr, b, h, k_batch, k_head)
    v_ptr = head_ptr(v_ptr, b, h, v_batch, v_head)
    products = tl.zeros((RP, DP), tl.float32)
    first = program * per_program
    for block in range(first, tl.minimum(first + per_program, tl.cdiv(tokens, BLOCK))):
        rows = block_tokens(None, block, tokens, BLOCK)
        v = load_rows(v_ptr, rows, v_row, D, DP)
        phi = silu_tile(
            k_ptr, rows, k_row, h, proj_ptr, cos_ptr, sin_ptr, pe_ptr, axis_ids_ptr,
            turn_cos_ptr, turn_sin_ptr, turned, pe_rows, rank, D, DP, RP, BLOCK,
        )  # fmt: skip
        products = tl.dot(tl.clamp(phi, -60000.0, 60000.0).to(v.dtype).T, v, products)
    features, channels = tl.arange(0, RP), tl.arange(0, DP)
    line = head * programs + program
    mask = (features < rank)[:, None] & (channels < D)[None, :]
    offsets = (line * rank + features)[:, None] * D + channels[None, :]
    tl.store(products_ptr + offsets, products, mask=mask)


@kernel
def _read(
    q_ptr, out_ptr, state_ptr, size_ptr, gate_ptr,
    proj_ptr, cos_ptr, sin_ptr, pe_ptr, axis_ids_ptr, turn_cos_ptr, turn_sin_ptr,
    q_batch, q_head, q_row, out_batch, out_head, out_row,
    heads, tokens, rank, turned, pe_rows, eps, size_eps,
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out += gate size(out) RMSNorm(phi state); state `(B*H, rank, D)` in units of `size`."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    rows = block_tokens(None, tl.program_id(0), tokens, BLOCK)
    phi = silu_tile(
        head_ptr(q_ptr, b, h, q_batch, q_head), rows, q_row, h, proj_ptr, cos_ptr, sin_ptr, pe_ptr,
        axis_ids_ptr, turn_cos_ptr, turn_sin_ptr, turned, pe_rows, rank, D, DP, RP, BLOCK,
    )  # fmt: skip
    features, channels = tl.arange(0, RP), tl.arange(0, DP)
    mask = (features < rank)[:, None] & (channels < D)[None, :]
    offsets = features[:, None] * D + channels[None, :]
    state = tl.load((state_ptr + head * rank * D) + offsets, mask=mask, other=0.0)
    read = tl.dot(tl.clamp(phi, -60000.0, 60000.0).to(state.dtype), state)
    size = tl.load(size_ptr + head)
    read *= tl.rsqrt(tl.sum(read * read, 1) / D + eps / (size * size))[:, None]
    out_ptr = head_ptr(out_ptr, b, h, out_batch, out_head)
    near = load_rows(out_ptr, rows, out_row, D, DP).to(tl.float32)
    near_size = tl.sqrt(tl.sum(near * near, 1) / D + size_eps)
    gate = tl.load(gate_ptr + head * tokens + rows, mask=rows >= 0, other=0.0)
    store_rows(out_ptr, rows, out_row, near + read * (gate * near_size)[:, None], D, DP)
