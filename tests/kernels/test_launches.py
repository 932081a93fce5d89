"""How much a layer's call asks of a GPU beside its main kernel: launches, and waiting for answers."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pack_loader import load
from support import needs

pytestmark = pytest.mark.skipif(not needs.INTERPRET, reason="counted on Triton's path")

attention = load(".attention")
GRID = (2, 8, 12)
LAYOUT = attention.TokenLayout(GRID)
# What makes a tensor without a launch.
FREE = {
    *("view", "_unsafe_view", "reshape", "as_strided", "transpose", "expand", "slice", "select"),
    *("unsqueeze", "squeeze", "permute", "alias", "detach", "t", "split", "unbind", "unfold"),
    *("empty", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "split_with_sizes"),
    *(
        "to",
        "contiguous",
        "flatten",
        "unflatten",
        "movedim",
        "numpy_T",
        "matrix_H",
        "mT",
        "is_inference",
    ),
}
# What makes a program wait for a GPU's answer.
ASKING = {
    *("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique", "masked_select"),
    *("_unique2", "tolist", "bincount"),
}


class Seen(TorchDispatchMode):
    """Names of PyTorch's operations, and of Triton's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.torch, self.triton = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.torch[function.__name__.partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def call(monkeypatch, steps, **plan):
    """What the last of some calls of a layer does."""
    from triton.runtime.interpreter import InterpretedFunction

    seen, run = Seen(), attention.AttentionRun(attention.SparsePlan(**plan).resolve())
    q, k, v = (
        torch.randn(1, 192, 2, 32, generator=torch.Generator().manual_seed(i))
        .to(torch.bfloat16)
        .transpose(1, 2)
        for i in range(3)
    )
    start = InterpretedFunction.run

    def counted(self, *args, **kwargs):
        seen.triton[self.__name__] += 1
        with torch.utils._python_dispatch._disable_current_modes():
            return start(self, *args, **kwargs)

    with torch.inference_mode():
        for step in steps[:-1]:
            run.attend(q, k, v, attention.AttentionCall(LAYOUT, 0, step, 50))
        monkeypatch.setattr(InterpretedFunction, "run", counted)
        with seen:
            run.attend(q, k, v, attention.AttentionCall(LAYOUT, 0, steps[-1], 50))
    return seen


@pytest.mark.parametrize(
    "plan",
    [
        dict(),
        dict(precision="8-bit"),
        dict(query_block="128"),
        dict(allocation="uniform"),
        dict(method="top-k"),
        dict(method="top-k plain"),
    ],
    ids=str,
)
def test_a_call_between_two_calibrations(plan, monkeypatch):
    """Never waits for the GPU, and starts few things beside its three to five kernels."""
    seen = call(monkeypatch, steps=range(8), **plan)
    assert seen.triton["_select_lists"] and not ASKING & set(seen.torch), seen.torch
    launched = {name: n for name, n in seen.torch.items() if name not in FREE}
    kernels, others = sum(seen.triton.values()), sum(launched.values())
    limits = {"ropeslr": (5, 27), "top-k": (5, 14), "top-k plain": (4, 8)}
    most = limits[plan.get("method", "ropeslr")]
    eight_bit = 16 if plan.get("precision") == "8-bit" else 0
    assert kernels <= most[0] + (2 if eight_bit else 0), seen.triton
    assert others <= most[1] + eight_bit, launched


@pytest.mark.parametrize("precision", ["16-bit", "8-bit"])
def test_a_call_that_calibrates_does_not_wait_either(precision, monkeypatch):
    seen = call(monkeypatch, steps=(0, 5), allocation="uniform", precision=precision)
    assert "linalg_cholesky_ex" in seen.torch
    assert not ASKING & set(seen.torch), seen.torch
