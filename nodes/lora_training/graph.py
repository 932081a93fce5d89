"""What backward passes ask of a loaded model: weights that may be saved for them, and less memory.

Both hold for the length of a `with` block, or change nothing that anybody could see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

import comfy.model_management
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

PLAIN = (torch.float32, torch.float16, torch.bfloat16)


def without_inference_tensors(model: torch.nn.Module) -> None:
    """Replace weights that were loaded in inference mode by equal ones that autograd may save.

    ComfyUI loads within inference mode. One weight after the other, in place: at no time is more
    than one of them held twice.
    """
    for module in model.modules():
        for name, weight in module._parameters.items():
            if _cannot_be_saved(weight):
                module._parameters[name] = torch.nn.Parameter(weight.detach().clone(), False)
        for name, buffer in module._buffers.items():
            if _cannot_be_saved(buffer):
                module._buffers[name] = buffer.detach().clone()


def _cannot_be_saved(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return tensor is not None and tensor.is_inference() and tensor.dtype in PLAIN


def detached(conditioning: list) -> list:
    """A CONDITIONING whose tensors autograd may save."""

    def clone(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        if isinstance(value, dict):
            return {key: clone(each) for key, each in value.items()}
        return type(value)(map(clone, value)) if type(value) in (list, tuple) else value

    return clone(conditioning)


@contextlib.contextmanager
def training_mode() -> Iterator[None]:
    """ComfyUI knows that gradients are wanted: parts of it then take differentiable paths."""
    management: Any = comfy.model_management
    before = getattr(management, "in_training", False)
    management.in_training = True
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        management.in_training = before


@contextlib.contextmanager
def checkpointed(blocks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Keep only the inputs of blocks for the backward pass, which runs each block once more."""
    replaced = []
    try:
        for block in blocks:
            replaced.append((block, block.__dict__.get("forward")))
            block.forward = _checkpointed(block.forward)
        yield
    finally:
        for block, before in replaced:
            del block.forward
            if before is not None:  # what another pack had put there
                block.forward = before


def _checkpointed(forward: Any) -> Any:
    def run(args: tuple, kwargs: dict[str, Any]) -> Any:
        # Some blocks add to their input in place: the second run must find what the first one did.
        return forward(*map(_own, args), **{name: _own(value) for name, value in kwargs.items()})

    def checkpointed_forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(run, args, kwargs, use_reentrant=False)

    return checkpointed_forward


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else value
