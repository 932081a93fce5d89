"""Linear branches added to the sparse output, in plain PyTorch: RoLA's normalised one, and SLA's over some blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..background import SiluMap
from .background import add_places, project
from .heads import gather, per_head, token_slots, wide

SIZE_EPS = 1e-5                             # under the root of the sparse output's mean square
BLOCKS_PER_STEP = 64                        # query blocks whose D x D states stand in memory at once


def add_rms_low_rank(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, gate: Tensor, q_map: SiluMap, k_map: SiluMap, eps: float
) -> Tensor:
    """See `reference.add_rms_low_rank`."""
    dtype = wide(q.dtype)

    def add(b: int, h: int) -> tuple[Tensor]:
        sparse = out[b, h].to(dtype)
        size = (sparse.square().mean(dim=-1, keepdim=True) + SIZE_EPS).sqrt()
        low_rank = _rms_low_rank(q, k, v, q_map, k_map, eps, b, h)
        return (((sparse / size + gate[b, h, :, None].to(dtype) * low_rank) * size).to(q.dtype),)

    return per_head(q, add, host=1)[0]


def rms_low_rank(q: Tensor, k: Tensor, v: Tensor, q_map: SiluMap, k_map: SiluMap, eps: float) -> Tensor:
    """See `reference.rms_low_rank`; float32 or wider."""
    return per_head(q, lambda b, h: (_rms_low_rank(q, k, v, q_map, k_map, eps, b, h),))[0]


def _rms_low_rank(q, k, v, q_map: SiluMap, k_map: SiluMap, eps: float, b: int, h: int) -> Tensor:
    read = silu_features(q[b, h].to(wide(q.dtype)), q_map, h) @ _state(k, v, k_map, b, h)
    return read * (read.square().mean(dim=-1, keepdim=True) + eps).rsqrt()


def feature_energy(q: Tensor, k: Tensor, v: Tensor, q_map: SiluMap, k_map: SiluMap) -> Tensor:
    """See `reference.feature_energy`."""

    def energy(b: int, h: int) -> tuple[Tensor]:
        size = silu_features(q[b, h].to(wide(q.dtype)), q_map, h).square().mean(dim=0)
        return (size * _state(k, v, k_map, b, h).square().sum(dim=-1),)

    return per_head(q, energy)[0]


def _state(k: Tensor, v: Tensor, map: SiluMap, b: int, h: int) -> Tensor:
    """sum phi_k^T v of one head: -> `(r, D)`."""
    dtype = wide(k.dtype)
    return silu_features(k[b, h].to(dtype), map, h).T @ v[b, h].to(dtype)


def silu_features(x: Tensor, map: SiluMap, h: int) -> Tensor:
    """phi of one head: x `(L, D)` -> `(L, r)`."""
    logits = project(x, map, h)
    if map.pe is not None:
        logits = add_places(logits, map, h)
    phi = F.silu(logits)
    if map.turn_cos is None:
        return phi
    turned = 2 * map.turn_cos.shape[1]
    even, odd = phi[:, :turned:2], phi[:, 1:turned:2]
    pairs = (even * map.turn_cos - odd * map.turn_sin, even * map.turn_sin + odd * map.turn_cos)
    return torch.cat((torch.stack(pairs, dim=-1).flatten(-2), phi[:, turned:]), dim=-1)


def marginal_linear(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, marginal: Tensor, eps: float
) -> Tensor:
    """See `reference.marginal_linear`: one D x D state per key block, summed over the marked blocks of each row.

    That sum costs 2 Nq Nk D^2 per head, 1.6 % of dense attention in blocks of 64 of width 128, whatever the length.
    """
    dtype = wide(q.dtype)
    slots = token_slots(q_blocks, q.shape[2])
    width = q.shape[-1]

    def read(b: int, h: int) -> tuple[Tensor]:
        phi_k = gather(k[b, h].to(dtype).softmax(dim=-1), k_blocks, dtype, zero_empty=True)
        values = gather(v[b, h], k_blocks, dtype, zero_empty=True)
        states, norms = (phi_k.mT @ values).flatten(1), phi_k.sum(dim=1)
        phi_q = gather(q[b, h].to(dtype).softmax(dim=-1), q_blocks, dtype)
        parts = []
        for some in torch.arange(q_blocks.shape[0], device=q.device).split(BLOCKS_PER_STEP):
            mask = marginal[b, h, some].to(dtype)
            state = (mask @ states).unflatten(1, (width, -1))
            norm = (mask @ norms)[..., None]
            parts.append((phi_q[some] @ state) / (eps + phi_q[some] @ norm))
        return (torch.cat(parts).flatten(0, 1).index_select(0, slots),)

    return per_head(q, read)[0]
