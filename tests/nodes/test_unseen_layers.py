"""Layers that never call the attention override: the cause, logged once, counted in every call."""

import pytest
import torch

import comfy_host
from comfy_host import module
from support.host.sampling import SLOT, dense_warnings, load_model, report, sample, sparse

reasons = module(".nodes.patching.dense_reason")


def skipping(model, layer=0):
    """A MODEL of which another node skips a block, as nodes that skip layers do it."""
    model = model.clone()
    model.set_model_patch_replace(
        lambda args, more: {"img": args["img"]}, "dit", "double_block", layer
    )
    return model


@pytest.mark.parametrize("strict", [False, True])
def test_a_skipped_block_is_no_fallback(strict, caplog):
    """It was left out on purpose: counted, not warned about, and nothing that strict refuses."""
    patched = sparse(skipping(load_model("tiny_wan21_t2v")), strict=strict)
    sample(patched)
    last = report(patched)
    assert last.sparse_calls == 3
    assert last.dense_calls == {reasons.SKIPPED.format(layers="1 of 2 layers"): 3}
    assert not dense_warnings(caplog)


def test_an_override_that_is_taken_inside_the_call_is_named():
    """By a wrapper that comes later than ours, into the options that the model sees."""
    from comfy.patcher_extension import WrappersMP

    def takes(executor, x, t, c, r, control, options, **kwargs):
        options[SLOT] = lambda func, *args, **kwargs: func(*args, **kwargs)
        return executor(x, t, c, r, control, options, **kwargs)

    patched = sparse(load_model("tiny_wan21_t2v"))
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "later", takes)
    sample(patched, steps=2)
    assert report(patched).dense_calls == {reasons.OVERWRITTEN.format(layers="2 of 2 layers"): 4}


def test_a_host_that_does_not_say_which_block_calls_is_served():
    """As models do in which ComfyUI writes no block_index: hooks tell the layer."""
    from comfy.patcher_extension import WrappersMP

    class NoIndex(dict):
        def __setitem__(self, key, value):
            if key != "block_index":
                super().__setitem__(key, value)

    patched = sparse(load_model("tiny_wan21_t2v"))

    def older_positional(executor, x, t, context, clip, time, options, **kwargs):
        return executor(x, t, context, clip, time, NoIndex(options), **kwargs)

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "older", older_positional)
    sample(patched, steps=2)
    assert report(patched).sparse_calls == 4 and not report(patched).dense_calls


def test_attention_that_no_self_attention_calls_is_named():
    """By a block that another node has written anew."""
    from comfy.ldm.modules.attention import optimized_attention

    model = load_model("tiny_wan21_t2v").clone()
    attention = model.model.diffusion_model.blocks[0].self_attn

    def own(args, more):
        x, options = args["img"], args["transformer_options"]
        q, k, v = attention.q(x), attention.k(x), attention.v(x)
        options = {key: value for key, value in options.items() if key != "block_index"}
        return {"img": x + optimized_attention(q, k, v, 2, transformer_options=options)}

    class Replaced(torch.nn.Module):
        def forward(self, x, context=None, transformer_options=None, **kwargs):
            return own({"img": x, "transformer_options": transformer_options}, {})["img"]

    patched = sparse(model)
    patched.add_object_patch("diffusion_model.blocks.0", Replaced())
    for _ in range(2):  # the second time the model is as the first left it
        sample(patched, steps=2)
        last = report(patched)
        assert last.sparse_calls == 2
        assert last.dense_calls == {reasons.REPLACED.format(layers="1 of 2 layers"): 2}
    assert sparse(patched) is not None  # nor does it stop the node
    sample(load_model("tiny_wan21_t2v"), steps=1)  # puts the module's own block back


def test_an_attention_module_that_another_node_has_put_there_is_sparse_from_the_first_run():
    """It is there when the model is loaded, which is after a run has begun."""
    import copy

    model = load_model("tiny_wan21_t2v").clone()
    twin = copy.deepcopy(model.model.diffusion_model.blocks[0].self_attn)
    model.add_object_patch("diffusion_model.blocks.0.self_attn", twin)
    patched = sparse(model)
    for _ in range(2):
        sample(patched, steps=2)
        assert report(patched).sparse_calls == 4 and not report(patched).dense_calls
    plain = sparse(load_model("tiny_wan21_t2v"))
    sample(plain, steps=2)
    assert report(plain).sparse_calls == 4 and not report(plain).dense_calls


def test_a_self_attention_that_attends_in_parts_has_a_reason():
    """Each head by itself, as a node does that saves memory: the first call alone is a layer's."""
    from comfy.ldm.modules.attention import optimized_attention

    model = load_model("tiny_wan21_t2v").clone()
    attention = model.model.diffusion_model.blocks[0].self_attn

    def forward(x, freqs, transformer_options=None):
        q, k, v = attention.norm_q(attention.q(x)), attention.norm_k(attention.k(x)), attention.v(x)
        parts = zip(*(t.chunk(2, -1) for t in (q, k, v)))
        found = [
            optimized_attention(*part, heads=1, transformer_options=transformer_options)
            for part in parts
        ]
        return attention.o(torch.cat(found, -1))

    patched = sparse(model)
    patched.add_object_patch("diffusion_model.blocks.0.self_attn.forward", forward)
    sample(patched, steps=2)
    assert report(patched).sparse_calls == 4
    assert report(patched).dense_calls == {reasons.REPEATED: 2}
    sample(load_model("tiny_wan21_t2v"), steps=1)


def test_a_layer_that_another_node_replaced_is_counted_in_every_call():
    from comfy.ldm.modules.attention import optimized_attention

    model = load_model("tiny_wan21_t2v")
    patched = sparse(model)
    attention = model.model.diffusion_model.blocks[0].self_attn

    def forward(x, freqs, transformer_options=None):
        q, k, v = attention.norm_q(attention.q(x)), attention.norm_k(attention.k(x)), attention.v(x)
        return attention.o(optimized_attention(q, k, v, heads=attention.num_heads))

    patched.add_object_patch("diffusion_model.blocks.0.self_attn.forward", forward)
    sample(patched, steps=4)
    last = report(patched)
    assert last.sparse_calls == 4
    assert last.dense_calls == {reasons.REPLACED.format(layers="1 of 2 layers"): 4}
    sample(model)  # puts the module's own forward back


def test_model_calls_that_a_cache_skips_are_not_counted():
    (cached,) = comfy_host.run_node(
        "EasyCache",
        model=sparse(load_model("tiny_wan21_t2v")),
        reuse_threshold=3.0,
        start_percent=0.1,
        end_percent=0.95,
        verbose=False,
    )
    sample(cached, steps=8)
    assert 0 < report(cached).sparse_calls < 16 and not report(cached).dense_calls


def test_a_block_list_that_changes_in_a_run_is_no_second_model():
    """Some nodes take blocks away for a while; the run counts the layers that it began with."""
    model = load_model("tiny_wan21_t2v")
    blocks = model.model.diffusion_model.blocks
    patched = sparse(model)
    from comfy.patcher_extension import WrappersMP

    def shorter(executor, *args, **kwargs):
        model.model.diffusion_model.blocks = torch.nn.ModuleList([blocks[0]])
        try:
            return executor(*args, **kwargs)
        finally:
            model.model.diffusion_model.blocks = blocks

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "shorter", shorter)
    sample(patched, steps=2)
    last = report(patched)
    assert last.sparse_calls == 2 and list(last.dense_calls.values()) == [2]
    assert not any("second model" in reason for reason in last.dense_calls)


@pytest.mark.parametrize("strict", [False, True])
def test_blocks_that_a_cache_skips_in_later_calls_are_no_fallback(strict, caplog):
    """As first-block caches do it: all blocks in the first call, some in the others."""
    from comfy.patcher_extension import WrappersMP

    model, calls = load_model("tiny_wan21_t2v"), []
    blocks = model.model.diffusion_model.blocks
    patched = sparse(model, strict=strict)

    def first_block_only(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            model.model.diffusion_model.blocks = torch.nn.ModuleList([blocks[0]])
        try:
            return executor(*args, **kwargs)
        finally:
            model.model.diffusion_model.blocks = blocks

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", first_block_only)
    sample(patched, steps=3)
    last = report(patched)
    assert last.sparse_calls == 4
    assert last.dense_calls == {reasons.CACHED.format(layers="1 of 2 layers"): 2}
    assert not dense_warnings(caplog)


def test_an_override_that_is_taken_deep_inside_is_no_silent_loss():
    """By a wrapper around the diffusion model, into a copy of the options that nobody else sees."""
    from comfy.patcher_extension import WrappersMP

    def takes(executor, x, t, context, clip, time, options, **kwargs):
        options = {**options, SLOT: lambda func, *args, **kwargs: func(*args, **kwargs)}
        return executor(x, t, context, clip, time, options, **kwargs)

    patched = sparse(load_model("tiny_wan21_t2v"))
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "later", takes)
    sample(patched, steps=2)
    assert report(patched).dense_calls == {reasons.UNSEEN.format(layers="2 of 2 layers"): 4}
