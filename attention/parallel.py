"""Sequence parallelism by Ulysses: the whole sequence for a share of the heads.

Ulysses exchanges tokens for heads before attention and back after it (DeepSpeed-Ulysses, arXiv
2309.14509). In between every process has all tokens, so blocks, grid and order are those of the
whole video, and a head's calibration is its own. Only what is dealt out among all heads is asked of
the others: how many blocks each keeps, and what follows from it.

Ring attention is refused: no process has all keys, so the best blocks are not defined.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Peers:
    """The processes that compute one model call together.

    ulysses: those that have exchanged tokens for heads, each with a share of them. guidance: those
    that have the same heads for another prompt; None where there are none.
    """

    ulysses: dist.ProcessGroup | None = None
    guidance: dist.ProcessGroup | None = None

    @property
    def share(self) -> HeadShare:
        """This process's share of the heads."""
        group = self.ulysses
        return HeadShare(dist.get_rank(group), dist.get_world_size(group), self.gather)

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every process's tensor of one shape, in the order of heads; all have to call it."""
        x = x.contiguous()
        every = [torch.empty_like(x) for _ in range(dist.get_world_size(self.ulysses))]
        dist.all_gather(every, x, group=self.ulysses)
        return every

    def agree(self, flag: bool, device: torch.device) -> bool:
        """Whether a flag is set in every process; all have to call it."""
        found = torch.tensor(float(flag), device=device)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.ulysses)
        if self.guidance is not None:
            dist.all_reduce(found, dist.ReduceOp.MIN, group=self.guidance)
        return bool(found)

    def heads(self, x: Tensor) -> Tensor:
        """`(B, L/P, H*D)` of all heads and some tokens to `(B, L, H/P*D)` of all tokens."""
        size = dist.get_world_size(self.ulysses)
        if x.shape[-1] % size:
            raise ValueError(f"{x.shape[-1]} channels cannot be shared by {size} processes")
        found = self._exchanged(x.unflatten(-1, (size, -1)).movedim(-2, 0))
        return found.movedim(0, 1).flatten(1, 2)

    def tokens(self, x: Tensor) -> Tensor:
        """The way back: `(B, L, H/P*D)` to `(B, L/P, H*D)`."""
        size = dist.get_world_size(self.ulysses)
        found = self._exchanged(x.unflatten(1, (size, -1)).movedim(1, 0))
        return found.movedim(0, -2).flatten(-2)

    def _exchanged(self, parts: Tensor) -> Tensor:
        """`(P, ...)`: what is for every process, to what is from every process."""
        sent = parts.contiguous()
        found = torch.empty_like(sent)
        dist.all_to_all_single(found, sent, group=self.ulysses)
        return found


class UlyssesAttention:
    """What yunchang's and xDiT's `LongContextAttention` take as `attn_processor`.

    Before each self-attention `next` says which it is. Called with q, k, v `(B, L', h, D)` after
    the exchange, h of the heads, L' tokens of which all beyond the layout's are padding.
    """

    def __init__(self, plan: ResolvedPlan, group: dist.ProcessGroup | None = None) -> None:
        self.peers = Peers(group)
        self.share = self.peers.share
        if plan.adapter is not None:
            plan = replace(plan, adapter=self.share.adapter(plan.adapter))
        self.run = AttentionRun(plan, self.share)
        self._call: AttentionCall | None = None

    def next(self, call: AttentionCall) -> None:
        """Which attention comes next; its layer's inputs, where it has any, of one's own heads."""
        self._call = call

    def exchange(self, x: Tensor, tokens: int) -> Tensor:
        """A hidden state `(B, L'/P, H*D)` of some tokens to `(B, tokens, h*D)` of some heads."""
        return self.peers.heads(x)[:, :tokens]

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
