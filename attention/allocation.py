"""How many key blocks each layer and head keeps: measured on exact queries, dealt out by need.

A probe computes R queries exactly and gives, for each layer and head, the squared error E(K) that
keeping K blocks would leave, at K = 0, m/4, m/2, m, 2m and 4m, where m is the mean that `sparsity`
asks for. Once a step has probed its layers, the next one spends the same sum where it helps most:

    E made falling in K; log E linear in log K between the probed numbers, 0 blocks counting as half
    a block; towards all the blocks that there are, where nothing is lost, E itself linear in K
    again and again the largest fall of E per block, by whatever number of blocks gives it, until
    layers x heads x m blocks are dealt out; 0 <= K <= 4m
    equal falls: the head that has the fewest; then the smallest step, then the first

or, with an error target, K = argmin E(K) + price K at the largest price where sum E <= error x
sum of the output's energy. Errors are absolute, so that what a layer adds to the picture counts.
Source: our own.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .head_share import HeadShare

SHARES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the mean, probed
HALF_A_BLOCK = 0.5  # what 0 blocks count as on a logarithmic scale
TINY = 1e-30  # an error that is none
BISECTIONS = 50

Parts = Sequence[tuple[Hashable, slice]]  # each conditioning with its rows of the batch


def probe_counts(mean: int, blocks: int, fewest: int = 0) -> tuple[int, ...]:
    """The numbers K that a probe looks at: ascending, `mean` among them.

    blocks: how many there are to keep. fewest: 1 for methods that have nothing but kept blocks.
    """
    found = {max(fewest, min(blocks, int(share * mean))) for share in SHARES}
    return tuple(sorted(found | {fewest, min(blocks, mean)}))


class Curve(NamedTuple):
    """What a probe found of one layer, for some batch rows."""

    counts: tuple[int, ...]  # P numbers of kept blocks, see `probe_counts`
    mean: int  # of them, what `sparsity` asks for
    blocks: int  # how many there are; keeping all of them loses nothing
    errors: Tensor  # (B, H, P): squared error of all queries' outputs
    energy: Tensor  # (B, H): squared deviation of the exact outputs from their mean

    def of_batch(self, own: slice) -> Curve:
        """That of some batch rows."""
        return self._replace(errors=self.errors[own], energy=self.energy[own])


def interpolated(errors: Tensor, counts: Sequence[int], blocks: int) -> Tensor:
    """Falling errors `(n, P)` at `counts` -> at every number from counts[0] to counts[-1].

    blocks: how many there are. `(n, counts[-1] - counts[0] + 1)` float64.
    """
    logs = errors.double().cummin(dim=-1).values.clamp(min=TINY).log()
    known = torch.tensor(counts, dtype=torch.float64).clamp(min=HALF_A_BLOCK).log()
    wanted = torch.arange(counts[0], counts[-1] + 1).double().clamp(min=HALF_A_BLOCK).log()
    if len(counts) == 1:
        return logs.exp()
    right = torch.searchsorted(known, wanted).clamp(1, len(counts) - 1)
    share = (wanted - known[right - 1]) / (known[right] - known[right - 1])
    table = torch.lerp(logs[:, right - 1], logs[:, right], share).exp()
    if counts[-1] == blocks:
        left = counts[-2] - counts[0]
        fall = torch.linspace(1.0, 0.0, blocks - counts[-2] + 1, dtype=torch.float64)
        table[:, left:] = table[:, left : left + 1] * fall
    return table


def deal(errors: Tensor, counts: Sequence[int], blocks: int, total: int) -> list[int]:
    """So many blocks in all, where they take away most error: errors `(n, P)` -> n numbers.

    blocks: how many each head could keep. See the file's head for the rule. Raises ValueError where
    the sum cannot be reached.
    """
    table, fewest = interpolated(errors, counts, blocks), counts[0]
    heads, options = table.shape
    if not heads * fewest <= total <= heads * counts[-1]:
        raise ValueError(
            f"total is {total}; {heads} heads keep from {heads * fewest} to {heads * counts[-1]}"
        )
    # All falls above a price at once, as far as they fit; the last ones one by one.
    spare = total - heads * fewest
    given = _cheapest(table, lambda taken: int(taken.sum()) <= spare).tolist()
    left = spare - sum(given)
    rows, steps = table.numpy(), torch.arange(1, max(2, options)).double().numpy()
    offers: list[tuple[float, int, int, int]] = []  # (-fall, kept, step, head), the best first

    def offer(head: int) -> None:
        here = given[head]
        reach = min(left, options - 1 - here)
        if reach > 0:
            falls = (rows[head, here] - rows[head, here + 1 : here + 1 + reach]) / steps[:reach]
            step = int(falls.argmax())
            heapq.heappush(offers, (-float(falls[step]), here, step + 1, head))

    for head in range(heads):
        offer(head)
    while left > 0:
        fall, here, step, head = heapq.heappop(offers)
        if given[head] != here:
            continue
        if step > left:  # the offer was made when more was left
            offer(head)
            continue
        if fall == 0.0:
            _fill_evenly(given, left, options - 1)
            break
        given[head] += step
        left -= step
        offer(head)
    return [fewest + each for each in given]


def from_shares(shares: Sequence[float], mean: int, counts: Sequence[int]) -> list[int]:
    """Shares of the mean `(n)` as numbers of blocks, from counts[0] to counts[-1].

    Their sum is that of the shares, as far as the limits let it; what rounding leaves goes where
    most is missing.
    """
    fewest, most = counts[0], counts[-1]
    wanted = [max(0.0, share) * mean for share in shares]
    given = [min(most, max(fewest, math.floor(each))) for each in wanted]
    left = round(sum(wanted)) - sum(given)
    line = [(kept - each, i) for i, (kept, each) in enumerate(zip(given, wanted)) if kept < most]
    heapq.heapify(line)
    while left > 0 and line:
        missing, i = heapq.heappop(line)
        given[i] += 1
        left -= 1
        if given[i] < most:
            heapq.heappush(line, (missing + 1, i))
    return given


def by_error(
    errors: Tensor, counts: Sequence[int], blocks: int, energy: Tensor, share: float
) -> list[int]:
    """As few blocks as keep the sum of errors within `share` of the energy, or all that may be.

    errors `(n, P)`, energy `(n,)` -> n numbers, all at one price of a block.
    """
    table, allowed = interpolated(errors, counts, blocks), share * float(energy.double().sum())
    found = _dearest(table, lambda taken: float(table.gather(1, taken[:, None]).sum()) <= allowed)
    return [counts[0] + each for each in found.tolist()]


def _cheapest(table: Tensor, fits: Callable[[Tensor], bool]) -> Tensor:
    """Blocks beyond the fewest `(n,)` at the lowest price where they fit."""
    return _bisect(table, lambda taken: not fits(taken))[1]


def _dearest(table: Tensor, enough: Callable[[Tensor], bool]) -> Tensor:
    """Blocks beyond the fewest `(n,)` at the highest price where they are enough."""
    return _bisect(table, enough)[0]


def _bisect(table: Tensor, below: Callable[[Tensor], bool]) -> tuple[Tensor, Tensor]:
    """What is bought right below and right above the price where `below` turns false.

    At a price each row buys the fewest blocks of least error + price x blocks.
    """
    blocks = torch.arange(table.shape[1], dtype=torch.float64)
    under = table.argmin(dim=1)
    over = torch.zeros_like(under)
    low, high = math.log(TINY), math.log(max(TINY, float((table[:, 0] - table[:, -1]).max())))
    for _ in range(BISECTIONS):
        price = (low + high) / 2
        taken = (table + math.exp(price) * blocks).argmin(dim=1)
        if below(taken):
            under, low = taken, price
        else:
            over, high = taken, price
    return under, over


def _fill_evenly(given: list[int], left: int, most: int) -> None:
    """Blocks that help nobody go where the fewest are, first heads first."""
    line = [(kept, head) for head, kept in enumerate(given) if kept < most]
    heapq.heapify(line)
    for _ in range(left):
        kept, head = heapq.heappop(line)
        given[head] = kept + 1
        if kept + 1 < most:
            heapq.heappush(line, (kept + 1, head))


class _Probed(NamedTuple):
    step: int
    curve: Curve


class _Group:
    """The layers of one conditioning that share a mean: their curves, and the numbers in force."""

    def __init__(self) -> None:
        self.curves: dict[Hashable, _Probed] = {}
        self.table: dict[Hashable, list[list[int]]] = {}  # layer -> batch row -> head -> kept
        self.probed_at: int | None = None  # the step whose curves no table has used yet
        self.lost = 0.0  # error that the table leaves by the curves, beyond a target
        self.spent = 0  # blocks that all heads keep together

    def solve(self, error: float | None, share: HeadShare | None = None) -> None:
        """Deal the blocks out anew, for each batch row by itself."""
        layers, probed = list(self.curves), [each.curve for each in self.curves.values()]
        first, heads = probed[0], [each.errors.shape[1] for each in probed]
        # One transfer for all layers.
        errors = torch.cat([each.errors for each in probed], dim=1)
        energy = torch.cat([each.energy for each in probed], dim=1)
        if share is not None:
            errors, energy = (share.whole(x, len(layers)) for x in (errors, energy))
            heads = [share.size * count for count in heads]
        errors, energy = errors.cpu().double(), energy.cpu().double()
        rows, known, self.lost = [], (first.counts, first.blocks), 0.0
        for row in range(errors.shape[0]):
            if not bool(torch.isfinite(errors[row]).all()):
                rows.append([first.mean] * sum(heads))
                self.lost = math.inf
                continue
            if error is None:
                rows.append(deal(errors[row], *known, first.mean * sum(heads)))
            else:
                rows.append(by_error(errors[row], *known, energy[row], error))
            table = interpolated(errors[row], *known)
            chosen = torch.tensor(rows[-1])[:, None] - first.counts[0]
            left = float(table.gather(1, chosen).sum())
            self.lost += max(0.0, left - (error or 0.0) * float(energy[row].sum()))
        start = 0
        for layer, count in zip(layers, heads):
            self.table[layer] = [row[start : start + count] for row in rows]
            start += count
        self.spent, self.probed_at = sum(map(sum, rows)), None


class Allocation:
    """What one run has found out about how many blocks its layers and heads need.

    Per conditioning, as calibrations are. interval: the most steps after which a layer is probed
    anew; None: never. error: the target, as a share of the output's energy; None: the mean that
    sparsity asks.
    """

    def __init__(self, interval: int | None, error: float | None = None) -> None:
        self.interval, self.error = interval, error
        self.share: HeadShare | None = None
        self._groups: dict[tuple[Hashable, tuple[int, ...]], _Group] = {}

    def due(self, layer: Hashable, step: int, parts: Parts, counts: tuple[int, ...]) -> bool:
        """Whether this call of a layer has to be probed, at these counts."""
        for key, own in parts:
            group = self._groups.get((key, counts))
            known = None if group is None else group.curves.get(layer)
            if known is None or known.curve.errors.shape[0] != own.stop - own.start:
                return True
            # What heads need changes most in the first steps: 0, 1, 2, 4, 8, 13, 18 ...
            if self.interval is not None and (
                abs(step - known.step) >= min(self.interval, max(1, known.step))
            ):
                return True
        return False

    def add(self, layer: Hashable, step: int, parts: Parts, curve: Curve) -> None:
        """Take in what a probe found; it counts from the next step on."""
        for key, own in parts:
            group = self._groups.setdefault((key, curve.counts), _Group())
            group.curves[layer] = _Probed(step, curve.of_batch(own))
            group.probed_at = step

    def kept(
        self, layer: Hashable, step: int, parts: Parts, counts: tuple[int, ...]
    ) -> list[list[int] | None]:
        """Blocks that each head keeps in this call, by batch row; None where none are known yet.

        Of all processes' heads.
        """
        found: list[list[int] | None] = []
        for key, own in parts:
            batch = own.stop - own.start
            group = self._groups.get((key, counts))
            if group is not None and group.probed_at not in (None, step):
                group.solve(self.error, self.share)
            rows = None if group is None else group.table.get(layer)
            found += [None] * batch if rows is None or len(rows) != batch else rows
        return found

    def outcome(self, step: int) -> tuple[float, int] | None:
        """The error that is left, or missing to the target, and all kept blocks; by the curves.

        Of what earlier steps probed; None where they did not.
        """
        groups = [each for each in self._groups.values() if each.probed_at not in (None, step)]
        for group in groups:
            group.solve(self.error, self.share)
        if not groups:
            return None
        return sum(x.lost for x in groups), sum(x.spent for x in groups)
