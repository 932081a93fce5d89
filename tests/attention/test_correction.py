"""The correction: what can be predicted is, what cannot is left alone, whatever the numbers are."""

import pytest
import torch

from pack_loader import load
from support.data.fields import relative_error, smooth_qkv
from support.data.runs import Call, run_of

attention = load(".attention")
calibration = load(".attention.methods.calibration")
correction = load(".attention.methods.correction")
HEADS, WIDTH = 3, 16


def sampled(rows, dtype=torch.float32, seed=0):
    """Exact queries whose outputs are noise, and the state and calibration that they meet."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(1, HEADS, *shape, generator=generator).to(dtype)

    q, out, kept = (noise(rows, WIDTH) for _ in range(3))
    lse = noise(rows)
    exact = calibration.ExactQueries(q, out, lse + 1.0, kept, lse, lse - 0.5)
    state = calibration.State(noise(WIDTH), noise(WIDTH, WIDTH), WIDTH**-0.5)
    return exact, state, calibration.untrained(state)


def planted(rows, dtype=torch.float32, noise=0.0):
    """The same with outputs that the correction can explain but for a share of noise."""
    exact, state, known = sampled(rows, dtype)
    query_map, kept_map = (
        0.5
        * torch.randn(1, HEADS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(s)).to(dtype)
        for s in (8, 9)
    )
    known = known._replace(query_map=query_map, kept_map=kept_map)
    out = calibration.mixed(exact, state, known)
    return exact._replace(out=out + noise * exact.out), state, known


def test_what_is_linear_is_found():
    exact, state, planned = planted(400, torch.float64)
    known, left_out = correction.correct(exact, state, planned.plain)
    assert relative_error(left_out, exact.out) < 0.01
    assert relative_error(calibration.mixed(exact, state, known), exact.out) < 0.01
    other = planted(300, torch.float64)[0]._replace(q=2.0 * exact.q[:, :, :300])
    found, expected = (calibration.mixed(other, state, each) for each in (known, planned))
    assert relative_error(found, expected) < 0.02  # of queries that it has not seen


@pytest.mark.parametrize("rows", [1, 16, 64, 300])
@pytest.mark.parametrize("seed", range(3))
def test_noise_is_left_alone(rows, seed):
    exact, state, known = sampled(rows, seed=seed)
    mixed = calibration.mixed(exact, state, known)
    exact = exact._replace(out=mixed + exact.out)
    found, left_out = correction.correct(exact, state, known)
    assert not found.query_map.any() and not found.kept_map.any()
    torch.testing.assert_close(left_out, mixed)


def test_a_query_is_predicted_by_the_others():
    """Leaving a query out really changes nothing but its own place."""
    exact, state, planned = planted(80, torch.float64, noise=0.1)
    _, left_out = correction.correct(exact, state, planned.plain)
    out = exact.out.clone()
    out[:, :, 5] += 0.01
    _, moved = correction.correct(exact._replace(out=out), state, planned.plain)
    assert relative_error(moved[:, :, 5], left_out[:, :, 5]) < 1e-9
    assert not torch.equal(moved[:, :, 6], left_out[:, :, 6])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e30])
def test_a_head_that_is_broken_is_left_alone(wrong):
    exact, state, planned = planted(200)
    expected, _ = correction.correct(exact, state, planned.plain)
    q = exact.q.clone()
    q[0, 1, 7, 3] = wrong
    found, _ = correction.correct(exact._replace(q=q), state, planned.plain)
    assert torch.isfinite(found.query_map).all() and torch.isfinite(found.kept_map).all()
    for head in (0, 2):
        torch.testing.assert_close(found.kept_map[0, head], expected.kept_map[0, head])


def test_a_head_that_keeps_nothing_has_a_background_to_correct():
    exact, state, planned = planted(200)
    exact = exact._replace(
        sparse_out=torch.zeros_like(exact.sparse_out),
        sparse_lse=torch.full_like(exact.sparse_lse, -torch.inf),
    )
    exact = exact._replace(out=calibration.mixed(exact, state, planned))
    known, _ = correction.correct(exact, state, planned.plain)
    assert not known.kept_map.any()
    assert relative_error(calibration.mixed(exact, state, known), exact.out) < 0.05


def test_large_parts_fit_into_half_precision():
    known = planted(200)[2]
    known = known._replace(kept_map=1e9 * known.kept_map).stored_as(torch.float16)
    assert known.query_map.dtype == known.kept_map.dtype == torch.float16
    assert torch.isfinite(known.kept_map).all()
    assert known.gate_slope.dtype == torch.float32


GRID = (6, 12, 12)
LAYOUT = attention.TokenLayout(GRID)


def corrected_run(**plan):
    return run_of(**(dict(sparsity=0.9, calibrate_rows=256) | plan))


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_run_is_nearer_to_dense_attention_with_it(rank, gradients, monkeypatch):
    """At a step that calibrates, and, the same by other ways, at those after it."""
    q, k, v = (x.requires_grad_(gradients) for x in smooth_qkv(GRID, width=32))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    errors = []
    for penalties in ((), correction.LAMBDAS):
        monkeypatch.setattr(correction, "LAMBDAS", penalties)
        run = corrected_run(rank=rank)
        first, second = (
            run.attend(q, k, v, Call(LAYOUT, step=step, num_steps=20))[0].detach()
            for step in range(2)
        )
        assert relative_error(second, first) < 1e-5
        errors.append(float(relative_error(first, exact.detach())))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(
    "later",
    [
        dict(step=1, window=(6, 7, 8, 9, 10, 11)),
        dict(step=5),
        dict(step=-5),
    ],
    ids=str,
)
def test_it_holds_for_its_own_frames_and_a_while(later, monkeypatch):
    """With other content it would do harm."""
    found = []
    for penalties in (correction.LAMBDAS, ()):
        monkeypatch.setattr(correction, "LAMBDAS", penalties)
        run = corrected_run(calibrate="first step")
        own = dict(window=(0, 1, 2, 3, 4, 5))
        outputs = [
            run.attend(*smooth_qkv(GRID, width=32, seed=seed), Call(LAYOUT, num_steps=20, **how))[0]
            for seed, how in ((0, dict(step=0) | own), (1, own | later), (0, dict(step=1) | own))
        ]
        found.append(outputs)
    (_, other, again), (_, without, plain) = found
    assert torch.equal(other, without)
    assert relative_error(again, plain) > 0.05  # and is there again for those


def test_conditionings_of_a_batch_have_their_own():
    both = [
        torch.cat(xs) for xs in zip(smooth_qkv(GRID, width=32), smooth_qkv(GRID, width=32, seed=1))
    ]
    together, alone = corrected_run(), {key: corrected_run() for key in "ab"}
    for step in range(2):
        call = Call(LAYOUT, step=step, num_steps=20, conditioning=(("a", 1), ("b", 1)))
        found, _ = together.attend(*both, call)
        for row, key in enumerate("ab"):
            call = Call(LAYOUT, step=step, num_steps=20, conditioning=((key, 1),))
            expected, _ = alone[key].attend(*(x[row : row + 1] for x in both), call)
            assert relative_error(found[row : row + 1], expected) < 1e-5


def test_weighted_keys_are_not_changed_by_it(monkeypatch):
    """Nor does it know them: a calibrating call, and the one after it, agree."""
    layout = attention.TokenLayout(GRID, after=12, weighted=((864, 876, 0.5),))
    q, k, v = smooth_qkv(GRID, width=32)
    k, v = (torch.cat((x, x[:, :, :12]), dim=2) for x in (k, v))
    found = []
    for penalties in (correction.LAMBDAS, ()):
        monkeypatch.setattr(correction, "LAMBDAS", penalties)
        run = corrected_run()
        first, second = (
            run.attend(q, k, v, Call(layout, step=step, num_steps=20))[0] for step in range(2)
        )
        assert relative_error(second, first) < 1e-5
        found.append(first)
    assert relative_error(*found) > 0.05
