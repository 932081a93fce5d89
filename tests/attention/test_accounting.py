"""The accounting against the paper's own case: Wan 2.1 1.3B at 480p."""

import pytest

from pack_loader import load

accounting = load(".attention.accounting")
TOKENS, HEADS, LAYERS, WIDTH = 32760, 12, 30, 128
BLOCKS = -(-TOKENS // 64)


def test_dense_attention_of_a_forward():
    assert LAYERS * accounting.dense_flops(TOKENS, WIDTH, HEADS) / 1e12 == pytest.approx(
        197.8, abs=0.05
    )


@pytest.mark.parametrize(
    "background",
    [
        lambda: accounting.low_rank_flops(TOKENS, WIDTH, HEADS, 64),
        lambda: accounting.first_order_flops(TOKENS, WIDTH, HEADS, 64),
    ],
)
def test_ninety_percent_and_rank_64_are_ten_times_fewer(background):
    kept = BLOCKS // 10
    cost = accounting.AttentionCost(
        kept / BLOCKS,
        accounting.dense_flops(TOKENS, WIDTH, HEADS),
        accounting.sparse_flops(TOKENS, WIDTH, HEADS, kept / BLOCKS),
        accounting.routing_flops(TOKENS, WIDTH, HEADS, BLOCKS, BLOCKS),
        background(),
    )
    assert cost.dense / cost.total == pytest.approx(10, rel=0.05)


def test_calibration_is_a_small_share():
    share = accounting.calibration_flops(75600, WIDTH, 40, 128) / accounting.dense_flops(
        75600, WIDTH, 40
    )
    assert share == pytest.approx(0.0017, abs=0.0001)
