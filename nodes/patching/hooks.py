"""Forward pre-hooks that see what an attention layer is given: the hidden state and RoPE.

Attention itself shows neither: q and k arrive projected and rotated. The hooks live for one
sampling run, only where an adapter needs them, and hold nothing themselves: they write into the
model call that is under way, if there is one.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...attention import LayerInputs, RopeTable, TokenLayout
from .model_info import blocks, unwrap

if TYPE_CHECKING:
    from .call import ModelCall
    from .candidate import HostCall

CALL = "ropeslr_call"


class EnteringLayer:
    """The hidden state and RoPE that the current layer was called with, for its attention."""

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._rope: Tensor | None = None
        # Of the last layer, with what it was read from: all layers share one RoPE.
        self._read: tuple[Tensor, RopeTable | None] | None = None

    def enter(self, x: Tensor, rope: Tensor | None) -> None:
        self._x, self._rope = x, rope

    def drop(self) -> None:
        """Let go of what dense attention does not use: it is as large as a layer's activations."""
        self._x = self._rope = None

    def take(self, host: HostCall, layout: TokenLayout) -> LayerInputs:
        """What was seen, if it belongs to this attention; a second call sees nothing."""
        x, rope = self._x, self._rope
        self.drop()
        wanted = (host.batch, host.tokens)
        if x is None or x.shape[:2] != wanted or x.device != host.q.device:
            return LayerInputs()
        if rope is None:
            return LayerInputs(x)
        if self._read is None or self._read[0] is not rope:
            self._read = (rope, read_rope(rope, host.tokens, layout.video))
        return LayerInputs(x, self._read[1])


class ControlBlocks:
    """VACE: which control block of a layer is under way, counted from 1."""

    def __init__(self) -> None:
        self.seen = False  # hooks tell of control blocks in this call
        self._entered: Counter[int] = Counter()
        self._current: dict[int, int] = {}

    def enter(self, number: int) -> None:
        """A control block of a layer begins."""
        self.seen = True
        self._entered[number] += 1
        self._current[number] = self._entered[number]

    def take(self, number: int) -> int:
        """The block that is under way, 0 for none; a second call sees none."""
        return self._current.pop(number, 0)


def read_rope(
    rope: Tensor | None,
    tokens: int,
    video: slice = slice(None),  # noqa: B008  read only
) -> RopeTable | None:
    """cos and sin of ComfyUI's rotation matrices `(1, L, 1, D/2, 2, 2)`, the video's; else None."""
    if not isinstance(rope, Tensor) or rope.ndim != 6 or rope.shape[-2:] != (2, 2):
        return None
    if rope.shape[0] != 1 or rope.shape[1] != tokens or rope.shape[2] != 1:
        return None
    matrices = rope[0, video, 0].float()
    return RopeTable(matrices[..., 0, 0].contiguous(), matrices[..., 1, 0].contiguous())


@torch.compiler.disable
def note_inputs(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a self-attention module: (x, rope, transformer_options=...)."""
    call = _call_under_way(kwargs)
    if call is not None and args:
        call.entering.enter(args[0], args[1] if len(args) > 1 else kwargs.get("freqs"))


@torch.compiler.disable
def note_control(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of VACE's control blocks, whose layer transformer_options tell."""
    call = _call_under_way(kwargs)
    if call is not None and "block_index" in kwargs["transformer_options"]:
        call.control.enter(kwargs["transformer_options"]["block_index"])


def _call_under_way(kwargs: dict[str, Any]) -> ModelCall | None:
    options = kwargs.get("transformer_options")
    return options.get(CALL) if isinstance(options, dict) else None


@contextlib.contextmanager
def watching(diffusion_models: Iterable[torch.nn.Module], inputs: bool) -> Iterator[None]:
    """Hook some models for the length of a `with` block; nothing is left behind.

    Control blocks are always watched, every self-attention where its inputs are needed.
    """
    models, handles = list(diffusion_models), []
    try:
        for block in (x for model in models for x in getattr(unwrap(model), "vace_blocks", ())):
            hook = unwrap(block).register_forward_pre_hook(note_control, with_kwargs=True)
            handles.append(hook)
        for block in (x for model in models if inputs for x in blocks(model)):
            attention = getattr(unwrap(block), "self_attn", None)
            if isinstance(attention, torch.nn.Module):
                inner = unwrap(attention)
                handles.append(inner.register_forward_pre_hook(note_inputs, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
