"""Living with others: who gets the dense calls, what is left behind, and what a compiled model does."""

import comfy_host
import pytest
import torch
from fields import relative_error
from sampling import SLOT, conditioning, full_density, load_model, report, sample, sparse, with_override


def spy(into, name, chain=None):
    """A holder of the slot as other packs write it: counts, and passes on to the one before."""
    def override(func, *args, **kwargs):
        into.append((name, args[0].shape[-2] == args[1].shape[-2]))
        return chain(func, *args, **kwargs) if chain else func(*args, **kwargs)

    return override


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
