"""Every operation against its definition in float64: values, gradients, ragged and empty cases, on the backend at hand.

In a process of its own the same tests run on Triton's kernels, in the watched interpreter; see conftest.py.
"""

import os

import pytest
import torch

from pack_loader import load
from support.data.blocks import (
    LIMITS,
    feature_map,
    mixing_case,
    ragged,
    reference,
    selected,
    sparse_case,
    table,
    tensors,
    wide,
)
from support.data.fields import relative_error

ops, background = load(".kernels.ops"), load(".kernels.background")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = {"backend": "triton" if INTERPRET else "pytorch"}
DTYPES = [torch.float32, torch.float16, torch.bfloat16] + ([] if INTERPRET else [torch.float64])
HALF = [torch.float16, torch.bfloat16]


def same(found, expected, dtype, limit=None):
    limit = limit or LIMITS[dtype]
    assert torch.isfinite(found).all()
    assert relative_error(found, expected) < limit


# --- attention over kept blocks

@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 129, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_attention_matches_its_definition(tokens, dtype):
    case, _ = sparse_case(tokens, dtype, batch=2 if tokens < 100 else 1, keep=4 if tokens == 1000 else None)
    out, lse = ops.block_sparse_attention(*case, **BACKEND)
    expected, expected_lse = reference.block_sparse_attention(*wide(case))
    assert out.dtype == dtype and out.shape == case[0].shape
    same(out, expected, dtype)
    assert (lse - expected_lse).abs().max() < max(LIMITS[dtype], 1e-5)


@pytest.mark.slow
def test_many_blocks():
    case, _ = sparse_case(4097, torch.bfloat16, heads=1, keep=2)
    out, _ = ops.block_sparse_attention(*case, **BACKEND)
    same(out, reference.block_sparse_attention(*wide(case))[0], torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 80, 96, 128])
@pytest.mark.parametrize("scale", [1.0, 16.0, 64.0])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_large_activations_stay_finite_and_right(width, scale, dtype):
    """Keys scaled in bf16 before the product were right at unit activations and wrong at 16 times that."""
    case, _ = sparse_case(200, dtype, width, scale=scale, keep=2)
    out, lse = ops.block_sparse_attention(*case, **BACKEND)
    expected, _ = reference.block_sparse_attention(*wide(case))
    assert torch.isfinite(lse).all()
    # Logits grow with the square of the scale: at 64 they reach 5e4, where one float32 step is 4e-3.
    same(out, expected, dtype, LIMITS[dtype] + {1.0: 0, 16.0: 1e-4, 64.0: 2e-3}[scale])


@pytest.mark.parametrize("q_tokens, k_tokens", [(130, 700), (700, 130), (64, 65)])
@pytest.mark.parametrize("tail", [False, True])
def test_query_and_key_lengths_may_differ_and_rows_may_be_ragged(q_tokens, k_tokens, tail):
    (q,) = tensors((1, 3, q_tokens, 32), dtype=torch.float32)
    k, v = tensors((1, 3, k_tokens, 32), (1, 3, k_tokens, 32), seed=1, dtype=torch.float32)
    q_blocks, k_blocks = table(q_tokens), table(k_tokens, shuffled=True)
    forced = torch.rand(q_blocks.shape[0], k_blocks.shape[0], generator=torch.Generator().manual_seed(2)) < 0.3
    indices, counts, _ = selected(q, k, q_blocks, k_blocks, 1, forced)
    pooled = [reference.block_pool(x, k_blocks) for x in (k, v)] if tail else [None, None]
    case = (q, k, v, q_blocks, k_blocks, indices, counts, *pooled)
    out, lse = ops.block_sparse_attention(*case, **BACKEND)
    expected, expected_lse = reference.block_sparse_attention(*wide(case))
    same(out, expected, torch.float32)
    assert (lse - expected_lse).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", [False, True])
def test_counts_may_run_from_nothing_to_everything(dtype, tail):
    q, k, v = tensors(*[(1, 3, 330, 64)] * 3, dtype=dtype)
    blocks = table(330)
    indices, counts = ragged(3, 6, 6)
    pooled = [reference.block_pool(x.double(), blocks).to(dtype) for x in (k, v)] if tail else [None, None]
    case = (q, k, v, blocks, blocks, indices, counts, *pooled)
    out, lse = ops.block_sparse_attention(*case, **BACKEND)
    expected, expected_lse = reference.block_sparse_attention(*wide(case))
    same(out, expected, dtype)
    if not tail:
        assert (counts[:, :, 0] == 0).all() and (out[:, :, :64] == 0).all() and (lse[:, :, :64] == -torch.inf).all()
    finite = expected_lse > -torch.inf
    assert (lse - expected_lse)[finite].abs().max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_blocks_kept_is_dense_attention(dtype):
    case, tail = sparse_case(270, dtype, keep=5)
    q, k, v = wide(case[:3])
    expected, expected_lse = reference.dense_attention(q, k, v)
    for out, lse in (
        ops.block_sparse_attention(*case, **BACKEND), ops.dense_attention(*case[:3], **BACKEND),
        ops.dense_attention(case[0][:, :, :70], *case[1:3], **BACKEND),
    ):
        rows = out.shape[2]
        same(out, expected[:, :, :rows], dtype)
        assert (lse - expected_lse[:, :, :rows]).abs().max() < max(LIMITS[dtype], 1e-5)
    assert (tail == -torch.inf).all()


def test_what_padding_would_hold_is_never_seen():
    """Tokens next to a short block in memory hold NaN; a mask that multiplies instead of choosing lets them through."""
    q, k, v = tensors(*[(1, 1, 200, 64)] * 3, dtype=torch.float32)
    long = [torch.cat((x, torch.full_like(x, torch.nan)), dim=2) for x in (q, k, v)]
    views = [x[:, :, :200] for x in long]
    blocks = table(200)
    indices, counts, _ = selected(q, k, blocks, blocks, 2)
    rest = (blocks, blocks, indices, counts)
    out, _ = ops.block_sparse_attention(*views, *rest, **BACKEND)
    same(out, reference.block_sparse_attention(*wide((q, k, v)), *rest)[0], torch.float32)
    pooled = ops.block_pool(views[1], blocks, **BACKEND)
    same(pooled, reference.block_pool(k.double(), blocks), torch.float32)


def test_strides_of_the_caller_are_taken_as_they_are():
    q, k, v = (x.transpose(1, 2) for x in tensors(*[(2, 150, 2, 64)] * 3, dtype=torch.float32))
    blocks = table(150)
    indices, counts, _ = selected(q, k, blocks, blocks, keep=2)
    rest = (blocks, blocks, indices, counts)
    out, _ = ops.block_sparse_attention(q, k, v, *rest, **BACKEND)
    expected, _ = ops.block_sparse_attention(*(x.contiguous() for x in (q, k, v)), *rest, **BACKEND)
    assert torch.equal(out, expected)
    assert out.transpose(1, 2).is_contiguous()                      # heads side by side, as the host wants them back
    packed = torch.stack((q, k, v), dim=-2).transpose(-1, -2)       # rows that no kernel can read in place
    out, _ = ops.block_sparse_attention(*packed.unbind(-1), *rest, **BACKEND)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("block", [16, 32, 128])
def test_blocks_of_other_sizes(block):
    q, k, v = tensors(*[(1, 1, 150, 64)] * 3, dtype=torch.float32)
    q_blocks, k_blocks = table(150, block), table(150, 64)
    indices, counts, _ = selected(q, k, q_blocks, k_blocks, 2)
    for rows, columns in ((q_blocks, k_blocks), (k_blocks, q_blocks)):
        indices, counts, _ = selected(q, k, rows, columns, 1)
        case = (q, k, v, rows, columns, indices, counts)
        same(ops.block_sparse_attention(*case, **BACKEND)[0], reference.block_sparse_attention(*wide(case))[0], q.dtype)


# --- gradients

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, width", [(150, 64), pytest.param(129, 80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kept", ["some", "ragged", "all"])
def test_gradients_match_those_of_the_definition(dtype, tokens, width, kept):
    """Ragged ends gave wrong dQ and dV in the field, and delta summed in bf16 wrong everything."""
    q, k, v = (x.requires_grad_() for x in tensors(*[(1, 2, tokens, width)] * 3, dtype=dtype))
    blocks = table(tokens, shuffled=True)
    with torch.no_grad():
        indices, counts, _ = selected(q, k, blocks, blocks, keep=2 if kept == "some" else 3)
        if kept == "ragged":
            indices, counts = ragged(2, 3, 3)
    d_out, d_lse = tensors((1, 2, tokens, width), (1, 2, tokens), seed=3)
    d_out = d_out.to(dtype)
    case = (q, k, v, blocks, blocks, indices, counts)
    out, lse = ops.block_sparse_attention(*case, **BACKEND)
    finite = torch.isfinite(lse)
    found = torch.autograd.grad((out * d_out).sum() + (lse * d_lse.to(lse.dtype))[finite].sum(), (q, k, v))
    exact = wide(case)
    out, lse = reference.block_sparse_attention(*exact)
    expected = torch.autograd.grad((out * d_out.double()).sum() + (lse * d_lse)[finite].sum(), exact[:3])
    for a, b in zip(found, expected):
        same(a, b, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_at_large_activations(dtype):
    q, k, v = (x.requires_grad_() for x in tensors(*[(1, 1, 200, 64)] * 3, dtype=dtype, scale=16.0))
    blocks = table(200)
    with torch.no_grad():
        indices, counts, _ = selected(q, k, blocks, blocks, keep=2)
    (d_out,) = tensors((1, 1, 200, 64), seed=3, dtype=dtype)
    case = (q, k, v, blocks, blocks, indices, counts)
    found = torch.autograd.grad((ops.block_sparse_attention(*case, **BACKEND)[0] * d_out).sum(), (q, k, v))
    exact = wide(case)
    expected = torch.autograd.grad((reference.block_sparse_attention(*exact)[0] * d_out.double()).sum(), exact[:3])
    # At logits of 2,000 one float32 step of the LSE is 1e-4, and the softmax is all but one-hot, so that dQ and dK are
    # small differences of large numbers.
    for a, b, limit in zip(found, expected, (30, 30, 1)):
        same(a, b, dtype, 2e-4 + (limit * LIMITS[dtype] if dtype == torch.bfloat16 else 0))


@pytest.mark.slow
def test_gradients_are_the_same_on_every_run():
    q, k, v = (x.requires_grad_() for x in tensors(*[(1, 2, 300, 32)] * 3, dtype=torch.float32))
    blocks = table(300)
    with torch.no_grad():
        indices, counts, _ = selected(q, k, blocks, blocks, keep=3)
    runs = []
    for _ in range(2):
        out, _ = ops.block_sparse_attention(q, k, v, blocks, blocks, indices, counts, **BACKEND)
        runs.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_gradients_of_the_pooled_tail():
    q, k, v = (x.requires_grad_() for x in tensors(*[(1, 2, 150, 16)] * 3, dtype=torch.float32))
    blocks = table(150, shuffled=True)
    with torch.no_grad():
        indices, counts, _ = selected(q, k, blocks, blocks, keep=2)
    results = []
    for module, (a, b, c), options in ((ops, (q, k, v), BACKEND), (reference, wide((q, k, v)), {})):
        pooled = [module.block_pool(x, blocks, **options) for x in (b, c)]
        out, lse = module.block_sparse_attention(a, b, c, blocks, blocks, indices, counts, *pooled, **options)
        loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() + lse.square().sum()
        results.append(torch.autograd.grad(loss, (a, b, c)))
    for found, expected in zip(*results):
        same(found, expected, torch.float32)


# --- routing

@pytest.mark.parametrize("tokens", [64, 150, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling_counts_only_real_tokens(tokens, dtype):
    (x,) = tensors((2, 2, tokens, 40), dtype=dtype, scale=3.0)
    blocks = table(tokens, shuffled=True)
    found = ops.block_pool(x, blocks, **BACKEND)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    same(found, reference.block_pool(x.double(), blocks), torch.float32, 1e-6)


@pytest.mark.parametrize("forced_share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("keep, blocks", [
    (1, 11), (4, 32), (99, 33), pytest.param(99, 1100, marks=pytest.mark.slow),
    pytest.param(2000, 1100, marks=pytest.mark.slow),
])
def test_selection_matches_its_definition(keep, forced_share, blocks):
    pooled_q, pooled_k = tensors((1, 2, 3, 32), (1, 2, blocks, 32), dtype=torch.float32)
    sizes = torch.tensor([64] * (blocks - 1) + [5])
    forced = torch.rand(3, blocks, generator=torch.Generator().manual_seed(0)) < forced_share if forced_share else None
    found, counts, tail = ops.block_select(pooled_q, pooled_k, sizes, keep, forced, **BACKEND)
    expected, expected_counts, expected_tail = reference.block_select(pooled_q, pooled_k, sizes, keep, forced)
    longest = expected.shape[-1]
    assert torch.equal(found[..., :longest], expected) and (found[..., longest:] == blocks).all()
    assert torch.equal(counts, expected_counts)
    torch.testing.assert_close(tail, expected_tail, atol=1e-5, rtol=1e-5)


def test_selection_of_equal_and_infinite_scores_keeps_as_many_as_asked():
    """Padding must never be picked: with equal scores, or scores of -inf, every list entry still names a real block."""
    pooled_q = torch.ones(1, 1, 3, 16)
    pooled_k = torch.ones(1, 1, 40, 16)
    pooled_k[:, :, 5:20] = -torch.inf
    indices, counts, _ = ops.block_select(pooled_q, pooled_k, torch.full((40,), 64), 30, **BACKEND)
    assert (counts == 30).all() and (indices.diff(dim=-1) > 0).all() and 0 <= indices.min() and indices.max() < 40
    assert set(range(5)) | set(range(20, 40)) <= set(indices[0, 0, 0].tolist())


def test_forced_blocks_come_in_addition():
    pooled_q, pooled_k = tensors((1, 1, 2, 16), (1, 1, 8, 16), dtype=torch.float32)
    free, _, _ = ops.block_select(pooled_q, pooled_k, torch.full((8,), 64), 3, **BACKEND)
    forced = torch.zeros(2, 8, dtype=torch.bool)
    forced[:, free[0, 0, 0, 0]] = True      # the best block of row 0 is forced: three others are kept beside it
    _, counts, _ = ops.block_select(pooled_q, pooled_k, torch.full((8,), 64), 3, forced, **BACKEND)
    assert (counts == 4).all()


@pytest.mark.parametrize("tokens, force", [(64, False), (130, True)])
def test_search_by_mass_matches_its_definition(tokens, force):
    q, k = tensors((1, 2, tokens, 32), (1, 2, tokens + 90, 32), dtype=torch.float32, scale=1.5)
    q_blocks, k_blocks = table(tokens, shuffled=True), table(tokens + 90, shuffled=True)
    # Half a unit off, as an LSE kept from an earlier step is: the recall is still a share of what is found.
    lse = reference.dense_attention(q, k, k)[1] + 0.5
    forced = torch.eye(q_blocks.shape[0], k_blocks.shape[0], dtype=torch.bool) if force else None
    case = (q, k, lse, q_blocks, k_blocks, [1, 2, 99], forced)
    bits, recall = ops.block_mass(*case, **BACKEND)
    expected_bits, expected_recall = reference.block_mass(*wide(case))
    assert torch.equal(bits, expected_bits)
    torch.testing.assert_close(recall.double(), expected_recall, atol=1e-5, rtol=0)
    assert (recall[..., 2] - 1).abs().max() < 1e-5


@pytest.mark.parametrize("blocks", [5, 32, 33, 1100])
def test_bits_and_lists_say_the_same(blocks):
    kept = torch.rand(2, 3, 4, blocks, generator=torch.Generator().manual_seed(0)) < 0.3
    kept[0, 0, 0], kept[0, 0, 1] = False, True
    bits = reference.pack_bits(kept)
    assert torch.equal(load(".kernels.pytorch.routing").pack_bits(kept), bits)
    for found, expected in zip(
        ops.lists_from_bits(bits, blocks, blocks, **BACKEND), reference.lists_from_bits(bits, blocks, blocks)
    ):
        assert torch.equal(found, expected)


# --- background

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [1, 3])
def test_first_order_state_matches_its_definition(dtype, inner):
    k, v = tensors(*[(2, 2, 170, 40)] * 2, dtype=dtype)
    blocks = table(170, shuffled=True)
    features = torch.stack([torch.randperm(40)[:10] for _ in range(4)]).view(2, 2, 10)
    for some in (None, features):
        found = ops.block_pool_state(k, v, blocks, inner, some, **BACKEND)
        expected = reference.block_pool_state(k.double(), v.double(), blocks, inner, some)
        for a, b in zip(found, expected):
            same(a, b, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["softmax", "elu", "relu"])
@pytest.mark.parametrize("rank, full", [(16, True), pytest.param(24, False, marks=pytest.mark.slow), (0, False)])
def test_low_rank_state_matches_its_definition(dtype, act, rank, full):
    k, v = tensors(*[(1, 2, 170, 48)] * 2, dtype=dtype)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    fmap = feature_map(act, 2, 170, 48, rank, sums, full) if rank else background.FeatureMap(act)
    for a, b in zip(ops.low_rank_state(k, v, fmap, **BACKEND), reference.low_rank_state(*wide((k, v, fmap)))):
        same(a, b, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank, low_rank, x", [
    (None, None, False), (10, None, True), (None, "softmax", False), (None, "elu", True),
])
def test_sparse_and_background_in_one_match_their_definition(dtype, rank, low_rank, x):
    case = mixing_case(dtype, rank=rank, low_rank=low_rank, x=x)
    found = ops.block_sparse_mixed(*case, **BACKEND)
    assert found.dtype == dtype
    same(found, reference.block_sparse_mixed(*wide(case)), dtype)
    sparse, lse = ops.block_sparse_attention(*case[:7], **BACKEND)
    untouched = reference.token_to_block(case[3]) == 1
    assert torch.equal(found[0, 0, untouched], sparse[0, 0, untouched])
    q, _, _, q_blocks, _, _, _, *mixing = case
    same(ops.mix_background(q, sparse, lse, mixing[0], q_blocks, *mixing[1:]), found.double(), dtype)


def test_background_cannot_overflow_half_precision():
    case = mixing_case(torch.float16, scale=64.0, low_rank="softmax", sharpness=1 / 64)
    # A state far beyond float16 by itself, of which a gate of 6e-6 lets through what float16 can hold.
    small = background.Gate(torch.zeros(1, 2), torch.full((1, 2), -12.0))
    for size, gate in ((1.0, case[8]), (1e4, small)):
        first = case[9]._replace(cov=size * case[9].cov)
        assert first.cov.abs().max() > 1e3 * size
        whole = (*case[:8], gate, first, case[10])
        expected = reference.block_sparse_mixed(*wide(whole))
        found = ops.block_sparse_mixed(*whole, **BACKEND)
        inside = expected.abs() < 6e4
        assert inside.float().mean() > 0.9
        same(found[inside], expected[inside], torch.float16, 6e-3)


@pytest.mark.parametrize("low_rank", [None, "softmax"])
def test_gradients_of_the_mixed_call_match_autograd_of_the_definition(low_rank):
    case = mixing_case(torch.float32, low_rank=low_rank)
    exact = wide(case)
    results = []
    for module, (q, k, v, *lists, tail, gate, first, branch), options in ((ops, case, BACKEND), (reference, exact, {})):
        leaves = (q, k, v, tail, gate.c, gate.b, first.v_mean, first.cov, first.beta)
        leaves = [x.clone().requires_grad_() for x in leaves]
        q, k, v, tail, c, b, mean, cov, beta = leaves
        if branch is not None:
            a, state, eta = (x.clone().requires_grad_() for x in (branch.map.a, branch.linear.state, branch.eta))
            leaves += [a, state, eta]
            branch = branch._replace(
                map=branch.map._replace(a=a), linear=branch.linear._replace(state=state), eta=eta
            )
        gate, first = gate._replace(c=c, b=b), first._replace(v_mean=mean, cov=cov, beta=beta)
        out = module.block_sparse_mixed(q, k, v, *lists, tail, gate, first, branch, **options)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append(torch.autograd.grad((out * weights).sum(), leaves))
    for found, expected in zip(*results):
        there = torch.isfinite(expected)            # the block that dropped nothing has no gradient to its tail
        same(found[there], expected[there], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["softmax", "elu"])
def test_linear_branch_with_a_folded_projection_matches_its_definition(dtype, act):
    """SLA: sum and product by hand, from the formula with its projection outside."""
    (q, k, v, *lists), _ = sparse_case(170, dtype, 48)
    weight, bias = (x.to(torch.promote_types(dtype, torch.float32)) for x in tensors((48, 48), (48,), seed=9))
    fmap = background.FeatureMap(act)
    state, norm = ops.low_rank_state(k, v, fmap, **BACKEND)
    linear = background.LinearState(state @ weight.T, norm, 1e-5 / 170)
    found = ops.block_sparse_linear(q, k, v, *lists, fmap, linear, bias, **BACKEND)

    q, k, v = wide((q, k, v))
    phi = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: torch.nn.functional.elu(x) + 1}[act]
    read = phi(q) @ (phi(k).mT @ v) / (1e-5 + (phi(q) * phi(k).sum(dim=2, keepdim=True)).sum(dim=-1, keepdim=True))
    sparse, _ = reference.block_sparse_attention(q, k, v, *lists)
    same(found, sparse + read @ weight.double().T + bias.double(), dtype)
    same(found, reference.block_sparse_linear(q, k, v, *lists, fmap, wide(linear), bias.double()), dtype)
