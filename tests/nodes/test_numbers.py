"""The numbers guard: a sparse output that is not finite never reaches the picture, and is said."""

import pytest
import torch

import comfy_host
from support.host.sampling import conditioning, k_sample, load_model, report, sample, sparse

AGAIN = comfy_host.module(".nodes.patching.dense_reason").NOT_FINITE


@pytest.fixture
def spoiled(monkeypatch):
    """spoil(value, *calls): put a value into one element of the sparse output of these calls."""
    run_class = comfy_host.module(".attention").AttentionRun
    attend, count = run_class.attend, []

    def spoil(value, *calls):
        def broken(self, *args, **kwargs):
            out, cost = attend(self, *args, **kwargs)
            count.append(1)
            if len(count) in calls:
                out[0, -1, -1, -1] = value
            return out, cost

        count.clear()
        monkeypatch.setattr(run_class, "attend", broken)
        return count

    return spoil


def warnings(caplog):
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("call", [5, 6])
def test_a_call_that_is_not_finite_is_computed_again_dense(spoiled, value, call, caplog):
    """In the last step, at either layer: the result is that of a dense last step, to the bit."""
    model = load_model("tiny_wan21_t2v")
    expected = sample(sparse(model, method="top-k", dense_last_steps=1))
    spoiled(value, call)
    patched = sparse(model, method="top-k")
    assert torch.equal(sample(patched), expected)
    last = report(patched)
    # Of the six calls that the model makes.
    assert last.dense_calls == {AGAIN: 2} and last.sparse_calls == 4
    fair = sparse(model, method="top-k", dense_last_steps=1)
    sample(fair)
    assert last.dense_tflop == report(fair).dense_tflop and last.spent_parts["recomputed"] > 0
    assert last.spent_tflop == pytest.approx(
        report(fair).spent_tflop + last.spent_parts["recomputed"]
    )
    assert len(warnings(caplog)) == 1 and "not finite (NaN or infinite)" in warnings(caplog)[0]


def test_what_was_learned_from_spoiled_numbers_is_forgotten(spoiled):
    """A calibration on NaN would blacken every later step."""
    model = load_model("tiny_wan21_t2v")
    calls = spoiled(float("nan"), 1)  # layer 1 calibrates on what layer 0 gave
    patched = sparse(model, method="ropeslr")
    assert torch.isfinite(sample(patched)).all()
    last = report(patched)
    assert len(calls) == 6 and last.dense_calls == {AGAIN: 2} and last.sparse_calls == 4
    assert last.calibrations == 4  # both layers, in each step that followed
    assert "recomputed" in last.summary()


def test_strict_ends_the_run_instead(spoiled):
    spoiled(float("nan"), 1)
    with pytest.raises(RuntimeError, match="strict.*not finite"):
        sample(sparse(load_model("tiny_wan21_t2v"), strict=True))


def test_a_model_that_is_not_finite_by_itself_is_not_computed_twice_for_ever(caplog):
    model = load_model("tiny_wan21_t2v")
    weight = model.model.diffusion_model.blocks[0].ffn[0].weight
    with torch.inference_mode():
        weight[0, 0] = float("nan")
    patched = sparse(model)
    sample(patched, steps=4)
    assert report(patched).dense_calls == {AGAIN: 2} and report(patched).sparse_calls == 6
    assert [line for line in warnings(caplog) if "with dense attention too" in line]


def test_the_guard_waits_for_the_device_once_in_a_model_call(monkeypatch):
    """Per layer it would keep the host from running ahead of the device."""
    from torch.utils._python_dispatch import TorchDispatchMode

    waits = []
    aten = torch.ops.aten  # in inference mode a question arrives whole
    waiting = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.item.default}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            waits.append(function in waiting)
            return function(*args, **(kwargs or {}))

    call = comfy_host.module(".nodes.patching.call").ModelCall
    note, finite = call.note_output, call.finite

    def watched(what):
        def method(self, *args):
            with Watch():
                return what(self, *args)

        return method

    noted, asked = [], []
    monkeypatch.setattr(
        call, "note_output", lambda self, out: noted.append(1) or watched(note)(self, out)
    )
    patched = sparse(load_model("tiny_wan21_t2v"))
    sample(patched)
    assert len(noted) == 6 and waits and not any(waits)
    monkeypatch.setattr(
        call, "finite", lambda self, device: asked.append(1) or watched(finite)(self, device)
    )
    waits.clear()
    sample(patched)
    assert len(asked) == sum(waits) == report(patched).model_calls == 3


def test_it_is_said_in_every_run(spoiled, caplog):
    """The next run of the same graph may be as bad; silence would pass for health."""
    patched = sparse(load_model("tiny_wan21_t2v"))
    for _ in range(2):
        spoiled(float("nan"), 1)
        caplog.clear()
        sample(patched)
        assert sum("recomputing" in line for line in warnings(caplog)) == 1


def test_one_conditioning_that_is_not_finite_by_itself_leaves_the_others_guarded(spoiled):
    """A prompt whose own features overflow; the other, in a call of its own, is still checked."""
    model = load_model("tiny_wan21_t2v")
    patched = sparse(model, method="top-k")
    bad = conditioning(1)
    bad[0][0][0, 0, 0] = float("nan")
    spoiled(float("inf"), 7)

    k_sample(patched, bad, conditioning(2, 24), torch.zeros(1, 16, 9, 16, 16), cfg=5.0)
    assert report(patched).dense_calls[AGAIN] >= 2 and report(patched).completed
