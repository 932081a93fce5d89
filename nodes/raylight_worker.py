"""What runs in one of Raylight's workers: sparse attention on the MODEL that the worker holds."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch.distributed as dist

from ..attention import SparsePlan
from ..attention.adapters import Adapter
from ..attention.parallel import Peers
from .patching import install

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
    """What the node asks of every worker."""

    plan: SparsePlan
    adapter: Adapter | None


def patch(model: Any, request: Request) -> Any:
    """A clone of a worker's MODEL that samples as asked, together with the other workers.

    Raises ValueError where their arrangement rules it out; and what `install` raises.
    """
    if model is None:
        raise ValueError(NO_MODEL)
    _log_once_for_all()
    return install(model, request.plan, None, request.adapter, find_peers())


def find_peers() -> Peers | None:
    """The workers that compute each model call with this one; None where each is by itself."""
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
    guided = xdit.get_classifier_free_guidance_world_size() > 1
    return Peers(
        xdit.get_sp_group().ulysses_group, xdit.get_cfg_group().device_group if guided else None
    )


def _log_once_for_all() -> None:
    """Let the first worker alone log; Ray shows what workers print."""
    logger = logging.getLogger(__name__.rpartition(".nodes.")[0])
    first = not dist.is_initialized() or dist.get_rank() == 0
    logger.setLevel(logging.INFO if first else logging.ERROR)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
