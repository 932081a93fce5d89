"""Sequence parallelism by Ulysses: the whole sequence for a share of the heads.

Ulysses exchanges tokens for heads before attention and back after it (DeepSpeed-Ulysses, arXiv
2309.14509). In between every process has all tokens, so blocks, grid and order are those of the
whole video, and a head's calibration is its own. Only what is dealt out among all heads is asked of
the others: how many blocks each keeps, and what follows from it.

Ring attention is refused: no process has all keys, so the best blocks are not defined.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .call import AttentionCall
from .head_share import HeadShare
from .plan import ResolvedPlan
from .run import AttentionRun

RING = (
    "sparse attention needs all keys of a head in one process: the layout has {tokens} tokens, and "
    "{found} came. Use Ulysses alone (ring degree 1)"
)


def head_share(group: dist.ProcessGroup | None = None) -> HeadShare:
    """This process's share of the heads in a process group."""

    def gather(x: Tensor) -> list[Tensor]:
        every = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, x.contiguous(), group=group)
        return every

    return HeadShare(dist.get_rank(group), dist.get_world_size(group), gather)


class UlyssesAttention:
    """What yunchang's and xDiT's `LongContextAttention` take as `attn_processor`.

    Before each self-attention `next` says which it is. Called with q, k, v `(B, L', h, D)` after
    the exchange, h of the heads, L' tokens of which all beyond the layout's are padding.
    """

    def __init__(self, plan: ResolvedPlan, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.share = head_share(group)
        if plan.adapter is not None:
            plan = replace(plan, adapter=self.share.adapter(plan.adapter))
        self.run = AttentionRun(plan, self.share)
        self._call: AttentionCall | None = None

    def next(self, call: AttentionCall) -> None:
        """Which attention comes next; its layer's inputs, where it has any, of one's own heads."""
        self._call = call

    def exchange(self, x: Tensor, tokens: int) -> Tensor:
        """A hidden state `(B, L'/P, H*D)` of some tokens to `(B, tokens, h*D)` of some heads."""
        size = self.share.size
        parts = [part.contiguous() for part in x.chunk(size, dim=-1)]
        if len({part.shape for part in parts}) > 1 or len(parts) < size:
            raise ValueError(f"{x.shape[-1]} channels cannot be shared by {size} processes")
        sent, found = torch.stack(parts), x.new_empty(size, *parts[0].shape)
        dist.all_to_all_single(found, sent, group=self.group)
        return torch.cat(list(found), dim=1)[:, :tokens]

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *_: Any,
        causal: bool = False,
        softmax_scale: float | None = None,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        """-> out `(B, L', h, D)`, 0 for padding; and the LSE `(B, h, L')` that rings ask for: 0."""
        call = self._call
        if call is None or causal:
            raise ValueError("say which self-attention comes next; it cannot be causal")
        tokens = call.layout.tokens
        if q.shape[1] < tokens or k.shape[1] != q.shape[1]:
            found = f"{q.shape[1]} queries and {k.shape[1]} keys"
            raise ValueError(RING.format(tokens=tokens, found=found))
        self._call = None
        if softmax_scale is not None:
            call = replace(call, scale=softmax_scale)
        own = [x[:, :tokens].transpose(1, 2) for x in (q, k, v)]
        out, _cost = self.run.attend(own[0], own[1], own[2], call)
        padded = q.new_zeros(q.shape)
        padded[:, :tokens] = out.transpose(1, 2)
        return padded, q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
