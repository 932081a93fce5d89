"""The methods on structured inputs, against slow transcriptions and against each other."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pack_loader import load
from support.data.fields import relative_error, rope_angles, smooth_qkv
from support.data.runs import Call, run_of

attention = load(".attention")
reference = load(".kernels.reference")
GRID = (8, 14, 18)  # 2016 tokens, 31.5 blocks


def run(q, k, v, layout, **plan):
    return run_of(**plan).attend(q, k, v, Call(layout))


def error(q, k, v, grid=GRID, order="cube", **plan):
    out, _ = run(q, k, v, attention.TokenLayout(grid, order=order), **plan)
    return relative_error(out, reference.dense_attention(q, k, v)[0])


@pytest.mark.parametrize("method", ["ropeslr", "top-k", "top-k plain"])
@pytest.mark.parametrize("grid", [(8, 14, 18), (5, 8, 9), (3, 7, 11), (1, 1, 1)])
def test_density_one_is_dense_in_both_orders(method, grid):
    q, k, v = smooth_qkv(grid)
    for order in ("cube", "raster"):
        assert error(q, k, v, grid, order, method=method, sparsity=0.0) < 1e-5


@pytest.mark.parametrize("order", ["cube", "raster"])
@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_calibrated_ropeslr_is_clearly_below_the_others(order, sparsity, seed):
    q, k, v = smooth_qkv(GRID, seed=seed)
    errors = {
        method: error(q, k, v, order=order, method=method, sparsity=sparsity)
        for method in ("ropeslr", "top-k", "top-k plain")
    }
    assert errors["ropeslr"] < 0.85 * min(errors["top-k"], errors["top-k plain"])


@pytest.mark.parametrize("method", ["ropeslr", "top-k", "top-k plain"])
def test_error_falls_as_density_rises(method):
    q, k, v = smooth_qkv(GRID, sharpness=1.5)
    errors = [
        error(q, k, v, method=method, sparsity=sparsity)
        for sparsity in (0.95, 0.9, 0.75, 0.5, 0.25, 0.0)
    ]
    assert all(more > less for more, less in zip(errors, errors[1:])), errors


@pytest.mark.parametrize("method", ["ropeslr", "top-k", "top-k plain"])
def test_error_falls_as_key_blocks_get_smaller(method):
    """At the same density, of whole blocks: 1 of 8, 2 of 16, 4 of 32 ..."""
    grid = (8, 16, 16)
    q, k, v = smooth_qkv(grid, sharpness=1.5)
    layout, errors = attention.TokenLayout(grid), []
    for size in ("64", "32", "16"):
        out, cost = run(q, k, v, layout, method=method, sparsity=0.875, key_block=size)
        assert cost.density == 0.125
        errors.append(relative_error(out, reference.dense_attention(q, k, v)[0]))
    assert all(more > less for more, less in zip(errors, errors[1:])), errors


def test_calibration_and_rank_take_effect():
    q, k, v = smooth_qkv(GRID)
    calibrated, uncalibrated = (error(q, k, v, calibrate=mode) for mode in ("auto", "off"))
    assert calibrated < 0.9 * uncalibrated
    by_rank = [error(q, k, v, rank=rank) for rank in (2, 16, 64)]
    assert by_rank[0] > by_rank[1] > by_rank[2] == pytest.approx(calibrated)
    assert error(q, k, v, rank=33) < by_rank[1]  # an odd rank is no special case


def test_lower_rank_costs_less():
    q, k, v = smooth_qkv(GRID)
    layout = attention.TokenLayout(GRID)
    flops = []
    for rank in (16, 32, 0):
        session = run_of(rank=rank, calibrate="first step")
        session.attend(q, k, v, Call(layout))  # the first step chooses the channels, of all of them
        with FlopCounterMode(display=False) as counter:
            _, cost = session.attend(q, k, v, Call(layout, step=1))
        flops.append((cost.background, counter.get_total_flops()))
    for (low, low_counted), (high, high_counted) in zip(flops, flops[1:]):
        assert low < high
        assert high_counted - low_counted == pytest.approx(high - low, rel=0.01)


@pytest.mark.parametrize(
    "method, rank, variant",
    [
        ("rola", 0, "released"),
        ("rola", 16, "released"),
        ("sla", 0, "released"),
        ("sla", 0, "paper"),
        ("ropeslr", 0, "released"),
        ("ropeslr", 8, "released"),
        ("adaspa", 0, "released"),
    ],
)
@pytest.mark.parametrize("key_block", ["64", "16"])
def test_the_accounting_is_what_is_computed(method, rank, variant, key_block):
    """Counted by PyTorch over the whole call, but for sums and means, which it does not count."""
    from support.data import adapters as made

    grid, heads, width = (8, 16, 16), 2, 64  # 32 whole blocks
    q, k, v = smooth_qkv(grid, heads=heads, width=width)
    adapter = getattr(made, f"{method}_adapter")(1, heads, width) if method != "adaspa" else None
    if method == "ropeslr":
        adapter = made.ropeslr_adapter(1, heads, width, rank=32, pe="none")
    angles = rope_angles(grid, width)
    rope = attention.RopeTable(angles.cos(), angles.sin())
    inputs = attention.LayerInputs(made.layer_x(q.shape[2], heads * width, torch.float32), rope)
    asked = dict(method=method, rank=rank, sla_variant=variant, key_block=key_block)
    session = run_of(adapter, sparsity=0.75, **asked)
    layout = attention.TokenLayout(grid, order=session.plan.block_order)
    for _ in range(2):  # the first call searches, or chooses features
        with FlopCounterMode(display=False) as counter:
            _, cost = session.attend(q, k, v, Call(layout, inputs=inputs))
    assert counter.get_total_flops() == pytest.approx(cost.total, rel=0.03)
    assert cost.density == 0.25


def test_uncalibrated_ropeslr_is_its_formula():
    q, k, v = (x.double() for x in smooth_qkv((4, 9, 10), heads=2, width=32))
    layout = attention.TokenLayout((4, 9, 10), order="cube")
    found, cost = run(q, k, v, layout, calibrate="off", sparsity=0.7)
    assert relative_error(found, slow_ropeslr(q, k, v, layout, keep=cost.density)) < 1e-10


def slow_ropeslr(q, k, v, layout, keep):
    """Written from the formulas alone, token by token."""
    width, blocks = q.shape[-1], [row[row >= 0].tolist() for row in layout.blocks().q_blocks.tokens]
    kept = round(keep * len(blocks))
    out = torch.zeros_like(q)
    for h in range(q.shape[1]):
        queries, keys, values = q[0, h], k[0, h], v[0, h]
        cov = (keys - keys.mean(0)).T @ values / len(keys)
        means = torch.stack([keys[block].mean(0) for block in blocks])
        for block in blocks:
            scores = means @ queries[block].mean(0) / width**0.5
            best = scores.argsort(descending=True)[:kept].tolist()
            rest = [j for j in range(len(blocks)) if j not in best]
            dropped_lse = torch.logsumexp(
                torch.stack([scores[j] + math.log(len(blocks[j])) for j in rest]), 0
            )
            near = [token for j in best for token in blocks[j]]
            for token in block:
                logits = keys[near] @ queries[token] / width**0.5
                lse = torch.logsumexp(logits, 0)
                sparse = torch.softmax(logits, 0) @ values[near]
                share = torch.sigmoid(dropped_lse - lse)
                out[0, h, token] = (1 - share) * sparse + share * (
                    values.mean(0) + queries[token] @ cov / width**0.5
                )
    return out


def test_calibration_solves_its_normal_equations():
    """The closed form against a plain least-squares solution over all rows and channels."""
    module = load(".attention.methods.calibration")
    generator = torch.Generator().manual_seed(0)
    rows, width, pairs = 40, 16, 8

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, out, sparse = (noise(1, 1, rows, width) for _ in range(3))
    sparse_lse, v_mean, cov = noise(1, 1, rows), noise(1, 1, width), noise(1, 1, width, width)
    dropped_lse, lse = sparse_lse + noise(1, 1, rows), sparse_lse + 0.1 + noise(1, 1, rows).abs()
    state = module.State(v_mean, cov, 0.25)
    exact = module.ExactQueries(q, out, lse, sparse, sparse_lse, dropped_lse)
    found = module.calibrate(exact, state, module.untrained(state))
    odds = torch.log(torch.expm1(lse - sparse_lse)).flatten()
    estimate = (dropped_lse - sparse_lse).flatten()
    c = (((estimate - estimate.mean()) * (odds - odds.mean())).mean() + 0.1) / (
        estimate.var(correction=0) + 0.1
    )
    b = odds.mean() - c * estimate.mean()
    assert found.gate_slope.item() == pytest.approx(c.item())
    assert found.gate_bias.item() == pytest.approx(b.item())

    gate = torch.sigmoid(c * estimate + b)
    design = torch.zeros(rows * width, pairs, dtype=torch.float64)
    for p in range(pairs):
        part = q[0, 0, :, 2 * p : 2 * p + 2] @ cov[0, 0, 2 * p : 2 * p + 2]
        design[:, p] = (gate[:, None] * part).flatten()
    wanted = (
        out[0, 0] - (1 - gate)[:, None] * sparse[0, 0] - gate[:, None] * v_mean[0, 0]
    ).flatten()
    normal = design.T @ design
    ridge = 0.05 * normal.diagonal().mean()
    prior = width**-0.5
    solved = torch.linalg.solve(
        normal + ridge * torch.eye(pairs), design.T @ wanted + ridge * prior
    )
    torch.testing.assert_close(
        found.channel_scale[0, 0], solved.clamp(-4 * prior, 4 * prior).repeat_interleave(2)
    )


def test_a_calibration_that_is_not_finite_keeps_the_previous_values():
    module = load(".attention.methods.calibration")
    cov = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    state = module.State(torch.zeros(1, 2, 8), cov, 8**-0.5)
    start = module.untrained(state)
    vectors, numbers = torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5)
    rows = [vectors, vectors, numbers, vectors, numbers, numbers]
    broken = cov.clone()
    broken[0, 1] = torch.nan
    found = module.calibrate(module.ExactQueries(*rows), state._replace(cov=broken), start)
    assert torch.isfinite(found.channel_scale).all()
    assert torch.equal(found.channel_scale[0, 1], start.channel_scale[0, 1])


def test_one_sharp_row_does_not_end_a_calibration():
    """A gap of 90 nats between dense and sparse mass: exp of it overflows float32."""
    module = load(".attention.methods.calibration")
    generator = torch.Generator().manual_seed(0)
    q, out, sparse = (torch.randn(1, 1, 40, 16, generator=generator) for _ in range(3))
    cov = torch.randn(1, 1, 16, 16, generator=generator)
    lse = torch.rand(1, 1, 40, generator=generator) + 0.1
    lse[..., 0] = 90.0
    dropped = torch.randn(1, 1, 40, generator=generator)
    exact = module.ExactQueries(q, out, lse, sparse, torch.zeros(1, 1, 40), dropped)
    state = module.State(torch.zeros(1, 1, 16), cov, 0.25)
    start = module.untrained(state)
    found = module.calibrate(exact, state, start)
    assert all(torch.isfinite(each).all() for each in found[:3])
    assert not torch.equal(found.gate_bias, start.gate_bias)
    assert not torch.equal(found.channel_scale, start.channel_scale)


@pytest.mark.parametrize("calibrate", ["off", "auto"])
@pytest.mark.parametrize("method", ["ropeslr", "top-k", "top-k plain"])
def test_a_scale_of_the_callers_own_is_heeded(method, calibrate):
    """Queries four times as large with a scale four times as small are the same attention."""
    q, k, v = smooth_qkv((4, 9, 10))
    layout = attention.TokenLayout((4, 9, 10))
    expected, _ = run(q, k, v, layout, method=method, calibrate=calibrate, sparsity=0.7)
    session = run_of(method=method, calibrate=calibrate, sparsity=0.7)
    found, _ = session.attend(4 * q, k, v, Call(layout, scale=64**-0.5 / 4))
    if method != "ropeslr" or calibrate == "off":
        assert relative_error(found, expected) < 1e-4
    else:  # the ridge pulls towards the scale itself: close, and not the same
        assert relative_error(found, expected) < 1e-2


def test_each_conditioning_has_its_own_calibration():
    """Two conditionings in one batch give what each gives alone, in any order of later calls."""
    one, two = smooth_qkv(GRID, seed=0), smooth_qkv(GRID, seed=5, sharpness=1.4)
    layout = attention.TokenLayout(GRID)
    together = run_of(calibrate="first step")
    batch = [torch.cat(pair) for pair in zip(one, two)]
    both, _ = together.attend(*batch, Call(layout, conditioning=(("a", 1), ("b", 1))))
    for part, alone in zip(both, (one, two)):
        expected, _ = run(*alone, layout, calibrate="first step")
        assert relative_error(part[None], expected) < 1e-5
    call = Call(layout, step=1, conditioning=(("b", 1), ("a", 1)))
    swapped, cost = together.attend(*[x.flip(0) for x in batch], call)
    assert cost.calibration == 0
    assert relative_error(swapped.flip(0), both) < 1e-5


@pytest.mark.parametrize(
    "mode, expected",
    [("off", []), ("first step", [0]), ("every step", list(range(12))), ("auto", [0, 5, 10])],
)
def test_calibration_follows_its_schedule(mode, expected):
    q, k, v = smooth_qkv((4, 8, 8), heads=1, width=32)
    session = run_of(calibrate=mode, sparsity=0.5)
    made = []
    for step in range(12):
        for layer in (0, 1):
            call = Call(attention.TokenLayout((4, 8, 8)), layer, step, num_steps=12)
            _, cost = session.attend(q, k, v, call)
            if cost.calibration and layer == 0:
                made.append(step)
    assert made == expected


@pytest.mark.parametrize("method", ["ropeslr", "top-k", "top-k plain"])
@pytest.mark.parametrize("before, after", [(70, 0), (0, 33), (20, 90)])
def test_text_and_reference_tokens_attend_and_are_attended_to_in_full(method, before, after):
    grid = (4, 8, 9)
    q, k, v = smooth_qkv(grid, width=32)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.cat(
            [
                torch.randn(1, 2, before, 32, generator=generator),
                x,
                torch.randn(1, 2, after, 32, generator=generator),
            ],
            dim=2,
        )
        for x in (q, k, v)
    )
    layout = attention.TokenLayout(grid, before, after)
    out, cost = run(q, k, v, layout, method=method, sparsity=0.8)
    dense, _ = reference.dense_attention(q, k, v)
    video = slice(before, before + layout.video_tokens)
    text = torch.ones(layout.tokens, dtype=torch.bool)
    text[video] = False
    assert relative_error(out[:, :, text], dense[:, :, text]) < 1e-5
    assert 0.2 < cost.density < 0.7
    # A text token is attended to by every video query: its value reaches all of them.
    v[:, :, int(text.nonzero()[0])] += 100.0
    moved, _ = run(q, k, v, layout, method=method, sparsity=0.8)
    assert ((moved - out)[:, :, video].abs().amax(dim=-1) > 1e-6).all()


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("method", ["ropeslr", "top-k", "top-k plain"])
def test_half_precision_follows_float32(method, dtype, limit):
    q, k, v = (x.to(dtype) for x in smooth_qkv((8, 8, 9), width=64))
    layout = attention.TokenLayout((8, 8, 9))
    out, _ = run(q, k, v, layout, method=method, sparsity=0.75)
    wide, _ = run(q.float(), k.float(), v.float(), layout, method=method, sparsity=0.75)
    assert out.dtype == dtype and relative_error(out, wide) < limit


def test_wrong_input_is_refused_by_name():
    q, k, v = smooth_qkv((2, 8, 8))
    with pytest.raises(ValueError, match="q has 128 tokens; the layout .* has 64"):
        run(q, k, v, attention.TokenLayout((1, 8, 8)))
    with pytest.raises(ValueError, match="does not add up to a batch of 1"):
        call = Call(attention.TokenLayout((2, 8, 8)), conditioning=(("a", 2),))
        run_of().attend(q, k, v, call)


class Products(TorchDispatchMode):
    """The dtypes of every matrix product."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.__name__.partition(".")[0] in ("mm", "bmm", "addmm", "baddbmm"):
            self.seen.add(args[-1].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["ropeslr", "top-k", "top-k plain"])
def test_plain_pytorch_multiplies_in_float32(method):
    """Without a matrix unit a CPU multiplies half precision some 20 times slower."""
    run = attention.AttentionRun(attention.SparsePlan(method=method, backend="pytorch").resolve())
    layout = attention.TokenLayout((8, 8, 8))
    q, k, v = (x.bfloat16() for x in smooth_qkv((8, 8, 8), width=16))
    with torch.inference_mode(), Products() as products:
        for step in range(4):
            run.attend(q, k, v, attention.AttentionCall(layout, 0, step, 50))
    assert products.seen == {torch.float32}
