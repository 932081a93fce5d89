"""Adapter files and released checkpoints: written and read back, described, refused where wrong."""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

import pack_loader
from pack_loader import load
from support.data import checkpoints, malformed
from support.data.adapters import (
    adapters,
    layer_x,
    rola_adapter,
    ropeslr_adapter,
    single,
    sla_adapter,
)
from support.data.fields import relative_error, rope_angles, smooth_qkv
from support.data.runs import Call, run_of

attention = load(".attention")
GRID, HEADS, WIDTH = (4, 8, 9), 2, 32
CASES = list(malformed.cases())
FOLDERS = [str(Path(malformed.__file__).parents[2]), str(Path(pack_loader.__file__).parent)]


def inputs(grid=GRID, heads=HEADS, width=WIDTH):
    angles = rope_angles(grid, width)
    x = layer_x(angles.shape[0], heads * width, torch.float32)
    return attention.LayerInputs(x, attention.RopeTable(angles.cos(), angles.sin()))


def attend(adapter, grid=GRID, **plan):
    q, k, v = smooth_qkv(grid, heads=adapter.info.num_heads, width=adapter.info.head_dim)
    run = run_of(adapter, **({"sparsity": 0.5} | plan))
    given = inputs(grid, adapter.info.num_heads, adapter.info.head_dim)
    layout = attention.TokenLayout(grid, order=run.plan.block_order)
    return run.attend(q, k, v, Call(layout, inputs=given))


ADAPTERS = {
    "ropeslr": lambda: ropeslr_adapter(2, HEADS, WIDTH),
    "binned": lambda: ropeslr_adapter(2, HEADS, WIDTH, noise_levels=(0.1, 0.5)),
    "table": lambda: ropeslr_adapter(2, HEADS, WIDTH, pe="table"),
    "rms": lambda: ropeslr_adapter(2, HEADS, WIDTH, fusion="rms", act="elu"),
    "rola": lambda: rola_adapter(2, HEADS, WIDTH, rank=16),
    "sla": lambda: sla_adapter(2, HEADS, WIDTH),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_gives_the_same_bits(kind, dtype, tmp_path):
    made = ADAPTERS[kind]()
    layers = {
        layer: {name: x.to(dtype) for name, x in weights.items()}
        for layer, weights in made.layers.items()
    }
    made = adapters.Adapter(made.info, layers, made.name)
    path = adapters.write_adapter(made, tmp_path / "folder" / "mine.safetensors")
    read = adapters.read_adapter(path)
    assert read.info == made.info and read.name == "mine.safetensors"
    assert {key: x.dtype for key, x in read.tensors().items()} == {
        key: dtype for key in made.tensors()
    }
    assert torch.equal(attend(read)[0], attend(made)[0])


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_a_malformed_file_gives_a_clear_error_runs_nothing_and_leaves_nothing(
    case, tmp_path, monkeypatch
):
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
        first,
        lambda: adapters.describe(path),
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

    monkeypatch.setattr(load(".attention.adapters.atomic"), "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapters.write_adapter(sla_adapter(1, 2, 16, size=2.0), path)
    assert path.read_bytes() == old and [each.name for each in tmp_path.iterdir()] == [
        "a.safetensors"
    ]


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


@pytest.mark.parametrize("size", [16, 32])
def test_an_adapters_own_key_block_is_kept_described_and_used(size, tmp_path):
    made = ropeslr_adapter(1, 2, 64)
    made = dataclasses.replace(made, info=dataclasses.replace(made.info, block_k=size))
    path = adapters.write_adapter(made, tmp_path / "fine.safetensors")
    found = adapters.read_adapter(path)
    assert found.info.block_k == size
    assert re.search(rf"block_k +{size}\b", "\n".join(adapters.describe(path)))
    assert attention.SparsePlan().resolve(found).key_tokens == size


def test_an_adapter_that_is_not_valid_is_not_written(tmp_path):
    made = sla_adapter(1, 2, 16)
    single(made)["weight"][0, 0] = torch.nan
    with pytest.raises(
        adapters.AdapterError, match="a.safetensors: .*weight has 1 of 256 values that are NaN"
    ):
        adapters.write_adapter(made, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_error_for_another_model_names_both_and_says_what_to_do():
    with pytest.raises(adapters.AdapterError) as caught:
        adapters.check_model(ropeslr_adapter(2, 4, 16), range(30), 12, 128, "this WanModel")
    for word in (
        "random.safetensors",
        "2 layers, 4 heads of 16",
        "30 layers, 12 heads of 128",
        "disconnect it",
    ):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "family, ending, prefix, wrap",
    [
        ("sparkwan", ".pth", "net.", None),
        ("sparkwan", ".pth", "net_ema.", "state_dict"),
        ("sparkwan", ".safetensors", "", None),
        ("sparkwan", ".safetensors", "model.diffusion_model.", None),
        ("turbowan", ".pth", "", None),
        ("turbowan", ".pth", "net.", "model"),
        ("turbowan", ".safetensors", "net.", None),
    ],
)
@pytest.mark.parametrize(
    "model", [dict(), dict(channels=36), dict(channels=36, image=True), dict(channels=48)]
)
def test_released_checkpoints_become_a_model_and_an_adapter(
    family, ending, prefix, wrap, model, tmp_path
):
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
        assert (
            torch.equal(tensor.flatten(), weights[name].flatten())
            and tensor.dtype == weights[name].dtype
        )
    out = adapters.convert(path, tmp_path / "out.safetensors", tmp_path / "adapter.safetensors")
    converted = adapters.open_checkpoint(out)
    assert {name: x.tolist() for name, x in converted.adapter().tensors().items()} == {
        name: x.tolist() for name, x in sparse.items()
    }
    assert all(torch.equal(x, backbone[name]) for name, x in converted.backbone().items())
    assert adapters.read_adapter(tmp_path / "adapter.safetensors").info.source == path.name


def test_weights_of_an_average_go_before_those_of_the_last_step(tmp_path):
    """Training files hold both; the average is what was meant to be sampled with."""
    last, average = checkpoints.sparkwan(), checkpoints.sparkwan(seed=9)
    both = {f"net.{k}": x for k, x in last.items()} | {
        f"net_ema.{k}": x for k, x in average.items()
    }
    path = checkpoints.save(both, tmp_path / "both.pth")
    assert torch.equal(
        adapters.open_checkpoint(path).backbone()["head.modulation"], average["head.modulation"]
    )


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
    assert base["blocks.0.ffn.0.weight"].shape == (8960, 1536) and base[
        "patch_embedding.weight"
    ].shape == (1536, 64)
    for name, extra in (
        ("rola", checkpoints.rola_weights(1536, 1)),
        ("sla", checkpoints.sla_weights(1)),
    ):
        path = checkpoints.save(base | extra, tmp_path / f"{name}.pth", "net.")
        file = adapters.open_checkpoint(path)
        info = file.adapter().info
        assert (info.method, info.num_heads, info.head_dim) == (name, 12, 128)
        assert file.backbone()["patch_embedding.weight"].shape == (1536, 16, 1, 2, 2)


def test_a_large_file_is_mapped_and_not_read(tmp_path):
    """Opening a checkpoint must not take memory for its weights."""
    path = checkpoints.save(
        checkpoints.sparkwan(dim=1024, layers=2), tmp_path / "large.pth", "net."
    )
    assert path.stat().st_size > 60e6
    file = adapters.open_checkpoint(path)
    storage = file.read("blocks.1.ffn.0.weight").untyped_storage()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        spans = [line.split()[0].split("-") for line in maps if str(path) in line]
    assert any(int(low, 16) <= storage.data_ptr() < int(high, 16) for low, high in spans)


def test_what_a_file_is_in_words(tmp_path):
    path = checkpoints.save(checkpoints.sparkwan(), tmp_path / "SparkWan-0.90Sparsity.pth", "net.")
    text = "\n".join(adapters.describe(path))
    for word in (
        "RoLA (SparkWan)",
        "2 layers, 2 heads of 128",
        "sparsity 0.9",
        "raster",
        "(256, 16, 1, 2, 2)",
    ):
        assert word in text
    own = adapters.write_adapter(sla_adapter(2, 2, 16, size=0.0), tmp_path / "zero.safetensors")
    text = "\n".join(adapters.describe(own))
    assert "an adapter of SLA" in text and "projection is zero" in text


# Files that are expensive to read, or lie about what they hold


@contextlib.contextmanager
def little_memory(megabytes=100):
    """What runs inside may not take more than this, not even for a moment."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux's own count of memory")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts from here
    before = peak_kilobytes()
    yield
    taken = (peak_kilobytes() - before) / 1024
    assert taken < megabytes, f"took {taken:.0f} MB"


def peak_kilobytes():
    return int(
        re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))[1]
    )


def refused(do, path):
    """The error's text, which is short, printable and begins with the file's name."""
    with pytest.raises(adapters.AdapterError) as caught:
        do(path)
    said = str(caught.value)
    assert said.startswith(f"{path.name}: ") and len(said) < 500 and said.isprintable(), said
    return said


@pytest.mark.parametrize(
    "make, words",
    [
        (malformed.large_checkpoint, "it is a whole checkpoint, not an adapter"),
        (malformed.large_adapter, r"weight has the shape \(16384, 16384\); expected \(16, 16\)"),
    ],
)
def test_load_adapter_refuses_a_gigabyte_by_its_header_without_reading_it(make, words, tmp_path):
    path = make(tmp_path / "large.safetensors", 16384)
    assert path.stat().st_size > 1 << 30
    with little_memory():
        said = refused(adapters.read_adapter, path)
    assert re.search(words, said), said


@pytest.mark.parametrize(
    "count, words",
    [
        (1_000_000, "header has 72,889,328 bytes; expected at most 16,777,216"),
        (100_000, "header lists 100,000 tensors; expected at most 65,536"),
    ],
)
def test_a_million_keys_are_refused_quickly_and_in_words(count, words, tmp_path):
    path = malformed.many_keys(tmp_path / "many.safetensors", count)
    started = time.monotonic()
    said = [
        refused(do, path)
        for do in (adapters.read_adapter, adapters.open_checkpoint, adapters.describe)
    ]
    assert time.monotonic() - started < 10
    assert all(words in each for each in said), said


def test_a_zip_bomb_is_refused_without_being_unpacked(tmp_path):
    path = malformed.zip_bomb(tmp_path / "bomb.pth", 512 << 20)
    assert path.stat().st_size < 1 << 20
    with little_memory():
        said = refused(adapters.open_checkpoint, path)
    assert "'x/data.pkl' in the archive unpacks to 512 MB; expected at most 64" in said


def test_a_compressed_checkpoint_is_refused_by_name_and_saved_again_as_advised_it_loads(tmp_path):
    """Mapped, its compressed bytes would be taken for numbers."""
    path = malformed.deflated(tmp_path / "packed.pth", checkpoints.sparkwan())
    said = refused(adapters.open_checkpoint, path)
    assert re.search(r"'\w+/data.pkl' in the archive is compressed", said), said
    command = said.partition("in Python and its folder: ")[2].removesuffix(".")
    done = subprocess.run([sys.executable, "-c", f"import torch; {command}"], cwd=tmp_path)
    assert done.returncode == 0
    backbone = adapters.open_checkpoint(tmp_path / "new.pth").backbone()
    assert torch.equal(backbone["head.modulation"], checkpoints.sparkwan()["head.modulation"])


def test_a_refused_pickle_is_told_in_our_own_words(tmp_path):
    """Torch advises to load it again without protection, in escape codes."""
    for how, name in (
        ("open", "io.open"),
        ("system", f"{os.system.__module__}.system"),
        ("eval", "eval"),
    ):
        path = tmp_path / f"{how}.pth"
        torch.save({"x": malformed.Evil(how)}, path)
        assert f"contains objects other than tensors ('{name}'); nothing was executed" in refused(
            adapters.open_checkpoint, path
        )
    painted = refused(adapters.open_checkpoint, malformed.painted_pickle(tmp_path / "painted.pth"))
    assert "\\x1b[31mmodule" in painted and "nothing was executed" in painted
    for path in tmp_path.iterdir():
        said = refused(adapters.open_checkpoint, path)
        assert (
            "weights_only" not in said and "e-running" not in said and "torch.load" not in said
        ), said


@pytest.fixture
def open_folder():
    """A folder that any user of this machine may look into; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def another_user():
    """Root may read everything: become nobody, if that is who runs the tests."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_a_file_without_read_permission_is_told_as_one(open_folder):
    own = adapters.write_adapter(sla_adapter(1, 2, 16), open_folder / "own.safetensors")
    released = [
        checkpoints.save(checkpoints.sparkwan(), open_folder / f"wan{end}")
        for end in (".pth", ".safetensors")
    ]
    cases = [(adapters.read_adapter, own), *((adapters.open_checkpoint, path) for path in released)]
    for _, path in cases:
        path.chmod(0)
    with another_user():
        for do, path in cases:
            assert "no permission to read it" in refused(do, path)
            assert "no permission to read it" in refused(adapters.describe, path)
    own.chmod(0o644)
    open_folder.chmod(0)
    with another_user():
        assert "no permission to read it" in refused(adapters.read_adapter, own)
    open_folder.chmod(0o755)


PAINTED = "\x1b[31mred\x00\x1b[0m\n\u202e" + "x" * 100


@pytest.mark.parametrize(
    "value", [PAINTED, "7" * 5_000, "0.5," * 15_000, PAINTED * 50_000], ids=lambda x: str(len(x))
)
@pytest.mark.parametrize(
    "field",
    [each.name for each in dataclasses.fields(adapters.AdapterInfo)]
    + ["format", "format_version", "rope_axes"],
)
def test_text_from_a_header_is_short_and_printable_wherever_it_is_shown(field, value, tmp_path):
    made = ropeslr_adapter(1, 2, 16, rank=6)
    path = tmp_path / "a.safetensors"
    malformed.save_file(made.tensors(), path, made.info.header() | {field: value})
    if field in ("base_model", "created_by", "source") and len(value) < 1 << 16:
        lines = adapters.describe(path)
        assert all(line.isprintable() and len(line) < 200 for line in lines), lines
        with pytest.raises(adapters.AdapterError) as caught:
            adapters.check_model(adapters.read_adapter(path), range(30), 12, 128, "this WanModel")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500
        return
    refused(adapters.read_adapter, path)
    refused(adapters.describe, path)


def test_a_key_or_a_name_with_escape_codes_is_shown_printable(tmp_path):
    made = sla_adapter(1, 2, 16)
    path = tmp_path / "a.safetensors"
    malformed.save_file({**made.tensors(), PAINTED * 1000: torch.ones(1)}, path, made.info.header())
    assert "\\x1b[31mred" in refused(adapters.read_adapter, path)
    torch.save({PAINTED: torch.ones(1)}, tmp_path / "b.pth")
    assert "\\x1b[31mred" in refused(adapters.open_checkpoint, tmp_path / "b.pth")
    painted = adapters.write_adapter(made, tmp_path / "\x1b[31mred.safetensors")
    assert adapters.describe(painted)[0].startswith("\\x1b[31mred.safetensors: ")
    assert adapters.read_adapter(painted).name == "\\x1b[31mred.safetensors"


LOOKING = """
import sys
sys.path[:0] = {folders!r}
from support.data.adapters import adapters

for do in (adapters.describe, adapters.read_adapter, adapters.open_checkpoint):
    try:
        do(sys.argv[1])
    except adapters.AdapterError as error:
        print(error)
"""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX pipes")
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_pipe_is_refused_and_not_waited_for(ending, tmp_path):
    path = tmp_path / f"pipe{ending}"
    os.mkfifo(path)
    command = [sys.executable, "-c", LOOKING.format(folders=FOLDERS), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    expected = f"{path.name}: it is a pipe, a socket or a device; expected a regular file."
    assert done.stdout.splitlines() == [expected] * 3, done.stderr


def test_numbers_that_are_too_large_for_float32_are_refused():
    """They are computed in float32, where they would be infinite."""
    made = sla_adapter(1, 2, 16)
    large = single(made) | {"weight": single(made)["weight"].double()}
    large["weight"][0, :3] = torch.tensor([1e300, -1e39, 1e38], dtype=torch.float64)
    with pytest.raises(
        adapters.AdapterError,
        match="weight has 2 of 256 values that are NaN, infinite or too large",
    ):
        adapters.write_adapter(
            adapters.Adapter(made.info, {"blocks.0.self_attn": large}), "unused.safetensors"
        )


def test_an_sla_adapter_with_another_feature_map_is_refused():
    """SLA's is softmax; any other in the header had no effect."""
    info = sla_adapter(1, 2, 16).info
    with pytest.raises(adapters.AdapterError, match="act is 'elu'; sla runs with 'softmax' only"):
        dataclasses.replace(info, act="elu")
    assert dataclasses.replace(ropeslr_adapter(1, 2, 16).info, act="elu").act == "elu"


def test_a_layer_is_found_by_its_identity_in_the_model_and_by_its_name():
    wan = sla_adapter(11, 2, 16)
    for index in range(11):
        assert (
            wan.layer(index)
            is wan.layer(f"blocks.{index}.self_attn")
            is wan.layers[f"blocks.{index}.self_attn"]
        )
    hunyuan = adapters.Adapter(
        wan.info, {"double_blocks.0": single(wan), "single_blocks.12": single(wan)}
    )
    assert hunyuan.layer(("single", 12)) is hunyuan.layers["single_blocks.12"]
    assert (
        hunyuan.knows(("double", 0)) and not hunyuan.knows(("double", 12)) and not hunyuan.knows(0)
    )
    with pytest.raises(KeyError):
        hunyuan.layer(("double", 12))
    assert [adapters.layer_name(layer) for layer in (10, ("double", 3))] == [
        "blocks.10.self_attn",
        "double_blocks.3",
    ]


# What is left behind


@contextlib.contextmanager
def small_disk(size):
    """Files may not grow beyond this: the write itself fails, as on a disk that fills."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_during_a_write_is_an_oserror_that_names_the_file(tmp_path):
    path = adapters.write_adapter(sla_adapter(1, 2, 16), tmp_path / "mine.safetensors")
    old = path.read_bytes()
    said = "^mine.safetensors could not be written to .*File too large"
    with small_disk(100_000), pytest.raises(OSError, match=said):
        adapters.write_adapter(sla_adapter(2, 2, 256), path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.touch()
    with pytest.raises(OSError, match="^mine.safetensors could not be written to .*plain"):
        adapters.write_adapter(sla_adapter(1, 2, 16), plain / "mine.safetensors")


SAVING = """
import pathlib, sys, time
sys.path[:0] = {folders!r}
from support.data.adapters import adapters, sla_adapter
from pack_loader import load
import safetensors.torch

atomic = load(".attention.adapters.atomic")
real = atomic.save_file

def slow(tensors, path, header):
    pathlib.Path(path).with_name(".tmp1a2b3c").write_bytes(bytes(1000))       # as safetensors begins
    real(tensors, path, header)             # all of it is on the disk, but not in its place yet
    print("written", flush=True)
    time.sleep(600)

atomic.save_file = slow
adapters.write_adapter(sla_adapter(1, 2, 64), sys.argv[1])
"""


@contextlib.contextmanager
def saving(path):
    """Another process in the middle of a save."""
    command = [sys.executable, "-c", SAVING.format(folders=FOLDERS), str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "written\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def others_than(*paths):
    return sorted(set(paths[0].parent.iterdir()) - set(paths))


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_the_next_save_removes_what_a_killed_save_left_and_nothing_else(tmp_path):
    path = tmp_path / "mine.safetensors"
    other = adapters.write_adapter(sla_adapter(1, 2, 16), tmp_path / "mine.too.safetensors")
    own = tmp_path / "mine.backup.partial"
    own.touch()
    with saving(path) as process:
        (left,) = others_than(other, own)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert left.exists() and not path.exists()
        adapters.write_adapter(sla_adapter(1, 2, 16), other)  # the save of another file
        assert left.exists()
        adapters.write_adapter(sla_adapter(1, 2, 16), path)
        assert not left.exists() and others_than(path, other, own) == []
    assert adapters.read_adapter(path).info.head_dim == 16


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_save_never_removes_what_a_living_process_is_writing(tmp_path):
    path = tmp_path / "mine.safetensors"
    with saving(path):
        (left,) = others_than(path)
        files = list(left.iterdir())
        for each in (left, *files):
            os.utime(each, (0, 0))  # asleep for years: still alive
        adapters.write_adapter(sla_adapter(1, 2, 16), path)
        assert left.exists() and list(left.iterdir()) == files and files


def test_an_unfinished_file_of_another_machine_is_removed_after_a_day_without_a_write(tmp_path):
    """Process numbers say nothing there, nor does ours: a container gives the same ones again."""
    path = tmp_path / "mine.safetensors"
    atomic = load(".attention.adapters.atomic")
    ours = atomic._machine()
    strangers = [
        tmp_path / f"mine.{name}-00dead.partial"
        for name in (f"abcdef-{2**22 + 7}", f"{ours}-{os.getpid()}")
    ]
    for each in strangers:
        each.mkdir()
        (each / "tensors").touch()
    adapters.write_adapter(sla_adapter(1, 2, 16), path)
    assert others_than(path) == sorted(strangers)
    yesterday = time.time() - 25 * 3600
    for each in strangers:
        os.utime(each, (yesterday, yesterday))
    adapters.write_adapter(sla_adapter(1, 2, 16), path)
    assert others_than(path) == sorted(strangers)  # written to a moment ago
    for each in strangers:
        os.utime(each / "tensors", (yesterday, yesterday))
    adapters.write_adapter(sla_adapter(1, 2, 16), path)
    assert others_than(path) == []


# Rank


def test_rola_at_a_lower_rank_keeps_the_features_that_add_most():
    made = rola_adapter(1, HEADS, WIDTH, rank=16, gate=1.0)
    weak = [0, 1, 6, 7, 8, 9, 12, 13]
    single(made)["proj_q"][weak] *= 1e-3
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
    assert torch.equal(attend(made, rank=128)[0], attend(made)[0])  # more than there is: all


# Without what an adapter needs


def test_a_missing_input_is_named():
    q, k, v = smooth_qkv(GRID, heads=HEADS, width=WIDTH)
    layout = attention.TokenLayout(GRID, order="raster")
    run = run_of(rola_adapter(1, HEADS, WIDTH))
    with pytest.raises(ValueError, match="rola's gate needs the hidden state"):
        run.attend(q, k, v, Call(layout))
    with pytest.raises(ValueError, match="rola's low-rank branch needs the model's RoPE angles"):
        run.attend(q, k, v, Call(layout, inputs=inputs()._replace(rope=None)))
    plain = ropeslr_adapter(
        1, HEADS, WIDTH, pe="none", without={"proj_q", "proj_k", "low_rank_scale", "gate_weight"}
    )
    run = run_of(plain)
    assert run.missing(attention.LayerInputs()) is None


@pytest.mark.parametrize("method", ["rola", "sla"])
def test_without_weights_a_trained_method_is_the_kept_blocks_alone(method):
    q, k, v = smooth_qkv(GRID)
    layout = attention.TokenLayout(GRID, order="raster")
    plain = run_of(method="top-k plain").attend(q, k, v, Call(layout))[0]
    assert torch.equal(run_of(method=method).attend(q, k, v, Call(layout))[0], plain)
    q, k, v = smooth_qkv(GRID, heads=2, width=16)
    zero, plain = run_of(sla_adapter(1, 2, 16, size=0.0)), run_of(method="top-k plain")
    call = Call(layout)
    assert torch.equal(zero.attend(q, k, v, call)[0], plain.attend(q, k, v, call)[0])


def test_another_method_than_the_adapters_is_refused_or_leaves_it_out():
    made = rola_adapter(1, HEADS, WIDTH)
    with pytest.raises(ValueError, match="method is sla, but the adapter was trained for rola"):
        run_of(made, method="sla")
    run = run_of(made, method="top-k")
    assert (
        not run.needs_x
        and run.plan.adapter is None
        and run.plan.method == "top-k"
        and run.plan.block_order == "cube"
    )
