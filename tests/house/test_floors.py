"""The house's rules, read off the source: who imports what, load time, how files begin."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import needs

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for folder in ("nodes", "training", "attention", "kernels")
    for path in (ROOT / folder).rglob("*.py")
    if path != ROOT / "training" / "__main__.py"  # a program, which starts a ComfyUI of its own
) + [ROOT / "__init__.py"]
HOST = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "folder_paths",
    "server",
    "execution",
}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """(top-level name, leading dots, full module) of every import in a file, nested ones too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], 0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield (module.split(".")[0], node.level, module)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_nodes_import_comfyui_and_only_kernels_triton_imports_triton(path):
    name = name_of(path)
    for top, level, module in imports(path):
        if level == 0 and top in HOST:
            assert name.startswith("nodes/"), f"{name} imports {module}"
        if level == 0 and top == "triton":
            assert name.startswith("kernels/triton/"), f"{name} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_floor_imports_from_itself_and_the_floor_right_below_and_relatively(path):
    """What nodes/ needs of kernels/, attention/ hands on."""
    name = name_of(path)
    floors = ["kernels", "attention", "nodes"]
    beside = {"training": "attention"}  # in the same floor
    depth = len(path.relative_to(ROOT).parts)
    for top, level, module in imports(path):
        assert not (level == 0 and top in [*floors, *beside]), f"{name} imports {module} absolutely"
        if level == depth and name.startswith("training/"):
            assert top == "attention", f"{name} imports {module}"
        elif level == depth and name.split("/")[0] in floors:  # an import through the pack's root
            down = floors.index(name.split("/")[0]) - floors.index(beside.get(top, top))
            assert down in (0, 1), f"{name} imports {module}, which is {down} floors below"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_says_in_its_first_line_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith('"""') and len(text.splitlines()[0]) > 20, (
        f"{name_of(path)} has no opening docstring"
    )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_global_is_written_to(path):
    text = path.read_text(encoding="utf-8")
    for banned in (
        "mock.patch",
        "logging.basicConfig",
        "torch._dynamo.config",
        "torch.set_",
        "cuda.synchronize",
        "cuda.empty_cache",
        "os.environ",
        "add_object_patch",
        "print(",
    ):
        # matplotlib knows no other way to be told of a folder; the variable is taken back at once.
        if (name_of(path), banned) != ("nodes/report.py", "os.environ"):
            assert banned not in text, f"{name_of(path)} contains {banned}"


LOADS = """
import importlib.util, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused}:
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
spec = importlib.util.spec_from_file_location(
    "some_name", {root!r} + "/__init__.py", submodule_search_locations=[{root!r}]
)
module = importlib.util.module_from_spec(spec)
sys.modules["some_name"] = module
spec.loader.exec_module(module)
assert module.WEB_DIRECTORY == "./web" and not hasattr(module, "NODE_CLASS_MAPPINGS")
assert "torch" not in sys.modules
import some_name.attention, some_name.kernels.ops, torch
assert not torch.cuda.is_initialized()
"""


def test_the_pack_loads_without_comfyui_and_without_triton():
    """Under a name of its own, with both refused: benchmarks and other programs use it so."""
    needs.need("torch")
    code = LOADS.format(root=str(ROOT), refused=HOST | {"triton"})
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/"
    )
    assert done.returncode == 0, done.stderr
