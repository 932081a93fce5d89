"""Triton kernels, each beside its launcher; not imported before a call can run on them."""
