"""What cannot be sparse runs dense; the reason is counted, logged once, an error if strict."""

import pytest
import torch

import comfy_host
from support.data.fields import relative_error
from support.host.sampling import (
    conditioning,
    dense_warnings,
    full_density,
    k_sample,
    load_model,
    own_adapter,
    report,
    sample,
    sparse,
)


def flux_sample(model):
    extra = dict(pooled_output=torch.zeros(1, 768), guidance=3.5)
    text = [[torch.randn(1, 10, 4096, generator=torch.Generator().manual_seed(0)), extra]]
    return k_sample(model, text, text, torch.zeros(1, 16, 16, 16))


def test_triton_by_name_where_it_cannot_run_is_refused_before_sampling_with_the_reason():
    """To go on without what was asked for by name would be a silent no; auto is there for that."""
    model = load_model("tiny_wan21_t2v")
    with pytest.raises(
        RuntimeError, match="cannot be used: the tensors are on cpu.*set backend to auto"
    ):
        sparse(model, backend="triton")
    patched = sparse(model, backend="auto")
    sample(patched)
    assert report(patched).backend == "pytorch" and "in pytorch" in report(patched).summary()


@pytest.mark.parametrize("method", ["rola", "sla"])
def test_a_method_without_its_weights_is_named_so_and_refused_by_strict(method):
    module, model = comfy_host.module(".nodes.patching.dense_reason"), load_model("tiny_wan21_t2v")
    with pytest.raises(
        module.SparseNotPossible, match=f"{method} has no adapter.*Connect an adapter"
    ):
        sparse(model, method=method, strict=True)
    patched = sparse(model, method=method)
    sample(patched)
    assert (
        report(patched)
        .summary()
        .startswith(f"RoPeSLR {method} without its weights on WanModel: 6 of 6")
    )


def test_another_model_runs_dense_and_untouched(caplog):
    model = load_model("tiny_flux")
    patched = sparse(model)
    assert torch.equal(flux_sample(patched), flux_sample(model))
    assert set(report(patched).dense_calls) == {
        "Flux is none of the video models that can be sparse"
    }
    assert report(patched).sparse_calls == 0
    flux_sample(patched)
    assert dense_warnings(caplog) == [
        "RoPeSLR: attention runs dense: Flux is none of the video models that can be sparse"
    ]


def test_a_subclass_of_a_known_model_runs_dense_with_a_reason():
    """Another pack's model may arrange its tokens in another way: nothing is guessed."""
    model = load_model("tiny_wan21_t2v")
    inner = model.model.diffusion_model
    dense, original = sample(model, steps=2), type(inner)
    inner.__class__ = type("FancyWanModel", (original,), {"__module__": "fancy_pack"})
    try:
        patched = sparse(model)
        assert torch.equal(sample(patched, steps=2), dense)
    finally:
        inner.__class__ = original
    assert report(patched).dense_calls == {
        "FancyWanModel is a kind of video model whose token layout is not known": 4
    }


def with_reference(model):
    text = conditioning(
        1,
        reference_latents=[
            torch.randn(1, 16, 1, 16, 16, generator=torch.Generator().manual_seed(4))
        ],
    )
    return k_sample(model, text, text, torch.zeros(1, 16, 5, 16, 16))


def test_reference_tokens_in_front_of_the_video_are_always_kept(monkeypatch):
    """A frame of them, which the grid does not count; their own rows are dense."""
    model = load_model("tiny_wan22_fun_control_ref")
    dense = with_reference(model)
    patched = sparse(model, sparsity=0.6)
    assert 1e-4 < relative_error(with_reference(patched), dense) < 0.5
    assert report(patched).sparse_calls == 4 and not report(patched).dense_calls
    trained = sparse(model, sparsity=0.6, adapter=own_adapter("rola"))
    assert 1e-4 < relative_error(with_reference(trained), dense) < 0.5
    assert report(trained).sparse_calls == 4 and not report(trained).dense_calls
    full_density(monkeypatch)
    assert relative_error(with_reference(sparse(model, sparsity=0.0)), dense) < 1e-5


def test_latents_behind_the_video_are_always_kept(monkeypatch):
    """In-context references: streams of their own, appended to the sequence."""
    import inspect

    import comfy.model_base

    if "context_latents" not in inspect.getsource(comfy.model_base.WAN21):
        pytest.skip("this ComfyUI has no context latents for Wan")
    model = load_model("tiny_wan21_t2v")

    def run(model):
        text = conditioning(
            1,
            context_latents=[
                torch.randn(1, 16, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
                for seed in (4, 5)
            ],
        )
        return k_sample(model, text, text, torch.zeros(1, 16, 5, 16, 16))

    dense, patched = run(model), sparse(model, sparsity=0.6)
    assert 1e-4 < relative_error(run(patched), dense) < 0.5
    assert report(patched).sparse_calls == 4 and not report(patched).dense_calls
    full_density(monkeypatch)
    assert relative_error(run(sparse(model, sparsity=0.0)), dense) < 1e-5


def test_tokens_that_nobody_accounts_for_run_dense_with_a_reason():
    call = Calls()
    q = torch.randn(1, 2, 300, 64)
    assert call(q, q, q, 2, skip_reshape=True) == "dense"
    assert dict(call.call.tally.dense_calls) == {
        "300 tokens, but the video's grid (4, 8, 8) has 256: the position of the rest is unknown": 1
    }


def test_a_short_video_runs_dense(caplog):
    model = load_model("tiny_wan21_t2v")
    patched = sparse(model, min_tokens=577)
    assert torch.equal(sample(patched), sample(model))
    assert report(patched).dense_calls == {"576 tokens are fewer than min_tokens 577": 6}
    sample(patched)
    assert len(dense_warnings(caplog)) == 1
    at_the_limit = sparse(model, min_tokens=576)
    sample(at_the_limit)
    assert not report(at_the_limit).dense_calls


@pytest.mark.parametrize(
    "settings, reason",
    [
        (dict(dense_layers="0"), "dense layers"),
        (dict(backend="dense"), "backend is set to dense"),
        (dict(end_percent=0.01), "outside start/end percent"),
        (dict(dense_last_steps=99), "dense last steps"),
    ],
)
def test_what_the_person_chose_is_counted_and_not_warned_about(settings, reason, caplog):
    patched = sparse(load_model("tiny_wan21_t2v"), strict=True, **settings)
    sample(patched)
    assert reason in report(patched).dense_calls and not dense_warnings(caplog)


class Calls:
    """One attention call, handed to the override as a block would."""

    def __init__(self, **settings):
        names = ("override", "patch", "call", "hooks", "token_layout", "model_info")
        override, patch, call, hooks, layout, info = (
            comfy_host.module(f".nodes.patching.{name}") for name in names
        )
        settings = dict(min_tokens=64, dense_first_steps=0) | settings
        plan = comfy_host.module(".attention").SparsePlan(**settings).resolve()
        model, sigmas = load_model("tiny_wan21_t2v"), torch.tensor([1.0, 0.5, 0.0])
        self.run = patch.SparsePatch(plan)._begin(model, sigmas, starts=True)
        facts = call.CallFacts(1.0, (("all", 1),), (), layout.SequenceInfo((4, 8, 8)))
        self.call = call.ModelCall(self.run, facts, {})
        self.options, self.layer = {hooks.CALL: self.call}, info.Layer(0, 0)
        self.override = override.sparse_override

    def __call__(self, q, k, v, heads, mask=None, **kwargs):
        if self.layer is not None:  # what a hook on the block's self-attention says
            self.call.entering.enter(self.layer)
        return self.override(
            lambda *args, **kwargs: "dense",
            q,
            k,
            v,
            heads,
            mask=mask,
            transformer_options=self.options,
            **kwargs,
        )


@pytest.mark.parametrize(
    "width, kv_heads, mask, reason",
    [
        (63, 2, None, "head_dim is 63 (an even number up to 512 is needed)"),
        (514, 2, None, "head_dim is 514 (an even number up to 512 is needed)"),
        (64, 2, torch.zeros(256, 256), "there is an attention mask of shape (256, 256)"),
        (64, 1, None, "2 query heads on 1 key heads (equal numbers are needed)"),
    ],
)
def test_calls_that_the_path_cannot_take_go_dense(width, kv_heads, mask, reason):
    q, k = torch.randn(1, 2, 256, width), torch.randn(1, kv_heads, 256, width)
    call = Calls()
    assert call(q, k, k, 2, mask=mask, skip_reshape=True) == "dense"
    assert dict(call.call.tally.dense_calls) == {reason: 1}
    with pytest.raises(RuntimeError, match="strict.*" + reason.split(" (")[0]):
        Calls(strict=True)(q, k, k, 2, mask=mask, skip_reshape=True)


def test_a_call_whose_gradients_are_wanted_goes_dense():
    """Somebody trains: what a run remembers would belong to another pass over the same layer."""
    q = torch.randn(1, 2, 256, 64)
    reasons, call = comfy_host.module(".nodes.patching.dense_reason"), Calls()
    assert call(q.clone().requires_grad_(), q, q, 2, skip_reshape=True) == "dense"
    assert dict(call.call.tally.dense_calls) == {reasons.TRAINING: 1}
    call = Calls()
    with torch.no_grad():
        assert isinstance(
            call(q.clone().requires_grad_(), q, q, 2, skip_reshape=True), torch.Tensor
        )


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
def test_both_layouts_of_the_host_are_taken_and_given(
    skip_reshape, skip_output_reshape, monkeypatch
):
    full_density(monkeypatch)
    q, k, v = (
        torch.randn(1, 2, 256, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    given = [q, k, v] if skip_reshape else [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
    found = Calls(sparsity=0.0)(
        *given, 2, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape
    )
    torch.testing.assert_close(
        found, expected if skip_output_reshape else expected.transpose(1, 2).flatten(2)
    )


def test_calls_before_the_blocks_pass_through():
    call = Calls()
    call.layer = None
    assert call(*[torch.randn(1, 2, 256, 64)] * 3, 2, skip_reshape=True) == "dense"
    assert dict(call.call.tally.other_calls) == {"other attention": 1}


@pytest.mark.parametrize(
    "file, says",
    [
        ("tiny_flux", "Flux is none of the video models that can be sparse"),
        (
            "tiny_hunyuan_image",
            "HunyuanVideo cannot be sparse: HunyuanImage generates single images",
        ),
    ],
)
def test_strict_refuses_a_model_when_the_node_runs(file, says):
    with pytest.raises(RuntimeError, match=f"strict.*cannot be sparse: {says}"):
        sparse(load_model(file), strict=True)


def test_layers_that_the_model_does_not_have_are_named(caplog):
    sparse(load_model("tiny_wan21_t2v"), dense_layers="1, 2, 40")
    assert "dense_layers has 2, 40; WanModel has 2 layers, counted 0-1" in caplog.text


def test_a_long_list_of_layers_is_named_as_ranges(caplog):
    sparse(load_model("tiny_wan21_t2v"), dense_layers="0-9999")
    (line,) = [record.message for record in caplog.records if "dense_layers has" in record.message]
    assert line.endswith("dense_layers has 2-9999; WanModel has 2 layers, counted 0-1")


def test_what_is_no_adapter_is_refused_in_words():
    """A path typed into a string node, for one, and linked to the input."""
    with pytest.raises(
        ValueError, match="adapter is a str; connect the output of Load RoPeSLR Adapter"
    ):
        sparse(load_model("tiny_wan21_t2v"), adapter="mine.safetensors")


@pytest.mark.parametrize("start, end", [(0.0, 0.0), (0.5, 0.5), (0.6, 0.4), (1.0, 1.0)])
def test_an_empty_window_runs_no_step_sparse_and_is_said(start, end, caplog):
    patched = sparse(load_model("tiny_wan21_t2v"), start_percent=start, end_percent=end)
    assert f"start_percent {start:g} is not below end_percent {end:g}" in caplog.text
    sample(patched)
    assert report(patched).sparse_calls == 0
    assert report(patched).dense_calls == {"outside start/end percent": 6}


@pytest.mark.parametrize("sampler", ["dpm_fast", "dpm_adaptive"])
def test_samplers_with_steps_of_their_own_have_no_last_steps(sampler, caplog):
    """They never call the model below the level at which the last step begins."""
    patched = sparse(load_model("tiny_wan21_t2v"), dense_last_steps=1)
    sample(patched, steps=4, sampler=sampler)
    says = f"dense_last_steps has no effect with {sampler}"
    assert sum(says in record.message for record in caplog.records) == 1
    other = sparse(load_model("tiny_wan21_t2v"), dense_last_steps=1)
    caplog.clear()
    sample(other, steps=4)
    assert "no effect" not in caplog.text and report(other).dense_calls == {"dense last steps": 2}


@pytest.mark.parametrize("strict", [False, True])
def test_an_attention_that_another_node_replaced_is_noticed(strict, caplog):
    """An object patch on self_attn.forward bypasses the override: nothing would be sparse."""
    from comfy.ldm.modules.attention import optimized_attention

    model = load_model("tiny_wan21_t2v")
    patched = sparse(model, strict=strict)
    attention = model.model.diffusion_model.blocks[0].self_attn

    def forward(x, freqs, transformer_options=None):
        q, k, v = attention.norm_q(attention.q(x)), attention.norm_k(attention.k(x)), attention.v(x)
        return attention.o(optimized_attention(q, k, v, heads=attention.num_heads))

    patched.add_object_patch("diffusion_model.blocks.0.self_attn.forward", forward)
    says = "1 of 2 layers never called the attention override: another node replaced their self-attention"
    if strict:
        with pytest.raises(RuntimeError, match=says):
            sample(patched)
    else:
        sample(patched)
        assert report(patched).sparse_calls == 3 and says in report(patched).summary()
        assert [says in line for line in dense_warnings(caplog)] == [True]
    sample(model)  # puts the module's own forward back


def test_a_second_model_in_one_run_is_left_alone():
    """DualModelGuider hands the first model's options to the second, whose layout is another."""
    reasons = comfy_host.module(".nodes.patching.dense_reason")
    first, second = sparse(load_model("tiny_wan21_t2v")), load_model("tiny_wan21_vace")
    if "DualModelGuider" not in comfy_host.boot().NODE_CLASS_MAPPINGS:
        return  # older than the node
    run = comfy_host.run_node
    (guider,) = run(
        "DualModelGuider",
        model=first,
        model_negative=second,
        positive=conditioning(1),
        negative=conditioning(2),
        cfg=3.0,
    )
    (noise,), (sampler,) = (
        run("RandomNoise", noise_seed=3),
        run("KSamplerSelect", sampler_name="euler"),
    )
    latent = {"samples": torch.zeros(1, 16, 5, 16, 16)}
    out = run(
        "SamplerCustomAdvanced",
        noise=noise,
        guider=guider,
        sampler=sampler,
        sigmas=torch.tensor([1.0, 0.5, 0.0]),
        latent_image=latent,
    )
    assert torch.isfinite(out[0]["samples"]).all()
    assert report(first).sparse_calls == 4
    (reason,) = report(first).dense_calls
    assert reason == reasons.OTHER_MODEL.format(name="VaceWanModel")


def test_strict_refuses_a_short_video_before_the_first_step():
    model = load_model("tiny_wan21_t2v")
    calls = []

    def count(executor, *args, **kwargs):
        calls.append(1)
        return executor(*args, **kwargs)

    from comfy.patcher_extension import WrappersMP

    patched = sparse(model, strict=True, min_tokens=4096)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "count", count)
    with pytest.raises(
        RuntimeError, match="576 tokens are fewer than min_tokens 4096.*Lower min_tokens"
    ):
        sample(patched)
    assert not calls
