"""Models spread over processes in the form that Raylight gives them: an own stand-in, on gloo.

Every process has some of the tokens, filled up with zeros to an even number; self-attention calls
`xfuser_optimized_attention`, a global of this module, which exchanges tokens for heads.
"""

from __future__ import annotations

import types
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def xfuser_optimized_attention(q, k, v, heads, mask=None, skip_reshape=False, **_) -> Tensor:
    """`(B, L/P, H*D)`, or `(B, H, L/P, D)` with skip_reshape -> `(B, L/P, H*D)`."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    q, k, v = (torch.cat(exchanged(x.chunk(dist.get_world_size(), 1)), 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    out = torch.cat(exchanged(out.chunk(dist.get_world_size(), 2)), 1)
    return out.transpose(1, 2).flatten(2)


def exchanged(parts: tuple[Tensor, ...]) -> list[Tensor]:
    """What is for every process, to what is from every process."""
    sent = torch.stack(parts).contiguous()
    found = torch.empty_like(sent)
    dist.all_to_all_single(found, sent)
    return list(found)


def own(x: Tensor, dim: int = 1) -> Tensor:
    """One's own part of all tokens."""
    size = dist.get_world_size()
    missing = -x.shape[dim] % size
    padding = [0, 0] * (x.ndim - 1 - dim) + [0, missing]
    return torch.nn.functional.pad(x, padding).chunk(size, dim)[dist.get_rank()].contiguous()


def whole(x: Tensor, tokens: int) -> Tensor:
    """All processes' tokens."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, 1)[:, :tokens]


def spread(model: torch.nn.Module) -> None:
    """Give a diffusion model's blocks their own part of the tokens from here on."""
    if hasattr(model, "double_blocks"):
        _spread_streams(model)
    else:
        _spread_blocks(model)


def _spread_blocks(model: torch.nn.Module) -> None:
    """Wan: the blocks get x and freqs of some tokens; the last gives back all."""
    tokens, first = [0], model.blocks[0]

    @torch.compiler.disable
    def before(block, args, kwargs):
        x, *rest = args
        if block is first:
            tokens[0] = x.shape[1]
            x = own(x)
        return (x, *rest), {**kwargs, "freqs": own(kwargs["freqs"])}

    for block in model.blocks:
        block.register_forward_pre_hook(before, with_kwargs=True)
        block.self_attn.forward = types.MethodType(_wan_attention, block.self_attn)
    after = torch.compiler.disable(lambda block, args, out: whole(out, tokens[0]))
    model.blocks[-1].register_forward_hook(after)


def _wan_attention(self, x, freqs, transformer_options={}, **_):  # noqa: B006  ComfyUI's own
    from comfy.ldm.flux.math import apply_rope1

    split = (*x.shape[:2], self.num_heads, self.head_dim)
    q = apply_rope1(self.norm_q(self.q(x)).view(split), freqs).flatten(2)
    k = apply_rope1(self.norm_k(self.k(x)).view(split), freqs).flatten(2)
    return self.o(xfuser_optimized_attention(q, k, self.v(x), heads=self.num_heads))


def _spread_streams(model: torch.nn.Module) -> None:
    """HunyuanVideo: text and video each by itself in double blocks, as one in single blocks."""
    length = {}

    def before_double(block, args, kwargs):
        kwargs = dict(kwargs)
        if block is model.double_blocks[0]:
            length.update(txt=kwargs["txt"].shape[1], img=kwargs["img"].shape[1])
            kwargs.update(txt=own(kwargs["txt"]), img=own(kwargs["img"]))
        text, video = kwargs["pe"].split([length["txt"], length["img"]], dim=2)
        return args, {**kwargs, "pe": torch.cat((own(text, 2), own(video, 2)), dim=2)}

    def after_doubles(block, args, out):
        return tuple(whole(x, length[name]) for x, name in zip(out, ("img", "txt")))

    def before_single(block, args, kwargs):
        x = own(args[0]) if block is model.single_blocks[0] else args[0]
        return (x, *args[1:]), {**kwargs, "pe": own(kwargs["pe"], 2)}

    for block in model.double_blocks:
        block.register_forward_pre_hook(before_double, with_kwargs=True)
    model.double_blocks[-1].register_forward_hook(after_doubles)
    for block in model.single_blocks:
        block.register_forward_pre_hook(before_single, with_kwargs=True)
    if len(model.single_blocks):
        model.single_blocks[-1].register_forward_hook(
            lambda block, args, out: whole(out, sum(length.values()))
        )
    for block in (*model.double_blocks, *model.single_blocks):
        block.forward = types.MethodType(_flux_block, block)


def _flux_block(self, *args, **kwargs):
    """A block's own forward, whose attention is that of this module."""
    with _attending():
        return type(self).forward(self, *args, **kwargs)


@contextmanager
def _attending():
    from comfy.ldm.flux import layers
    from comfy.ldm.flux.math import apply_rope

    before = layers.attention

    def attention(q, k, v, pe, mask=None, transformer_options={}):  # noqa: B006
        if pe is not None:
            q, k = apply_rope(q, k, pe)
        return xfuser_optimized_attention(q, k, v, q.shape[1], skip_reshape=True)

    layers.attention = attention
    try:
        yield
    finally:
        layers.attention = before


def spread_prompts(model) -> None:
    """Let every process compute one of a batch's prompts, as a wrapper of the MODEL."""
    from comfy.patcher_extension import WrappersMP

    def one_of_them(executor, x, timestep, context, *args, **kwargs):
        rank, rows = dist.get_rank(), x.shape[0] // dist.get_world_size()
        own_rows = slice(rank * rows, (rank + 1) * rows)
        kwargs = {
            name: value[own_rows] if isinstance(value, Tensor) else value
            for name, value in kwargs.items()
        }
        x, timestep, context = (each[own_rows] for each in (x, timestep, context))
        out = executor(x, timestep, context, *args, **kwargs).contiguous()
        parts = [torch.empty_like(out) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, out)
        return torch.cat(parts)

    model.add_wrapper(WrappersMP.DIFFUSION_MODEL, one_of_them)


def stand_in_for_xfuser(ulysses=None, guidance=None) -> types.ModuleType:
    """`xfuser.core.distributed` as far as this pack asks it; by default all share the heads."""
    module = types.ModuleType("xfuser.core.distributed")
    module.model_parallel_is_initialized = lambda: True
    heads = types.SimpleNamespace(ulysses_group=ulysses or dist.group.WORLD)
    module.get_sp_group = lambda: heads
    module.get_cfg_group = lambda: types.SimpleNamespace(device_group=guidance)
    for name in ("ring", "pipeline"):
        setattr(module, f"get_{name}_parallel_world_size", lambda: 1)
    size = 1 if guidance is None else dist.get_world_size(guidance)
    module.get_classifier_free_guidance_world_size = lambda: size
    return module
