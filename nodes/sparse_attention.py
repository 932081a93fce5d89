"""RoPeSLR Sparse Attention: the one node between a model and its sampler."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention.plan import (
    AUTO,
    BACKENDS,
    BLOCK_ORDERS,
    CALIBRATE,
    MAX_CALIBRATE_ROWS,
    MAX_RANK,
    MAX_SPARSITY,
    METHODS,
    SLA_VARIANTS,
    SparsePlan,
    parse_layers,
)
from .adapter_io import AdapterType
from .patching import install


class RoPeSLRSparseAttention(io.ComfyNode):
    """MODEL -> MODEL with block-sparse self-attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RoPeSLRSparseAttention",
            display_name="RoPeSLR Sparse Attention",
            category="RoPeSLR",
            description=(
                "Makes Wan and HunyuanVideo faster: self-attention computes only the key blocks "
                "that matter, and a cheap background that calibrates itself stands in for the "
                "rest. Put it between the model (or its LoRAs) and the sampler."
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
                    tooltip="Wan or HunyuanVideo. Other models pass through and run dense, with a "
                    "note.",
                ),
                AdapterType.Input(
                    "adapter",
                    optional=True,
                    tooltip="Trained weights, from Load RoPeSLR Adapter or Load Sparse Checkpoint. "
                    "Left open, the node "
                    "runs training-free.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="auto",
                    tooltip="auto: the adapter's own method; without an adapter, ropeslr. "
                    "ropeslr: sparse attention plus a background that calibrates itself. "
                    "rola, sla: sparse attention plus a trained low-rank or linear branch; they "
                    "need their checkpoint's adapter. adaspa: searches the blocks that matter "
                    "exactly, twice a run, and is dense until the first search. top-k: sparse "
                    "attention plus one averaged key for every block left out. "
                    "top-k plain: the kept blocks and nothing else.",
                ),
                io.Float.Input(
                    "sparsity",
                    default=0.90,
                    min=0.0,
                    max=MAX_SPARSITY,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="The share of key blocks that is NOT computed. 0.90 computes one block "
                    "in ten: about ten "
                    "times less attention work. Higher is faster, lower is closer to the dense "
                    "picture; 0 leaves nothing out and runs dense.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=MAX_RANK,
                    step=2,
                    tooltip="Channels and features per head that the background uses. 0 = all of "
                    "them (or the "
                    "adapter's own rank). Lower is a little faster and coarser, and keeps the most "
                    "important ones; 64 is a good second choice.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Sampling before this point of the schedule stays dense.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Sampling after this point of the schedule stays dense.",
                ),
                io.Int.Input(
                    "dense_first_steps",
                    default=AUTO,
                    min=AUTO,
                    max=1000,
                    tooltip="This many steps at the start of the whole schedule stay dense; they "
                    "decide the layout of "
                    "the video. Two experts share one count. -1 = auto: 1, but 0 with a checkpoint "
                    "that was trained sparse (rola, sla), and 0 for adaspa, which warms up by "
                    "itself.",
                ),
                io.Int.Input(
                    "dense_last_steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="This many steps at the end of the whole schedule stay dense. 1 can "
                    "help fine detail.",
                ),
                io.String.Input(
                    "dense_layers",
                    default="",
                    tooltip="Layers that stay dense, counted from 0: numbers and ranges, such as "
                    '"0, 1, 38-39".',
                ),
                io.Combo.Input(
                    "calibrate",
                    options=list(CALIBRATE),
                    default="auto",
                    advanced=True,
                    tooltip="ropeslr: when a few rows are computed exactly to adjust the "
                    "background. auto: at the "
                    "first sparse step and every 5 steps; with an adapter, never. on top: with an "
                    "adapter too, starting from its values.",
                ),
                io.Int.Input(
                    "calibrate_rows",
                    default=128,
                    min=1,
                    max=MAX_CALIBRATE_ROWS,
                    advanced=True,
                    tooltip="Rows per layer that a calibration computes exactly. 128 cost 0.2 % of "
                    "dense attention at "
                    "75,000 tokens.",
                ),
                io.Combo.Input(
                    "backend",
                    options=list(BACKENDS),
                    default="auto",
                    advanced=True,
                    tooltip="auto: Triton's kernels where they can run, else plain PyTorch. "
                    "triton: an error where "
                    "they cannot. pytorch: always plain PyTorch. dense: switches the node off and "
                    "still counts calls, to compare.",
                ),
                io.Combo.Input(
                    "block_order",
                    options=list(BLOCK_ORDERS),
                    default="auto",
                    advanced=True,
                    tooltip="Which tokens form a block. cube: neighbours in time and space (better "
                    "without training). "
                    "raster: as they lie in memory. auto: cube, or what the adapter was trained "
                    "with.",
                ),
                io.Int.Input(
                    "min_tokens",
                    default=4096,
                    min=0,
                    max=1 << 20,
                    advanced=True,
                    tooltip="Videos of fewer tokens stay dense, since sparse attention gains "
                    "nothing there.",
                ),
                io.Boolean.Input(
                    "keep_diagonal",
                    default=False,
                    advanced=True,
                    tooltip="Every block also attends to itself, whatever its score.",
                ),
                io.Boolean.Input(
                    "keep_first_frame",
                    default=False,
                    advanced=True,
                    tooltip="Every block also attends to the first frame, whatever its score. In "
                    "cube order that is "
                    "the first three or four frames, since blocks span them.",
                ),
                io.Boolean.Input(
                    "strict",
                    default=False,
                    advanced=True,
                    tooltip="Stop with an error, before sampling where possible, instead of "
                    "running dense.",
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
                    tooltip="sla: which blocks its linear branch covers. released: all of them, as "
                    "in every checkpoint "
                    "that can be downloaded. paper: those neither kept nor among a row's worst 10 "
                    "%.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
            # Or ComfyUI answers for an equal node of another number from its cache, and reports go
            # to that one.
            not_idempotent=True,
        )

    @classmethod
    def validate_inputs(cls, dense_layers=None) -> bool | str:
        """Refuse before the run what cannot be read; linked inputs are None and checked later.

        ComfyUI shows an error on every input that is named here, so there is only this one.
        """
        try:
            parse_layers(dense_layers or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model, method, dense_layers="", adapter=None, **settings) -> io.NodeOutput:
        """Build the plan from the widgets and install it on a clone of the model."""
        plan = SparsePlan(method=method, dense_layers=parse_layers(dense_layers), **settings)
        node_id = cls.hidden.unique_id if cls.hidden is not None else None
        return io.NodeOutput(install(model, plan, node_id, adapter))
