"""Every launcher compiled for every GPU: fits, spills nothing, uses tensor cores, compiles once."""

import json
from typing import NamedTuple

import pytest
import torch
import triton

from pack_loader import ROOT, load

table = load(".benchmarks.compile")
RECORD = json.loads((ROOT / "benchmarks" / "results" / "compile.json").read_text(encoding="utf-8"))
RECORDED = triton.__version__ == RECORD["triton"]
# Another compiler allocates registers its own way: what is free of spills with one may spill with
# another (3.9: up to 756 bytes on sm_80, 240 on sm_120), and what its loops hold is not looked at.
ALLOWED_SPILLS = 0 if RECORDED else 800
SOME_SPILLS = {"pooled": 8, "low_rank": 400, "linear": 64, "plain": 8, "backward": 64, "rms": 48}
# 8 bits spill nothing, but where no default takes them.
SOME_IN_8_BITS = {"hip:gfx942": 16}
CORES = {"cuda:90": "wgmma", "cuda:100": "tcgen05", "hip:gfx942": "mfma"}
MATRIX = [
    (target, name)
    for target in table.TARGETS
    for name in table.CASES.get(target, table.ALL)
    # What is compiled as on sm_120 is looked at there.
    if target not in ("cuda:80", "cuda:89") or name in table.FEW
    # A compiler other than the recorded one gets the default method's kernels, on one GPU of each
    # kind.
    if RECORDED or (name in table.FEW and target in ("cuda:80", "cuda:90", "cuda:100", "cuda:120"))
]


@pytest.mark.parametrize("target, name", MATRIX)
def test_kernels_fit_and_use_tensor_cores(target, name):
    for row in table.compile_case(target, name, table.all_cases(target)[name]):
        assert row["fits"], row
        plain = table.plain_name(name)
        # An epilogue that is run once may spill where the loop that counts does not.
        some = SOME_SPILLS.get(plain, 0)
        if name.startswith("8-bit"):
            some = SOME_IN_8_BITS.get(target, 0)
        assert row["spilled_bytes"] <= ALLOWED_SPILLS + some, row
        if RECORDED and row["loop"] is not None:
            assert row["loop"]["kinds"].get("spill", 0) == 0, row
        if plain not in ("pool", "select", "unpack", "quantize") and row["kernel"] not in (
            "delta",
            "select_bits",
        ):
            # The 16 rows of a fine block are too few for a whole warpgroup.
            small = plain != name and row["kernel"] == "d_keys"
            core = "mma" if small and target.startswith("cuda") else CORES.get(target, "mma")
            assert row["tensor_cores"].get(core, 0) > 0, row
        if RECORDED and row["useful_mma"] is not None:
            assert row["useful_mma"] >= 0.95, row
        # "wgmma instructions are serialized".
        assert not (plain in table.FORWARD and row["notes"]), row
        if RECORDED:
            mine = (target, name, row["kernel"])
            known = [x for x in RECORD["rows"] if (x["target"], x["case"], x["kernel"]) == mine]
            same = ("warps", "stages", "registers", "spilled_bytes", "shared_bytes", "useful_mma")
            same = (*same, "loop", "passes")
            assert known and all(known[0].get(key) == row.get(key) for key in same), (
                f"{row} is not what benchmarks/results/compile.json holds: run python -m "
                "benchmarks.compile --out ..."
            )


class Bar(NamedTuple):
    """What the loop of a shipped forward may cost, at most or at least."""

    instructions: int
    buffers: int
    programs: int  # on a multiprocessor


BARS = {
    ("cuda:90", "mixed"): Bar(520, 2, 2),
    ("cuda:90", "fine mixed"): Bar(520, 2, 2),
    ("cuda:90", "wide mixed"): Bar(440, 2, 1),
    ("cuda:80", "mixed"): Bar(700, 2, 2),
    ("cuda:80", "fine mixed"): Bar(760, 2, 2),
    ("cuda:89", "mixed"): Bar(700, 1, 2),
    ("cuda:89", "fine mixed"): Bar(760, 1, 2),
    ("cuda:89", "8-bit fine mixed"): Bar(620, 2, 2),
    ("cuda:89", "8-bit wide mixed"): Bar(620, 2, 1),
    ("cuda:120", "mixed"): Bar(780, 1, 2),
    ("cuda:120", "fine mixed"): Bar(820, 1, 2),
    ("cuda:120", "8-bit fine mixed"): Bar(620, 2, 2),
    ("cuda:120", "8-bit wide mixed"): Bar(620, 2, 1),
}


@pytest.mark.skipif(not RECORDED, reason="the bars are those of the recorded compiler")
@pytest.mark.parametrize("target, name", BARS)
def test_the_loop_stays_as_lean_as_it_is(target, name):
    """From the record, which the test above holds to what is compiled."""
    bar = BARS[target, name]
    (row,) = [x for x in RECORD["rows"] if (x["target"], x["case"]) == (target, name)]
    loop = row["loop"]
    assert row["spilled_bytes"] == 0 and row["blocks_per_sm"] >= bar.programs
    assert loop["instructions"] <= bar.instructions and loop["buffers"] >= bar.buffers
    # Weights stay in the thread that made them: no product spreads over the warps by columns.
    assert all(columns == 1 for _, columns in loop["warps_per_dot"]), loop
    assert "shared store" not in loop["kinds"], loop
    # The next tile is under way before the present one is waited for.
    assert bar.buffers == 1 or min(loop["waits"]) > 0, loop


@pytest.mark.skipif(not RECORDED, reason="the bars are those of the recorded compiler")
def test_choosing_stays_as_lean_as_it_is():
    """Of a chunk of 512 blocks: the first look, each count, and the last pass, which writes lists."""
    for row in RECORD["rows"]:
        if row["case"] == "select" and row["target"].startswith("cuda"):
            first, counting, *_, last, _ = row["passes"]
            assert first <= 240 and counting <= 85 and last <= 620, row
            assert row["spilled_bytes"] == 0, row


@pytest.mark.slow
@pytest.mark.parametrize(
    "target, head_dim, dtype",
    [
        ("cuda:80", 64, torch.float16),
        ("cuda:90", 80, torch.float16),
        ("cuda:120", 96, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["mixed", "state", "backward"])
def test_other_head_dims_and_dtypes_fit(target, head_dim, dtype, name):
    for row in table.compile_case(
        target, name, table.cases(table.Sizes(head_dim=head_dim, dtype=dtype))[name], head_dim
    ):
        assert row["fits"], row
        if row["kernel"] != "delta":
            assert row["tensor_cores"].get(CORES.get(target, "mma"), 0) > 0, row


def test_heads_taken_some_at_a_time_compile_nothing_new():
    """Scores are made for a few heads at a time.

    A pointer to the middle is aligned for some only.
    """
    with table.capture("cuda:90") as compiled:
        for heads, blocks in ((7, 1713), (40, 1182), (3, 33)):
            pooled = torch.empty(1, heads, blocks, 64)
            table.backend.block_select(pooled, pooled, table.layout(64 * blocks), 4, 0.125)
    assert len({kernel.hash for name, kernel in compiled if name == "_select_lists"}) == 1


def test_another_size_compiles_nothing_new():
    """Length, sparsity, list width, heads and strides are run-time numbers.

    Tiles and flags are not.
    """
    with table.capture("cuda:90") as compiled:
        for sizes in (
            dict(),
            dict(tokens=75_600, heads=40, kept=118),
            dict(tokens=8_191, heads=1, kept=1),
            dict(tokens=64, kept=16),
            dict(tokens=1_048_576, heads=40, kept=1),
            dict(rank=50, tokens=999),
            dict(tokens=75_600, heads=40, kept=473, key_block=16),
            dict(tokens=999, kept=3, key_block=16),
        ):
            calls = table.cases(table.Sizes(**sizes))
            for name in (
                "plain",
                "mixed",
                "low_rank",
                "pool",
                "state",
                "select",
                "mass",
                "unpack",
                "backward",
            ):
                calls[name]()
    kernels = {}
    for name, kernel in compiled:
        kernels.setdefault(name, set()).add(kernel.hash)
    counts = {name: len(hashes) for name, hashes in kernels.items()}
    # Three cases here, all that read key blocks in two sizes of those.
    twice = ("_d_queries", "_d_keys", "_mass", "_pool_state")
    assert counts == dict.fromkeys(counts, 1) | dict.fromkeys(twice, 2) | {"_forward": 6}
