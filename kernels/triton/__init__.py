"""Triton kernels; nothing here is imported before a call can run on them."""
