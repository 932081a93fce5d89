"""The list of nodes that ComfyUI shows."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import folders
from .adapter_io import RoPeSLRLoadAdapter, RoPeSLRSaveAdapter
from .checkpoint import RoPeSLRLoadSparseCheckpoint
from .doctor import RoPeSLRDoctor
from .report import RoPeSLRReport
from .sigmas import RoPeSLRFewStepSigmas
from .sparse_attention import RoPeSLRSparseAttention


class RoPeSLRExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        folders.register()                  # before a schema lists its files
        return [
            RoPeSLRSparseAttention, RoPeSLRLoadAdapter, RoPeSLRSaveAdapter, RoPeSLRLoadSparseCheckpoint,
            RoPeSLRFewStepSigmas, RoPeSLRReport, RoPeSLRDoctor,
        ]
