"""Every variant by every training-free method: no error, the expected number of sparse calls.

`python dev.py coverage` writes what is found to the record that docs/models.md shows.
"""

import json
import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import comfy_host
from support.data.fields import relative_error
from support.data.variants import VARIANTS
from support.host.sampling import full_density, own_adapter, report, sparse

RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "coverage.json"
TRAINING_FREE = ("ropeslr", "top-k", "adaspa")
# Variant -> method -> [sparse, all calls of one model call], or the reason.
FOUND = defaultdict(dict)
SPARSE = [name for name, variant in VARIANTS.items() if variant.dense is None]


@pytest.fixture(params=SPARSE)
def variant(request):
    """(name, variant, model) of one that can run sparse."""
    found = VARIANTS[request.param]
    if found.missing():
        pytest.skip(found.missing())
    return request.param, found, found.model()


def check(name, variant, patched, method, sampled, dense, calls):
    last = report(patched)
    assert torch.isfinite(sampled).all() and 1e-5 < relative_error(sampled, dense) < 0.5
    assert last.sparse_calls == calls * last.model_calls, last.summary()
    assert FOUND[name].setdefault(method, [calls, variant.calls]) == [calls, variant.calls]
    return last


@pytest.mark.parametrize(
    "cfg, size",
    [
        (1.0, "even"),
        pytest.param(5.0, "odd", marks=pytest.mark.slow),
        pytest.param(5.0, "even", marks=pytest.mark.slow("thorough")),
        pytest.param(1.0, "odd", marks=pytest.mark.slow("thorough")),
    ],
)
def test_methods_without_weights(variant, cfg, size):
    name, variant, model = variant
    latent = getattr(variant, size)
    dense = variant.sample(model, latent, cfg)
    for method in TRAINING_FREE:
        patched = sparse(model, method=method, sparsity=0.6)
        last = check(
            name,
            variant,
            patched,
            method,
            variant.sample(patched, latent, cfg),
            dense,
            variant.calls,
        )
        assert not last.dense_calls and last.density < 1


@pytest.mark.parametrize(
    "method, cfg, size",
    [
        ("rola", 1.0, "even"),
        pytest.param("sla", 5.0, "odd", marks=pytest.mark.slow),
        pytest.param("rola", 5.0, "odd", marks=pytest.mark.slow("thorough")),
        pytest.param("sla", 1.0, "even", marks=pytest.mark.slow("thorough")),
    ],
)
def test_methods_with_weights(variant, method, cfg, size):
    """An adapter of the model's own layers; VACE's control blocks have none, and say so."""
    name, variant, model = variant
    if not variant.trained:
        pytest.skip("no such weights are published")
    latent = getattr(variant, size)
    dense = variant.sample(model, latent, cfg)
    layers = len(model.model.diffusion_model.blocks)
    patched = sparse(model, method=method, sparsity=0.6, adapter=own_adapter(method, layers))
    sampled = variant.sample(patched, latent, cfg)
    last = check(name, variant, patched, method, sampled, dense, variant.calls - variant.control)
    assert sum(last.dense_calls.values()) == variant.control * last.model_calls
    assert all("has no weights for control blocks" in reason for reason in last.dense_calls)


def test_every_block_kept_is_dense(variant, monkeypatch, thorough):
    full_density(monkeypatch)
    _, variant, model = variant
    dense = variant.sample(model, variant.even, 1.0)
    orders = (("cube", "64"), ("cube", "16"), ("raster", "64"), ("raster", "16"))
    for order, key_block in orders if thorough else orders[:2]:
        patched = sparse(model, sparsity=0.0, block_order=order, key_block=key_block)
        assert relative_error(variant.sample(patched, variant.even, 1.0), dense) < 1e-5
        assert report(patched).density == 1.0 and not report(patched).dense_calls


@pytest.mark.parametrize("size", [pytest.param("even", marks=pytest.mark.slow("thorough")), "odd"])
def test_the_video_lies_where_the_layout_says(variant, size, monkeypatch):
    """Each axis's first angle in the model's own RoPE changes along that axis, and no other."""
    name, variant, model = variant
    if name == "Mochi":
        pytest.skip("its RoPE mixes the axes, by learned weights")
    layouts, angles = [], []
    sequence = comfy_host.module(".nodes.patching.token_layout").SequenceInfo
    original = sequence.layout

    def layout(self, *args):
        layouts.append(original(self, *args))
        return layouts[-1]

    def rope(module, args, kwargs):
        angles.append(rope_angles(args, kwargs))

    monkeypatch.setattr(sequence, "layout", layout)
    net = model.model.diffusion_model
    info = comfy_host.module(".nodes.patching.model_info")
    first = next(iter(info.self_attentions(net, info.model_info(net))))
    handle = first.register_forward_pre_hook(rope, with_kwargs=True)
    try:
        variant.sample(sparse(model, sparsity=0.6), getattr(variant, size), 1.0, steps=1)
    finally:
        handle.remove()
    (found,) = set(layouts)
    axes = AXES.get(type(net).__name__, WAN_AXES)
    before = 0 if len(angles[0]) == found.video_tokens else found.before
    grid = angles[0][before : before + found.video_tokens].unflatten(0, found.grid)
    for axis, pair in enumerate(axes):
        own = grid[..., pair].movedim(axis, -1)
        assert (own == own[0, 0]).all(), f"{name}: axis {axis} is not where {found} says"
        assert len(own[0, 0].unique()) == found.grid[axis]


# The first pair of channels that each axis turns: of 22/21/21 pairs, 8/28/28, and so on.
WAN_AXES = 0, 22, 43
AXES = {
    "HunyuanVideo": (0, 8, 36),
    "MiniMaxH3Model": (0, 16, 32),
    "LTXVModel": (2, 3, 4),
    "LTXAVModel": (2, 3, 4),
    "Kandinsky5": (0, 8, 20),
    "MiniTrainDIT": (0, 22, 43),
    "CogVideoXTransformer3DModel": (0, 16, 40),  # channels, not pairs
}


def rope_angles(args, kwargs):
    """`(tokens, pairs)`, as a self-attention (or a block) of any model is told of them.

    CogVideoX: those of the video alone.
    """
    names = ("freqs", "pe", "rope_freqs", "image_rotary_emb", "rope_emb")
    given = next((kwargs[name] for name in names if name in kwargs), None)
    given = args[1] if given is None else given
    if isinstance(given, tuple) and isinstance(given[1], bool):
        given = given[0]
    if isinstance(given, tuple):  # cosines and sines: of each channel, or by head
        angles = torch.atan2(given[1], given[0])
        if len(given) == 2:
            return angles
        return angles[0].movedim(0, 1).flatten(1) if angles.ndim == 4 else angles[0, :, ::2]
    angles = torch.atan2(given[..., 1, 0], given[..., 0, 0])[0]
    return angles.flatten(1) if angles.shape[0] != 1 else angles[0]


@pytest.mark.parametrize("size", ["even", pytest.param("odd", marks=pytest.mark.slow("thorough"))])
def test_what_follows_the_noise_is_the_video(variant, size, monkeypatch):
    """Other noise changes the first layer's queries of all video tokens, and of no other token."""
    name, variant, model = variant
    run_class, seen = comfy_host.module(".attention").AttentionRun, []
    attend = run_class.attend

    def watched(self, q, k, v, call):
        seen.append((q.clone(), call.layout))
        return attend(self, q, k, v, call)

    monkeypatch.setattr(run_class, "attend", watched)
    queries = []
    for seed in (1, 2):
        seen.clear()
        variant.sample(sparse(model, sparsity=0.6), getattr(variant, size), 1.0, steps=1, seed=seed)
        queries.append(seen[0])
    (one, layout), (other, _) = queries
    changed = (one != other).any(dim=-1).any(dim=1)[0]
    video = torch.zeros_like(changed)
    video[layout.before : layout.before + layout.video_tokens] = True
    frames = changed[video].unflatten(0, layout.grid).flatten(1)
    assert not changed[~video].any(), f"{name}: the video reaches beyond {layout}"
    # Some models count frames of references as frames of the video: whole frames, at one end.
    noisy = frames.all(dim=1)
    info = comfy_host.module(".nodes.patching.model_info").model_info(model.model.diffusion_model)
    wanted = -(-getattr(variant, size)[0] // info.patch_size[0])
    assert torch.equal(frames.any(dim=1), noisy) and int(noisy.sum()) == wanted


def test_what_is_not_video_attends_and_is_attended_to_as_before(variant, monkeypatch):
    """Text, references, sound and guides: their rows equal dense attention, however sparse."""
    name, variant, model = variant
    run_class, compared = comfy_host.module(".attention").AttentionRun, []
    attend = run_class.attend

    def watched(self, q, k, v, call):
        out, cost = attend(self, q, k, v, call)
        layout = call.layout
        others = torch.ones(layout.tokens, dtype=torch.bool)
        others[layout.before : layout.before + layout.video_tokens] = False
        if others.any() and not layout.hidden:
            exact = torch.nn.functional.scaled_dot_product_attention(q[:, :, others], k, v)
            compared.append(relative_error(out[:, :, others], exact))
        return out, cost

    monkeypatch.setattr(run_class, "attend", watched)
    variant.sample(sparse(model, sparsity=0.9), variant.even, 1.0)
    assert all(error < 1e-5 for error in compared)
    assert compared or name not in WITH_OTHERS


WITH_OTHERS = {
    "MiniMax H3", "MiniMax H3 with a keyframe", "MiniMax H3 with references",
    "LTX-Video with a guide", "Mochi", "CogVideoX", "CogVideoX 1.5", "HunyuanVideo T2V",
    "Wan with in-context references", "Wan SCAIL",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.dense])
@pytest.mark.parametrize("size", ["even", "odd"])
@pytest.mark.parametrize("method", TRAINING_FREE)
def test_what_cannot_be_sparse_is_untouched_and_has_a_reason(name, method, size):
    variant = VARIANTS[name]
    if variant.missing():
        pytest.skip(variant.missing())
    model, latent = variant.model(), getattr(variant, size)
    patched = sparse(model, method=method)
    assert torch.equal(variant.sample(patched, latent, 5.0), variant.sample(model, latent, 5.0))
    last = report(patched)
    assert (
        last.dense_calls == {variant.dense: variant.calls * last.model_calls}
        and last.sparse_calls == 0
    )
    FOUND[name][method] = variant.dense
    with pytest.raises(RuntimeError, match="strict"):
        sparse(model, method=method, strict=True)


def test_the_matrix_in_the_record_is_what_was_found(request):
    """Only `python dev.py coverage` (by ROPESLR_COVERAGE) writes the record, always whole."""
    import comfyui_version

    version, record = comfyui_version.__version__, json.loads(RECORD.read_text("utf-8"))
    wanted = {
        name: {*TRAINING_FREE, *(("rola", "sla") if variant.trained else ())}
        for name, variant in VARIANTS.items()
        if not variant.missing()
    }
    whole = {name: set(methods) for name, methods in FOUND.items()} == wanted
    if os.environ.get("ROPESLR_COVERAGE"):
        assert whole and not request.session.testsfailed, (
            "the record is written from a whole run without failures"
        )
        record[version] = {name: FOUND[name] for name in VARIANTS if name in FOUND}
        RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
        return
    recorded = record.get(version)
    if recorded is None:
        pytest.skip(f"no record for ComfyUI {version}")
    if whole:
        assert recorded == FOUND, "run `python dev.py coverage`"
    for name, methods in FOUND.items():
        for method, found in methods.items():
            assert recorded.get(name, {}).get(method) == found, (
                f"{name}, {method}: run `python dev.py coverage`"
            )
