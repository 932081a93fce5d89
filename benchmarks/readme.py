"""Tables for benchmarks/README.md and docs/models.md, made from benchmarks/results/.

Those files call them in cog blocks, which `python dev.py texts` runs.
"""

from __future__ import annotations

import json

from . import ROOT

RESULTS = ROOT / "benchmarks" / "results"
SHOWN = {  # case of the compile table -> what a reader calls it
    "plain": "kept blocks alone",
    "pooled": "with pooled keys",
    "mixed": "with first-order background (default)",
    "fine mixed": "the same, key blocks of 16",
    "wide mixed": "the same, query blocks of 128",
    "8-bit fine mixed": "key blocks of 16, in 8 bits",
    "8-bit wide mixed": "the same, query blocks of 128, in 8 bits",
    "low_rank": "with low-rank background",
    "linear": "with linear branch (SLA)",
}


def cpu_table(record: dict) -> str:
    """The record of `benchmarks.cpu` as a Markdown table."""
    lines = [
        "| | tokens | sparsity | dense | kernel alone | compiled flex_attention | ropeslr | "
        "ropeslr, uniform, key blocks of 64 | top-k | top-k plain | adaspa | rola | sla | "
        "learning, share of ropeslr |",
        "|---" * 14 + "|",
    ]
    for row in record["rows"]:
        names = ("kernel", "flex", "ropeslr", "ropeslr, uniform", "top-k", "top-k plain", "adaspa")
        names += ("rola", "sla")
        known = row["times_dense"]
        ratios = " | ".join(f"{known[name]:.1f}x" if name in known else "" for name in names)
        lines.append(
            f"| {row['dtype']} | {row['tokens']:,} | {100 * row['sparsity']:.1f} % | "
            f"{row['ms']['dense']:.0f} ms | {ratios} | "
            f"{100 * row['learning_ms']['ropeslr'] / row['ms']['ropeslr']:.0f} % |"
        )
    lines.append(
        f"\n{record['date']}, {record['machine']} ({', '.join(record.get('flags', []))}), "
        f"{_threads(record)}, torch {record['torch']}; 4 heads of 128; times faster than "
        "dense SDPA. Every row keeps the same number of keys, whatever its key blocks."
    )
    return "\n".join(lines) + "\n"


def compile_table(record: dict) -> str:
    """The record of `benchmarks.compile`: the kernel on every architecture, and bytes moved."""
    rows = {
        (row["target"], row["case"]): row for row in record["rows"] if row["kernel"] == "forward"
    }
    targets = list(dict.fromkeys(row["target"] for row in record["rows"]))
    names = [target.replace("cuda:", "sm_").removeprefix("hip:") for target in targets]
    lines = [
        "| registers / spilled bytes | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for case, title in SHOWN.items():
        cells = []
        for target in targets:
            row = rows.get((target, case))
            cells.append(f"{row['registers']} / {row['spilled_bytes']}" if row else "")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    useful = [row["useful_mma"] for row in record["rows"] if row["useful_mma"] is not None]
    spilled = sum(row["spilled_bytes"] for row in record["rows"])
    bytes_ = record["bytes_per_token_and_head"]
    passes = ", ".join(
        f"{name} {value:,.0f}"
        for name, value in bytes_.items()
        if name not in ("whole call", "floor")
    )
    lines.append(
        f"\n{record['date']}, Triton {record['triton']}, {record['dtype']}, head_dim "
        f"{record['head_dim']}. All {len(record['rows'])} compiled kernels together, backward "
        f"included: {spilled} bytes spilled, useful share of "
        f"tensor-core work at least {min(useful):.2f}. Bytes per token and head at 90 % of 75,600 "
        f"tokens, key blocks of 64: {passes}; {bytes_['whole call']:,.0f} in all, where "
        f"{bytes_['floor']:,.0f} is the least that any attention moves."
    )
    return "\n".join(lines) + "\n"


CONDITIONS = {  # title of a column -> what a row of the quality record has there
    "5 %": dict(asked=0.05),
    "10 %": dict(asked=0.1),
    "15 %": dict(asked=0.15),
    "25 %": dict(asked=0.25),
    "10 %, raster": dict(asked=0.1, order="raster"),
    "10 %, 4 steps": dict(asked=0.1, steps=4),
    "10 %, CFG 3": dict(asked=0.1, cfg=3.0),
    "10 %, 4 steps, CFG 3": dict(asked=0.1, steps=4, cfg=3.0),
    "10 %, 6,144 tokens": dict(asked=0.1, grid=[16, 16, 24]),
}
USUAL = dict(order="cube", steps=20, cfg=1.0, grid=[8, 12, 16])


def quality_table(record: dict) -> str:
    """The record of `benchmarks.quality`: PSNR of samples under every condition."""
    lines = [
        "| | key block | " + " | ".join(CONDITIONS) + " |",
        "|---" * (len(CONDITIONS) + 2) + "|",
    ]
    for name, key_block in _each_method(record):
        cells = []
        for own in CONDITIONS.values():
            row = _row(record, method=name, key_block=key_block, **(USUAL | own))
            cells.append(f"{row['psnr']:.1f} ± {row['spread']:.1f}" if row else "")
        lines.append(f"| {name} | {key_block} | {' | '.join(cells)} |")
    lines.append(
        f"\nPSNR in dB of the whole clip to that of dense attention at the same seed, peak "
        f"{record['peak']:g} (the clips' values go from about -2 to 2), mean and spread over "
        f"{record['seeds']} seeds, from the raster column on {record['seeds'] // 2}. "
        f"{record['date']}, {record['machine']}, torch {record['torch']}, ComfyUI "
        f"{record['comfyui']}."
    )
    return "\n".join(lines) + "\n"


def attention_table(record: dict) -> str:
    """The same at 10 %: the error of attention by layer, SSIM, and what was really kept."""
    lines = [
        "| | key block | error of attention | by layer | SSIM | kept | attention FLOPs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, key_block in _each_method(record):
        row = _row(record, method=name, key_block=key_block, asked=0.1, **USUAL)
        if row:
            layers = ", ".join(f"{each:.2f}" for each in row["by_layer"])
            lines.append(
                f"| {name} | {key_block} | {row['error']:.3f} | {layers} | {row['ssim']:.3f} | "
                f"{100 * row['density']:.1f} % | {100 * row['spent']:.0f} % |"
            )
    return "\n".join(lines) + "\n"


def _each_method(record: dict) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["method"], row["key_block"]) for row in record["rows"]))


def _row(record: dict, **wanted: object) -> dict | None:
    found = (
        row for row in record["rows"] if all(row[name] == value for name, value in wanted.items())
    )
    return next(found, None)


def routing_table(record: dict) -> str:
    """The record of `benchmarks.routing`."""
    lines = [
        "| key blocks | scores and selection, per head | scores | list, per head | mass kept |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        lines.append(
            f"| {row['key_block']} | {row['ms_per_head']:.0f} ms | "
            f"{row['score_gflop_per_head']:.2f} GFLOP | {row['list_bytes_per_head'] / 1e6:.2f} MB "
            f"| {row['recall']:.3f} |"
        )
    lines.append(
        f"\n{record['date']}, {record['machine']}, {_threads(record)}, torch "
        f"{record['torch']}; {record['tokens']:,} tokens, head_dim {record['head_dim']}, "
        f"{100 * record['density']:.0f} % kept."
    )
    return "\n".join(lines) + "\n"


def gpu_table(records: list[dict]) -> str:
    """The records of `benchmarks.kernels` on GPUs, or that there is none."""
    if not records:
        command = "python -m benchmarks.kernels --out benchmarks/results/kernels-NAME.json"
        return f"No record from a GPU yet: `{command}`.\n"
    lines = [
        "| | tokens x heads | sparsity | fastest dense | ropeslr | efficiency |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for record in records:
        for case in record["cases"]:
            for row in case["rows"]:
                if row.get("times_dense"):
                    lines.append(
                        f"| {record['machine']}, {case['case']} | {case['tokens']:,} x "
                        f"{case['heads']} | {row['sparsity']:.2f} | {case['dense_ms']:.1f} ms | "
                        f"{row['times_dense']:.2f}x | {row['sparse_efficiency']:.2f} |"
                    )
        met = "; ".join(
            f"{name} {row['measured']:.2f} (target {row['target']}, "
            f"{'met' if row['met'] else 'missed'})"
            for name, row in record["targets"].items()
            if row["measured"] is not None
        )
        versions = f"torch {record['torch']}, Triton {record['triton']}"
        notes.append(f"{record['machine']}, {record['date']}, {versions}: {met}.")
    return "\n".join([*lines, "", *notes]) + "\n"


def coverage_table(record: dict) -> str:
    """The record of `dev.py coverage`: models that run sparse, by method and ComfyUI version."""
    newest = record[max(record, key=lambda version: [int(part) for part in version.split(".")])]
    methods = list(dict.fromkeys(method for found in newest.values() for method in found))
    lines = ["| | " + " | ".join(methods) + " | ComfyUI |", "|---" * (len(methods) + 2) + "|"]
    for name, found in newest.items():
        versions = [version for version in record if name in record[version]]
        odd = [version for version in versions if record[version][name] != found]
        if odd:
            raise ValueError(
                f"{name} differs between ComfyUI {', '.join(versions)}: the table has no room for "
                "that"
            )
        reasons = {cell for cell in found.values() if isinstance(cell, str)}
        cells = [_share(found[method]) if method in found else "" for method in methods]
        name += (
            f" ({', '.join(reason.partition(': ')[2] for reason in reasons)})" if reasons else ""
        )
        where = "all three" if len(versions) == len(record) else ", ".join(versions)
        lines.append(f"| {name} | {' | '.join(cells)} | {where} |")
    lines.append(
        "\nSparse / total self-attention calls per model call, as measured by the tests with "
        f"ComfyUI {', '.join(record)} on tiny models with random weights: CFG 1 and 5, two sizes, "
        "one of them with odd sides where the model takes them; rola and sla with random weights "
        "of their form. Empty: no such weights are published."
    )
    return "\n".join(lines) + "\n"


def _share(cell: list[int] | str) -> str:
    return "dense" if isinstance(cell, str) else f"{cell[0]} / {cell[1]}"


def model_table(record: dict) -> str:
    """The record of `benchmarks.model`: estimates by chip and kernel, and what they are worth."""
    chips = list(dict.fromkeys(row["chip"] for row in record["estimates"]))
    cases = list(dict.fromkeys(row["case"] for row in record["estimates"]))
    known = {(row["chip"], row["case"]): row["tflops"] for row in record["estimates"]}
    lines = [
        "| estimated TFLOPS on kept blocks | " + " | ".join(chips) + " |",
        "|---" * (len(chips) + 1) + "|",
    ]
    for case in cases:
        cells = " | ".join(str(known.get((chip, case), "")) for chip in chips)
        lines.append(f"| {SHOWN[case]} | {cells} |")
    for size in dict.fromkeys(row["rows"] for row in record["selection"]):
        shares = {
            row["chip"]: f"{row['ms']} ms, {row['share_percent']} %"
            for row in record["selection"]
            if row["rows"] == size
        }
        cells = " | ".join(shares.get(chip, "") for chip in chips)
        lines.append(f"| choosing key blocks of 16 for query blocks of {size} * | {cells} |")
    lines.append(
        "\n\\* A layer of Wan 14B at 720p, all heads; and as a share of what its kept blocks take."
    )
    lines += ["", "| anchor | estimate | measured by others | off |", "|---|---|---|---|"]
    for row in record["anchors"]:
        off = f"{row['off_percent']:+} %"
        lines.append(f"| {row['anchor']} | {row['estimate']} | {row['measured']} | {off} |")
    field = record["field"]
    if field:
        ours = " and ".join(
            f"{row['ours_ms']} ms ({'8 bits' if '8-bit' in row['case'] else '16 bits'})"
            for row in field
        )
        row = field[0]
        lines.append(
            f"\nThe bar of the field, on an {row['chip']}: {row['tokens']:,} tokens, "
            f"{row['heads']} heads of 128, {100 * row['kept']:.0f} % kept: {row['ms']} ms by "
            f"ComfyUI's own INT8 top-k with a pooled tail, {row['dense_ms']:,} ms dense in bf16, "
            f"both as its authors measured. Our kept blocks alone should take {ours} there: an "
            "estimate."
        )
    return "\n".join(lines) + "\n"


def study_table(record: dict) -> str:
    """The record of `benchmarks.study`: another small model, by number of kept blocks."""
    counts = sorted({row["kept"] for row in record["rows"]})
    lines = [
        "| | key block | " + " | ".join(f"{100 * n / 24:.1f} %" for n in counts) + " |",
        "|---" * (len(counts) + 2) + "|",
    ]
    for name, size in dict.fromkeys((x["method"], x["key_block"]) for x in record["rows"]):
        cells = []
        for count in counts:
            mine = (name, size, count)
            row = next(
                x for x in record["rows"] if (x["method"], x["key_block"], x["kept"]) == mine
            )
            cells.append(f"{row['psnr']:.1f} ± {row['spread']:.1f}")
        lines.append(f"| {name} | {size} | {' | '.join(cells)} |")
    lines.append(
        f"\nPSNR in dB as above, {record['seeds']} seeds, 20 steps, 1,536 tokens. "
        f"{record['date']}, {record['processor_minutes']:.0f} processor minutes of training, torch "
        f"{record['torch']}."
    )
    return "\n".join(lines) + "\n"


def lora_table(record: dict) -> str:
    """The record of `benchmarks.lora`: samples with and without a sparse LoRA."""
    seeds = len(next(iter(record["psnr"].values())))
    asked = record["training"]
    lines = ["| | PSNR to dense, dB | each seed |", "|---|---|---|"]
    for name, found in record["psnr"].items():
        each = ", ".join(f"{x:.1f}" for x in found)
        lines.append(f"| {name} | {sum(found) / seeds:.1f} | {each} |")
    best_step, best = min(record["held_out"], key=lambda each: each[1])
    lines.append(
        f"\n{record['date']}, {record['machine']}, {_threads(record)}, torch "
        f"{record['torch']}, ComfyUI {record['comfyui']}: {record['steps']} steps of "
        f"{asked['batch_size']} examples, rank {asked['rank']}, learning rate "
        f"{asked['learning_rate']:g}, {asked['samples']} videos of {asked['prompts']} prompts that "
        f"the node made itself; {record['seconds'] / 60:.0f} minutes altogether. The held-out "
        f"error fell to {100 * best:.0f} % (step {best_step}). {seeds} seeds that it was not "
        "trained on; of one seed, 2 dB are chance."
    )
    return "\n".join(lines) + "\n"


def model() -> str:
    return model_table(_read("model.json"))


def study() -> str:
    return study_table(_read("study.json"))


def cpu() -> str:
    """A CPU with AVX2 alone; and, from before `ropeslr` corrected itself, one with AVX-512."""
    older = (
        "\nA CPU with AVX-512, before `ropeslr` corrected itself (`calibrate_rows` was 128):\n\n"
    )
    return cpu_table(_read("cpu.json")) + older + cpu_table(_read("cpu_avx512.json"))


def quality() -> str:
    return quality_table(_read("quality.json"))


def attention_errors() -> str:
    return attention_table(_read("quality.json"))


def routing() -> str:
    return routing_table(_read("routing.json"))


def compiled() -> str:
    return compile_table(_read("compile.json"))


def coverage() -> str:
    return coverage_table(_read("coverage.json"))


def lora() -> str:
    return lora_table(_read("lora.json"))


def gpu() -> str:
    return gpu_table([_read(path.name) for path in sorted(RESULTS.glob("kernels-*.json"))])


def _threads(record: dict) -> str:
    return f"{record['threads']} thread" + "s" * (record["threads"] != 1)


def _read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))
