"""Large activations in half precision: no method may overflow, whatever it sums."""

import pytest
import torch

from pack_loader import load
from support.data import adapters
from support.data.fields import relative_error, rope_angles, smooth_qkv

attention = load(".attention")
GRID = (4, 8, 9)
TRAINED = {
    "ropeslr": lambda: adapters.ropeslr_adapter(1, 2, 64), "rola": lambda: adapters.rola_adapter(1, 2, 64),
    "sla": lambda: adapters.sla_adapter(1, 2, 64),
    "ropeslr, form rms": lambda: adapters.ropeslr_adapter(1, 2, 64, fusion="rms"),
}
CASES = ["ropeslr", "adaspa", "top-k", "top-k plain", *(f"{name} with weights" for name in TRAINED)]


def attend(case, q, k, v, x, positions, dtype):
    name, _, weights = case.partition(" with weights")
    adapter = TRAINED[name]() if case.endswith("with weights") else None
    method = name.partition(",")[0]
    calibrate = "on top" if adapter and method == "ropeslr" else "auto"
    run = attention.AttentionRun(attention.SparsePlan(method=method, sparsity=0.6, calibrate=calibrate), adapter)
    inputs = attention.LayerInputs(x.to(dtype), positions)
    outs = [
        run.attend(
            q.to(dtype), k.to(dtype), v.to(dtype), attention.TokenLayout(GRID), step=step, steps=12, noise=0.5,
            inputs=inputs,
        )[0]
        for step in (0, 1, 6)
    ]
    return torch.stack(outs)


@pytest.mark.parametrize("size", [1.0, 64.0])
@pytest.mark.parametrize("case", CASES)
def test_half_precision_at_large_activations(case, size):
    """q and k as sharp as 64 times the usual makes them (logits of tens of thousands), v and x 64 times as large."""
    q, k, v = smooth_qkv(GRID)
    q, k, v = (size * tensor for tensor in (q, k, v))
    x = size * torch.randn(1, q.shape[2], 2 * 64, generator=torch.Generator().manual_seed(2))
    angles = rope_angles(GRID, 64)
    positions = attention.Positions(angles.cos(), angles.sin())
    q, k, v, x = (tensor.half().float() for tensor in (q, k, v, x))            # both see the same numbers
    found = attend(case, q, k, v, x, positions, torch.float16)
    assert torch.isfinite(found).all() and found.dtype == torch.float16
    exact = attend(case, q, k, v, x, positions, torch.float32)
    assert relative_error(found, exact) < 2e-2
