"""What people read about the nodes, made from the nodes' schemas: locales and tables of settings.

`python dev.py texts` writes locales/en whole, brings the other locales into the schema's shape, and
runs the cog blocks of the Markdown files, which call `inputs` and `settings` below.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

from cogapp import Cog

from rewrite import quiet, rewrite

ROOT = Path(__file__).resolve().parents[1]
TRANSLATED = ("zh", "ja")
# Help pages in each language that has any: the frontend takes NODE.md for every other one.
PAGES = {"en": "web/docs/{node}.md", "zh": "web/docs/{node}/zh.md"}
RECORDS = (
    "benchmarks/README.md",
    "docs/methods.md",
    "docs/models.md",
)  # their blocks need no ComfyUI
DEFAULT = {"en": " ({})", "zh": "（{}）"}
COLON = {"en": ": ", "zh": "："}
SWITCH = {"en": ("off", "on"), "zh": ("关", "开")}
IN_CAPITALS = ("sla",)  # an input's label is its name with these words in capitals


@functools.cache
def schemas() -> dict[str, Any]:
    """`io.Schema` of each of the pack's nodes, by id."""
    import comfy_host

    comfy_host.pack()
    nodes = comfy_host.boot().NODE_CLASS_MAPPINGS
    return {name: nodes[name].GET_SCHEMA() for name in nodes if name.startswith("RoPeSLR")}


def locale(language: str) -> dict[str, Any]:
    """locales/LANGUAGE/nodeDefs.json in the schema's order; English where not translated.

    What no node has any more is left out.
    """
    english = {node: _english(schema) for node, schema in schemas().items()}
    if language == "en":
        return english
    return _completed(english, json.loads(locale_file(language).read_text(encoding="utf-8")))


def locale_file(language: str) -> Path:
    return ROOT / "locales" / language / "nodeDefs.json"


def text_of(texts: dict[str, Any]) -> str:
    """A locale as it stands in its file."""
    return json.dumps(texts, indent=2, ensure_ascii=False) + "\n"


def untranslated(language: str) -> list[str]:
    """Inputs whose tooltip is still English, as NODE.INPUT."""
    english, found = locale("en"), locale(language)
    return [
        f"{node}.{name}"
        for node, texts in english.items()
        for name, each in texts["inputs"].items()
        if found[node]["inputs"][name]["tooltip"] == each["tooltip"]
    ]


def _english(schema: Any) -> dict[str, Any]:
    texts = {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {
            each.id: {"name": _label(each), "tooltip": each.tooltip} for each in schema.inputs
        },
    }
    outputs = {
        str(place): {"name": each.display_name or each.io_type}
        for place, each in enumerate(schema.outputs)
    }
    return texts | ({"outputs": outputs} if outputs else {})


def _label(each: Any) -> str:
    words = (word.upper() if word in IN_CAPITALS else word for word in each.id.split("_"))
    return each.display_name or " ".join(words)


def _completed(english: Any, found: Any) -> Any:
    """`found` in the shape of `english`, which stands in for what is missing."""
    if not isinstance(english, dict):
        return found if isinstance(found, str) else english
    found = found if isinstance(found, dict) else {}
    return {key: _completed(each, found.get(key)) for key, each in english.items()}


def inputs(node: str, language: str = "en") -> str:
    """A help page's list of inputs: name, default, tooltip."""
    texts = locale(language)[node]["inputs"]
    lines = []
    for each in schemas()[node].inputs:
        default = _default(each, language)
        default = DEFAULT[language].format(default) if default else ""
        text = _code(texts[each.id]["tooltip"], each)
        lines.append(f"* **`{each.id}`**{default}{COLON[language]}{text}\n")
    return "".join(lines)


def settings(node: str, advanced: bool = False) -> str:
    """A table of the inputs that are, or are not, behind the node's advanced switch."""
    lines = ["| setting | default | what it does |", "|---|---|---|"]
    for each in schemas()[node].inputs:
        if bool(getattr(each, "advanced", None)) == advanced:
            lines.append(f"| `{each.id}` | {_default(each, 'en')} | {_code(each.tooltip, each)} |")
    return "\n".join(lines) + "\n"


def _default(each: Any, language: str) -> str:
    value = getattr(each, "default", None)
    if isinstance(value, bool):
        return SWITCH[language][value]
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def _code(text: str, each: Any) -> str:
    """A tooltip in Markdown: options that it explains, and names of inputs, as code."""
    options = [option for option in getattr(each, "options", None) or () if isinstance(option, str)]
    for option in sorted(options, key=len, reverse=True):
        text = re.sub(rf"(?<![\w`-]){re.escape(option)}(?=[:：,、`])", f"`{option}`", text)
    return text


def files() -> list[str]:
    """The Markdown files with cog blocks, from the root."""
    pages = [pattern.format(node=node) for pattern in PAGES.values() for node in schemas()]
    return ["README.md", *RECORDS, *pages]


def processed(name: str) -> str:
    """A file's text with its cog blocks run."""
    cog = Cog()
    cog.options.defines = {"inputs": inputs, "settings": settings}
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return cog.process_string((ROOT / name).read_text(encoding="utf-8"), name)


def main() -> None:
    quiet()
    changed = []
    for language in ("en", *TRANSLATED):
        changed.append(rewrite(locale_file(language), text_of(locale(language))))
        if language != "en" and (left := untranslated(language)):
            print(f"locales/{language}: still in English: {', '.join(left)}")
    changed += [rewrite(ROOT / name, processed(name)) for name in files()]
    if not any(changed):
        print("nothing to change: every text is as schemas and records have it")


if __name__ == "__main__":
    main()
