"""Load Sparse Checkpoint: a released SparkWan or TurboWan file as a ComfyUI model and an adapter, in one node."""

from __future__ import annotations

import logging
import os

import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io

from ..attention.adapters import convert, open_checkpoint
from . import folders
from .adapter_io import AdapterType

logger = logging.getLogger(__name__)

DTYPES: dict[str, dict] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}


class RoPeSLRLoadSparseCheckpoint(io.ComfyNode):
    """A file of models/diffusion_models -> MODEL, ROPESLR_ADAPTER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RoPeSLRLoadSparseCheckpoint",
            display_name="Load Sparse Checkpoint",
            category="RoPeSLR",
            description="Loads a released checkpoint that was trained with sparse attention (SparkWan: RoLA, TurboWan: "
                        "SLA), .pth or .safetensors. Connect both outputs to RoPeSLR Sparse Attention; sample with "
                        "Few-Step Sigmas at CFG 1.",
            search_aliases=["sparkwan", "turbowan", "rola", "sla checkpoint"],
            inputs=[
                io.Combo.Input(
                    "checkpoint", options=folder_paths.get_filename_list(folders.CHECKPOINTS),
                    tooltip="A file in models/diffusion_models (or models/unet) as it was released. Stock Wan files "
                            "hold no sparse weights; load those with Load Diffusion Model.",
                ),
                io.Combo.Input(
                    "weight_dtype", options=list(DTYPES), default="default", advanced=True,
                    tooltip="How the model's own weights are kept, as in Load Diffusion Model. The adapter's stay as "
                            "they are.",
                ),
                io.Boolean.Input(
                    "save_converted", default=False, advanced=True,
                    tooltip="Also write the checkpoint as .safetensors in ComfyUI's layout beside the original, under "
                            "its name with -comfyui behind. It takes as much space again (int8 files: twice that); "
                            "the next start with that file is faster, and this node reads it too.",
                ),
            ],
            outputs=[io.Model.Output(), AdapterType.Output(display_name="adapter")],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint, weight_dtype="default", save_converted=False) -> str:
        """A file that was written anew is loaded anew."""
        if checkpoint is None:              # linked: ComfyUI looks at what it is linked to
            return ""
        path = folder_paths.get_full_path(folders.CHECKPOINTS, checkpoint)
        return f"{checkpoint} {weight_dtype} {save_converted} {os.stat(path).st_mtime_ns if path else 'missing'}"

    @classmethod
    def execute(cls, checkpoint, weight_dtype="default", save_converted=False) -> io.NodeOutput:
        """Read, check and convert; a file that is not whole is refused before anything is built."""
        path = folder_paths.get_full_path_or_raise(folders.CHECKPOINTS, checkpoint)
        adapter = open_checkpoint(path).adapter()
        if save_converted:
            path = converted(path)
        return io.NodeOutput(load_backbone(path, DTYPES[weight_dtype]), adapter)


def converted(path: str) -> str:
    """The checkpoint in ComfyUI's layout beside the original, written if need be; the original where it cannot be."""
    stem = os.path.splitext(path)[0]
    out = f"{stem}-comfyui.safetensors"
    if stem.endswith("-comfyui"):
        return path
    if os.path.exists(out):
        logger.info("RoPeSLR: %s is converted already", os.path.basename(path))
        return out
    try:
        convert(path, out, progress=_progress())
    except OSError as error:                # an optional file must not cost the person the run
        logger.warning("RoPeSLR: the converted checkpoint could not be written: %s", error)
        return path
    logger.info("RoPeSLR: wrote %s", out)
    return out


def load_backbone(path: str, model_options: dict, disable_dynamic: bool = False):
    """The model of a released checkpoint as a MODEL. Raises ValueError where ComfyUI does not know it."""
    file = open_checkpoint(path)
    weights = file.backbone(_progress())
    if getattr(comfy.utils, "DISABLE_MMAP", False):     # a person's choice, for files on a network
        weights = {name: tensor.clone() for name, tensor in weights.items()}
    model = comfy.sd.load_diffusion_model_state_dict(
        weights, model_options=dict(model_options), metadata=dict(file.header) or None, disable_dynamic=disable_dynamic
    )
    if model is None:
        raise ValueError(f"{os.path.basename(path)} holds a Wan model that this ComfyUI does not know; update ComfyUI.")
    # How ComfyUI makes a second, untouched copy when a node asks for one.
    model.cached_patcher_init = (load_backbone, (path, model_options))
    return model


def _progress():
    bar = comfy.utils.ProgressBar(1)
    return lambda done, total: bar.update_absolute(done, total)
