"""Translations: every node and input in every language."""

import json
from pathlib import Path

import pytest

import comfy_host

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("en", "zh", "ja")


def schemas():
    comfy_host.pack()
    nodes = comfy_host.boot().NODE_CLASS_MAPPINGS
    return {name: nodes[name].GET_SCHEMA() for name in nodes if name.startswith("RoPeSLR")}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_there(language):
    found = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))
    wanted = schemas()
    assert set(found) == set(wanted)
    for name, schema in wanted.items():
        texts = found[name]
        assert texts["display_name"] and texts["description"]
        assert list(texts["inputs"]) == [each.id for each in schema.inputs]
        assert all(each["name"] and each["tooltip"] for each in texts["inputs"].values())
        assert len(texts.get("outputs", {})) == len(schema.outputs)
        if language == "en":
            assert (texts["display_name"], texts["description"]) == (
                schema.display_name,
                schema.description,
            )
            assert {each.id: each.tooltip for each in schema.inputs} == {
                key: each["tooltip"] for key, each in texts["inputs"].items()
            }
