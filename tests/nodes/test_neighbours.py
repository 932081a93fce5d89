"""Living with others: who gets the dense calls, what is left behind, and what a compiled model does."""

import gc
import weakref

import comfy_host
import pytest
import torch
from compiling import compiled
from fields import relative_error
from sampling import conditioning, full_density, load_model, report, sample, sparse

SLOT = "optimized_attention_override"


def spy(into, name, chain=None):
    """A holder of the slot as other packs write it: counts, and passes on to the one before."""
    def override(func, *args, **kwargs):
        into.append((name, args[0].shape[-2] == args[1].shape[-2]))
        return chain(func, *args, **kwargs) if chain else func(*args, **kwargs)

    return override


def with_override(model, override):
    model = model.clone()
    model.model_options["transformer_options"][SLOT] = override
    return model


@pytest.mark.parametrize("node_first", [False, True])
def test_another_override_keeps_every_dense_call_in_either_order(node_first):
    """Without the chain, cross-attention and dense steps would silently lose the other pack's speed-up."""
    model, calls = load_model("tiny_wan21_t2v"), []
    if node_first:
        patched = with_override(sparse(model, dense_first_steps=1), spy(calls, "other"))
    else:
        patched = sparse(with_override(model, spy(calls, "other")), dense_first_steps=1)
    found = sample(patched, steps=2)
    assert report(patched).sparse_calls == 2                                  # the other pack did not switch us off
    assert calls.count(("other", False)) == 4 and calls.count(("other", True)) == 2
    assert torch.equal(found, sample(sparse(model, dense_first_steps=1), steps=2))


def test_nothing_is_written_into_the_models_own_options():
    model = load_model("tiny_wan21_t2v")
    patched = sparse(model)
    sample(patched)
    for each in (model, patched):
        assert not any("ropeslr" in key or key == SLOT for key in each.model_options["transformer_options"])
    assert not model.wrappers.get("outer_sample", {}) and model.get_attachment("ropeslr") is None


def test_removing_the_node_gives_bit_identical_frames():
    model = load_model("tiny_wan21_t2v")
    never = sample(model, cfg=7.0)
    patched = sparse(model)
    changed = sample(patched, cfg=7.0)
    assert torch.equal(sample(model, cfg=7.0), never)
    assert not torch.equal(changed, never)
    assert torch.equal(sample(sparse(model, backend="dense"), cfg=7.0), never)


def live_tensors():
    gc.collect()
    return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())


def hooks(model):
    modules = list(model.model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)


def test_fifty_alternating_runs_leave_nothing_behind():
    """Dense, sparse, other settings and other sizes in turn: no hook, no tensor, no growth, the same dense picture."""
    model = load_model("tiny_wan21_t2v")
    dense = sample(model, steps=2)          # loading alone leaves ComfyUI's own marks on the modules
    attributes = [sorted(vars(module)) for module in model.model.modules()]
    variants = (
        dict(), dict(method="top-k"), dict(sparsity=0.5, keep_diagonal=True), dict(block_order="raster", rank=32),
    )
    sizes, runs = ((9, 16, 16), (5, 15, 17)), []
    for turn in range(50):
        if turn % 2:
            assert torch.equal(sample(model, steps=2), dense)
        else:
            patched = sparse(model, **variants[turn // 2 % 4])
            sample(patched, steps=2, latent=sizes[turn // 2 % 2])
            runs.append(weakref.ref(report(patched)))
            del patched
        if turn == 9:
            settled = live_tensors()
    assert live_tensors() <= settled
    assert hooks(model) == 0
    assert [sorted(vars(module)) for module in model.model.modules()] == attributes
    assert sum(run() is not None for run in runs) <= 1


def test_an_interrupted_run_leaves_the_model_as_it_was():
    model = load_model("tiny_wan21_t2v")
    dense = sample(model)
    patched = sparse(model)

    def interrupt(func, *args, **kwargs):
        raise KeyboardInterrupt

    broken = with_override(patched, interrupt)
    with pytest.raises(KeyboardInterrupt):
        sample(broken)
    assert report(broken).completed is False and "cut short" in report(broken).summary()
    assert torch.equal(sample(model), dense)
    assert torch.isfinite(sample(patched)).all() and report(patched).completed


def test_an_error_in_the_sparse_path_runs_dense_and_says_so(monkeypatch, caplog):
    model = load_model("tiny_wan21_t2v")
    run_class = comfy_host.module(".attention").AttentionRun

    def broken(self, *args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(run_class, "attend", broken)
    patched = sparse(model)
    assert torch.equal(sample(patched), sample(model))
    assert report(patched).dense_calls == {"the sparse path failed (RuntimeError: no such kernel)": 6}
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


@pytest.mark.parametrize("attention, node_first", [
    ("attention_pytorch", False), pytest.param("attention_pytorch", True, marks=pytest.mark.slow),
    pytest.param("attention_sub_quad", False, marks=pytest.mark.slow),
    pytest.param("attention_sub_quad", True, marks=pytest.mark.slow),
])
def test_settings_take_effect_on_a_compiled_model(node_first, attention, monkeypatch):
    """A graph compiled without the node must not be used with it, nor the other way round.

    With PyTorch's attention the dense model is ONE graph, which would never look into the slot again.
    """
    import comfy.ldm.modules.attention
    import comfy.ldm.wan.model

    monkeypatch.setattr(comfy.ldm.wan.model, "optimized_attention", getattr(comfy.ldm.modules.attention, attention))
    torch.compiler.reset()
    model = load_model("tiny_wan21_t2v")
    compiled_dense = compiled(model)

    def both(**settings):
        return compiled(sparse(model, **settings)) if node_first else sparse(compiled_dense, **settings)

    dense = sample(model)
    assert relative_error(sample(compiled_dense), dense) < 1e-5
    for settings in (dict(), dict(sparsity=0.5), dict(method="top-k"), dict(dense_first_steps=1)):
        patched = both(**settings)
        assert relative_error(sample(patched), sample(sparse(model, **settings))) < 1e-5, settings
        assert report(patched).sparse_calls == (4 if settings == dict(dense_first_steps=1) else 6)
    assert relative_error(sample(compiled_dense), dense) < 1e-5
    assert relative_error(sample(both()), sample(sparse(model))) < 1e-5
    torch.compiler.reset()


def test_easycache_and_the_node_work_together():
    model = load_model("tiny_wan21_t2v")
    (cached,) = comfy_host.run_node(
        "EasyCache", model=sparse(model), reuse_threshold=3.0, start_percent=0.1, end_percent=0.95, verbose=False
    )
    assert torch.isfinite(sample(cached, steps=8)).all()
    assert 0 < report(cached).sparse_calls < 16                               # some forwards were skipped


def test_context_windows_are_laid_out_one_by_one(monkeypatch):
    """Each window has its own grid; taking the whole latent's would not fit any of them."""
    half = comfy_host.run_node(
        "WanContextWindowsManual", model=sparse(load_model("tiny_wan21_t2v"), sparsity=0.5), context_length=17,
        context_overlap=4,
    )[0]
    assert torch.isfinite(sample(half, steps=2)).all() and not report(half).dense_calls
    full_density(monkeypatch)
    model = load_model("tiny_wan21_t2v")
    windowed, plain = (
        comfy_host.run_node("WanContextWindowsManual", model=each, context_length=17, context_overlap=4)[0]
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
    out = run("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)
    assert torch.isfinite(out[0]["samples"]).all() and report(model).sparse_calls == 6
