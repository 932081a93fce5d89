"""The benchmarks run, and the README shows what they recorded."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=ROOT)


def test_the_cpu_benchmark_runs_and_records(tmp_path):
    out = tmp_path / "cpu.json"
    done = run("benchmarks.cpu", "--tokens", "4096", "--dtypes", "float32", "--repeats", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert [row["sparsity"] for row in record["rows"]] == [0.8, 0.9, 0.95]
    assert all(set(row["ms"]) == {"dense", "kernel", "ropeslr", "top-k", "top-k plain"} for row in record["rows"])
    assert {"date", "machine", "threads", "torch", "commit"} <= set(record)


def test_the_readme_shows_the_record_as_it_is():
    code = (
        "from benchmarks import ROOT, readme; text = (ROOT / 'README.md').read_text(encoding='utf-8'); "
        "import sys; sys.exit(text != readme.with_tables(text))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"run `python -m benchmarks.readme`\n{done.stderr}"
