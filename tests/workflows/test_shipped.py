"""The shipped workflows: well-formed, complete, and run to a video on a real server."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
NODE = "RoPeSLRSparseAttention"


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_every_workflow_has_a_thumbnail():
    assert WORKFLOWS
    for path in WORKFLOWS:
        assert path.with_suffix(".jpg").read_bytes()[:3] == b"\xff\xd8\xff"


def test_links_join_what_exists_and_types_agree(workflow):
    assert workflow["version"] == 0.4
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) and max(nodes) <= workflow["last_node_id"]
    assert max(link[0] for link in workflow["links"]) <= workflow["last_link_id"]
    for number, source, output, target, slot, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == number
        assert nodes[source]["outputs"][output]["type"] == nodes[target]["inputs"][slot]["type"] == kind


def test_our_nodes_are_found_by_the_manager_and_models_can_be_downloaded(workflow):
    loaders = [node for node in workflow["nodes"] if node["type"].endswith("Loader")]
    assert loaders
    for node in loaders:
        (model,) = node["properties"]["models"]
        assert model["name"] == node["widgets_values"][0] and model["url"].endswith(model["name"])
        assert model["url"].startswith("https://huggingface.co/") and model["directory"]
    ours = [node for node in workflow["nodes"] if node["type"].startswith("RoPeSLR")]
    assert ours and all(node["properties"]["cnr_id"] == "ropeslr" and node["properties"]["ver"] for node in ours)


@pytest.fixture(scope="module")
def server():
    import comfy_host
    import tiny_models
    from comfy_server import ComfyServer

    base = Path(os.environ["ROPESLR_TEST_BASE"])
    comfy_host.boot()
    tiny_models.make(base / "models")
    with ComfyServer(Path(os.environ["COMFYUI_PATH"]), base) as running:
        yield running


def tiny_prompt(server, name="wan2.1_t2v", bypass=None, **inputs):
    from workflow import load, make_tiny, node_id, to_prompt

    prompt = to_prompt(load(name), server.get("/object_info"), bypass)
    prompt = make_tiny(prompt, width=128, height=128, length=9, steps=2)
    if bypass is None:
        prompt[node_id(prompt, NODE)]["inputs"].update(min_tokens=64, **inputs)
    prompt["frames"] = {
        "class_type": "SaveImage",
        "inputs": {"images": [node_id(prompt, "VAEDecode"), 0], "filename_prefix": "test/frames"},
    }
    return prompt


def test_the_converted_workflow_holds_the_widgets_at_their_places(server):
    from workflow import load, node_id, to_prompt

    prompt = to_prompt(load("wan2.1_t2v"), server.get("/object_info"))
    inputs = prompt[node_id(prompt, NODE)]["inputs"]
    definition = server.get(f"/object_info/{NODE}")[NODE]["input"]
    defaults = {
        name: spec[1]["default"] for group in definition.values() for name, spec in group.items()
        if isinstance(spec, list) and len(spec) > 1 and "default" in spec[1]
    }
    assert {name: value for name, value in inputs.items() if name != "model"} == defaults
    assert prompt[node_id(prompt, "KSampler")]["inputs"]["model"] == [node_id(prompt, NODE), 0]


def frames(server, result):
    import numpy as np
    from PIL import Image

    output = server.base / "output"
    files = [output / image["subfolder"] / image["filename"] for image in result.outputs["frames"]["images"]]
    return np.stack([np.asarray(Image.open(file)) for file in files])


def test_the_workflow_runs_to_a_video_and_reports(server):
    from workflow import node_id

    prompt = tiny_prompt(server)
    result = server.run(prompt)
    (saved,) = result.outputs[node_id(prompt, "SaveVideo")]["images"]
    video = server.base / "output" / saved["subfolder"] / saved["filename"]
    assert video.suffix == ".mp4" and video.stat().st_size > 0
    (report,) = result.reports
    assert report["node"] == node_id(prompt, NODE)
    # 2 layers, 2 steps, guidance in one batch: the first step is dense by default.
    assert report["sparse_calls"] == 2 and report["dense_calls"] == {"dense first steps": 2}
    assert report["summary"] in server.log()
    assert len(frames(server, result)) == 9


def test_bypassing_the_node_equals_never_having_it(server):
    """Dense before, sparse, dense after by bypass: pixels compared, since files carry the prompt."""
    import numpy as np

    never = tiny_prompt(server, bypass=NODE)
    before = frames(server, server.run(never))
    changed = frames(server, server.run(tiny_prompt(server, dense_first_steps=0)))
    for node in never.values():             # another seed and back, so that the server's cache does not answer
        if "seed" in node["inputs"]:
            node["inputs"]["seed"] += 1
    server.run(never)
    for node in never.values():
        if "seed" in node["inputs"]:
            node["inputs"]["seed"] -= 1
    after = frames(server, server.run(never))
    assert np.array_equal(before, after) and not np.array_equal(before, changed)


@pytest.mark.parametrize("inputs, says", [
    (dict(method="magic"), ["magic", "ropeslr"]), (dict(sparsity=1.5), ["1.5", "0.98"]),
    (dict(dense_layers="0,x,9-"), ["'x'", "'9-'"]),
    (dict(start_percent=0.6, end_percent=0.3), ["start_percent is 0.6"]),
])
def test_the_server_refuses_bad_prompts_in_words(server, inputs, says):
    status, answer = server.post_prompt(tiny_prompt(server, **inputs), "test")
    errors = [each for node in answer["node_errors"].values() for each in node["errors"]]
    said = " ".join(f"{each['message']} {each['details']}" for each in errors)
    assert status == 400 and all(piece in said for piece in says), said


def test_the_template_browser_lists_the_workflow(server):
    """The frontend asks for templates of every installed pack; ours come from workflows/."""
    listed = server.get("/api/workflow_templates")
    assert "wan2.1_t2v" in listed["ComfyUI-RoPeSLR"]


def test_strict_stops_before_sampling_with_our_words(server):
    from workflow import node_id

    prompt = tiny_prompt(server, strict=True)
    prompt[node_id(prompt, NODE)]["inputs"]["min_tokens"] = 4096
    with pytest.raises(RuntimeError, match="192 tokens are fewer than min_tokens 4096"):
        server.run(prompt)
