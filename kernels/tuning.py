"""What was measured on this machine's GPUs, and what follows from it. Nothing yet: see `tune`."""

from __future__ import annotations

import torch


def prefers_eight_bit(device: torch.device) -> bool:
    """Whether 8 bits were measured to be right and faster on a device."""
    return False
