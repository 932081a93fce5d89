"""A MODEL under torch.compile, the way ComfyUI's own node does it."""

from __future__ import annotations


def compiled(model, backend="eager"):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = model.clone()
    set_torch_compile_wrapper(model, backend=backend, options={"guard_filter_fn": skip_transformer_options})
    return model


def skip_transformer_options(guards):
    """The guard filter of ComfyUI's own TorchCompileModel node."""
    return ["transformer_options" not in guard.name for guard in guards]
