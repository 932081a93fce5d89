"""Any settings of the node: refused before sampling, or a finished run; no error half way."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import comfy_host
from support.data.variants import VARIANTS
from support.host.sampling import load_model, own_adapter, report, sample, sparse

LAYERS = st.one_of(
    st.just(""),
    st.sampled_from(
        ["0", "1", "0-1", "0, 1, 38-39", "7", " 0 ,", "0-", "-1", "a", "3-1", "0,0,0-0"]
    ),
    st.text("0123456789,- ", max_size=8),
)


def widgets():
    """Every input of the node, drawn from the range in its own schema; small numbers more often."""
    comfy_host.pack()
    drawn, inputs = (
        {},
        comfy_host.boot().NODE_CLASS_MAPPINGS["RoPeSLRSparseAttention"].GET_SCHEMA().inputs,
    )
    for each in inputs:
        kind = each.io_type
        if kind == "COMBO":
            drawn[each.id] = st.sampled_from(each.options)
        elif kind == "BOOLEAN":
            drawn[each.id] = st.booleans()
        elif kind == "INT":
            ends = st.sampled_from([each.min, each.default, each.max])
            drawn[each.id] = st.one_of(
                ends, st.integers(each.min, min(each.max, 8)), st.integers(each.min, each.max)
            )
        elif kind == "FLOAT":
            ends = st.sampled_from([each.min, each.default, each.max])
            drawn[each.id] = st.one_of(ends, st.floats(each.min, each.max))
    assert {each.id for each in inputs} - set(drawn) == {"model", "adapter", "dense_layers"}
    drawn["dense_layers"] = LAYERS
    drawn["adapter"] = st.sampled_from(["ropeslr", "rola", "sla"])
    # What ends a run early or leaves it dense is drawn in one case of six each, or little else
    # would be tried.
    for name, usual in (
        ("min_tokens", 0),
        ("dense_first_steps", 0),
        ("dense_last_steps", 0),
        ("start_percent", 0.0),
        ("end_percent", 1.0),
        ("backend", "auto"),
        ("strict", False),
        ("dense_layers", ""),
        ("adapter", None),
        ("sparsity", 0.7),
    ):
        drawn[name] = _seldom(drawn[name], usual)
    return st.fixed_dictionaries(drawn)


def _seldom(strategy, usual):
    return st.integers(0, 5).flatmap(lambda die: strategy if die == 0 else st.just(usual))


RUNS = st.fixed_dictionaries(
    {
        "latent": st.sampled_from([(3, 16, 16), (5, 15, 18), (9, 16, 16), (1, 2, 2), (5, 9, 11)]),
        "batch": st.sampled_from([1, 1, 2]),
        "cfg": st.sampled_from([1.0, 5.0]),
        "steps": st.integers(1, 3),
        "sampler": st.sampled_from(["euler", "lcm", "uni_pc", "heun"]),
        "text_tokens": st.sampled_from([1, 20, 192]),
    }
)


def check(model, layers, heads, chosen, run):
    node = comfy_host.boot().NODE_CLASS_MAPPINGS["RoPeSLRSparseAttention"]
    if chosen["adapter"]:
        chosen = chosen | {"adapter": own_adapter(chosen["adapter"], layers, heads)}
    answer = node.validate_inputs(dense_layers=chosen["dense_layers"])
    if answer is not True:  # refused before the queue, in words
        assert isinstance(answer, str) and answer.endswith((".", '"'))
        with pytest.raises(ValueError):
            sparse(model, **chosen)
        return
    try:
        patched = sparse(model, **chosen)
    except (ValueError, RuntimeError) as error:  # refused by the node, before sampling
        if chosen["backend"] == "triton" and "cannot be used" in str(error):
            return
        assert "but the adapter was trained for" in str(error) or (
            chosen["strict"]
            and any(why in str(error) for why in ("has no adapter", "no gate of VSA"))
        )
        return
    try:
        out = run(patched)
    except RuntimeError as error:  # only what was asked for: strict
        assert chosen["strict"] and "RoPeSLR (strict)" in str(error), repr(error)
        return
    assert torch.isfinite(out).all()
    last = report(patched)
    assert last.completed and last.sparse_calls + sum(last.dense_calls.values()) > 0
    assert 0 <= last.density <= 1 and last.summary()
    return last.sparse_calls


@pytest.mark.slow
def test_500_settings_of_the_node(caplog):
    model, ran_sparse = load_model("tiny_wan_smallest"), []

    @settings(
        max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(widgets(), RUNS)
    def fuzz(chosen, arguments):
        caplog.clear()
        ran_sparse.append(
            bool(check(model, 1, 1, chosen, lambda patched: sample(patched, **arguments)))
        )
        assert not [record for record in caplog.records if record.exc_text], (
            "the sparse path failed and fell back"
        )

    fuzz()
    assert len(ran_sparse) >= 500 and sum(ran_sparse) > 150


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "Wan VACE",
        pytest.param("HunyuanVideo 1.5 I2V with glyphs", marks=pytest.mark.slow("thorough")),
        "Wan SCAIL",
    ],
)
def test_settings_on_models_with_more_than_a_video(name, caplog):
    variant = VARIANTS[name]
    model = variant.model()

    @settings(
        max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(widgets(), st.sampled_from([variant.even, variant.odd]), st.sampled_from([1.0, 5.0]))
    def fuzz(chosen, latent, cfg):
        caplog.clear()
        if not variant.trained:
            chosen = chosen | {"adapter": None}
        check(model, 2, 2, chosen, lambda patched: variant.sample(patched, latent, cfg))
        assert not [record for record in caplog.records if record.exc_text], (
            "the sparse path failed and fell back"
        )

    fuzz()
