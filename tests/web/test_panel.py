"""The panel's scripts: their tests under node, their arithmetic against Python's, banned code."""

import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pack_loader import load
from support import needs

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "web" / "js").glob("*.js"))
TESTS = sorted(Path(__file__).parent.glob("*.test.mjs"))
PANEL, STATE = "ropeslr_panel.js", "panel_state.js"
ENTRIES = (PANEL, "result_nodes.js")
NODE, TSC = shutil.which("node"), os.environ.get("ROPESLR_TSC")
needs_node = pytest.mark.skipif(NODE is None, reason=str(needs.why_not(needs.NODE)))

accounting, planning = load(".attention.accounting"), load(".attention.plan")
adaspa, calibration = load(".attention.methods.adaspa"), load(".attention.methods.calibration")
schedule, running, calls, layouts = (
    load(f".attention.{name}") for name in ("schedule", "run", "call", "block_layout")
)

METHODS = (*planning.METHODS[1:], "ropeslr with weights", "sla paper")
GRIDS = (
    (21, 30, 52),
    (21, 45, 80),
    (31, 22, 40),
    (9, 30, 52),
    (5, 13, 7),
    (1, 64, 64),
    (33, 27, 31),
)
RELEASED_RANK = 64  # of the weights that the panel assumes


def evaluate(calls):
    """Answers of the panel's arithmetic to a list of [function, *arguments]."""
    script = Path(__file__).with_name("evaluate.mjs")
    done = subprocess.run(
        [NODE, str(script)], input=json.dumps(calls), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def draw_cases(count=64):
    """Settings of attention calls: every method and every grid, the rest drawn."""
    dice = random.Random(7)
    for i in range(count):
        yield {
            "method": METHODS[i % len(METHODS)],
            "grid": GRIDS[i % len(GRIDS)],
            "extra": dice.choice((0, 0, 256, 300)),
            "width": 128,
            "heads": dice.choice((12, 16, 24, 40)),
            "rank": dice.choice((0, 1, 7, 16, 32, 64, 96, 128)),
            "sparsity": dice.choice((0.0, 0.3, 0.5, 0.77, 0.8, 0.9, 0.93, 0.95, 0.98)),
            "order": dice.choice(("cube", "raster")),
            "key_block": dice.choice((16, 32, 64)),
            "query_block": dice.choice((64, 128)),
            "diagonal": dice.random() < 0.3,
            "first": dice.random() < 0.3,
        } | (
            dict(order="tile", key_block=64, query_block=64)
            if METHODS[i % len(METHODS)] == "vsa"
            else {}
        )


def in_script(case):
    """The script's call for a case."""
    method = (
        case["method"].split()[0]
        if case["method"].startswith(("ropeslr", "sla"))
        else case["method"]
    )
    return [
        "attentionCost",
        case["grid"],
        case["extra"],
        case["width"],
        case["heads"],
        {
            "method": method,
            "trained": case["method"] in ("ropeslr with weights", "rola", "sla", "sla paper"),
            "order": case["order"],
            "keyBlock": case["key_block"],
            "queryBlock": case["query_block"],
            "rank": case["rank"],
            "sparsity": case["sparsity"],
            "slaVariant": "paper" if case["method"] == "sla paper" else "released",
            "keepDiagonal": case["diagonal"],
            "keepFirstFrame": case["first"],
        },
    ]


def in_python(case):
    """The same from the pack: layout, plan and accounting, put together as AttentionRun does."""
    head_dim, heads, rank = case["width"], case["heads"], case["rank"]
    layout = layouts.TokenLayout(case["grid"], before=case["extra"], order=case["order"])
    sizes = dict(key_block=case["key_block"], query_block=case["query_block"])
    blocks = layout.blocks(case["diagonal"], case["first"], **sizes)
    n_q, n_k = blocks.q_blocks.num_blocks, blocks.kv_blocks.num_blocks
    topk = planning.topk_of(case["sparsity"], blocks.num_ranked)
    if case["method"] == "vsa":
        topk = max(1, math.ceil((1.0 - case["sparsity"]) * blocks.num_ranked))
    share = layout.video_tokens / layout.tokens
    density = 1.0 - (1.0 - blocks.density(topk)) * share
    place = (layout.video_tokens, head_dim, heads)
    features = rank if 0 < rank < RELEASED_RANK else RELEASED_RANK
    channels = first_order_channels(head_dim, rank)
    background = {
        "ropeslr": lambda: (
            accounting.first_order_flops(*place, channels) + accounting.mapping_flops(*place)
        ),
        "ropeslr with weights": lambda: (
            accounting.first_order_flops(*place, channels)
            + accounting.low_rank_flops(*place, features)
        ),
        "rola": lambda: accounting.low_rank_flops(*place, features + features % 2),
        "sla": lambda: accounting.linear_flops(*place),
        "sla paper": lambda: accounting.marginal_flops(*place, n_q, n_k),
        "adaspa": lambda: 0.0,
        "top-k": lambda: accounting.pooled_flops(*place, n_k),
        "top-k plain": lambda: 0.0,
        "vsa": lambda: accounting.coarse_flops(*place, n_k, width=0),
    }[case["method"]]()
    routing = (
        accounting.routing_flops(layout.tokens, head_dim, heads, n_q, n_k)
        if case["method"] != "adaspa"
        else 0.0
    )
    cost = accounting.AttentionCost(
        density,
        accounting.dense_flops(layout.tokens, head_dim, heads),
        accounting.sparse_flops(layout.tokens, head_dim, heads, density),
        routing,
        background,
    )
    return {
        "keep": topk,
        "queries": n_q,
        "keys": n_k,
        "density": cost.density,
        "dense": cost.dense,
        "sparse": cost.sparse,
        "routing": cost.routing,
        "background": cost.background,
        "total": cost.total,
    }


def first_order_channels(head_dim, rank):
    """How many channels the first-order background really takes."""
    cov = torch.eye(head_dim)[None, None]
    state = calibration.State(torch.zeros(1, 1, head_dim), cov, 1.0)
    channel_ids = calibration.strongest(calibration.untrained(state), cov, rank).channel_ids
    return head_dim if channel_ids is None else channel_ids.shape[-1]


@needs_node
@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_the_scripts_own_tests(path):
    done = subprocess.run([NODE, "--test", str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"^\W*pass (\d+)", done.stdout, re.M)[1]) > 5


@needs_node
def test_costs_are_those_of_the_pack():
    cases = list(draw_cases())
    assert len({case["method"] for case in cases}) == len(METHODS)
    for case, found in zip(cases, evaluate([in_script(case) for case in cases]), strict=True):
        expected = in_python(case)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9), case


@needs_node
def test_the_first_frames_blocks_are_those_of_the_layout():
    dice = random.Random(1)
    cases = [
        (
            [dice.randint(1, 12), dice.randint(1, 20), dice.randint(1, 20)],
            dice.choice(("cube", "raster")),
            dice.choice((16, 32, 64)),
        )
        for _ in range(300)
    ]
    for (grid, order, key_block), found in zip(
        cases, evaluate([["firstFrameBlocks", *case] for case in cases]), strict=True
    ):
        layout = layouts.TokenLayout(tuple(grid), order=order)
        required = layout.blocks(False, True, key_block=key_block).required
        assert found == required.counts[0], (grid, order, key_block)


@needs_node
@pytest.mark.parametrize("method", ["ropeslr", "top-k", "top-k plain"])
def test_costs_are_those_of_a_real_call(method):
    """A call between two calibrations, counted by AttentionRun itself."""
    grid, before, heads, width = (3, 10, 12), 70, 2, 32
    plan = planning.SparsePlan(
        method=method,
        sparsity=0.5,
        rank=9,
        calibrate="first step",
        allocation="uniform",
        backend="pytorch",
    )
    run = running.AttentionRun(plan.resolve())
    layout = layouts.TokenLayout(grid, before, 0, run.plan.block_order)
    q, k, v = torch.randn(
        3, 1, heads, layout.tokens, width, generator=torch.Generator().manual_seed(0)
    )
    for step in range(2):  # the first call of a run makes its state from all channels
        _, cost = run.attend(q, k, v, calls.AttentionCall(layout, step=step, num_steps=2))
    (found,) = evaluate(
        [
            [
                "attentionCost",
                grid,
                before,
                width,
                heads,
                {
                    "method": method,
                    "trained": False,
                    "order": run.plan.block_order,
                    "keyBlock": run.plan.key_tokens,
                    "queryBlock": run.query_block,
                    "rank": 9,
                    "sparsity": 0.5,
                },
            ]
        ]
    )
    assert cost.density < 1
    for name in ("density", "dense", "sparse", "routing", "background", "total"):
        assert found[name] == pytest.approx(getattr(cost, name), rel=1e-9), name


def an_adapter(method, block_order):
    """What a plan asks of an adapter."""
    info = SimpleNamespace(method=method, block_order=block_order, block_q=64, block_k=64)
    return SimpleNamespace(info=info, use_rank=0, has=lambda name: False)


@needs_node
def test_auto_means_what_it_means_in_the_plan():
    cases = [
        (method, adapter, order, key_block, first)
        for method in planning.METHODS
        for adapter in ("", "ropeslr", "rola", "sla")
        for order in planning.BLOCK_ORDERS
        for key_block in planning.KEY_BLOCKS
        for first in (-1, 3)
        if not adapter or method in ("auto", adapter) or method not in planning.TRAINED_METHODS
    ]
    found = evaluate(
        [
            [
                "resolve",
                {
                    "method": method,
                    "block_order": order,
                    "key_block": key_block,
                    "query_block": "auto",
                    "allocation": "auto",
                    "dense_first_steps": first,
                },
                adapter,
            ]
            for method, adapter, order, key_block, first in cases
        ]
    )
    for (method, adapter, order, key_block, first), answer in zip(cases, found, strict=True):
        trained_order = "raster" if adapter in ("rola", "sla") else "cube"
        plan = planning.SparsePlan(
            method=method, block_order=order, key_block=key_block, dense_first_steps=first
        )
        plan = plan.resolve(an_adapter(adapter, trained_order) if adapter else None)
        expected = {
            "method": plan.method,
            "order": plan.block_order,
            "keyBlock": plan.key_tokens,
            "queryBlock": plan.query_tokens,
            "first": plan.dense_first_steps,
            "shared": plan.allocates,
        }
        assert answer == {**expected, "trained": plan.method == adapter}, (method, adapter)


@needs_node
def test_sparse_steps_are_those_of_the_schedule():
    cases = list(
        itertools.product(
            (1, 4, 8, 9, 30), (0, 0.5), (0.5, 1), ("ropeslr", "adaspa"), (0, 1, 9), (0, 2)
        )
    )
    cases = [(n, int(a * n), max(int(a * n) + 1, int(b * n)), *rest) for n, a, b, *rest in cases]
    found = evaluate(
        [["sparseSteps", {"total": n, "from": a, "to": b}, *rest] for n, a, b, *rest in cases]
    )
    for (total, begin, end, method, first, last), answer in zip(cases, found, strict=True):
        sigmas = tuple(1.0 - i / total for i in range(begin, end + 1))
        plan = schedule.StepSchedule(
            sigmas, float("inf"), float("-inf"), first, last, begin, total - end
        )
        sparse = [
            begin + i for i, sigma in enumerate(sigmas[:-1]) if plan.dense_reason(sigma) is None
        ]
        if method == "adaspa":  # the first step that is due and not dense anyway searches, dense
            search = max(adaspa.search_steps(total)[0], first, begin)
            sparse = [step for step in sparse if step > search]
        assert answer == len(sparse), (total, begin, end, method, first, last)


def test_a_second_stage_is_what_the_run_takes_for_one():
    """By the same share of noise; the module itself needs ComfyUI."""
    python = (ROOT / "nodes" / "patching" / "full_schedule.py").read_text("utf-8")
    script = (ROOT / "web" / "js" / "graph_context.js").read_text("utf-8")
    found = [re.search(r"\bBEGUN = ([\d.]+)", text) for text in (python, script)]
    assert found[0] and found[1] and found[0][1] == found[1][1]


def layer_texts(count=400):
    """Lists of layers as a person may write them, many with a mistake."""
    dice = random.Random(3)
    yield from (
        "",
        "0, 1, 38-39",
        "3-5,4",
        "7",
        " 0 ,2 - 5,",
        "5-4",
        "12345",
        "1-2-3",
        "-1",
        "+1",
        "1.5",
        "\t3\n",
    )
    for _ in range(count):
        pieces = ("0", "1", "7", "38", ",", ", ", "-", " - ", " ", "x")
        yield "".join(dice.choice(pieces) for _ in range(dice.randint(1, 9)))


def layers_in_python(text):
    """How many layers the plan reads; None where it refuses the text."""
    try:
        return len(planning.parse_layers(text))
    except ValueError:
        return None


@needs_node
def test_dense_layers_are_read_as_the_plan_reads_them():
    texts = list(layer_texts())
    expected = [layers_in_python(text) for text in texts]
    assert 50 < expected.count(None) < len(texts) - 50
    found = evaluate([["readLayers", text, 10_000] for text in texts])
    for text, count, answer in zip(texts, expected, found, strict=True):
        assert answer["count"] == (count or 0), text
        assert ("cannot read" in answer["warning"]) == (count is None), text


def python_value(text, names):
    """What ComfyUI's Math Expression computes, by the library that it uses; None where it fails."""
    simpleeval = pytest.importorskip(
        "simpleeval", reason="simpleeval, which ComfyUI brings, is not installed"
    )
    functions = {
        "min": min,
        "max": max,
        "abs": abs,
        "round": round,
        "ceil": math.ceil,
        "floor": math.floor,
        "int": int,
    }
    try:
        value = simpleeval.simple_eval(text, names=names, functions=functions)
        return float(value) if math.isfinite(value) else None
    except Exception:
        return None


def expressions(count=600):
    """Well-formed expressions of numbers, names, operators and functions."""
    dice = random.Random(11)

    def draw(depth):
        kind = dice.randint(0, 7) if depth else 0
        if kind < 2:
            return dice.choice(("a", "b", "c", "1", "2", "16", "0.5", "81"))
        if kind < 5:
            operator = dice.choice(
                ("+", "-", "*", "/", "//", "%", "** 2 -", "and", "or", "&", "|", "^")
            )
            return f"{draw(depth - 1)} {operator} {draw(depth - 1)}"
        if kind == 5:
            return f"({draw(depth - 1)} {dice.choice(('<', '>', '<=', '>=', '==', '!='))} {draw(depth - 1)})"
        if kind == 6:
            return f"{dice.choice(('abs', 'round', 'ceil', 'floor', 'int', '-', '+', 'not '))}({draw(depth - 1)})"
        return f"({draw(depth - 1)} if {draw(depth - 1)} else max({draw(depth - 1)}, {draw(depth - 1)}))"

    return [draw(3) for _ in range(count)]


@needs_node
def test_math_expressions_are_those_of_comfyui():
    texts, names = expressions(), {"a": 5, "b": 16.5, "c": -7}
    expected = [python_value(text, names) for text in texts]
    found = evaluate([["expression", text, names] for text in texts])
    known = [
        (text, one, other)
        for text, one, other in zip(texts, expected, found, strict=True)
        if one is not None
    ]
    assert len(known) > 300
    for text, one, other in known:
        assert other == pytest.approx(one, rel=1e-9, abs=1e-9), text


def read(name):
    return (ROOT / "web" / "js" / name).read_text(encoding="utf-8")


def test_the_panel_knows_every_widget_that_changes_an_estimate_and_the_event():
    node = (ROOT / "nodes" / "sparse_attention.py").read_text(encoding="utf-8")
    widgets = set(re.findall(r'io\.(?:Combo|Float|Int|String|Boolean)\.Input\(\s*"(\w+)"', node))
    settings = re.search(r"const DEFAULTS = \{(.*?)\};", read(STATE), re.S)[1]
    known = set(re.findall(r"(\w+):", settings))
    assert known <= widgets
    # Calibration costs little, and training is no run of a sampler.
    left_out = {"calibrate", "calibrate_rows", "strict", "verbose", "training"}
    assert widgets - known == left_out
    report = (ROOT / "nodes" / "patching" / "run_report.py").read_text(encoding="utf-8")
    assert (
        re.search(r'^EVENT = "(.+)"', report, re.M)[1]
        == re.search(r'const EVENT = "(.+)"', read(PANEL))[1]
    )
    assert f'const NODE = "{re.search(r"""node_id="(.+)",""", node)[1]}"' in read(PANEL)


def test_the_panel_reads_no_field_that_a_report_lacks():
    source = (ROOT / "nodes" / "patching" / "run_report.py").read_text(encoding="utf-8")
    report = re.search(r"class RunReport:(.*?)    @property", source, re.S)[1]
    # `send` adds three.
    sent = {*re.findall(r"^    (\w+): ", report, re.M), "node", "workflow", "flops_saved"}
    read_here = re.search(r"interface Report \{(.*?)\n  \}", read("types.d.ts"), re.S)[1]
    wanted = set(re.findall(r"^    (\w+)\??: ", read_here, re.M))
    assert {"tokens", "sparse_calls"} < wanted <= sent


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_safe_and_portable(path):
    text = path.read_text(encoding="utf-8")
    first, second, *_ = lines = text.splitlines()
    assert first.startswith("// ") and len(first) > 20 and second == "// @ts-check"
    assert all(len(line) <= 120 for line in lines) and len(lines) <= 300
    for banned in (
        "/extensions/",
        "ComfyUI-RoPeSLR",
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "fetch",
        "XMLHttpRequest",
        "WebSocket",
        "sendBeacon",
        "localStorage",
        "http:",
        "https:",
    ):
        assert banned not in text, f"{path.name} contains {banned}"


@pytest.mark.parametrize(
    "path", [path for path in SCRIPTS if path.name not in ENTRIES], ids=lambda path: path.name
)
def test_only_the_entry_touches_comfyui(path):
    """ComfyUI loads every script below web/ as an extension: loading a helper must do nothing."""
    text = path.read_text(encoding="utf-8")
    assert "registerExtension" not in text and "scripts/" not in text
    if NODE:
        code = (
            "const before = Object.keys(globalThis).length;await "
            f"import({json.dumps(path.as_uri())});if (Object.keys(globalThis).length !== before) "
            "throw new Error('left something behind');"
        )
        done = subprocess.run(
            [NODE, "--input-type=module", "--eval", code],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 and not done.stdout, done.stderr


def test_nothing_registers_twice():
    names = [
        name
        for entry in ENTRIES
        for name in re.findall(r'registerExtension\(\{\s*name: "(.+?)"', read(entry))
    ]
    assert len(names) == len(set(names)) == len(ENTRIES)


@pytest.mark.skipif(
    not TSC, reason="ROPESLR_TSC names no TypeScript compiler; `python dev.py test` sets it"
)
def test_types_are_sound():
    """Every script is checked, and nothing is found."""
    command = [TSC, "-p", str(ROOT / "web" / "jsconfig.json")]
    listed = subprocess.run(
        [*command, "--listFilesOnly"], capture_output=True, text=True, timeout=300
    )
    assert {path.name for path in SCRIPTS} <= {
        Path(line).name for line in listed.stdout.splitlines()
    }, listed.stdout
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_scripts_and_tests():
    assert set(ENTRIES) < {path.name for path in SCRIPTS} and len(SCRIPTS) >= 5 and len(TESTS) >= 3
