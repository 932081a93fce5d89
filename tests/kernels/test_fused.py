"""Kept blocks with a background or a linear branch, against the definition."""

import pytest
import torch

from pack_loader import load
from support.data.backend import BACKEND, DTYPES, same
from support.data.blocks import mixing_case, packed, reference, sparse_case, tensors, types, wide

ops = load(".kernels.ops")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank, low_rank, logits", [
    (None, None, False), (10, None, True), (None, "softmax", False), (None, "elu", True),
])  # fmt: skip
@pytest.mark.parametrize("key_block", [64, 16])
def test_sparse_and_background_in_one_match_their_definition(
    dtype, rank, low_rank, logits, key_block
):
    case = mixing_case(dtype, rank=rank, low_rank=low_rank, logits=logits, key_block=key_block)
    q, k, v, mask, background = case
    found = ops.block_sparse_mixed(*case, **BACKEND)
    assert found.dtype == dtype
    same(found, reference.block_sparse_mixed(*wide(case)), dtype)
    sparse, lse = ops.block_sparse_attention(q, k, v, mask, **BACKEND)
    untouched = mask.q_blocks.block_of_token == 1
    assert torch.equal(found[0, 0, untouched], sparse[0, 0, untouched])
    mixed = ops.mix_background(q, sparse, lse, mask.q_blocks, background)
    same(mixed, found.double(), dtype)
    part = torch.zeros(1, 200, 2, 48, dtype=dtype).transpose(1, 2)[:, :, 30:]
    ops.block_sparse_mixed(*case, out=part, **BACKEND)
    assert torch.equal(part, found)


@pytest.mark.parametrize("slope", [1.0, 0.0])
def test_what_keeps_nothing_is_the_background_alone(slope):
    """Whatever the gate's values: there is nothing else to mix it with."""
    q, k, v, mask, (gate, first, _) = mixing_case(torch.float32)
    kept = mask.to_dense()
    kept[:, 0] = False
    mask = packed(types.BlockMask.from_dense(mask.q_blocks, mask.kv_blocks, kept))
    gate = gate._replace(slope=torch.full_like(gate.slope, slope), bias=gate.bias - 3)
    case = (q, k, v, mask, types.Background(gate, first))
    found = ops.block_sparse_mixed(*case, **BACKEND)
    same(found, reference.block_sparse_mixed(*wide(case)), torch.float32)
    background = first.v_mean[:, :, None] + (q * first.channel_scale[:, :, None]) @ first.cov
    drops = mask.q_blocks.block_of_token != 1  # whose dropped_lse says that it dropped nothing
    torch.testing.assert_close(found[0, 0, drops], background[0, 0, drops])


def test_background_cannot_overflow_half_precision():
    *sparse, background = mixing_case(
        torch.float16, scale=64.0, low_rank="softmax", sharpness=1 / 64
    )
    gate, first, branch = background
    # A state far beyond float16 by itself, of which a gate of 6e-6 lets through what float16 holds.
    small = gate._replace(slope=torch.zeros(1, 2), bias=torch.full((1, 2), -12.0))
    for size, chosen in ((1.0, gate), (1e4, small)):
        large = first._replace(cov=size * first.cov)
        assert large.cov.abs().max() > 1e3 * size
        whole = (*sparse, types.Background(chosen, large, branch))
        expected = reference.block_sparse_mixed(*wide(whole))
        found = ops.block_sparse_mixed(*whole, **BACKEND)
        inside = expected.abs() < 6e4
        assert inside.float().mean() > 0.9
        same(found[inside], expected[inside], torch.float16, 6e-3)


@pytest.mark.parametrize("low_rank", [None, "softmax"])
def test_gradients_of_the_mixed_call_match_autograd_of_the_definition(low_rank):
    case = mixing_case(torch.float32, low_rank=low_rank)
    results = []
    for module, given, options in ((ops, case, BACKEND), (reference, wide(case), {})):
        q, k, v, mask, (gate, first, branch) = given
        leaves = [q, k, v, *gate[:3], *first[:3]]
        leaves = [x.clone().requires_grad_() for x in leaves]
        q, k, v = leaves[:3]
        gate, first = types.Gate(*leaves[3:6]), types.FirstOrder(*leaves[6:])
        if branch is not None:
            fmap, state, scale = branch
            own = [x.clone().requires_grad_() for x in (fmap.proj, state.kv_state, scale)]
            leaves += own
            fmap, state = fmap._replace(proj=own[0]), state._replace(kv_state=own[1])
            branch = types.LowRank(fmap, state, own[2])
        background = types.Background(gate, first, branch)
        out = module.block_sparse_mixed(q, k, v, mask, background, **options)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append(torch.autograd.grad((out * weights).sum(), leaves))
    for found, expected in zip(*results):
        finite = torch.isfinite(expected)  # a block that dropped nothing: no gradient to its LSE
        same(found[finite], expected[finite], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["softmax", "elu"])
def test_linear_branch_with_a_folded_projection_matches_its_definition(dtype, act):
    """SLA: sum and product by hand, from the formula with its projection outside."""
    (q, k, v, mask), _ = sparse_case(170, dtype, 48)
    sums = torch.promote_types(dtype, torch.float32)
    weight, bias = (x.to(sums) for x in tensors((48, 48), (48,), seed=9))
    fmap = types.FeatureMap(act)
    kv_state, normalizer = ops.low_rank_state(k, v, fmap, **BACKEND)
    state = types.LinearState(kv_state @ weight.T, normalizer, 1e-5 / 170)
    branch = types.LinearBranch(fmap, state, bias)
    found = ops.block_sparse_linear(q, k, v, mask, branch, **BACKEND)
    part = torch.zeros(1, 200, 2, 48, dtype=dtype).transpose(1, 2)[:, :, 30:]
    ops.block_sparse_linear(q, k, v, mask, branch, out=part, **BACKEND)
    assert torch.equal(part, found)

    q, k, v = wide((q, k, v))
    phi = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: torch.nn.functional.elu(x) + 1}[act]
    under = 1e-5 + (phi(q) * phi(k).sum(dim=2, keepdim=True)).sum(dim=-1, keepdim=True)
    read = phi(q) @ (phi(k).mT @ v) / under
    sparse, _ = reference.block_sparse_attention(q, k, v, mask)
    same(found, sparse + read @ weight.double().T + bias.double(), dtype)
    same(found, reference.block_sparse_linear(q, k, v, mask, wide(branch)), dtype)
