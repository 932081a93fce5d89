"""Runs the Train Sparse LoRA node of a workflow without a browser; by torchrun, on several GPUs.

    python -m training WORKFLOW.json --comfyui ~/ComfyUI
    torchrun --nproc-per-node 4 -m training WORKFLOW.json --comfyui ~/ComfyUI --set batch_size=4

WORKFLOW.json: exported by ComfyUI with Export (API). Each process runs what the node needs, on its
own GPU; they share the examples of each step, and the first one writes the files. The node in the
browser goes on with them, and this command with the node's.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NODE = "RoPeSLRTrainSparseLoRA"
NOT_THERE = (
    "{path} is no ComfyUI (no execution.py). Name its folder with --comfyui or COMFYUI_PATH."
)
NOT_API = "{path} is not in the API format. In ComfyUI: Workflow, Export (API)."
NO_NODE = "{path} has no Train Sparse LoRA node."
SEVERAL = "{path} has several Train Sparse LoRA nodes ({ids}); choose one with --node."
NO_INPUT = "--set {name}: the node has no such widget. It has: {names}."


def main() -> int:
    """-> the exit code: 0 where the training came to its end."""
    arguments = _arguments()
    prompt, node = read_workflow(Path(arguments.workflow), arguments.node)
    apply_settings(prompt[node]["inputs"], arguments.set)
    _take_own_gpu()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    execution = _boot(Path(arguments.comfyui), arguments)
    with _Processes():
        return asyncio.run(_execute(execution, prompt, node))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workflow", help="a workflow in ComfyUI's API format")
    inside = ROOT.parents[1]  # custom_nodes/ComfyUI-RoPeSLR in a ComfyUI
    default = os.environ.get("COMFYUI_PATH") or str(inside)
    parser.add_argument("--comfyui", default=default, help="the folder of ComfyUI")
    parser.add_argument("--base-directory", help="as of ComfyUI: where models and outputs are")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument("--node", help="the node's id, where a workflow has several")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="WIDGET=VALUE",
        help="another value for a widget of the node, such as steps=400",
    )
    parser.add_argument(
        "--shard",
        action="store_true",
        help="spread the model's blocks over the processes (FSDP2), where one GPU is too small",
    )
    return parser.parse_args()


def read_workflow(path: Path, node: str | None) -> tuple[dict[str, Any], str]:
    """A prompt by node ids, and the id of the node that trains. Raises SystemExit in words."""
    prompt = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(prompt, dict) or not all(
        isinstance(each, dict) and "class_type" in each for each in prompt.values()
    ):
        raise SystemExit(NOT_API.format(path=path))
    found = [key for key, each in prompt.items() if each["class_type"] == NODE]
    if node is not None:
        found = [key for key in found if key == node]
    if len(found) != 1:
        text = SEVERAL if found else NO_NODE
        raise SystemExit(text.format(path=path, ids=", ".join(found)))
    return prompt, found[0]


def apply_settings(inputs: dict[str, Any], given: list[str]) -> None:
    """`--set` on a node's widgets, each read as the kind of value that is there."""
    widgets = [name for name, value in inputs.items() if not isinstance(value, list)]
    for each in given:
        name, _, text = each.partition("=")
        if name not in widgets:
            raise SystemExit(NO_INPUT.format(name=name, names=", ".join(widgets)))
        before = inputs[name]
        if isinstance(before, bool):
            inputs[name] = text.lower() in ("1", "true", "yes", "on")
        else:
            inputs[name] = type(before)(text)


def _take_own_gpu() -> None:
    """One GPU for each process, before PyTorch looks for them."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    mine = visible.split(",")[int(rank)] if visible else rank
    os.environ["CUDA_VISIBLE_DEVICES"] = mine


def _boot(tree: Path, arguments: argparse.Namespace) -> Any:
    """ComfyUI with all of its node packs, without a server; -> its module `execution`."""
    if not (tree / "execution.py").is_file():
        raise SystemExit(NOT_THERE.format(path=tree))
    # This pack's own folders of the names `nodes` and `training` are not meant from here on.
    sys.path[:] = [str(tree), *(each for each in sys.path if Path(each or ".").resolve() != ROOT)]
    importlib.import_module("comfy.options")  # parsing stays off: our arguments are not ComfyUI's
    args = importlib.import_module("comfy.cli_args").args
    args.cpu = arguments.cpu
    args.base_directory = arguments.base_directory
    importlib.import_module("utils.extra_config")  # before nodes finds another `utils`
    nodes: Any = importlib.import_module("nodes")
    folders = importlib.import_module("folder_paths").get_folder_paths("custom_nodes")
    packs = all(Path(each).is_dir() for each in folders)  # ComfyUI lists them unasked
    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=packs, init_api_nodes=False))
    if NODE not in nodes.NODE_CLASS_MAPPINGS:  # not installed there
        asyncio.run(nodes.load_custom_node(str(ROOT)))
    if arguments.shard:
        pack = nodes.NODE_CLASS_MAPPINGS[NODE].__module__.rpartition(".nodes.")[0]
        importlib.import_module(f"{pack}.training.crowd").SHARDED.set(True)
    return importlib.import_module("execution")


class _Processes:
    """The process group of torchrun, for the length of a `with` block; nothing for one process."""

    def __init__(self) -> None:
        self._many = int(os.environ.get("WORLD_SIZE", "1")) > 1

    def __enter__(self) -> None:
        if self._many:
            import torch

            gpu = torch.cuda.is_available()
            torch.distributed.init_process_group("nccl" if gpu else "gloo")

    def __exit__(self, *_: Any) -> None:
        if self._many:
            import torch

            torch.distributed.destroy_process_group()


class _NoServer:
    """What ComfyUI's executor asks of a server, where there is none."""

    client_id = None
    last_node_id = None
    last_prompt_id = None

    def send_sync(self, *_: Any) -> None:
        """Nobody listens."""


async def _execute(execution: Any, prompt: dict[str, Any], node: str) -> int:
    valid = await execution.validate_prompt("training", prompt, [node])
    if not valid[0]:
        print(json.dumps({"error": valid[1], "nodes": valid[3]}, indent=2), file=sys.stderr)
        return 1
    executor = execution.PromptExecutor(
        _NoServer(), execution.CacheType.CLASSIC, {"lru": 0, "ram": 0, "ram_inactive": 0}
    )
    await executor.execute_async(prompt, "training", {}, [node])
    for event, told in executor.status_messages:
        if event == "execution_error":
            print(f"{told['exception_type']}: {told['exception_message']}", file=sys.stderr)
            print("".join(told["traceback"]), file=sys.stderr)
        elif event == "execution_interrupted":
            print("Interrupted; the training is saved.", file=sys.stderr)
    return 0 if executor.success else 1


if __name__ == "__main__":
    sys.exit(main())
