"""Other projects' attention, where installed: name -> call(q, k, v), all `(B, H, L, D)`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def dense(
    device: torch.device, compiled: bool = False
) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Exact attention: what ComfyUI or a person would use instead; also what is compiled first."""
    if device.type != "cuda":
        return {"sdpa": F.scaled_dot_product_attention}
    found = {
        "sdpa flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    if compiled:
        found["flex_attention"] = _flex
    if _there("flash_attn_interface"):
        found["FlashAttention-3"] = _flash_3
    if _there("sageattention"):
        found["SageAttention"] = _sage
    return found


def sparse(device: torch.device) -> dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]]:
    """Block-sparse attention of other packages, at a share of kept blocks: call(q, k, v, keep)."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {}
    if device.type == "cuda" and _there("spas_sage_attn"):
        found["SpargeAttn"] = _sparge
    if device.type == "cuda" and _there("sparse_linear_attention"):
        found["thu-ml/SLA"] = _sla
    if device.type == "cuda" and _there("fastvideo_kernel"):
        found["FastVideo VSA"] = _vsa
    if device.type == "cuda" and _there("comfy_kitchen"):
        found["comfy-kitchen sol_attn"] = _sol
    return found


def _there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


@cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _compiled_flex()(q, k, v)


def _flash_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
    return out[0] if isinstance(out, tuple) else out


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="HND")


def _sparge(q: Tensor, k: Tensor, v: Tensor, keep: float) -> Tensor:
    from spas_sage_attn import spas_sage2_attn_meansim_topk_cuda

    return spas_sage2_attn_meansim_topk_cuda(q, k, v, topk=keep, is_causal=False)


@cache
def _sla_module(width: int, keep: float) -> torch.nn.Module:
    from sparse_linear_attention import SparseLinearAttention

    return SparseLinearAttention(
        head_dim=width, topk=keep, feature_map="softmax", BLKQ=64, BLKK=64
    ).cuda()


def _sla(q: Tensor, k: Tensor, v: Tensor, keep: float) -> Tensor:
    return _sla_module(q.shape[3], keep)(q, k, v)


def _sol(q: Tensor, k: Tensor, v: Tensor, keep: float) -> Tensor:
    kitchen: Any = importlib.import_module("comfy_kitchen")  # newer ones have it
    return kitchen.sol_attn(q, k, v, topk=keep)


def _vsa(q: Tensor, k: Tensor, v: Tensor, keep: float) -> Tensor:
    from fastvideo_kernel import video_sparse_attn

    blocks = q.shape[2] // 64
    sizes = torch.full((blocks,), 64, dtype=torch.int32, device=q.device)
    q, k, v = (x[:, :, : 64 * blocks] for x in (q, k, v))
    return video_sparse_attn(q, k, v, sizes, sizes, max(1, int(keep * blocks)), block_size=64)
