"""One call of the diffusion model: the override on top of its slot, and a check of the numbers that come out."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Hashable

import torch
from comfy.patcher_extension import WrappersMP

from .layer_inputs import CALL, EnteringLayer
from .override import SLOT, sparse_override
from .recognise import blocks, recognise, unwrap
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
        self.entering = EnteringLayer()
        self.dense_reason = dense_reason or run.call_reason(sigma)
        self.conditioning = conditioning
        self.part = part
        self.context_lengths = context_lengths
        self.below = below
        self.attention_calls = 0
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

    def missing_layers(self) -> int:
        """How many of the layers that can be sparse never asked the slot in this call."""
        return 0 if self.unsupported else len(self.run.facts.expected_layers() - self.layers_seen)

    def note_output(self, out: torch.Tensor) -> None:
        """Remember a sparse output's extremes, without waiting for the device; NaN is one of them if it is there."""
        self._extremes += torch.aminmax(out.detach())

    def finite(self) -> bool:
        """Whether all sparse outputs of the call were; the only place that waits for the device."""
        return not self._extremes or bool(torch.isfinite(torch.stack(self._extremes)).all())


def call_model(run: SamplingRun, executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
    """Run the model with the override on top of its slot, for the length of this call."""
    first = run.tally.model_calls == 0
    run.tally.model_calls += 1
    base = executor.class_obj
    facts = recognise(base.diffusion_model)
    unsupported = facts.unsupported
    if facts != run.facts:                  # guiders with two models hand the first one's options to the second
        unsupported = unsupported or f"a second model, {facts.name}, takes part in this run"
    contexts = (c_crossattn, kwargs.get("clip_fea"))
    lengths = () if facts.arrangement.text_first else tuple(c.shape[-2] for c in contexts if c is not None)
    places = None if unsupported else token_places(facts, unwrap(base.diffusion_model), x, kwargs)
    below = transformer_options.get(SLOT)

    def execute(dense_reason: str | None = None):
        call = ModelCall(
            run, float(transformer_options["sigmas"][0]), _conditioning(transformer_options, x.shape[0]), lengths,
            places, below, unsupported, _part(transformer_options), dense_reason,
        )
        options = {**transformer_options, CALL: call, SLOT: sparse_override}
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs), call

    before = copy.deepcopy(run.tally)
    result, call = execute()
    if call.missing_layers() and not run.compiled_anew and _is_compiled(base, transformer_options):
        # Compiled before the node was added: torch.compile nodes drop the guards on transformer_options, so an old
        # graph, of the whole model or of one block, is used again and never asks the slot.
        logger.info("RoPeSLR: the model was compiled without this node; compiling it again")
        run.compiled_anew = True            # what is compiled from now on asks the slot
        run.forget()                        # some layers did ask it, behind others that were still dense
        run.tally = before
        torch.compiler.reset()
        result, call = execute()
    if run.plan.verbose:
        logger.info(
            "RoPeSLR: sigma %.4f, step %d of %d: %s", call.sigma, run.schedule.step(call.sigma) + 1,
            run.schedule.steps, unsupported or call.dense_reason or "sparse",
        )
    if first:
        run.look_below(below)
        _look_for_silence(run, call)
    if run.guarded and not call.finite():
        del result                          # free before the same is computed again
        run.forget()                        # what it learned in this call may be spoiled
        result, _ = execute(NOT_FINITE)
        run.not_finite(dense_too=not bool(torch.isfinite(result).all()))
    return result


def _look_for_silence(run: SamplingRun, call: ModelCall) -> None:
    """Count and say what never asked the slot in the first call of a run: nothing else would show it."""
    if call.unsupported:
        if call.attention_calls == 0:
            run.leave_dense(call.unsupported)
        return
    missing = call.missing_layers()
    if missing:
        run.leave_dense(
            f"{missing} of {len(run.facts.expected_layers())} layers do not ask the attention slot (replaced by "
            "another node?)", missing,
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
