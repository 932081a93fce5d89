"""What saved workflows rely on: node ids, inputs and outputs by position; the package by itself."""

import os
import subprocess
import sys
from pathlib import Path

import comfy_host
import package

# The first release. A line may grow at its end; nothing in it may be moved, renamed, retyped or
# removed.
FROZEN = {
    "RoPeSLRDoctor": (
        [
            "model_kind: COMBO",
            "width: INT",
            "height: INT",
            "length: INT",
            "sparsity: FLOAT",
            "seconds: INT",
        ],
        ["STRING"],
    ),
    "RoPeSLRFewStepSigmas": (["preset: COMBO"], ["SIGMAS"]),
    "RoPeSLRLoadAdapter": (["adapter_name: COMBO", "rank: INT"], ["ROPESLR_ADAPTER"]),
    "RoPeSLRLoadSparseCheckpoint": (
        ["checkpoint: COMBO", "weight_dtype: COMBO", "save_converted: BOOLEAN"],
        ["MODEL", "ROPESLR_ADAPTER"],
    ),
    "RoPeSLRRaylight": (
        [
            "ray_actors: RAY_ACTORS",
            "adapter: ROPESLR_ADAPTER",
            "method: COMBO",
            "sparsity: FLOAT",
            "rank: INT",
            "start_percent: FLOAT",
            "end_percent: FLOAT",
            "dense_first_steps: INT",
            "dense_last_steps: INT",
            "dense_layers: STRING",
        ],
        ["RAY_ACTORS"],
    ),
    "RoPeSLRReport": (
        [
            "latent: LATENT",
            "model: MODEL",
            "positive: CONDITIONING",
            "compare: COMBO",
            "at: FLOAT",
            "layer: INT",
            "head: INT",
        ],
        ["LATENT", "IMAGE", "STRING"],
    ),
    "RoPeSLRSaveAdapter": (
        ["adapter: ROPESLR_ADAPTER", "name: STRING", "model: MODEL", "latent: LATENT"],
        [],
    ),
    "RoPeSLRSparseAttention": (
        [
            "model: MODEL",
            "adapter: ROPESLR_ADAPTER",
            "method: COMBO",
            "sparsity: FLOAT",
            "rank: INT",
            "start_percent: FLOAT",
            "end_percent: FLOAT",
            "dense_first_steps: INT",
            "dense_last_steps: INT",
            "dense_layers: STRING",
            "calibrate: COMBO",
            "calibrate_rows: INT",
            "backend: COMBO",
            "block_order: COMBO",
            "min_tokens: INT",
            "keep_diagonal: BOOLEAN",
            "keep_first_frame: BOOLEAN",
            "strict: BOOLEAN",
            "verbose: BOOLEAN",
            "sla_variant: COMBO",
            "key_block: COMBO",
            "allocation: COMBO",
            "target: COMBO",
            "error: FLOAT",
        ],
        ["MODEL"],
    ),
    "RoPeSLRTrainSparseLoRA": (
        [
            "model: MODEL",
            "latents: LATENT",
            "positive: CONDITIONING",
            "batch_size: INT",
            "grad_accumulation_steps: INT",
            "steps: INT",
            "learning_rate: FLOAT",
            "rank: INT",
            "optimizer: COMBO",
            "seed: INT",
            "training_dtype: COMBO",
            "lora_dtype: COMBO",
            "gradient_checkpointing: BOOLEAN",
            "offloading: BOOLEAN",
            "existing_lora: COMBO",
            "negative: CONDITIONING",
            "sampler: SAMPLER",
            "sigmas: SIGMAS",
            "cfg: FLOAT",
            "method: COMBO",
            "sparsity: FLOAT",
            "allocation: COMBO",
            "samples: INT",
            "name: STRING",
            "evaluate_every: INT",
            "save_every: INT",
            "keep_last: INT",
            "patience: INT",
            "minutes: FLOAT",
            "resume: BOOLEAN",
        ],
        ["LORA_MODEL", "LOSS_MAP", "INT", "ROPESLR_ADAPTER"],
    ),
}
LOAD = """
import asyncio, sys
import comfy_host
nodes = comfy_host.boot()
assert asyncio.run(nodes.load_custom_node(sys.argv[1]))
ours = sorted(name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("RoPeSLR"))
assert list(nodes.EXTENSION_WEB_DIRS.values()) == [sys.argv[1] + "/web"], nodes.EXTENSION_WEB_DIRS
print(*ours)
"""


def slots(node):
    """Names and types of a node's inputs in schema order, and the types of its outputs."""
    schema = comfy_host.boot().NODE_CLASS_MAPPINGS[node].GET_SCHEMA()
    inputs = [f"{each.id}: {each.get_io_type()}" for each in schema.inputs]
    return inputs, [each.get_io_type() for each in schema.outputs]


def test_saved_workflows_keep_their_meaning():
    comfy_host.pack()
    ours = {name for name in comfy_host.boot().NODE_CLASS_MAPPINGS if name.startswith("RoPeSLR")}
    assert ours >= set(FROZEN)
    for node, (inputs, outputs) in FROZEN.items():
        now_in, now_out = slots(node)
        assert now_in[: len(inputs)] == list(inputs), node
        assert now_out[: len(outputs)] == list(outputs), node


def test_a_new_widget_comes_last_in_the_browser_too():
    """ComfyUI shows optional inputs behind all others, and workflows hold values in that order."""
    for node in FROZEN:
        schema = comfy_host.boot().NODE_CLASS_MAPPINGS[node].GET_SCHEMA()
        optional = [bool(each.optional) for each in schema.inputs if hasattr(each, "default")]
        assert optional == sorted(optional), f"{node}: a new widget needs optional=True"


def test_the_package_loads_by_itself(tmp_path):
    """What the registry hands out, in an empty folder: it needs no file that is left out."""
    folder = tmp_path / "ropeslr"
    package.copy(folder)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(Path(package.__file__).parent)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == sorted(FROZEN)
