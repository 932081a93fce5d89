"""Attention in 8 bits in plain PyTorch: the same rounding as the kernels, at no gain in speed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import GAINS, LARGEST, BlockMask, EightBit, TokenBlocks, value_slots
from .common import acc_dtype, gather, per_head, scatter

TILE = 64  # keys at a time, as in the kernels: weights are rounded relative to what came before
BLOCKS_PER_STEP = 64
SMALLEST = 1e-20  # of what a scale is made of


def quantize_kv(
    k: Tensor, v: Tensor, blocks: TokenBlocks, k_mean: Tensor, v_mean: Tensor, dtype: torch.dtype
) -> EightBit:
    """See `reference.quantize_kv`."""
    sums, slots = acc_dtype(k.dtype), value_slots(blocks.block_size).to(k.device)
    empty = blocks.empty[..., None]

    def quantize(b: int, h: int) -> tuple[Tensor, ...]:
        keys, values = (
            (gather(x[b, h], blocks, sums) - mean[b, h].to(sums)).masked_fill(empty, 0.0)
            for x, mean in ((k, k_mean), (v, v_mean))
        )
        k_scale = keys.abs().amax(dim=(-2, -1)).clamp(min=SMALLEST) / 127
        v_scale = values.abs().amax(dim=(0, 1)).clamp(min=SMALLEST) / LARGEST[dtype]
        values = (values / v_scale)[:, slots].mT
        rounded = values.round() if dtype == torch.int8 else values
        return (keys / k_scale[:, None, None]).round().to(torch.int8), k_scale, rounded, v_scale

    keys, k_scale, values, v_scale = per_head(k, quantize)
    scales = k_scale.float(), v_scale.float()
    return EightBit(keys, scales[0], k_mean.float(), values.to(dtype), scales[1], v_mean.float())


def eight_bit_attention(
    q: Tensor, mask: BlockMask, kv: EightBit, scale: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.eight_bit_attention`."""
    dtype, (q_blocks, kv_blocks) = acc_dtype(q.dtype), (mask.q_blocks, mask.kv_blocks)
    size, unused = kv_blocks.block_size, kv_blocks.num_blocks
    each, order = max(1, TILE // size), value_slots(size).argsort().to(q.device)
    bias = F.pad(torch.zeros(kv_blocks.tokens.shape, dtype=dtype, device=q.device), (0, 0, 0, 1))
    bias[:-1].masked_fill_(kv_blocks.empty, -torch.inf)
    bias[-1] = -torch.inf

    def attend(b: int, h: int) -> tuple[Tensor, Tensor]:
        queries = gather(q[b, h], q_blocks, dtype)
        q_scale = queries.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST) / 127
        q8, log2_scale = (queries / q_scale).round(), q_scale * (scale / math.log(2))
        keys = kv.k[b, h].to(dtype) * kv.k_scale[b, h, :, None, None]
        keys, values = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (keys, _values(kv, b, h, order)))
        lists = mask.head_lists(b, h, unused)
        if lists.device.type == "cpu":
            lists = lists[:, : int(mask.kv_num_blocks[b, h].max())]
        width = max(each, -(-lists.shape[1] // each) * each)  # a head may keep nothing at all
        lists = F.pad(lists, (0, width - lists.shape[1]), value=unused)
        found = [
            _softmax(q8[rows], log2_scale[rows], lists[rows].split(each, dim=1), keys, values, bias)
            for rows in torch.arange(len(lists)).split(BLOCKS_PER_STEP)
        ]
        read, lse = (torch.cat(parts) for parts in zip(*found))
        gain = GAINS[kv.v.dtype] * math.log(2)
        lse = lse - gain + scale * (queries @ kv.k_mean[b, h].to(dtype))
        read = read * kv.v_scale[b, h].to(dtype) + kv.v_mean[b, h].to(dtype)
        read = read.masked_fill(lse[..., None] == -torch.inf, 0.0)
        return scatter(read.to(q.dtype), q_blocks), scatter(lse, q_blocks)

    def _softmax(
        q8: Tensor,
        log2_scale: Tensor,
        tiles: tuple[Tensor, ...],
        keys: Tensor,
        values: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Online, as the kernels go; weights are gained by what they are rounded in."""
        highest = q8.new_full(q8.shape[:2], -torch.inf)
        total, sums = q8.new_zeros(q8.shape[:2]), torch.zeros_like(q8)
        gain, rounds = GAINS[kv.v.dtype], kv.v.dtype == torch.int8
        for tile in tiles:
            near_k, near_v = (x[tile].flatten(1, 2) for x in (keys, values))
            scores = q8 @ near_k.mT * log2_scale + bias[tile].flatten(1)[:, None]
            new = torch.maximum(highest, scores.amax(dim=-1))
            shift = new.masked_fill(new == -torch.inf, 0.0)
            weights = torch.exp2(scores - shift[..., None] + gain)
            fade = torch.exp2(highest - shift)
            rounded = weights.round() if rounds else weights.to(kv.v.dtype).to(weights.dtype)
            sums = sums * fade[..., None] + rounded @ near_v
            highest, total = new, total * fade + weights.sum(dim=-1)
        smallest = torch.finfo(total.dtype).tiny
        return sums / total.clamp(min=smallest)[..., None], (highest + total.log2()) * math.log(2)

    return per_head(q, attend, nhd_outputs=1, out=out)


def _values(kv: EightBit, b: int, h: int, order: Tensor) -> Tensor:
    """Rounded values of one head `(Nk, S, D)`, slots in order."""
    return kv.v[b, h].float()[..., order].mT.contiguous()


def merged(near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: out `(..., D)`, LSE `(...)`."""
    lse = torch.logaddexp(near[1], far[1])
    share = (far[1] - lse).exp().nan_to_num(0.0)[..., None]
    return torch.lerp(near[0].to(share.dtype), far[0].to(share.dtype), share), lse
