"""VSA: kept tiles, plus attention between the means of all tiles, weighed by a gate.

    O_i = O_s,i + g_i * C_t(i)        O_s: softmax over the kept tiles; t(i): the tile of token i
    C   = softmax(mean(q) mean(k)^T / sqrt D) mean(v)     over all tiles, whatever their size
    g   = W x                                             x: what enters the attention; any sign

A tile is a cube of 4 x 4 x 4 tokens, cut off at the grid's far sides. What stands before the video
has tiles of 64 of its own, which hold nothing of two segments, are always kept and, as queries,
attend to everything; C is added to them too. A row keeps ceil((1 - sparsity) N) of the video's N
tiles by mean(q) mean(k)^T. Without a gate, as in a model that was not trained so, g = 0. Source:
VSA (arXiv 2505.13389) and hao-ai-lab/FastVideo, whose FastH3 checkpoints are of this form.
"""

from __future__ import annotations

import math

from torch import Tensor

from ...kernels import ops
from ..accounting import coarse_flops
from ..call import AttentionCall
from ..head_share import HeadShare
from .base import MethodOutput
from .top_k import TopK

ONE_PROCESS = (
    "vsa cannot share its heads among several GPUs: the model's own gate makes all of them at once"
)


class VSA(TopK):
    """Stateless: everything follows from the call, and the gate that the model itself holds."""

    always = True
    tells_mass = False  # of its coarse branch there is none
    needs_x = True

    def share_heads(self, share: HeadShare) -> None:
        """Refused: the model's own gate makes all heads of one hidden state."""
        raise ValueError(ONE_PROCESS)

    def kept(self, q: Tensor, call: AttentionCall) -> int:
        """See `Method.kept`; rounded up, as in training."""
        tiles = self.blocks(call.layout, q.device).num_ranked
        return max(1, min(math.ceil((1.0 - self.plan.sparsity) * tiles), tiles))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, out: Tensor | None = None
    ) -> MethodOutput:
        """See `Method.attend`."""
        found = super().attend(q, k, v, call, out)
        if call.inputs.gate is None or call.inputs.x is None:
            return found
        tokens, width = call.inputs.x.shape[1:]
        batch, heads, _, head_dim = q.shape
        tiles = self.blocks(call.layout, q.device).kv_blocks.num_blocks
        background = batch * coarse_flops(tokens, head_dim, heads, tiles, width)
        return found._replace(background=background)

    def gate(self, call: AttentionCall) -> Tensor | None:
        """See `Method.gate`."""
        inputs = call.inputs
        if inputs.gate is None:
            return None
        assert inputs.x is not None  # `needs_x` keeps calls without it away
        return inputs.gate(inputs.x)

    def add_branch(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        gate: Tensor | None,
        call: AttentionCall,
    ) -> Tensor:
        """See `Method.add_branch`."""
        if gate is None:
            return out
        gate = gate.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
        blocks, backend = self.blocks(call.layout, q.device).kv_blocks, self.plan.backend
        means = [ops.block_pool(x, blocks, backend=backend) for x in (q, k, v)]
        return ops.add_coarse(out, gate, (means[0], means[1], means[2]), blocks, scale=call.scale)
