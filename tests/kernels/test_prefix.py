"""Attention of a few queries over their best blocks, against the definition."""

import pytest
import torch

from pack_loader import load
from support.data.backend import DTYPES, same
from support.data.blocks import blocks_of, reference, tensors, types, wide

ops = load(".kernels.ops")
COUNTS = (0, 1, 3, 50)


def case(dtype, hidden=False, scale=1.0):
    q, (k, v) = (
        tensors((2, 3, 9, 32), dtype=dtype, scale=scale)[0],
        tensors(*[(2, 3, 150, 32)] * 2, dtype=dtype, seed=1),
    )
    blocks = blocks_of(150, 16, shuffled=True)
    if hidden:
        blocks = types.TokenBlocks.cut(torch.arange(100), 16, num_tokens=150)
    means = tensors((2, 3, 9, 32), (2, 3, blocks.num_blocks, 32), dtype=torch.float32, seed=2)
    return q, k, v, means, blocks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("required", [False, True])
def test_every_prefix_matches_its_definition(dtype, hidden, pooled, required):
    q, k, v, means, blocks = case(dtype, hidden)
    needed = far = None
    if required:
        needed = torch.rand(9, blocks.num_blocks, generator=torch.Generator().manual_seed(3)) < 0.2
    if pooled:
        far = types.PooledKV(*(reference.block_pool(x.double(), blocks).to(dtype) for x in (k, v)))
    given = (q, k, v, types.RankedBlocks(blocks, *means, needed, far), COUNTS)
    found, expected = ops.prefix_attention(*given), reference.prefix_attention(*wide(given))
    for a, b in zip(found, expected):
        assert torch.equal(a == -torch.inf, b == -torch.inf)
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-5)


def test_a_prefix_is_what_block_sparse_attention_gives_for_it():
    """The queries of one token a block, so that lists can say the same."""
    q, k, v, means, blocks = case(torch.float32)
    rows = types.TokenBlocks.cut(torch.arange(9), 1)
    scores = means[0] @ means[1].mT
    rank = scores.argsort(-1, descending=True).argsort(-1)
    found = ops.prefix_attention(q, k, v, types.RankedBlocks(blocks, *means), COUNTS)
    for i, count in enumerate(COUNTS):
        mask = types.BlockMask.from_dense(rows, blocks, rank < count)
        out, lse = ops.block_sparse_attention(q, k, v, mask)
        torch.testing.assert_close(found.out[i], out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.lse[i], lse)
    out, lse = ops.dense_attention(q, k, v)
    same(found.exact_out, out.double(), torch.float32)
    torch.testing.assert_close(found.exact_lse, lse)


def test_rows_in_parts_give_the_same(monkeypatch):
    q, k, v, means, blocks = case(torch.float32)
    ranked = types.RankedBlocks(blocks, *means)
    whole = ops.prefix_attention(q, k, v, ranked, COUNTS)
    monkeypatch.setattr(load(".kernels.pytorch.prefix"), "STEP_BYTES", 4 * 4 * 6 * 160)
    for part, one in zip(ops.prefix_attention(q, k, v, ranked, COUNTS), whole):
        torch.testing.assert_close(part, one)


def test_large_scores_stay_finite():
    """A prefix whose keys all lie a hundred below the best has no weight, and no NaN."""
    q, k, v, means, blocks = case(torch.float32, scale=200.0)
    found = ops.prefix_attention(q, k, v, types.RankedBlocks(blocks, *means), COUNTS)
    assert torch.isfinite(found.out).all() and not torch.isnan(found.lse).any()


@pytest.mark.parametrize("counts, words", [((), "at least one"), ((1, -1), "at least 0")])
def test_counts_are_checked(counts, words):
    q, k, v, means, blocks = case(torch.float32)
    with pytest.raises(ValueError, match=words):
        ops.prefix_attention(q, k, v, types.RankedBlocks(blocks, *means), counts)
