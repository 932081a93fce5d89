"""Train Sparse LoRA: a LoRA that makes up for what sparse attention loses."""

from __future__ import annotations

import contextlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import comfy.sample
import folder_paths
import node_helpers
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..attention import SparsePlan
from ..attention.adapters import open_safetensors, quoted
from ..attention.plan import ALLOCATIONS, MAX_SPARSITY, METHODS
from ..training import OPTIMIZERS, TrainSettings
from . import folders
from .adapter_io import AdapterType
from .patching.patch import KEY

NEW = "[None]"
TRAINABLE = tuple(name for name in METHODS if name != "vsa")
NO_PROMPTS = "positive has no prompt; connect at least one CLIP Text Encode."
NO_LATENTS = (
    "latents is empty; connect an empty latent of the size to train at, or finished videos."
)
SIZES = (
    "latents have several sizes ({sizes}); a sparse LoRA is trained at one. Resize the videos, or "
    "train one LoRA for each."
)
NESTED = "latents with sound beside the video cannot be trained on yet; connect the video's alone."
CHANNELS = (
    "latents have {found} channels, and this model needs {expected}: they are of another model. "
    "Use the model's own Empty Latent node, or encode with its VAE."
)
COUNTS = (
    "There are {latents} videos and {prompts} prompts; give one prompt for all videos, or one for "
    "each."
)
SIGMAS = "sigmas has {count} level{s}; at least two are needed, as schedulers give them."


class RoPeSLRTrainSparseLoRA(io.ComfyNode):
    """MODEL, prompts and latents -> LORA_MODEL, LOSS_MAP, INT, ROPESLR_ADAPTER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RoPeSLRTrainSparseLoRA",
            display_name="Train Sparse LoRA",
            category="model/training",
            is_experimental=True,
            is_input_list=True,
            is_output_node=True,
            description=(
                "Trains a LoRA that makes sparse attention look more like dense attention, for "
                "your model, LoRAs, sampler and size. It learns from videos that the dense model "
                "makes of your prompts, or from yours; nothing is downloaded. Saves into "
                "models/loras and models/ropeslr; goes on where it was stopped."
            ),
            search_aliases=["sparse lora", "distill", "train sparse attention", "sla training"],
            inputs=_inputs(),
            outputs=[
                io.Custom("LORA_MODEL").Output(display_name="lora"),
                io.Custom("LOSS_MAP").Output(display_name="loss_map"),
                io.Int.Output(display_name="steps"),
                AdapterType.Output(display_name="adapter"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, name: Any = None) -> bool | str:
        """Refuse a name that could not be written, before anything runs."""
        given = name[0] if isinstance(name, list) and name else name
        try:
            folders.free_path(folders.LORAS, given if isinstance(given, str) else "sparse_lora")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        model: list,
        latents: list,
        positive: list,
        negative: list | None = None,
        **widgets: list,
    ) -> io.NodeOutput:
        """Check everything that can be checked, then train."""
        from .lora_training import Asked, train_sparse_lora

        given = {name: values[0] for name, values in widgets.items()}
        plan = _plan(model[0], given)
        settings = TrainSettings(
            **{each.name: given[each.name] for each in fields(TrainSettings) if each.name in given}
        )
        if given["rank"] < 1:
            raise ValueError(f"rank is {given['rank']}; it must be 1 or more.")
        videos, blank, mask = _videos(latents, model[0])
        use = _use(given, positive, negative, len(videos), (blank, mask))
        existing, before = _existing(given["existing_lora"])
        dtype = given["training_dtype"]
        node_id = cls.hidden.unique_id if cls.hidden is not None else None
        trained = train_sparse_lora(
            Asked(
                model=model[0],
                use=use,
                plan=plan,
                settings=settings,
                given=videos,
                samples=given["samples"],
                rank=given["rank"],
                dtype=None if dtype == "none" else node_helpers.string_to_torch_dtype(dtype),
                lora_dtype=getattr(
                    torch, {"bf16": "bfloat16", "fp32": "float32"}[given["lora_dtype"]]
                ),
                checkpoints=given["gradient_checkpointing"],
                offloading=given["offloading"],
                existing=existing,
                name=given["name"],
                keep_last=given["keep_last"],
                resume=given["resume"],
                node_id=node_id,
            )
        )
        losses = {
            "loss": trained.losses,
            "held_out_steps": [step for step, _ in trained.errors],
            "held_out": [error for _, error in trained.errors],
        }
        return io.NodeOutput(
            trained.lora,
            losses,
            trained.steps + before,
            trained.adapter,
            ui=ui.PreviewText(trained.report),
        )


def _inputs() -> list[Any]:
    """Those of ComfyUI's own Train LoRA first, under its names, in its order, with its defaults."""
    like_core: list[Any] = [
        io.Model.Input(
            "model",
            tooltip=(
                "The MODEL as it will be used, with its LoRAs. A RoPeSLR Sparse Attention node "
                "before it counts too, but for method, sparsity and allocation, which are here."
            ),
        ),
        io.Latent.Input(
            "latents",
            tooltip=(
                "An empty latent of the size to train at: the dense model then makes the videos to "
                "learn from. Or finished videos of one size."
            ),
        ),
        io.Conditioning.Input(
            "positive",
            tooltip=(
                "The prompts: several for videos of every kind that the LoRA is for. With finished "
                "videos: one for each, or one for all."
            ),
        ),
        io.Int.Input("batch_size", default=1, min=1, max=10000, tooltip="Examples of one step."),
        io.Int.Input(
            "grad_accumulation_steps",
            default=1,
            min=1,
            max=1024,
            tooltip="Multiplies batch_size; the examples of a step are computed one by one anyway.",
        ),
        io.Int.Input(
            "steps",
            default=16,
            min=1,
            max=100000,
            tooltip="16 only try it out; 200 to 400 are what a LoRA needs.",
        ),
        io.Float.Input(
            "learning_rate",
            default=0.0005,
            min=0.0000001,
            max=1.0,
            step=0.0000001,
            tooltip="0.0005 to 0.001. It rises over 20 steps, and falls over the last 40 %.",
        ),
        io.Int.Input(
            "rank", default=8, min=1, max=128, tooltip="Rank of the LoRA. 16 was measured."
        ),
        io.Combo.Input(
            "optimizer",
            options=list(OPTIMIZERS),
            default="AdamW",
            tooltip="PyTorch's own.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            # Another seed is another training: by itself the browser would change it after each.
            control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip="Of the LoRA's first values, the videos, and all noise.",
        ),
        io.Combo.Input(
            "training_dtype",
            options=["bf16", "fp32", "none"],
            default="bf16",
            tooltip="What the model computes in. none: as it does without training.",
        ),
        io.Combo.Input(
            "lora_dtype",
            options=["bf16", "fp32"],
            default="bf16",
            tooltip="Of the saved LoRA; it is trained in fp32.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=True,
            tooltip="Much less memory, but slower.",
        ),
        io.Boolean.Input(
            "offloading",
            default=False,
            tooltip="Keep the model's weights in RAM, for models larger than the GPU. Slower.",
        ),
        io.Combo.Input(
            "existing_lora",
            options=[*folder_paths.get_filename_list(folders.LORAS), NEW],
            default=NEW,
            tooltip=(
                "A LoRA of this node to begin with, of the same rank. To go on with a training "
                "that was stopped, leave it at [None]: that goes by name."
            ),
        ),
    ]
    return like_core + _own_inputs()


def _own_inputs() -> list[Any]:
    return [
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip=(
                "The sampler's negative conditioning, where cfg is not 1: it is trained for too."
            ),
        ),
        io.Sampler.Input("sampler", tooltip="The sampler that the LoRA will be used with."),
        io.Sigmas.Input(
            "sigmas",
            tooltip=(
                "The noise levels that the LoRA will be used at, from a scheduler; of Wan 2.2, the "
                "part of the expert that is trained."
            ),
        ),
        io.Float.Input(
            "cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="The sampler's CFG."
        ),
        io.Combo.Input(
            "method",
            options=list(TRAINABLE),
            default="auto",
            tooltip="As in RoPeSLR Sparse Attention. The LoRA fits this method alone.",
        ),
        io.Float.Input(
            "sparsity",
            default=0.90,
            min=0.0,
            max=MAX_SPARSITY,
            step=0.01,
            display_mode=io.NumberDisplay.slider,
            tooltip="The sparsity that the LoRA will be used at.",
        ),
        io.Combo.Input(
            "allocation",
            options=list(ALLOCATIONS),
            default="auto",
            advanced=True,
            tooltip=(
                "auto: short sparse runs first find out how many blocks each head needs, and the "
                "LoRA is trained with that table. uniform: every head keeps the same, which gained "
                "nothing when it was measured."
            ),
        ),
        io.Int.Input(
            "samples",
            default=12,
            min=1,
            max=1000,
            tooltip=(
                "With an empty latent: how many videos to make first, prompt after prompt. One in "
                "six is not trained on, but used to judge."
            ),
        ),
        io.String.Input(
            "name",
            default="sparse_lora",
            tooltip=(
                "File name in models/loras and models/ropeslr, without extension. The same name "
                "with the same settings goes on where an earlier run was stopped; with others, the "
                "files get a number."
            ),
        ),
        io.Int.Input(
            "evaluate_every",
            default=25,
            min=0,
            max=100000,
            advanced=True,
            tooltip=("Steps between two held-out errors. The LoRA of the lowest comes out."),
        ),
        io.Int.Input(
            "save_every",
            default=100,
            min=0,
            max=100000,
            advanced=True,
            tooltip="Steps between two saves. Stopping saves too. 0: only then, and at the end.",
        ),
        io.Int.Input(
            "keep_last",
            default=2,
            min=0,
            max=1000,
            advanced=True,
            tooltip="How many of those LoRAs stay in models/loras.",
        ),
        io.Int.Input(
            "patience",
            default=4,
            min=0,
            max=1000,
            advanced=True,
            tooltip="Stop after so many held-out errors without a new lowest. 0: never.",
        ),
        io.Float.Input(
            "minutes",
            default=0.0,
            min=0.0,
            max=100000.0,
            step=1.0,
            advanced=True,
            tooltip="Stop after so many minutes of training. 0: none.",
        ),
        io.Boolean.Input(
            "resume",
            default=True,
            advanced=True,
            tooltip="Go on with an earlier training of this name and these settings.",
        ),
    ]


def _plan(model: Any, given: dict[str, Any]) -> SparsePlan:
    """That of the RoPeSLR node before, if there is one, with the settings of this node."""
    patch = model.get_attachment(KEY)
    plan = SparsePlan() if patch is None else patch.plan.asked
    own = {name: given[name] for name in ("method", "sparsity", "allocation")}
    backend = "auto" if plan.backend == "dense" else plan.backend
    return replace(plan, **own, backend=backend)


def _videos(latents: list[dict], model: Any) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Finished videos `(1, C, T, H, W)`, an empty one of their size, and a mask of what is kept."""
    if not latents:
        raise ValueError(NO_LATENTS)
    if any(getattr(each["samples"], "is_nested", False) for each in latents):
        raise ValueError(NESTED)
    parts = [part[None] for each in latents for part in each["samples"]]
    if not parts:
        raise ValueError(NO_LATENTS)
    sizes = sorted({tuple(each.shape[1:]) for each in parts})
    if len(sizes) > 1:
        raise ValueError(SIZES.format(sizes=", ".join(map(str, sizes))))
    expected = model.get_model_object("latent_format").latent_channels
    if sizes[0][0] != expected and any(bool(each.any()) for each in parts):
        raise ValueError(CHANNELS.format(found=sizes[0][0], expected=expected))
    mask = latents[0].get("noise_mask")
    if mask is not None:  # a start image in place of some frames: the rest is still to be made
        return [], parts[0].float(), mask[:1]
    made = [each for each in parts if bool(each.any())]
    empty = torch.zeros(parts[0].shape)
    return made, comfy.sample.fix_empty_latent_channels(model, empty), None


def _use(
    given: dict[str, Any],
    positive: list,
    negative: list | None,
    videos: int,
    size: tuple[Tensor, Tensor | None],
) -> Any:
    from .lora_training.data import Use

    prompts = [[entry] for conditioning in positive for entry in conditioning]
    if not prompts:
        raise ValueError(NO_PROMPTS)
    if videos and len(prompts) not in (1, videos):
        raise ValueError(COUNTS.format(latents=videos, prompts=len(prompts)))
    sigmas = given["sigmas"]
    if sigmas.numel() < 2:
        raise ValueError(SIGMAS.format(count=sigmas.numel(), s="s" * (sigmas.numel() != 1)))
    blank, mask = size
    unlike = None if not negative or not negative[0] else negative[0]
    return Use(given["sampler"], sigmas, given["cfg"], prompts, unlike, blank, mask)


def _existing(name: str) -> tuple[dict[str, Tensor] | None, int]:
    """A LoRA's tensors, and the steps that its name tells."""
    if name == NEW:
        return None, 0
    path = folder_paths.get_full_path_or_raise(folders.LORAS, name)
    with contextlib.closing(open_safetensors(Path(path))) as file:
        tensors = {key: file.read(key).clone() for key in file.shapes}
    if not tensors:
        raise ValueError(f"existing_lora {quoted(name)} holds no tensors.")
    told = name.rpartition("_steps")[0].rpartition("_")[2]
    return tensors, int(told) if told.isdecimal() else 0
