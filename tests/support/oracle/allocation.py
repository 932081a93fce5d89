"""How blocks are dealt out, one step at a time in Python's own floats."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def written_out(errors: Tensor, counts: Sequence[int], blocks: int, total: int) -> list[int]:
    """The rule as the head of attention/allocation.py states it: errors `(n, P)` -> n numbers."""
    options, curves = range(counts[0], counts[-1] + 1), []
    for row in errors.tolist():
        falling = [max(min(row[: i + 1]), 1e-30) for i in range(len(row))]
        place = [math.log(max(count, 0.5)) for count in counts]
        curve = []
        for kept in options if len(counts) > 1 else ():
            j = max(i for i in range(len(counts) - 1) if counts[i] <= kept)
            share = (math.log(max(kept, 0.5)) - place[j]) / (place[j + 1] - place[j])
            if counts[j + 1] == blocks:  # all of them
                curve.append(falling[j] * (blocks - kept) / (blocks - counts[j]))
            else:
                curve.append(falling[j] ** (1 - share) * falling[j + 1] ** share)
        curves.append(curve or falling)
    kept = [0] * len(curves)
    left = total - counts[0] * len(curves)
    while left:
        best = max(
            ((curve[now] - curve[now + step]) / step, -now, -step, -head)
            for head, (curve, now) in enumerate(zip(curves, kept))
            for step in range(1, min(left, len(curve) - 1 - now) + 1)
        )
        kept[-best[3]] -= best[2]
        left += best[2]
    return [counts[0] + each for each in kept]
