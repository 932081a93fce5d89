"""Load Sparse Checkpoint: a released SparkWan or TurboWan file as a MODEL and an adapter."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..attention.adapters import convert, open_checkpoint, shown
from . import folders
from .adapter_io import AdapterType

logger = logging.getLogger(__name__)

CONVERTED = "-comfyui"
DTYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}


class RoPeSLRLoadSparseCheckpoint(io.ComfyNode):
    """A file of models/diffusion_models -> MODEL, ROPESLR_ADAPTER.

    The file stays mapped into memory: do not overwrite it while the model is loaded.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RoPeSLRLoadSparseCheckpoint",
            display_name="Load Sparse Checkpoint",
            category="RoPeSLR",
            description=(
                "Loads a released checkpoint that was trained with sparse attention (SparkWan: "
                "RoLA, TurboWan: SLA), .pth or .safetensors. Connect both outputs to RoPeSLR "
                "Sparse Attention; sample with Few-Step Sigmas at CFG 1."
            ),
            search_aliases=["sparkwan", "turbowan", "rola", "sla checkpoint"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=folder_paths.get_filename_list(folders.CHECKPOINTS),
                    tooltip=(
                        "A released file in models/diffusion_models (or models/unet). Do not "
                        "overwrite it while it is loaded. Stock Wan files have no sparse weights; "
                        "load those with Load Diffusion Model."
                    ),
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(DTYPES),
                    default="default",
                    advanced=True,
                    tooltip=(
                        "Data type of the model's weights, as in Load Diffusion Model. The "
                        "adapter keeps its own."
                    ),
                ),
                io.Boolean.Input(
                    "save_converted",
                    default=False,
                    advanced=True,
                    tooltip=(
                        "Also save a copy as NAME-comfyui.safetensors, which loads faster and is "
                        "as large as the original (int8: twice). If it cannot be written, the run "
                        "continues and the log says why."
                    ),
                ),
            ],
            outputs=[io.Model.Output(), AdapterType.Output(display_name="adapter")],
        )

    @classmethod
    def fingerprint_inputs(
        cls, checkpoint: str | None, weight_dtype: str = "default", save_converted: bool = False
    ) -> str:
        """A file that has changed is loaded again."""
        # None: the name is linked, and ComfyUI looks at what it is linked to.
        if checkpoint is None:
            return ""
        path = folder_paths.get_full_path(folders.CHECKPOINTS, checkpoint)
        changed = os.stat(path).st_mtime_ns if path else "missing"
        return f"{checkpoint} {weight_dtype} {save_converted} {changed}"

    @classmethod
    def execute(
        cls, checkpoint: str, weight_dtype: str = "default", save_converted: bool = False
    ) -> io.NodeOutput:
        """Read, check and convert; an incomplete file is refused before anything is built."""
        path = folder_paths.get_full_path_or_raise(folders.CHECKPOINTS, checkpoint)
        adapter = open_checkpoint(path).adapter()
        if save_converted:
            path = converted(path)
        return io.NodeOutput(load_backbone(path, DTYPES[weight_dtype]), adapter)


def converted(path: str) -> str:
    """The path of the converted copy, made if need be; the original's where it cannot be made."""
    stem = os.path.splitext(path)[0]
    out = f"{stem}{CONVERTED}.safetensors"
    if stem.endswith(CONVERTED):
        return path
    if os.path.exists(out):
        logger.info("RoPeSLR: %s exists already and is used", shown(os.path.basename(out), 255))
        return out
    try:
        convert(path, out, progress=_progress())
    # A copy that is only a convenience must not cost the run.
    except OSError as error:
        logger.warning("RoPeSLR: running without a converted copy: %s", error)
        return path
    logger.info("RoPeSLR: wrote %s", out)
    return out


def load_backbone(
    path: str, model_options: dict[str, Any], disable_dynamic: bool = False
) -> ModelPatcher:
    """The model of a released checkpoint. Raises ValueError where ComfyUI does not know it."""
    file = open_checkpoint(path)
    weights = file.backbone(_progress())
    # A setting for files on a network.
    if getattr(comfy.utils, "DISABLE_MMAP", False):
        weights = {name: tensor.clone() for name, tensor in weights.items()}
    model = comfy.sd.load_diffusion_model_state_dict(
        weights,
        model_options=dict(model_options),
        metadata=dict(file.header) or None,
        disable_dynamic=disable_dynamic,
    )
    if model is None:
        raise ValueError(
            f"This ComfyUI does not know the Wan model in {os.path.basename(path)}. Update ComfyUI."
        )
    # How ComfyUI makes a second, untouched copy when a node asks for one.
    model.cached_patcher_init = (load_backbone, (path, model_options))
    return model


def _progress() -> Callable[[int, int], None]:
    bar = comfy.utils.ProgressBar(1)
    return lambda done, total: bar.update_absolute(done, total)
