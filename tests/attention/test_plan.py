"""The plan: every field is checked; errors name the field, the value and what was expected."""

from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pack_loader import load

plan = load(".attention.plan")
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize(
    "field, value, says",
    [
        (
            "method",
            "magic",
            "method is 'magic'; it must be one of: auto, ropeslr, rola, sla, adaspa, top-k, top-k "
            "plain",
        ),
        ("sparsity", 1.5, "sparsity is 1.5; it must be from 0.0 to 0.98"),
        ("sparsity", float("nan"), "sparsity is nan"),
        ("rank", -2, "rank is -2; it must be from 0 to 128"),
        ("dense_first_steps", -2, "dense_first_steps is -2; it must be -1 or more"),
        ("calibrate", "sometimes", "calibrate is 'sometimes'"),
        ("calibrate_rows", 0, "calibrate_rows is 0"),
        ("backend", "cuda", "backend is 'cuda'; it must be one of: auto, triton, pytorch, dense"),
        ("block_order", "hilbert", "block_order is 'hilbert'"),
        ("dense_layers", frozenset({-3}), "dense_layers has -3"),
    ],
)
def test_a_wrong_value_is_named(field, value, says):
    with pytest.raises(ValueError, match=says):
        plan.SparsePlan(**{field: value})


@pytest.mark.parametrize(
    "text, layers",
    [("", []), (" , ", []), ("0", [0]), ("0, 1, 38-39", [0, 1, 38, 39]), (" 3 - 5 ,4", [3, 4, 5])],
)
def test_layer_lists_are_read(text, layers):
    assert plan.parse_layers(text) == frozenset(layers)


@pytest.mark.parametrize(
    "text, bad",
    [
        ("0,x,9-", ["'x'", "'9-'"]),
        ("5-2", ["'5-2'"]),
        ("-1", ["'-1'"]),
        ("1-2-3", ["'1-2-3'"]),
        ("1.5", ["'1.5'"]),
        ("²", ["'²'"]),
        ("99999", ["'99999'"]),
    ],
)
def test_every_unreadable_layer_is_named(text, bad):
    with pytest.raises(ValueError, match="dense_layers is") as error:
        plan.parse_layers(text)
    assert all(piece in str(error.value) for piece in bad)


@patient
@given(st.text(max_size=30))
def test_any_text_is_read_or_refused_in_words(text):
    try:
        layers = plan.parse_layers(text)
    except ValueError as error:
        assert "dense_layers" in str(error)
    else:
        assert all(0 <= layer <= 9999 for layer in layers)


@patient
@given(st.integers(1, 20000), st.integers(0, 98))
def test_kept_blocks_follow_the_sparsity_without_rounding_surprises(blocks, percent):
    kept = plan.SparsePlan(sparsity=percent / 100).resolve().topk(blocks)
    assert kept == max(1, (100 - percent) * blocks // 100)


@pytest.mark.parametrize(
    "asked, trained, expected",
    [
        (dict(), None, ("ropeslr", "cube", 1, "periodic")),
        (dict(), "ropeslr", ("ropeslr", "cube", 1, "off")),
        (dict(), "rola", ("rola", "raster", 0, "off")),
        (dict(method="sla"), None, ("sla", "raster", 1, "periodic")),
        (dict(method="adaspa"), None, ("adaspa", "cube", 0, "periodic")),
        (dict(method="top-k"), "rola", ("top-k", "cube", 1, "periodic")),
        (
            dict(block_order="cube", dense_first_steps=2, calibrate="refine"),
            "rola",
            ("rola", "cube", 2, "refine"),
        ),
    ],
)
def test_what_auto_means(asked, trained, expected):
    found = plan.SparsePlan(**asked).resolve(an_adapter(trained))
    assert (found.method, found.block_order, found.dense_first_steps, found.calibrate) == expected
    assert isinstance(found, plan.ResolvedPlan) and not hasattr(found, "resolve")
    assert (found.adapter is not None) == (found.method == trained)


@pytest.mark.parametrize("asked, expected", [("auto", 16), ("64", 64)])
def test_an_adapters_own_key_block_counts_where_the_plan_names_none(asked, expected):
    found = plan.SparsePlan(key_block=asked).resolve(an_adapter("ropeslr", block_k=16))
    assert found.key_tokens == expected
    for method in plan.METHODS[1:]:
        own = 16 if asked == "auto" and method in plan.ALLOCATED else 64
        assert plan.SparsePlan(method=method, key_block=asked).resolve().key_tokens == own
    compared = found.by_method("top-k").key_tokens
    assert compared == plan.SparsePlan(method="top-k", key_block=asked).resolve().key_tokens


def an_adapter(method, use_rank=0, block_k=64, tensors=()):
    """What a plan asks of an adapter; None for no method."""
    order = "raster" if method in ("rola", "sla") else "cube"
    info = SimpleNamespace(method=method, block_order=order, block_q=64, block_k=block_k)
    return method and SimpleNamespace(
        info=info, use_rank=use_rank, has=lambda name: name in tensors
    )


@pytest.mark.parametrize(
    "asked, trained, tensors, expected",
    [
        (dict(), None, (), (True, True)),
        (dict(method="top-k"), None, (), (True, True)),
        (dict(method="top-k plain", calibrate="off"), None, (), (True, True)),
        (dict(method="adaspa"), None, (), (False, False)),
        (dict(method="rola"), None, (), (False, False)),
        (dict(allocation="uniform"), None, (), (False, False)),
        (dict(), "rola", (), (False, False)),
        (dict(), "ropeslr", (), (False, False)),
        (dict(calibrate="refine"), "ropeslr", (), (False, False)),
        (dict(), "ropeslr", ("allocation",), (True, True)),
        (dict(calibrate="off"), "ropeslr", ("allocation",), (True, False)),
        (dict(calibrate="refine"), "ropeslr", ("allocation",), (True, True)),
        (dict(allocation="uniform"), "ropeslr", ("allocation",), (False, False)),
        (dict(method="top-k"), "ropeslr", ("allocation",), (True, True)),
    ],
)
def test_who_shares_blocks_between_heads_and_who_measures_for_it(asked, trained, tensors, expected):
    found = plan.SparsePlan(**asked).resolve(an_adapter(trained, tensors=tensors))
    assert (found.allocates, found.probes) == expected


def test_an_adapters_own_rank_counts_where_the_plan_names_none():
    assert plan.SparsePlan().resolve(an_adapter("ropeslr", 16)).rank == 16
    assert plan.SparsePlan(rank=8).resolve(an_adapter("ropeslr", 16)).rank == 8


def test_a_method_that_the_adapter_was_not_trained_for_is_refused():
    with pytest.raises(
        ValueError, match="method is sla, but the adapter was trained for rola. Set method to auto"
    ):
        plan.SparsePlan(method="sla").resolve(an_adapter("rola"))


@pytest.mark.parametrize("length", [1001, 140_000])
def test_a_list_of_layers_that_no_person_wrote_is_refused_at_once(length):
    with pytest.raises(ValueError, match=f"dense_layers is {length} characters long; at most 1000"):
        plan.parse_layers("0," * (length // 2) + "0" * (length % 2))


def test_every_method_of_the_node_has_a_class():
    methods = load(".attention.methods")
    assert plan.METHODS == ("auto", *methods.METHODS)
    assert set(plan.NEED_WEIGHTS) < set(plan.TRAINED_METHODS) < set(plan.METHODS)
