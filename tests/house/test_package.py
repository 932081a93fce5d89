"""What the Manager and the registry expect of the package."""

import ast
import json
import re
from pathlib import Path

import pytest
import tomllib

import package

ROOT = Path(__file__).resolve().parents[2]
NODES = (
    "RoPeSLRDoctor",
    "RoPeSLRFewStepSigmas",
    "RoPeSLRLoadAdapter",
    "RoPeSLRLoadSparseCheckpoint",
    "RoPeSLRRaylight",
    "RoPeSLRReport",
    "RoPeSLRSaveAdapter",
    "RoPeSLRSparseAttention",
    "RoPeSLRTrainSparseLoRA",
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_package_cannot_replace_torch_or_triton():
    """One dependency without a version: an installed matplotlib stays as it is."""
    assert PROJECT["project"]["dependencies"] == ["matplotlib"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.strip() and not line.startswith("#")] == ["matplotlib"]


def test_the_registry_finds_what_it_needs():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert project["name"] == "ropeslr" and re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert (
        project["license"] == {"file": "LICENSE"}
        and "Apache License" in (ROOT / "LICENSE").read_text()
    )
    assert project["urls"]["Repository"].startswith("https://")
    assert comfy["PublisherId"] and comfy["DisplayName"] == "ComfyUI-RoPeSLR"
    assert comfy["requires-comfyui"] == ">=0.18.2"  # the oldest version that the tests run on
    place = comfy["Icon"].removeprefix(
        project["urls"]["Repository"].replace("github.com", "raw.githubusercontent.com")
    )
    icon = (ROOT / place.removeprefix("/main/")).read_text(encoding="utf-8")
    # The most it may be.
    assert icon.startswith('<svg xmlns="http://www.w3.org/2000/svg" width="400" height="400"')
    assert "web" not in comfy  # WEB_DIRECTORY is set; both would load every script twice


def test_the_package_holds_the_pack_and_nothing_else():
    kept = package.files()
    assert {
        "__init__.py",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "nodes/sparse_attention.py",
    } <= set(kept)
    ours_alone = ("tests/", "tools/", "benchmarks/", ".github/", ".ci/", ".pre-commit", "dev.py")
    assert not [name for name in kept if name.startswith(ours_alone)]
    assert sum((ROOT / name).stat().st_size for name in kept) < 2_750_000


def test_node_ids_are_literal():
    """The Manager finds nodes by reading the source: a computed id is a missing node to it."""
    ids = []
    for path in (ROOT / "nodes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.keyword)
                and node.arg == "node_id"
                and isinstance(node.value, ast.Constant)
            ):
                ids.append(node.value.value)
    assert sorted(ids) == list(NODES)


def own_inputs(node):
    """As its source has them."""
    (source,) = (
        part
        for path in (ROOT / "nodes").glob("*.py")
        for part in re.split(r"(?=\nclass )", path.read_text(encoding="utf-8"))
        if f'node_id="{node}"' in part
    )
    return set(re.findall(r'Input\(\s*"(\w+)"', source))


@pytest.mark.parametrize("node", NODES)
def test_every_node_has_a_help_page_and_names_in_every_language(node):
    inputs = own_inputs(node)
    assert inputs
    if node == "RoPeSLRRaylight":  # the other node's too
        inputs |= own_inputs("RoPeSLRSparseAttention") - {"model", "training"}
    # docs/<id>.md is what the frontend falls back to in any language; it never takes another
    # language's page.
    for name in (f"{node}.md", f"{node}/zh.md"):
        page = (ROOT / "web" / "docs" / name).read_text(encoding="utf-8")
        assert all(f"`{each}`" in page for each in inputs), name
    for language in ("en", "zh", "ja"):
        names = json.loads(
            (ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8")
        )[node]
        assert set(names["inputs"]) == inputs, language
        assert all(each["name"] and each["tooltip"] for each in names["inputs"].values())


def test_the_status_table_names_the_versions_that_are_tested():
    import machine

    dev = (ROOT / "dev.py").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+) \|", readme, re.MULTILINE))
    assert rows["ComfyUI"].strip() == ", ".join(sorted(machine.COMFYUI))
    tritons = re.findall(r'"(\d+\.\d+)\.\d+":', re.search(r"TRITON = \{.*", dev)[0])
    assert tritons and f"with Triton {' and '.join(tritons)}" in rows["Triton kernels"]


def test_every_picture_of_the_readme_is_there():
    for file in (ROOT / "README.md", *(ROOT / "web" / "docs").rglob("*.md")):
        for place in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", file.read_text(encoding="utf-8")):
            # What the frontend prepends.
            base = ROOT if file.name == "README.md" else ROOT / "web" / "docs"
            assert (base / place).is_file(), f"{file.name}: {place}"


@pytest.mark.parametrize(
    "pattern", [r"(^|[^\w.])/(work|root|home|tmp)/\w", r"Co-Authored|\b(TODO|FIXME|XXX)\b"]
)
def test_the_files_speak_of_the_project_alone(pattern):
    """No path of one machine, nothing left to do."""
    kinds = "py md toml json yml yaml txt js mjs ts html svg sh".split()
    for path in ROOT.rglob("*"):
        text = path.suffix[1:] in kinds or path.parent.name == ".ci"
        if text and path.is_file() and ".git" not in path.parts and path != Path(__file__):
            found = re.search(pattern, path.read_text(encoding="utf-8"))
            assert not found, f"{path.relative_to(ROOT)}: {found.group()}"


def test_help_pages_say_that_dev_py_needs_a_clone():
    """The registry's package has no dev.py."""
    for path in (ROOT / "web" / "docs").rglob("*.md"):
        for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
            if "dev.py" in paragraph:
                assert re.search(r"git clone|git 克隆", paragraph), path.name
