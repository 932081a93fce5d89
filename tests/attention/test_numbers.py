"""Large activations in half precision: no method may overflow, whatever it sums."""

import pytest
import torch

from pack_loader import load
from support.data import adapters
from support.data.fields import relative_error, rope_angles, smooth_qkv
from support.data.runs import Call, run_of

attention = load(".attention")
GRID = (4, 8, 9)
TRAINED = {
    "ropeslr": lambda: adapters.ropeslr_adapter(1, 2, 64),
    "rola": lambda: adapters.rola_adapter(1, 2, 64),
    "sla": lambda: adapters.sla_adapter(1, 2, 64),
    "ropeslr, form rms": lambda: adapters.ropeslr_adapter(1, 2, 64, fusion="rms"),
}
CASES = ["ropeslr", "adaspa", "top-k", "top-k plain", *(f"{name} with weights" for name in TRAINED)]


def attend(case, q, k, v, x, rope, dtype):
    name, _, weights = case.partition(" with weights")
    adapter = TRAINED[name]() if case.endswith("with weights") else None
    method = name.partition(",")[0]
    calibrate = "refine" if adapter and method == "ropeslr" else "auto"
    run = run_of(adapter, method=method, sparsity=0.6, calibrate=calibrate)
    inputs = attention.LayerInputs(x.to(dtype), rope)
    given, layout = [each.to(dtype) for each in (q, k, v)], attention.TokenLayout(GRID)
    calls = [Call(layout, step=i, num_steps=12, sigma=0.5, inputs=inputs) for i in (0, 1, 6)]
    return torch.stack([run.attend(*given, call)[0] for call in calls])


@pytest.mark.parametrize("size", [1.0, 64.0])
@pytest.mark.parametrize("case", CASES)
def test_half_precision_at_large_activations(case, size):
    """q and k 64 times as large as usual (logits of tens of thousands), v and x 64 times as well."""
    q, k, v = smooth_qkv(GRID)
    q, k, v = (size * tensor for tensor in (q, k, v))
    x = size * torch.randn(1, q.shape[2], 2 * 64, generator=torch.Generator().manual_seed(2))
    angles = rope_angles(GRID, 64)
    rope = attention.RopeTable(angles.cos(), angles.sin())
    q, k, v, x = (tensor.half().float() for tensor in (q, k, v, x))  # both see the same numbers
    found = attend(case, q, k, v, x, rope, torch.float16)
    assert torch.isfinite(found).all() and found.dtype == torch.float16
    exact = attend(case, q, k, v, x, rope, torch.float32)
    assert relative_error(found, exact) < 2e-2
