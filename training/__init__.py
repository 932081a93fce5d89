"""Trains a LoRA against a dense teacher: settings, draws, the loop, and what is kept on disk.

Pure PyTorch: what is trained, and how its loss is found, whoever calls brings along. `python -m
training` runs a workflow that has a Train Sparse LoRA node, in one process or many.
"""

if "." in __name__:  # part of the pack; as a program it stands alone, and starts one
    from .draws import Example, Material, held_out
    from .loop import Ended, Outcome, Training, Watch, outcome_of
    from .settings import OPTIMIZERS, TrainSettings
    from .state import State, read_state, write_state

__all__ = [
    "OPTIMIZERS",
    "Ended",
    "Example",
    "Material",
    "Outcome",
    "State",
    "TrainSettings",
    "Training",
    "Watch",
    "held_out",
    "outcome_of",
    "read_state",
    "write_state",
]
