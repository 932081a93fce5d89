"""Other packs: who gets the dense calls, what is left behind, what a compiled model does."""

import inspect
from types import SimpleNamespace

import pytest
import torch

import comfy_host
from support.data.fields import relative_error
from support.data.variants import VARIANTS
from support.host.sampling import (
    SLOT,
    conditioning,
    full_density,
    load_model,
    own_adapter,
    report,
    sample,
    sparse,
    with_override,
)


def spy(into, name, chain=None):
    """A holder of the slot as other packs write it: counts, and passes on to the one before."""

    def override(func, *args, **kwargs):
        into.append((name, args[0].shape[-2] == args[1].shape[-2]))
        return chain(func, *args, **kwargs) if chain else func(*args, **kwargs)

    return override


@pytest.mark.parametrize("node_first", [False, True])
def test_another_override_keeps_every_dense_call_in_either_order(node_first):
    """Unchained, cross-attention and dense steps would silently lose the other pack's speed-up."""
    model, calls = load_model("tiny_wan21_t2v"), []
    if node_first:
        patched = with_override(sparse(model, dense_first_steps=1), spy(calls, "other"))
    else:
        patched = sparse(with_override(model, spy(calls, "other")), dense_first_steps=1)
    found = sample(patched, steps=2)
    assert report(patched).sparse_calls == 2  # the other pack did not switch us off
    assert calls.count(("other", False)) == 4 and calls.count(("other", True)) == 2
    assert torch.equal(found, sample(sparse(model, dense_first_steps=1), steps=2))


def test_nothing_is_written_into_the_models_own_options():
    model = load_model("tiny_wan21_t2v")
    patched = sparse(model)
    sample(patched)
    for each in (model, patched):
        assert not any(
            "ropeslr" in key or key == SLOT for key in each.model_options["transformer_options"]
        )
    assert not model.wrappers.get("outer_sample", {}) and model.get_attachment("ropeslr") is None


def test_removing_the_node_gives_bit_identical_frames():
    model = load_model("tiny_wan21_t2v")
    never = sample(model, cfg=7.0)
    patched = sparse(model)
    changed = sample(patched, cfg=7.0)
    assert torch.equal(sample(model, cfg=7.0), never)
    assert not torch.equal(changed, never)
    assert torch.equal(sample(sparse(model, backend="dense"), cfg=7.0), never)


def test_an_error_in_the_sparse_path_runs_dense_and_says_so(monkeypatch, caplog):
    model = load_model("tiny_wan21_t2v")
    run_class = comfy_host.module(".attention").AttentionRun

    def broken(self, *args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(run_class, "attend", broken)
    patched = sparse(model)
    assert torch.equal(sample(patched), sample(model))
    assert report(patched).dense_calls == {
        "the sparse path failed (RuntimeError: no such kernel)": 6
    }
    assert sum("Traceback" in (record.exc_text or "") for record in caplog.records) == 1
    with pytest.raises(RuntimeError, match="no such kernel"):
        sample(sparse(model, strict=True))


def test_a_call_without_memory_runs_dense(monkeypatch, caplog):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("no room\nand a long explanation")

    monkeypatch.setattr(comfy_host.module(".attention").AttentionRun, "attend", full)
    model = load_model("tiny_wan21_t2v")
    patched = sparse(model)
    assert torch.equal(sample(patched), sample(model))
    assert report(patched).dense_calls == {"the sparse path failed (OutOfMemoryError: no room)": 6}
    assert not any(record.exc_text for record in caplog.records)


def test_easycache_and_the_node_work_together():
    model = load_model("tiny_wan21_t2v")
    (cached,) = comfy_host.run_node(
        "EasyCache",
        model=sparse(model),
        reuse_threshold=3.0,
        start_percent=0.1,
        end_percent=0.95,
        verbose=False,
    )
    assert torch.isfinite(sample(cached, steps=8)).all()
    assert 0 < report(cached).sparse_calls < 16  # some forwards were skipped


def test_context_windows_are_laid_out_one_by_one(monkeypatch):
    """Each window has its own grid; taking the whole latent's would not fit any of them."""
    half = comfy_host.run_node(
        "WanContextWindowsManual",
        model=sparse(load_model("tiny_wan21_t2v"), sparsity=0.5),
        context_length=17,
        context_overlap=4,
    )[0]
    assert torch.isfinite(sample(half, steps=2)).all() and not report(half).dense_calls
    full_density(monkeypatch)
    model = load_model("tiny_wan21_t2v")
    windowed, plain = (
        comfy_host.run_node(
            "WanContextWindowsManual", model=each, context_length=17, context_overlap=4
        )[0]
        for each in (sparse(model, sparsity=0.0), model)
    )
    assert relative_error(sample(windowed, steps=2), sample(plain, steps=2)) < 1e-5
    assert report(windowed).sparse_calls > 4 and not report(windowed).dense_calls


def test_a_guider_and_custom_sampling_run_sparse():
    model = sparse(load_model("tiny_wan21_t2v"))
    run = comfy_host.run_node
    (noise,) = run("RandomNoise", noise_seed=3)
    (guider,) = run("BasicGuider", model=model, conditioning=conditioning(1))
    (sampler,) = run("KSamplerSelect", sampler_name="euler")
    (sigmas,) = run("BasicScheduler", model=model, scheduler="simple", steps=3, denoise=1.0)
    latent = {"samples": torch.zeros(1, 16, 5, 16, 16)}
    out = run(
        "SamplerCustomAdvanced",
        noise=noise,
        guider=guider,
        sampler=sampler,
        sigmas=sigmas,
        latent_image=latent,
    )
    assert torch.isfinite(out[0]["samples"]).all() and report(model).sparse_calls == 6


def test_lazycache_and_the_node_work_together():
    model = load_model("tiny_wan21_t2v")
    (cached,) = comfy_host.run_node(
        "LazyCache",
        model=sparse(model),
        reuse_threshold=3.0,
        start_percent=0.1,
        end_percent=0.95,
        verbose=False,
    )
    assert torch.isfinite(sample(cached, steps=8)).all()
    assert 0 < report(cached).sparse_calls < 16


@pytest.mark.parametrize("node_first", [False, True])
def test_the_previous_override_is_said(node_first, caplog):
    """As a Sage switcher does it, whose pack a person knows by its folder."""
    model = load_model("tiny_wan21_t2v")
    sage = spy([], "sage")
    sage.__module__ = (
        "/somewhere/ComfyUI/custom_nodes/ComfyUI-KJNodes.nodes.model_optimization_nodes"
    )
    patched = (
        with_override(sparse(model), sage) if node_first else sparse(with_override(model, sage))
    )
    with caplog.at_level("INFO"):
        sample(patched)
    assert report(patched).previous == "spy.override of ComfyUI-KJNodes"
    assert (
        sum(
            "dense attention is handled by spy.override of ComfyUI-KJNodes" in record.message
            for record in caplog.records
        )
        == 1
    )
    sample(sparse(model))
    assert report(sparse(model)) is None
    alone = sparse(model, dense_first_steps=1)
    sample(alone)
    assert report(alone).previous == "" and "(by" not in report(alone).summary()


class CoreBackend:
    """ComfyUI's own ModelAttentionBackend (0.32 and newer): one backend for all attention.

    By its documentation it writes the shared slot, takes no notice of who was there, and has a
    second entry for calls whose q, k, v travel in containers; an override without one is called
    with plain tensors.
    """

    def __init__(self):
        self.calls = 0

    def __call__(self, func, q, k, v, heads, mask=None, **kwargs):
        from comfy.ldm.modules.attention import attention_pytorch

        self.calls += 1
        return attention_pytorch(q, k, v, heads, mask=mask, **kwargs)

    def container_function(self, *args, **kwargs):
        raise AssertionError("plain tensors must not come here")


@pytest.mark.parametrize("node_first", [False, True])
def test_the_cores_own_backend_node_gets_the_dense_calls(node_first):
    model, backend = load_model("tiny_wan21_t2v"), CoreBackend()
    settings = dict(dense_first_steps=1)
    if node_first:
        patched = with_override(sparse(model, **settings), backend)
    else:
        patched = sparse(with_override(model, backend), **settings)
    assert (
        relative_error(sample(patched, steps=2), sample(sparse(model, **settings), steps=2)) < 1e-5
    )
    # 2 dense ones and 4 of cross-attention.
    assert report(patched).sparse_calls == 2 and backend.calls == 6
    assert report(patched).previous == f"CoreBackend of {__name__}"


@pytest.mark.parametrize("node_first", [False, True])
def test_the_cores_own_sparse_node_gets_the_dense_calls_in_either_order(node_first):
    """It sets the override at run time, and before every step where another has.

    It keeps the previous.
    """
    from comfy.patcher_extension import CallbacksMP

    calls = []

    def core_sparse(model):
        model = model.clone()
        options = model.model_options["transformer_options"]
        previous = options.get(SLOT)

        def override(func, q, k, v, heads, mask=None, **kwargs):
            calls.append(q.shape[-2] == k.shape[-2])
            if previous is not None:
                return previous(func, q, k, v, heads, mask=mask, **kwargs)
            return func(q, k, v, heads, mask=mask, **kwargs)

        def prepare(patcher, timestep, model_options, *_):
            model_options["transformer_options"][SLOT] = override

        options[SLOT] = override
        model.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, "core_sparse", prepare)
        return model

    model = load_model("tiny_wan21_t2v")
    patched = core_sparse(sparse(model)) if node_first else sparse(core_sparse(model))
    if "model_options" not in inspect.signature(type(model).prepare_state).parameters:
        patched.callbacks.clear()  # an older host hands it nothing to write into
    assert torch.equal(sample(patched), sample(sparse(model)))
    assert report(patched).sparse_calls == 6 and calls == [False] * 6
    assert "core_sparse" in report(patched).previous


def test_unknown_arguments_of_newer_hosts_are_passed_on():
    """Such as preferred_attention, low_precision_attention: they must reach the host's function."""
    seen = []

    def below(func, *args, low_precision_attention=True, **kwargs):
        seen.append(low_precision_attention)
        return func(*args, **kwargs)

    override, calls = comfy_host.module(".nodes.patching.override"), []
    model = with_override(sparse(load_model("tiny_wan21_t2v"), dense_first_steps=1), below)

    def newer(original):
        def call(*args, **kwargs):
            calls.append(1)
            return original(*args, low_precision_attention=False, **kwargs)

        return call

    import comfy.ldm.wan.model as wan

    patch = pytest.MonkeyPatch()
    patch.setattr(wan, "optimized_attention", newer(wan.optimized_attention))
    try:
        assert torch.isfinite(sample(model, steps=2)).all()
    finally:
        patch.undo()
    assert report(model).sparse_calls == 2 and set(seen) == {False} and len(seen) == len(calls) - 2
    # So hosts with containers unpack for us.
    assert not hasattr(override.sparse_override, "container_function")


def test_a_wrapper_that_was_copied_twice_calls_no_override_for_ever():
    """Dense calls within dense calls would hand each other back and forth."""
    from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

    model = load_model("tiny_wan21_t2v")
    calls = []

    def below(func, *args, **kwargs):
        calls.append(1)
        return func(*args, **kwargs)

    expected = sample(sparse(model, dense_first_steps=1))
    patched = with_override(sparse(model, dense_first_steps=1), below)
    module = comfy_host.module(".nodes.patching.patch")
    options = patched.model_options["transformer_options"]
    add_wrapper_with_key(WrappersMP.APPLY_MODEL, "copied", module.wrapped_apply_model, options)
    assert torch.equal(sample(patched), expected) and calls


@pytest.mark.parametrize("name", ["Wan 2.1 T2V", "MiniMax H3", "HunyuanVideo T2V"])
@pytest.mark.parametrize("overridden", [False, True])
def test_attention_that_the_checkpoint_asks_for_keeps_the_dense_calls(name, overridden):
    """Newer ComfyUI keeps it in the module, per layer; any override goes before it there."""
    if VARIANTS[name].missing():
        pytest.skip(VARIANTS[name].missing())
    variant, calls = VARIANTS[name], []
    model = variant.model()
    expected = variant.sample(sparse(model, dense_first_steps=1), variant.even, 1.0)

    def own(q, k, v, heads, **kwargs):
        from comfy.ldm.modules.attention import optimized_attention

        calls.append(q.shape[-2] == k.shape[-2])
        return optimized_attention(q, k, v, heads, **kwargs)

    net = model.model.diffusion_model
    info = comfy_host.module(".nodes.patching.model_info")
    modules = list(info.self_attentions(net, info.model_info(net)))
    if name.startswith("Wan"):
        modules += [block.cross_attn for block in net.blocks]
    first, *_ = modules
    for module in modules:
        module.comfy_attention = SimpleNamespace(function=own)
    patched = sparse(model, dense_first_steps=1)
    if overridden:
        patched = with_override(patched, lambda func, *args, **kwargs: func(*args, **kwargs))
    try:
        found = variant.sample(patched, variant.even, 1.0)
    finally:
        for module in modules:
            del module.comfy_attention
    assert torch.equal(found, expected)
    dense = sum(report(patched).dense_calls.values())
    across = 4 if name.startswith("Wan") else 0
    assert calls.count(True) == (0 if overridden else dense) and dense == variant.calls
    assert calls.count(False) == (0 if overridden else across)
    assert not first._forward_pre_hooks and not first._forward_hooks


def test_two_samplers_of_one_model_each_have_their_own_run():
    """A high-resolution pass after a first one: other grid and settings, nothing carried over."""
    model = load_model("tiny_wan21_t2v")
    first, second = sparse(model, sparsity=0.6), sparse(model, method="top-k", dense_layers="0")
    alone = sample(first, latent=(5, 16, 16)), sample(second, latent=(5, 20, 24))
    for _ in range(2):
        assert torch.equal(sample(first, latent=(5, 16, 16)), alone[0])
        assert torch.equal(sample(second, latent=(5, 20, 24)), alone[1])
    assert report(first).sparse_calls == 6 and report(second).dense_calls == {"dense layers": 3}
    assert torch.equal(
        sample(first, latent=(5, 20, 24)), sample(sparse(model, sparsity=0.6), latent=(5, 20, 24))
    )


class PackedLinear(torch.nn.Module):
    """A linear layer as GGUF loaders make it: packed numbers that only its forward unpacks."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.packed = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.offset = linear.bias

    @property
    def weight(self):
        raise AssertionError("packed weights cannot be read as a matrix")

    def forward(self, x):
        return torch.nn.functional.linear(x, (self.packed * self.scale).to(x.dtype), self.offset)


@pytest.mark.parametrize("method", ["ropeslr", "rola"])
def test_weights_that_only_their_layers_can_unpack(method):
    """As with GGUF: whoever reads `.weight` instead of calling the layer gets nonsense."""
    model = load_model("tiny_wan21_t2v")
    for block in model.model.diffusion_model.blocks:
        for name in "qkvo":
            setattr(block.self_attn, name, PackedLinear(getattr(block.self_attn, name)))
    patched = sparse(model, sparsity=0.6, adapter=own_adapter(method))
    assert 1e-4 < relative_error(sample(patched), sample(model)) < 0.5
    assert report(patched).sparse_calls == 6 and not report(patched).dense_calls


@pytest.mark.parametrize("kind", ["fp8_e4m3fn", "fp8_e5m2"])
def test_weights_in_eight_bits(kind):
    load_model("tiny_wan21_t2v")
    (model,) = comfy_host.run_node(
        "UNETLoader", unet_name="tiny_wan21_t2v.safetensors", weight_dtype=kind
    )
    dense, patched = sample(model), sparse(model, sparsity=0.6)
    assert 1e-4 < relative_error(sample(patched), dense) < 0.5 and report(patched).sparse_calls == 6
    assert torch.equal(sample(model), dense)


@pytest.mark.parametrize("file", ["tiny_wan21_vace", "tiny_hunyuan_t2v"])
def test_little_memory_changes_nothing(file, monkeypatch):
    """--lowvram: weights stay on the host and are moved as each layer runs."""
    import comfy.model_management as management

    arguments = dict(pooled=True, steps=2)
    model = load_model(file)
    expected = sample(sparse(model, sparsity=0.6), **arguments)
    management.unload_all_models()
    low = sparse(model, sparsity=0.6)

    def load(models, **_):
        for each in models:
            each.patch_model(device_to=each.load_device, lowvram_model_memory=1)

    monkeypatch.setattr(management, "load_models_gpu", load)
    assert relative_error(sample(low, **arguments), expected) < 1e-5 and low.model.model_lowvram
    low.unpatch_model()


@pytest.mark.slow  # older hosts cannot slice these conditionings by themselves
@pytest.mark.parametrize("name", ["Wan VACE", "Wan HuMo", "Wan SCAIL", "Wan 2.2 TI2V 5B"])
def test_context_windows_of_models_that_have_more_than_a_text(name):
    """Each window slices the conditionings too: its own grid, and its own tokens behind it."""
    check_windows(name, "WanContextWindowsManual", 9, context_length=17, context_overlap=4)


MANUAL = dict(
    context_length=6,
    context_overlap=2,
    context_schedule="standard_static",
    context_stride=1,
    closed_loop=False,
    fuse_method="pyramid",
    dim=2,
    freenoise=False,
)


@pytest.mark.slow  # the same
@pytest.mark.parametrize(
    "name", ["Kandinsky 5", "Cosmos Predict2", "Mochi", "CogVideoX", "HunyuanVideo T2V"]
)
def test_context_windows_of_other_models(name):
    """All but MiniMax H3, for which ComfyUI has none."""
    check_windows(name, "ContextWindowsManual", 10, **MANUAL)


@pytest.mark.slow  # older hosts have no such node
@pytest.mark.parametrize("name", ["LTX-Video with a guide", "LTX-2"])
def test_context_windows_of_ltx(name):
    """With packed latents, and with a guide behind each window."""
    check_windows(name, "LTXVContextWindows", 10, context_length=33, context_overlap=9)


def check_windows(name, node, frames, **settings):
    variant = VARIANTS[name]
    if variant.missing() or node not in comfy_host.boot().NODE_CLASS_MAPPINGS:
        pytest.skip(variant.missing() or f"this ComfyUI has no {node}")
    model, latent = variant.model(), (frames, *variant.even[1:])

    def windowed(model):
        return comfy_host.run_node(node, model=model, **settings)[0]

    dense = variant.sample(windowed(model), latent, 1.0)
    patched = windowed(sparse(model, sparsity=0.5))
    assert relative_error(variant.sample(patched, latent, 1.0), dense) < 0.5
    last = report(patched)
    assert (
        last.model_calls > 2
        and last.sparse_calls == variant.calls * last.model_calls
        and not last.dense_calls
    )
    with pytest.MonkeyPatch.context() as patch:
        full_density(patch)
        exact = variant.sample(windowed(sparse(model, sparsity=0.0)), latent, 1.0)
    assert relative_error(exact, dense) < 1e-5


def test_a_model_that_makes_a_few_frames_at_a_time_runs_its_own_way():
    """Self-forcing keeps keys of earlier frames, unknown to its attention calls: dense."""
    variant = VARIANTS["Wan causal (Self-Forcing)"]
    if variant.missing() or "SamplerARVideo" not in comfy_host.boot().NODE_CLASS_MAPPINGS:
        pytest.skip("this ComfyUI has no such sampler")
    model = variant.model()

    def run(model):
        (sampler,) = comfy_host.run_node("SamplerARVideo", num_frame_per_block=1)
        return comfy_host.run_node(
            "SamplerCustom",
            model=model,
            add_noise=True,
            noise_seed=1,
            cfg=1.0,
            positive=conditioning(1),
            negative=conditioning(2),
            sampler=sampler,
            sigmas=torch.tensor([1.0, 0.5, 0.0]),
            latent_image={"samples": torch.zeros(1, 16, 3, 16, 16)},
        )[0]["samples"]

    patched = sparse(model)
    assert torch.equal(run(patched), run(model))
    assert set(report(patched).dense_calls) == {variant.dense}


@pytest.mark.parametrize("count", [1, 2])
def test_a_skipped_block_does_not_make_its_control_block_take_its_place(count, monkeypatch):
    """Layer skipping leaves out the main block.

    The control block of its number must not use its weights.
    """
    variant = VARIANTS["Wan VACE" if count == 1 else "Wan VACE, two controls"]
    model = variant.model().clone()
    model.set_model_patch_replace(lambda args, more: {"img": args["img"]}, "dit", "double_block", 0)
    run_class, layers = comfy_host.module(".attention").AttentionRun, []
    attend = run_class.attend

    def watched(self, q, k, v, call):
        layers.append(call.layer)
        return attend(self, q, k, v, call)

    monkeypatch.setattr(run_class, "attend", watched)
    patched = sparse(model, sparsity=0.6)
    variant.sample(patched, variant.even, 1.0, steps=1)
    assert layers == [*(("control", 0, turn + 1) for turn in range(count)), 1]
    patched = sparse(model, sparsity=0.6, adapter=own_adapter("rola"))
    layers.clear()
    variant.sample(patched, variant.even, 1.0, steps=1)
    assert layers == [1]
    control = [
        n
        for reason, n in report(patched).dense_calls.items()
        if "has no weights for control blocks" in reason
    ]
    assert control == [count]


def test_a_cache_that_writes_into_its_input_is_not_spoiled_by_a_second_execution(monkeypatch):
    """EasyCache adds to the latent in place on skipped steps; NaN before one makes it run again."""
    model = load_model("tiny_wan21_t2v")
    run_class = comfy_host.module(".attention").AttentionRun
    attend, count = run_class.attend, []

    def broken(self, *args, **kwargs):
        out, cost = attend(self, *args, **kwargs)
        count.append(1)
        if len(count) == 3:
            out[0, 0, 0, 0] = float("nan")
        return out, cost

    monkeypatch.setattr(run_class, "attend", broken)
    (cached,) = comfy_host.run_node(
        "EasyCache",
        model=sparse(model),
        reuse_threshold=3.0,
        start_percent=0.1,
        end_percent=0.95,
        verbose=False,
    )
    assert torch.isfinite(sample(cached, steps=8)).all()
    assert sum(report(cached).dense_calls.values()) == 2 and report(cached).sparse_calls > 0
