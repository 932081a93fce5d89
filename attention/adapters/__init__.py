"""Trained weights of the methods: the file format, its reader and writer, and readers of released checkpoints.

    adapter = read_adapter("file.safetensors")                 # our own format
    checkpoint = open_checkpoint("SparkWan2.1-T2V-1.3B.pth")    # or a released one: recognised by its keys
    adapter, backbone = checkpoint.adapter(), checkpoint.backbone()
"""

from .checkpoint import Checkpoint, convert, open_checkpoint
from .describe import describe
from .files import read_adapter, write_adapter
from .info import Adapter, AdapterError, AdapterInfo, check_model, layer_name

__all__ = [
    "Adapter", "AdapterError", "AdapterInfo", "Checkpoint", "check_model", "convert", "describe", "layer_name",
    "open_checkpoint", "read_adapter", "write_adapter",
]
