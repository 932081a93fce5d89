"""Which blocks are kept, against the definition, on the backend at hand."""

import pytest
import torch

from pack_loader import load
from support.data.backend import BACKEND
from support.data.blocks import blocks_of, layout_of, reference, tensors, types, wide

ops = load(".kernels.ops")


def score_case(rows, blocks, short=64, head_dim=32, batch=1, heads=2):
    """Pooled queries and keys of so many blocks, the last one short, and their layout."""
    pooled = tensors(
        (batch, heads, rows, head_dim), (batch, heads, blocks, head_dim), dtype=torch.float32
    )
    layout = layout_of(blocks_of(64 * rows), blocks_of(64 * (blocks - 1) + short))
    return pooled, layout


@pytest.mark.parametrize("required_share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("topk, blocks", [
    (1, 11), (4, 32), (99, 33), pytest.param(99, 1100, marks=pytest.mark.slow),
    pytest.param(2000, 1100, marks=pytest.mark.slow),
])  # fmt: skip
def test_selection_matches_its_definition(topk, blocks, required_share):
    pooled, layout = score_case(3, blocks, short=5)
    if required_share:
        generator = torch.Generator().manual_seed(0)
        required = torch.rand(3, blocks, generator=generator) < required_share
        layout = layout_of(layout.q_blocks, layout.kv_blocks, required)
    mask, dropped_lse = ops.block_select(*pooled, layout, topk, **BACKEND)
    expected, expected_lse = reference.block_select(*pooled, layout, topk)
    longest = expected.kv_indices.shape[-1]
    assert torch.equal(mask.kv_indices[..., :longest], expected.kv_indices)
    assert (mask.kv_indices[..., longest:] == blocks).all()
    assert torch.equal(mask.kv_num_blocks, expected.kv_num_blocks)
    assert torch.equal(mask.to_dense(), expected.to_dense())
    torch.testing.assert_close(dropped_lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("required_share", [0.0, 0.2])
@pytest.mark.parametrize("topk", [[0, 1, 5, 40], [7, 7, 0, 7], [0, 0, 0, 0], [3, 3, 3, 3]])
def test_heads_may_keep_differently_many(topk, required_share):
    """Their lists take the room of what they keep; the same as asked one head after the other."""
    pooled, layout = score_case(3, 33, short=5, batch=2)
    if required_share:
        generator = torch.Generator().manual_seed(0)
        required = torch.rand(3, 33, generator=generator) < required_share
        layout = layout_of(layout.q_blocks, layout.kv_blocks, required)
    mask, dropped_lse = ops.block_select(*pooled, layout, topk, **BACKEND)
    expected, expected_lse = reference.block_select(*pooled, layout, topk)
    assert torch.equal(mask.to_dense(), expected.to_dense())
    assert torch.equal(mask.kv_num_blocks, expected.kv_num_blocks)
    torch.testing.assert_close(dropped_lse, expected_lse, atol=1e-5, rtol=1e-5)
    assert (mask.packing is None) == (len(set(topk)) == 1)
    assert mask.kv_indices.numel() == 3 * sum(layout.widths([min(each, 33) for each in topk]))
    free = [x.flatten(0, 1)[:, None] for x in pooled]
    for head, each in enumerate(topk):
        if each:
            one, _ = ops.block_select(*(x[head : head + 1] for x in free), layout, each, **BACKEND)
            assert torch.equal(one.to_dense()[0, 0], mask.to_dense().flatten(0, 1)[head])


def test_each_head_needs_a_count_that_is_whole_and_not_negative():
    pooled, layout = score_case(3, 8)
    for topk, words in (([1], r"1 x 2 heads; found 1"), ([1, -1], "at least 0"), (0, "at least 1")):
        with pytest.raises(ValueError, match=words):
            ops.block_select(*pooled, layout, topk, **BACKEND)


def test_selection_of_equal_and_infinite_scores_keeps_as_many_as_asked():
    """Padding must never be picked: with equal scores, or -inf, every entry names a real block."""
    pooled_q, pooled_k = torch.ones(1, 1, 3, 16), torch.ones(1, 1, 40, 16)
    pooled_k[:, :, 5:20] = -torch.inf
    layout = layout_of(blocks_of(3 * 64), blocks_of(40 * 64))
    mask, _ = ops.block_select(pooled_q, pooled_k, layout, 30, **BACKEND)
    lists = mask.kv_indices
    assert (mask.kv_num_blocks == 30).all() and (lists.diff(dim=-1) > 0).all()
    assert 0 <= lists.min() and lists.max() < 40
    assert set(range(5)) | set(range(20, 40)) <= set(lists[0, 0, 0].tolist())


SPREADS = {  # rows of scores from normally distributed numbers
    "normal": lambda x: x,
    "far above zero": lambda x: 1e4 + x,
    "below zero": lambda x: -(x.abs()) * 1e-3,
    "two heaps": lambda x: torch.where(x > 1.3, 60 + 1e-3 * x, x),
    "heavy": lambda x: torch.exp(8 * x),
    "few values": lambda x: (2 * x).round(),
    "one outlier": lambda x: torch.where(x == x.amax(), 1e30, x * 1e-20),
    "infinite": lambda x: torch.where(x > 1.5, torch.inf, torch.where(x < -1, -torch.inf, x)),
    "zeros": lambda x: x * 0.0,
}


@pytest.mark.parametrize("spread", SPREADS)
def test_the_best_are_found_however_scores_are_spread(spread):
    generator = torch.Generator().manual_seed(0)
    scores = SPREADS[spread](torch.randn(1, 1, 700, 1, generator=generator))
    layout = layout_of(blocks_of(2 * 64), blocks_of(700 * 64))
    for topk in (1, 70, 350, 699):
        mask, _ = ops.block_select(torch.ones(1, 1, 2, 1), scores, layout, topk, scale=1, **BACKEND)
        kept = mask.kv_indices[0, 0, 1].long()
        assert len(kept) == topk and (kept.diff() > 0).all()
        # Which of equal ones are kept is not said.
        best = scores.flatten().sort(descending=True).values[:topk]
        assert torch.equal(scores.flatten()[kept].sort(descending=True).values, best)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000, -0x400000])
def test_lists_name_real_blocks_whatever_is_no_number(bits):
    """CUDA's NaN has all bits of its payload set, so that its rank is at the very end."""
    pooled_q, pooled_k = tensors((1, 2, 3, 1), (1, 2, 600, 1), dtype=torch.float32)
    pooled_k[:, :, 7] = torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32)
    required = torch.zeros(3, 600, dtype=torch.bool)
    required[:, 3] = True
    layout = layout_of(blocks_of(3 * 64), blocks_of(600 * 64), required)
    for topk in ([0, 3], [1, 600], 1):
        mask, _ = ops.block_select(pooled_q.abs(), pooled_k, layout, topk, scale=1, **BACKEND)
        lists = mask.kv_indices.flatten()
        assert 0 <= lists.min() and lists.max() <= 600
        assert mask.to_dense()[..., 3].all()


def test_required_blocks_come_in_addition():
    pooled, layout = score_case(2, 8, head_dim=16, heads=1)
    free, _ = ops.block_select(*pooled, layout, 3, **BACKEND)
    required = torch.zeros(2, 8, dtype=torch.bool)
    required[:, free.kv_indices[0, 0, 0, 0]] = True  # row 0's best: three others are kept beside it
    layout = layout_of(layout.q_blocks, layout.kv_blocks, required)
    mask, _ = ops.block_select(*pooled, layout, 3, **BACKEND)
    assert (mask.kv_num_blocks == 4).all()


@pytest.mark.parametrize("tokens, force", [(64, False), (130, True)])
def test_search_by_mass_matches_its_definition(tokens, force):
    q, k = tensors((1, 2, tokens, 32), (1, 2, tokens + 90, 32), dtype=torch.float32, scale=1.5)
    q_blocks = blocks_of(tokens, shuffled=True)
    kv_blocks = blocks_of(tokens + 90, shuffled=True)
    # Half a unit off, as an LSE kept from an earlier step is: the recall is still a share.
    lse = reference.dense_attention(q, k, k)[1] + 0.5
    required = torch.eye(q_blocks.num_blocks, kv_blocks.num_blocks, dtype=torch.bool)
    layout = layout_of(q_blocks, kv_blocks, required if force else None)
    case = (q, k, lse, layout, [1, 2, 99])
    bits, recall = ops.block_mass(*case, **BACKEND)
    expected_bits, expected_recall = reference.block_mass(*wide(case))
    assert torch.equal(bits, expected_bits)
    torch.testing.assert_close(recall.double(), expected_recall, atol=1e-5, rtol=0)
    assert (recall[..., 2] - 1).abs().max() < 1e-5


def test_search_by_mass_never_sees_keys_in_no_block():
    q, k = tensors((1, 2, 130, 32), (1, 2, 220, 32), dtype=torch.float32)
    listed = torch.cat((torch.arange(0, 60), torch.arange(80, 220)))
    lse = reference.dense_attention(q, k[:, :, listed], k[:, :, listed])[1]
    q_blocks = blocks_of(130)
    here = layout_of(q_blocks, types.TokenBlocks.cut(listed, 64, num_tokens=220))
    bits, recall = ops.block_mass(q, k, lse, here, [1, 2], **BACKEND)
    there = layout_of(q_blocks, blocks_of(200))
    expected_bits, expected_recall = reference.block_mass(
        *wide((q, k[:, :, listed], lse)), there, [1, 2]
    )
    assert torch.equal(bits, expected_bits)
    torch.testing.assert_close(recall.double(), expected_recall, atol=1e-5, rtol=0)


@pytest.mark.parametrize("blocks", [5, 32, 33, 1100])
def test_bits_and_lists_say_the_same(blocks):
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(2, 3, 4, blocks, generator=generator) < 0.3
    kept[0, 0, 0], kept[0, 0, 1] = False, True
    bits = reference.pack_bits(kept)
    assert torch.equal(load(".kernels.pytorch.selection").pack_bits(kept), bits)
    layout = layout_of(blocks_of(4 * 64), blocks_of(blocks * 64))
    found = ops.mask_from_bits(bits, layout, blocks, **BACKEND)
    expected = reference.mask_from_bits(bits, layout, blocks)
    assert torch.equal(found.kv_indices, expected.kv_indices)
    assert torch.equal(found.kv_num_blocks, expected.kv_num_blocks)
    assert torch.equal(found.to_dense(), kept)
