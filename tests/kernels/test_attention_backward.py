"""Gradients of block-sparse attention against autograd of its definition."""

import pytest
import torch

from pack_loader import load
from support.data.backend import BACKEND, DTYPES, same
from support.data.blocks import (
    LIMITS,
    blocks_of,
    packed,
    ragged,
    reference,
    selected,
    tensors,
    types,
    wide,
)

ops = load(".kernels.ops")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tokens, head_dim", [(150, 64), pytest.param(129, 80, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "kept", ["some", "ragged", "all", "ragged, fine key blocks", "ragged, packed", "ragged, wide"]
)
def test_gradients_match_those_of_the_definition(dtype, tokens, head_dim, kept):
    """Ragged ends gave wrong dQ and dV in the field, and delta summed in bf16 wrong everything."""
    q, k, v = (x.requires_grad_() for x in tensors(*[(1, 2, tokens, head_dim)] * 3, dtype=dtype))
    blocks = blocks_of(tokens, shuffled=True)
    with torch.no_grad():
        mask, _ = selected(q, k, blocks, blocks, 2 if kept == "some" else 3)
        if kept.startswith("ragged"):
            fine = kept != "ragged"
            rows = blocks_of(tokens, 128, shuffled=True) if kept == "ragged, wide" else blocks
            mask = ragged(2, rows, blocks_of(tokens, 16 if fine else 64, shuffled=True))
        if kept.endswith("packed"):
            dense = mask.to_dense()
            dense[:, 0] = False  # a head that keeps nothing
            mask = packed(types.BlockMask.from_dense(mask.q_blocks, mask.kv_blocks, dense))
    d_out, d_lse = tensors((1, 2, tokens, head_dim), (1, 2, tokens), seed=3)
    d_out = d_out.to(dtype)
    out, lse = ops.block_sparse_attention(q, k, v, mask, **BACKEND)
    finite = torch.isfinite(lse)
    loss = (out * d_out).sum() + (lse * d_lse.to(lse.dtype))[finite].sum()
    found = torch.autograd.grad(loss, (q, k, v))
    exact = wide((q, k, v))
    out, lse = reference.block_sparse_attention(*exact, mask)
    loss = (out * d_out.double()).sum() + (lse * d_lse)[finite].sum()
    for a, b in zip(found, torch.autograd.grad(loss, exact)):
        same(a, b, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_at_large_activations(dtype):
    q, k, v = (x.requires_grad_() for x in tensors(*[(1, 1, 200, 64)] * 3, dtype=dtype, scale=16.0))
    blocks = blocks_of(200)
    with torch.no_grad():
        mask, _ = selected(q, k, blocks, blocks, 2)
    (d_out,) = tensors((1, 1, 200, 64), seed=3, dtype=dtype)
    out, _ = ops.block_sparse_attention(q, k, v, mask, **BACKEND)
    found = torch.autograd.grad((out * d_out).sum(), (q, k, v))
    exact = wide((q, k, v))
    out, _ = reference.block_sparse_attention(*exact, mask)
    expected = torch.autograd.grad((out * d_out.double()).sum(), exact)
    # At logits of 2,000 one float32 step of the LSE is 1e-4, and the softmax is all but one-hot, so
    # that dQ and dK are small differences of large numbers.
    for a, b, limit in zip(found, expected, (30, 30, 1)):
        same(a, b, dtype, 2e-4 + (limit * LIMITS[dtype] if dtype == torch.bfloat16 else 0))


@pytest.mark.slow
def test_gradients_are_the_same_on_every_run():
    q, k, v = (x.requires_grad_() for x in tensors(*[(1, 2, 300, 32)] * 3, dtype=torch.float32))
    blocks = blocks_of(300)
    with torch.no_grad():
        mask, _ = selected(q, k, blocks, blocks, 3)
    runs = []
    for _ in range(2):
        out, _ = ops.block_sparse_attention(q, k, v, mask, **BACKEND)
        runs.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_gradients_of_pooled_keys_and_values():
    q, k, v = (x.requires_grad_() for x in tensors(*[(1, 2, 150, 16)] * 3, dtype=torch.float32))
    blocks = blocks_of(150, shuffled=True)
    with torch.no_grad():
        mask, _ = selected(q, k, blocks, blocks, 2)
    results = []
    for module, (a, b, c), options in ((ops, (q, k, v), BACKEND), (reference, wide((q, k, v)), {})):
        pooled = types.PooledKV(*(module.block_pool(x, blocks, **options) for x in (b, c)))
        out, lse = module.block_sparse_attention(a, b, c, mask, pooled, **options)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        loss = (out * weights).sum() + lse.square().sum()
        results.append(torch.autograd.grad(loss, (a, b, c)))
    for found, expected in zip(*results):
        same(found, expected, torch.float32)


def test_keys_in_no_block_get_no_gradient():
    q, k, v = (x.requires_grad_() for x in tensors(*[(1, 2, 150, 32)] * 3, dtype=torch.float32))
    kv_blocks = types.TokenBlocks.cut(torch.arange(100), 64, num_tokens=150)
    mask = ragged(2, blocks_of(150), kv_blocks)
    results = []
    for module, leaves, options in ((ops, (q, k, v), BACKEND), (reference, wide((q, k, v)), {})):
        out, _ = module.block_sparse_attention(*leaves, mask, **options)
        results.append(torch.autograd.grad(out.square().sum(), leaves))
    for found, expected in zip(*results):
        same(found, expected, torch.float32)
    assert all(not gradient[:, :, 100:].any() for gradient in results[0][1:])
