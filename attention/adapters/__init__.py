"""Trained weights of the methods: our file format, and readers of released checkpoints.

adapter = read_adapter("file.safetensors")                  # our own format
checkpoint = open_checkpoint("SparkWan2.1-T2V-1.3B.pth")    # a released one, known by its keys
adapter, backbone = checkpoint.adapter(), checkpoint.backbone()
"""

from .adapter import Adapter, layer_name
from .atomic import PARTIAL_BYTES, write_safetensors
from .checkpoint import Checkpoint, convert, open_checkpoint
from .describe import describe
from .files import read_adapter, write_adapter
from .info import AdapterError, AdapterInfo
from .tensor_file import holds, open_safetensors
from .text import quoted, shown
from .validate import check_model

__all__ = [
    "PARTIAL_BYTES",
    "Adapter",
    "AdapterError",
    "AdapterInfo",
    "Checkpoint",
    "check_model",
    "convert",
    "describe",
    "holds",
    "layer_name",
    "open_checkpoint",
    "open_safetensors",
    "quoted",
    "read_adapter",
    "shown",
    "write_adapter",
    "write_safetensors",
]
