"""Every shipped workflow in a real browser: dropped, drawn, saved, opened again, and run."""

import json
import os
import uuid

import pytest

from workflow import ROOT, fresh, load, tiny_workflow

NAMES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
# A frontend of its own: nodes look, and messages read, a little different.
OLDER = "ROPESLR_FRONTEND" in os.environ
# Tried in every way by default; the others as they are dropped.
QUICK = ("sparkwan_few_step", "train_sparse_lora", "wan2.1_t2v")


def contents(workflow):
    """What a person would miss if it were lost: widgets, titles, modes and links."""
    nodes = {node["id"]: node for node in workflow["nodes"]}

    def end(node, slots, slot):
        return node, nodes[node][slots][slot]["name"]

    return (
        {
            key: (node["type"], node["mode"], node.get("title"), list(node["widgets_values"] or []))
            for key, node in nodes.items()
        },
        {
            (*end(source, "outputs", output), *end(target, "inputs", slot), kind)
            for _, source, output, target, slot, kind in map(tuple, workflow["links"])
        },
    )


def named(workflow, like=None):
    """Titles as the browser has them: a node without one bears its type's. An older ComfyUI's nodes may lack
    the last widgets that the file has; like: a workflow that it has saved."""
    nodes, links = contents(workflow)
    most = (
        {node["id"]: len(node["widgets_values"] or []) for node in like["nodes"]}
        if OLDER and like
        else {}
    )
    return {
        key: (kind, mode, values[: most.get(key)]) for key, (kind, mode, _, values) in nodes.items()
    }, links


SOME = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow("thorough"))
    for name in NAMES
]


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_workflow_is_whole_and_saves_to_the_same(shown, shipped, name, thorough):
    if shown.renderer == "vue" and name not in QUICK and not thorough:
        pytest.skip("Vue nodes see every workflow when thorough")
    workflow = shipped(name)
    nodes = shown.drop(name, workflow)
    shown.fit()
    shown.screenshot(f"{name}_{shown.renderer}")
    assert not [node["type"] for node in nodes if node["missing"]]
    assert shown.dialogs() == ""  # no missing node, no missing file, no complaint about the format
    saved = shown.saved()
    assert named(saved) == named(workflow, like=saved)
    titles = {node["id"]: node["title"] for node in workflow["nodes"] if "title" in node}
    assert titles.items() <= {node["id"]: node.get("title") for node in saved["nodes"]}.items()
    saved["id"] = str(uuid.uuid4())
    shown.drop(name, saved)
    assert named(shown.saved()) == named(workflow, like=saved)


@pytest.mark.parametrize("name", SOME)
def test_nothing_overlaps_or_is_clipped_as_the_browser_draws_it(shown, shipped, name):
    """Boxes with titles, once the pack's node has its panel.

    Vue nodes take the height they need.
    """
    if OLDER and shown.renderer == "vue":
        pytest.skip("the files are laid out for the newest frontend, where Vue nodes are lower")
    nodes = shown.drop(name, shipped(name))
    for i, node in enumerate(nodes):
        if shown.renderer == "classic":
            assert all(has >= needs - 1 for has, needs in zip(node["size"], node["least"])), node
        x, y, width, height = node["box"]
        for other in nodes[:i]:
            left, top, wide, high = other["box"]
            apart = x >= left + wide or left >= x + width or y >= top + high or top >= y + height
            assert apart, (node["type"], other["type"])


@pytest.mark.parametrize("name", SOME)
def test_it_runs_to_a_video_that_is_shown(shown, server, shipped, name):
    side = 256 if name == "wan2.2_5b" else 128  # its tokens are twice as large each way
    small = fresh(
        tiny_workflow(shipped(name), server.get("/object_info"), side, side, length=9, steps=2)
    )
    shown.drop(name, small)
    outputs = shown.run()
    (save,) = (node["id"] for node in small["nodes"] if node["type"] == "SaveVideo")
    (saved,) = outputs[str(save)]["images"]
    video = server.base / "output" / saved["subfolder"] / saved["filename"]
    assert video.suffix == ".mp4" and video.stat().st_size > 0
    shown.fit()  # the classic canvas makes the elements of nodes that are in view
    shown.page.locator("video").first.wait_for(state="attached")
    shown.screenshot(f"{name}_{shown.renderer}_done")
    assert shown.dialogs() == ""


def test_a_new_training_node_keeps_its_seed(shown):
    """Another seed is another training; by itself the browser has one drawn for each run."""
    control = shown.page.evaluate("""() => {
        const node = LiteGraph.createNode("RoPeSLRTrainSparseLoRA")
        return node.widgets.find((each) => each.name === "seed").linkedWidgets[0].value
    }""")
    assert control == "fixed"


@pytest.mark.parametrize(
    "kind, was, becomes, says",
    [
        (
            "ModelSamplingSD3",
            "ModelSamplingSD3",
            "NobodyKnowsThisNode",
            "Missing node: NobodyKnowsThisNode",
        ),
        ("group", "bounding", "bounding_box", "nvalid"),
        (
            "VAELoader",
            "wan_2.1_vae.safetensors",
            "nobody_has_this.safetensors",
            "nobody_has_this.safetensors is missing",
        ),
    ],
)
def test_what_is_missing_is_noticed(shown, kind, was, becomes, says):
    """The checks above can fail: a node that nobody knows, a file that is not there."""
    workflow = json.loads(json.dumps(load("wan2.1_t2v")).replace(f'"{was}"', f'"{becomes}"'))
    workflow["id"] = str(uuid.uuid4())
    nodes = shown.drop("spoiled", workflow)
    assert [node["type"] for node in nodes if node["missing"]] == [becomes] * (kind == was)
    if not (OLDER and says == "nvalid"):  # which says nothing of a wrong group
        shown.wait_for_dialog("missing" if OLDER else says)
