"""The list of nodes that ComfyUI shows."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import comfy.model_management
from comfy_api.latest import ComfyExtension, io

from ..attention.doctor import backend_line
from . import folders
from .adapter_io import RoPeSLRLoadAdapter, RoPeSLRSaveAdapter
from .checkpoint import RoPeSLRLoadSparseCheckpoint
from .doctor import RoPeSLRDoctor
from .raylight import RoPeSLRRaylight
from .report import RoPeSLRReport
from .sigmas import RoPeSLRFewStepSigmas
from .sparse_attention import RoPeSLRSparseAttention
from .train_sparse_lora import RoPeSLRTrainSparseLoRA

logger = logging.getLogger(__name__)

NODES: list[type[io.ComfyNode]] = [
    RoPeSLRSparseAttention,
    RoPeSLRLoadAdapter,
    RoPeSLRSaveAdapter,
    RoPeSLRLoadSparseCheckpoint,
    RoPeSLRFewStepSigmas,
    RoPeSLRReport,
    RoPeSLRDoctor,
    RoPeSLRTrainSparseLoRA,
    RoPeSLRRaylight,
]


class RoPeSLRExtension(ComfyExtension):
    """All nodes of the pack."""

    @classmethod
    def checked(cls) -> RoPeSLRExtension:
        """The extension, once this ComfyUI has taken every schema.

        An old one lacks what they use.
        """
        folders.register()  # before a schema lists its files
        for node in NODES:
            node.define_schema()
        return cls()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        _log_backend()
        return NODES


def _log_backend() -> None:
    """One line at the start.

    Whatever is odd about a machine must not keep the nodes from loading.
    """
    try:
        backend = backend_line(comfy.model_management.get_torch_device())
        logger.info("RoPeSLR %s: %s", _version(), backend)
    except Exception:
        logger.warning("RoPeSLR: could not determine the backend", exc_info=True)


def _version() -> str:
    """As the package's pyproject.toml has it."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"', text, re.MULTILINE)
    return found[1] if found else ""
