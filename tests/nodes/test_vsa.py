"""Checkpoints that were trained with VSA: with their gate, as newer ComfyUI loads it, and without."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import comfy_host
from support.data.fields import relative_error
from support.data.variants import VARIANTS
from support.host.sampling import report, sparse
from support.oracle.transcription import vsa


@pytest.fixture
def gated(monkeypatch):
    """MiniMax H3 as newer ComfyUI has it with such a checkpoint: a gate, and its layout told."""
    variant = VARIANTS["MiniMax H3"]
    if variant.missing():
        pytest.skip(variant.missing())
    import comfy.ldm.minimax.model as h3

    model = variant.model()
    for number, block in enumerate(model.model.diffusion_model.blocks):
        width, inner = block.attn.out_proj.weight.shape
        gate = torch.nn.Linear(width, inner, bias=False)
        torch.nn.init.normal_(
            gate.weight, std=0.5 / width**0.5, generator=torch.Generator().manual_seed(number)
        )
        monkeypatch.setattr(block.attn, "to_gate_compress", gate, raising=False)
    entered, layouts, made = [], [], h3.PackedLayout.__init__

    def noted(self, *args, **kwargs):
        made(self, *args, **kwargs)
        layouts.append(self)

    monkeypatch.setattr(h3.PackedLayout, "__init__", noted)
    forward = h3.Attention.forward

    def told(self, x, rope_freqs=None, transformer_options=None):
        if not layouts:  # the text's own layers, before there is any
            return forward(self, x, rope_freqs)
        transformer_options["minimax_h3_layout"] = layouts[-1]
        entered.append((x, getattr(self, "to_gate_compress", None)))
        return forward(self, x, rope_freqs, transformer_options)

    monkeypatch.setattr(h3.Attention, "forward", told)
    return variant, model, entered


def test_a_checkpoint_trained_with_vsa_runs_as_it_was_trained(gated, monkeypatch):
    """Chosen by itself; short videos and sparsity 0 too; every row against the transcription."""
    variant, model, entered = gated
    run_class, compared = comfy_host.module(".attention").AttentionRun, []
    attend = run_class.attend

    def watched(self, q, k, v, call):
        out, cost = attend(self, q, k, v, call)
        layout, inputs = call.layout, call.inputs
        x, own = entered[-1]
        assert inputs.gate is own and torch.equal(inputs.x[0], x)
        assert len(layout.segments) > 1 and sum(layout.segments) == layout.before
        gate = inputs.gate(inputs.x)[0].unflatten(-1, (q.shape[1], -1)).transpose(0, 1)
        expected = vsa(
            q[0], k[0], v[0], gate, list(layout.segments), layout.grid, self.plan.sparsity
        )
        compared.append(relative_error(out[0], expected))
        return out, cost

    monkeypatch.setattr(run_class, "attend", watched)
    for sparsity in (0.6, 0.0):
        patched = sparse(model, sparsity=sparsity, min_tokens=100_000)
        compared.clear()
        variant.sample(patched, variant.even, 1.0)
        assert report(patched).method == "vsa" and report(patched).sparse_calls == 4
        assert not report(patched).dense_calls and len(compared) == 4 and max(compared) < 1e-5


def test_other_methods_say_that_they_leave_the_gate_out(gated, caplog):
    variant, model, entered = gated
    patched = sparse(model, method="top-k")
    assert "leaves out its gated branch" in caplog.text
    variant.sample(patched, variant.even, 1.0)
    assert report(patched).method == "top-k"


def test_vsa_on_a_model_without_a_gate_says_so(caplog):
    variant = VARIANTS["Wan 2.1 T2V"]
    model = variant.model()
    patched = sparse(model, method="vsa", sparsity=0.6)
    assert "no gate of VSA" in caplog.text
    variant.sample(patched, variant.even, 1.0)
    assert report(patched).sparse_calls == 4
    with pytest.raises(RuntimeError, match="no gate of VSA"):
        sparse(model, method="vsa", strict=True)


@pytest.mark.parametrize("gates", [True, False])
def test_a_gate_that_the_host_did_not_load_is_told(gates, tmp_path, caplog):
    """An older ComfyUI drops it in silence, and the video is noise."""
    if VARIANTS["MiniMax H3"].missing():
        pytest.skip(VARIANTS["MiniMax H3"].missing())
    import comfy.sd

    VARIANTS["MiniMax H3"].model()  # makes the file
    file = (
        Path(os.environ["ROPESLR_TEST_BASE"])
        / "models/diffusion_models/tiny_minimax_h3.safetensors"
    )
    weights = load_file(file)
    if gates:
        weights["blocks.0.attn.to_gate_compress.weight"] = torch.zeros(4, 4)
    save_file(weights, tmp_path / "fasth3.safetensors")
    model = comfy.sd.load_diffusion_model(str(tmp_path / "fasth3.safetensors"))
    sparse(model)
    told = "'fasth3.safetensors' was trained with VSA, and this ComfyUI does not load its gate"
    assert (told in caplog.text) == gates
