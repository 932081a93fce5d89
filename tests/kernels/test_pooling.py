"""Pooling and states against their definition in float64, on the backend at hand."""

import pytest
import torch

from pack_loader import load
from support.data.backend import BACKEND, DTYPES, HALF, same
from support.data.blocks import blocks_of, feature_map, layout_of, reference, tensors, types, wide
from support.data.fields import relative_error

ops = load(".kernels.ops")


@pytest.mark.parametrize("tokens", [64, 150, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling_counts_only_real_tokens(tokens, dtype):
    (x,) = tensors((2, 2, tokens, 40), dtype=dtype, scale=3.0)
    blocks = blocks_of(tokens, shuffled=True)
    found = ops.block_pool(x, blocks, **BACKEND)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    same(found, reference.block_pool(x.double(), blocks), torch.float32, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("key_block", [64, 16])
def test_first_order_state_matches_its_definition(dtype, inner, key_block):
    """`inner` blocks of 64 hold queries; other keys, text for example, are not in the state."""
    k, v = tensors(*[(2, 2, 170, 40)] * 2, dtype=dtype)
    layout = layout_of(blocks_of(min(64 * inner, 170)), blocks_of(170, key_block, shuffled=True))
    ids = torch.stack([torch.randperm(40)[:10] for _ in range(4)]).view(2, 2, 10)
    for channel_ids in (None, ids):
        found = ops.block_pool_state(k, v, layout, channel_ids, **BACKEND)
        expected = reference.block_pool_state(k.double(), v.double(), layout, channel_ids)
        for a, b in zip(found, expected):
            same(a, b, torch.float32)


@pytest.mark.parametrize("k_mean, v_mean", [(30.0, 10.0), (100.0, 10.0)])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_covariance_survives_large_means(dtype, k_mean, v_mean):
    """Channels of trained models lie far from 0, where sums that are not centred lose 1 %."""
    k, v = tensors(*[(1, 1, 4500, 32)] * 2, dtype=torch.float32)
    k, v = (k + k_mean).to(dtype), (v + v_mean).to(dtype)
    blocks = blocks_of(4500, shuffled=True)
    layout = layout_of(blocks, blocks)
    *_, cov = ops.block_pool_state(k, v, layout, **BACKEND)
    *_, expected = reference.block_pool_state(k.double(), v.double(), layout)
    assert relative_error(cov, expected) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["softmax", "elu"])
@pytest.mark.parametrize(
    "rank, full", [(16, True), pytest.param(24, False, marks=pytest.mark.slow), (0, False)]
)
def test_low_rank_state_matches_its_definition(dtype, act, rank, full):
    k, v = tensors(*[(1, 2, 170, 48)] * 2, dtype=dtype)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    fmap = feature_map(act, 2, 170, 48, rank, sums, full) if rank else types.FeatureMap(act)
    found = ops.low_rank_state(k, v, fmap, **BACKEND)
    for a, b in zip(found, reference.low_rank_state(*wide((k, v, fmap)))):
        same(a, b, dtype)
