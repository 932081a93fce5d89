"""The nodes around adapters, and how weights, hooks and positions live inside ComfyUI."""

import gc
import importlib
import os
import weakref
from pathlib import Path

import pytest
import torch

import comfy_host
from support.data import checkpoints
from support.data.fields import relative_error
from support.host.sampling import (
    SETTINGS,
    k_sample,
    load_model,
    own_adapter,
    report,
    sample,
    sparse,
)

MODELS = Path(os.environ["ROPESLR_TEST_BASE"]) / "models"
SPARKWAN = "made_nodes_sparkwan.pth"


def folder_paths():
    comfy_host.pack()
    return importlib.import_module("folder_paths")


def load_sparkwan(name=SPARKWAN, **widgets):
    checkpoints.save(checkpoints.sparkwan(), MODELS / "diffusion_models" / name, "net.")
    return comfy_host.run_node("RoPeSLRLoadSparseCheckpoint", checkpoint=name, **widgets)


def texts(width=4096):
    return [
        [[torch.randn(1, 20, width, generator=torch.Generator().manual_seed(seed)), {}]]
        for seed in (1, 2)
    ]


def run(model, steps=2, width=4096):
    positive, negative = texts(width)
    return k_sample(model, positive, negative, torch.zeros(1, 16, 5, 16, 16), steps=steps)


# Load and save


@pytest.mark.parametrize("method", ["ropeslr", "rola", "sla"])
def test_saved_and_loaded_by_the_nodes_it_samples_the_same_bits(method, adapter_folder):
    model, adapter = load_model("tiny_wan21_t2v"), own_adapter(method)
    comfy_host.run_node("RoPeSLRSaveAdapter", adapter=adapter, name="folder/mine")
    assert (adapter_folder / "folder" / "mine.safetensors").is_file()
    (loaded,) = comfy_host.run_node(
        "RoPeSLRLoadAdapter", adapter_name=os.path.join("folder", "mine.safetensors")
    )
    assert torch.equal(
        sample(sparse(model, adapter=loaded)), sample(sparse(model, adapter=adapter))
    )


def test_nothing_is_ever_overwritten(adapter_folder):
    for _ in range(3):
        comfy_host.run_node(
            "RoPeSLRSaveAdapter", adapter=own_adapter("sla"), name="mine.safetensors"
        )
    names = sorted(path.name for path in adapter_folder.iterdir())
    assert names == ["mine.safetensors", "mine_00002.safetensors", "mine_00003.safetensors"]


LONGEST = 216  # bytes, with room for a number and for what a save writes first
PART, CHARACTER, END = (
    "it has the part",
    "it has a control character or one of",
    "ends with a dot or a space",
)
DEVICE, LONG = "is a device on Windows", f"{LONGEST + 1} bytes long; at most {LONGEST} are possible"


@pytest.mark.parametrize(
    "name, why",
    [
        *((name, "it is empty") for name in ("", "  ")),
        *(
            (name, PART)
            for name in (
                ".",
                "..",
                "../mine",
                "a/../../mine",
                "/etc/mine",
                "..\\mine",
                "a\\..\\..\\mine",
            )
        ),
        *((name, PART) for name in ("a//b", "a/./b", "mine/")),
        *(
            (name, CHARACTER)
            for name in ("C:/mine", "C:mine", "mi\nne", "mi\x00ne", "nul?", "a|b", "<mine>")
        ),
        *((name, END) for name in ("mine.", "a /mine")),
        *(
            (name, DEVICE)
            for name in (
                "con",
                "NUL",
                "wan/COM1",
                "aux.wan",
                "aux.safetensors",
                "lpt\u00b9",
                "prn/mine",
            )
        ),
        *(
            (name, LONG)
            for name in (
                "x" * (LONGEST + 1),
                "\u00e9" * (LONGEST // 2) + "x",
                "x" * (LONGEST + 1) + "/mine",
            )
        ),
        ("mine \ud800", "half of a character"),
        ("x" * 1_000_000, "1,000,000 bytes long"),
        ("a/" * 3000 + "mine", "the file system does not take it (File name too long)"),
        ("taken/mine", "its subfolder is a file"),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_a_name_that_cannot_be_saved_is_refused_before_the_run(name, why, adapter_folder):
    (adapter_folder / "taken").touch()
    before = sorted(adapter_folder.parent.parent.rglob("*"))
    with pytest.raises(ValueError, match="cannot be used: .*. Write a plain file name") as caught:
        comfy_host.run_node("RoPeSLRSaveAdapter", adapter=own_adapter("sla"), name=name)
    assert (
        why in str(caught.value)
        and len(str(caught.value)) < 500
        and str(caught.value).isprintable()
    )
    node = comfy_host.boot().NODE_CLASS_MAPPINGS["RoPeSLRSaveAdapter"]
    assert node.validate_inputs(name=name) == str(caught.value)
    assert sorted(adapter_folder.parent.parent.rglob("*")) == before
    if len(name) > LONGEST or why == "half of a character":
        return  # nor is there such a file to load
    with pytest.raises((FileNotFoundError, ValueError)):
        comfy_host.run_node("RoPeSLRLoadAdapter", adapter_name=name or "missing.safetensors")


@pytest.mark.parametrize(
    "name", ["x" * LONGEST, "\u00e9" * (LONGEST // 2), "console", "com10", "a" * 200 + "/mine"]
)
def test_the_longest_name_that_is_accepted_can_be_saved_again_and_again(name, adapter_folder):
    node = comfy_host.boot().NODE_CLASS_MAPPINGS["RoPeSLRSaveAdapter"]
    for number in ("", "_00002"):
        assert node.validate_inputs(name=name) is True
        comfy_host.run_node("RoPeSLRSaveAdapter", adapter=own_adapter("sla"), name=name)
        assert (adapter_folder / f"{name}{number}.safetensors").is_file()


def test_the_list_begins_with_no_adapter_and_shows_no_other_files(adapter_folder):
    for name in ("b.safetensors", "readme.md", "c.pth"):
        (adapter_folder / name).touch()
    node = comfy_host.boot().NODE_CLASS_MAPPINGS["RoPeSLRLoadAdapter"]
    (combo,) = (each for each in node.GET_SCHEMA().inputs if each.id == "adapter_name")
    assert combo.options == ["none (training-free)", "b.safetensors"]
    assert comfy_host.run_node("RoPeSLRLoadAdapter", adapter_name="none (training-free)") == (None,)
    with pytest.raises(ValueError, match="no adapter to save"):
        comfy_host.run_node("RoPeSLRSaveAdapter", adapter=None, name="mine")


def test_a_folder_that_a_person_has_set_up_stays_and_stays_first(monkeypatch):
    paths, folders = folder_paths(), comfy_host.module(".nodes.folders")
    own = str(Path(paths.models_dir) / "ropeslr")
    # From a yaml.
    monkeypatch.setitem(paths.folder_names_and_paths, "ropeslr", (["/mnt/mine"], set()))
    folders.register()
    assert paths.folder_names_and_paths["ropeslr"] == (["/mnt/mine", own], {".safetensors"})
    folders.register()
    assert paths.folder_names_and_paths["ropeslr"][0] == ["/mnt/mine", own]
    # From another pack.
    monkeypatch.setitem(paths.folder_names_and_paths, "ropeslr", (["/mnt/mine"], {".sft"}))
    folders.register()
    assert paths.folder_names_and_paths["ropeslr"][1] == {".sft"}
    monkeypatch.delitem(paths.folder_names_and_paths, "ropeslr")
    folders.register()
    assert paths.folder_names_and_paths["ropeslr"] == ([own], {".safetensors"})


def test_a_file_written_anew_is_loaded_anew(adapter_folder):
    node = comfy_host.boot().NODE_CLASS_MAPPINGS["RoPeSLRLoadAdapter"]
    comfy_host.run_node("RoPeSLRSaveAdapter", adapter=own_adapter("sla"), name="mine")
    path = adapter_folder / "mine.safetensors"
    first = node.fingerprint_inputs(adapter_name=path.name)
    assert node.fingerprint_inputs(adapter_name=path.name) == first
    os.utime(path, ns=(1, 1))
    assert node.fingerprint_inputs(adapter_name=path.name) != first


@pytest.mark.parametrize("rank", [8, 24])
def test_the_rank_of_both_nodes_acts_at_once(rank, adapter_folder):
    model = load_model("tiny_wan21_t2v")
    comfy_host.run_node("RoPeSLRSaveAdapter", adapter=own_adapter("ropeslr"), name="mine")
    cut, whole = (
        comfy_host.run_node("RoPeSLRLoadAdapter", adapter_name="mine.safetensors", rank=each)[0]
        for each in (rank, 0)
    )
    by_loader, by_node = sparse(model, adapter=cut), sparse(model, adapter=whole, rank=rank)
    assert torch.equal(sample(by_loader), sample(by_node))
    full = sparse(model, adapter=whole)
    sample(full)
    assert report(by_node).spent_tflop < report(full).spent_tflop


# Load Sparse Checkpoint


def test_a_converted_checkpoint_is_the_same_model_and_loads_by_itself():
    name = "made_convert_sparkwan.pth"
    out = MODELS / "diffusion_models" / "made_convert_sparkwan-comfyui.safetensors"
    out.unlink(missing_ok=True)
    model, adapter = load_sparkwan(name, save_converted=True)
    assert out.is_file()
    stamp = out.stat().st_mtime_ns
    again, same = comfy_host.run_node(
        "RoPeSLRLoadSparseCheckpoint", checkpoint=out.name, save_converted=True
    )
    assert out.stat().st_mtime_ns == stamp and not list(out.parent.glob("*-comfyui-comfyui*"))
    assert same.info == adapter.info
    assert torch.equal(run(sparse(again, adapter=same)), run(sparse(model, adapter=adapter)))


def test_a_progress_bar_counts_the_tensors(monkeypatch):
    import comfy.utils

    seen = []
    monkeypatch.setattr(
        comfy.utils.ProgressBar,
        "update_absolute",
        lambda bar, value, total=None, *rest: seen.append((value, total)),
    )
    load_sparkwan()
    assert (
        seen
        and seen[-1][0] == seen[-1][1] == len(seen)
        and [value for value, _ in seen] == sorted(value for value, _ in seen)
    )


def test_comfyui_can_make_a_second_untouched_copy_of_the_model():
    """Compiling nodes and several GPUs ask the patcher for it."""
    model, _ = load_sparkwan()
    make, arguments = model.cached_patcher_init
    copy = make(*arguments, disable_dynamic=True)
    key = "diffusion_model.blocks.0.self_attn.q.weight"
    assert copy.model is not model.model
    assert torch.equal(copy.model.state_dict()[key], model.model.state_dict()[key])


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_weights_in_eight_bits_run_with_the_adapter(dtype):
    model, adapter = load_sparkwan(weight_dtype=dtype)
    patched = sparse(model, adapter=adapter)
    assert torch.isfinite(run(patched)).all() and report(patched).sparse_calls == 4


def test_a_second_copy_of_the_weights_can_be_made_for_another_gpu():
    patched = sparse(load_model("tiny_wan21_t2v"), adapter=own_adapter("rola"))
    (patcher,) = patched.get_additional_models_with_key("ropeslr")
    make, arguments = patcher.cached_patcher_init
    for copy in (make(*arguments), make(*arguments, disable_dynamic=True)):
        assert copy.model is not patcher.model
        pairs = zip(copy.model.parameters(), patcher.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert (patcher.load_device, patcher.offload_device) == (
        patched.load_device,
        patched.offload_device,
    )


def test_a_linked_name_does_not_load_everything_anew_at_each_queue():
    """ComfyUI hands linked widgets as None, and takes an error for "changed"."""
    mapping = comfy_host.boot().NODE_CLASS_MAPPINGS
    assert mapping["RoPeSLRLoadSparseCheckpoint"].fingerprint_inputs(checkpoint=None) == ""
    assert (
        mapping["RoPeSLRLoadAdapter"].fingerprint_inputs(adapter_name=None)
        == "none (training-free)"
    )


def test_a_converted_file_that_cannot_be_written_does_not_cost_the_run(monkeypatch, caplog):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    model, adapter = load_sparkwan("made_full_sparkwan.pth", save_converted=True)
    assert (
        "made_full_sparkwan-comfyui.safetensors needs 0.0 GB; " in caplog.text
        and "0.0 GB free" in caplog.text
    )
    assert torch.isfinite(run(sparse(model, adapter=adapter))).all()
    assert not list((MODELS / "diffusion_models").glob("made_full_sparkwan-comfyui*"))


def test_a_disk_that_fills_while_the_converted_file_is_written_does_not_cost_the_run(caplog):
    """The free space was enough when the write began; safetensors raises an error of its own."""
    resource = pytest.importorskip("resource")
    name = "made_filling_sparkwan.pth"
    load_sparkwan(name)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        model, adapter = comfy_host.run_node(
            "RoPeSLRLoadSparseCheckpoint", checkpoint=name, save_converted=True
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    (said,) = (text for text in warnings if "RoPeSLR" in text)
    assert (
        "made_filling_sparkwan-comfyui.safetensors could not be written to " in said
        and "File too large" in said
    )
    assert torch.isfinite(run(sparse(model, adapter=adapter))).all()
    assert list((MODELS / "diffusion_models").glob("made_filling_sparkwan*")) == [
        MODELS / "diffusion_models" / name
    ]


def test_an_adapter_of_another_model_is_refused_with_both_named():
    with pytest.raises(ValueError) as caught:
        sparse(load_model("tiny_wan21_t2v"), adapter=own_adapter("ropeslr", layers=3, heads=4))
    for word in (
        "random.safetensors",
        "3 layers, 4 heads of 128",
        "WanModel has 2 layers, 2 heads",
        "disconnect",
    ):
        assert word in str(caught.value)
    with pytest.raises(ValueError, match="method is sla, but the adapter was trained for rola"):
        sparse(load_model("tiny_wan21_t2v"), method="sla", adapter=own_adapter("rola"))


def test_a_method_without_its_weights_and_weights_without_use_are_said(caplog):
    model = load_model("tiny_wan21_t2v")
    for settings, words in (
        (dict(method="rola"), "rola has no adapter"),
        (dict(method="sla"), "only block-sparse attention runs"),
        (
            dict(method="adaspa", adapter=own_adapter("rola")),
            "adaspa takes no adapter; 'rola.safetensors'",
        ),
        (dict(adapter=own_adapter("sla", size=0.0)), "the projection in 'sla.safetensors' is zero"),
    ):
        caplog.clear()
        sparse(model, **settings)
        assert words in caplog.text, settings


def test_an_adapter_on_a_model_that_stays_dense_changes_nothing():
    model, flat = load_model("tiny_hunyuan_image"), dict(channels=64, latent=(16, 16))
    patched = sparse(model, adapter=own_adapter("rola"))
    assert (
        torch.equal(sample(patched, **flat), sample(model, **flat))
        and report(patched).sparse_calls == 0
    )


@pytest.mark.parametrize("adapter, first", [(None, 1), ("ropeslr", 1), ("rola", 0), ("sla", 0)])
def test_weights_that_were_trained_sparse_need_no_dense_first_step(adapter, first):
    """Few-step runs would lose a third of what they gain."""
    patched = sparse(
        load_model("tiny_wan21_t2v"), adapter=adapter and own_adapter(adapter), dense_first_steps=-1
    )
    sample(patched, steps=3)
    assert report(patched).dense_calls == ({"dense first steps": 2} if first else {})


def test_calibration_stays_off_with_an_adapter_unless_it_is_asked_for():
    model, adapter = load_model("tiny_wan21_t2v"), own_adapter("ropeslr")
    for calibrate, expected in (("auto", 0), ("off", 0), ("refine", 2), ("every step", 6)):
        patched = sparse(model, adapter=adapter, calibrate=calibrate)
        sample(patched, steps=3)
        assert report(patched).calibrations == expected, calibrate


def test_the_variant_of_sla_takes_effect():
    """With blocks enough that a tenth of them is one."""
    model, adapter = load_model("tiny_wan21_t2v"), own_adapter("sla")
    found = [
        sample(
            sparse(model, adapter=adapter, sparsity=0.5, sla_variant=variant), latent=(11, 16, 16)
        )
        for variant in ("released", "paper")
    ]
    assert relative_error(*found) > 1e-3


# Weights, hooks, positions


def hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.model.diffusion_model.modules())


def test_weights_are_loaded_with_the_model_and_freed_with_it():
    import comfy.model_management as management

    model = load_model("tiny_wan21_t2v")
    patched = sparse(model, adapter=own_adapter("rola"))
    (patcher,) = patched.get_additional_models_with_key("ropeslr")
    loaded = []

    def watch(executor, *args, **kwargs):
        loaded.append([each.model for each in management.current_loaded_models])
        return executor(*args, **kwargs)

    from comfy.patcher_extension import WrappersMP

    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", watch)
    sample(patched)
    assert all(patcher in models for models in loaded) and len(loaded) == 3
    assert patcher.model_size() == sum(p.numel() * 4 for p in patcher.model.parameters())
    management.unload_all_models()
    assert patcher not in [each.model for each in management.current_loaded_models]
    first = sample(patched)
    again = sparse(patched, method="top-k")  # a later node without weights
    assert again.get_additional_models_with_key("ropeslr") == []
    gone = weakref.ref(patcher.model)
    loaded.clear()
    del patched, patcher, again
    management.unload_all_models()
    management.cleanup_models_gc()
    gc.collect()
    assert gone() is None
    assert torch.equal(first, sample(sparse(model, adapter=own_adapter("rola"))))


def test_partly_loaded_weights_and_a_lora_give_the_same(monkeypatch):
    """As with little memory: layers stay where they are, and the LoRA is added as they run."""
    import comfy.model_management as management
    from comfy.patcher_extension import WrappersMP

    patch = {
        "diffusion_model.blocks.0.self_attn.q.weight": (
            torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 0.02,
        )
    }
    model = load_model("tiny_wan21_t2v")
    model = model.clone()
    model.add_patches(patch, 1.0)
    expected = sample(sparse(model, adapter=own_adapter("rola")))
    management.unload_all_models()  # or the LoRA would stand in the weights already
    low, seen = sparse(model, adapter=own_adapter("rola")), []

    def load(models, **_):
        for each in models:
            each.patch_model(device_to=each.load_device, lowvram_model_memory=1)

    def watch(executor, *args, **kwargs):
        seen.append(executor.class_obj.model_lowvram)
        return executor(*args, **kwargs)

    low.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", watch)
    monkeypatch.setattr(management, "load_models_gpu", load)
    assert relative_error(sample(low), expected) < 1e-5
    assert seen == [True] * 3
    low.unpatch_model()


@pytest.mark.parametrize("method", ["rola", "ropeslr"])
def test_hooks_live_for_one_run_and_no_longer(method, monkeypatch):
    model = load_model("tiny_wan21_t2v")
    patched = sparse(model, adapter=own_adapter(method))
    seen = []
    layer = model.model.diffusion_model.blocks[0].self_attn
    real = layer.forward
    monkeypatch.setattr(
        layer, "forward", lambda *a, **k: seen.append(hooks(model)) or real(*a, **k)
    )
    sample(patched)
    assert seen == [2, 2, 2] and hooks(model) == 0

    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer, "forward", broken)
    with pytest.raises(KeyboardInterrupt):
        sample(patched)
    assert hooks(model) == 0


def test_methods_that_need_no_inputs_hold_none(monkeypatch):
    """A hidden state is as large as a layer's activations."""
    entering, held = comfy_host.module(".nodes.patching.hooks").EnteringLayer, []
    real = entering.layer_of
    monkeypatch.setattr(
        entering, "layer_of", lambda self, *given: held.append(self._x) or real(self, *given)
    )
    for settings in (dict(), dict(method="adaspa"), dict(adapter=own_adapter("sla"))):
        sample(sparse(load_model("tiny_wan21_t2v"), **settings))
    assert held and all(x is None for x in held)
    sample(sparse(load_model("tiny_wan21_t2v"), adapter=own_adapter("rola")))
    assert any(x is not None for x in held)


@pytest.mark.parametrize("method", ["ropeslr", "rola"])
def test_a_layer_that_is_called_past_every_hook_runs_dense_with_one_reason(method, monkeypatch):
    """As a node does that calls the attention's forward by itself."""
    import comfy.ldm.wan.model as wan

    real = wan.WanSelfAttention.__call__
    monkeypatch.setattr(
        wan.WanSelfAttention, "__call__", lambda self, *a, **k: self.forward(*a, **k)
    )
    model = load_model("tiny_wan21_t2v")
    dense = sample(model)
    settings = dict(adapter=own_adapter("rola")) if method == "rola" else {}
    patched = sparse(model, **settings)
    assert torch.equal(sample(patched), dense)
    ((reason, count),) = report(patched).dense_calls.items()
    assert count == 6 and "not through their self-attention module" in reason
    with pytest.raises(RuntimeError, match="this run cannot be sparse: 2 of 2 layers"):
        sample(sparse(model, strict=True, **settings))
    monkeypatch.setattr(wan.WanSelfAttention, "__call__", real)
    sample(patched)
    assert report(patched).sparse_calls == 6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shift_t": 3.0, "shift_x": 1.5},
        {"scale_t": 0.5, "scale_y": 2.0, "scale_x": 1.25, "shift_y": -2.0},
    ],
)
def test_queries_are_turned_back_by_the_models_own_angles(options):
    """Whatever stretches or shifts the model's RoPE, what comes out is the query before it."""
    from comfy.ldm.flux.math import apply_rope1

    inputs = comfy_host.module(".nodes.patching.hooks")
    positions = comfy_host.module(".attention.rope")
    model = load_model("tiny_wan21_t2v").model.diffusion_model
    for grid in ((5, 8, 8), (3, 5, 9), (1, 16, 9)):
        freqs = model.rope_encode(
            grid[0],
            2 * grid[1],
            2 * grid[2],
            dtype=torch.float32,
            transformer_options={"rope_options": options},
        )
        tokens = grid[0] * grid[1] * grid[2]
        q = torch.randn(1, tokens, 2, 128, generator=torch.Generator().manual_seed(0))
        read = inputs.read_rope(freqs, tokens)
        turned = apply_rope1(q, freqs)
        even, odd = turned[..., 0::2], turned[..., 1::2]
        cos, sin = (part[None, :, None] for part in read)
        back = torch.stack((even * cos + odd * sin, odd * cos - even * sin), dim=-1).flatten(-2)
        torch.testing.assert_close(back, q, rtol=0, atol=1e-5)
        half = positions.rounded_angles(read, grid, torch.bfloat16)
        exact = positions.rounded_angles(read, grid, torch.float32)
        assert (torch.remainder(half - exact + torch.pi, 2 * torch.pi) - torch.pi).abs().max() < 0.5
    assert inputs.read_rope(freqs, tokens + 1) is None and inputs.read_rope(None, 4) is None


@pytest.mark.parametrize(
    "options, matters", [(dict(scale_t=0.5), True), (dict(shift_x=4.0), False)]
)
def test_stretched_rope_reaches_the_adapter(options, matters):
    """ComfyUI's own node shifts the positions; only distances count, if q and k shift alike."""
    model, adapter = load_model("tiny_wan21_t2v"), own_adapter("rola")
    (stretched,) = comfy_host.run_node(
        "ScaleROPE",
        model=sparse(model, adapter=adapter),
        **{
            "scale_x": 1.0,
            "shift_x": 0.0,
            "scale_y": 1.0,
            "shift_y": 0.0,
            "scale_t": 1.0,
            "shift_t": 0.0,
        }
        | options,
    )
    found = sample(stretched)
    assert torch.isfinite(found).all() and report(stretched).sparse_calls == 6
    assert (relative_error(found, sample(sparse(model, adapter=adapter))) > 1e-4) is matters


@pytest.mark.parametrize(
    "method, node_first",
    [
        pytest.param("rola", False, marks=pytest.mark.slow),
        pytest.param("rola", True, marks=pytest.mark.slow("thorough")),
        pytest.param("ropeslr", True, marks=pytest.mark.slow("thorough")),
        pytest.param("adaspa", False, marks=pytest.mark.slow("thorough")),
    ],
)
def test_a_compiled_model_runs_with_an_adapter_and_recompiles_nothing(method, node_first):
    import torch._dynamo.utils as dynamo

    from support.host.compiling import compiled

    torch.compiler.reset()
    model = load_model("tiny_wan21_t2v")
    adapter = None if method == "adaspa" else own_adapter(method)
    compiled_dense = compiled(model)
    settings = dict(method=method, adapter=adapter, sparsity=0.6)
    patched = (
        compiled(sparse(model, **settings)) if node_first else sparse(compiled_dense, **settings)
    )
    dense, expected = sample(model), sample(sparse(model, **settings))
    assert relative_error(sample(compiled_dense), dense) < 1e-5
    assert relative_error(sample(patched), expected) < 1e-5
    graphs = dynamo.counters["stats"]["unique_graphs"]
    for _ in range(2):
        assert relative_error(sample(patched), expected) < 1e-5
        assert report(patched).sparse_calls == 6
    assert dynamo.counters["stats"]["unique_graphs"] == graphs
    assert relative_error(sample(compiled_dense), dense) < 1e-5
    torch.compiler.reset()


def test_two_samplers_with_one_adapter_do_not_disturb_each_other():
    adapter = own_adapter("rola")
    models = [
        sparse(load_model(file), adapter=adapter, sparsity=s)
        for file, s in (("tiny_wan21_t2v", 0.5), ("tiny_wan22_t2v_low_noise", 0.8))
    ]
    alone = [sample(model) for model in models]
    assert all(torch.equal(sample(model), expected) for model, expected in zip(models, alone))
    assert SETTINGS["dense_first_steps"] == 0
