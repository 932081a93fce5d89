"""Attention in 8 bits: against its own definition, and how far that is from exact attention."""

import pytest
import torch

from pack_loader import load
from support import needs
from support.data.backend import BACKEND, HALF
from support.data.blocks import (
    blocks_of,
    mixing_case,
    packed,
    ragged,
    reference,
    sparse_case,
    tensors,
    types,
    wide,
)
from support.data.fields import relative_error

ops = load(".kernels.ops")
VALUES = (torch.int8, torch.float8_e4m3fn)
DTYPES = HALF if needs.INTERPRET else (torch.float32, *HALF)


def quantized(k, v, blocks, dtype=torch.int8, **backend):
    """In 8 bits by the operation, and by its definition."""
    means = [x.double().mean(dim=2).float() for x in (k, v)]
    found = ops.quantize_kv(k, v, blocks, *means, dtype=dtype, **(backend or BACKEND))
    return found, reference.quantize_kv(*wide([k, v]), blocks, *wide(means), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("size", [64, 32, 16])
def test_keys_and_values_are_rounded_as_their_definition_says(size, values, dtype):
    k, v = tensors(*[(1, 2, 150, 80)] * 2, dtype=dtype)
    k += 3 * torch.arange(80, dtype=dtype)  # means that would leave few bits
    v -= 5
    found, expected = quantized(k, v, blocks_of(150, size, shuffled=True), values)
    for name, here, there in zip(types.EightBit._fields, found, expected):
        if name.endswith("mean"):
            continue
        steps = 1 if here.dtype == torch.int8 else 0.07 * there.double().abs().max()
        apart = (here.double() - there.double()).abs()
        limit = steps if name in ("k", "v") else 1e-2 * there.abs().max()
        assert here.shape == there.shape and apart.max() <= limit, name
        assert (apart > 1e-6 * there.double().abs().max()).double().mean() < 0.05, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("size", [64, 16])
@pytest.mark.parametrize("query_block", [64, 128])
def test_attention_matches_its_definition(size, query_block, values, dtype):
    case, _ = sparse_case(200, dtype, 80, key_block=size, query_block=query_block)
    q, k, v, mask = case
    small, exact_small = quantized(k, v, mask.kv_blocks, values)
    out, lse = ops.block_sparse_attention(*case, eight_bit=small, **BACKEND)
    expected, expected_lse = reference.eight_bit_attention(q.double(), mask, types.EightBit(*small))
    assert out.dtype == dtype and relative_error(out, expected) < 2e-3 + (dtype in HALF) * 4e-3
    apart = (lse - expected_lse).abs()  # a tie may be rounded either way
    assert apart.max() < 5e-3 and apart.mean() < 1e-4
    # And what rounding costs, on random data: one to four per cent.
    exact, exact_lse = reference.block_sparse_attention(*wide(case))
    assert 1e-3 < relative_error(out, exact) < 0.06
    assert (lse - exact_lse).abs().max() < 0.1
    again, _ = reference.eight_bit_attention(q.double(), mask, exact_small)
    assert relative_error(out, again) < 2e-2


@pytest.mark.parametrize("size", [64, 16])
def test_rows_may_keep_from_nothing_to_everything(size):
    q, k, v = tensors(*[(1, 3, 330, 64)] * 3, dtype=torch.bfloat16)
    mask = ragged(3, blocks_of(330), blocks_of(330, size, shuffled=True))
    small, _ = quantized(k, v, mask.kv_blocks)
    expected, expected_lse = reference.eight_bit_attention(q.double(), mask, small)
    for own in (mask, packed(mask)):
        out, lse = ops.block_sparse_attention(q, k, v, own, eight_bit=small, **BACKEND)
        assert relative_error(out, expected) < 6e-3
        assert (out[:, :, :64] == 0).all() and (lse[:, :, :64] == -torch.inf).all()
        finite = expected_lse > -torch.inf
        assert (lse - expected_lse)[finite].abs().max() < 5e-3


@pytest.mark.parametrize("size", [64, 16])
def test_pooled_keys_continue_in_sixteen_bits(size):
    case, _ = sparse_case(200, torch.bfloat16, key_block=size)
    q, k, v, mask = case
    far = types.PooledKV(*(reference.block_pool(x.double(), mask.kv_blocks) for x in (k, v)))
    small, _ = quantized(k, v, mask.kv_blocks)
    out, lse = ops.block_sparse_attention(*case, far, eight_bit=small, **BACKEND)
    expected, expected_lse = reference.block_sparse_attention(*wide((*case, far)))
    assert relative_error(out, expected) < 0.03
    assert (lse - expected_lse).abs().max() < 0.03


@pytest.mark.parametrize("low_rank", [None, "softmax"])
@pytest.mark.parametrize("size", [64, 16])
def test_a_background_is_mixed_in(size, low_rank):
    case = mixing_case(torch.bfloat16, low_rank=low_rank, logits=True, key_block=size)
    small, _ = quantized(*case[1:3], case[3].kv_blocks)
    found = ops.block_sparse_mixed(*case, eight_bit=small, **BACKEND)
    expected = reference.block_sparse_mixed(*wide(case))
    assert 1e-4 < relative_error(found, expected) < 0.03


@pytest.mark.parametrize("size", [64, 16])
def test_all_keys(size):
    q, k, v = tensors(*[(1, 2, 200, 64)] * 3, dtype=torch.bfloat16)
    blocks = blocks_of(200, size, shuffled=True)
    small, _ = quantized(k, v, blocks)
    out, lse = ops.dense_attention(q[:, :, :70], k, v, blocks, eight_bit=small, **BACKEND)
    expected, expected_lse = reference.dense_attention(*wide((q[:, :, :70], k, v)))
    assert relative_error(out, expected) < 0.03 and (lse - expected_lse).abs().max() < 0.02


def test_one_large_channel_takes_the_bits_of_all_others():
    """What happens to large models' last layers, and why a layer has to be measured."""
    case, _ = sparse_case(200, torch.bfloat16)
    q, k, v, mask = case
    errors = []
    for size in (1.0, 100.0):
        k[..., 3] *= size
        q[..., 3] /= size
        small, _ = quantized(k, v, mask.kv_blocks)
        out, _ = ops.block_sparse_attention(*case, eight_bit=small, **BACKEND)
        assert torch.isfinite(out).all()
        errors.append(relative_error(out, reference.block_sparse_attention(*wide(case))[0]))
    assert errors[1] > 3 * errors[0]


def test_what_does_not_fit_is_refused():
    case, _ = sparse_case(200, torch.float32)
    q, k, v, mask = case
    means = k.mean(dim=2), v.mean(dim=2)
    small = ops.quantize_kv(k, v, mask.kv_blocks, *means)
    with pytest.raises(ValueError, match=r"eight_bit\.k must have the shape"):
        ops.block_sparse_attention(q, k, v, ragged(2, mask.q_blocks, blocks_of(200, 16)),
                                   eight_bit=small)  # fmt: skip
    with pytest.raises(ValueError, match="eight_bit needs the kv_blocks"):
        ops.dense_attention(q, k, v, eight_bit=small)
    with pytest.raises(ValueError, match="dtype must be one of"):
        ops.quantize_kv(k, v, mask.kv_blocks, *means, dtype=torch.uint8)
    with pytest.raises(ValueError, match="multiple of 16"):
        ops.quantize_kv(k, v, blocks_of(200, 24), *means)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", range(3))
def test_what_is_not_finite_shows(where, bad):
    """Integers hold no NaN, and a maximum may drop it."""
    case, _ = sparse_case(130, torch.bfloat16, topk=3)
    q, k, v, mask = case
    (q, k, v)[where][0, 0, 5, 3] = bad
    small, _ = quantized(k, v, mask.kv_blocks) if where == 0 else (None, None)
    if small is None:
        means = [x.float().mean(dim=2) for x in (k, v)]
        small = ops.quantize_kv(k, v, mask.kv_blocks, *means, **BACKEND)
    out, _ = ops.block_sparse_attention(*case, eight_bit=small, **BACKEND)
    assert not torch.isfinite(out).all()
