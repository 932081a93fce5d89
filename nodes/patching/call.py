"""One call of the diffusion model: what holds for all of its layers, and what was seen in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...attention import TokenLayout
from ...attention.accounting import dense_flops
from ...attention.run import Attention
from .candidate import Candidate, HostCall
from .dense_reason import SOME_QUERIES, DenseReason
from .hooks import ENTERED, EnteringLayer
from .model_info import Layer
from .tally import Cell, Tally
from .token_layout import SequenceInfo, with_mask

if TYPE_CHECKING:
    from .sampling_run import SamplingRun

Override = Callable[..., Tensor]
Conditioning = tuple[tuple[Hashable, int], ...]

CROSS_ATTENTION = "cross-attention"
OTHER_ATTENTION = "other attention"


@dataclass(frozen=True)
class CallFacts:
    """What holds for a model call from outside.

    conditioning: (key, batch rows) in batch order. window: the frames that the call looks at, of a
    longer video. sequence: how its tokens lie; unsupported: why that is not known. previous: the
    override that was set before, or None for ComfyUI's own attention.
    """

    sigma: float
    conditioning: Conditioning
    window: tuple[int, ...] = ()
    sequence: SequenceInfo | None = None
    unsupported: DenseReason | None = None
    previous: Override | None = None


class ModelCall:
    """Decides which attention calls are self-attention, runs them, and counts."""

    def __init__(
        self,
        run: SamplingRun,
        facts: CallFacts,
        layers: Mapping[torch.nn.Module, Layer],
        reason: DenseReason | None = None,
    ) -> None:
        self.run = run
        self.facts = facts
        self.trains = run.trains
        told = run.training.number  # by who trains
        self.number = run.tally.model_calls if told is None else told  # from 1
        self._own_attention: Attention | None = None  # of a call that is trained through
        self.layers = layers  # of the self-attention modules that run in this call
        self.step = run.schedule.step(facts.sigma)  # of this sampler
        self.reason = reason or run.call_reason(facts.sigma)  # why the whole call stays dense
        self.tally = Tally()
        self.entering = EnteringLayer()
        self.layers_seen: set[Hashable] = set()
        self.stray_calls = 0  # of a sequence that may hold the video, by no known self-attention
        self.preferred: Callable[..., Tensor] | None = None  # of the module under way, see hooks
        self.overwritten = False  # another node took the override while the call ran
        self._read_mask: tuple[Tensor, TokenLayout | DenseReason] | None = None  # layers share it
        self._extremes: list[Tensor] = []

    @property
    def sigma(self) -> float:
        return self.facts.sigma

    @property
    def full_step(self) -> int:
        """The step of the whole schedule; of training, the number of the call."""
        return self.number if self.trains else self.run.schedule.before + self.step

    @property
    def full_steps(self) -> int:
        """Steps of the whole schedule; each call of training is by itself."""
        return 1 if self.trains else self.run.schedule.full_steps

    def attention_on(self, device: torch.device) -> Attention:
        """What attends: the run's, or in training what belongs to this call and its graph."""
        if not self.trains:
            return self.run.attention_on(device)
        if self._own_attention is None:
            self._own_attention = self.run.training.model_call()
        return self._own_attention

    @property
    def conditioning(self) -> Conditioning:
        return self.facts.conditioning

    @property
    def window(self) -> tuple[int, ...]:
        return self.facts.window

    @property
    def saw_attention(self) -> bool:
        """Whether any attention called the override at all; a cache may skip the whole model."""
        return bool(self.layers_seen or self.tally.other_calls)

    def missing_layers(self) -> frozenset[Hashable]:
        """Those of the layers that can be sparse that never called the override in this call."""
        if self.facts.unsupported:
            return frozenset()
        return frozenset(self.run.info.expected_layers() - self.layers_seen)

    def next_self_attention(self, host: HostCall) -> Layer | None:
        """The layer whose self-attention this call is; None for any other, which is counted."""
        if self.facts.unsupported:
            if "block_index" in host.options and host.tokens == host.kv_tokens:
                self.leave_dense(self.facts.unsupported)
            return None
        guides = bool(self.run.info.arrangement.guides)
        layer = self.entering_of(host).layer_of(host, guides)
        if layer is None:
            # ComfyUI names the block in some models; the tally tells the rest apart by length.
            across = "block_index" in host.options or host.tokens != host.kv_tokens
            self.tally.other_calls[CROSS_ATTENTION if across else OTHER_ATTENTION] += 1
            sequence = self.facts.sequence
            if sequence is not None and host.tokens == host.kv_tokens >= math.prod(sequence.grid):
                self.stray_calls += 1
            return None
        self.layers_seen.add(layer.identity)
        return layer

    def entering_of(self, host: HostCall) -> EnteringLayer:
        """What hooks saw of the self-attention that makes an attention call."""
        return host.options.get(ENTERED, self.entering)

    def layout_of(self, host: HostCall) -> TokenLayout | DenseReason:
        """Where the video lies in a call's sequence, and what a mask says of the other tokens."""
        assert self.facts.sequence is not None
        tokens, mask = host.kv_tokens, host.mask
        layout = self.facts.sequence.layout(host.options, tokens, self.run.plan.block_order)
        alone = host.tokens != tokens
        if isinstance(layout, DenseReason) or (mask is None and not alone):
            return layout
        if alone and (layout.before or host.tokens != layout.video_tokens):
            return DenseReason(SOME_QUERIES.format(queries=host.tokens, tokens=tokens))
        if mask is None:
            return layout
        if self._read_mask is None or self._read_mask[0] is not mask:
            self._read_mask = (mask, with_mask(layout, mask, alone))
        return self._read_mask[1]

    def run_previous(self, host: HostCall) -> Tensor:
        """Hand the call, unchanged, to the previous override, or to ComfyUI's own attention.

        That is the checkpoint's own, where it names one for the module.
        """
        arguments = (host.q, host.k, host.v, host.heads)
        if self.facts.previous is not None:
            return self.facts.previous(host.func, *arguments, mask=host.mask, **host.kwargs)
        return (self.preferred or host.func)(*arguments, mask=host.mask, **host.kwargs)

    def run_sparse(self, candidate: Candidate) -> Tensor:
        """Sparse self-attention, counted."""
        host, run = candidate.host, self.run
        q, k, v = host.views()
        attention = self.attention_on(q.device)
        with run.timing.measure("sparse", q.device):
            out, cost = attention.attend(q, k, v, candidate.attention_call())
            self.note_output(out)
            out = host.to_host_layout(out)
        cell = Cell(self.step, candidate.layer.number)
        tokens = candidate.token_layout.attended_tokens
        self.tally.sparse(cell, cost, run.backend_of(q), tokens)
        return out

    def observe(self, candidate: Candidate) -> None:
        """Let the method learn from a call that is dense for now."""
        q, k, v = candidate.host.views()
        attention = self.attention_on(q.device)
        self.tally.learned(attention.observe(q, k, v, candidate.attention_call()))

    def run_dense(self, host: HostCall, layer: Layer, reason: DenseReason) -> Tensor:
        """Log and count self-attention that stays dense."""
        self.entering_of(host).drop()
        self.run.notices.dense(reason)
        flops = host.batch * dense_flops(host.kv_tokens, host.head_dim, host.heads)
        flops *= host.tokens / host.kv_tokens  # fewer queries where LTX asks for the video's alone
        self.tally.dense(Cell(self.step, layer.number), reason.text, flops)
        with self.run.timing.measure("dense", host.q.device):
            return self.run_previous(host)

    def leave_dense(self, reason: DenseReason, calls: int = 1) -> None:
        """Say and count calls that stay dense unseen, so that their cost is not known."""
        self.run.notices.dense(reason)
        self.tally.dense_calls[reason.text] += calls

    def note_output(self, out: Tensor) -> None:
        """Remember a sparse output's extremes, NaN among them, without waiting for the device."""
        self._extremes += torch.aminmax(out.detach())

    def finite(self, device: torch.device) -> bool:
        """Whether all sparse outputs were; waits for the device, so it is asked once in a call.

        All processes that compute the call are asked, and all go on alike.
        """
        found = not self._extremes or bool(torch.isfinite(torch.stack(self._extremes)).all())
        return found if self.run.peers is None else self.run.peers.agree(found, device)
