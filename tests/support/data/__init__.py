"""Inputs of tests: tensors, block tables, adapters, checkpoints, broken files, model variants."""
