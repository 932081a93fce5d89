"""The strict interpreter, and what only it can see: memory traffic, addresses beyond 32 bits."""

import re

import pytest
import torch
import triton
import triton.language as tl

from pack_loader import load
from support.data.blocks import (
    blocks_of,
    layout_of,
    mixing_case,
    reference,
    selected,
    tensors,
    types,
    wide,
)
from support.data.fields import relative_error
from support.oracle.interpreter import traffic

backend = load(".kernels.triton.backend")


@triton.jit
def _copy(x_ptr, y_ptr, size, shift, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + at, mask=at < (size + shift if FAULT == 1 else size), other=0.0)
    tl.store(y_ptr + (at % BLOCK if FAULT == 2 else at), value, mask=at < size)
    if FAULT == 3:
        tl.store(y_ptr + at, tl.load(y_ptr + (at + BLOCK) % size, mask=at < size), mask=at < size)
    if FAULT == 4:
        tl.store(y_ptr + at, (at + 2147483600).to(tl.float32), mask=at < size)


@pytest.mark.parametrize(
    "fault, says",
    [
        (1, "load: .* outside of every tensor"),
        (2, "store to one address"),
        (3, "loads what program"),
        (4, "overflow"),
    ],
)
def test_planted_faults_are_caught(fault, says):
    x, y = torch.zeros(100), torch.zeros(100)
    _copy[(4,)](x, y, 100, 0, FAULT=0, BLOCK=32)
    with pytest.raises(Exception) as caught:
        _copy[(4,)](x, y, 100, 7, FAULT=fault, BLOCK=32)
    said = ""
    error = caught.value
    while error is not None:
        said, error = f"{said} {error!r}", error.__cause__
    assert re.search(says, said), said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_as_a_gpu_would(dtype):
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    _, lse = backend.dense_attention(*[x[None, None]] * 3, None, 0.1)
    expected = (x.double() @ x.double().T * 0.1).logsumexp(-1)
    assert (lse[0, 0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("query_block", [64, 128])
@pytest.mark.parametrize("key_block", [64, 16])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("architecture", ["89", "90"])
def test_every_form_of_the_forward(architecture, head_dim, key_block, query_block, monkeypatch):
    """As on a GPU of that kind: values in halves or whole, q kept or read anew."""
    monkeypatch.setattr(load(".kernels.triton.launch"), "architecture", lambda: architecture)
    sizes = dict(tokens=200, head_dim=head_dim, key_block=key_block, query_block=query_block)
    case = mixing_case(torch.bfloat16, low_rank="softmax", logits=True, **sizes)
    q, k, v, mask, background = case
    scale = head_dim**-0.5
    found = backend.block_sparse_mixed(*case, scale)
    assert relative_error(found, reference.block_sparse_mixed(*wide(case))) < 1e-2
    plain = background._replace(low_rank=None)
    found = backend.block_sparse_mixed(q, k, v, mask, plain, scale)
    expected = reference.block_sparse_mixed(*wide((q, k, v, mask, plain)))
    assert relative_error(found, expected) < 1e-2
    far = types.PooledKV(*(reference.block_pool(x.double(), mask.kv_blocks) for x in (k, v)))
    for pooled in (None, far):
        found, lse = backend.block_sparse_attention(q, k, v, mask, pooled, scale)
        expected, expected_lse = reference.block_sparse_attention(*wide((q, k, v, mask, pooled)))
        assert relative_error(found, expected) < 1e-2
        assert (lse - expected_lse).abs().max() < 1e-2

    k = k + 1.0  # in 8 bits the mean of the keys has a place of its own
    means = (x.float().mean(dim=2) for x in (k, v))
    small = backend.quantize_kv(k, v, mask.kv_blocks, *means, torch.int8)
    found = backend.block_sparse_mixed(q, k, v, mask, plain, scale, eight_bit=small)
    expected = reference.block_sparse_mixed(*wide((q, k, v, mask, plain)))
    assert relative_error(found, expected) < 6e-2
    _, lse = backend.block_sparse_attention(q, k, v, mask, None, scale, eight_bit=small)
    _, expected_lse = reference.block_sparse_attention(*wide((q, k, v, mask, None)))
    assert (lse - expected_lse).abs().max() < 0.1


@pytest.mark.parametrize("key_block", [64, 16])
@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("rows", [7, 64, 130])
def test_few_queries_are_split_over_the_keys(rows, parts, key_block, monkeypatch):
    """As on a GPU with more multiprocessors than there are blocks of queries."""
    split = load(".kernels.triton.split")
    programs = 2 * 2 * -(-rows // 64)
    monkeypatch.setattr(split, "FEWEST_KEYS", 64)
    monkeypatch.setattr(split, "PROGRAMS", 1)
    q, k, v = tensors((2, 2, rows, 64), *[(2, 2, 330, 64)] * 2, dtype=torch.bfloat16)
    listed = torch.cat((torch.arange(0, 90), torch.arange(110, 330)))
    k[:, :, 90:110], v[:, :, 90:110] = torch.nan, torch.nan
    seen = types.TokenBlocks.cut(listed, key_block, num_tokens=330)
    seen_k, seen_v = k[:, :, listed].contiguous(), v[:, :, listed].contiguous()
    blocks = blocks_of(310, key_block)
    means = (x.float().mean(dim=2) for x in (seen_k, seen_v))
    small = backend.quantize_kv(seen_k, seen_v, blocks, *means, torch.int8)
    expected, expected_lse = reference.dense_attention(*wide((q, seen_k, seen_v)))
    for given, bound in (
        ((k, v, seen, 0.125), 1e-2),
        ((seen_k, seen_v, None, 0.125), 1e-2),
        ((seen_k, seen_v, blocks, 0.125, None, small), 4e-2),
    ):
        results = []
        for there in (1, programs * parts):
            monkeypatch.setattr(split, "multiprocessors", lambda device, there=there: there)
            results.append(backend.dense_attention(q, *given))
            out, lse = results[-1]
            assert out.shape == q.shape and relative_error(out, expected) < bound
            assert (lse - expected_lse).abs().max() < bound
        whole, parted = results
        assert not torch.equal(whole[1], parted[1])  # it has really been split
        assert relative_error(parted[0], whole[0]) < bound


def test_split_where_some_share_sees_nothing(monkeypatch):
    """NaN shows, and a share without any key adds nothing."""
    split = load(".kernels.triton.split")
    out = torch.randn(1, 1, 6, 4)
    lse = torch.tensor([0.5, -torch.inf, 0.1, -torch.inf, -torch.inf, torch.nan]).view(1, 1, 6)
    found, total = split.merged(out, lse, 2)
    assert torch.allclose(found[0, 0, 0], out[0, 0, 0]) and torch.equal(
        total[0, 0, 0], lse[0, 0, 0]
    )
    assert (found[0, 0, 1] == 0).all() and total[0, 0, 1] == -torch.inf
    assert found[0, 0, 2].isnan().all()


def test_rows_may_lie_further_apart_than_32_bits_reach():
    """Rows of a million tokens of 40 heads are 5e9 elements apart.

    2^24 here, memory never touched.
    """
    rows, apart = 130, 1 << 24
    memory = torch.empty(rows * apart, dtype=torch.float16)
    q, k, v = tensors(*[(1, 1, rows, 32)] * 3, dtype=torch.float16)
    far = []
    for i, x in enumerate((q, k, v)):
        view = memory.as_strided((1, 1, rows, 32), (rows * apart, 0, apart, 1), 32 * i)
        view.copy_(x)
        far.append(view)
    blocks = blocks_of(rows)
    mask, _ = selected(q, k, blocks, blocks, 2)
    found, _ = backend.block_sparse_attention(*far, mask, None, 32**-0.5)
    expected, _ = reference.block_sparse_attention(*wide((q, k, v)), mask)
    assert relative_error(found, expected) < 2e-3
    assert (
        relative_error(backend.block_pool(far[0], blocks), reference.block_pool(q.double(), blocks))
        < 1e-5
    )


def test_bytes_that_the_default_method_moves():
    """Each pass reads and writes the rows of q, k, v, out that attention.py's table lists."""
    q, k, v, mask, background = mixing_case(torch.bfloat16, tokens=256, head_dim=64)
    tokens, heads, blocks = 256, 2, mask.q_blocks

    def rows(call, *named):
        with traffic() as seen:
            out = call()
        size = heads * tokens * 64
        found = [seen.loaded(x) / size for x in named]
        return out, found, seen

    expected = {name: list(read) for name, (read, _) in load(".benchmarks.traffic").ROWS.items()}
    _, read, _ = rows(lambda: backend.block_pool(q, blocks), q, k, v)
    assert read == expected["block_pool"]
    _, read, _ = rows(
        lambda: backend.block_pool_state(k, v, layout_of(blocks, blocks), None), q, k, v
    )
    assert read == expected["block_pool_state"]
    matrix = torch.zeros(1, heads, 64, 64)
    mapped, read, seen = rows(lambda: backend.add_mapped(v, matrix), q, k, v)
    assert read == expected["add_mapped"]
    assert seen.stored(mapped) == mapped.numel()
    # K, v once per query block that keeps them.
    times_kept = mask.kv_num_blocks.float().mean().item()
    mixed = (q, k, v, mask, background, 0.125)
    out, (q_read, *kv_read), seen = rows(lambda: backend.block_sparse_mixed(*mixed), q, k, v)
    assert [q_read, *(x / times_kept for x in kv_read)] == expected["block_sparse_mixed"]
    assert seen.stored(out) == out.numel()
