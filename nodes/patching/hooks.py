"""Hooks on attention modules: which one is under way, and what it was called with.

An attention call itself tells none of this: not every model says which block calls, and q and k
arrive projected and rotated. The hooks live for one model call, in training for one run, and hold
nothing themselves: they write into the call that is under way.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...attention import LayerInputs, RopeTable, TokenLayout
from .model_info import Layer, coarse_gate

if TYPE_CHECKING:
    from .call import ModelCall
    from .candidate import HostCall

CALL, ENTERED = "ropeslr_call", "ropeslr_entered"


class EnteringLayer:
    """The self-attention under way: its layer, and the hidden state and RoPE it was called with."""

    def __init__(self) -> None:
        self._layer: Layer | None = None
        self.calls = 0  # of attention, by the module that is under way
        self.options: dict[str, Any] = {}  # transformer_options that it was called with
        self._times: Counter[Layer] = Counter()
        self._x: Tensor | None = None
        self._rope: Tensor | None = None
        self._gate: Callable[[Tensor], Tensor] | None = None
        # Of the last layer, with what it was read from: all layers share one RoPE.
        self._read: tuple[Tensor, RopeTable | None] | None = None

    def enter(self, layer: Layer) -> None:
        """A control block of VACE comes once for every control video, each time as another."""
        self._times[layer] += 1
        identity = layer.identity
        if isinstance(identity, tuple) and identity[0] == "control":
            identity = (*identity[:2], self._times[layer])
        self._layer, self.calls = Layer(identity, layer.number), 0

    def note(self, x: Tensor, rope: Tensor | None, gate: Callable[[Tensor], Tensor] | None) -> None:
        """x: one batch row may come without its dimension, as MiniMax H3 has it."""
        self._x, self._rope, self._gate = x[None] if x.ndim == 2 else x, rope, gate

    @property
    def layer(self) -> Layer | None:
        return self._layer

    def leave(self) -> None:
        self._layer, self.options = None, {}  # which hold the call, and so what it remembers
        self.drop()

    def layer_of(self, host: HostCall, guides: bool) -> Layer | None:
        """The layer under way, where an attention call is its self-attention; None where it is not.

        guides: the first call may have fewer queries than keys, as LTX makes it.
        """
        across = host.tokens != host.kv_tokens
        if self._layer is None or (across and (not guides or self.calls)):
            return None
        self.calls += 1
        return self._layer

    def widen(self, hidden: Callable[[Tensor], Tensor], rope: Callable[[Tensor], Tensor]) -> None:
        """Put what all tokens have in place of what some had, where these are spread."""
        if self._x is not None:
            self._x = hidden(self._x)
            self._rope = None if self._rope is None else rope(self._rope)

    def drop(self) -> None:
        """Let go of what dense attention does not use: it is as large as a layer's activations."""
        self._x = self._rope = self._gate = None

    def take(self, host: HostCall, layout: TokenLayout) -> LayerInputs:
        """What was seen, if it belongs to this attention; a second call sees nothing."""
        x, rope, gate = self._x, self._rope, self._gate
        self.drop()
        wanted = (host.batch, host.kv_tokens)
        if x is None or x.shape[:2] != wanted or x.device != host.q.device:
            return LayerInputs()
        if rope is None:
            return LayerInputs(x, None, gate)
        if self._read is None or self._read[0] is not rope:
            self._read = (rope, read_rope(rope, host.kv_tokens, layout.video))
        return LayerInputs(x, self._read[1], gate)


class Entered(EnteringLayer):
    """The same for one run of a layer that is trained through, handed to it in its own options.

    A checkpoint calls the layer again with the options that it was called with, and not its hooks.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self._layer, self.calls = layer, 1

    def layer_of(self, host: HostCall, guides: bool) -> Layer | None:
        """See `EnteringLayer.layer_of`."""
        across = host.tokens != host.kv_tokens
        return None if across and not guides else self._layer

    def drop(self) -> None:
        """Nothing: it is needed once more."""


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
def enter(
    module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of a self-attention module: (x, rope, ..., transformer_options)."""
    options = options_under_way(args, kwargs)
    call: ModelCall | None = options.get(CALL)
    layer = None if call is None else call.layers.get(module)
    if call is None or layer is None:
        return None
    entering = call.entering
    entering.enter(layer)
    entering.options = options
    found = None
    if call.trains and entering.layer is not None:
        entering = Entered(entering.layer)
        found = _with_entered(args, kwargs, entering)
    if args and call.run.needs_inputs:
        x, *rest = args
        entering.note(x, rest[0] if rest else kwargs.get("freqs"), coarse_gate(module))
    return found


def _with_entered(
    args: tuple, kwargs: dict[str, Any], entered: Entered
) -> tuple[tuple, dict[str, Any]]:
    """The arguments, with options of the layer's own in place of those that all share."""

    def own(value: Any) -> Any:
        ours = isinstance(value, dict) and CALL in value
        return {**value, ENTERED: entered} if ours else value

    return tuple(map(own, args)), {name: own(value) for name, value in kwargs.items()}


@torch.compiler.disable
def leave(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
    """Forward hook of the same: what calls attention from here on is something else."""
    call = _call_under_way(args, kwargs)
    if call is not None:
        call.entering.leave()


def _call_under_way(args: tuple, kwargs: dict[str, Any]) -> ModelCall | None:
    return options_under_way(args, kwargs).get(CALL)


def options_under_way(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The transformer_options among a module's arguments, where they belong to a call of ours."""
    for options in (kwargs.get("transformer_options"), *args):
        if isinstance(options, dict) and CALL in options:
            return options
    return {}


@torch.compiler.disable
def enter_preferring(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of any attention module that has an attention function of its own."""
    call = _call_under_way(args, kwargs)
    if call is not None:
        call.preferred = own_function(module)


@torch.compiler.disable
def leave_preferring(
    module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], out: Any
) -> None:
    """Forward hook of the same."""
    call = _call_under_way(args, kwargs)
    if call is not None:
        call.preferred = None


def own_function(module: torch.nn.Module) -> Callable[..., Tensor] | None:
    """The attention function that a checkpoint asks for in a module, as newer ComfyUI keeps it.

    An override comes before it there, so it is this pack that has to call it.
    """
    return getattr(getattr(module, "comfy_attention", None), "function", None)


@contextlib.contextmanager
def watching(layers: Iterable[torch.nn.Module], model: torch.nn.Module) -> Iterator[None]:
    """Hook a model's attention for the length of a `with` block; nothing is left behind.

    layers: its self-attention modules.
    """
    preferring = [module for module in model.modules() if own_function(module) is not None]
    handles: list[Any] = []

    def hook(module: torch.nn.Module, before: Any, after: Any) -> None:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))

    try:
        for module in layers:
            hook(module, enter, leave)
        for module in preferring:
            hook(module, enter_preferring, leave_preferring)
        yield
    finally:
        for handle in handles:
            handle.remove()
