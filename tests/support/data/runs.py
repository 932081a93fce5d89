"""Attention runs made from a plan's settings, and the calls that tests hand to them."""

from __future__ import annotations

from pack_loader import load

attention = load(".attention")
Call = attention.AttentionCall


def run_of(adapter=None, **plan):
    """An `AttentionRun` by these settings; where they do not say, blocks and heads are alike."""
    alike = {"allocation": "uniform"} | ({"key_block": "64"} if adapter is None else {})
    return attention.AttentionRun(attention.SparsePlan(**(alike | plan)).resolve(adapter))
