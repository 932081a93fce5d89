"""Heads that share blocks in real sampling: learning in dense steps, reports, saving, starting."""

import pytest
import torch

import comfy_host
from support.data.fields import relative_error
from support.host.sampling import (
    load_model,
    report,
    sample,
    sparse,
    two_experts,
)

LONG = (9, 16, 16)  # 576 tokens: 36 key blocks of 16, 9 of 64
MEAN = 9  # blocks of 16 at sparsity 0.75
PLAN = dict(key_block="16", sparsity=0.75)


def by_head(found):
    return [share for head in found.heads["density"] for share in head]


def test_the_dense_first_step_is_learned_from_and_the_second_is_shared():
    model = sparse(load_model("tiny_wan21_t2v"), dense_first_steps=1, **PLAN)
    sample(model, steps=3)
    found = report(model)
    assert found.dense_calls == {"dense first steps": 2}
    assert found.heads["layers"] == 2 and found.heads["heads"] == [0, 1]
    shares = by_head(found)
    assert max(shares) > MEAN / 36 > min(shares)
    assert sum(shares) / len(shares) == pytest.approx(MEAN / 36, abs=1e-3)
    # What was asked is what ran: the mean over heads, layers and steps.
    assert found.density == pytest.approx(MEAN / 36, abs=1e-6)
    assert found.spent_parts["kept blocks"] / found.dense_tflop == pytest.approx(
        (MEAN / 36) * 2 / 3, rel=1e-3
    )
    assert " by head, " in found.summary()
    # Two steps: probed in the dense one, calibrated in both sparse ones.
    assert found.calibrations == 4


def test_without_a_dense_step_the_first_one_is_uniform():
    model = sparse(load_model("tiny_wan21_t2v"), **PLAN)
    sample(model, steps=2)
    found = report(model)
    assert len({tuple(row) for row in found.map["density"]}) == 2
    assert found.map["density"][0] == [MEAN / 36] * 2


def test_uniform_says_nothing_of_heads():
    model = sparse(load_model("tiny_wan21_t2v"), allocation="uniform", **PLAN)
    sample(model, steps=2)
    assert report(model).heads is None and "by head" not in report(model).summary()


@pytest.mark.parametrize("cfg, batch", [(5.0, 1), (1.0, 2), (5.0, 2)])
def test_conditionings_and_videos_learn_by_themselves(cfg, batch):
    model = sparse(load_model("tiny_wan21_t2v"), **PLAN)
    out = sample(model, steps=3, cfg=cfg, batch=batch)
    assert torch.isfinite(out).all()
    shares = by_head(report(model))
    assert sum(shares) / len(shares) == pytest.approx(MEAN / 36, abs=1e-3)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral", "uni_pc"])
def test_any_sampler(sampler):
    model = sparse(load_model("tiny_wan21_t2v"), **PLAN)
    assert torch.isfinite(sample(model, steps=4, sampler=sampler)).all()
    assert report(model).density == pytest.approx(MEAN / 36, abs=1e-6)
    assert report(model).heads is not None


def test_two_experts_learn_apart():
    high, low = two_experts(3, dict(**PLAN), dict(**PLAN))
    for found in (high, low):
        assert found.heads is not None and found.calibrations


def test_sparsity_zero_stays_dense():
    model = load_model("tiny_wan21_t2v")
    assert torch.equal(sample(sparse(model, sparsity=0.0)), sample(model))


def test_an_error_target_decides_the_density():
    densities = []
    for error in (0.5, 0.05, 0.001):
        model = sparse(load_model("tiny_wan21_t2v"), target="error", error=error, **PLAN)
        sample(model, steps=3)
        densities.append(report(model).density)
    assert densities == sorted(densities) and densities[0] < densities[-1]


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(allocation="uniform"), "allocation is uniform"),
        (dict(method="adaspa"), "adaspa does not measure what its heads need"),
    ],
)
def test_an_error_target_that_has_no_effect_is_said(settings, words, caplog):
    sparse(load_model("tiny_wan21_t2v"), target="error", **settings)
    assert f"target is error, but {words}: sparsity decides" in caplog.text


# What a run hands on


def learn(folder, name="learned", **settings):
    model = sparse(load_model("tiny_wan21_t2v"), dense_first_steps=1, **(PLAN | settings))
    latent = sample(model, steps=4)
    comfy_host.run_node("RoPeSLRSaveAdapter", name=name, model=model, latent={"samples": latent})
    assert (folder / f"{name}.safetensors").is_file()
    return model, latent


def loaded(name="learned"):
    return comfy_host.run_node("RoPeSLRLoadAdapter", adapter_name=f"{name}.safetensors")[0]


def test_what_a_run_learned_starts_the_next(adapter_folder):
    model, latent = learn(adapter_folder)
    adapter = loaded()
    info = adapter.info
    assert (info.base_model, info.grid, info.steps) == ("WanModel", (9, 8, 8), 4)
    assert info.block_k == 16 and info.sparsity == pytest.approx(0.75, abs=1e-4)
    assert set(adapter.layer(0)) == {"channel_scale", "gate_slope", "gate_bias", "allocation"}
    start = dict(adapter=adapter, dense_first_steps=1, calibrate="off") | PLAN
    again = sparse(load_model("tiny_wan21_t2v"), **start)
    same = sample(again, steps=4)
    found = report(again)
    assert found.calibrations == 0 and found.heads is not None
    assert found.density == pytest.approx(MEAN / 36, abs=1e-6)
    dense = sample(load_model("tiny_wan21_t2v"), steps=4)
    assert relative_error(same, dense) < 1.2 * relative_error(latent, dense)
    lines = "\n".join(
        comfy_host.module(".attention.adapters").describe(adapter_folder / "learned.safetensors")
    )
    assert "grid          (9, 8, 8)" in lines and "allocation" in lines


def test_refine_learns_on_and_can_be_saved_again(adapter_folder):
    learn(adapter_folder)
    learn(adapter_folder, "again", adapter=loaded())
    assert loaded("again").has("allocation")


def test_a_table_serves_another_size_and_sparsity(adapter_folder):
    learn(adapter_folder)
    model = sparse(load_model("tiny_wan21_t2v"), adapter=loaded(), sparsity=0.9)
    assert torch.isfinite(sample(model, latent=(5, 20, 20), steps=2)).all()
    assert report(model).key_block == 16 and report(model).heads is not None


@pytest.mark.parametrize(
    "settings", [dict(method="top-k"), dict(calibrate="off"), dict(sparsity=0.0)]
)
def test_a_run_that_learned_nothing_to_keep_says_so(settings, adapter_folder):
    model = sparse(load_model("tiny_wan21_t2v"), **(PLAN | settings))
    latent = {"samples": sample(model, steps=2)}
    with pytest.raises(ValueError, match="has learned nothing to save"):
        comfy_host.run_node("RoPeSLRSaveAdapter", name="x", model=model, latent=latent)
    assert not list(adapter_folder.iterdir())


def test_a_model_without_the_node_has_learned_nothing(adapter_folder):
    with pytest.raises(ValueError, match="has learned nothing to save"):
        comfy_host.run_node("RoPeSLRSaveAdapter", name="x", model=load_model("tiny_wan21_t2v"))


def test_an_adapter_and_a_model_at_once_are_refused(adapter_folder):
    model, _ = learn(adapter_folder)
    with pytest.raises(ValueError, match="Both adapter and model are connected"):
        comfy_host.run_node("RoPeSLRSaveAdapter", name="x", model=model, adapter=loaded())
