"""Adapter files and released checkpoints: what goes in comes out, what fits is told, what is wrong is refused."""

import dataclasses
import os
import stat
import threading

import checkpoints
import malformed
import pytest
import torch
from adapters import adapters, layer_x, rola_adapter, ropeslr_adapter, single, sla_adapter
from fields import relative_error, rope_angles, smooth_qkv
from pack_loader import load

attention = load(".attention")
positions = load(".attention.positions")
GRID, HEADS, WIDTH = (4, 8, 9), 2, 32
CASES = list(malformed.cases())


def inputs(grid=GRID, heads=HEADS, width=WIDTH):
    angles = rope_angles(grid, width)
    x = layer_x(angles.shape[0], heads * width, torch.float32)
    return attention.LayerInputs(x, positions.Positions(angles.cos(), angles.sin()))


def attend(adapter, grid=GRID, **plan):
    q, k, v = smooth_qkv(grid, heads=adapter.info.num_heads, width=adapter.info.head_dim)
    run = attention.AttentionRun(attention.SparsePlan(**({"sparsity": 0.5} | plan)), adapter)
    given = inputs(grid, adapter.info.num_heads, adapter.info.head_dim)
    return run.attend(q, k, v, attention.TokenLayout(grid, order=run.plan.block_order), inputs=given)


ADAPTERS = {
    "ropeslr": lambda: ropeslr_adapter(2, HEADS, WIDTH), "binned": lambda: ropeslr_adapter(
        2, HEADS, WIDTH, noise_levels=(0.1, 0.5)), "table": lambda: ropeslr_adapter(2, HEADS, WIDTH, pe="table"),
    "rms": lambda: ropeslr_adapter(2, HEADS, WIDTH, fusion="rms", act="elu"),
    "rola": lambda: rola_adapter(2, HEADS, WIDTH, rank=16), "sla": lambda: sla_adapter(2, HEADS, WIDTH),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_gives_the_same_bits(kind, dtype, tmp_path):
    made = ADAPTERS[kind]()
    layers = {layer: {name: x.to(dtype) for name, x in weights.items()} for layer, weights in made.layers.items()}
    made = adapters.Adapter(made.info, layers, made.name)
    path = adapters.write_adapter(made, tmp_path / "folder" / "mine.safetensors")
    read = adapters.read_adapter(path)
    assert read.info == made.info and read.name == "mine.safetensors"
    assert {key: x.dtype for key, x in read.tensors().items()} == {key: dtype for key in made.tensors()}
    assert torch.equal(attend(read)[0], attend(made)[0])


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_a_malformed_file_gives_a_clear_error_runs_nothing_and_leaves_nothing(case, tmp_path, monkeypatch):
    _, ending, write, word = case
    marked = tmp_path / "marked"
    monkeypatch.setattr(malformed.Evil, "MARK", str(marked))
    folder = tmp_path / "models"
    folder.mkdir()
    path = folder / f"given{ending}"
    write(path)
    before = sorted(folder.iterdir())
    first = lambda: malformed.read(path)  # noqa: E731
    for do in (
        first, lambda: adapters.describe(path),
        lambda: adapters.convert(path, folder / "out.safetensors", folder / "adapter.safetensors"),
    ):
        with pytest.raises(adapters.AdapterError) as caught:
            do()
        said = str(caught.value)
        assert said.startswith(path.name) and 25 < len(said) < 500 and "\n" not in said, said
        assert do is not first or word in said, said
    assert not marked.exists() and sorted(folder.iterdir()) == before


def test_there_are_at_least_200_malformed_files():
    assert len(CASES) >= 200 and len({case[0] for case in CASES}) == len(CASES)


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = adapters.write_adapter(sla_adapter(1, 2, 16), tmp_path / "a.safetensors")
    old = path.read_bytes()

    def interrupted(tensors, name, header):
        with open(name, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(load(".attention.adapters.files"), "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapters.write_adapter(sla_adapter(1, 2, 16, size=2.0), path)
    assert path.read_bytes() == old and [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def test_readers_of_a_file_that_is_written_anew_never_see_a_part(tmp_path):
    path = tmp_path / "a.safetensors"
    made = [sla_adapter(2, 2, 64, size=size) for size in (1.0, 2.0)]
    adapters.write_adapter(made[0], path)
    done, wrong = threading.Event(), []

    def look():
        while not done.is_set():
            try:
                adapters.read_adapter(path)
            except adapters.AdapterError as error:
                wrong.append(error)

    reader = threading.Thread(target=look)
    reader.start()
    for i in range(40):
        adapters.write_adapter(made[i % 2], path)
    done.set()
    reader.join()
    assert not wrong


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_a_written_file_has_the_permissions_of_any_other(tmp_path):
    path = adapters.write_adapter(sla_adapter(1, 2, 16), tmp_path / "a.safetensors")
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_an_adapter_that_is_not_valid_is_not_written(tmp_path):
    made = sla_adapter(1, 2, 16)
    single(made)["weight"][0, 0] = torch.nan
    with pytest.raises(adapters.AdapterError, match="a.safetensors: .*weight has 1 of 256 values that are NaN"):
        adapters.write_adapter(made, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_error_for_another_model_names_both_and_says_what_to_do():
    with pytest.raises(adapters.AdapterError) as caught:
        adapters.check_model(ropeslr_adapter(2, 4, 16), range(30), 12, 128, "this WanModel")
    for word in ("random.safetensors", "2 layers, 4 heads of 16", "30 layers, 12 heads of 128", "disconnect it"):
        assert word in str(caught.value)


@pytest.mark.parametrize("family, ending, prefix, wrap", [
    ("sparkwan", ".pth", "net.", None), ("sparkwan", ".pth", "net_ema.", "state_dict"),
    ("sparkwan", ".safetensors", "", None), ("sparkwan", ".safetensors", "model.diffusion_model.", None),
    ("turbowan", ".pth", "", None), ("turbowan", ".pth", "net.", "model"), ("turbowan", ".safetensors", "net.", None),
])
@pytest.mark.parametrize("model", [dict(), dict(channels=36), dict(channels=36, image=True), dict(channels=48)])
def test_released_checkpoints_become_a_model_and_an_adapter(family, ending, prefix, wrap, model, tmp_path):
    weights = getattr(checkpoints, family)(**model)
    path = checkpoints.save(weights, tmp_path / f"Wan-0.95Sparsity{ending}", prefix, wrap)
    file = adapters.open_checkpoint(path)
    adapter, backbone = file.adapter(), file.backbone()
    assert (adapter.info.num_layers, adapter.info.num_heads, adapter.info.head_dim) == (2, 2, 128)
    assert adapter.info.block_order == "raster" and adapter.info.sparsity == 0.95
    assert adapter.info.method == {"sparkwan": "rola", "turbowan": "sla"}[family]
    assert backbone["patch_embedding.weight"].shape == (256, model.get("channels", 16), 1, 2, 2)
    sparse = adapter.tensors()
    assert set(sparse) | set(backbone) == set(weights) and not set(sparse) & set(backbone)
    for name, tensor in (sparse | backbone).items():
        assert torch.equal(tensor.flatten(), weights[name].flatten()) and tensor.dtype == weights[name].dtype
    out = adapters.convert(path, tmp_path / "out.safetensors", tmp_path / "adapter.safetensors")
    converted = adapters.open_checkpoint(out)
    assert {name: x.tolist() for name, x in converted.adapter().tensors().items()} == {
        name: x.tolist() for name, x in sparse.items()}
    assert all(torch.equal(x, backbone[name]) for name, x in converted.backbone().items())
    assert adapters.read_adapter(tmp_path / "adapter.safetensors").info.source == path.name


def test_weights_of_an_average_go_before_those_of_the_last_step(tmp_path):
    """Training files hold both; the average is what was meant to be sampled with."""
    last, average = checkpoints.sparkwan(), checkpoints.sparkwan(seed=9)
    both = {f"net.{k}": x for k, x in last.items()} | {f"net_ema.{k}": x for k, x in average.items()}
    path = checkpoints.save(both, tmp_path / "both.pth")
    assert torch.equal(adapters.open_checkpoint(path).backbone()["head.modulation"], average["head.modulation"])


def test_the_int8_files_are_taken_back_to_numbers(tmp_path):
    weights = checkpoints.turbowan(dtype=torch.float32)
    path = checkpoints.save(checkpoints.quantised(weights), tmp_path / "TurboWan-quant.pth")
    backbone = adapters.open_checkpoint(path).backbone()
    assert set(backbone) == {name for name in weights if "proj_l" not in name}
    for name in backbone:
        found, expected = backbone[name].float().flatten(), weights[name].flatten()
        assert (found - expected).abs().max() <= 0.01 * expected.abs().max(), name


def test_the_shapes_of_the_real_1_3b_model(tmp_path):
    """One layer of it, both families: the tensors that a real file holds, in their real sizes."""
    base = checkpoints.wan_weights(1536, 1, 8960)
    assert base["blocks.0.ffn.0.weight"].shape == (8960, 1536) and base["patch_embedding.weight"].shape == (1536, 64)
    for name, extra in (("rola", checkpoints.rola_weights(1536, 1)), ("sla", checkpoints.sla_weights(1))):
        path = checkpoints.save(base | extra, tmp_path / f"{name}.pth", "net.")
        file = adapters.open_checkpoint(path)
        info = file.adapter().info
        assert (info.method, info.num_heads, info.head_dim) == (name, 12, 128)
        assert file.backbone()["patch_embedding.weight"].shape == (1536, 16, 1, 2, 2)


def test_a_large_file_is_mapped_and_not_read(tmp_path):
    """Opening a checkpoint must not take memory for its weights."""
    path = checkpoints.save(checkpoints.sparkwan(dim=1024, layers=2), tmp_path / "large.pth", "net.")
    assert path.stat().st_size > 60e6
    file = adapters.open_checkpoint(path)
    storage = file.read("blocks.1.ffn.0.weight").untyped_storage()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        spans = [line.split()[0].split("-") for line in maps if str(path) in line]
    assert any(int(low, 16) <= storage.data_ptr() < int(high, 16) for low, high in spans)


def test_what_a_file_is_in_words(tmp_path):
    path = checkpoints.save(checkpoints.sparkwan(), tmp_path / "SparkWan-0.90Sparsity.pth", "net.")
    text = "\n".join(adapters.describe(path))
    for word in ("RoLA (SparkWan)", "2 layers, 2 heads of 128", "sparsity 0.9", "raster", "(256, 16, 1, 2, 2)"):
        assert word in text
    own = adapters.write_adapter(sla_adapter(2, 2, 16, size=0.0), tmp_path / "zero.safetensors")
    text = "\n".join(adapters.describe(own))
    assert "an adapter of SLA" in text and "projection is zero" in text


# Rank


def test_rola_at_a_lower_rank_keeps_the_features_that_add_most():
    made = rola_adapter(1, HEADS, WIDTH, rank=16, gate=1.0)
    weak = [0, 1, 6, 7, 8, 9, 12, 13]
    single(made)["a_q"][weak] *= 1e-3
    full, full_cost = attend(made)
    half, cost = attend(made, rank=8)
    assert cost.background == full_cost.background / 2
    assert relative_error(half, full) < 2e-3
    assert relative_error(attend(made, rank=6)[0], full) > 1e-2


@pytest.mark.parametrize("kind", ["ropeslr", "rola", "rms"])
def test_the_rank_of_the_loader_counts_where_the_plan_says_nothing(kind):
    made = ADAPTERS[kind]()
    limited = dataclasses.replace(made, use_rank=8)
    assert torch.equal(attend(limited)[0], attend(made, rank=8)[0])
    assert torch.equal(attend(limited, rank=12)[0], attend(made, rank=12)[0])
    assert not torch.equal(attend(limited)[0], attend(made)[0])
    assert torch.equal(attend(made, rank=128)[0], attend(made)[0])            # more than there is: all


# Without what an adapter needs


def test_a_missing_input_is_named():
    q, k, v = smooth_qkv(GRID, heads=HEADS, width=WIDTH)
    layout = attention.TokenLayout(GRID, order="raster")
    run = attention.AttentionRun(attention.SparsePlan(), rola_adapter(1, HEADS, WIDTH))
    with pytest.raises(ValueError, match="rola's gate needs the hidden state"):
        run.attend(q, k, v, layout)
    with pytest.raises(ValueError, match="rola's low rank needs the model's RoPE angles"):
        run.attend(q, k, v, layout, inputs=inputs()._replace(positions=None))
    plain = ropeslr_adapter(1, HEADS, WIDTH, pe="none", without={"a_q", "a_k", "eta", "gate_w"})
    run = attention.AttentionRun(attention.SparsePlan(), plain)
    assert run.missing(attention.LayerInputs()) is None


@pytest.mark.parametrize("method", ["rola", "sla"])
def test_without_weights_a_trained_method_is_the_kept_blocks_alone(method):
    q, k, v = smooth_qkv(GRID)
    layout = attention.TokenLayout(GRID, order="raster")
    plain = attention.AttentionRun(attention.SparsePlan(method="top-k plain")).attend(q, k, v, layout)[0]
    assert torch.equal(attention.AttentionRun(attention.SparsePlan(method=method)).attend(q, k, v, layout)[0], plain)
    q, k, v = smooth_qkv(GRID, heads=2, width=16)
    zero = attention.AttentionRun(attention.SparsePlan(), sla_adapter(1, 2, 16, size=0.0))
    plain = attention.AttentionRun(attention.SparsePlan(method="top-k plain"))
    assert torch.equal(zero.attend(q, k, v, layout)[0], plain.attend(q, k, v, layout)[0])


def test_another_method_than_the_adapters_is_refused_or_leaves_it_out():
    made = rola_adapter(1, HEADS, WIDTH)
    with pytest.raises(ValueError, match="method is sla, but the adapter was trained for rola"):
        attention.AttentionRun(attention.SparsePlan(method="sla"), made)
    run = attention.AttentionRun(attention.SparsePlan(method="top-k"), made)
    assert not run.method.needs_x and run.plan.method == "top-k" and run.plan.block_order == "cube"
