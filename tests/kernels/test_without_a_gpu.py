"""What only a GPU runs, on one that is not there: every job of the benchmark, and a trial."""

import argparse
import functools
import json
import sys
from dataclasses import asdict

import pytest
import torch

from pack_loader import load
from support.oracle.fake_gpu import fake_gpu

benchmark, gpu = load(".benchmarks.kernels"), load(".benchmarks.gpu")
tuning, child = load(".kernels.tuning"), load(".kernels.trial.child")
CASE = benchmark.Case("small", (4, 16, 16), 2, (0.90,), text=40)
KINDS = list(benchmark.kinds(torch.device("cuda")))
# What other packages need a real GPU for.
OTHERS = {"sdpa cudnn", "flex_attention"}
pytestmark = pytest.mark.slow  # a minute where nothing is compiled yet


@pytest.fixture
def quick(monkeypatch):
    """Two samples of everything; neither what inductor compiles nor the large product."""
    watch = functools.partial(_quick, gpu.Stopwatch)
    monkeypatch.setattr(benchmark, "Stopwatch", watch)
    monkeypatch.setattr(benchmark, "CASES", (CASE,))
    monkeypatch.setattr(benchmark, "ceilings", lambda run: {})
    monkeypatch.setattr(benchmark.baselines, "_flex", None)


def _quick(stopwatch, device, seconds, least):
    return stopwatch(device, 0.0, 2)


def run_job(tmp_path, job):
    """A job of the benchmark as its process runs it: -> its record, and what was called."""
    out = tmp_path / "part.json"
    options = argparse.Namespace(
        device="cuda", minutes=10.0, child=job, out=str(out), quick=False, stage=None
    )
    with fake_gpu() as called:
        benchmark.child(options, (CASE,))
    return json.loads(out.read_text()), called


def errors_in(record, path=()):
    """Where a record holds an error, and its text."""
    for name, value in record.items() if isinstance(record, dict) else enumerate(record):
        if name in ("error", "error_text") and isinstance(value, str):
            yield path, value
        elif isinstance(value, (dict, list)):
            yield from errors_in(value, (*path, name))


@pytest.mark.parametrize("job", ["forward:small", "backward:small", "cold:"])
def test_a_job_of_the_benchmark_runs_to_its_end(job, quick, tmp_path):
    record, called = run_job(tmp_path, job)
    ours = {path: text for path, text in errors_in(record) if not OTHERS & set(path)}
    assert not ours
    assert called["Event"] or job == "cold:"
    assert called["_forward"] or called["_d_keys"]
    assert record["skipped"] == []


@pytest.mark.parametrize("name", KINDS)
def test_every_comparison_is_made(name, quick, tmp_path):
    """Zeros are wrong, and that is what it finds: a number, not the text of an error."""
    record, _ = run_job(tmp_path, f"correctness:{name}")
    assert record["errors"] and not list(errors_in(record))


def test_short_calls_are_replayed_from_a_graph(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SHORT", 1e9)
    record, called = run_job(tmp_path, "backward:small")
    assert called["CUDAGraph"] and called["graph"] and "backward_ms" in record["backward"]["ours"]


@pytest.mark.parametrize("precision, rows", [("16-bit", 64), ("16-bit", 128), ("8-bit", 128)])
def test_a_trial_compares_and_measures_a_variant(precision, rows, monkeypatch):
    """By the code that a child runs, whose answer is wrong unless any error is allowed."""
    ops = [load(f".kernels.{name}") for name in ("ops", "reference", "tuning", "types")][0]
    select = ops.block_select  # what is kept has to be real
    monkeypatch.setattr(
        ops, "block_select", lambda *given, backend: select(*given, backend="pytorch")
    )
    monkeypatch.setitem(sys.modules, "ropeslr_trial", load(".kernels"))
    monkeypatch.setattr(tuning, "_devices", {})
    asked = asdict(tuning.Trial("cuda:0", tokens=2000, heads=2, head_dim=128))
    variant = {"precision": precision, "rows": rows, "launch": (4, 2, False)}
    with fake_gpu() as called, torch.inference_mode():
        wrong = child.examine(variant, asked | {"limits": tuning.LIMITS})
        found = child.examine(variant, asked | {"limits": {precision: 2.0}})
    assert wrong == {"failed": "wrong: relative error 1.0e+00"}
    assert (
        found["error"] == pytest.approx(1.0)
        and found["ms"] > 0
        and called["_forward"] == 4 + child.SAMPLES
    )
    assert called["current_stream"]


def test_the_short_list_and_the_key_of_a_machine_name_what_is_there():
    device = torch.device("cuda", 0)
    with fake_gpu():
        variants, key = tuning.short_list(device), tuning.machine_key(device)
    assert {(x.precision, x.rows) for x in variants} == {
        (precision, rows) for precision in tuning.PRECISIONS for rows in tuning.ROWS
    }
    assert key.startswith("a GPU that is not there sm_90 | ")


def test_trials_that_find_no_gpu_say_so(quick, tmp_path):
    """The children are real processes, and there is none."""
    record, _ = run_job(tmp_path, "variants:")
    assert record["variants"] and all(each["failed"] for each in record["variants"])


def test_the_doctor_examines_such_a_machine():
    """Its self-test finds zeros, which no kernel may return; the trials' processes find no GPU."""
    with fake_gpu():
        text = load(".attention.doctor").examine(torch.device("cuda", 0), (2, 8, 8), 0.9, 0.1)
    assert "a GPU that is not there (sm_90)" in text and "WRONG" in text
    assert "8-bit, 128 rows, as shipped: not used" in text and "one self-attention call" in text
