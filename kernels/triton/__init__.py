"""Triton kernels, each beside its launcher.

Nothing here is imported before a call can run on them.
"""
