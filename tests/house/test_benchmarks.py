"""The benchmarks run, and the README shows what they recorded."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from support import needs

ROOT = Path(__file__).resolve().parents[2]
# What benchmarks.correctness compares with the definition, each in three combinations of dtype and
# width.
OPERATIONS = {
    "block_pool",
    "block_pool_state",
    "low_rank_state",
    "block_select",
    "block_mass",
    "mask_from_bits",
    "dense_attention",
    "dense_attention some keys",
    "dense_attention few queries",
    "block_sparse_attention",
    "block_sparse_attention pooled",
    "block_sparse_attention 8-bit",
    "block_sparse_attention_backward dq",
    "block_sparse_attention_backward dk",
    "block_sparse_attention_backward dv",
    "block_sparse_mixed",
    "block_sparse_mixed low rank",
    "block_sparse_linear",
}


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_the_cpu_benchmark_runs_and_records(tmp_path):
    out = tmp_path / "cpu.json"
    done = run(
        "benchmarks.cpu",
        "--tokens",
        "4096",
        "--dtypes",
        "float32",
        "--repeats",
        "1",
        "--out",
        str(out),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert [row["sparsity"] for row in record["rows"]] == [0.8125, 0.90625, 0.953125, 0.96875]
    measured = {"dense", "kernel", "ropeslr", "top-k", "top-k plain", "adaspa", "rola", "sla"}
    assert all(set(row["ms"]) == measured | {"ropeslr, uniform"} for row in record["rows"])
    assert {"date", "machine", "threads", "torch", "commit"} <= set(record)


def test_the_kernel_benchmark_runs_on_a_cpu_and_records(tmp_path):
    """Its correctness part runs first, on every operation.

    The rest shows that the harness works.
    """
    out = tmp_path / "kernels.json"
    done = run("benchmarks.kernels", "--device", "cpu", "--out", str(out))
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    compared = [re.split(r" b?float\d", name)[0] for name in record["errors"]]
    assert set(compared) == OPERATIONS and all(compared.count(name) == 4 for name in OPERATIONS), (
        compared
    )
    assert all(row["error"] < row["limit"] for row in record["errors"].values())
    (case,) = record["cases"]
    assert [row["sparsity"] for row in case["rows"]] == [0.8, 0.9] and not record["skipped"]
    for row in case["rows"]:
        fine = row["fine"]["parts"] if row["sparsity"] == 0.9 else {}
        measured = (*row["parts"].values(), *fine.values(), *row["whole"].values())
        assert all(found["ms"] > 0 for found in measured), row
    assert case["backward"]["efficiency"] > 0
    assert record["cold_start"]["seconds"] > 0 and set(record["targets"]) >= {
        "sparse efficiency at 90 %"
    }
    assert "errors against float64" in done.stdout and "not measured" in done.stdout


def test_the_model_benchmark_runs_on_tiny_models(tmp_path):
    needs.need(needs.COMFYUI)
    out = tmp_path / "models.json"
    done = run("benchmarks.models", "--tiny", "--device", "cpu", "--steps", "4", "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    methods = ["dense", "ropeslr", "top-k", "top-k plain"]
    assert [row["method"] for row in rows] == methods * 2 and len(
        {row["model"] for row in rows}
    ) == 2
    assert all(
        row["sparse_calls"] == 8 and row["backend"] == "pytorch"
        for row in rows
        if row["method"] != "dense"
    )


@pytest.mark.parametrize("name", ("benchmarks/README.md", "docs/models.md"))
def test_the_tables_show_the_records_as_they_are(name):
    needs.need("cogapp")
    import texts

    assert name in texts.RECORDS
    found = (ROOT / name).read_text(encoding="utf-8")
    assert found == texts.processed(name), "run `python dev.py texts`"


def test_a_job_of_the_kernel_benchmark_that_dies_costs_itself(monkeypatch):
    """It ends with a code, or takes too long; what it had written is kept."""
    import torch

    from benchmarks import kernels

    options = SimpleNamespace(device="cpu", quick=False)
    part = kernels.in_a_child(options, "correctness:nothing of that name", 60.0)
    assert part == {"error": "the process ended with 1"}
    assert "took longer than 0 s" in kernels.in_a_child(options, "cold:", 0.01)["error"]
    record = kernels.new_record(torch.device("cpu"))
    kernels.merge(record, "correctness", "bfloat16 128", dict(part), kernels.CPU)
    kernels.merge(record, "forward", "small", {"rows": [{"sparsity": 0.8}], **part}, kernels.CPU)
    kernels.merge(record, "cold", "", dict(part), kernels.CPU)
    assert record["errors"]["failed bfloat16 128"]["error_text"] == part["error"]
    assert record["cases"][0]["rows"] and record["cases"][0]["error"] == part["error"]
    assert record["cold_start"] == part


def test_no_git_is_no_reason_to_fail(monkeypatch):
    import benchmarks

    monkeypatch.setenv("PATH", "")
    assert benchmarks.commit() == "unknown"
