"""What people read about the nodes: every input in every language, and pages as the schemas say."""

import json

import pytest

import texts

LANGUAGES = ("en", *texts.TRANSLATED)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_there(language):
    found = json.loads(texts.locale_file(language).read_text("utf-8"))
    wanted = texts.schemas()
    assert set(found) == set(wanted)
    for name, schema in wanted.items():
        spoken = found[name]
        assert spoken["display_name"] and spoken["description"]
        assert list(spoken["inputs"]) == [each.id for each in schema.inputs]
        assert all(each["name"] and each["tooltip"] for each in spoken["inputs"].values())
        assert len(spoken.get("outputs", {})) == len(schema.outputs)
        if language == "en":
            assert (spoken["display_name"], spoken["description"]) == (
                schema.display_name,
                schema.description,
            )
            assert {each.id: each.tooltip for each in schema.inputs} == {
                key: each["tooltip"] for key, each in spoken["inputs"].items()
            }


@pytest.mark.parametrize("language", LANGUAGES)
def test_locales_have_the_shape_of_the_schemas(language):
    found = texts.locale_file(language).read_text("utf-8")
    assert found == texts.text_of(texts.locale(language)), "run `python dev.py texts`"


@pytest.mark.parametrize("name", texts.files())
def test_pages_say_what_the_schemas_say(name):
    found = (texts.ROOT / name).read_text(encoding="utf-8")
    assert "[[[cog" in found and found == texts.processed(name), "run `python dev.py texts`"


def test_a_new_input_reaches_every_page_and_language(monkeypatch):
    """One more widget: its texts come from its schema, and a translation can follow later."""
    from comfy_api.latest import io

    node, before = "RoPeSLRSparseAttention", texts.untranslated("zh")
    new = io.Int.Input("new_setting", default=7, tooltip="What the new setting does.")
    inputs = [*texts.schemas()[node].inputs, new]
    monkeypatch.setattr(texts.schemas()[node], "inputs", inputs)
    for language in LANGUAGES:
        spoken = texts.locale(language)[node]["inputs"]["new_setting"]
        assert spoken == {"name": "new setting", "tooltip": "What the new setting does."}
    assert set(texts.untranslated("zh")) == {*before, f"{node}.new_setting"}
    assert "| `new_setting` | 7 | What the new setting does. |" in texts.processed("README.md")
    assert "`new_setting`" in texts.processed(f"web/docs/{node}/zh.md")
