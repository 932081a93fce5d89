"""The attention override: decides for every attention call between the sparse path and whoever held the slot before.

It stands in the slot only while one model call runs, so it captures nothing when the node is executed: whatever another
node put into the slot, before or after this pack's node, lies below and keeps every call that stays dense.
"""

from __future__ import annotations

import torch

from ...kernels.ops import TritonNotUsable
from .layer_inputs import CALL
from .memory import unrecorded
from .sampling_run import CROSS_ATTENTION, OUTSIDE_BLOCKS

SLOT = "optimized_attention_override"


@torch.compiler.disable
def sparse_override(func, q, k, v, heads, mask=None, **kwargs):
    """The holder of the slot; a compiled model breaks its graph here, so that settings always take effect."""
    options = kwargs["transformer_options"]
    call = options[CALL]
    run = call.run
    by_head = bool(kwargs.get("skip_reshape"))
    batch, tokens = q.shape[0], q.shape[-2]
    if call.unsupported:                    # how its tokens lie is not known
        if "block_index" in options and tokens == k.shape[-2]:
            call.leave_dense(call.unsupported)
        return call.dense(func, q, k, v, heads, mask, kwargs)
    found = run.facts.layer(options)
    if found is None:
        call.tally.other_calls[OUTSIDE_BLOCKS] += 1
        return call.dense(func, q, k, v, heads, mask, kwargs)
    layer, number = found
    turn = call.self_attention(layer, batch, tokens, k.shape[-2])
    if turn is None:
        call.tally.other_calls[CROSS_ATTENTION] += 1
        return call.dense(func, q, k, v, heads, mask, kwargs)

    layer = call.identity(layer, number, turn)
    call.layers_seen.add(layer)
    width = q.shape[-1] if by_head else q.shape[-1] // heads
    kv_heads = k.shape[1] if by_head else k.shape[-1] // width
    reason, chosen = call.dense_reason, True
    if reason is None:
        reason, chosen = run.layer_reason(number, width, heads, kv_heads)
    if reason is None:
        with unrecorded():
            out, reason, chosen = _attend(call, layer, number, q, k, v, heads, mask, kwargs)
        if reason is None:
            return out
    # Here a failed call's tensors are free again, so a dense call may fit where the sparse one did not.
    call.entering.drop()
    if not chosen:
        run.warn_dense(reason)
    call.stay_dense(reason, number, batch, tokens, width, heads)
    with run.clock.measure("dense", q.device):
        return call.dense(func, q, k, v, heads, mask, kwargs)


def _attend(
    call, layer, number, q, k, v, heads, mask, kwargs
) -> tuple[torch.Tensor | None, str | None, bool]:
    """The sparse output in the form that the caller wants; or why there is none, and whether the person chose that."""
    run, by_head = call.run, bool(kwargs.get("skip_reshape"))
    try:
        (layout, visible), reason = call.places(kwargs["transformer_options"], q.shape[-2], mask)
        if reason is not None:
            return None, reason, False
        reason, chosen = run.length_reason(layout)
        if reason is not None:
            return None, reason, chosen
        inputs = call.entering.take(q.shape[0], q.shape[-2], q.device, layout)
        reason = run.input_reason(layer, inputs)
        if reason is not None:
            return None, reason, False
        views = [x if by_head else x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
        with run.clock.measure("sparse", q.device):
            out, cost, backend = run.attend(
                *views, layout, layer, call.sigma, call.conditioning, call.part, kwargs.get("scale"), inputs, visible
            )
            call.note_output(out)
            if not kwargs.get("skip_output_reshape"):
                out = out.transpose(1, 2).flatten(2)
        call.sparse(cost, backend, layout.tokens, number)
        return out, None, False
    except TritonNotUsable:                 # asked for by name: to go on without it would be a silent no
        raise
    except Exception as error:
        if run.plan.strict:
            raise
        words = str(error).partition("\n")[0]
        reason = f"the sparse path failed ({type(error).__name__}: {words})"
        run.say_once(f"attention runs dense: {reason}", not isinstance(error, torch.cuda.OutOfMemoryError))
        return None, reason, True           # said already
