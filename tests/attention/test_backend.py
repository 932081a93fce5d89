"""What is asked about a backend before any tensor is computed."""

import pytest
import torch

from pack_loader import load

attention = load(".attention")
backend = load(".attention.backend")


@pytest.mark.parametrize(
    "amx, dtype, plan, dense",
    [
        (True, torch.bfloat16, dict(sparsity=0.80), True),
        (True, torch.bfloat16, dict(sparsity=0.90), False),
        (True, torch.float32, dict(sparsity=0.80), False),
        (True, torch.bfloat16, dict(sparsity=0.80, backend="pytorch"), False),
        (False, torch.bfloat16, dict(sparsity=0.80), False),
        (True, torch.bfloat16, dict(sparsity=0.80, target="error"), False),
    ],
)
def test_a_cpu_with_a_matrix_unit_stays_dense_where_that_is_faster(
    amx, dtype, plan, dense, monkeypatch
):
    monkeypatch.setattr(backend, "_has_amx", lambda: amx)
    q = torch.zeros(1, 1, 8, 8, dtype=dtype)
    found = backend.dense_is_faster(attention.SparsePlan(**plan).resolve(), q)
    assert (found is not None) == dense
    assert not dense or "AMX" in found and "0.80" in found
