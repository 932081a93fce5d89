"""One attention call as the host hands it over, and what is known of it before it runs sparse."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ...attention import AttentionCall, LayerInputs, ResolvedPlan, TokenLayout
from .dense_reason import DenseReason
from .model_info import Layer

if TYPE_CHECKING:
    from .call import ModelCall


class HostCall(NamedTuple):
    """The arguments of an attention override, as ComfyUI calls it.

    q, k, v: `(B, L, H*D)`, or `(B, H, L, D)` where skip_reshape is set.
    """

    func: Callable[..., Tensor]
    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    mask: Tensor | None
    kwargs: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """The transformer_options."""
        return self.kwargs["transformer_options"]

    @property
    def by_head(self) -> bool:
        return bool(self.kwargs.get("skip_reshape"))

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def tokens(self) -> int:
        return self.q.shape[-2]

    @property
    def kv_tokens(self) -> int:
        return self.k.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1] if self.by_head else self.q.shape[-1] // self.heads

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1] if self.by_head else self.k.shape[-1] // self.head_dim

    def views(self) -> tuple[Tensor, ...]:
        """q, k, v as `(B, H, L, D)`, without a copy."""
        if self.by_head:
            return self.q, self.k, self.v
        return tuple(
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.q, self.k, self.v)
        )

    def to_host_layout(self, out: Tensor) -> Tensor:
        """`(B, H, L, D)` in the form that the host wants: no copy where heads lie side by side."""
        return out if self.kwargs.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


class Candidate:
    """A self-attention call that may become sparse; what is asked of it is worked out once."""

    def __init__(self, call: ModelCall, host: HostCall, layer: Layer) -> None:
        self.call = call
        self.host = host
        self.layer = layer

    @property
    def plan(self) -> ResolvedPlan:
        return self.call.run.plan

    @cached_property
    def layout(self) -> TokenLayout | DenseReason:
        """Where the video lies and which tokens are hidden, or why that is not known."""
        return self.call.layout_of(self.host)

    @property
    def token_layout(self) -> TokenLayout:
        """The layout, where the checks before have found one."""
        assert isinstance(self.layout, TokenLayout)
        return self.layout

    @cached_property
    def inputs(self) -> LayerInputs:
        """What hooks saw of the layer; they hand it out once."""
        return self.call.entering_of(self.host).take(self.host, self.token_layout)

    def attention_call(self) -> AttentionCall:
        """Everything but q, k, v that the attention floor needs."""
        call = self.call
        return AttentionCall(
            layout=self.token_layout,
            layer=self.layer.identity,
            step=call.full_step,
            num_steps=call.full_steps,
            sigma=call.sigma,
            conditioning=call.conditioning,
            window=call.window,
            scale=self.host.kwargs.get("scale"),
            inputs=self.inputs,
        )
