"""The shipped workflows: well-formed, complete, and run to a video on a real server."""

import asyncio
import json
import os
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from support import needs

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
NAMES = [
    "adapter_on_stock_model",
    "dense_vs_sparse",
    "hunyuanvideo1.5_t2v",
    "hunyuanvideo_t2v",
    "kandinsky5_t2v",
    "ltx2_two_stage_t2v",
    "minimax_h3_i2v",
    "minimax_h3_t2v",
    "sparkwan_few_step",
    "train_sparse_lora",
    "wan2.1_i2v",
    "wan2.1_t2v",
    "wan2.1_vace",
    "wan2.2_5b",
    "wan2.2_a14b_t2v",
]
QUICK = (  # run by default
    "hunyuanvideo_t2v",
    "ltx2_two_stage_t2v",
    "minimax_h3_t2v",
    "sparkwan_few_step",
    "wan2.2_a14b_t2v",
)
SOUND = ("ltx2_two_stage_t2v", "minimax_h3_i2v", "minimax_h3_t2v")
RUNS = {"ltx2_two_stage_t2v": 2}  # of one node, where it serves several samplers
NODE = "RoPeSLRSparseAttention"
ENDS = ("SaveVideo", "RoPeSLRReport", "RoPeSLRTrainSparseLoRA", "LossGraphNode")  # output nodes
SCHEMA = Draft202012Validator(
    json.loads((Path(__file__).parent / "schema_0_4.json").read_text(encoding="utf-8"))
)
FOLDERS = (
    "checkpoints",
    "clip_vision",
    "diffusion_models",
    "latent_upscale_models",
    "loras",
    "text_encoders",
    "vae",
)
TITLE = 30  # a node's title stands above its position


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def info():
    """What this ComfyUI knows of every node, with files of every name that a workflow asks for."""
    needs.need(needs.COMFYUI, "torch")
    import graph_file

    return graph_file.object_info()


def test_the_workflows_are_those_that_the_pack_promises():
    assert [path.stem for path in WORKFLOWS] == NAMES


def test_the_files_are_what_their_description_says(info):
    """After an edit by hand or a new input, the failure says to run `python dev.py workflows`."""
    import comfyui_version

    import graph_file
    import graphs

    if comfyui_version.__version__ != graph_file.CORE:
        pytest.skip(
            f"the files are written for ComfyUI {graph_file.CORE}; this is "
            f"{comfyui_version.__version__}"
        )
    described = graphs.workflows()
    assert sorted(described) == NAMES
    for path in WORKFLOWS:
        assert path.read_text(encoding="utf-8") == graphs.text_of(described[path.stem]), (
            f"{path.name} differs from tools/graphs.py; `python dev.py workflows` writes it anew"
        )


def test_every_workflow_has_a_small_thumbnail():
    for path in WORKFLOWS:
        picture = path.with_suffix(".jpg").read_bytes()
        assert picture[:3] == b"\xff\xd8\xff" and len(picture) <= 120_000, path.stem


def test_the_schema_holds(workflow):
    assert not [
        f"{'/'.join(map(str, each.path))}: {each.message}" for each in SCHEMA.iter_errors(workflow)
    ]


def test_the_schema_can_fail(workflow):
    for spoil in (
        lambda w: w.pop("last_link_id"),
        lambda w: w["links"][0].pop(),
        lambda w: w["nodes"][0].pop("pos"),
        lambda w: w.update(version=1),
        lambda w: w["groups"][0].pop("bounding"),
    ):
        spoiled = json.loads(json.dumps(workflow))
        spoil(spoiled)
        assert not SCHEMA.is_valid(spoiled)


def test_links_join_what_exists_and_types_agree(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) and max(nodes) == workflow["last_node_id"]
    numbers = [link[0] for link in workflow["links"]]
    assert len(set(numbers)) == len(numbers) and max(numbers) == workflow["last_link_id"]
    assert sorted(node["order"] for node in nodes.values()) == list(range(len(nodes)))
    for number, source, output, target, slot, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == number
        assert (
            nodes[source]["outputs"][output]["type"]
            == nodes[target]["inputs"][slot]["type"]
            == kind
        )
        assert nodes[source]["order"] < nodes[target]["order"]
    ends = [
        each["link"]
        for node in nodes.values()
        for each in node["inputs"]
        if each["link"] is not None
    ]
    starts = [
        number for node in nodes.values() for each in node["outputs"] for number in each["links"]
    ]
    assert sorted(ends) == sorted(starts) == sorted(numbers)


def test_every_node_has_its_widgets_and_what_it_needs(workflow, info):
    """Counted against ComfyUI's definitions.

    Control_after_generate of a seed is easily forgotten.
    """
    import graph_file

    for node in workflow["nodes"]:
        if node["type"] == graph_file.NOTE:
            continue
        names = graph_file.widget_names(info[node["type"]])
        assert len(node["widgets_values"]) == len(names), node["type"]
        linked = {each["name"] for each in node["inputs"] if each["link"] is not None}
        for name, kind, options, optional in graph_file.inputs_of(info[node["type"]]):
            assert optional or name in linked or graph_file.is_widget(kind, options), (
                f"{node['type']}: {name} is open"
            )


def test_our_nodes_are_found_by_the_manager_and_models_can_be_downloaded(workflow):
    loaders = [node for node in workflow["nodes"] if re.search("Loader|LoadSparse", node["type"])]
    loaders = [node for node in loaders if node["type"] != "LoraModelLoader"]  # it loads no file
    assert loaders
    for node in loaders:
        files = [
            value
            for value in node["widgets_values"]
            if re.search(r"\.(safetensors|pth)$", str(value))
        ]
        assert files and files == [model["name"] for model in node["properties"]["models"]]
        for model in node["properties"]["models"]:
            assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(
                "/" + model["name"]
            )
            assert model["directory"] in FOLDERS
    ours = [node for node in workflow["nodes"] if node["type"].startswith("RoPeSLR")]
    assert ours and all(
        node["properties"]["cnr_id"] == "ropeslr" and node["properties"]["ver"] for node in ours
    )


def test_the_read_me_names_every_file_and_the_slider(workflow):
    (note,) = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    (text,) = note["widgets_values"]
    models = [each for node in workflow["nodes"] for each in node["properties"].get("models", ())]
    assert all(
        f"[{each['name']}]({each['url']}) into **models/{each['directory']}**" in text
        for each in models
    )
    assert "**sparsity**" in text and "What to expect" in text


def test_no_file_names_a_place_of_one_machine(workflow):
    assert not re.search(r'"(/|[A-Za-z]:\\|~)[^"]*"|\b(home|Users)/', json.dumps(workflow["nodes"]))


def test_nothing_overlaps_and_every_node_stands_in_its_frame(workflow):
    """Sizes as the file has them; the browser's own are looked at in tests/browser."""
    boxes = [
        (node["pos"][0], node["pos"][1] - TITLE, node["size"][0], node["size"][1] + TITLE)
        for node in workflow["nodes"]
    ]
    frames = [group["bounding"] for group in workflow["groups"]]
    for boxes_of_a_kind in (boxes, frames):
        for i, (x, y, width, height) in enumerate(boxes_of_a_kind):
            for left, top, wide, high in boxes_of_a_kind[:i]:
                assert x >= left + wide or left >= x + width or y >= top + high or top >= y + height
    for x, y, width, height in boxes:
        inside = [
            left <= x and top <= y and x + width <= left + wide and y + height <= top + high
            for left, top, wide, high in frames
        ]
        outside = [
            x >= left + wide or left >= x + width or y >= top + high or top >= y + height
            for left, top, wide, high in frames
        ]
        assert sum(inside) + sum(outside) == len(frames)


def test_comfyui_accepts_every_workflow_as_it_stands(workflow, info, monkeypatch):
    """Converted by comfy-cli, checked by ComfyUI itself, on a machine that has the files."""
    needs.need("comfy_cli")
    import execution
    import folder_paths

    from workflow import to_prompt

    files = {
        value
        for node in workflow["nodes"]
        for value in node["widgets_values"]
        if isinstance(value, str)
    }
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda kind: sorted(files))
    monkeypatch.setattr(folder_paths, "get_annotated_filepath", lambda name, *_: __file__)
    monkeypatch.setattr(folder_paths, "exists_annotated_filepath", lambda name: name in files)
    monkeypatch.setattr(os, "listdir", lambda folder=".": sorted(files))
    monkeypatch.setattr(os.path, "isfile", lambda path: True)
    ok, error, outputs, node_errors = asyncio.run(
        execution.validate_prompt("test", to_prompt(workflow, info), None)
    )
    assert ok, (error, node_errors)
    assert len(outputs) == sum(node["type"] in ENDS for node in workflow["nodes"])


@pytest.fixture(scope="module")
def server():
    needs.need(needs.COMFYUI, "torch", "safetensors", "aiohttp", "comfy_cli", "pathspec")
    import comfy_host
    from comfy_server import ComfyServer
    from support.data import tiny_files

    base = Path(os.environ["ROPESLR_TEST_BASE"])
    comfy_host.boot()
    tiny_files.make(base)
    with ComfyServer(Path(os.environ["COMFYUI_PATH"]), base) as running:
        yield running


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow("thorough"))
        for name in NAMES
    ],
)
def test_every_workflow_runs_to_a_video(server, name):
    from workflow import load, make_tiny, to_prompt

    side = 256 if name == "wan2.2_5b" else 128  # its tokens are twice as large each way
    prompt = make_tiny(
        to_prompt(load(name), server.get("/object_info")), side, side, length=9, steps=2
    )
    result = server.run(prompt)
    (save,) = (key for key, node in prompt.items() if node["class_type"] == "SaveVideo")
    (saved,) = result.outputs[save]["images"]
    video = server.base / "output" / saved["subfolder"] / saved["filename"]
    assert video.suffix == ".mp4" and video.stat().st_size > 0
    assert has_sound(video) == (name in SOUND)
    nodes = [key for key, node in prompt.items() if node["class_type"] == NODE]
    runs = sorted(nodes * RUNS.get(name, 1))
    assert sorted(report["node"] for report in result.reports) == runs
    assert any(report["sparse_calls"] for report in result.reports), result.reports


def has_sound(video: Path) -> bool:
    import av

    with av.open(str(video)) as opened:
        return len(opened.streams.audio) == 1


def test_one_node_serves_two_stages_the_small_one_dense_and_the_large_one_sparse(server):
    """The second starts below full noise, so that none of its three steps is dense by itself."""
    from workflow import load, make_tiny, to_prompt

    prompt = to_prompt(load("ltx2_two_stage_t2v"), server.get("/object_info"))
    prompt = make_tiny(prompt, 128, 128, length=9, steps=2)
    for node in prompt.values():  # not what the server has kept
        if "noise_seed" in node["inputs"]:
            node["inputs"]["noise_seed"] += 1
    first, second = server.run(prompt).reports
    # 2 layers, 8 and 3 steps; 4 x 4 latent pixels in two frames, then four times as many.
    assert first["sparse_calls"] == 0 and sum(first["dense_calls"].values()) == 16
    assert first["dense_calls"]["32 tokens are fewer than min_tokens 64"] == 14
    assert (second["sparse_calls"], second["dense_calls"], second["tokens"]) == (6, {}, 128)


def test_the_four_steps_of_minimax_h3_run_as_its_note_says(server):
    """Its LoRA and noise shift turned on, and every step sparse."""
    from workflow import BYPASS, load, make_tiny, node_id, to_prompt

    workflow = load("minimax_h3_t2v")
    off = [node for node in workflow["nodes"] if node["mode"] == BYPASS]
    assert [node["type"] for node in off] == ["LoraLoaderModelOnly", "MiniMaxH3SigmaShift"]
    for node in off:
        node["mode"] = 0
    prompt = to_prompt(workflow, server.get("/object_info"))
    prompt = make_tiny(prompt, 128, 128, length=9, steps=4)
    prompt[node_id(prompt, "KSamplerSelect")]["inputs"]["sampler_name"] = "euler"
    prompt[node_id(prompt, NODE)]["inputs"].update(
        method="top-k plain",
        sparsity=0.85,
        dense_first_steps=0,
        block_order="raster",
        key_block="64",
        allocation="uniform",
    )
    (report,) = server.run(prompt).reports
    assert (report["sparse_calls"], report["dense_calls"]) == (8, {})
    assert report["method"] == "top-k plain"


def test_a_trained_lora_is_used_without_the_training_node_as_the_note_says(server):
    """By the files that the training saved: the same frames as by its outputs."""
    import numpy as np

    from workflow import LORA, load, make_tiny, node_id, to_prompt

    prompt = to_prompt(load("train_sparse_lora"), server.get("/object_info"))
    prompt = make_tiny(prompt, 128, 128, length=9, steps=2)
    train, loader = node_id(prompt, "RoPeSLRTrainSparseLoRA"), node_id(prompt, "LoraModelLoader")
    name = f"{LORA}_for_later"
    # Long enough for the held-out error to fall beyond doubt, or there is no finished file.
    prompt[train]["inputs"].update(
        name=name,
        steps=6,
        batch_size=2,
        samples=4,
        evaluate_every=2,
        learning_rate=0.002,
        training_dtype="fp32",
    )
    prompt["frames"] = frames_of(prompt)
    trained = server.run(prompt)
    (text,) = trained.outputs[train]["text"]
    assert "all steps are done" in text and f"Saved as {name}.safetensors" in text
    before = frames(server, trained)

    shift = prompt[loader]["inputs"]["model"]
    for gone in ("RoPeSLRTrainSparseLoRA", "LossGraphNode", "LoraModelLoader"):
        del prompt[node_id(prompt, gone)]
    prompt[loader] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": shift, "lora_name": f"{name}.safetensors", "strength_model": 1.0},
    }
    prompt["adapter"] = {
        "class_type": "RoPeSLRLoadAdapter",
        "inputs": {"adapter_name": f"{name}.safetensors", "rank": 0},
    }
    prompt[node_id(prompt, NODE)]["inputs"]["adapter"] = ["adapter", 0]
    later = server.run(prompt)
    (report,) = later.reports
    assert report["sparse_calls"] == 2 and np.array_equal(frames(server, later), before)

    prompt[loader]["inputs"]["strength_model"] = 0.0
    assert not np.array_equal(frames(server, server.run(prompt)), before)


def test_the_length_of_every_picture_and_sound_is_one_number(info):
    """LTX-2 takes it from a node of its own, which a tiny prompt must change as well."""
    needs.need("comfy_cli")
    from workflow import load, make_tiny, to_prompt

    prompt = make_tiny(to_prompt(load("ltx2_two_stage_t2v"), info), 128, 64, length=17, steps=2)
    (number,) = (key for key, node in prompt.items() if node["class_type"] == "PrimitiveInt")
    assert prompt[number]["inputs"]["value"] == 17
    taken = [(name, value) for node in prompt.values() for name, value in node["inputs"].items()]
    lengths = [value for name, value in taken if name in ("length", "frames_number")]
    assert lengths == [[number, 0]] * 2


def test_an_equal_node_of_another_number_hears_of_its_own_runs(server):
    """ComfyUI caches equal nodes: the same workflow in another tab, or a copied node."""
    from workflow import load, make_tiny, to_prompt

    prompt = make_tiny(
        to_prompt(load("wan2.1_t2v"), server.get("/object_info")), 128, 128, length=9, steps=2
    )
    (seed,) = (node["inputs"] for node in prompt.values() if "seed" in node["inputs"])
    (ours,) = (key for key, node in prompt.items() if node["class_type"] == NODE)
    assert [report["node"] for report in server.run(prompt).reports] == [ours]
    seed["seed"] += 1
    renumbered = json.loads(re.sub(rf'"{ours}"', '"77"', json.dumps(prompt)))
    assert [report["node"] for report in server.run(renumbered).reports] == ["77"]


def tiny_prompt(server, name="wan2.1_t2v", bypass=None, **inputs):
    from workflow import load, make_tiny, node_id, to_prompt

    prompt = to_prompt(load(name), server.get("/object_info"), bypass)
    prompt = make_tiny(prompt, width=128, height=128, length=9, steps=2)
    if bypass is None:
        prompt[node_id(prompt, NODE)]["inputs"].update(min_tokens=64, **inputs)
    prompt["frames"] = frames_of(prompt)
    return prompt


def frames_of(prompt):
    """A node that saves the decoded video as pictures."""
    from workflow import node_id

    inputs = {"images": [node_id(prompt, "VAEDecode"), 0], "filename_prefix": "test/frames"}
    return {"class_type": "SaveImage", "inputs": inputs}


def test_the_converted_workflow_holds_the_widgets_at_their_places(server):
    from workflow import load, node_id, to_prompt

    prompt = to_prompt(load("wan2.1_t2v"), server.get("/object_info"))
    inputs = prompt[node_id(prompt, NODE)]["inputs"]
    definition = server.get(f"/object_info/{NODE}")[NODE]["input"]
    defaults = {
        name: spec[1]["default"]
        for group in definition.values()
        for name, spec in group.items()
        if isinstance(spec, list) and len(spec) > 1 and "default" in spec[1]
    }
    assert {name: value for name, value in inputs.items() if name != "model"} == defaults
    assert prompt[node_id(prompt, "KSampler")]["inputs"]["model"] == [node_id(prompt, NODE), 0]


def frames(server, result):
    import numpy as np
    from PIL import Image

    output = server.base / "output"
    files = [
        output / image["subfolder"] / image["filename"]
        for image in result.outputs["frames"]["images"]
    ]
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
    """Dense before, sparse, dense after by bypass.

    Pixels compared, since files carry the prompt.
    """
    import numpy as np

    never = tiny_prompt(server, bypass=NODE)
    before = frames(server, server.run(never))
    changed = frames(server, server.run(tiny_prompt(server, dense_first_steps=0)))
    for node in never.values():  # another seed and back, so that the server's cache does not answer
        if "seed" in node["inputs"]:
            node["inputs"]["seed"] += 1
    server.run(never)
    for node in never.values():
        if "seed" in node["inputs"]:
            node["inputs"]["seed"] -= 1
    after = frames(server, server.run(never))
    assert np.array_equal(before, after) and not np.array_equal(before, changed)


@pytest.mark.parametrize(
    "inputs, says",
    [
        (dict(method="magic"), ["magic", "ropeslr"]),
        (dict(sparsity=1.5), ["1.5", "0.98"]),
        (dict(dense_layers="0,x,9-"), ["'x'", "'9-'"]),
        (dict(start_percent=1.5), ["1.5", "1.0"]),
    ],
)
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
