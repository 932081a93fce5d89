"""How much memory a training takes, said before it starts."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch

from ..patching.install import inference_dtype
from ..patching.model_info import ModelInfo, blocks
from .lora import TrainedLora

# Of a block's input, what its backward pass holds at once: normalised inputs, q, k, v, and the
# feed-forward layer, which is four times as wide. Counted, not measured.
INSIDE = 40
TOO_LARGE = (
    "Training at this size keeps about {needed:.1f} GB of activations at once, and {device} has "
    "{total:.1f} GB in all. Make the video smaller or shorter{advice}."
)
CHECKPOINTS = ", or switch gradient_checkpointing on"


def activation_bytes(model: Any, info: ModelInfo, shape: tuple[int, ...], checkpoints: bool) -> int:
    """Of one example: an estimate."""
    tokens, width = info.video_tokens(shape), info.num_heads * info.head_dim
    each = tokens * width * inference_dtype(model.model).itemsize
    count = max(1, len(blocks(model.model.diffusion_model)))
    return each * (count + INSIDE if checkpoints else count * INSIDE)


def state_memory(
    model: Any, info: ModelInfo, lora: TrainedLora, shape: tuple[int, ...], checkpoints: bool
) -> str:
    """The estimate in words; raises MemoryError where the device could never hold it."""
    device = model.load_device
    needed = activation_bytes(model, info, shape, checkpoints)
    total: Any = comfy.model_management.get_total_memory(device)
    if needed > total:
        advice = "" if checkpoints else CHECKPOINTS
        raise MemoryError(
            TOO_LARGE.format(needed=needed / 1e9, device=device, total=total / 1e9, advice=advice)
        )
    return (
        f"weights {model.model_size() / 1e9:.1f} GB, LoRA with optimizer "
        f"{4 * lora.bytes / 1e9:.2f} GB, activations about {needed / 1e9:.1f} GB"
    )


def peak(device: torch.device) -> str:
    """What was taken at most so far, where a device tells it."""
    if device.type != "cuda":
        return ""
    return f"; at most {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB so far"
