"""RoPeSLR Sparse Attention: the one node between a model and its sampler."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..attention.adapters import Adapter
from ..attention.plan import (
    ALLOCATIONS,
    AUTO,
    BACKENDS,
    BLOCK_ORDERS,
    CALIBRATE,
    KEY_BLOCKS,
    MAX_CALIBRATE_ROWS,
    MAX_RANK,
    MAX_SPARSITY,
    METHODS,
    PRECISIONS,
    QUERY_BLOCKS,
    SLA_VARIANTS,
    TARGETS,
    TRAININGS,
    SparsePlan,
    parse_layers,
)
from .adapter_io import AdapterType
from .patching import install, installed_plan
from .trained_for import warn_of_other_lists


class RoPeSLRSparseAttention(io.ComfyNode):
    """MODEL -> MODEL with block-sparse self-attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RoPeSLRSparseAttention",
            display_name="RoPeSLR Sparse Attention",
            category="RoPeSLR",
            description=(
                "Speeds up Wan, HunyuanVideo, MiniMax H3, LTX and other video models: "
                "self-attention computes only the most important blocks and replaces the rest with "
                "a cheap, self-calibrating approximation. Connect it between the model (or its "
                "LoRAs) and the sampler."
            ),
            search_aliases=[
                "sparse attention",
                "block sparse",
                "fast video",
                "faster wan",
                "speed up",
                "wan",
                "hunyuan",
                "sla",
                "rola",
                "adaspa",
                "sage",
                "radial",
                "teacache",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "A video model: Wan, HunyuanVideo, MiniMax H3, LTX-Video, LTX-2, Kandinsky "
                        "5, Cosmos Predict2, Mochi or CogVideoX. Others run dense; the log notes "
                        "it."
                    ),
                ),
                AdapterType.Input(
                    "adapter",
                    optional=True,
                    tooltip=(
                        "Trained weights, from Load RoPeSLR Adapter or Load Sparse Checkpoint. Not "
                        "connected: training-free."
                    ),
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="auto",
                    tooltip=(
                        "auto: the adapter's method, or ropeslr without one. ropeslr: kept blocks "
                        "plus a self-calibrating background. rola, sla: kept blocks plus a trained "
                        "low-rank or linear branch, for SparkWan and TurboWan checkpoints. adaspa: "
                        "finds the blocks by exact search, twice in a run; dense until the first "
                        "search. top-k: kept blocks plus one averaged key for each dropped block. "
                        "top-k plain: kept blocks only. vsa: cubes of 4 x 4 x 4 tokens plus a "
                        "coarse branch that the model itself holds, for checkpoints trained with "
                        "it (FastH3; ComfyUI 0.35 and newer), where auto takes it."
                    ),
                ),
                io.Float.Input(
                    "sparsity",
                    default=0.90,
                    min=0.0,
                    max=MAX_SPARSITY,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip=(
                        "Share of key blocks that are NOT computed. 0.90 computes one block in "
                        "ten, about a tenth of the attention work. Higher is faster; lower is "
                        "closer to the dense video. 0 drops nothing and runs dense."
                    ),
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=MAX_RANK,
                    step=2,
                    tooltip=(
                        "Rank of the approximation per head; 0 = full (or the adapter's rank). "
                        "Lower is slightly faster and less accurate. Try 64."
                    ),
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Steps before this point of the schedule run dense.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Steps after this point of the schedule run dense.",
                ),
                io.Int.Input(
                    "dense_first_steps",
                    default=AUTO,
                    min=AUTO,
                    max=1000,
                    tooltip=(
                        "Steps to run dense at the start; they set the composition. Counted over "
                        "the whole schedule, across both experts of Wan 2.2. -1 = auto: 1, or 0 "
                        "for adaspa and sparse-trained checkpoints (rola, sla, vsa)."
                    ),
                ),
                io.Int.Input(
                    "dense_last_steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip=(
                        "Steps to run dense at the end, counted over the whole schedule. 1 can "
                        "improve fine detail."
                    ),
                ),
                io.String.Input(
                    "dense_layers",
                    default="",
                    tooltip=(
                        'Layers to run dense, counted from 0: numbers and ranges, such as "0, 1, '
                        '38-39".'
                    ),
                ),
                io.Combo.Input(
                    "calibrate",
                    options=list(CALIBRATE),
                    default="auto",
                    advanced=True,
                    tooltip=(
                        "ropeslr: when to compute a few queries exactly and fit the background to "
                        "them. auto: at the first sparse step and every 5 steps, in runs of up to "
                        "8 steps at every one; never with a trained adapter, and like refine with "
                        "one that a run has learned. refine: every 5 steps, with an adapter too, "
                        "starting from its values."
                    ),
                ),
                io.Int.Input(
                    "calibrate_rows",
                    default=512,
                    min=1,
                    max=MAX_CALIBRATE_ROWS,
                    advanced=True,
                    tooltip=(
                        "Queries per layer that each calibration computes exactly; fewer correct "
                        "less. 512 cost 0.7 % of dense attention at 75,000 tokens."
                    ),
                ),
                io.Combo.Input(
                    "backend",
                    options=list(BACKENDS),
                    default="auto",
                    advanced=True,
                    tooltip=(
                        "auto: Triton kernels where they can run, otherwise plain PyTorch. triton: "
                        "fails instead of falling back to PyTorch. pytorch: always plain PyTorch. "
                        "dense: turns the node off but still counts calls, for comparison."
                    ),
                ),
                io.Combo.Input(
                    "block_order",
                    options=list(BLOCK_ORDERS),
                    default="auto",
                    advanced=True,
                    tooltip=(
                        "Which tokens form a block. cube: neighbours in space and time; best "
                        "without training. raster: neighbours in memory. auto: cube, or the order "
                        "the adapter was trained with."
                    ),
                ),
                io.Int.Input(
                    "min_tokens",
                    default=4096,
                    min=0,
                    max=1 << 20,
                    advanced=True,
                    tooltip=(
                        "Videos with fewer tokens run dense: sparse attention gains nothing there."
                    ),
                ),
                io.Boolean.Input(
                    "keep_diagonal",
                    default=False,
                    advanced=True,
                    tooltip=(
                        "Every query block also attends to its own tokens, whatever their score."
                    ),
                ),
                io.Boolean.Input(
                    "keep_first_frame",
                    default=False,
                    advanced=True,
                    tooltip=(
                        "Every block also attends to the first frame, whatever its score. In cube "
                        "order blocks span frames, so this keeps the first three or four latent "
                        "frames."
                    ),
                ),
                io.Boolean.Input(
                    "strict",
                    default=False,
                    advanced=True,
                    tooltip=(
                        "Stop with an error instead of running dense, before sampling where "
                        "possible."
                    ),
                ),
                io.Boolean.Input(
                    "verbose", default=False, advanced=True, tooltip="Log every model call."
                ),
                io.Combo.Input(
                    "sla_variant",
                    options=list(SLA_VARIANTS),
                    default="released",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "sla: which blocks its linear branch covers. released: all of them, as in "
                        "every published checkpoint. paper: all but the kept ones and each query "
                        "block's lowest-scoring 10 %."
                    ),
                ),
                io.Combo.Input(
                    "key_block",
                    options=list(KEY_BLOCKS),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Tokens in a key block, which is kept or dropped as a whole. Smaller "
                        "blocks are chosen more precisely at the same sparsity, but choosing takes "
                        "longer; with top-k, so do the averaged keys. auto: 16 for ropeslr and "
                        "both top-k, 64 for the rest, or what the adapter was trained with."
                    ),
                ),
                io.Combo.Input(
                    "allocation",
                    options=list(ALLOCATIONS),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "How layers and heads share the kept blocks. auto: a few queries, computed "
                        "exactly, show which heads need many blocks and which need few or none; "
                        "the mean stays what sparsity says. For ropeslr and both top-k, and for "
                        "adapters that a run has learned. uniform: every head keeps the same."
                    ),
                ),
                io.Combo.Input(
                    "target",
                    options=list(TARGETS),
                    default="sparsity",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "What decides how many blocks are kept. sparsity: the sparsity slider. "
                        "error: as few as keep the error at most at the error slider, never more "
                        "than four times what sparsity allows; the last run shows the density. "
                        "Works where allocation is auto."
                    ),
                ),
                io.Float.Input(
                    "error",
                    default=0.05,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    display_mode=io.NumberDisplay.slider,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "With target error: how much of the attention's output may be lost, as a "
                        "share of its energy. 0.05 keeps 95 %. Lower is closer to the dense video; "
                        "higher is faster."
                    ),
                ),
                io.Combo.Input(
                    "query_block",
                    options=list(QUERY_BLOCKS),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Queries that keep the same key blocks. 128 is faster. auto: 128 where a "
                        "few queries, computed exactly, show that it costs less than 5 % more "
                        "error than 64; else 64, or what the adapter was trained with. The log "
                        "and the report say which it was."
                    ),
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Of keys and values in the kept blocks. 8-bit is faster on most GPUs, at "
                        "an error of 1 to 3 %. auto: 8-bit on GPUs where RoPeSLR Doctor has "
                        "measured that it is right and faster, and there for each layer that "
                        "loses little by it; 16-bit everywhere else."
                    ),
                ),
                io.Combo.Input(
                    "training",
                    options=list(TRAININGS),
                    default="dense",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "When Train LoRA or another training node uses this model. dense: trains "
                        "as without this node. sparse: trains through the sparse attention, for a "
                        "LoRA that is used with it; in every step and at every length from "
                        "min_tokens on."
                    ),
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            # Or ComfyUI answers for an equal node of another number from its cache, and reports go
            # to that one.
            not_idempotent=True,
        )

    @classmethod
    def validate_inputs(cls, dense_layers: str | None = None) -> bool | str:
        """Refuse before the run what cannot be read; linked inputs are None and checked later.

        ComfyUI shows an error on every input that is named here, so there is only this one.
        """
        try:
            parse_layers(dense_layers or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        model: Any,
        method: str,
        dense_layers: str = "",
        adapter: Adapter | None = None,
        **settings: Any,
    ) -> io.NodeOutput:
        """Build the plan from the widgets and install it on a clone of the model."""
        plan = SparsePlan(method=method, dense_layers=parse_layers(dense_layers), **settings)
        hidden = cls.hidden
        node_id = None if hidden is None else hidden.unique_id
        patched = install(model, plan, node_id, adapter)
        if hidden is not None:
            warn_of_other_lists(hidden.prompt, node_id, installed_plan(patched))
        return io.NodeOutput(patched)
