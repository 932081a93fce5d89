"""How many blocks each layer and head keeps: the rule against its slow transcription, and its memory."""

import pytest
import torch

from pack_loader import load
from support.oracle.allocation import written_out

allocation = load(".attention.allocation")
COUNTS = (0, 2, 4, 8, 16, 32)


def curves(seed, heads=7, counts=COUNTS):
    """Errors that mostly fall, of very different sizes, some flat, some rising, some not convex."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(heads, len(counts), generator=generator, dtype=torch.float64)
    steps = torch.where(
        torch.rand(steps.shape, generator=generator) < 0.15, -0.2 * steps, 2 * steps
    )
    return (3 * torch.randn(heads, 1, generator=generator) - steps.cumsum(1)).exp()


@pytest.mark.parametrize("counts", [COUNTS, (1, 2, 4, 8), (0, 1, 4), (1,)])
@pytest.mark.parametrize("left_over", [0, 9])
@pytest.mark.parametrize("seed", range(6))
def test_blocks_are_dealt_out_as_the_rule_says(seed, left_over, counts):
    errors, blocks = curves(seed, counts=counts), counts[-1] + left_over
    fewest, most = counts[0], counts[-1]
    for total in sorted(
        {7 * fewest, 7 * fewest + 1, 7 * ((fewest + most) // 3), 7 * most - 1, 7 * most}
    ):
        if 7 * fewest <= total <= 7 * most:
            found = allocation.deal(errors, counts, blocks, total)
            assert sum(found) == total and fewest <= min(found) and max(found) <= most
            assert found == written_out(errors, counts, blocks, total)


def test_heads_that_are_alike_keep_the_mean():
    power_law = torch.tensor([max(count, 0.5) ** -1.5 for count in COUNTS]).repeat(9, 1)
    for errors in (power_law, torch.ones(9, 6), torch.zeros(9, 6)):
        assert allocation.deal(errors, COUNTS, 99, 9 * 8) == [8] * 9


def test_a_head_without_error_keeps_nothing_and_one_with_much_keeps_most():
    flat, steep = torch.full((1, 6), 1e-9), torch.tensor([[1e3, 1e2, 1e2, 1e1, 1.0, 0.1]])
    assert allocation.deal(torch.cat((flat, steep)), COUNTS, 99, 2 * 8) == [0, 16]


def test_a_sum_that_no_heads_can_have_is_refused():
    with pytest.raises(ValueError, match="total is 300; 7 heads keep from 0 to 224"):
        allocation.deal(curves(0), COUNTS, 99, 300)


@pytest.mark.parametrize("seed", range(4))
def test_an_error_target_is_met_with_no_more_than_it_takes(seed):
    errors = curves(seed)
    energy = torch.full((7,), float(errors[:, 0].sum()))
    table = allocation.interpolated(errors, COUNTS, 99)
    for share in (0.05, 0.01, 0.002):
        kept = allocation.by_error(errors, COUNTS, 99, energy, share)
        left = sum(float(table[head, each]) for head, each in enumerate(kept))
        least = float(table[:, -1].sum())
        assert left <= share * float(energy.sum()) or left <= least * (1 + 1e-9)
    assert allocation.by_error(errors, COUNTS, 99, energy, 1.0) == [0] * 7


@pytest.mark.parametrize("mean, blocks, fewest, expected", [
    (2, 24, 0, (0, 1, 2, 4, 8)), (1, 24, 0, (0, 1, 2, 4)), (1, 24, 1, (1, 2, 4)),
    (9, 96, 0, (0, 2, 4, 9, 18, 36)), (9, 20, 0, (0, 2, 4, 9, 18, 20)), (472, 4725, 0, (0, 118, 236, 472, 944, 1888)),
])  # fmt: skip
def test_what_is_probed(mean, blocks, fewest, expected):
    assert allocation.probe_counts(mean, blocks, fewest) == expected


def curve_of(errors, mean=8):
    return allocation.Curve(COUNTS, mean, 99, errors, torch.ones(errors.shape[:2]))


def test_a_table_counts_from_the_next_step_on_for_all_layers_together():
    """Whatever the next step is: samplers go back, repeat a step, and skip some."""
    errors = curves(1, heads=6).view(2, 1, 3, 6)  # two layers of three heads
    for following in (6, 4, 9):
        memory, parts = allocation.Allocation(interval=5), [("text", slice(0, 1))]
        for layer in range(2):
            assert memory.due(layer, 5, parts, COUNTS)
            memory.add(layer, 5, parts, curve_of(errors[layer]))
            assert not memory.due(layer, 5, parts, COUNTS)
            assert memory.kept(layer, 5, parts, COUNTS) == [None]
        kept = [memory.kept(layer, following, parts, COUNTS)[0] for layer in range(2)]
        assert kept[0] + kept[1] == allocation.deal(errors.view(6, 6), COUNTS, 99, 6 * 8)
        assert memory.kept(7, following, parts, COUNTS) == [None]  # a layer that nobody probed
        assert not memory.due(0, following, parts, COUNTS)
        assert memory.due(0, 10, parts, COUNTS) and memory.due(0, 0, parts, COUNTS)


def test_conditionings_and_batch_rows_have_tables_of_their_own():
    errors = curves(2, heads=9).view(3, 3, 6)
    memory = allocation.Allocation(interval=None)
    both = [("text", slice(0, 2)), ("none", slice(2, 3))]
    memory.add(0, 0, both, curve_of(errors))
    expected = [allocation.deal(errors[row], COUNTS, 99, 3 * 8) for row in range(3)]
    assert memory.kept(0, 1, both, COUNTS) == expected
    assert memory.kept(0, 1, [("none", slice(0, 1))], COUNTS) == [expected[2]]
    assert memory.kept(0, 1, [("text", slice(0, 1))], COUNTS) == [None]  # another batch size
    assert memory.due(0, 1, [("text", slice(0, 1))], COUNTS)
    assert not memory.due(0, 99, both, COUNTS)  # never again
    assert memory.due(0, 1, both, COUNTS[:-1])  # other numbers: another video size


def test_errors_that_are_no_numbers_leave_the_heads_alike():
    errors = curves(3).view(1, 7, 6)
    errors[0, 2, 3] = torch.nan
    memory, parts = allocation.Allocation(interval=5), [("text", slice(0, 1))]
    memory.add(0, 0, parts, curve_of(errors))
    assert memory.kept(0, 1, parts, COUNTS) == [[8] * 7]


@pytest.mark.parametrize("mean", [1, 7, 30])
def test_shares_become_whole_numbers_with_their_sum(mean):
    generator = torch.Generator().manual_seed(mean)
    shares = torch.rand(60, generator=generator, dtype=torch.float64)
    shares = (shares / shares.mean()).tolist()
    counts = allocation.probe_counts(mean, 500)
    found = allocation.from_shares(shares, mean, counts)
    assert sum(found) == 60 * mean
    assert max(abs(kept - share * mean) for kept, share in zip(found, shares)) < 1


def test_shares_beyond_the_limits_go_where_room_is():
    assert allocation.from_shares([6.0, 0.0, 0.0], 4, (0, 16)) == [16, 4, 4]
    assert allocation.from_shares([9.0, 9.0], 4, (1, 16)) == [16, 16]
    assert allocation.from_shares([-1.0, 2.0, 2.0], 4, (1, 16)) == [1, 8, 8]


def test_layers_are_probed_often_at_first_and_then_at_the_interval():
    found = allocation.Allocation(5)
    whole, made = [("all", slice(0, 1))], []
    for step in range(30):
        if found.due(0, step, whole, COUNTS):
            made.append(step)
            found.add(0, step, whole, curve_of(curves(0, heads=3)[None]))
    assert made == [0, 1, 2, 4, 8, 13, 18, 23, 28]
    late = allocation.Allocation(5)  # the second of two experts
    late.add(0, 10, whole, curve_of(curves(0, heads=3)[None]))
    assert not late.due(0, 14, whole, COUNTS) and late.due(0, 15, whole, COUNTS)
