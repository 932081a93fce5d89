"""Writes the measured tables of README.md from benchmarks/results/: `python -m benchmarks.readme`."""

from __future__ import annotations

import json

from . import ROOT

BEGIN, END = "<!-- cpu table: begin -->\n", "<!-- cpu table: end -->"


def cpu_table(record: dict) -> str:
    """The record of `benchmarks.cpu` as a Markdown table."""
    lines = [
        "| | tokens | sparsity | dense | kernel alone | ropeslr | top-k | top-k plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        names = ("kernel", "ropeslr", "top-k", "top-k plain")
        ratios = " | ".join(f"{row['times_dense'][name]:.1f}x" for name in names)
        lines.append(
            f"| {row['dtype']} | {row['tokens']:,} | {row['sparsity']:.2f} | {row['ms']['dense']:.0f} ms | {ratios} |"
        )
    lines.append(
        f"\n{record['date']}, {record['machine']}, {record['threads']} threads, torch {record['torch']}; "
        "4 heads of 128; times faster than dense SDPA."
    )
    return "\n".join(lines) + "\n"


def with_tables(text: str) -> str:
    """README.md with its tables made anew."""
    record = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text(encoding="utf-8"))
    before, rest = text.split(BEGIN)
    return before + BEGIN + cpu_table(record) + END + rest.split(END)[1]


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")
