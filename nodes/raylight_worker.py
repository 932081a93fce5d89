"""What runs in one of Raylight's workers: sparse attention on the MODEL that the worker holds."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import folder_paths
import torch.distributed as dist

from ..attention import SparsePlan
from ..attention.adapters import Adapter
from ..attention.parallel import Peers
from .patching import install
from .patching.patch import clear

RING = (
    "sparse attention needs all keys of a head on one GPU: Raylight's ring_degree is {ring}. Set "
    "it to 1 and ulysses_degree to the number of GPUs."
)
PIPELINE = (
    "Raylight's PipeFusion computes a video in patches, which sparse attention cannot tell apart. "
    "Use ulysses_degree instead."
)
NO_MODEL = "Raylight's workers hold no model yet; connect this node behind Load Diffusion Model."


class Request(NamedTuple):
    """What the node asks of every worker. user_directory: ComfyUI's, which workers are not told."""

    plan: SparsePlan
    adapter: Adapter | None
    user_directory: str


def patch(model: Any, request: Request) -> Any:
    """A clone of a worker's MODEL that samples as asked, together with the other workers.

    The MODEL itself, which nobody else holds, loses what an earlier node has put on it; and is all
    that is left with backend "dense". Raises ValueError where the workers' arrangement rules
    it out; and what `install` raises.
    """
    if model is None:
        raise ValueError(NO_MODEL)
    _log_once_for_all()
    folder_paths.set_user_directory(request.user_directory)
    if request.plan.backend == "dense":
        clear(model)
        return model
    patched = install(model, request.plan, None, request.adapter, find_peers())
    clear(model)
    return patched


def find_peers() -> Peers | None:
    """The workers that compute each model call with this one; None where each is by itself.

    Raises ValueError where no worker has all keys of its heads.
    """
    try:
        from xfuser.core import distributed as xdit
    except ImportError:
        return None
    if not xdit.model_parallel_is_initialized():
        return None
    if xdit.get_ring_parallel_world_size() > 1:
        raise ValueError(RING.format(ring=xdit.get_ring_parallel_world_size()))
    if xdit.get_pipeline_parallel_world_size() > 1:
        raise ValueError(PIPELINE)
    ulysses, guidance = xdit.get_sp_group().ulysses_group, None
    if xdit.get_classifier_free_guidance_world_size() > 1:
        guidance = xdit.get_cfg_group().device_group
    elif dist.get_world_size(ulysses) == 1:
        return None
    return Peers(ulysses, guidance)


def _log_once_for_all() -> None:
    """Let the first worker alone log; Ray shows what workers print."""
    logger = logging.getLogger(__name__.rpartition(".nodes.")[0])
    first = not dist.is_initialized() or dist.get_rank() == 0
    logger.setLevel(logging.INFO if first else logging.ERROR)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
