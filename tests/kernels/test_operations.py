"""The portable operations against the definition in fp64: values, gradients, ragged and empty cases, bad input."""

import pytest
import torch
from fields import relative_error
from pack_loader import load

reference, pytorch, ops = (load(f".kernels.{name}") for name in ("reference", "pytorch", "ops"))
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def table(tokens, block=64, shuffled=False, seed=0):
    order = torch.arange(tokens)
    if shuffled:
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    blocks = torch.full((-(-tokens // block), block), -1)
    blocks.view(-1)[:tokens] = order
    return blocks


def tensors(*shapes, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in shapes]


def selected(q, k, q_blocks, k_blocks, keep, forced=None):
    pooled_q, pooled_k = (reference.block_pool(x.double(), b) for x, b in ((q, q_blocks), (k, k_blocks)))
    return reference.block_select(pooled_q, pooled_k, reference.block_sizes(k_blocks), keep, forced)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 129, 1000])
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_sparse_attention_matches_its_definition(tokens, dtype):
    q, k, v = tensors(*[(2, 2, tokens, 64)] * 3, dtype=dtype)
    blocks = table(tokens, shuffled=True)
    indices, counts, _ = selected(q, k, blocks, blocks, keep=max(1, blocks.shape[0] // 3))
    out, lse = ops.block_sparse_attention(q, k, v, blocks, blocks, indices, counts)
    expected, expected_lse = reference.block_sparse_attention(
        q.double(), k.double(), v.double(), blocks, blocks, indices, counts
    )
    assert out.dtype == dtype and out.shape == q.shape
    assert relative_error(out, expected) < LIMITS[dtype]
    assert (lse - expected_lse).abs().max() < max(LIMITS[dtype], 1e-5)


@pytest.mark.parametrize("width", [64, 80, 96, 128])
@pytest.mark.parametrize("scale", [1.0, 16.0, 64.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_activations_stay_finite_and_right(width, scale, dtype):
    q, k, v = tensors(*[(1, 2, 200, width)] * 3, dtype=dtype, scale=scale)
    blocks = table(200)
    indices, counts, _ = selected(q, k, blocks, blocks, keep=2)
    out, lse = ops.block_sparse_attention(q, k, v, blocks, blocks, indices, counts)
    expected, _ = reference.block_sparse_attention(q.double(), k.double(), v.double(), blocks, blocks, indices, counts)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    # Logits grow with the square of the scale: at 64 they reach 5e4, where one float32 step is 4e-3.
    assert relative_error(out, expected) < LIMITS[dtype] + {1.0: 0, 16.0: 1e-4, 64.0: 2e-3}[scale]


@pytest.mark.parametrize("q_tokens, k_tokens", [(130, 700), (700, 130), (64, 65)])
@pytest.mark.parametrize("tail", [False, True])
def test_query_and_key_lengths_may_differ_and_rows_may_be_ragged(q_tokens, k_tokens, tail):
    (q,) = tensors((1, 3, q_tokens, 32))
    k, v = tensors((1, 3, k_tokens, 32), (1, 3, k_tokens, 32), seed=1)
    q_blocks, k_blocks = table(q_tokens), table(k_tokens, shuffled=True)
    generator = torch.Generator().manual_seed(2)
    forced = torch.rand(q_blocks.shape[0], k_blocks.shape[0], generator=generator) < 0.3
    indices, counts, _ = selected(q, k, q_blocks, k_blocks, 1, forced)
    pooled = [reference.block_pool(x, k_blocks) for x in (k, v)] if tail else [None, None]
    out, lse = ops.block_sparse_attention(q, k, v, q_blocks, k_blocks, indices, counts, *pooled)
    expected, expected_lse = reference.block_sparse_attention(q, k, v, q_blocks, k_blocks, indices, counts, *pooled)
    assert relative_error(out, expected) < 1e-12
    assert (lse - expected_lse).abs().max() < 1e-12


def test_all_blocks_kept_is_dense_attention():
    q, k, v = tensors(*[(1, 2, 333, 64)] * 3)
    blocks = table(333, shuffled=True)
    indices, counts, tail = selected(q, k, blocks, blocks, keep=blocks.shape[0])
    out, lse = ops.block_sparse_attention(q, k, v, blocks, blocks, indices, counts)
    expected, expected_lse = reference.dense_attention(q, k, v)
    assert relative_error(out, expected) < 1e-12
    assert (lse - expected_lse).abs().max() < 1e-12
    assert (tail == -torch.inf).all()


def test_a_row_that_keeps_nothing_is_zero_and_not_nan():
    q, k, v = tensors(*[(1, 1, 128, 32)] * 3)
    blocks = table(128)
    indices = torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    counts = torch.tensor([[[1, 0]]], dtype=torch.int32)
    out, lse = ops.block_sparse_attention(q, k, v, blocks, blocks, indices, counts)
    assert torch.isfinite(out).all() and (out[:, :, 64:] == 0).all() and (lse[:, :, 64:] == -torch.inf).all()
    assert (out[:, :, :64] != 0).any()


def test_strides_of_the_caller_are_taken_as_they_are():
    q, k, v = (x.transpose(1, 2) for x in tensors(*[(2, 150, 2, 64)] * 3))
    blocks = table(150)
    indices, counts, _ = selected(q, k, blocks, blocks, keep=2)
    out, _ = ops.block_sparse_attention(q, k, v, blocks, blocks, indices, counts)
    expected, _ = ops.block_sparse_attention(*(x.contiguous() for x in (q, k, v)), blocks, blocks, indices, counts)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("tokens", [64, 150, 1000])
def test_pooling_counts_only_real_tokens(tokens):
    (x,) = tensors((2, 2, tokens, 32), dtype=torch.float32, scale=3.0)
    blocks = table(tokens, shuffled=True)
    assert relative_error(ops.block_pool(x, blocks), reference.block_pool(x.double(), blocks)) < 1e-6


@pytest.mark.parametrize("forced_share", [0.0, 0.2])
@pytest.mark.parametrize("keep", [1, 4, 99])
def test_selection_matches_its_definition(keep, forced_share):
    pooled_q, pooled_k = tensors((2, 3, 7, 32), (2, 3, 11, 32))
    sizes = torch.tensor([64] * 10 + [5])
    forced = torch.rand(7, 11, generator=torch.Generator().manual_seed(0)) < forced_share if forced_share else None
    indices, counts, tail = ops.block_select(pooled_q, pooled_k, sizes, keep, forced)
    expected_indices, expected_counts, expected_tail = reference.block_select(pooled_q, pooled_k, sizes, keep, forced)
    width = expected_indices.shape[-1]
    assert torch.equal(indices[..., :width], expected_indices) and (indices[..., width:] == 11).all()
    assert torch.equal(counts, expected_counts)
    torch.testing.assert_close(tail, expected_tail)


def test_forced_blocks_come_in_addition():
    pooled_q, pooled_k = tensors((1, 1, 2, 16), (1, 1, 8, 16))
    free, _, _ = ops.block_select(pooled_q, pooled_k, torch.full((8,), 64), 3)
    forced = torch.zeros(2, 8, dtype=torch.bool)
    forced[:, free[0, 0, 0, 0]] = True      # the best block of row 0 is forced: three others are kept beside it
    _, counts, _ = ops.block_select(pooled_q, pooled_k, torch.full((8,), 64), 3, forced)
    assert (counts == 4).all()


def test_first_order_background_matches_its_definition():
    q, k, v, out = tensors(*[(2, 2, 150, 32)] * 4, dtype=torch.float32)
    blocks = table(150, shuffled=True)
    lse, tail, gate_c, gate_b, beta = tensors((2, 2, 150), (2, 2, 3), (2, 2), (2, 2), (2, 2, 32), dtype=torch.float32)
    tail[0, 0, 1] = -torch.inf              # a row block that dropped nothing
    features = torch.stack([torch.randperm(32)[:10] for _ in range(4)]).view(2, 2, 10)
    for some in (None, features):
        state = ops.first_order_state(k, v, some)
        for found, expected in zip(state, reference.first_order_state(k.double(), v.double(), some)):
            assert relative_error(found, expected) < 1e-5
        weights = beta if some is None else beta[..., :10]
        arguments = (q, out, lse, tail, blocks, *state, gate_c, gate_b, weights)
        wide = [x.double() if x.is_floating_point() else x for x in arguments]
        found = ops.mix_first_order(*arguments, some)
        assert relative_error(found, reference.mix_first_order(*wide, some)) < 1e-5
    untouched = reference.token_to_block(blocks) == 1
    assert torch.equal(found[0, 0, untouched], out[0, 0, untouched])


@pytest.mark.parametrize("tail", [False, True])
def test_gradients_match_those_of_the_definition(tail):
    q, k, v = (x.requires_grad_() for x in tensors(*[(1, 2, 150, 16)] * 3))
    blocks = table(150, shuffled=True)
    with torch.no_grad():
        indices, counts, _ = selected(q, k, blocks, blocks, keep=2)
    found, expected = [], []
    for module, into in ((ops, found), (reference, expected)):
        pooled = [module.block_pool(x, blocks) for x in (k, v)] if tail else [None, None]
        out, lse = module.block_sparse_attention(q, k, v, blocks, blocks, indices, counts, *pooled)
        loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() + lse.square().sum()
        into.extend(torch.autograd.grad(loss, (q, k, v)))
    for a, b in zip(found, expected):
        assert relative_error(a, b) < 1e-10


def test_bad_input_is_refused_by_name():
    q, k, v = tensors(*[(1, 1, 64, 32)] * 3)
    blocks = table(64)
    indices, counts, _ = selected(q, k, blocks, blocks, 1)
    with pytest.raises(ValueError, match=r"q, k, v must agree .* k \(1, 1, 64, 16\)"):
        ops.block_sparse_attention(q, k[..., :16], v[..., :16], blocks, blocks, indices, counts)
    with pytest.raises(ValueError, match="one dtype; found torch.float32"):
        ops.block_sparse_attention(q.float(), k, v, blocks, blocks, indices, counts)
    with pytest.raises(ValueError, match=r"one row per head and query block, \(1, 1, 1\); found \(1, 1, 3, 1\)"):
        ops.block_sparse_attention(q, k, v, blocks, blocks, indices.expand(1, 1, 3, 1), counts)
    with pytest.raises(ValueError, match="go together"):
        ops.block_sparse_attention(q, k, v, blocks, blocks, indices, counts, k)
    with pytest.raises(ValueError, match="none 0; found"):
        ops.block_pool(q[:0], blocks)
    with pytest.raises(ValueError, match="integer table"):
        ops.block_pool(q, blocks.float())
    with pytest.raises(ValueError, match="at least 1 block per row, found 0"):
        ops.block_select(q, k, torch.ones(64), 0)
    with pytest.raises(ValueError, match=r"\(query blocks, key blocks\) = \(64, 64\)"):
        ops.block_select(q, k, torch.ones(64), 1, torch.zeros(3, 3, dtype=torch.bool))
