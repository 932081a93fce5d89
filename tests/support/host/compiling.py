"""A MODEL under torch.compile, the way ComfyUI's own node does it."""

from __future__ import annotations


def compiled(model, backend: str = "eager", blocks: int = 0):
    """The whole model compiled, or its first blocks one by one."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = model.clone()
    keys = [f"diffusion_model.blocks.{i}" for i in range(blocks)] or ["diffusion_model"]
    options = {"guard_filter_fn": skip_transformer_options}
    set_torch_compile_wrapper(model, backend=backend, options=options, keys=keys)
    return model


def skip_transformer_options(guards):
    """The guard filter of ComfyUI's own TorchCompileModel node."""
    return ["transformer_options" not in guard.name for guard in guards]
