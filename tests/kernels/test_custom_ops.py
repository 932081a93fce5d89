"""The operations as custom ops: schemas, fakes, gradients; torch.compile takes them whole."""

import importlib
import importlib.util
import pkgutil
import sys

import pytest
import torch
from torch.library import opcheck

import pack_loader
from pack_loader import load
from support.data.blocks import (
    blocks_of,
    feature_map,
    layout_of,
    mixing_case,
    reference,
    selected,
    tensors,
    types,
)

ops, register = load(".kernels.ops"), load(".kernels.ops.register")
MODULES = [load(f".kernels.ops.{each.name}") for each in pkgutil.iter_modules(ops.__path__)]
DEFINED = {
    name.removesuffix("_op"): value
    for module in MODULES
    for name, value in vars(module).items()
    if name.endswith("_op") and hasattr(value, "_opoverload")
}
TOKENS, HEAD_DIM = 150, 32


def arguments():
    """Operation -> arguments as its schema wants them."""
    case = mixing_case(
        torch.float32, tokens=TOKENS, head_dim=HEAD_DIM, low_rank="softmax", logits=True
    )
    q, k, v, mask, background = case
    layout = layout_of(
        mask.q_blocks, mask.kv_blocks, torch.eye(mask.q_blocks.num_blocks, dtype=torch.bool)
    )
    pieces = load(".kernels.ops.selection")._pieces(layout)
    parts = load(".kernels.ops.fused")._background_parts(background)
    tokens, listed = register.mask_parts(mask)
    pooled, lse = reference.block_pool(k, mask.kv_blocks), reference.dense_attention(q, k, v)[1]
    out, sparse_lse = reference.block_sparse_attention(q, k, v, mask)
    channel_ids = torch.arange(10).expand(1, 2, 10).contiguous()
    bits = torch.ones(1, 2, 3, 1, dtype=torch.int32)
    act, *fmap = feature_map("elu", 2, TOKENS, HEAD_DIM, 24, torch.float32)
    linear = [None] * 5 + [*reference.low_rank_state(k, v, types.FeatureMap("softmax"))]
    last = "pytorch"
    own = mask.q_blocks.num_listed
    means = k.mean(dim=2), v.mean(dim=2)
    small = list(ops.quantize_kv(k, v, mask.kv_blocks, *means))
    return {
        "block_pool": (q, tokens[0], TOKENS, last),
        "block_pool_state": (k, v, tokens[1], [listed, own], channel_ids, last),
        "low_rank_state": (k, v, act, fmap, last),
        "block_select": (pooled, pooled, *pieces, [1], layout.widths([1]), 0.2, last),
        "block_mass": (q, k, lse, *pieces, [1, 2], 0.2, last),
        "lists_from_bits": (bits, 3, 2, last),
        "quantize_kv": (k, v, tokens[1], listed, *means, torch.int8, last),
        "dense_attention": (q, k, v, tokens[1], listed, small, 0.2, last),
        "block_sparse_attention": (q, k, v, tokens, listed, [pooled, pooled], [], 0.2, last),
        "block_sparse_attention_backward": (
            out, sparse_lse, [q, k, v, out, sparse_lse], tokens, listed, [], 0.2, last
        ),
        "block_sparse_mixed": (q, k, v, tokens, listed, *parts, small, 0.2, last),
        "block_sparse_linear": (
            q, k, v, tokens, listed, [*linear, torch.ones(HEAD_DIM)], 1e-5, "softmax", [], 0.2, last
        ),
    }  # fmt: skip


OPERATIONS = arguments()


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_keeps_the_rules_of_custom_ops(name):
    opcheck(DEFINED[name], OPERATIONS[name])


@pytest.mark.parametrize("pooled", [False, True])
def test_gradients_keep_the_rules_of_custom_ops(pooled):
    q, k, v, mask, listed, far, small, scale, last = OPERATIONS["block_sparse_attention"]
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    far = [x.clone().requires_grad_() for x in far] if pooled else []
    opcheck(DEFINED["block_sparse_attention"], (q, k, v, mask, listed, far, small, scale, last))


def test_packed_lists_keep_the_rules_of_custom_ops():
    pooled_q, pooled_k, *pieces, _, _, scale, last = OPERATIONS["block_select"]
    layout = load(".kernels.ops.selection")._layout_of(*pieces)
    topk = [0, 2]
    case = (pooled_q, pooled_k, *pieces, topk, layout.widths(topk), scale, last)
    opcheck(DEFINED["block_select"], case)
    q, k, v, _, listed, *_, scale, last = OPERATIONS["block_sparse_attention"]
    mask, _ = ops.block_select(pooled_q, pooled_k, layout, topk)
    q = q.clone().requires_grad_()
    opcheck(
        DEFINED["block_sparse_attention"],
        (q, k, v, register.mask_parts(mask)[0], listed, [], [], scale, last),
    )


def test_every_operation_is_tried():
    assert set(DEFINED) == set(OPERATIONS)


@pytest.mark.parametrize("name", ["mixed", "linear", "attention", "whole"])
def test_compiled_whole_and_equal_at_two_lengths(name):
    fmap = types.FeatureMap("softmax")

    def attend(q, k, v, mask, background):
        if name == "attention":
            return ops.block_sparse_attention(q, k, v, mask)[0]
        if name == "mixed":
            return ops.block_sparse_mixed(q, k, v, mask, background)
        if name == "linear":
            state = types.LinearState(*ops.low_rank_state(k, v, fmap))
            branch = types.LinearBranch(fmap, state, q.new_zeros(q.shape[3]))
            return ops.block_sparse_linear(q, k, v, mask, branch)
        layout = types.BlockLayout(mask.q_blocks, mask.kv_blocks)
        pooled_q = ops.block_pool(q, mask.q_blocks)
        pooled_k, *_ = ops.block_pool_state(k, v, layout)
        chosen, _ = ops.block_select(pooled_q, pooled_k, layout, 2)
        pooled = types.PooledKV(pooled_k, ops.block_pool(v, mask.kv_blocks))
        _, lse = ops.dense_attention(q, k, v, mask.kv_blocks)
        bits, _ = ops.block_mass(q, k, lse, layout, [2])
        found = ops.mask_from_bits(bits[:, :, 0], layout, 2)
        near = ops.block_sparse_attention(q, k, v, found)[0]
        return near + ops.block_sparse_attention(q, k, v, chosen, pooled)[0]

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for tokens in (150, 200):
        case = mixing_case(torch.float32, tokens=tokens, head_dim=HEAD_DIM)
        assert torch.equal(compiled(*case), attend(*case))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gradients_are_the_same(backend):
    q, k, v = tensors(*[(1, 2, TOKENS, HEAD_DIM)] * 3, dtype=torch.float32)
    blocks = blocks_of(TOKENS)
    mask, _ = selected(q, k, blocks, blocks, 2)

    def loss(q, k, v):
        out, lse = ops.block_sparse_attention(q, k, v, mask)
        return out.square().sum() + lse.sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_meta_tensors_of_a_million_tokens_cost_nothing():
    q = torch.empty(1, 1_048_576, 40, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    tokens = torch.empty(16_384, 64, dtype=torch.int32, device="meta")
    blocks = types.TokenBlocks(tokens, 1_048_576, 1_048_576)
    pooled = DEFINED["block_pool"](q, tokens, 1_048_576, "auto")
    assert pooled.shape == (1, 40, 16_384, 128)
    lists = torch.empty(1, 40, 16_384, 1_638, dtype=torch.int32, device="meta")
    counts = torch.empty(1, 40, 16_384, dtype=torch.int32, device="meta")
    mask = types.BlockMask(blocks, blocks, lists, counts)
    pieces = load(".kernels.ops.selection")._pieces(types.BlockLayout(blocks, blocks))
    indices, found, dropped = DEFINED["block_select"](
        pooled, pooled, *pieces, [1_638], [1_638], 0.1, "auto"
    )
    assert indices.shape == lists.shape and dropped.shape == found.shape == counts.shape
    out, lse = DEFINED["block_sparse_attention"](
        q, q, q, *register.mask_parts(mask), [], [], 0.1, "auto"
    )
    assert out.shape == q.shape and out.stride() == q.stride()
    assert lse.shape == (1, 40, 1_048_576)


def test_two_copies_of_the_pack_have_their_own_ops():
    """A folder installed twice: PyTorch frees an op that is defined again; who holds it crashes."""
    names = ["ropeslr_first_copy", "ropeslr_second_copy"]
    copies = []
    for name in names:
        spec = importlib.util.spec_from_file_location(
            name,
            pack_loader.ROOT / "__init__.py",
            submodule_search_locations=[str(pack_loader.ROOT)],
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        copies.append(importlib.import_module(f"{name}.kernels.ops.pooling"))
    x, blocks = tensors((1, 2, 100, 16), dtype=torch.float32)[0], blocks_of(100)
    first, second, ours = (
        module.block_pool_op(x, blocks.tokens, 100, "auto")
        for module in (*copies, load(".kernels.ops.pooling"))
    )
    assert torch.equal(first, ours) and torch.equal(second, ours)
    spaces = {importlib.import_module(f"{name}.kernels.ops.register").NAMESPACE for name in names}
    assert len(spaces) == 2
    for name in [each for each in sys.modules if each.split(".")[0] in names]:
        del sys.modules[name]
