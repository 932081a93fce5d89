"""A model's frozen blocks, spread over the processes that train together: PyTorch's own FSDP2.

Each process holds a part of every block's weights, and has a whole block only while it runs. So all
processes have to call the model as often, and at the same time: what one would know already, or
leave to another, each of them computes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ...training.crowd import rank_and_size

logger = logging.getLogger(__name__)

SPREAD = "RoPeSLR: the model's blocks are spread over {size} processes; {share:.0f} % are here"


def spread(blocks: Iterable[torch.nn.Module], device: torch.device) -> None:
    """Do it, once and for the rest of the process; device: the one of this process."""
    _, size = rank_and_size()
    mesh = init_device_mesh(device.type, (size,))
    whole = held = 0
    for block in blocks:
        if isinstance(block, FSDPModule):
            continue
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        for each in block.parameters():
            whole += each.numel()
            held += each.to_local().numel() if isinstance(each, DTensor) else each.numel()
    if whole:
        logger.info(SPREAD.format(share=100 * held / whole, size=size))
