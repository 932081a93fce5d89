"""Whether a LoRA before the node was trained for other lists of blocks than the node makes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import folder_paths

from ..attention import ResolvedPlan, SparsePlan
from ..attention.adapters import AdapterError, open_safetensors
from .folders import LORAS
from .lora_training.files import LoraFacts
from .patching.notices import warn

OTHER_LISTS = (
    "'{lora}' was trained for {trained}, and this node has {here}. With other blocks than it was "
    "trained with, a sparse LoRA can be worse than none"
)
TRAINER = "RoPeSLRTrainSparseLoRA"
FOLLOWED = ("model", "lora")  # what a LoRA comes along, in the names of inputs


def warn_of_other_lists(
    prompt: Mapping[str, Any] | None, node_id: str | None, plan: ResolvedPlan
) -> None:
    """Log it for each LoRA on the way to the node's MODEL; prompt: the whole graph, by node ids."""
    if plan.backend == "dense" or not isinstance(prompt, Mapping):
        return
    for name, facts in _loras(prompt, str(node_id)):
        different = _differences(facts, plan)
        if different:
            trained = ", ".join(f"{key} {there}" for key, (there, _) in different.items())
            here = ", ".join(f"{key} {own}" for key, (_, own) in different.items())
            warn(OTHER_LISTS.format(lora=name, trained=trained, here=here))


def _differences(facts: LoraFacts, plan: ResolvedPlan) -> dict[str, tuple[Any, Any]]:
    """What decides which blocks are kept: trained with, and here."""
    pairs = {
        "method": (facts.method, plan.method),
        "sparsity": (facts.sparsity, plan.sparsity),
        "allocation": (facts.allocation, plan.allocation),
        "key_block": (facts.key_block, plan.key_tokens),
        "block_order": (facts.block_order, plan.block_order),
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _loras(prompt: Mapping[str, Any], node_id: str) -> Iterator[tuple[str, LoraFacts]]:
    """The sparse LoRAs that nodes before one load or train."""
    seen, left = set(), [node_id]
    while left:
        current = left.pop()
        node = prompt.get(current)
        if current in seen or not isinstance(node, Mapping):
            continue
        seen.add(current)
        inputs = node.get("inputs", {})
        if node.get("class_type") == TRAINER:
            facts = _will_be_trained(inputs)
            if facts is not None:
                yield str(inputs.get("name")), facts
            continue
        for name, value in inputs.items():
            if isinstance(value, (list, tuple)) and len(value) == 2:
                if any(part in name.lower() for part in FOLLOWED):
                    left.append(str(value[0]))
            elif isinstance(value, str) and value.endswith(".safetensors"):
                facts = _read(value)
                if facts is not None:
                    yield value, facts
            elif isinstance(value, Mapping):  # as packs with several LoRAs in a node have them
                file = value.get("lora")
                facts = _read(file) if isinstance(file, str) and value.get("on", True) else None
                if facts is not None:
                    yield str(file), facts


def _will_be_trained(inputs: Mapping[str, Any]) -> LoraFacts | None:
    """What the node that trains is set to; None where its settings are linked."""
    names = ("method", "sparsity", "allocation")
    settings = {name: inputs[name] for name in names if name in inputs}
    try:
        plan = SparsePlan(**settings).resolve()
    except (TypeError, ValueError):
        return None
    kept = plan.key_tokens, plan.query_tokens, plan.block_order
    return LoraFacts(plan.method, plan.sparsity, plan.allocation, *kept)


def _read(name: str) -> LoraFacts | None:
    """What a file of models/loras says that it was trained with."""
    path = folder_paths.get_full_path(LORAS, name)
    if path is None:
        return None
    with contextlib.suppress(AdapterError, OSError):
        with contextlib.closing(open_safetensors(Path(path))) as file:
            return LoraFacts.from_header(file.header)
    return None
