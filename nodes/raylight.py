"""RoPeSLR Sparse Attention (Raylight): the same node for models that Raylight spreads over GPUs."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..attention import SparsePlan
from ..attention.adapters import Adapter
from ..attention.plan import parse_layers
from .raylight_worker import Request
from .sparse_attention import RoPeSLRSparseAttention

NOT_SHOWN = ("model", "training")  # inputs of the one node that have no meaning in workers
NO_RAY = (
    "Ray is not installed, which Raylight's workers run in ({error}). Without Raylight, use "
    "RoPeSLR Sparse Attention."
)


class RoPeSLRRaylight(io.ComfyNode):
    """RAY_ACTORS -> RAY_ACTORS, whose workers sample with block-sparse self-attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        one = RoPeSLRSparseAttention.define_schema()
        return io.Schema(
            node_id="RoPeSLRRaylight",
            display_name="RoPeSLR Sparse Attention (Raylight)",
            category="RoPeSLR",
            description=(
                "RoPeSLR Sparse Attention on several GPUs, for models that Raylight loads. Connect "
                "it between Raylight's Load Diffusion Model and its sampler."
            ),
            search_aliases=["raylight", "multi gpu", "ulysses", "xdit", "ray"],
            is_experimental=True,
            inputs=[
                io.Custom("RAY_ACTORS").Input(
                    "ray_actors",
                    tooltip=(
                        "From Raylight's Load Diffusion Model (Ray), with ring_degree 1. For Wan "
                        "and HunyuanVideo; what Raylight does with other models stays dense."
                    ),
                ),
                *(each for each in one.inputs if each.id not in NOT_SHOWN),
            ],
            outputs=[io.Custom("RAY_ACTORS").Output(display_name="ray_actors")],
        )

    @classmethod
    def validate_inputs(cls, dense_layers: str | None = None) -> bool | str:
        """See `RoPeSLRSparseAttention.validate_inputs`."""
        return RoPeSLRSparseAttention.validate_inputs(dense_layers)

    @classmethod
    def execute(
        cls,
        ray_actors: dict[str, Any],
        method: str,
        dense_layers: str = "",
        adapter: Adapter | None = None,
        **settings: Any,
    ) -> io.NodeOutput:
        """Have every worker put the plan on its model, and wait for all of them."""
        try:
            import ray
        except ImportError as error:
            raise RuntimeError(NO_RAY.format(error=error)) from error
        plan = SparsePlan(method=method, dense_layers=parse_layers(dense_layers), **settings)
        plan.resolve(adapter)  # what fits no plan is refused here, in one voice
        work = in_worker(__name__.rpartition(".nodes.")[0], str(Path(__file__).parents[1]))
        request = Request(plan, adapter, folder_paths.get_user_directory())
        message = ray.put(pickle.dumps(request))  # once for all of them
        workers = ray_actors["workers"]
        try:
            ray.get([each.model_function_runner.remote(work, message) for each in workers])
        except Exception as error:  # Ray wraps what a worker raises in its whole story
            raise (getattr(error, "cause", None) or error) from None
        return io.NodeOutput(ray_actors)


def in_worker(package: str, folder: str) -> Callable[[Any, bytes], Any]:
    """A function of a worker's MODEL and a pickled request, which brings this pack along.

    Workers cannot import what ComfyUI has loaded from custom_nodes, so that Ray has to send the
    function itself: it may use nothing of this module.
    """

    def patched(model: Any, request: bytes) -> Any:
        import importlib
        import os
        import pickle
        import sys
        import types

        if package not in sys.modules:
            if not os.path.isdir(folder):
                raise RuntimeError(f"this machine has no RoPeSLR in {folder}; install it there too")
            module = types.ModuleType(package)
            module.__path__ = [folder]
            sys.modules[package] = module
        worker = importlib.import_module(f"{package}.nodes.raylight_worker")
        return worker.patch(model, pickle.loads(request))

    return patched
