"""Inputs of tests.

Tensors, block tables, adapters, checkpoints, broken files, and every model variant.
"""
