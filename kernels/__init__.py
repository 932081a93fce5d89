"""Tensors in, tensors out: the operations of block-sparse attention and its low-rank background.

`ops` is the public face; `reference` is the definition that tests compare with; `pytorch` is the
portable path.
"""
