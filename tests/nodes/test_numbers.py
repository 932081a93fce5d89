"""The numbers guard: a sparse output that is not finite never reaches the picture, and is said."""

import comfy_host
import pytest
import torch
from sampling import load_model, report, sample, sparse

AGAIN = "computed again, since the sparse output was not finite"


@pytest.fixture
def spoiled(monkeypatch):
    """spoil(value, *calls): put a value into one element of the sparse output of these calls of the next run."""
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
    """In the last step, at either layer: the result is that of a last step left dense, to the bit."""
    model = load_model("tiny_wan21_t2v")
    expected = sample(sparse(model, method="top-k", dense_last_steps=1))
    spoiled(value, call)
    patched = sparse(model, method="top-k")
    assert torch.equal(sample(patched), expected)
    assert report(patched).dense_calls == {AGAIN: 2} and report(patched).sparse_calls == 6
    assert len(warnings(caplog)) == 1 and "not finite (NaN or infinite)" in warnings(caplog)[0]


def test_what_was_learned_from_spoiled_numbers_is_forgotten(spoiled):
    """A calibration on NaN would blacken every later step."""
    model = load_model("tiny_wan21_t2v")
    calls = spoiled(float("nan"), 1)                                          # layer 1 calibrates on what layer 0 gave
    patched = sparse(model, method="ropeslr")
    assert torch.isfinite(sample(patched)).all()
    told = report(patched)
    assert len(calls) == 6 and told.dense_calls == {AGAIN: 2} and told.sparse_calls == 6
    assert told.calibrations == 4                                             # both layers, and both again
    assert "computed again" in told.summary()


def test_strict_ends_the_run_instead(spoiled):
    spoiled(float("nan"), 1)
    with pytest.raises(RuntimeError, match="strict.*not finite"):
        sample(sparse(load_model("tiny_wan21_t2v"), strict=True))


def test_a_model_that_is_not_finite_by_itself_is_not_computed_twice_for_ever(caplog):
    model = load_model("tiny_wan21_t2v")
    weight = model.model.diffusion_model.blocks[0].ffn[0].weight
    with torch.no_grad():
        weight[0, 0] = float("nan")
    patched = sparse(model)
    sample(patched, steps=4)
    assert report(patched).dense_calls == {AGAIN: 2} and report(patched).sparse_calls == 8
    assert [line for line in warnings(caplog) if "with dense attention too" in line]


def test_the_guard_waits_for_the_device_once_in_a_model_call(monkeypatch):
    """Per layer it would keep the host from running ahead of the device."""
    call = comfy_host.module(".nodes.patching.model_call").ModelCall
    looked, finite = [], call.finite
    monkeypatch.setattr(call, "finite", lambda self: looked.append(1) or finite(self))
    patched = sparse(load_model("tiny_wan21_t2v"))
    sample(patched)
    assert len(looked) == report(patched).model_calls == 3
