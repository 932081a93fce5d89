"""Every method through real Wan models; released checkpoints against their training form."""

import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import comfy_host
from support.data import checkpoints
from support.data.fields import relative_error
from support.host.sampling import (
    SLOT,
    WAN,
    conditioning,
    k_sample,
    load_model,
    own_adapter,
    report,
    sample,
    sparse,
    two_experts,
)
from support.oracle import transcription as golden

TRAINED = ("ropeslr", "rola", "sla")
METHODS = comfy_host.module(".attention.plan").METHODS[1:]
LATENT = (5, 16, 16)  # 320 tokens, 5 blocks
MODELS = Path(os.environ["ROPESLR_TEST_BASE"]) / "models"


@pytest.mark.parametrize("variant", WAN)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cfg", [1.0, pytest.param(5.0, marks=pytest.mark.slow)])
def test_every_method_runs_on_every_model(variant, method, cfg):
    file, channels, image = WAN[variant]
    model, arguments = load_model(file), dict(channels=channels, image=image, cfg=cfg)
    dense = sample(model, **arguments)
    adapter = own_adapter(method) if method in TRAINED else None
    results = {}
    for given in {None: None, "trained": adapter}.values() if adapter else (None,):
        patched = sparse(model, method=method, sparsity=0.6, adapter=given)
        found = sample(patched, **arguments)
        last = report(patched)
        assert torch.isfinite(found).all() and 1e-3 < relative_error(found, dense) < 0.5
        assert (
            last.method == method
            and last.sparse_calls == 2 * last.model_calls
            and not last.dense_calls
        )
        assert last.adapter == (given.name if given else "")
        results[last.adapter] = found
    if adapter:
        assert not torch.equal(*results.values())


@pytest.mark.parametrize("method", METHODS)
def test_two_experts_each_have_their_own_weights_and_memory(method):
    adapters = [own_adapter(method, seed=seed) if method in TRAINED else None for seed in (1, 2)]
    settings = [dict(method=method, sparsity=0.6, adapter=adapter) for adapter in adapters]
    high, low = two_experts(3, high=settings[0], low=settings[1])
    for last in (high, low):
        assert last.sparse_calls == 6 and not last.dense_calls
    if method == "adaspa":  # six steps: each expert searches for itself, at its first step
        assert high.calibrations == 2 and low.calibrations == 2 and high.recall != low.recall


# Released checkpoints


FAMILIES = {
    "SparkWan 2.1 T2V": ("sparkwan", dict(), "SparkWan 2.1, 3 steps", "euler"),
    "SparkWan 2.1 I2V": (
        "sparkwan",
        dict(channels=36, image=True),
        "SparkWan 2.1, 2 steps",
        "euler",
    ),
    "TurboWan 2.1 T2V": ("turbowan", dict(), "TurboWan 2.1 T2V, 3 steps", "euler"),
    "TurboWan 2.2 I2V": (
        "turbowan",
        dict(channels=36),
        "TurboWan 2.2 I2V low noise, of 4 steps",
        "euler",
    ),
}


def write_lora(name):
    """A LoRA of two layers, in the form that training tools write."""
    generator = torch.Generator().manual_seed(11)
    tensors = {}
    for layer in ("blocks.0.self_attn.q", "blocks.1.self_attn.v", "blocks.1.ffn.0"):
        out = 512 if "ffn" in layer else 256
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = (
            torch.randn(4, 256, generator=generator) * 0.1
        )
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = (
            torch.randn(out, 4, generator=generator) * 0.1
        )
    path = MODELS / "loras" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return name


def with_lora(model):
    name = write_lora("tiny_lora.safetensors")
    return comfy_host.run_node(
        "LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0
    )[0]


def few_steps(model, preset, sampler, image=False):
    """Sample as the checkpoints want it: their levels, CFG 1."""
    (sigmas,) = comfy_host.run_node("RoPeSLRFewStepSigmas", preset=preset)
    (chosen,) = comfy_host.run_node("KSamplerSelect", sampler_name=sampler)
    extra = {}
    if image:
        extra = {
            "concat_latent_image": torch.randn(
                1, 16, *LATENT, generator=torch.Generator().manual_seed(7)
            ),
            "concat_mask": torch.ones(1, 1, *LATENT),
        }
    texts = [
        [[torch.randn(1, 20, 4096, generator=torch.Generator().manual_seed(seed)), extra]]
        for seed in (1, 2)
    ]
    out = comfy_host.run_node(
        "SamplerCustom",
        model=model,
        add_noise=True,
        noise_seed=3,
        cfg=1.0,
        positive=texts[0],
        negative=texts[1],
        sampler=chosen,
        sigmas=sigmas,
        latent_image={"samples": torch.zeros(1, 16, *LATENT)},
    )
    return out[0]["samples"]


class Transcribed:
    """A stock model whose self-attention is the transcription, by ComfyUI's override and hooks."""

    def __init__(self, model, weights, family, keep):
        self.model = model.clone()
        self.model.model_options["transformer_options"][SLOT] = self.attend
        self.weights, self.family, self.keep = weights, family, keep
        self.entering, self.calls = None, 0
        self.hooks = [
            block.self_attn.register_forward_pre_hook(self.enter)
            for block in model.model.diffusion_model.blocks
        ]

    def enter(self, module, args):
        self.entering = args[0]

    def attend(self, func, q, k, v, heads, **kwargs):
        if self.entering is None:
            return func(q, k, v, heads, **kwargs)
        x, self.entering = self.entering[0].double(), None
        self.calls += 1
        options = kwargs["transformer_options"]
        angles = golden.wan_angles(tuple(options["grid_sizes"]), 128)
        q, k, v = (
            each[0].double().unflatten(-1, (heads, 128)).transpose(0, 1) for each in (q, k, v)
        )
        q, k = (golden.rotate(each, -angles) for each in (q, k))
        cut = [list(range(i, min(i + 64, q.shape[1]))) for i in range(0, q.shape[1], 64)]
        blocks = golden.Blocks(cut, cut)
        own = {
            name.split("self_attn.")[1]: tensor
            for name, tensor in self.weights.items()
            if name.startswith(f"blocks.{options['block_index']}.self_attn.")
        }
        if self.family == "sparkwan":
            out = golden.rola(
                q,
                k,
                v,
                x,
                angles,
                blocks,
                self.keep,
                own["proj_q.weight"],
                own["proj_k.weight"],
                own["gate_proj.weight"],
                own["gate_bias"].flatten(),
                torch.float32,
            )
        else:
            projection = (
                own["attn_op.local_attn.proj_l.weight"],
                own["attn_op.local_attn.proj_l.bias"],
            )
            out = golden.sla(q, k, v, angles, blocks, self.keep, *projection, "released")
        return out.transpose(0, 1).flatten(1)[None].float()

    def close(self):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ending", [".pth", pytest.param(".safetensors", marks=pytest.mark.slow)])
def test_a_released_checkpoint_samples_as_its_transcription_does(family, ending):
    """From the file through all nodes, with a LoRA, against weights that this test prepared."""
    kind, shape, preset, sampler = FAMILIES[family]
    weights = getattr(checkpoints, kind)(**shape)
    name = f"made_{kind}_{'_'.join(shape) or 'plain'}{ending}"
    checkpoints.save(weights, MODELS / "diffusion_models" / name, "net.")
    model, adapter = comfy_host.run_node("RoPeSLRLoadSparseCheckpoint", checkpoint=name)
    patched = sparse(with_lora(model), adapter=adapter, sparsity=0.6, dense_first_steps=-1)
    image = "channels" in shape
    found = few_steps(patched, preset, sampler, image)
    last = report(patched)
    assert last.adapter == name and not last.dense_calls and last.block_order == "raster"

    stock = {
        key: tensor for key, tensor in weights.items() if "proj_" not in key or "img_emb" in key
    }
    patch = stock["patch_embedding.weight"]
    stock["patch_embedding.weight"] = patch.view(patch.shape[0], patch.shape[1] // 4, 1, 2, 2)
    stock_name = f"made_stock_{kind}_{len(shape)}.safetensors"
    checkpoints.save(stock, MODELS / "diffusion_models" / stock_name)
    (plain,) = comfy_host.run_node("UNETLoader", unet_name=stock_name, weight_dtype="default")
    other = Transcribed(with_lora(plain), weights, kind, 0.4)
    expected = few_steps(other.model, preset, sampler, image)
    other.close()
    assert other.calls == last.sparse_calls > 0
    assert relative_error(found, expected) < 2e-5
    without = few_steps(sparse(model, adapter=adapter, sparsity=0.6), preset, sampler, image)
    assert relative_error(without, expected) > 1e-2  # the LoRA plays its part
    dense = few_steps(with_lora(plain), preset, sampler, image)
    assert relative_error(dense, expected) > 1e-2  # and so does the sparse attention


def test_an_expert_pair_runs_over_both_halves_of_its_levels():
    """SparkWan 2.2: two files, two adapters, one schedule handed from one sampler to the next."""
    latent = {"samples": torch.zeros(1, 16, *LATENT)}
    texts = [
        [[torch.randn(1, 20, 4096, generator=torch.Generator().manual_seed(seed)), {}]]
        for seed in (1, 2)
    ]
    (euler,) = comfy_host.run_node("KSamplerSelect", sampler_name="euler")
    reports = []
    for first, preset in (
        (True, "SparkWan 2.2 high noise, 2 steps"),
        (False, "SparkWan 2.2 low noise, 3 steps"),
    ):
        name = f"SparkWan2.2-T2V-{'High' if first else 'Low'}-0.95Sparsity.pth"
        checkpoints.save(
            checkpoints.sparkwan(seed=int(first)), MODELS / "diffusion_models" / name, "net_ema."
        )
        model, adapter = comfy_host.run_node("RoPeSLRLoadSparseCheckpoint", checkpoint=name)
        assert adapter.info.sparsity == 0.95
        patched = sparse(model, adapter=adapter, dense_first_steps=-1)
        (sigmas,) = comfy_host.run_node("RoPeSLRFewStepSigmas", preset=preset)
        latent, _ = comfy_host.run_node(
            "SamplerCustom",
            model=patched,
            add_noise=first,
            noise_seed=3,
            cfg=1.0,
            positive=texts[0],
            negative=texts[1],
            sampler=euler,
            sigmas=sigmas,
            latent_image=latent,
        )
        reports.append(report(patched))
    assert torch.isfinite(latent["samples"]).all()
    assert [last.sparse_calls for last in reports] == [4, 6] and not any(
        last.dense_calls for last in reports
    )


def test_the_levels_of_the_presets():
    """The released levels.

    The inner ones are sin t / (sin t + cos t) of the families' 1.5, 1.4, 1.0.
    """
    presets = comfy_host.module(".nodes.sigmas").PRESETS
    assert presets["SparkWan 2.1, 4 steps"] == (1600 / 1601, 0.933781, 0.852895, 0.608979, 0.0)
    assert presets["SparkWan 2.1, 1 step"] == (1600 / 1601, 0.0)
    assert (
        len(presets["SparkWan 2.1, 8 steps"]) == 9
        and presets["SparkWan 2.1, 8 steps"][-2] == 0.297157
    )
    assert presets["SparkWan 2.2 low noise, 4 steps"] == (0.875, 0.720057, 0.507301, 0.297157, 0.0)
    for level, t in zip(presets["TurboWan 2.1 T2V, 4 steps"], (math.atan(80), 1.5, 1.4, 1.0)):
        assert level == pytest.approx(math.sin(t) / (math.sin(t) + math.cos(t)), abs=1e-6)
    for name, levels in presets.items():
        (found,) = comfy_host.run_node("RoPeSLRFewStepSigmas", preset=name)
        assert found.dtype == torch.float32 and found.tolist() == pytest.approx(levels)
        assert all(a > b for a, b in zip(levels, levels[1:])), name
        assert name.endswith("steps") or name.endswith("1 step")
    for family in ("SparkWan 2.2", "TurboWan 2.2 I2V"):
        high = {levels[-1] for name, levels in presets.items() if name.startswith(f"{family} high")}
        low = {levels[0] for name, levels in presets.items() if name.startswith(f"{family} low")}
        assert high == low and len(high) == 1


# AdaSpa on a model


def queries_and_keys(model, first, latent):
    """q, k of all self-attention at steps first and first + 1 of 50, dense: [{layer: (q, k)}]."""
    seen = []

    def watch(func, q, k, v, heads, **kwargs):
        options = kwargs["transformer_options"]
        if q.shape == k.shape:
            if options["block_index"] == 0:
                seen.append({})
            seen[-1][options["block_index"]] = [
                x.unflatten(-1, (heads, -1)).transpose(1, 2).clone() for x in (q, k)
            ]
        return func(q, k, v, heads, **kwargs)

    model = model.clone()
    model.model_options["transformer_options"][SLOT] = watch
    comfy_host.run_node(
        "KSamplerAdvanced",
        model=model,
        add_noise="enable",
        noise_seed=1,
        steps=50,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        positive=conditioning(1),
        negative=conditioning(2),
        start_at_step=first,
        end_at_step=first + 2,
        return_with_leftover_noise="enable",
        latent_image={"samples": torch.zeros(1, 16, *latent)},
    )
    return seen


@pytest.mark.slow
def test_masks_searched_without_a_dense_pass_are_nearly_those_of_a_fresh_search():
    """On consecutive steps; nearer to them than with the old LSE itself, as the paper has it."""
    ops = comfy_host.module(".kernels.ops")
    adaspa, attention = (
        comfy_host.module(".attention.methods.adaspa"),
        comfy_host.module(".attention"),
    )
    latent, grid = (9, 32, 32), (9, 16, 16)  # 2,304 tokens, 36 blocks
    layout = attention.TokenLayout(grid)
    blocks, overlaps, with_old = layout.blocks(), [], []

    def kept(bits):
        return ((bits[..., None] >> torch.arange(32, dtype=torch.int32)) & 1).bool()

    def fresh(q, k, lse, topks):
        return ops.block_mass(q, k, lse, blocks, topks)[0]

    def call(step):
        return attention.AttentionCall(layout, step=step, num_steps=50)

    for file in ("tiny_wan21_t2v", "tiny_wan22_t2v_low_noise"):
        for first in (10, 29):
            before, after = queries_and_keys(load_model(file), first, latent)
            for layer, (q, k) in after.items():
                plan = attention.SparsePlan(method="adaspa", sparsity=0.8).resolve()
                run = attention.AttentionRun(plan)
                run.attend(*before[layer], k, call(10))
                run.attend(q, k, k, call(30))
                (found,) = run.method.memory.values()
                assert found.step == 30
                topk = plan.topk(36)
                counts = kept(found.bits).flatten(-2).sum(-1)
                assert (counts == topk).all()  # soft heads: all at the same sparsity
                exact = kept(fresh(q, k, ops.dense_attention(q, k, k)[1], [topk])[:, :, 0])
                old = kept(fresh(q, k, ops.dense_attention(*before[layer], k)[1], [topk])[:, :, 0])
                overlaps.append(((kept(found.bits) & exact).sum() / exact.sum()).item())
                with_old.append(((old & exact).sum() / exact.sum()).item())
    assert len(overlaps) == 8 and adaspa.search_steps(50) == (10, 30)
    assert sum(overlaps) / 8 >= 0.95 and min(overlaps) > 0.93, overlaps
    assert sum(overlaps) > sum(with_old)


def test_two_conditionings_have_their_own_masks(monkeypatch):
    run_class, runs = comfy_host.module(".attention").AttentionRun, []
    begin = run_class.__init__
    monkeypatch.setattr(
        run_class, "__init__", lambda self, *args: runs.append(self) or begin(self, *args)
    )
    for text_tokens in (20, 77):  # of equal length they come in one batch
        patched = sparse(load_model("tiny_wan21_t2v"), method="adaspa", sparsity=0.6)
        k_sample(
            patched,
            conditioning(1, 20),
            conditioning(2, text_tokens),
            torch.zeros(1, 16, *LATENT),
            steps=3,
            cfg=5.0,
        )
        memory = runs[-1].method.memory
        keys = {key for _, key, _, _ in memory}
        assert len(keys) == 2 and len(memory) == 4  # 2 layers, 2 conditionings
        masks = [[found.bits for (_, at, *_), found in memory.items() if at == key] for key in keys]
        assert any(not torch.equal(one, other) for one, other in zip(*masks))


def test_adaspa_is_dense_until_its_first_search_and_says_so():
    patched = sparse(
        load_model("tiny_wan21_t2v"), method="adaspa", sparsity=0.6, dense_first_steps=-1
    )
    sample(patched, steps=10)
    last = report(patched)
    assert last.dense_calls == {"before AdaSpa's first search": 4} and last.sparse_calls == 16
    assert last.calibrations == 4 and 0 < last.recall < 1  # at steps 2 and 6, in two layers
    assert "4 searched, recall 0." in last.summary()
    few = sparse(load_model("tiny_wan21_t2v"), method="adaspa", sparsity=0.6, dense_first_steps=-1)
    sample(few, steps=4)
    assert not report(few).dense_calls and report(few).calibrations == 2
