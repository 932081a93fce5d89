"""The attention override: decides for every attention call between the sparse path and whoever held the slot before.

It stands in the slot only while one model call runs, so it captures nothing when the node is executed: whatever another
node put into the slot, before or after this pack's node, lies below and keeps every call that stays dense.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable

import torch

from ...kernels.ops import TritonNotUsable
from .layer_inputs import CALL, EnteringLayer
from .sampling_run import CROSS_ATTENTION, OUTSIDE_BLOCKS, SamplingRun
from .token_places import TokenPlaces, visible_tokens

SLOT = "optimized_attention_override"


class ModelCall:
    """One call of the diffusion model: what holds for all of its layers."""

    def __init__(
        self, run: SamplingRun, sigma: float, conditioning: tuple[tuple[Hashable, int], ...],
        context_lengths: tuple[int, ...], below: Callable | None, unsupported: str | None = None,
        part: tuple[int, ...] = (), places: TokenPlaces | None = None,
    ) -> None:
        self.run = run
        self.unsupported = unsupported
        self.sigma = sigma
        self.step = run.schedule.step(sigma)
        self.entering = EnteringLayer()
        self.dense_reason = run.call_reason(sigma)
        self.conditioning = conditioning
        self.part = part
        self.context_lengths = context_lengths
        self.below = below
        self.attention_calls = 0
        self.layers_seen: set[Hashable] = set()
        self._token_places = places or TokenPlaces()
        self._read_mask: tuple[torch.Tensor, tuple] | None = None           # of the last layer: all share one mask
        self._same_length_calls: Counter[Hashable] = Counter()

    def dense(self, func: Callable, q, k, v, heads, mask, kwargs):
        """Hand the call, unchanged, to the previous holder of the slot, or to ComfyUI's own attention."""
        if self.below is not None:
            return self.below(func, q, k, v, heads, mask=mask, **kwargs)
        return func(q, k, v, heads, mask=mask, **kwargs)

    def places(self, options: dict, tokens: int, mask: torch.Tensor | None) -> tuple[tuple, str | None]:
        """Layout of a sequence and the tokens that a mask leaves (None = all); or why there is none."""
        layout, reason = self._token_places.layout(options, tokens, self.run.plan.block_order)
        visible = None
        if reason is None and mask is not None:
            if self._read_mask is None or self._read_mask[0] is not mask:
                self._read_mask = (mask, visible_tokens(mask, layout))
            visible, reason = self._read_mask[1]
        return (layout, visible), reason

    def is_self_attention(self, layer: Hashable, q_tokens: int, k_tokens: int) -> bool:
        """Tell self- from cross-attention, also where a text happens to have as many tokens as the video.

        A block calls self-attention first, then one cross-attention per context.
        """
        if q_tokens != k_tokens:
            return False
        period = 1 + sum(length == q_tokens for length in self.context_lengths)
        position = self._same_length_calls[layer]
        self._same_length_calls[layer] += 1
        return position % period == 0


@torch.compiler.disable
def sparse_override(func, q, k, v, heads, mask=None, **kwargs):
    """The holder of the slot; a compiled model breaks its graph here, so that settings always take effect."""
    options = kwargs["transformer_options"]
    call: ModelCall = options[CALL]
    run = call.run
    call.attention_calls += 1
    if call.unsupported:                    # its calls are not told apart: how its tokens lie is not known
        run.warn_dense(call.unsupported)
        run.tally.dense_calls[call.unsupported] += 1
        return call.dense(func, q, k, v, heads, mask, kwargs)
    found = run.facts.layer(options)
    if found is None:
        run.tally.other_calls[OUTSIDE_BLOCKS] += 1
        return call.dense(func, q, k, v, heads, mask, kwargs)
    layer, number = found
    if not call.is_self_attention(layer, q.shape[-2], k.shape[-2]):
        run.tally.other_calls[CROSS_ATTENTION] += 1
        return call.dense(func, q, k, v, heads, mask, kwargs)

    call.layers_seen.add(layer)
    by_head = bool(kwargs.get("skip_reshape"))
    tokens = q.shape[-2]
    width = q.shape[-1] if by_head else q.shape[-1] // heads
    kv_heads = k.shape[1] if by_head else k.shape[-1] // width
    reason, chosen, layout, visible = call.dense_reason, True, None, None
    if reason is None:
        reason, chosen = run.layer_reason(number, width, heads, kv_heads)
    if reason is None:
        (layout, visible), reason = call.places(options, tokens, mask)
        chosen = False
    if reason is None:
        reason, chosen = run.length_reason(layout)
    inputs = call.entering.take(q.shape[0], tokens, q.device, layout)
    if reason is None:
        reason, chosen = run.input_reason(inputs), False
    if reason is None:
        try:
            views = [x if by_head else x.unflatten(-1, (heads, width)).transpose(1, 2) for x in (q, k, v)]
            out = run.attend(
                *views, layout, layer, call.sigma, call.conditioning, call.part, kwargs.get("scale"), inputs, visible
            )
            return out if kwargs.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)
        except TritonNotUsable:             # asked for by name: to go on without it would be a silent no
            raise
        except Exception as error:
            if run.plan.strict:
                raise
            words = str(error).partition("\n")[0]
            reason = f"the sparse path failed ({type(error).__name__}: {words})"
            run.warn_dense(reason, with_traceback=not isinstance(error, torch.cuda.OutOfMemoryError))
        # Here the failed call's tensors are free again, so a dense call may fit where the sparse one did not.
    if not chosen:
        run.warn_dense(reason)
    run.stay_dense(reason, q.shape[0], tokens, width, heads)
    return call.dense(func, q, k, v, heads, mask, kwargs)

