"""What an attention layer is given besides q, k, v: its hidden state and the model's RoPE, seen by forward pre-hooks.

Attention itself shows neither: q and k arrive projected and rotated. The hooks live for one sampling run, only where an
adapter needs them, and hold nothing themselves: they write into the model call that is under way, if there is one.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch

from ...attention import LayerInputs, Positions, TokenLayout
from .recognise import blocks, unwrap

CALL = "ropeslr_call"


class EnteringLayer:
    """The hidden state and RoPE that the layer under way was called with; taken once, by its attention."""

    def __init__(self) -> None:
        self.control: dict[int, int] = {}   # VACE: which control block of a layer is under way, counted from 1
        self.control_seen = False           # hooks tell of control blocks in this call
        self._entered: Counter[int] = Counter()
        self._x: torch.Tensor | None = None
        self._rope: torch.Tensor | None = None
        self._read: tuple[torch.Tensor, Positions | None] | None = None     # of the last layer: all share one RoPE

    def enter(self, x: torch.Tensor, rope: torch.Tensor | None) -> None:
        self._x, self._rope = x, rope

    def enter_control(self, number: int) -> None:
        """A control block of a layer begins; `leave` ends what is known of it."""
        self.control_seen = True
        self._entered[number] += 1
        self.control[number] = self._entered[number]

    def leave(self, number: int) -> None:
        self.control.pop(number, None)

    def drop(self) -> None:
        """Let go of what a dense attention has no use for: it is as large as the activations of a layer."""
        self._x = self._rope = None

    def take(self, batch: int, tokens: int, device: torch.device, layout: TokenLayout | None) -> LayerInputs:
        """What was seen, if it belongs to an attention of so many tokens; a second call sees nothing."""
        x, rope, self._x, self._rope = self._x, self._rope, None, None
        if x is None or layout is None or x.shape[:2] != (batch, tokens) or x.device != device:
            return LayerInputs()
        if self._read is None or self._read[0] is not rope:
            video = slice(layout.before, layout.before + layout.video_tokens)
            self._read = (rope, read_positions(rope, tokens, video))
        return LayerInputs(x, self._read[1])


def read_positions(rope: torch.Tensor | None, tokens: int, video: slice = slice(None)) -> Positions | None:
    """cos and sin of ComfyUI's rotation matrices `(1, L, 1, D/2, 2, 2)`, the video's; None for any other form."""
    if not isinstance(rope, torch.Tensor) or rope.ndim != 6 or rope.shape[-2:] != (2, 2):
        return None
    if rope.shape[0] != 1 or rope.shape[1] != tokens or rope.shape[2] != 1:
        return None
    matrices = rope[0, video, 0].float()
    return Positions(matrices[..., 0, 0].contiguous(), matrices[..., 1, 0].contiguous())


@torch.compiler.disable
def note_inputs(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a self-attention module, called with (x, rope, transformer_options=...)."""
    options = kwargs.get("transformer_options")
    call = options.get(CALL) if isinstance(options, dict) else None
    if call is not None and args:
        call.entering.enter(args[0], args[1] if len(args) > 1 else kwargs.get("freqs"))


@torch.compiler.disable
def note_control(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of VACE's control blocks, whose layer transformer_options tell."""
    options = kwargs.get("transformer_options")
    call = options.get(CALL) if isinstance(options, dict) else None
    if call is not None and "block_index" in options:
        call.entering.enter_control(options["block_index"])


@contextlib.contextmanager
def watching(diffusion_models: list[torch.nn.Module], inputs: bool) -> Iterator[None]:
    """Hook some models for the length of a `with` block; nothing is left behind.

    Control blocks are always watched, every self-attention where its inputs are needed.
    """
    handles = []
    try:
        for block in (block for model in diffusion_models for block in getattr(unwrap(model), "vace_blocks", ())):
            handles.append(unwrap(block).register_forward_pre_hook(note_control, with_kwargs=True))
        for block in (block for model in diffusion_models if inputs for block in blocks(model)):
            attention = getattr(unwrap(block), "self_attn", None)
            if isinstance(attention, torch.nn.Module):
                handles.append(unwrap(attention).register_forward_pre_hook(note_inputs, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
