"""Triton kernels, each beside its launcher; nothing here is imported before a call can run on them."""
