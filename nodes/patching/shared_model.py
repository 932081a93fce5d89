"""Model calls whose tokens are spread over processes, as Raylight spreads them by xDiT.

Raylight's layers hand their own tokens to an attention function of their module, which exchanges
them for heads, attends and exchanges back. For the length of a model call another takes its place:
what it attends with in between is ComfyUI's own attention, so that everything else of a sparse run
is as on one GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Hashable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ...attention.parallel import Peers
from .call import CallFacts, ModelCall
from .candidate import HostCall
from .hooks import CALL, options_under_way
from .model_info import Layer
from .token_layout import SequenceInfo

ATTENTION = "xfuser_optimized_attention"  # a global of Raylight's modules, which its layers call
_UNDER_WAY: ContextVar[_SelfAttention] = ContextVar("under_way")


@dataclass(frozen=True)
class SharedModel:
    """DIFFUSION_MODEL wrapper of a model call that several processes compute together."""

    peers: Peers

    @torch.compiler.disable(recursive=False)  # what is put in place is no part of a graph
    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        call: ModelCall | None = options_under_way(args, kwargs).get(CALL)
        if call is None:
            return executor(*args, **kwargs)
        call.facts = own_rows(call.facts, args[0].shape[0], self.peers)
        places = _namespaces(call) if _is_known(call) else []
        if not places:  # the layers will not be seen, and said to be so
            return executor(*args, **kwargs)
        with _in_place(places, _SelfAttention(self.peers, call, places[0][ATTENTION])):
            return executor(*args, **kwargs)


def own_rows(facts: CallFacts, batch: int, peers: Peers) -> CallFacts:
    """What a call has of its batch where prompts are spread over processes too."""
    keys = [key for key, rows in facts.conditioning for _ in range(rows)]
    if batch == len(keys) or peers.guidance is None:
        return facts
    first = dist.get_rank(peers.guidance) * batch
    own = itertools.groupby(keys[first : first + batch])
    return replace(facts, conditioning=tuple((key, len(list(rows))) for key, rows in own))


def _is_known(call: ModelCall) -> bool:
    """Whether it is known how Raylight spreads what a call holds."""
    sequence = call.facts.sequence
    return not (sequence is None or sequence.in_stream or call.run.info.arrangement.guides)


def _namespaces(call: ModelCall) -> list[dict[str, Any]]:
    """The globals that hold Raylight's attention, of the layers that it has put its own into."""
    forwards = (getattr(each.forward, "__func__", each.forward) for each in call.layers)
    found = (getattr(each, "__globals__", {}) for each in forwards)
    return list({id(each): each for each in found if ATTENTION in each}.values())


@contextlib.contextmanager
def _in_place(places: list[dict[str, Any]], attention: _SelfAttention) -> Iterator[None]:
    """Have `shared_attention` called in places, for what is under way."""
    before = [place[ATTENTION] for place in places]
    token = _UNDER_WAY.set(attention)
    try:
        for place in places:
            place[ATTENTION] = shared_attention
        yield
    finally:
        for place, original in zip(places, before):
            place[ATTENTION] = original
        _UNDER_WAY.reset(token)


@torch.compiler.disable
def shared_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kw: Any) -> Tensor:
    """The same function in every call: with another each time, compiled layers compile again."""
    return _UNDER_WAY.get()(q, k, v, heads, *args, **kw)


class _SelfAttention:
    """What Raylight's layers call in one model call; all but self-attention is its own as before.

    q, k, v: `(B, L/P, H*D)`, or `(B, H, L/P, D)` with skip_reshape -> `(B, L/P, H*D)`.
    """

    def __init__(self, peers: Peers, call: ModelCall, original: Any) -> None:
        self.original = original
        self._peers = peers
        self._share = peers.share
        self._call = call
        self._rope: tuple[Tensor, Tensor] | None = None  # one's own part, which layers share, whole
        self._orders: dict[tuple[Hashable, int], slice | Tensor] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        entering, peers = self._call.entering, self._peers
        host = HostCall(self.original, q, k, v, heads, None, kwargs)
        if entering.layer is None or host.tokens != host.kv_tokens:
            return self.original(q, k, v, heads, *args, **kwargs)
        order = self._order(entering.layer, host)

        def whole(x: Tensor) -> Tensor:
            return peers.heads(x)[:, order]

        if host.by_head:
            q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
        entering.widen(whole, lambda rope: self._whole_rope(rope, order))
        out = optimized_attention(
            whole(q),
            whole(k),
            whole(v),
            heads // self._share.size,
            transformer_options=entering.options,
        )
        spread = out.new_zeros(out.shape[0], self._share.size * host.tokens, out.shape[2])
        spread[:, order] = out
        return peers.tokens(spread)

    def _order(self, layer: Layer, host: HostCall) -> slice | Tensor:
        """See `whole_order`; worked out once for layers alike."""
        kind = layer.identity[0] if isinstance(layer.identity, tuple) else "block"
        if (kind, host.tokens) not in self._orders:
            sequence, options = self._call.facts.sequence, self._call.entering.options
            assert sequence is not None  # `SharedModel` keeps such calls away
            parts = (self._share.size, host.tokens)
            found = whole_order(sequence, options, parts, by_itself=kind == "double")
            self._orders[kind, host.tokens] = (
                found if isinstance(found, slice) else found.to(host.q.device)
            )
        return self._orders[kind, host.tokens]

    def _whole_rope(self, rope: Tensor, order: slice | Tensor) -> Tensor:
        """RoPE of all tokens, `(1, L/P, ...)` of one's own given."""
        if self._rope is None or self._rope[0] is not rope:
            self._rope = rope, torch.cat(self._peers.gather(rope), dim=1)[:, order]
        return self._rope[1]


def whole_order(
    sequence: SequenceInfo, options: dict[str, Any], parts: tuple[int, int], by_itself: bool
) -> slice | Tensor:
    """Where a sequence's tokens are among those of all processes: not those that fill up the last.

    parts: how many processes, and tokens of each. by_itself: text and video are each spread by
    itself, as in HunyuanVideo's double blocks, where every process has some of the text before some
    of the video -> int64 `(L,)`. What fills up the text, or stands behind extras of unknown length,
    stays: Raylight attends to it too.
    """
    size, each = parts
    grid = sequence.sides(options)
    video, everything = math.prod(grid), size * each
    if by_itself:
        spread = torch.arange(everything).view(size, each)
        text = max(0, each - -(-video // size))
        return torch.cat((spread[:, :text].flatten(), spread[:, text:].flatten()[:video]))
    before = math.prod(grid[1:]) if sequence.reference else 0
    if sequence.text_first:
        before = int(options.get("img_slice", (everything - video,))[0])
    known = before + video
    # Beyond what fills up there may be tokens that nothing here knows of: the layout will say so.
    return slice(known if known <= everything < known + size else everything)
