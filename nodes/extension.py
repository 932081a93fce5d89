"""The list of nodes that ComfyUI shows."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .sparse_attention import RoPeSLRSparseAttention


class RoPeSLRExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [RoPeSLRSparseAttention]
