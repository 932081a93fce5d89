"""Heads that keep different numbers of blocks: how a run finds them, uses them, and hands them on."""

import pytest
import torch

from pack_loader import load
from support.data.fields import relative_error, smooth_qkv
from support.data.runs import Call, run_of
from support.oracle.allocation import written_out

attention = load(".attention")
allocation = load(".attention.allocation")
learned = load(".attention.learned")
adapters = load(".attention.adapters")
reference = load(".kernels.reference")

GRID = (8, 8, 12)  # 768 tokens, 12 query blocks, 48 key blocks of 16
LAYOUT = attention.TokenLayout(GRID)
MEAN = 12  # key blocks of a row, at sparsity 0.75
METHODS = ("ropeslr", "top-k", "top-k plain")
LAYERS = (0, 1)


def sharing(**plan):
    settings = dict(allocation="auto", key_block="16", query_block="64", sparsity=0.75)
    return run_of(**(settings | plan))


def layer_inputs(layer, batch=1, seed=0):
    """Four heads: one flat, two as usual, one that needs many blocks; layer 1 is sharper."""
    rows = [smooth_qkv(GRID, heads=4, seed=seed + 10 * layer + row) for row in range(batch)]
    q, k, v = (torch.cat(each) for each in zip(*rows))
    strength = torch.tensor([0.02, 1.0, 1.4, 0.5])[None, :, None, None] * (1 + 0.4 * layer)
    size = torch.tensor([1.0, 1.0, 3.0, 1.0])[None, :, None, None]
    return q * strength, k, v * size


def step(run, number, batch=1, num_steps=20, **call):
    """One step through both layers: -> outputs and costs by layer."""
    found = {}
    for layer in LAYERS:
        own = Call(LAYOUT, layer, number, num_steps, **call)
        found[layer] = run.attend(*layer_inputs(layer, batch), own)
    return found


def kept(costs):
    """Blocks of each head in both layers, as the densities of a step have them."""
    return [round(share * 48) for layer in LAYERS for share in costs[layer][1].heads]


def errors(found):
    """Squared error of both layers: what is dealt out by."""
    return sum(
        (out - reference.dense_attention(*layer_inputs(layer))[0]).square().sum().item()
        for layer, (out, _) in found.items()
    )


@pytest.mark.parametrize("method", METHODS)
def test_heads_find_their_share_in_the_first_step_and_use_it_in_the_next(method):
    run, alike = sharing(method=method), sharing(method=method, allocation="uniform")
    first = step(run, 0)
    assert all(not cost.heads and cost.density == MEAN / 48 for _, cost in first.values())
    second, even = step(run, 1), step(alike, 1)
    shares = kept(second)
    assert sum(shares) == 2 * 4 * MEAN
    assert sum(cost.density for _, cost in second.values()) == pytest.approx(2 * MEAN / 48)
    fewest = 0 if method == "ropeslr" else 1
    assert min(shares) >= fewest and max(shares) <= 4 * MEAN
    assert max(shares) > 1.5 * MEAN > 3 * min(shares)
    assert errors(second) < 0.8 * errors(even)


@pytest.mark.parametrize("method", METHODS)
def test_a_dense_step_is_enough_to_learn_from(method):
    run, other = sharing(method=method), sharing(method=method)
    for layer in LAYERS:
        assert run.observe(*layer_inputs(layer), Call(LAYOUT, layer, 0, 20)) > 0
    step(other, 0)
    assert kept(step(run, 1)) == kept(step(other, 1))


def test_a_call_whose_plan_learns_nothing_sees_nothing():
    for plan in (dict(allocation="uniform"), dict(method="adaspa"), dict(sparsity=0.0)):
        assert sharing(**plan).observe(*layer_inputs(0), Call(LAYOUT, 0, 0, 20)) == 0


def test_the_choice_follows_the_rule_for_what_a_run_really_measured(monkeypatch):
    seen = []
    add = allocation.Allocation.add

    def watched(self, layer, number, parts, curve):
        seen.append(curve)
        add(self, layer, number, parts, curve)

    monkeypatch.setattr(allocation.Allocation, "add", watched)
    run = sharing()
    step(run, 0)
    chosen = kept(step(run, 1))
    measured = torch.cat([curve.errors[0] for curve in seen[:2]]).double()  # of the first step
    assert chosen == written_out(measured, seen[0].counts, 48, 8 * MEAN)


@pytest.mark.parametrize("method", METHODS)
def test_what_was_measured_is_what_a_head_loses(method, monkeypatch):
    """The probed error at the mean is that of a uniform run, here on all queries.

    But for the correction, which few queries cannot tell.
    """
    monkeypatch.setattr(load(".attention.methods.base"), "PROBED_ROWS", 768)
    monkeypatch.setattr(load(".attention.methods.correction"), "LAMBDAS", ())
    run = sharing(method=method, calibrate_rows=768, calibrate="first step")
    q, k, v = layer_inputs(1)
    run.attend(q, k, v, Call(LAYOUT, 1, 0, 20))
    (group,) = run.method.allocation._groups.values()
    curve = group.curves[1].curve
    uniform = sharing(
        method=method, calibrate_rows=768, allocation="uniform", calibrate="first step"
    )
    out, _ = uniform.attend(q, k, v, Call(LAYOUT, 1, 0, 20))
    exact = reference.dense_attention(q, k, v)[0]
    expected = (out - exact).square().sum(dim=(-2, -1))
    found = curve.errors[..., curve.counts.index(MEAN)]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_heads_that_are_alike_stay_alike():
    """Where each block helps less than the one before, as a rule."""
    run = sharing(sparsity=0.9)
    for number in (0, 1):
        q, k, v = (x[:, 1:2].repeat(1, 4, 1, 1) for x in layer_inputs(0))
        out, cost = run.attend(q, k, v, Call(LAYOUT, 0, number, 20))
    assert [round(48 * share) for share in cost.heads] == [4] * 4
    assert cost.density == pytest.approx(4 / 48)


def test_a_head_that_keeps_nothing_is_its_background():
    """Only the mean of v is left of a head whose queries ask nothing."""
    run = sharing(calibrate="off")
    q, k, v = layer_inputs(0)
    q[:, 0] = 0.0
    for number in (0, 1):
        out, cost = run.attend(q, k, v, Call(LAYOUT, 0, number, 20))
    assert cost.heads[0] == 0.0
    torch.testing.assert_close(out[:, 0], v[:, 0].mean(dim=1, keepdim=True).expand_as(out[:, 0]))


def test_conditionings_and_batch_rows_have_tables_of_their_own():
    run, alone = sharing(), {key: sharing() for key in "ab"}
    both = (("a", 1), ("b", 1))
    for number in (0, 1):
        found = step(run, number, batch=2, conditioning=both)
    for row, key in enumerate("ab"):
        for number in (0, 1):
            expected = {}
            for layer in LAYERS:
                inputs = (x[row : row + 1] for x in layer_inputs(layer, 2))
                call = Call(LAYOUT, layer, number, 20, conditioning=((key, 1),))
                expected[layer] = alone[key].attend(*inputs, call)
        for layer in LAYERS:
            assert relative_error(found[layer][0][row], expected[layer][0][0]) < 1e-4
    # One that comes apart again keeps its own.
    call = Call(LAYOUT, 0, 2, 20, conditioning=(("b", 1),))
    parted, own = (
        each.attend(*(x[1:] for x in layer_inputs(0, 2)), call)[1] for each in (run, alone["b"])
    )
    assert parted.heads == pytest.approx(own.heads, abs=1.5 / 48)  # sums in another order


def test_a_batch_that_grows_is_measured_anew():
    run = sharing()
    step(run, 0)
    step(run, 1)
    found = step(run, 2, batch=2)
    assert all(cost.calibration and not cost.heads for _, cost in found.values())
    assert sum(kept(step(run, 3, batch=2))) == 8 * MEAN


@pytest.mark.parametrize(
    "steps", [(0, 0, 1, 1, 2), (5, 4, 3, 2), (0, 7, 14, 19), (3, 1, 9, 9, 0), (0, 1, 2, 3, 5, 6)]
)
def test_steps_may_repeat_skip_or_run_backwards(steps):
    run = sharing()
    for number in steps:
        found = step(run, number)
        shares = kept(found)
        assert sum(shares or [MEAN] * 8) == 8 * MEAN
        for out, _ in found.values():
            assert torch.isfinite(out).all()
    assert shares


def test_a_layer_that_is_skipped_for_a_while_keeps_its_share():
    run = sharing()
    step(run, 0)
    before = step(run, 1)[1][1].heads
    for number in (2, 3, 4, 5, 6, 7):  # layer 0 alone, measured again at 5
        run.attend(*layer_inputs(0), Call(LAYOUT, 0, number, 20))
    _, cost = run.attend(*layer_inputs(1), Call(LAYOUT, 1, 7, 20))
    assert len(cost.heads) == len(before) == 4


def test_windows_of_a_longer_video_share_what_one_of_them_found():
    run = sharing()
    for number in (0, 1, 2):
        for window in ("first", "second"):
            found = step(run, number, window=window)
    assert sum(kept(found)) == 8 * MEAN


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [0.3, 0.05, 0.002])
def test_an_error_target_chooses_the_density(method, share):
    run = sharing(method=method, target="error", error=share)
    step(run, 0)
    found = step(run, 1)
    exact = {layer: reference.dense_attention(*layer_inputs(layer))[0] for layer in LAYERS}
    energy = sum((x - x.mean(2, keepdim=True)).square().sum().item() for x in exact.values())
    shares = kept(found)
    if max(shares) < 4 * MEAN:  # there was room
        assert errors(found) < 1.3 * share * energy
    assert max(shares) <= 4 * MEAN


def test_a_stricter_target_keeps_more():
    totals = []
    for share in (0.3, 0.1, 0.02):
        run = sharing(target="error", error=share)
        step(run, 0)
        totals.append(sum(kept(step(run, 1))))
    assert totals[0] < totals[1] < totals[2]


@pytest.mark.parametrize(
    "steps, expected",
    [(8, list(range(8))), (9, [0, 5]), (20, [0, 5, 10, 15])],
)
def test_short_runs_calibrate_at_every_step(steps, expected):
    run = run_of(sparsity=0.5)
    made = []
    for number in range(steps):
        _, cost = run.attend(*layer_inputs(0), Call(LAYOUT, 0, number, steps))
        if cost.calibration:
            made.append(number)
    assert made == expected


# What a run hands on


def facts(**others):
    return adapters.AdapterInfo("ropeslr", 2, 4, 64, 0, block_k=16, sparsity=0.75, **others)


def taught(run, steps=(0, 1), first=1.0):
    for number in steps:
        step(run, number, sigma=first - number / 20)
    return learned.learned_adapter(run.lessons, LAYERS, facts(), run.plan.adapter)


def test_a_run_that_starts_from_another_needs_neither_probe_nor_calibration(tmp_path, monkeypatch):
    """Of what was learned the correction alone is not kept."""
    monkeypatch.setattr(load(".attention.methods.correction"), "LAMBDAS", ())
    adapter = taught(sharing())
    path = adapters.write_adapter(adapter, tmp_path / "learned.safetensors")
    read = adapters.read_adapter(path)
    assert read.info.grid == GRID and read.info.noise_levels == (0.95,)
    assert read.info.sparsity == pytest.approx(0.75, abs=1e-4)
    for layer in LAYERS:
        torch.testing.assert_close(
            read.layer(layer)["allocation"], adapter.layer(layer)["allocation"]
        )
    before, run = sharing(), sharing(adapter=read, calibrate="off")
    step(before, 0)
    own = step(before, 1, sigma=0.95)
    found = step(run, 0, sigma=0.95)
    assert all(cost.calibration == 0 for _, cost in found.values())
    assert kept(found) == kept(own)
    for layer in LAYERS:
        assert relative_error(found[layer][0], own[layer][0]) < 1e-5
    assert not run.lessons


def test_refine_goes_on_from_what_was_learned():
    run = sharing(adapter=taught(sharing()))  # refine is what auto means then
    found = step(run, 0, sigma=0.95)
    assert all(cost.calibration and cost.heads for _, cost in found.values())
    again = taught(run, (1, 2))
    assert again.info.noise_levels == (0.9, 0.95)
    assert sum(kept(step(run, 3, sigma=0.85))) == 8 * MEAN


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9, 0.98])
@pytest.mark.parametrize("key_block", ["16", "64"])
def test_a_table_holds_at_other_sizes_and_sparsities(sparsity, key_block):
    plan = attention.SparsePlan(sparsity=sparsity, key_block=key_block)
    run = attention.AttentionRun(plan.resolve(taught(sharing())))
    mean = run.plan.topk(48 if key_block == "16" else 12)
    found = step(run, 0, sigma=0.95)
    blocks = 48 if key_block == "16" else 12
    total = sum(share * blocks for layer in LAYERS for share in found[layer][1].heads)
    assert total == pytest.approx(8 * mean)


def test_uniform_ignores_a_table():
    run = sharing(adapter=taught(sharing()), allocation="uniform")
    assert all(not cost.heads for _, cost in step(run, 0, sigma=0.95).values())


def test_nothing_learned_is_no_adapter():
    run = sharing(calibrate="off")
    step(run, 0)
    assert learned.learned_adapter(run.lessons, LAYERS, facts()) is None


def test_a_layer_that_never_ran_sparse_gets_initial_values(tmp_path):
    run = sharing()
    for number in (0, 1):
        run.attend(*layer_inputs(0), Call(LAYOUT, 0, number, 20, sigma=0.9))
    adapter = learned.learned_adapter(run.lessons, LAYERS, facts())
    adapters.write_adapter(adapter, tmp_path / "half.safetensors")
    torch.testing.assert_close(adapter.layer(1)["allocation"], torch.ones(1, 4))


def test_many_levels_become_few():
    run = sharing(calibrate="every step")
    adapter = taught(run, range(40), first=2.0)
    assert len(adapter.info.noise_levels) == learned.MOST_LEVELS
    assert adapter.layer(0)["channel_scale"].shape == (16, 4, 32)


def test_a_lower_rank_is_handed_on_too():
    run = sharing(rank=16)
    adapter = taught(run)
    assert adapter.layer(0)["channel_scale"].shape == (1, 4, 32)
    found = step(sharing(rank=16, adapter=adapter), 0, sigma=0.95)
    assert all(torch.isfinite(out).all() for out, _ in found.values())


def test_a_target_that_no_block_is_needed_for_says_nothing_of_heads():
    adapter = taught(sharing(target="error", error=1.0))
    torch.testing.assert_close(adapter.layer(0)["allocation"], torch.ones(1, 4))
    assert adapter.info.sparsity == 0.98


def test_a_head_that_keeps_nothing_teaches_no_gate():
    """What one conditioning's empty head cannot know does not spoil what the other's has learned."""
    found = sharing()
    step(found, 0)
    step(found, 1, sigma=0.95)
    (full,) = found.lessons[1][-1:]
    empty = full._replace(
        kept=torch.zeros_like(full.kept),
        values=full.values._replace(gate_bias=torch.full_like(full.values.gate_bias, 20.0)),
    )
    both = {0: found.lessons[0], 1: [full, empty]}
    adapter = learned.learned_adapter(both, LAYERS, facts())
    expected = torch.where(
        full.kept[0] > 0, full.values.gate_bias[0], (full.values.gate_bias[0] + 20) / 2
    )
    torch.testing.assert_close(adapter.layer(1)["gate_bias"][0], expected)


def test_an_empty_head_keeps_the_gate_it_began_with():
    module = load(".attention.methods.calibration")
    q, k, v = layer_inputs(0)
    blocks = LAYOUT.blocks(key_block=16)
    state = load(".kernels.ops").block_pool_state(k, v, blocks)
    state = module.State(*state[1:], 0.125)
    out, lse = reference.dense_attention(q, k, v)
    start = module.untrained(state)._replace(gate_slope=torch.full((1, 4), 0.5))
    nothing = torch.full_like(lse, -torch.inf)
    found = module.calibrate(
        module.ExactQueries(q, out, lse, torch.zeros_like(out), nothing, lse - 0.3), state, start
    )
    torch.testing.assert_close(found.gate_slope, start.gate_slope)
    torch.testing.assert_close(found.gate_bias, start.gate_bias)


def test_layers_that_stay_dense_take_no_blocks_with_them():
    plan = attention.SparsePlan(sparsity=0.75, dense_layers=frozenset({1}))
    run = attention.AttentionRun(plan.resolve(taught(sharing())))
    _, cost = run.attend(*layer_inputs(0), Call(LAYOUT, 0, 0, 20, sigma=0.95))
    assert cost.density == pytest.approx(MEAN / 48)


@pytest.mark.parametrize("allocation", ["auto", "uniform"])
def test_what_a_start_said_is_kept_at_the_new_noise_levels(allocation, tmp_path):
    start = taught(sharing(calibrate="every step"), range(4))
    assert len(start.info.noise_levels) > 1
    run = sharing(adapter=start, calibrate="refine", allocation=allocation)
    run.attend(*layer_inputs(0), Call(LAYOUT, 0, 0, 20, sigma=0.9))  # layer 1 stays dense
    again = learned.learned_adapter(run.lessons, LAYERS, facts(), start)
    adapters.write_adapter(again, tmp_path / "again.safetensors")
    assert again.layer(1)["channel_scale"].shape == (1, 4, 32)


def test_windows_of_two_lengths_do_not_learn_from_each_other_in_turn():
    run = run_of(sparsity=0.75, key_block="16")
    made = 0
    for number in range(4):
        for grid in (GRID, (4, 8, 12)):
            call = Call(attention.TokenLayout(grid), 0, number, 20)
            made += run.attend(*smooth_qkv(grid, heads=4), call)[1].calibration > 0
    assert made == 2


def test_methods_are_compared_as_each_would_run():
    for asked in ("adaspa", "ropeslr"):
        resolved = attention.SparsePlan(method=asked).resolve()
        for method in ("ropeslr", "top-k", "adaspa"):
            alone = attention.SparsePlan(method=method).resolve()
            found = resolved.by_method(method)
            assert (found.allocation, found.key_block) == (alone.allocation, alone.key_block)
