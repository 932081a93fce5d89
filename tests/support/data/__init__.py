"""Inputs of tests: tensors, block tables, adapters, checkpoints, broken files, and every model variant."""
