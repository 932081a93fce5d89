"""The attention override: sends each attention call to the sparse path or the previous override.

It is set only while one model call runs, so it captures nothing when the node is executed: an
override that another node set, before or after this pack's node, becomes the previous one and keeps
every call that stays dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...attention.backend import TritonNotUsable
from .call import ModelCall
from .candidate import Candidate, HostCall
from .dense_reason import FAILED, DenseReason, dense_for_now, why_dense
from .hooks import CALL
from .malloc_graph import unrecorded


@torch.compiler.disable
def sparse_override(
    func: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """What ComfyUI calls. A compiled model breaks its graph here, so settings take effect."""
    host = HostCall(func, q, k, v, heads, mask, kwargs)
    call: ModelCall = host.options[CALL]
    layer = call.next_self_attention(host)
    if layer is None:
        return call.run_previous(host)
    candidate = Candidate(call, host, layer)
    with unrecorded():
        found = _sparse(candidate)
    if isinstance(found, Tensor):
        return found
    # Here a failed call's tensors are free again, so a dense call may fit where the sparse one did
    # not.
    del candidate
    return call.run_dense(host, layer, found)


def _sparse(candidate: Candidate) -> Tensor | DenseReason:
    """The sparse output in the form that the host wants; or why there is none."""
    try:
        reason = why_dense(candidate)
        if reason is None:
            return candidate.call.run_sparse(candidate)
        if dense_for_now(candidate, reason):
            candidate.call.observe(candidate)
        return reason
    except TritonNotUsable:  # asked for by name: to go on without it would be a silent no
        raise
    except Exception as error:
        if candidate.plan.strict or candidate.call.run.peers is not None:
            raise  # other processes are waiting for what this one has to say, and would forever
        first_line = str(error).partition("\n")[0]
        reason = DenseReason(FAILED.format(error=f"{type(error).__name__}: {first_line}"))
        memory = isinstance(error, torch.cuda.OutOfMemoryError)
        candidate.call.run.notices.dense(reason, with_traceback=not memory)
        return reason._replace(chosen=True)  # logged here already
