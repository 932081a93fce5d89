"""Why an attention call stays dense: one ordered list of checks, each a reason or None."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...attention import TokenLayout
from ...attention.backend import dense_is_faster, shape_reason
from ...attention.schedule import FIRST_STEPS

if TYPE_CHECKING:
    from .candidate import Candidate

BACKEND_DENSE = "backend is set to dense"
NOTHING_TO_SKIP = "sparsity leaves no block out"
DENSE_LAYER = "dense layers"
TOO_SHORT = "{tokens} tokens are fewer than min_tokens {least}"
NOT_OURS = "{name} is none of the video models that can be sparse"
UNKNOWN_LAYOUT = "{name} is a kind of video model whose token layout is not known"
UNSUPPORTED = "{name} cannot be sparse: {why}"
SINGLE_IMAGE = "it makes a single image, too few tokens to gain anything"
REPEATED = "its self-attention calls attention more than once: another node has replaced it"
SOME_QUERIES = "its queries are {queries} of {tokens} tokens, which are not those of the video"
GUIDE_STRENGTH = "a guide's strength is not 1, which {method} cannot honour"
UNKNOWN_TOKENS = (
    "{tokens} tokens, but the video's grid {grid} has {held}: the position of the rest is unknown"
)
MASK_SHAPE = "there is an attention mask of shape {shape}"
MASK_VALUES = "an attention mask weights tokens or hides part of the video"
TRAINING = "gradients are required (training)"
NO_WEIGHTS = "'{adapter}' has no weights for control blocks"
MISSING_INPUT = "{missing} (does another node replace the layer's self-attention?)"
FAILED = "the sparse path failed ({error})"
NOT_FINITE = "recomputed, because the sparse output was not finite"
OTHER_MODEL = "a second model in this run, {name}, has no RoPeSLR node"
# Of layers that never called the attention override in a model call.
REPLACED = (
    "{layers} never called the attention override: another node replaced their self-attention"
)
SPREAD_OTHERWISE = "{layers} attend in a way of Raylight's own that is not known here"
SKIPPED = "{layers} were skipped or replaced by another node's block patch"
CACHED = "{layers} were skipped in later calls, as block caches do"
OVERWRITTEN = (
    "{layers} never called the attention override: another node took it inside the model call"
)
NOT_SELF_ATTENTION = (
    "{layers} called the attention override, but not through their self-attention module: another "
    "node calls it in a way of its own"
)
UNSEEN = "{layers} never called the attention override: another node may bypass it"


class DenseReason(NamedTuple):
    """Why a call stays dense.

    chosen: the person asked for it, so nothing is logged or refused.
    """

    text: str
    chosen: bool = False

    def __str__(self) -> str:
        return self.text


class SparseNotPossible(RuntimeError):
    """Raised instead of a dense fallback where the person asked for strict."""

    def __init__(
        self, reason: DenseReason | str, remedy: str = "Switch strict off to run such calls dense."
    ) -> None:
        super().__init__(f"RoPeSLR (strict): this run cannot be sparse: {reason}. {remedy}")
        self._made_of = reason, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, as errors of other processes are, it says the same once."""
        return type(self), self._made_of


def why_dense(candidate: Candidate) -> DenseReason | None:
    """The first reason that applies; None where the call can be sparse."""
    for check in CHECKS:
        reason = check(candidate)
        if reason is not None:
            return reason
    return None


def dense_for_now(candidate: Candidate, reason: DenseReason) -> bool:
    """Whether a call is dense only because it is one of a run's first steps."""
    return reason.text == FIRST_STEPS and all(check(candidate) is None for check in CHECKS[1:])


def _step(candidate: Candidate) -> DenseReason | None:
    """What holds for the whole model call: backend, schedule, a method's own dense steps."""
    return candidate.call.reason


def _layer(candidate: Candidate) -> DenseReason | None:
    if candidate.layer.number in candidate.plan.dense_layers:
        return DenseReason(DENSE_LAYER, chosen=True)
    return None


def _repeated(candidate: Candidate) -> DenseReason | None:
    """What a run remembers of a layer would be mixed up."""
    repeated = candidate.call.entering_of(candidate.host).calls > 1
    return DenseReason(REPEATED) if repeated else None


def _gradients(candidate: Candidate) -> DenseReason | None:
    """Training recomputes layers, so what a run remembers would belong to another pass."""
    host = candidate.host
    if candidate.call.trains:
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (host.q, host.k, host.v)):
        return DenseReason(TRAINING)
    return None


def _heads(candidate: Candidate) -> DenseReason | None:
    host = candidate.host
    text = shape_reason(host.head_dim, host.heads, host.kv_heads)
    return None if text is None else DenseReason(text)


def _speed(candidate: Candidate) -> DenseReason | None:
    if candidate.call.trains or candidate.call.run.attention.always:
        return None
    text = dense_is_faster(candidate.plan, candidate.host.q)
    return None if text is None else DenseReason(text)


def _tokens(candidate: Candidate) -> DenseReason | None:
    """Where the video lies, and what a mask hides."""
    layout = candidate.layout
    if not isinstance(layout, TokenLayout):
        return layout
    if layout.weighted and not candidate.call.run.attention.tells_mass:
        return DenseReason(GUIDE_STRENGTH.format(method=candidate.plan.method))
    return None


def _length(candidate: Candidate) -> DenseReason | None:
    if candidate.call.run.attention.always:
        return None
    tokens, least = candidate.token_layout.video_tokens, candidate.plan.min_tokens
    return too_short(tokens, least)


def _sparsity(candidate: Candidate) -> DenseReason | None:
    nothing = candidate.plan.drops_nothing(candidate.token_layout.video_tokens)
    if nothing and not candidate.call.run.attention.always:
        return DenseReason(NOTHING_TO_SKIP, chosen=True)
    return None


def _adapter(candidate: Candidate) -> DenseReason | None:
    adapter = candidate.plan.adapter
    if adapter is not None and not adapter.knows(candidate.layer.identity):
        return DenseReason(NO_WEIGHTS.format(adapter=adapter.name))
    return None


def _inputs(candidate: Candidate) -> DenseReason | None:
    missing = candidate.call.run.attention.missing(candidate.inputs)
    return DenseReason(MISSING_INPUT.format(missing=missing)) if missing else None


def too_short(tokens: int, least: int) -> DenseReason | None:
    """Whether a video has too few tokens to gain anything."""
    if tokens < least:
        return DenseReason(TOO_SHORT.format(tokens=tokens, least=least))
    return None


# Cheap ones first: the last of them takes the layer's inputs from the hooks.
CHECKS: tuple[Callable[[Candidate], DenseReason | None], ...] = (
    _step,
    _layer,
    _repeated,
    _gradients,
    _heads,
    _speed,
    _tokens,
    _length,
    _sparsity,
    _adapter,
    _inputs,
)
