"""What a record of `benchmarks.kernels` says: targets met or missed, and the table it prints."""

from __future__ import annotations

# Whole call at 90 %, at least 75,000 tokens, D 128, on an H200; for other GPUs they stand beside
# what is measured.
TARGETS = {
    "sparse efficiency at 90 %": 0.85,
    "kept-block TFLOPS at 90 %": 450.0,
    "share of routing and background": 0.10,
    "backward efficiency at 95 %": 0.60,
    "cold start, seconds": 15.0,
    "kept memory, MB a layer": 12.0,
}
AT_MOST = {"share of routing and background", "cold start, seconds", "kept memory, MB a layer"}


def targets(record: dict) -> dict:
    """Target, best measured value on its cases, and whether it is met; None where not measured."""
    long = [case for case in record["cases"] if case["tokens"] >= 75_000]
    rows = [row for case in long for row in case.get("rows", ())]

    def at(sparsity: float, key: str) -> list[float]:
        return [
            row[key] for row in rows if row["sparsity"] == sparsity and row.get(key) is not None
        ]

    measured = {
        "sparse efficiency at 90 %": at(0.90, "sparse_efficiency"),
        "kept-block TFLOPS at 90 %": at(0.90, "kept_tflops"),
        "share of routing and background": at(0.90, "share_of_routing_and_background"),
        "backward efficiency at 95 %": [
            case["backward"]["efficiency"]
            for case in long
            if case.get("backward", {}).get("efficiency")
        ],
        "cold start, seconds": [record["cold_start"]["seconds"]]
        if "seconds" in record["cold_start"]
        else [],
        "kept memory, MB a layer": [
            row["memory_mb"]["kept"] for row in rows if "kept" in row.get("memory_mb", ())
        ],
    }
    found = {}
    for name, target in TARGETS.items():
        values = measured[name] if record["device"].startswith("cuda") else []
        worst = (max(values) if name in AT_MOST else min(values)) if values else None
        met = None if worst is None else worst <= target if name in AT_MOST else worst >= target
        found[name] = {"target": target, "measured": worst, "met": met}
    return found


def table(record: dict) -> str:
    """The record in a screenful."""
    lines = [
        f"{record['machine']}, torch {record['torch']}, triton {record['triton']}, {record['date']}"
    ]
    worst = max(record["errors"].items(), key=lambda item: item[1]["error"] / item[1]["limit"])
    lines.append(
        f"errors against float64: worst {worst[0]} {worst[1]['error']:.1e} (limit "
        f"{worst[1]['limit']:.0e})"
    )
    lines.append(
        "  ".join(
            f"{k} {v if isinstance(v, str) else round(v)}" for k, v in record["ceilings"].items()
        )
    )
    for case in record["cases"]:
        lines.append(
            f"\n{case['case']}: {case['tokens']:,} tokens, {case['heads']} heads of {case['width']}"
        )
        if "error" in case:
            lines.append(f"  {case['error'][:100]}")
        for name, row in case.get("dense", {}).items():
            lines.append(
                f"  {name:<22}"
                + (f"{row['ms']:9.2f} ms" if "ms" in row else f" {row['error'][:80]}")
            )
        for row in case.get("rows", ()):
            if "whole" not in row:
                lines.append(f"  {row['sparsity']:.2f}  {row.get('error', '')[:100]}")
                continue
            whole = "  ".join(
                f"{n} {x['ms']:.2f}" if "ms" in x else f"{n} failed"
                for n, x in row["whole"].items()
            )
            lines.append(f"  {row['sparsity']:.2f}  density {row['density']:.3f}  ms: {whole}")
            if row.get("times_dense") and row.get("kept_tflops"):
                lines.append(
                    f"        ropeslr {row['times_dense']:.2f}x dense, efficiency "
                    f"{row['sparse_efficiency']:.2f}, {row['kept_tflops']:.0f} TFLOPS on kept "
                    "blocks, routing and background "
                    f"{100 * row['share_of_routing_and_background']:.0f} %"
                )
        gradient = case.get("backward", {})
        if gradient.get("efficiency"):
            lines.append(
                f"  backward at {gradient['sparsity']}: efficiency {gradient['efficiency']:.2f}"
            )
    lines.append("")
    for name, row in record["targets"].items():
        measured = "not measured" if row["measured"] is None else f"{row['measured']:.2f}"
        lines.append(
            f"{name:<34} target {row['target']:<6} {measured:>12} "
            f"{'' if row['met'] is None else row['met']}"
        )
    if record["skipped"]:
        lines.append("left out for lack of time: " + ", ".join(record["skipped"]))
    return "\n".join(lines)
