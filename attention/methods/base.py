"""The contract of a method, and the routing that all methods share."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ...kernels import ops
from ..accounting import routing_flops
from ..layout import BlockTables, TokenLayout
from ..plan import SparsePlan
from ..positions import Positions


class LayerInputs(NamedTuple):
    """What a host knows of a layer besides q, k, v; None where it does not."""

    x: Tensor | None = None                 # (B, L, H*D): the hidden state that enters the attention
    positions: Positions | None = None      # of the video's tokens


@dataclass(frozen=True)
class LayerCall:
    """Everything but q, k, v that a method may know about one attention call.

    layer: identity of the layer. step of `steps`: place in the whole sampling schedule. conditioning: (key, batch rows)
    in batch order, so that what is learned for one conditioning is never used for another. noise: 1 = pure noise.
    """

    layer: Hashable
    step: int
    conditioning: tuple[tuple[Hashable, int], ...]
    layout: TokenLayout
    tables: BlockTables
    scale: float
    backend: str = "auto"                   # of kernels.ops
    steps: int = 1
    noise: float | None = None
    inputs: LayerInputs = LayerInputs()
    part: Hashable = ()                     # which piece of a longer video

    @property
    def rows(self) -> list[tuple[Hashable, slice]]:
        """Each conditioning with its rows of the batch."""
        found, start = [], 0
        for key, count in self.conditioning:
            found.append((key, slice(start, start + count)))
            start += count
        return found

    @property
    def video(self) -> slice:
        """The video's tokens in the sequence."""
        return slice(self.layout.before, self.layout.before + self.layout.video_tokens)


class VideoOutput(NamedTuple):
    """What a method returns for the video's queries."""

    out: Tensor                             # (B, H, Lv, D)
    density: float                          # kept blocks / all blocks, mean over rows
    background: float                       # FLOPs of the background
    calibration: float = 0.0                # FLOPs of calibration or search in this call
    recall: float | None = None             # softmax mass kept, where this call measured it


class Method:
    """One instance serves one sampling run and owns whatever it remembers between calls."""

    routes = True                           # scores blocks in every call
    needs_x = False                         # calls without inputs.x cannot run
    needs_positions = False                 # calls without inputs.positions cannot run

    def dense_reason(self, step: int, steps: int) -> str | None:
        """Why the method itself leaves a step of the schedule dense; None where it does not."""
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> VideoOutput:
        """q `(B, H, Lv, D)` of the video; k, v `(B, H, L, D)` of the whole sequence, all after RoPE."""
        raise NotImplementedError


class Routing(NamedTuple):
    """Kept key blocks of every query block, with the pooled tensors they were chosen by."""

    indices: Tensor                         # (B, H, Nq, K) int32
    counts: Tensor                          # (B, H, Nq) int32
    tail: Tensor                            # (B, H, Nq): pooled log-mass of the blocks not kept
    pooled_q: Tensor                        # (B, H, Nq, D)
    pooled_k: Tensor                        # (B, H, Nk, D)
    density: float


def route(q: Tensor, k: Tensor, call: LayerCall, plan: SparsePlan, pooled_k: Tensor | None = None) -> Routing:
    """Score blocks by their means and keep the best `1 - sparsity` of the video's, plus what the layout forces.

    pooled_k: the key blocks' means, where the caller has them already.
    """
    tables, backend = call.tables, call.backend
    pooled_q = ops.block_pool(q.detach(), tables.video, backend)              # which blocks are kept has no gradient
    if pooled_k is None:
        pooled_k = ops.block_pool(k, tables.keys, backend)
    keep = plan.kept_blocks(tables.video.shape[0])
    indices, counts, tail = ops.block_select(
        pooled_q, pooled_k, tables.key_sizes, keep, tables.forced, call.scale, int(tables.forced_counts.max()), backend
    )
    return Routing(indices, counts, tail, pooled_q, pooled_k, tables.density(keep))


def routing_cost(q: Tensor, call: LayerCall) -> float:
    """FLOPs of `route` for all batch rows."""
    batch, heads, _, width = q.shape
    n_q, n_k = call.tables.video.shape[0], call.tables.keys.shape[0]
    return batch * routing_flops(call.layout.tokens, width, heads, n_q, n_k)

