"""Every method against a slow float64 transcription: 1e-5 in float32, 1e-2 in bfloat16."""

import dataclasses

import pytest
import torch

from pack_loader import load
from support.data.adapters import (
    SHAPES,
    layer_x,
    rola_adapter,
    ropeslr_adapter,
    single,
    sla_adapter,
)
from support.data.fields import relative_error
from support.data.runs import Call, run_of
from support.oracle import transcription as golden

attention = load(".attention")
rope = load(".attention.rope")
reference = load(".kernels.reference")
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
GRID, HEADS = (4, 5, 8), 2  # 160 tokens: two blocks and a short one
DTYPES = pytest.mark.parametrize("dtype", list(LIMITS), ids=["float32", "bfloat16"])
ORDERS = pytest.mark.parametrize("order", ["cube", "raster"])
KEY_BLOCKS = pytest.mark.parametrize("key_block", [64, 16])


class Case:
    """Inputs of one comparison: q, k rotated in a dtype, and in float64 for the transcription."""

    def __init__(
        self, dtype, width=128, order="cube", grid=GRID, heads=HEADS, seed=0, key_block=64
    ):
        generator = torch.Generator().manual_seed(seed)
        tokens = grid[0] * grid[1] * grid[2]
        self.grid, self.dtype, self.heads = grid, dtype, heads
        self.angles = golden.wan_angles(grid, width)
        place = torch.stack(
            torch.meshgrid(*(torch.linspace(0, 3, n) for n in grid), indexing="ij"), -1
        ).view(-1, 3)

        def field():
            phase = torch.rand(heads * width, generator=generator)
            waves = torch.sin(place @ torch.randn(3, heads * width, generator=generator) + phase)
            noise = 0.4 * torch.randn(tokens, heads * width, generator=generator)
            return (waves + noise).unflatten(-1, (heads, width)).transpose(0, 1).double()

        shared = torch.randn(heads, 1, width, generator=generator).double()
        rotated = [golden.rotate(1.2 * (field() + shared), self.angles).to(dtype) for _ in range(2)]
        self.q_hat, self.k_hat = (each[None] for each in rotated)
        self.q, self.k = (golden.rotate(each.double(), -self.angles) for each in rotated)
        self.v_hat = field().to(dtype)[None]
        self.v = self.v_hat[0].double()
        self.x_hat = layer_x(tokens, heads * width, dtype)
        self.x = self.x_hat[0].double()
        self.layout = attention.TokenLayout(grid, order=order)
        self.key_block, blocks = str(key_block), self.layout.blocks(key_block=key_block)
        self.blocks = golden.Blocks(
            *(
                [[int(token) for token in row if token >= 0] for row in each.tokens]
                for each in (blocks.q_blocks, blocks.kv_blocks)
            )
        )
        turns = rope.RopeTable(*(part.float() for part in (self.angles.cos(), self.angles.sin())))
        self.inputs = attention.LayerInputs(self.x_hat, turns)

    @property
    def tensors(self):
        """What every function of the transcription takes first."""
        return self.q, self.k, self.v

    def attend(self, adapter=None, sigma=None, **plan):
        inputs = self.inputs if adapter else attention.LayerInputs()
        call = Call(self.layout, inputs=inputs, sigma=sigma)
        plan = {"key_block": self.key_block} | plan
        out, cost = run_of(adapter, **plan).attend(self.q_hat, self.k_hat, self.v_hat, call)
        assert out.dtype == self.dtype
        return out[0].double(), cost

    def check(self, found, expected):
        assert relative_error(found, expected) < LIMITS[self.dtype]


@DTYPES
@ORDERS
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("sparsity", [0.3, 0.7])  # two blocks of three, and one
@KEY_BLOCKS
def test_top_k(dtype, order, pooled, sparsity, key_block):
    case = Case(dtype, order=order, key_block=key_block)
    found, _ = case.attend(method="top-k" if pooled else "top-k plain", sparsity=sparsity)
    case.check(found, golden.top_k(*case.tensors, case.angles, case.blocks, 1 - sparsity, pooled))


@DTYPES
@ORDERS
@pytest.mark.parametrize("rank", [0, 32])
@KEY_BLOCKS
def test_ropeslr_untrained_and_uncalibrated(dtype, order, rank, key_block):
    case = Case(dtype, order=order, key_block=key_block)
    found, _ = case.attend(method="ropeslr", sparsity=0.5, calibrate="off", rank=rank)
    case.check(
        found,
        golden.ropeslr(*case.tensors, case.x, case.angles, case.blocks, 0.5, GRID, {}, rank=rank),
    )


@DTYPES
@ORDERS
@KEY_BLOCKS
def test_ropeslr_calibrated(dtype, order, key_block):
    """Every token is a calibration row here, so that both know the same rows."""
    case = Case(dtype, order=order, key_block=key_block)
    tokens, width = case.q.shape[1:]
    start = {
        "gate_slope": torch.ones(HEADS),
        "gate_bias": torch.zeros(HEADS),
        "gate_logits": None,
        "branch": None,
        "channel_scale": torch.full((HEADS, width // 2), width**-0.5),
    }
    rows = list(range(tokens))
    values = golden.calibrate(*case.tensors, case.angles, case.blocks, 0.5, rows, start)
    assert values["channel_scale"].abs().max() < 4 * width**-0.5  # beyond that the method clamps
    found, cost = case.attend(method="ropeslr", sparsity=0.5, calibrate_rows=tokens)
    assert cost.calibration > 0
    case.check(found, corrected(case, values, values))


def corrected(case: Case, values: dict, weights: dict, **how) -> torch.Tensor:
    """What a calibration by all tokens gives; weights: the calibration's, and an adapter's own."""
    rest = case.x, case.angles, case.blocks, 0.5, GRID
    before = golden.ropeslr(*case.tensors, *rest, weights, **how)
    more = golden.correct(*case.tensors, case.angles, case.blocks, 0.5, values, before)
    assert more["query_map"].any() and more["kept_map"].any()
    return golden.ropeslr(*case.tensors, *rest, {**weights, **more}, **how)


@DTYPES
@pytest.mark.parametrize("width", [48, 128])
@pytest.mark.parametrize("act", ["softmax", "elu"])
@pytest.mark.parametrize("pe", ["none", "fourier", "table"])
@pytest.mark.parametrize("rank", [0, 8])
def test_ropeslr_trained(dtype, width, act, pe, rank):
    case = Case(dtype, width=width)
    adapter = ropeslr_adapter(1, HEADS, width, rank=24, act=act, pe=pe)
    found, _ = case.attend(adapter, sparsity=0.5, rank=rank)
    case.check(
        found,
        golden.ropeslr(
            *case.tensors,
            case.x,
            case.angles,
            case.blocks,
            0.5,
            GRID,
            single(adapter),
            act=act,
            pe=pe,
            pe_grid=adapter.info.pe_grid or None,
            rank=rank,
        ),
    )


@pytest.mark.parametrize("missing", SHAPES)
def test_ropeslr_without_one_of_its_tensors_uses_the_initial_value(missing):
    if missing in ("proj_q", "proj_k", "low_rank_scale", "pe_q", "pe_k"):
        missing = {"proj_q", "proj_k", "low_rank_scale", "pe_q", "pe_k"}
    adapter = ropeslr_adapter(1, HEADS, 128, rank=24, pe="none", without=missing)
    case = Case(torch.float32)
    found, _ = case.attend(adapter, sparsity=0.5)
    case.check(
        found,
        golden.ropeslr(*case.tensors, case.x, case.angles, case.blocks, 0.5, GRID, single(adapter)),
    )


@pytest.mark.parametrize("noise", [0.0, 0.25, 0.4, 0.95, 1.0])
def test_noise_bins_are_interpolated(noise):
    levels = (0.1, 0.4, 0.9)
    adapter = ropeslr_adapter(1, HEADS, 128, rank=24, pe="none", noise_levels=levels)
    case = Case(torch.float32)
    weights = dict(single(adapter))
    for name in ("channel_scale", "gate_slope", "gate_bias"):
        assert weights[name].shape[0] == 3
        weights[name] = golden.interpolate_noise(weights[name].double(), list(levels), noise)
    found, _ = case.attend(adapter, sigma=noise, sparsity=0.5)
    case.check(
        found, golden.ropeslr(*case.tensors, case.x, case.angles, case.blocks, 0.5, GRID, weights)
    )


@DTYPES
@pytest.mark.parametrize("pe", ["none", "fourier"])
def test_calibration_on_top_of_an_adapter(dtype, pe):
    case = Case(dtype)
    tokens = case.q.shape[1]
    adapter = ropeslr_adapter(1, HEADS, 128, rank=24, pe=pe)
    weights = single(adapter)
    term = (case.x.view(tokens, HEADS, 128) @ weights["gate_weight"].double()).T
    branch = golden.low_rank_branch(
        *case.tensors, case.angles, GRID, weights, "softmax", pe, None, 0
    )
    start = {
        name: weights[name].double() for name in ("gate_slope", "gate_bias", "channel_scale")
    } | {"gate_logits": term, "branch": branch}
    values = golden.calibrate(
        *case.tensors, case.angles, case.blocks, 0.5, list(range(tokens)), start
    )
    expected = corrected(case, values | {"gate_logits": term}, {**weights, **values}, pe=pe)
    found, cost = case.attend(adapter, sparsity=0.5, calibrate="refine", calibrate_rows=tokens)
    assert cost.calibration > 0
    case.check(found, expected)
    # It is not the adapter alone.
    assert relative_error(case.attend(adapter, sparsity=0.5)[0], expected) > 5e-3


@DTYPES
@pytest.mark.parametrize("width", [48, 128])
@pytest.mark.parametrize("rank", [64, 24])
@KEY_BLOCKS
def test_rola(dtype, width, rank, key_block):
    case = Case(dtype, width=width, order="raster", key_block=key_block)
    adapter = rola_adapter(1, HEADS, width, rank=rank)
    weights = single(adapter)
    found, _ = case.attend(adapter, sparsity=0.5)
    case.check(
        found,
        golden.rola(
            *case.tensors,
            case.x,
            case.angles,
            case.blocks,
            0.5,
            weights["proj_q"],
            weights["proj_k"],
            weights["gate_weight"],
            weights["gate_bias"].flatten(),
            dtype,
        ),
    )


@DTYPES
def test_rola_on_less_than_a_block_is_its_low_rank_alone(dtype):
    case = Case(dtype, order="raster", grid=(1, 6, 8))
    adapter = rola_adapter(1, HEADS, 128)
    weights = single(adapter)
    found, _ = case.attend(adapter, sparsity=0.5)
    case.check(
        found,
        golden.rola(
            *case.tensors,
            case.x,
            case.angles,
            case.blocks,
            0.5,
            weights["proj_q"],
            weights["proj_k"],
            weights["gate_weight"],
            weights["gate_bias"].flatten(),
            dtype,
        ),
    )


def test_rola_rounds_its_angles_as_the_training_did():
    """In half precision exact angles would be another function: half a radian off, far away."""
    case = Case(torch.bfloat16, order="raster", grid=(2, 3, 60), heads=1)
    adapter = rola_adapter(1, 1, 128, gate=3.0)
    weights = single(adapter)
    arguments = (
        *case.tensors,
        case.x,
        case.angles,
        case.blocks,
        0.5,
        weights["proj_q"],
        weights["proj_k"],
        weights["gate_weight"],
        weights["gate_bias"].flatten(),
    )
    rounded = golden.rola(*arguments, torch.bfloat16)
    found, _ = case.attend(adapter, sparsity=0.5)
    assert relative_error(found, rounded) < 1e-2
    exact = rope.rounded_angles(case.inputs.rope, case.grid, torch.float32)
    half = rope.rounded_angles(case.inputs.rope, case.grid, torch.bfloat16)
    torch.testing.assert_close(half, case.angles.to(torch.bfloat16).float(), rtol=0, atol=0)
    torch.testing.assert_close(exact.cos(), case.angles.cos().float(), rtol=0, atol=1e-5)
    assert (half - case.angles).abs().max() > 0.1


@DTYPES
@pytest.mark.parametrize("pe", ["none", "fourier", "table"])
def test_ropeslr_in_the_form_rms(dtype, pe):
    case = Case(dtype)
    adapter = ropeslr_adapter(1, HEADS, 128, rank=24, pe=pe, fusion="rms")
    found, _ = case.attend(adapter, sparsity=0.5)
    case.check(
        found,
        golden.ropeslr_rms(
            *case.tensors,
            case.x,
            case.angles,
            case.blocks,
            0.5,
            GRID,
            single(adapter),
            pe,
            adapter.info.pe_grid or None,
            dtype,
        ),
    )


@DTYPES
@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("grid, sparsity", [(GRID, 0.5), ((4, 13, 13), 0.8)])
@KEY_BLOCKS
def test_sla(dtype, variant, grid, sparsity, key_block):
    case = Case(dtype, order="raster", grid=grid, key_block=key_block)
    adapter = sla_adapter(1, HEADS, 128)
    weights = single(adapter)
    found, _ = case.attend(adapter, sparsity=sparsity, sla_variant=variant)
    case.check(
        found,
        golden.sla(
            *case.tensors,
            case.angles,
            case.blocks,
            1 - sparsity,
            weights["weight"],
            weights["bias"],
            variant,
        ),
    )


@DTYPES
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
@KEY_BLOCKS
def test_adaspa(dtype, sparsity, key_block):
    """The first call is dense and searches; the second one uses the masks."""
    case = Case(dtype, grid=(4, 9, 10), key_block=key_block)
    dense, lse = golden.dense(*case.tensors, case.angles)
    masks, _, _ = golden.adaspa_masks(
        golden.block_mass(case.q, case.k, case.angles, case.blocks, lse), sparsity
    )
    run = run_of(method="adaspa", sparsity=sparsity, key_block=case.key_block)
    given = (case.q_hat, case.k_hat, case.v_hat)
    first, cost = run.attend(*given, Call(case.layout, step=10, num_steps=50))
    case.check(first[0].double(), dense)
    assert cost.density == 1.0 and cost.recall is not None
    second, _ = run.attend(*given, Call(case.layout, step=11, num_steps=50))
    case.check(second[0].double(), golden.sparse(*case.tensors, case.angles, case.blocks, masks)[0])


# What the transcription does not have: batches, text, strides


KINDS = {
    "ropeslr": lambda: ropeslr_adapter(1, HEADS, 32),
    "ropeslr, table": lambda: ropeslr_adapter(1, HEADS, 32, pe="table"),
    "rms": lambda: ropeslr_adapter(1, HEADS, 32, fusion="rms"),
    "rola": lambda: rola_adapter(1, HEADS, 32, rank=16),
    "rola, lower rank": lambda: dataclasses.replace(
        rola_adapter(1, HEADS, 32, rank=16), use_rank=8
    ),
    "sla": lambda: sla_adapter(1, HEADS, 32),
}


def attend_with_text(adapter, case, before, after, x, **plan):
    """The case's video between `before` and `after` text tokens.

    Q, k, v as ComfyUI lays them out.
    """
    grow = torch.Generator().manual_seed(9)

    def around(video):
        text = torch.randn(video.shape[0], HEADS, before + after, 32, generator=grow)
        parts = (text[:, :, :before], video, text[:, :, before:])
        return torch.cat(parts, dim=2).transpose(1, 2).contiguous().transpose(1, 2)

    run = run_of(adapter, **({"sparsity": 0.5} | plan))
    layout = attention.TokenLayout(GRID, before, after, run.plan.block_order)
    inputs = case.inputs._replace(
        x=torch.cat((x[:, :before] * 0 + 7, x, x[:, :after] * 0 - 7), dim=1)
    )
    q, k, v = (around(video) for video in (case.q_hat, case.k_hat, case.v_hat))
    out, _ = run.attend(q, k, v, Call(layout, inputs=inputs))
    return out[:, :, before : before + case.layout.tokens], out, (q, k, v)


@pytest.mark.parametrize("kind", KINDS)
def test_text_before_and_text_after_the_video_are_the_same(kind):
    """The background, its positions and the gate belong to the video's tokens, wherever they are."""
    case = Case(torch.float32, width=32)
    adapter = KINDS[kind]()
    before, whole, tensors = attend_with_text(adapter, case, 70, 0, case.x_hat)
    after, other, _ = attend_with_text(adapter, case, 0, 70, case.x_hat)
    assert relative_error(before, after) < 1e-5
    dense = reference.dense_attention(*tensors)[0]
    assert relative_error(whole[:, :, :70], dense[:, :, :70]) < 1e-5
    plain, _, _ = attend_with_text(adapter, case, 0, 0, case.x_hat)
    assert relative_error(before, plain) > 1e-3  # the text is read


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_two_conditionings_gives_what_each_gives(kind):
    a, b = Case(torch.float32, width=32), Case(torch.float32, width=32, seed=1)
    adapter = KINDS[kind]()
    b.x_hat = layer_x(a.layout.tokens, HEADS * 32, torch.float32, seed=8)
    run = run_of(adapter, sparsity=0.5)
    layout = attention.TokenLayout(GRID, order=run.plan.block_order)
    both = [
        torch.cat(pair) for pair in ((a.q_hat, b.q_hat), (a.k_hat, b.k_hat), (a.v_hat, b.v_hat))
    ]
    inputs = a.inputs._replace(x=torch.cat((a.x_hat, b.x_hat)))
    together, _ = run.attend(*both, Call(layout, conditioning=(("a", 1), ("b", 1)), inputs=inputs))
    for i, case in enumerate((a, b)):
        alone = run_of(adapter, sparsity=0.5)
        own = case.inputs._replace(x=case.x_hat)
        if kind == "rola, lower rank":  # features are chosen once per layer, on the first call
            alone.method._kept = run.method._kept
        found, _ = alone.attend(case.q_hat, case.k_hat, case.v_hat, Call(layout, inputs=own))
        assert relative_error(together[i : i + 1], found) < 1e-5
    assert relative_error(together[:1], together[1:]) > 0.1


def test_refining_begins_again_from_the_adapter_at_the_present_noise():
    """Every five steps; between them, and for every noise, the values follow what was asked for."""
    case = Case(torch.float32)
    adapter = ropeslr_adapter(1, HEADS, 128, pe="none", noise_levels=(0.1, 0.9))
    run = run_of(adapter, sparsity=0.5, calibrate="refine")
    given = (case.q_hat, case.k_hat, case.v_hat)

    def call(step):
        return Call(case.layout, step=step, inputs=case.inputs, sigma=1 - step / 12)

    made = []
    for step in range(12):
        _, cost = run.attend(*given, call(step))
        made += [step] if cost.calibration else []
    assert made == [0, 5, 10]
    fresh, _ = run_of(adapter, sparsity=0.5, calibrate="refine").attend(*given, call(10))
    again = run_of(adapter, sparsity=0.5, calibrate="refine")
    again.attend(*given, call(0))
    found, _ = again.attend(*given, call(10))
    assert torch.equal(found, fresh)
