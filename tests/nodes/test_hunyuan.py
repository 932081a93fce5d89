"""HunyuanVideo, text and video in one sequence: only the video's attention is sparse."""

import pytest
import torch

import comfy_host
from support.data.fields import relative_error
from support.host.passes import count_passes
from support.host.sampling import full_density, k_sample, load_model, report, sample, sparse

# file -> (latent channels, latent, sparse calls of one step)
HUNYUAN = {
    "tiny_hunyuan_t2v": (16, (9, 16, 16), 4),
    "tiny_hunyuan15_t2v": (32, (9, 8, 8), 2),  # 576 tokens each
    "tiny_hunyuan_i2v": (16, (9, 16, 16), 4),
    "tiny_hunyuan_skyreels_i2v": (16, (9, 16, 16), 4),
}


@pytest.fixture(params=list(HUNYUAN))
def hunyuan(request):
    """(model, sampling arguments, sparse calls of one step)."""
    channels, latent, calls = HUNYUAN[request.param]
    return (
        load_model(request.param),
        dict(channels=channels, latent=latent, steps=2, pooled=True),
        calls,
    )


@pytest.mark.parametrize("order", ["cube", "raster"])
def test_every_block_kept_is_dense(hunyuan, order, monkeypatch):
    full_density(monkeypatch)
    model, arguments, calls = hunyuan
    patched = sparse(model, sparsity=0.0, block_order=order)
    assert relative_error(sample(patched, **arguments), sample(model, **arguments)) < 1e-5
    last = report(patched)
    assert last.sparse_calls == 2 * calls and last.density == 1.0 and not last.dense_calls


@pytest.mark.parametrize("method", ["ropeslr", "adaspa", "top-k", "top-k plain"])
@pytest.mark.parametrize("cfg", [1.0, pytest.param(5.0, marks=pytest.mark.slow)])
def test_methods_without_weights_run_sparse(hunyuan, method, cfg):
    model, arguments, calls = hunyuan
    patched = sparse(model, method=method, sparsity=0.6)
    found = sample(patched, cfg=cfg, **arguments)
    assert (
        torch.isfinite(found).all()
        and 1e-4 < relative_error(found, sample(model, cfg=cfg, **arguments)) < 0.5
    )
    assert (
        report(patched).sparse_calls == calls * report(patched).model_calls
        and not report(patched).dense_calls
    )


def test_error_falls_as_density_rises(hunyuan):
    model, arguments, _ = hunyuan
    dense = sample(model, **arguments)
    plans = [dict(method="top-k plain", sparsity=sparsity) for sparsity in (0.9, 0.6, 0.3)]
    errors = [relative_error(sample(sparse(model, **plan), **arguments), dense) for plan in plans]
    assert errors[0] > errors[1] > errors[2]


def test_a_reference_latent_stands_with_the_text(monkeypatch):
    """Between text and video: always kept, and dense itself."""
    model = load_model("tiny_hunyuan_t2v")
    text = masked(20)
    text[0][1] = {
        "pooled_output": text[0][1]["pooled_output"],
        "ref_latent": torch.randn(1, 16, 1, 16, 16, generator=torch.Generator().manual_seed(4)),
    }
    dense = run(model, text)
    patched = sparse(model, sparsity=0.6)
    assert 1e-4 < relative_error(run(patched, text), dense) < 0.5
    assert report(patched).sparse_calls == 8 and not report(patched).dense_calls
    assert relative_error(dense, run(model, masked(20))) > 1e-3  # the reference is read
    full_density(monkeypatch)
    assert relative_error(run(sparse(model, sparsity=0.0), text), dense) < 1e-5


def test_the_first_frame_by_token_replacement():
    """It changes the modulation alone; the tokens lie as ever."""
    model, text = load_model("tiny_hunyuan_t2v"), masked(20)
    text[0][1] = {"pooled_output": text[0][1]["pooled_output"], "guiding_frame_index": 0}
    patched = sparse(model, sparsity=0.6)
    assert 1e-4 < relative_error(run(patched, text), run(model, text)) < 0.5
    assert report(patched).sparse_calls == 8 and not report(patched).dense_calls


@pytest.mark.parametrize("latent", [(5, 14, 18), (3, 10, 22), (1, 32, 18)])
def test_odd_token_grids_run(latent):
    model = load_model("tiny_hunyuan_t2v")
    patched = sparse(model, sparsity=0.5)
    arguments = dict(latent=latent, steps=2, pooled=True)
    assert relative_error(sample(patched, **arguments), sample(model, **arguments)) < 0.5
    assert report(patched).sparse_calls == 8 and not report(patched).dense_calls


def masked(real, seed=1, padded_seed=2, tokens=20):
    """Text of which only the first `real` tokens are not padding, as text encoders hand it over."""
    text = torch.randn(1, tokens, 768, generator=torch.Generator().manual_seed(seed))
    text[:, real:] = torch.randn(
        1, tokens - real, 768, generator=torch.Generator().manual_seed(padded_seed)
    )
    mask = torch.zeros(1, tokens, dtype=torch.int64)
    mask[:, :real] = 1
    pooled = torch.randn(1, 768, generator=torch.Generator().manual_seed(8))
    return [[text, {"attention_mask": mask, "pooled_output": pooled}]]


def run(model, positive, sparse_steps=2):
    return k_sample(model, positive, positive, torch.zeros(1, 16, 9, 16, 16), steps=sparse_steps)


@pytest.mark.parametrize("real", [1, 12, 19])
def test_a_mask_is_honoured_as_dense_attention_honours_it(real, monkeypatch):
    full_density(monkeypatch)
    model = load_model("tiny_hunyuan_t2v")
    patched = sparse(model, sparsity=0.0)
    assert relative_error(run(patched, masked(real)), run(model, masked(real))) < 1e-5
    assert report(patched).sparse_calls == 8 and not report(patched).dense_calls


def test_padded_text_is_never_attended_and_real_text_is(monkeypatch):
    """Behind the refiner, which upstream averages over all text, padding included."""
    import comfy.ldm.hunyuan_video.model as hunyuan

    real, refine = 12, hunyuan.TokenRefiner.forward
    model = load_model("tiny_hunyuan_t2v")
    results = []
    for change in (slice(0, 0), slice(real, 20), slice(real - 1, real)):

        def changed(self, *args, change=change, **kwargs):
            text = refine(self, *args, **kwargs).clone()
            text[:, change] *= -2.0
            return text

        monkeypatch.setattr(hunyuan.TokenRefiner, "forward", changed)
        results.append(run(sparse(model, sparsity=0.6), masked(real)))
    plain, with_padding, with_text = results
    assert torch.equal(plain, with_padding) and relative_error(with_text, plain) > 1e-4


def test_masks_that_cannot_be_honoured_run_dense_with_a_reason():
    module = comfy_host.module(".nodes.patching.token_layout")
    layout = comfy_host.module(".attention").TokenLayout((2, 8, 8), before=20)
    hide = torch.finfo(torch.float32).min
    mask = torch.zeros(1, 1, 148)
    assert module.with_mask(layout, mask, False) == layout
    mask[..., 12:20] = hide
    mask[..., 3] = hide
    found = module.with_mask(layout, mask, False)
    assert found.hidden == ((3, 4), (12, 20)) and found.attended_tokens == 139
    for wrong in (
        torch.zeros(2, 1, 148),
        torch.zeros(148, 148),
        torch.ones(1, 148, dtype=torch.bool),
    ):
        assert module.with_mask(layout, wrong, False).text == module.MASK_SHAPE.format(
            shape=tuple(wrong.shape)
        )
    for at, value in ((3, -1.0), (3, float("nan")), (30, hide)):
        bad = torch.zeros(1, 1, 148)
        bad[..., at] = value
        assert module.with_mask(layout, bad, False).text == module.MASK_VALUES


def test_layers_are_counted_through_double_and_single_blocks():
    model = load_model("tiny_hunyuan_t2v")
    patched = sparse(model, sparsity=0.6, dense_layers="1, 2")
    sample(patched, steps=2, pooled=True)
    assert report(patched).dense_calls == {"dense layers": 4} and report(patched).sparse_calls == 4
    net, module = model.model.diffusion_model, comfy_host.module(".nodes.patching.model_info")
    layers = module.self_attentions(net, module.model_info(net))
    assert [layers[block] for block in (*net.double_blocks, *net.single_blocks)] == [
        (("double", 0), 0), (("double", 1), 1), (("single", 0), 2), (("single", 1), 3)
    ]  # fmt: skip
    assert len(layers) == module.model_info(net).num_layers == 4


def test_removing_the_node_gives_bit_identical_frames():
    model = load_model("tiny_hunyuan_t2v")
    never = sample(model, steps=2, pooled=True)
    sample(sparse(model), steps=2, pooled=True)
    assert torch.equal(sample(model, steps=2, pooled=True), never)
    assert torch.equal(sample(sparse(model, backend="dense"), steps=2, pooled=True), never)


@pytest.mark.parametrize("method", ["rola", "sla"])
def test_weights_of_a_wan_model_are_refused(method):
    from support.host.sampling import own_adapter

    with pytest.raises(ValueError, match="HunyuanVideo has 4 layers, 2 heads of 128"):
        sparse(load_model("tiny_hunyuan_t2v"), adapter=own_adapter(method, layers=4))


@pytest.mark.parametrize("method", ["ropeslr", "top-k plain"])
def test_tokens_around_the_video_cost_no_whole_pass(method, monkeypatch):
    """As many passes over whole tensors as Wan makes, with text and with padded text.

    At 118,800 tokens x 24 heads of 128 in bfloat16 one pass is 0.73 GB, in every layer and step.
    """
    # A probe gathers all keys for a few queries, one head at a time.
    settings = dict(
        method=method,
        sparsity=0.6,
        allocation="uniform",
        calibrate="first step",
        calibrate_rows=16,  # fewer than there are tokens
    )
    counted = count_passes(monkeypatch)
    sample(sparse(load_model("tiny_wan21_t2v"), **settings), steps=2)
    wan = list(counted)
    # What gathers the kept blocks is the method's own work, on the portable path.
    assert len(wan) == 4 and all(set(each) <= {"index_select"} for each in wan), wan
    for real in (20, 12):
        counted.clear()
        patched = sparse(load_model("tiny_hunyuan_t2v"), **settings)
        run(patched, masked(real))
        assert report(patched).sparse_calls == len(counted) == 8
        first, later = (wan[0], wan[-1]) if method == "ropeslr" else (wan[0], wan[0])
        assert all(each in (first, later) for each in counted), (real, counted, wan)
