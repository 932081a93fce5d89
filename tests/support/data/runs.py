"""Attention runs made from a plan's settings, and the calls that tests hand to them."""

from __future__ import annotations

from pack_loader import load

attention = load(".attention")
Call = attention.AttentionCall


def run_of(adapter=None, **plan):
    """An `AttentionRun` by these settings."""
    return attention.AttentionRun(attention.SparsePlan(**plan).resolve(adapter))
