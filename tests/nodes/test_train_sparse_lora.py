"""Train Sparse LoRA: what comes out, what stays as it was, and every way to stop and go on."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import comfy_host
from support.data.variants import VARIANTS
from support.host.sampling import conditioning, dense_warnings, load_model, sample, sparse
from support.host.training import SIZE, levels, train, weights

comfy_host.pack()
training = comfy_host.module(".training")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Empty models/loras and models/ropeslr."""
    import folder_paths

    folders = {name: tmp_path / name for name in ("loras", "ropeslr")}
    for name, path in folders.items():
        path.mkdir()
        known = folder_paths.folder_names_and_paths[name]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(path)], known[1]))
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path / "temp"))
    folder_paths.filename_list_cache.clear()
    yield tmp_path
    folder_paths.filename_list_cache.clear()


@pytest.fixture(scope="module")
def wan():
    return load_model("tiny_wan21_t2v")


def with_much_to_learn(model):
    """A MODEL whose runs correct little: of the tiny clip 512 queries would be all that there are."""
    return sparse(model, calibrate_rows=16)


def changed(modules) -> list:
    """Modules that compute otherwise than their class; ComfyUI may leave a method there as a value."""
    own = [(m, getattr(vars(m).get("forward"), "__func__", None)) for m in modules]
    return [
        m
        for m, left in own
        if m._forward_pre_hooks or ("forward" in vars(m) and left is not type(m).forward)
    ]


def stop_after(monkeypatch, checks):
    """A person's button, seen at so many checks."""
    import comfy.model_management as management

    left = [checks]

    def check():
        left[0] -= 1
        if left[0] == 0:
            raise management.InterruptProcessingException

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", check)
    return management.InterruptProcessingException


def test_what_comes_out_plugs_into_comfyuis_own_nodes(wan, folder, caplog):
    """The LoRA loads without a word, changes sparse and dense, and the files say what it is for."""
    caplog.set_level(logging.INFO)
    before, own = weights(wan), sample(wan)
    model = with_much_to_learn(wan)
    lora, losses, steps, adapter = train(model, samples=4, steps=4, evaluate_every=2)
    assert steps == 4 and len(losses["loss"]) == 4 and min(losses["loss"]) > 0
    assert losses["held_out_steps"] == [0, 2, 4] and losses["held_out"][0] == 1.0
    assert adapter.has("allocation") and len(adapter.info.noise_levels) == 3  # the first is dense
    assert not dense_warnings(caplog)
    assert all(torch.equal(each, before[name]) for name, each in wan.model.state_dict().items())
    assert torch.equal(sample(wan), own)
    modules = list(wan.model.modules())
    assert not changed(modules)
    linear = "diffusion_model.blocks.0.self_attn.q"
    assert lora[f"{linear}.lora_up.weight"].shape == (256, 2)
    assert len(lora) == 2 * 4 * 3  # blocks; q, k, v, o; up, down, alpha
    if losses["held_out"][-1] < 1:
        assert any(bool(each.any()) for key, each in lora.items() if "up" in key)
    nodes = comfy_host.boot().NODE_CLASS_MAPPINGS
    loud = {key: each + 0.1 * ("up" in key) for key, each in lora.items()}
    with torch.inference_mode():
        (loaded,) = (
            nodes["LoraModelLoader"]
            .EXECUTE_NORMALIZED(model=wan, lora=loud, strength_model=1.0, bypass=False)
            .result
        )
    assert not [r for r in caplog.records if "not loaded" in r.message]
    assert not torch.equal(sample(loaded), own)
    assert torch.isfinite(sample(sparse(loaded, adapter=adapter, sparsity=0.6))).all()
    on_the_way = folder / "loras" / "sparse_lora_4_steps.safetensors"
    with safe_open(on_the_way, "pt") as file:
        facts = json.loads(file.metadata()["ropeslr_lora"])
        assert facts["method"] == "ropeslr" and facts["sparsity"] == 0.6
        assert "sparsity 0.6 (it computes 40 % of the blocks)" in file.metadata()["ropeslr_use"]
    with safe_open(folder / "ropeslr" / "sparse_lora.safetensors", "pt") as file:
        assert "sparsity 0.6" in file.metadata()["source"]


SLOW = pytest.mark.slow("thorough")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, settings",
    [
        ("HunyuanVideo T2V", dict()),
        ("Wan 2.1 I2V", dict()),
        pytest.param("Wan VACE", dict(), marks=SLOW),
        pytest.param("Wan 2.1 T2V", dict(method="adaspa"), marks=SLOW),
        pytest.param("Wan 2.1 T2V", dict(method="top-k"), marks=SLOW),
        pytest.param("Wan 2.1 T2V", dict(method="top-k plain", allocation="uniform"), marks=SLOW),
        pytest.param("Wan 2.2 TI2V 5B", dict(), marks=SLOW),
        pytest.param("LTX-Video", dict(), marks=SLOW),
        pytest.param("Kandinsky 5", dict(), marks=SLOW),
        pytest.param("Mochi", dict(), marks=SLOW),
        pytest.param("CogVideoX", dict(), marks=SLOW),
    ],
)
def test_every_model_and_method_is_trained(name, settings, caplog):
    """Losses are finite; the weights move; the model is as it was."""
    variant = VARIANTS[name]
    if variant.missing():
        pytest.skip(variant.missing())
    model = variant.model()
    before = variant.sample(model, variant.even, 1.0)
    extra = variant.extra(variant.even)
    lora, losses, _, _ = train(
        model,
        latents=[{"samples": torch.zeros(1, variant.channels, *variant.even)}],
        positive=[conditioning(seed, width=variant.text, **extra) for seed in (1, 3)],
        steps=2,
        **settings,
    )
    assert len(losses["loss"]) == 2 and 0 < losses["loss"][0] < 1e3
    assert lora and all(each.isfinite().all() for each in lora.values())
    assert bool(dense_warnings(caplog)) == bool(variant.control)  # control blocks learn no table
    assert torch.equal(variant.sample(model, variant.even, 1.0), before)


@SLOW
def test_a_model_that_no_gradient_passes_is_refused_in_words():
    """Cosmos in 0.30, whose fused kernel has none; nothing was trained or made for it by then."""
    import comfy.ldm.cosmos.predict2 as cosmos

    if "rms_rope_split_half" not in Path(cosmos.__file__).read_text():
        pytest.skip("this ComfyUI computes Cosmos differentiably")
    with pytest.raises(ValueError, match="A first step of training failed .*knows no gradients"):
        train(VARIANTS["Cosmos Predict2"].model())


def state_of(folder, name="sparse_lora"):
    return training.read_state(folder / "ropeslr" / "training" / f"{name}.state")


@pytest.mark.slow
def test_checkpoints_change_nothing(wan, folder):
    found = []
    for checkpoints in (True, False):
        train(wan, gradient_checkpointing=checkpoints, name=f"c{checkpoints}", seed=3)
        found.append(state_of(folder, f"c{checkpoints}").parameters)
    one, other = found
    assert any(bool(each.any()) for key, each in one.items() if key.endswith("up"))
    for key in one:
        assert torch.allclose(one[key], other[key], atol=1e-5), key


@pytest.mark.parametrize(
    "name", ["Wan 2.1 T2V", pytest.param("HunyuanVideo T2V", marks=pytest.mark.slow)]
)
def test_gradients_are_those_of_the_loss(name, monkeypatch):
    """By differences, with checkpoints: HunyuanVideo's blocks add to their own inputs in place."""
    variant, ratios = VARIANTS[name], []

    def check(run):
        example, parameters = run.material.example(1)._replace(dense=False), run.parameters
        for key in parameters:
            if key.endswith("up"):
                parameters[key].data.normal_(std=0.02)
        run.problem.loss(example).backward()
        for part in ("down", "up"):
            moved = [each for key, each in parameters.items() if key.endswith(part)]
            steps = [1e-2 * each.grad / each.grad.norm() for each in moved]
            expected = sum(float((each.grad * step).sum()) for each, step in zip(moved, steps))
            losses = []
            with torch.no_grad():
                for sign in (1, -2):
                    for each, step in zip(moved, steps):
                        each += sign * step
                    losses.append(float(run.problem.loss(example)))
                for each, step in zip(moved, steps):
                    each += step
            ratios.append((losses[0] - losses[1]) / 2 / expected)
        raise StopIteration

    session = comfy_host.module(".nodes.lora_training.session")
    monkeypatch.setattr(session.Training, "run", check)
    with pytest.raises(StopIteration):
        train(
            variant.model(),
            latents=[{"samples": torch.zeros(1, 16, *variant.even)}],
            positive=[conditioning(1, width=variant.text, **variant.extra(variant.even))],
        )
    assert ratios == pytest.approx([1.0, 1.0], abs=0.02)


@pytest.mark.slow
def test_stopped_anywhere_it_goes_on_to_the_same_lora(wan, folder, monkeypatch):
    """While making videos, finding the table, judging, training; in a process that has forgotten all."""
    settings = dict(steps=4, evaluate_every=2, save_every=3)
    expected = train(wan, name="whole", **settings)
    for checks in (1, 4, 6, 13, 17):
        name = f"stopped{checks}"
        with monkeypatch.context() as patch:
            stopped = stop_after(patch, checks)
            with pytest.raises(stopped):
                train(wan, name=name, **settings)
        assert not (folder / "loras" / f"{name}.safetensors").exists()
        for kept in (folder / "temp").rglob("*.safetensors"):
            kept.unlink()
        lora, losses, steps, _ = train(wan, name=name, **settings)
        assert losses == expected[1] and steps == 4
        assert all(torch.allclose(lora[key], expected[0][key], atol=1e-6) for key in lora)


@pytest.mark.slow
def test_a_name_that_is_taken_gets_a_number_and_the_same_settings_go_on(wan, folder, monkeypatch):
    train(wan, steps=1)
    train(wan, steps=1, learning_rate=1e-3)
    states = sorted(path.name for path in (folder / "ropeslr" / "training").iterdir())
    assert states == ["sparse_lora.state", "sparse_lora_00002.state"]
    _, losses, steps, _ = train(wan, steps=2)
    assert steps == 2 and len(losses["loss"]) == 2
    assert len(states) == len(list((folder / "ropeslr" / "training").iterdir()))
    with monkeypatch.context() as patch:  # what is finished is not begun again
        patch.setattr(comfy_host.module(".nodes.lora_training.data"), "own_samples", None)
        again, losses, steps, adapter = train(wan, steps=2)
        assert steps == 2 and len(losses["loss"]) == 2 and adapter.has("allocation") and again
    train(wan, steps=2, resume=False)
    assert state_of(folder, "sparse_lora_00003").step == 2
    saved = sorted(path.name for path in (folder / "loras").glob("sparse_lora_*_steps*"))
    assert saved == [
        "sparse_lora_00002_1_steps.safetensors",
        "sparse_lora_00003_2_steps.safetensors",
        "sparse_lora_1_steps.safetensors",
        "sparse_lora_2_steps.safetensors",
    ]


@pytest.mark.slow
def test_only_the_last_saves_stay(wan, folder):
    train(wan, steps=5, save_every=1, keep_last=2, samples=1)
    names = sorted(path.name for path in (folder / "loras").glob("*_steps*"))
    assert names == ["sparse_lora_4_steps.safetensors", "sparse_lora_5_steps.safetensors"]


@pytest.mark.slow
def test_a_lora_that_is_worse_than_none_changes_nothing(wan, folder, caplog):
    caplog.set_level(logging.INFO)
    lora, losses, _, _ = train(wan, steps=12, learning_rate=1.0, evaluate_every=4, patience=0)
    assert all(error > 1 for error in losses["held_out"][1:])
    assert not any(bool(each.any()) for key, each in lora.items() if "lora_up" in key)
    assert not (folder / "loras" / "sparse_lora.safetensors").exists()
    assert any("No LoRA was better than none" in record.message for record in caplog.records)


def test_held_out_videos_are_sampled_with_the_lora_and_without(wan, folder, caplog, monkeypatch):
    """Once: what is finished is not compared again, and of more steps it is anew."""
    caplog.set_level(logging.INFO)
    comparison = comfy_host.module(".nodes.lora_training.comparison")
    compare, asked = comparison.compare, []

    def counted(sparse, use, videos, *rest):
        asked.append((list(videos), compare(sparse, use, videos, *rest)))
        return asked[-1][1]

    monkeypatch.setattr(comparison, "compare", counted)
    sample(wan)  # another test's LoRA is out of it then
    before, model = weights(wan), with_much_to_learn(wan)
    train(model, steps=2, samples=8)
    assert [numbers for numbers, _ in asked] == [[6, 7]]
    assert all(torch.equal(each, before[name]) for name, each in weights(wan).items())
    (without, with_it), _ = asked[0][1]
    assert without != with_it and state_of(folder, "sparse_lora").apart == asked[0][1]
    assert any("2 videos that it was not trained on" in each.message for each in caplog.records)
    train(model, steps=2, samples=8)
    assert len(asked) == 1
    for kept in (folder / "temp").rglob("*.safetensors"):
        kept.unlink()
    train(model, steps=3, samples=8)
    assert len(asked) == 2 and asked[1][1][0][0] == pytest.approx(without, rel=1e-4)


@pytest.mark.slow
def test_a_lora_whose_videos_are_worse_changes_nothing(wan, folder, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    comparison = comfy_host.module(".nodes.lora_training.comparison")
    assert comparison.gain([(2.0, 1.0), (1.0, 1.0)]) == pytest.approx(1.505, abs=1e-3)
    assert comparison.gain([(0.0, 0.0)]) == 0
    monkeypatch.setattr(comparison, "compare", lambda *_: [(1.0, 1.3), (1.0, 1.2)])
    model, how = with_much_to_learn(wan), dict(steps=2, samples=8, learning_rate=3e-2)
    lora, *_ = train(model, **how)
    assert not any(bool(each.any()) for key, each in lora.items() if "lora_up" in key)
    assert not (folder / "loras" / "sparse_lora.safetensors").exists()
    assert any("1.0 dB further from dense ones" in record.message for record in caplog.records)

    def fails(*_):
        raise RuntimeError("no memory for it")

    monkeypatch.setattr(comparison, "compare", fails)  # costs nothing that was trained
    lora, *_ = train(model, **how, name="unseen")
    assert any(bool(each.any()) for key, each in lora.items() if "lora_up" in key)
    assert (folder / "loras" / "unseen.safetensors").exists()
    assert any("could not be sampled" in record.message for record in caplog.records)


@pytest.mark.slow
def test_finished_videos_and_negative_prompts_are_learned_from(wan):
    videos = [{"samples": torch.randn(2, 16, *SIZE, generator=torch.Generator().manual_seed(1))}]
    prompts = [conditioning(1), conditioning(3)]
    _, losses, _, _ = train(wan, latents=videos, positive=prompts, steps=2)
    _, other, _, _ = train(
        wan, latents=videos, positive=prompts, steps=2, negative=[conditioning(2)], cfg=5.0
    )
    assert losses["loss"][0] != other["loss"][0]  # examples of odd numbers are the negative's


@pytest.mark.slow
def test_a_sampler_that_makes_its_own_steps_is_trained_for(wan):
    """Nobody knows at which noise its states are; its finished videos are learned from."""
    import comfy.samplers

    for name in ("dpm_fast", "uni_pc"):
        _, losses, steps, _ = train(
            wan, sampler=comfy.samplers.sampler_object(name), steps=2, name=name
        )
        assert steps == 2 and 0 < losses["loss"][0] < 1


@pytest.mark.slow
def test_experts_are_trained_on_their_own_part_of_the_noise(folder):
    """One part of a schedule makes no video by itself."""
    model = load_model("tiny_wan22_t2v_low_noise")
    part = levels(model, 6)[3:]
    with pytest.raises(ValueError, match="one expert's part of a schedule"):
        train(model, sigmas=part)
    videos = [{"samples": torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(1))}]
    _, _, _, adapter = train(model, sigmas=part, latents=videos, positive=[conditioning(1)])
    assert adapter.info.noise_levels[-1] <= float(part[0])
    high = load_model("tiny_wan22_t2v_high_noise")
    first = levels(high, 6)[:4]
    _, _, _, adapter = train(
        high, sigmas=first, latents=videos, positive=[conditioning(1)], name="high"
    )
    assert adapter.info.noise_levels[0] == pytest.approx(float(first[2]), abs=1e-3)


@pytest.mark.slow
def test_a_lora_to_begin_with(wan, folder):
    import folder_paths

    train(wan, steps=3, save_every=1, name="first")
    folder_paths.filename_list_cache.clear()
    begun = load_file(folder / "loras" / "first_3_steps.safetensors")
    _, losses, steps, _ = train(wan, steps=1, existing_lora="first_3_steps.safetensors")
    assert steps == 4 and losses["held_out"][0] != 1.0
    assert state_of(folder).facts["existing_lora"] is not None and begun
    with pytest.raises(ValueError, match="of another rank than 4"):
        train(wan, rank=4, existing_lora="first_3_steps.safetensors")


def video(*shape):
    return [{"samples": torch.randn(shape, generator=torch.Generator().manual_seed(0))}]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(positive=[]), "positive has no prompt"),
        (dict(latents=[]), "latents is empty"),
        (dict(latents=video(1, 48, *SIZE)), "48 channels, and this model needs 16"),
        (dict(latents=video(1, 16, *SIZE) + video(1, 16, 3, 16, 16)), "several sizes"),
        (dict(latents=video(3, 16, *SIZE)), "3 videos and 2 prompts"),
        (dict(rank=0), "rank is 0"),
        (dict(steps=0), "steps is 0"),
        (dict(learning_rate=float("nan")), "learning_rate is nan"),
        (dict(sigmas=torch.tensor([1.0])), "sigmas has 1 level"),
        (dict(sparsity=0.0), "no step would be sparse"),
        (dict(name="a/../b"), "has the part '..'"),
        (dict(existing_lora="none.safetensors"), "none.safetensors"),
    ],
)
def test_wrong_input_is_named_before_anything_is_trained(wan, wrong, words, folder):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        train(wan, **wrong)
    assert not list(folder.rglob("*.s*"))


def test_models_that_cannot_be_trained_are_named():
    flux = load_model("tiny_flux")
    with pytest.raises(ValueError, match="This model cannot be trained for sparse attention: Flux"):
        train(flux)


def test_a_full_disk_is_noticed_before_the_work(wan, monkeypatch, folder):
    import shutil

    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="has 0.0 GB left"):
        train(wan)
    assert not list(folder.rglob("*.s*"))


def test_a_size_that_no_memory_holds_is_refused_before_the_work(wan, monkeypatch):
    memory = comfy_host.module(".nodes.lora_training.memory")
    monkeypatch.setattr(memory.comfy.model_management, "get_total_memory", lambda _: 1000)
    with pytest.raises(MemoryError, match="Make the video smaller or shorter, or switch"):
        train(wan, gradient_checkpointing=False)


@pytest.mark.slow
def test_what_fails_in_the_first_step_is_said_in_words(wan, monkeypatch):
    """Rehearsed before videos are made: out of memory, and a model that no gradient passes."""
    session = comfy_host.module(".nodes.lora_training.session")

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(session.Velocity, "loss", full)
        with pytest.raises(MemoryError, match="Nothing was trained yet"):
            train(wan)

    def no_gradient(self, example):
        return torch.zeros((), requires_grad=True)

    with monkeypatch.context() as patch:
        patch.setattr(session.Velocity, "loss", no_gradient)
        with pytest.raises(ValueError, match="No gradient reaches the LoRA"):
            train(wan)
    with pytest.raises(ValueError, match="needs gradient_checkpointing"):
        broken = RuntimeError("modified by an inplace operation")

        def in_place(*_):
            raise broken

        with monkeypatch.context() as patch:
            patch.setattr(session.Velocity, "loss", in_place)
            train(wan, gradient_checkpointing=False)


@pytest.mark.slow
def test_out_of_memory_on_the_way_loses_nothing(wan, monkeypatch, folder):
    session = comfy_host.module(".nodes.lora_training.session")
    loss = session.Velocity.loss

    def full_later(self, example):
        if example.number == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return loss(self, example)

    monkeypatch.setattr(session.Velocity, "loss", full_later)
    with pytest.raises(MemoryError, match="after 2 steps; what was learned is saved"):
        train(wan, steps=4)
    assert state_of(folder).step == 2


@pytest.mark.slow
def test_a_node_of_ours_before_it_counts(wan, folder):
    """Its own settings stay; and it is not there when the teacher speaks."""
    before = sparse(wan, key_block="64", dense_layers="1", backend="dense")
    train(before, steps=1)
    with safe_open(folder / "loras" / "sparse_lora_1_steps.safetensors", "pt") as file:
        assert json.loads(file.metadata()["ropeslr_lora"])["key_block"] == 64


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(sparsity=0.6), None),
        (dict(sparsity=0.6, backend="dense"), None),
        (dict(sparsity=0.8), "trained for sparsity 0.6, and this node has sparsity 0.8"),
        (dict(sparsity=0.6, method="top-k"), "method ropeslr, and this node has method top-k"),
        (dict(sparsity=0.6, allocation="uniform"), "has allocation uniform"),
    ],
)
def test_other_lists_than_a_lora_was_trained_with_are_warned_of(
    wan, settings, words, folder, caplog
):
    trained_for = comfy_host.module(".nodes.trained_for")
    files = comfy_host.module(".nodes.lora_training.files")
    facts = files.LoraFacts("ropeslr", 0.6, "auto", 16, 64, "cube", "", "WanModel")
    path = Path(folder / "loras" / "mine.safetensors")
    comfy_host.module(".attention.adapters").write_safetensors(
        {"a": torch.zeros(1)}, path, facts.header()
    )
    prompt = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "a.safetensors"}},
        "2": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["1", 0], "lora_name": "mine.safetensors"}},
        "3": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["2", 0]}},
        "4": {"class_type": "RoPeSLRSparseAttention", "inputs": {"model": ["3", 0]}},
        "5": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["4", 0], "lora_name": "other.safetensors"}},
    }  # fmt: skip
    plan = comfy_host.module(".attention").SparsePlan(**settings).resolve()
    trained_for.warn_of_other_lists(prompt, "4", plan)
    found = [record.message for record in caplog.records if "'mine.safetensors'" in record.message]
    assert bool(found) == bool(words) and (not words or words in found[0])
    trained_for.warn_of_other_lists(None, "4", plan)
    caplog.clear()  # straight from the node that trains
    widgets = dict(method="auto", sparsity=0.6, allocation="auto", name="new")
    prompt["2"] = {"class_type": "LoraModelLoader", "inputs": {"model": ["1", 0], "lora": ["6", 0]}}
    prompt["6"] = {"class_type": "RoPeSLRTrainSparseLoRA", "inputs": {"model": ["1", 0], **widgets}}
    trained_for.warn_of_other_lists(prompt, "4", plan)
    assert bool([r for r in caplog.records if "'new' was trained for" in r.message]) == bool(words)
    trained_for.warn_of_other_lists({"4": {"inputs": {"model": ["4", 0]}}}, "4", plan)
