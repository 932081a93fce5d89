"""One call of the diffusion model: the override on top of its slot, and a check of the numbers that come out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable

import torch
from comfy.patcher_extension import WrappersMP

from ...attention.accounting import AttentionCost, dense_flops
from .layer_inputs import CALL, EnteringLayer
from .override import SLOT, sparse_override
from .recognise import ModelFacts, blocks, recognise, unwrap
from .report import Tally
from .sampling_run import NOT_FINITE, SamplingRun
from .token_places import TokenPlaces, token_places, visible_tokens

logger = logging.getLogger(__name__)


class ModelCall:
    """What holds for all layers of one call, and what was seen in it."""

    def __init__(
        self, run: SamplingRun, sigma: float, conditioning: tuple[tuple[Hashable, int], ...],
        context_lengths: tuple[int, ...], places: TokenPlaces | None, below: Callable | None = None,
        unsupported: str | None = None, part: tuple[int, ...] = (), dense_reason: str | None = None,
    ) -> None:
        self.run = run
        self.unsupported = unsupported
        self.sigma = sigma
        self.step = run.schedule.step(sigma)
        self.tally = Tally()
        self.entering = EnteringLayer()
        self.dense_reason = dense_reason or run.call_reason(sigma)
        self.conditioning = conditioning
        self.part = part
        self.context_lengths = context_lengths
        self.below = below
        self.layers_seen: set[Hashable] = set()
        self._places = places
        self._read_mask: tuple[torch.Tensor, tuple] | None = None             # of the last layer: all share one mask
        self._shapes: dict[Hashable, tuple[int, int]] = {}
        self._same_length_calls: Counter[Hashable] = Counter()
        self._extremes: list[torch.Tensor] = []

    def dense(self, func: Callable, q, k, v, heads, mask, kwargs):
        """Hand the call, unchanged, to the previous holder of the slot, or to ComfyUI's own attention."""
        if self.below is not None:
            return self.below(func, q, k, v, heads, mask=mask, **kwargs)
        return func(q, k, v, heads, mask=mask, **kwargs)

    def places(self, options: dict, tokens: int, mask: torch.Tensor | None) -> tuple[tuple, str | None]:
        """Layout of a sequence and the tokens that a mask leaves (None = all); or why there is none."""
        layout, reason = self._places.layout(options, tokens, self.run.plan.block_order)
        visible = None
        if reason is None and mask is not None:
            if self._read_mask is None or self._read_mask[0] is not mask:
                self._read_mask = (mask, visible_tokens(mask, layout))
            visible, reason = self._read_mask[1]
        return (layout, visible), reason

    def self_attention(self, layer: Hashable, batch: int, q_tokens: int, k_tokens: int) -> int | None:
        """Which self-attention of its layer a call is, counted from 0; None for cross-attention.

        A block calls self-attention first, then one cross-attention per context, whose tokens may happen to be as many
        as the video's. VACE has a second block of the same number, for its control video.
        """
        if q_tokens != k_tokens or self._shapes.setdefault(layer, (batch, q_tokens)) != (batch, q_tokens):
            return None
        period = 1 + sum(length == q_tokens for length in self.context_lengths)
        turn, position = divmod(self._same_length_calls[layer], period)
        self._same_length_calls[layer] += 1
        return turn if position == 0 else None

    def identity(self, layer: Hashable, number: int, turn: int) -> Hashable:
        """Whose self-attention it is: the layer's own, or a control block's of the same number.

        Other nodes skip blocks, so a hook tells when a control block is entered; without one the turn has to do.
        """
        if number not in self.run.facts.control_layers:
            return layer
        entered = self.entering.control.get(number) if self.entering.control_seen else turn
        self.entering.leave(number)
        return ("control", number, entered) if entered else layer

    def missing_layers(self) -> frozenset[Hashable]:
        """Those of the layers that can be sparse that never asked the slot in this call."""
        return frozenset() if self.unsupported else frozenset(self.run.facts.expected_layers() - self.layers_seen)

    def sparse(self, cost: AttentionCost, backend: str, tokens: int, number: int) -> None:
        """Count a sparse self-attention call."""
        self.tally.sparse(cost, backend, tokens, self.step, number)

    def stay_dense(self, reason: str, number: int, batch: int, tokens: int, width: int, heads: int) -> None:
        """Count a self-attention call that stays dense."""
        self.tally.dense(reason, batch * dense_flops(tokens, width, heads), self.step, number)

    def leave_dense(self, reason: str, calls: int = 1) -> None:
        """Count and say calls that stay dense unseen, so that their cost is not known."""
        self.run.warn_dense(reason)
        self.tally.dense_calls[reason] += calls

    def note_output(self, out: torch.Tensor) -> None:
        """Remember a sparse output's extremes, without waiting for the device; NaN is one of them if it is there."""
        self._extremes += torch.aminmax(out.detach())

    def finite(self) -> bool:
        """Whether all sparse outputs of the call were; waits for the device, so it is asked once in a call."""
        return not self._extremes or bool(torch.isfinite(torch.stack(self._extremes)).all())


def call_model(run: SamplingRun, executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
    """Run the model with the override on top of its slot, for the length of this call."""
    base = executor.class_obj
    facts = recognise(base.diffusion_model)
    unsupported = facts.unsupported
    if facts != run.facts:                  # guiders with two models hand the first one's options to the second
        unsupported = unsupported or f"a second model, {facts.name}, takes part in this run"
    lengths, places = (), None
    if not unsupported:
        lengths = _context_lengths(facts, c_crossattn, kwargs)
        places = token_places(facts, unwrap(base.diffusion_model), x, kwargs)
    below = transformer_options.get(SLOT)
    first = run.begin_call(below)
    untouched = x.clone()                   # some nodes write into it, and it may be needed again

    def execute(x: torch.Tensor, dense_reason: str | None = None):
        call = ModelCall(
            run, float(transformer_options["sigmas"][0]), _conditioning(transformer_options, x.shape[0]), lengths,
            places, below, unsupported, _part(transformer_options), dense_reason,
        )
        options = {**transformer_options, CALL: call, SLOT: sparse_override}
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs), call

    result, call = execute(x)
    missing = call.missing_layers()
    if missing and _is_compiled(base, transformer_options) and run.compiles_anew(untouched.shape, missing):
        run.forget(x.device)                # some layers did ask the slot, behind others that were still dense
        result, call = execute(untouched.clone())
        run.excuse(call.missing_layers())
    if not missing:
        run.complete_shapes.add(untouched.shape)
    if run.plan.verbose:
        logger.info(
            "RoPeSLR: sigma %.4f, step %d of %d: %s", call.sigma, call.step + 1, run.schedule.steps,
            unsupported or call.dense_reason or "sparse",
        )
    if first:
        _look_for_silence(call)
    guarded = (tuple(key for key, _ in call.conditioning), call.part)
    if guarded not in run.unguarded and not call.finite():
        wasted = call.tally.spent.total()
        del result                          # free before the same is computed again
        run.forget(x.device)                # what it learned in this call may be spoiled
        result, call = execute(untouched, NOT_FINITE)
        call.tally.spent["computed again"] += wasted
        if torch.isfinite(result).all():
            run.say_not_finite()
        else:                               # computing every such call twice would not help
            run.unguarded.add(guarded)
            run.say_once("the model gives out numbers that are not finite, with dense attention too")
    run.end_call(call.tally)
    return result


def _context_lengths(facts: ModelFacts, text: torch.Tensor | None, conditions: dict) -> tuple[int, ...]:
    """Tokens of each context that the blocks attend to besides themselves."""
    if facts.arrangement.text_first:
        return ()
    images = [conditions[name].shape[-2] for name in ("clip_fea", "clip_fea_ref") if conditions.get(name) is not None]
    return (*([text.shape[-2]] if text is not None else []), *([sum(images)] if images else []))


def _look_for_silence(call: ModelCall) -> None:
    """Count and say what never asked the slot in the first call of a run: nothing else would show it."""
    if call.unsupported:
        if not call.tally.dense_calls:
            call.leave_dense(call.unsupported)
        return
    missing, expected = call.missing_layers(), call.run.facts.expected_layers()
    if missing:
        call.leave_dense(
            f"{len(missing)} of {len(expected)} layers do not ask the attention slot (replaced by another node?)",
            len(missing),
        )


def _conditioning(options: dict, batch: int) -> tuple[tuple[object, int], ...]:
    """Which rows of the batch belong to which conditioning: ((key, rows), ...)."""
    keys = options.get("uuids") or options.get("cond_or_uncond") or ["all"]
    if batch % len(keys):
        return (("all", batch),)
    return tuple((key, batch // len(keys)) for key in keys)


def _part(options: dict) -> tuple[int, ...]:
    """The frames of the context window that a model call looks at; none without windows."""
    return tuple(getattr(options.get("context_window"), "index_list", None) or ())


def _is_compiled(base_model: torch.nn.Module, options: dict) -> bool:
    module = base_model.diffusion_model
    if unwrap(module) is not module or "torch.compile" in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}):
        return True
    return any(unwrap(block) is not block for block in blocks(module))
