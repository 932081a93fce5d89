"""Several processes, each with a share of the heads, against one that has them all."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from pack_loader import load
from support import processes, ranks
from support.data.adapters import ropeslr_adapter
from support.data.fields import relative_error

attention = load(".attention")
head_share = load(".attention.head_share")
parallel = load(".attention.parallel")


@pytest.fixture(scope="module")
def whole():
    """What one process finds: case -> step -> output `(B, L, H, D)`."""
    found = {}
    for name in ranks.CASES:
        run = None
        for step in range(ranks.STEPS):
            plan, qkv, call = ranks.inputs(name, step)
            run = run or attention.AttentionRun(plan)
            found[f"{name} {step}"] = run.attend(*qkv, call)[0].transpose(1, 2)
    return found


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow("thorough"))])
def test_shares_of_heads_are_the_whole(size, whole, tmp_path):
    """By our own function, and through yunchang's exchange of tokens for heads, with padding."""
    processes.run(ranks.__file__, size, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    assert ("yunchang" in parts[0]) == (importlib.util.find_spec("yunchang") is not None)
    for key, expected in whole.items():
        heads = torch.cat([part["ours"][key] for part in parts], dim=2)
        assert relative_error(heads, expected) < 1e-5, key
        if "yunchang" in parts[0]:
            tokens = torch.cat([part["yunchang"][key] for part in parts], dim=1)
            found = tokens[:, : expected.shape[1]]
            assert relative_error(found, expected) < 1e-5, key
            assert not tokens[:, expected.shape[1] :].any()
    # The cases are what they are meant to be: heads share what one alone could not know.
    assert len({str(key).rsplit(" ", 1)[0] for key in whole}) == len(ranks.CASES)


def alone(heads=4, size=2):
    return head_share.HeadShare(1, size, lambda x: [x] * size)


def test_an_adapter_is_cut_by_heads_and_its_table_is_not():
    adapter = ropeslr_adapter(2, 4, 16)
    weights = dict(
        adapter.layers["layers.0"]
        if "layers.0" in adapter.layers
        else next(iter(adapter.layers.values()))
    )
    layers = {name: {**each, "allocation": torch.rand(4)} for name, each in adapter.layers.items()}
    cut = alone().adapter(replace(adapter, layers=layers))
    own = next(iter(cut.layers.values()))
    whole = next(iter(layers.values()))
    for name, weight in own.items():
        if name in ("gate_weight", "allocation"):
            assert torch.equal(weight, whole[name])
        elif name == "channel_scale":
            assert torch.equal(weight, whole[name][..., 2:, :])
        elif name in ("gate_slope", "gate_bias", "low_rank_scale"):
            assert torch.equal(weight, whole[name][..., 2:])
        else:
            assert torch.equal(weight, whole[name][2:])
    assert set(own) == {*weights, "allocation"} and cut.info == adapter.info


def test_what_cannot_be_shared_is_refused_in_words(monkeypatch):
    with pytest.raises(ValueError, match="5 heads cannot be shared by 2 processes"):
        alone().own(5)
    monkeypatch.setattr(parallel.Peers, "share", property(lambda self: alone()))
    plan, qkv, call = ranks.inputs("top-k", 0)
    ours = parallel.UlyssesAttention(plan)
    q, k, v = (x.transpose(1, 2) for x in qkv)
    with pytest.raises(ValueError, match="say which self-attention comes next"):
        ours(q, k, v)
    ours.next(call)
    with pytest.raises(ValueError, match="ring degree 1"):  # half of the keys, as a ring has them
        ours(q[:, :150], k[:, :150], v[:, :150])
