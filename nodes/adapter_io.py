"""Load and save adapters: the trained weights of a method, as files in models/ropeslr."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ..attention.adapters import Adapter, read_adapter, write_adapter
from ..attention.plan import MAX_RANK
from . import folders
from .patching import last_learned

NONE = "none (training-free)"
AdapterType = io.Custom("ROPESLR_ADAPTER")
NO_ADAPTER = (
    "There is no adapter to save: the adapter input is not connected, or is 'none "
    "(training-free)'. Connect Load Sparse Checkpoint, choose a file in Load RoPeSLR Adapter, or "
    "connect model and latent to save what a run has learned."
)
NOTHING_LEARNED = (
    "The last run of this MODEL has learned nothing to save. Connect the MODEL that goes into the "
    "sampler, and the sampler's LATENT; set method to ropeslr, and calibrate not to off."
)
BOTH = (
    "Both adapter and model are connected. Disconnect adapter to save what the last run of MODEL "
    "has learned, or model to save the adapter."
)


class RoPeSLRLoadAdapter(io.ComfyNode):
    """A file of models/ropeslr -> ROPESLR_ADAPTER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RoPeSLRLoadAdapter",
            display_name="Load RoPeSLR Adapter",
            category="RoPeSLR",
            description=(
                "Loads the trained weights of a sparse-attention method from models/ropeslr. "
                "Connect it to RoPeSLR Sparse Attention. The first entry runs without weights."
            ),
            search_aliases=["sparse attention weights"],
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=[NONE, *folder_paths.get_filename_list(folders.ADAPTERS)],
                    default=NONE,
                    tooltip=(
                        "A file in models/ropeslr. An adapter records its model. Using it with "
                        "another one stops with an error that names both."
                    ),
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=MAX_RANK,
                    step=2,
                    tooltip=(
                        "Rank of the adapter to use; 0 = all. A non-zero rank on RoPeSLR Sparse "
                        "Attention overrides this."
                    ),
                ),
            ],
            outputs=[AdapterType.Output(display_name="adapter")],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str | None, rank: int = 0) -> str:
        """A file that has changed is loaded again."""
        # None: the name is linked, and ComfyUI looks at what it is linked to.
        if adapter_name in (None, NONE):
            return NONE
        path = folder_paths.get_full_path(folders.ADAPTERS, adapter_name)
        return f"{adapter_name} {rank} {os.stat(path).st_mtime_ns if path else 'missing'}"

    @classmethod
    def execute(cls, adapter_name: str, rank: int = 0) -> io.NodeOutput:
        """Read and check the file."""
        if adapter_name == NONE:
            return io.NodeOutput(None)
        path = folder_paths.get_full_path_or_raise(folders.ADAPTERS, adapter_name)
        return io.NodeOutput(replace(read_adapter(path), use_rank=rank))


class RoPeSLRSaveAdapter(io.ComfyNode):
    """ROPESLR_ADAPTER, or what the last run of a MODEL learned -> a file of models/ropeslr."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RoPeSLRSaveAdapter",
            display_name="Save RoPeSLR Adapter",
            category="RoPeSLR",
            description=(
                "Writes an adapter to models/ropeslr, where Load RoPeSLR Adapter finds it: that of "
                "Load Sparse Checkpoint, or what a run has learned, so that the next one starts "
                "with it. Never overwrites a file: if the name is taken, the new file gets a "
                "number."
            ),
            inputs=[
                AdapterType.Input(
                    "adapter",
                    optional=True,
                    tooltip=(
                        "The adapter from Load Sparse Checkpoint, to use it later without reading "
                        "the whole checkpoint. Or connect model and latent."
                    ),
                ),
                io.String.Input(
                    "name",
                    default="adapter",
                    tooltip=(
                        "File name in models/ropeslr, without extension. Subfolders are allowed: "
                        "wan/my-adapter."
                    ),
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip=(
                        "The MODEL that went into the sampler, after RoPeSLR Sparse Attention: "
                        "saves what its last run learned, which is how its heads are calibrated "
                        "and how many blocks each one keeps. For the method ropeslr."
                    ),
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="From the sampler, so that this node runs after it.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        """Refuse a name that could not be written, before anything runs."""
        try:
            folders.free_path(folders.ADAPTERS, name if name is not None else "adapter")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        name: str,
        adapter: Adapter | None = None,
        model: Any = None,
        latent: dict | None = None,
    ) -> io.NodeOutput:
        """Write the file whole or not at all."""
        if adapter is not None and model is not None:
            raise ValueError(BOTH)
        if model is not None:
            adapter = last_learned(model)
        if adapter is None:
            raise ValueError(NO_ADAPTER if model is None else NOTHING_LEARNED)
        path = write_adapter(adapter, folders.free_path(folders.ADAPTERS, name))
        return io.NodeOutput(ui=ui.PreviewText(f"Saved {path.name} in {path.parent}"))
