"""Writes a described graph as a workflow file (UI format 0.4), nodes in columns.

What a node has (inputs, widgets, defaults, outputs) comes from ComfyUI's own object_info, so a
description names only what differs from the defaults, and an input that a node gains later needs no
change here.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

CORE = "0.30.0"  # the ComfyUI whose nodes the files are written for
NOTE = "MarkdownNote"  # exists in the browser alone
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
CONTROL, UPLOAD = "control_after_generate", "upload"  # widgets that the browser adds behind another
BYPASSED = 4
# Pixels: a node's title stands above its position.
TITLE, GAP, PADDING, GROUP_TITLE = (30, 20, 20, 40)
COLUMN_GAP = 70
# Room below for what a node shows once it is on the canvas: the panel, the video that was saved,
# how a training goes, and with Vue nodes the name of the pack.
GROWS = {
    "RoPeSLRSparseAttention": 280,
    "RoPeSLRReport": 30,
    "SaveVideo": 320,
    "RoPeSLRTrainSparseLoRA": 80,
    "LossGraphNode": 280,
    "RoPeSLRFewStepSigmas": 30,
    "ManualSigmas": 30,  # experimental, which Vue nodes say below
    "LTXVLatentUpsampler": 30,
    "LoraModelLoader": 30,
    "RoPeSLRLoadAdapter": 30,
    "RoPeSLRLoadSparseCheckpoint": 30,
}
WIDTH = 340
NAMESPACE = uuid.UUID("5d6c8b0e-1f5a-4c07-9d0b-7f3f8a2f6f11")


@dataclass(frozen=True)
class Model:
    """A file to download: where it is, and the folder below models/ that it belongs in."""

    url: str
    directory: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Node:
    """One node.

    values: widgets that differ from their defaults. links: input -> "node" or "node.output".
    """

    key: str
    type: str
    values: dict = field(default_factory=dict)
    links: dict = field(default_factory=dict)
    title: str | None = None
    height: int | None = None
    width: int | None = None
    colors: tuple[str, str] | None = None
    bypassed: bool = False


@dataclass(frozen=True)
class Group:
    """Nodes below each other in one frame; without a title there is no frame."""

    title: str | None
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Graph:
    """A workflow: columns from left to right, each of groups from top to bottom."""

    name: str
    columns: tuple[tuple[Group, ...], ...]

    def nodes(self) -> Iterator[Node]:
        for column in self.columns:
            for group in column:
                yield from group.nodes


def object_info() -> dict:
    """What the server answers at /object_info, without a server; the pack's nodes included."""
    import comfy_host

    nodes = comfy_host.boot()
    comfy_host.pack()
    return {name: _definition(node) for name, node in nodes.NODE_CLASS_MAPPINGS.items()}


def _definition(node: type) -> dict:
    if hasattr(node, "GET_NODE_INFO_V1"):
        return node.GET_NODE_INFO_V1()
    inputs = node.INPUT_TYPES()
    return {
        "input": inputs,
        "input_order": {group: list(inputs[group]) for group in inputs},
        "output": list(node.RETURN_TYPES),
        "output_name": list(getattr(node, "RETURN_NAMES", node.RETURN_TYPES)),
    }


def inputs_of(definition: dict) -> Iterator[tuple[str, str, dict, bool]]:
    """(name, type, options, is it optional) in the order of the browser."""
    for group in ("required", "optional"):
        for name in definition["input_order"].get(group, ()):
            kind, *options = definition["input"][group][name]
            options = options[0] if options else {}
            if isinstance(kind, list):  # the older form of a list to choose from
                options, kind = {"options": kind, **options}, "COMBO"
            yield name, str(getattr(kind, "value", kind)), options, group == "optional"


def is_widget(kind: str, options: dict) -> bool:
    """Also of an input that takes several types, shown as the widget of one of them."""
    return options.get("widgetType", kind) in WIDGETS and not options.get("forceInput")


def widget_names(definition: dict) -> list[str]:
    """The names behind a saved node's list of widget values, in order."""
    names = []
    for name, kind, options, _ in inputs_of(definition):
        if is_widget(kind, options):
            names.append(name)
            if options.get("control_after_generate"):
                names.append(CONTROL)
            if options.get("image_upload"):
                names.append(UPLOAD)
    return names


def render(graph: Graph, info: dict, models: dict[str, Model], version: str) -> dict:
    """The workflow as the browser would have saved it.

    Raises ValueError where the description is not consistent.
    """
    nodes = {node.key: node for node in graph.nodes()}
    numbers = {key: number for number, key in enumerate(nodes, 1)}
    if len(nodes) != sum(1 for _ in graph.nodes()):
        raise ValueError(f"{graph.name}: a key is used twice")
    positions, frames = _layout(graph, info)
    links: list[list] = []
    result = {
        key: _ui_node(node, numbers[key], info, models, version, positions[key])
        for key, node in nodes.items()
    }
    for key, node in nodes.items():
        for name, source in node.links.items():
            _link(result, links, numbers, key, name, source)
    for order, key in enumerate(_order(nodes)):
        result[key]["order"] = order
    return {
        "id": str(uuid.uuid5(NAMESPACE, graph.name)),
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": list(result.values()),
        "links": links,
        "groups": frames,
        "config": {},
        "extra": {"ds": {"scale": 0.6, "offset": [170, 160]}},
        "version": 0.4,
    }


def _ui_node(node: Node, number: int, info: dict, models: dict, version: str, place: tuple) -> dict:
    ours = node.type.startswith("RoPeSLR")
    ui = {
        "id": number,
        "type": node.type,
        "pos": list(place[:2]),
        "size": list(place[2:]),
        "flags": {},
        "order": 0,
        "mode": BYPASSED if node.bypassed else 0,
        "inputs": [],
        "outputs": [],
        "properties": {"Node name for S&R": node.type},
    }
    if node.title:
        ui["title"] = node.title
    if node.colors:
        ui["color"], ui["bgcolor"] = node.colors
    if node.type == NOTE:
        ui["widgets_values"] = [node.values["text"]]
        return ui
    ui["properties"] |= {
        "cnr_id": "ropeslr" if ours else "comfy-core",
        "ver": version if ours else CORE,
    }
    definition, values, unknown = info[node.type], [], dict(node.values)
    for name, kind, options, optional in inputs_of(definition):
        if is_widget(kind, options):
            values.append(unknown.pop(name) if name in unknown else _default(kind, options))
            if options.get("control_after_generate"):
                values.append("fixed")
            if options.get("image_upload"):
                values.append("image")
            if name in node.links:
                ui["inputs"].append(
                    {"name": name, "type": kind, "link": None, "widget": {"name": name}}
                )
        elif kind != "IMAGECOMPARE":
            ui["inputs"].append(
                {"name": name, "type": kind, "link": None} | ({"shape": 7} if optional else {})
            )
    if unknown:
        raise ValueError(f"{node.type} has no widget {', '.join(unknown)}")
    ui["outputs"] = [
        {"name": name, "type": str(getattr(kind, "value", kind)), "links": []}
        for name, kind in zip(_output_names(definition), definition["output"])
    ]
    downloads = [models[value] for value in values if isinstance(value, str) and value in models]
    if downloads:
        ui["properties"]["models"] = [
            {"name": each.name, "url": each.url, "directory": each.directory} for each in downloads
        ]
    ui["widgets_values"] = values
    return ui


def _output_names(definition: dict) -> list[str]:
    return [str(getattr(name, "value", name)) for name in definition["output_name"]]


def _default(kind: str, options: dict):
    """What the browser fills in where nobody has typed anything."""
    if "default" in options:
        return options["default"]
    if kind == "COMFY_DYNAMICCOMBO_V3":
        first = options["options"][0]
        if first["inputs"].get("required"):
            raise ValueError(
                "a list whose first choice has widgets of its own needs a value in the description"
            )
        return first["key"]
    if kind == "COMBO":
        return options["options"][0]
    return {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}[kind]


def _link(result: dict, links: list, numbers: dict, key: str, name: str, source: str) -> None:
    origin, _, output = source.partition(".")
    outputs = result[origin]["outputs"]
    slots = [i for i, each in enumerate(outputs) if output in ("", each["name"])]
    targets = [i for i, each in enumerate(result[key]["inputs"]) if each["name"] == name]
    if not slots or len(targets) != 1 or (len(outputs) > 1 and not output):
        raise ValueError(f"{key}.{name} cannot be linked to {source}")
    kind, number = outputs[slots[0]]["type"], len(links) + 1
    if kind != result[key]["inputs"][targets[0]]["type"]:
        raise ValueError(
            f"{key}.{name} is {result[key]['inputs'][targets[0]]['type']}, {source} gives {kind}"
        )
    outputs[slots[0]]["links"].append(number)
    result[key]["inputs"][targets[0]]["link"] = number
    links.append([number, numbers[origin], slots[0], numbers[key], targets[0], kind])


def _order(nodes: dict[str, Node]) -> list[str]:
    """Every node behind those that it takes something from."""
    done: list[str] = []

    def visit(key: str) -> None:
        for source in nodes[key].links.values():
            visit(source.partition(".")[0])
        if key not in done:
            done.append(key)

    for key in nodes:
        visit(key)
    return done


def height_of(node: Node, info: dict) -> int:
    """A node's height on the classic canvas, untitled: 20 for a row of slots, 24 for a widget."""
    if node.height:
        return node.height
    definition = info[node.type]
    slots = sum(not is_widget(kind, options) for _, kind, options, _ in inputs_of(definition))
    widgets = len(widget_names(definition))
    return 20 * max(slots, len(definition["output"])) + (24 * widgets + 8 if widgets else 0) + 6


def _layout(graph: Graph, info: dict) -> tuple[dict[str, tuple], list[dict]]:
    """Position and size of every node and group: columns side by side, groups stacked."""
    positions, frames, left = {}, [], 0
    for column in graph.columns:
        width = max(node.width or WIDTH for group in column for node in group.nodes)
        top = 0
        for group in column:
            start = top
            if group.title:
                top += GROUP_TITLE
            for node in group.nodes:
                height = height_of(node, info)
                positions[node.key] = (left, top + TITLE, node.width or width, height)
                top += TITLE + height + GAP + GROWS.get(node.type, 0)
            if group.title:
                frames.append(
                    {
                        "id": len(frames) + 1,
                        "title": group.title,
                        "color": "#3f789e",
                        "font_size": 24,
                        "flags": {},
                        "bounding": [left - PADDING, start, width + 2 * PADDING, top - start],
                    }
                )
            top += 2 * GAP
        left += width + COLUMN_GAP
    return positions, frames
