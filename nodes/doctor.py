"""RoPeSLR Doctor: what this machine would run, whether it is right, and how fast it is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.model_management
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui

from ..attention.doctor import examine
from .folders import tuning_file
from .host import comfyui_version

logger = logging.getLogger(__name__)


class Tokens(NamedTuple):
    """Pixels of width and height to one token, and how many frames of tokens a video has."""

    pixels: int
    frames: Callable[[int], int] = lambda length: (length - 1) // 4 + 1

    def grid(self, width: int, height: int, length: int) -> tuple[int, int, int]:
        """Frames, height and width of a video in tokens."""
        return self.frames(length), max(1, height // self.pixels), max(1, width // self.pixels)


# By what a person calls the model.
TOKENS = {
    "Wan 2.1, Wan 2.2 14B": Tokens(16),
    "Wan 2.2 5B": Tokens(32),
    "HunyuanVideo": Tokens(16),
    "HunyuanVideo 1.5": Tokens(16),
    "MiniMax H3": Tokens(32, lambda length: 5 * max(0, -(-(length - 5) // 17)) + 2),
    "LTX-2, LTX-Video": Tokens(32, lambda length: (length - 1) // 8 + 1),
    "Kandinsky 5, Cosmos Predict2": Tokens(16),
    "Mochi": Tokens(16, lambda length: (length - 1) // 6 + 1),
    "CogVideoX": Tokens(16),
    "CogVideoX 1.5": Tokens(16, lambda length: -(-((length - 1) // 4 + 1) // 2)),
}


class RoPeSLRDoctor(io.ComfyNode):
    """-> STRING about this machine."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RoPeSLRDoctor",
            display_name="RoPeSLR Doctor",
            category="RoPeSLR",
            description=(
                "Shows which backend runs on this machine and why, checks its results, finds the "
                "fastest kernels for this GPU, times all at your video's size and recommends "
                "settings. Run it once, and again after an update. Needs no model."
            ),
            search_aliases=["sparse attention benchmark", "triton check"],
            inputs=[
                io.Combo.Input(
                    "model_kind",
                    options=list(TOKENS),
                    default=next(iter(TOKENS)),
                    tooltip="Your model. It decides how many pixels make one token.",
                ),
                io.Int.Input(
                    "width",
                    default=832,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Video width in pixels.",
                ),
                io.Int.Input(
                    "height",
                    default=480,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Video height in pixels.",
                ),
                io.Int.Input(
                    "length", default=81, min=1, max=4096, tooltip="Video length in frames."
                ),
                io.Float.Input(
                    "sparsity",
                    default=0.90,
                    min=0.0,
                    max=0.98,
                    step=0.01,
                    tooltip="Sparsity to benchmark; use the main node's.",
                ),
                io.Int.Input(
                    "seconds",
                    default=20,
                    min=1,
                    max=600,
                    tooltip=(
                        "Approximate time to measure. Each method is timed at least three times, "
                        "so long videos can take longer."
                    ),
                ),
            ],
            outputs=[io.String.Output(display_name="text")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        """Every queue is a new examination."""
        return time.time()

    @classmethod
    def execute(
        cls, model_kind: str, width: int, height: int, length: int, sparsity: float, seconds: int
    ) -> io.NodeOutput:
        """Examine for about `seconds`, with the memory of one attention call of eight heads."""
        grid = TOKENS[model_kind].grid(width, height, length)
        bar = ProgressBar(100)
        device = comfy.model_management.get_torch_device()
        if device.type == "cuda":  # the trials run beside this process
            comfy.model_management.unload_all_models()
            comfy.model_management.soft_empty_cache()
        text = "\n".join(
            (
                f"ComfyUI: {comfyui_version()}, dense attention by {_dense_attention()}",
                examine(
                    device,
                    grid,
                    sparsity,
                    seconds,
                    lambda done, of: bar.update_absolute(done, of),
                    tuning_file(),
                ),
            )
        )
        logger.info("RoPeSLR Doctor\n%s", text)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def _dense_attention() -> str:
    """The function that ComfyUI was started with, such as attention_pytorch."""
    from comfy.ldm.modules.attention import optimized_attention

    return getattr(optimized_attention, "__wrapped__", optimized_attention).__name__
