"""The operations as custom ops: their schemas, fakes and gradients hold, and torch.compile takes them whole."""

import importlib.util
import sys

import pytest
import torch
from torch.library import opcheck

import pack_loader
from pack_loader import load
from support.data.blocks import feature_map, mixing_case, reference, selected, table, tensors

ops, registered, background = (load(f".kernels.{name}") for name in ("ops", "registered", "background"))
TOKENS, WIDTH = 150, 32


def arguments():
    """Operation -> arguments as its schema wants them."""
    case = mixing_case(torch.float32, tokens=TOKENS, width=WIDTH, low_rank="softmax", x=True)
    q, k, v, q_blocks, k_blocks, indices, counts, tail, gate, first, branch = case
    sparse = (q, k, v, q_blocks, k_blocks, indices, counts)
    pooled, lse = reference.block_pool(k, k_blocks), reference.dense_attention(q, k, v)[1]
    out, sparse_lse = reference.block_sparse_attention(*sparse)
    features = torch.arange(10).expand(1, 2, 10).contiguous()
    sizes = reference.block_sizes(k_blocks)
    forced = torch.eye(q_blocks.shape[0], dtype=torch.bool)
    bits = torch.ones(1, 2, 3, 1, dtype=torch.int32)
    fmap = feature_map("elu", 2, TOKENS, WIDTH, 24, torch.float32)
    linear = background.LinearState(*reference.low_rank_state(k, v, background.FeatureMap("softmax")))
    last = "pytorch"
    return {
        "block_pool": (q, q_blocks, last), "block_pool_state": (k, v, k_blocks, 2, features, last),
        "low_rank_state": (k, v, *fmap, last), "block_select": (pooled, pooled, sizes, 1, forced, 0.2, 1, last),
        "block_mass": (q, k, lse, q_blocks, k_blocks, [1, 2], forced, 0.2, last),
        "lists_from_bits": (bits, 3, 2, last), "dense_attention": (q, k, v, 0.2, last),
        "block_sparse_attention": (*sparse, pooled, pooled, 0.2, last),
        "block_sparse_attention_backward": (
            out, sparse_lse, q, k, v, out, sparse_lse, *sparse[3:], None, None, 0.2, last
        ),
        "block_sparse_mixed": (
            *sparse, tail, *gate, *first, *branch.linear, branch.eta, *branch.map, 0.2, last
        ),
        "block_sparse_linear": (*sparse, *linear, *background.FeatureMap("softmax"), torch.ones(WIDTH), 0.2, last),
    }


OPERATIONS = arguments()


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_keeps_the_rules_of_custom_ops(name):
    opcheck(getattr(registered, name), OPERATIONS[name])


@pytest.mark.parametrize("tail", [False, True])
def test_gradients_keep_the_rules_of_custom_ops(tail):
    *sparse, pooled, _, scale, last = OPERATIONS["block_sparse_attention"]
    q, k, v = (x.clone().requires_grad_() for x in sparse[:3])
    pooled = pooled.clone().requires_grad_() if tail else None
    opcheck(registered.block_sparse_attention, (q, k, v, *sparse[3:], pooled, pooled, scale, last))


def test_every_operation_is_tried():
    defined = {name for name, value in vars(registered).items() if hasattr(value, "_opoverload") and name[0] != "_"}
    assert defined == set(OPERATIONS)


@pytest.mark.parametrize("name", ["mixed", "linear", "attention"])
def test_compiled_whole_and_equal_at_two_lengths(name):
    fmap = background.FeatureMap("softmax")

    def attend(q, k, v, blocks, indices, counts, tail, gate, first):
        if name == "attention":
            return ops.block_sparse_attention(q, k, v, blocks, blocks, indices, counts)[0]
        if name == "mixed":
            return ops.block_sparse_mixed(q, k, v, blocks, blocks, indices, counts, tail, gate, first)
        linear = background.LinearState(*ops.low_rank_state(k, v, fmap))
        return ops.block_sparse_linear(q, k, v, blocks, blocks, indices, counts, fmap, linear, q.new_zeros(q.shape[3]))

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for tokens in (150, 200):
        q, k, v, blocks, _, *rest = mixing_case(torch.float32, tokens=tokens, width=WIDTH)[:10]
        assert torch.equal(compiled(q, k, v, blocks, *rest), attend(q, k, v, blocks, *rest))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gradients_are_the_same(backend):
    q, k, v = tensors(*[(1, 2, TOKENS, WIDTH)] * 3, dtype=torch.float32)
    blocks = table(TOKENS)
    indices, counts, _ = selected(q, k, blocks, blocks, 2)

    def loss(q, k, v):
        out, lse = ops.block_sparse_attention(q, k, v, blocks, blocks, indices, counts)
        return out.square().sum() + lse.sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_meta_tensors_of_a_million_tokens_cost_nothing():
    q = torch.empty(1, 1_048_576, 40, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    blocks = torch.empty(16_384, 64, dtype=torch.int32, device="meta")
    pooled = ops.block_pool(q, blocks)
    indices, counts, tail = ops.block_select(pooled, pooled, torch.empty(16_384, device="meta"), 1_638, None)
    out, lse = ops.block_sparse_attention(q, q, q, blocks, blocks, indices, counts)
    assert indices.shape == (1, 40, 16_384, 1_638) and tail.shape == counts.shape == (1, 40, 16_384)
    assert out.shape == q.shape and out.stride() == q.stride() and lse.shape == (1, 40, 1_048_576)


def test_two_copies_of_the_pack_have_their_own_ops():
    """A folder installed twice: PyTorch frees an op that is defined again, and whoever still holds it crashes."""
    names = ["ropeslr_first_copy", "ropeslr_second_copy"]
    copies = []
    for name in names:
        spec = importlib.util.spec_from_file_location(
            name, pack_loader.ROOT / "__init__.py", submodule_search_locations=[str(pack_loader.ROOT)]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        copies.append(importlib.import_module(f"{name}.kernels.ops"))
    x, blocks = tensors((1, 2, 100, 16), dtype=torch.float32)[0], table(100)
    first, second, ours = (ops.block_pool(x, blocks) for ops in (*copies, load(".kernels.ops")))
    assert torch.equal(first, ours) and torch.equal(second, ours)
    assert len({importlib.import_module(f"{name}.kernels.registered").NAMESPACE for name in names}) == 2
    for name in [each for each in sys.modules if each.split(".")[0] in names]:
        del sys.modules[name]
