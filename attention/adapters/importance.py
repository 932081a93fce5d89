"""Puts the features of a low-rank branch in order of importance, so that a lower rank keeps the best of them.

Features are taken away a few at a time, always those whose loss changes the branch's output least on sampled rows; the
last to go are the first in the file. Measured, not read off the weights: what a feature adds depends on the queries,
keys and values that it meets. Source: our own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .format import Adapter, layer_name

EPS = 1e-5
AT_ONCE = 8                                 # of so many remaining features, one is taken away per round


def order_features(
    adapter: Adapter, layer: object, logits_q: Tensor, logits_k: Tensor, v: Tensor
) -> Adapter:
    """The adapter with the features of one layer in a new order, each head by itself.

    logits_q `(H, R, r)`, logits_k `(H, L, r)`: A x + E(p) of sampled query rows and of keys; v `(H, L, D)`.
    A run at full rank gives what it gave before, up to rounding.
    """
    name = layer_name(layer)
    weights = dict(adapter.layers[name])
    order = torch.stack([importance_order(*each, adapter.info.act) for each in zip(logits_q, logits_k, v)])
    axis_of = {"proj_q": 1, "proj_k": 1, "pe_q": 1, "pe_k": 1}
    if adapter.info.pe == "table":
        axis_of |= {"pe_q": 2, "pe_k": 2}
    for key, axis in axis_of.items():
        if key in weights:
            weights[key] = torch.stack([
                tensor.index_select(axis - 1, rows) for tensor, rows in zip(weights[key], order.to(weights[key].device))
            ])
    return replace(adapter, layers={**adapter.layers, name: weights})


def importance_order(logits_q: Tensor, logits_k: Tensor, v: Tensor, act: str) -> Tensor:
    """Features of one head, most important first: logits `(R, r)` and `(L, r)`, v `(L, D)` -> `(r,)` int64."""
    logits_q, logits_k, v = (x.double() for x in (logits_q, logits_k, v))
    whole = _read(logits_q, logits_k, v, act)
    left = list(range(logits_q.shape[1]))
    gone: list[int] = []
    while len(left) > 1:
        errors = []
        for feature in left:
            rest = [other for other in left if other != feature]
            errors.append((_read(logits_q[:, rest], logits_k[:, rest], v, act) - whole).square().sum())
        worst = torch.stack(errors).argsort()[: max(1, len(left) // AT_ONCE)]
        gone += [left[i] for i in worst]
        left = [feature for feature in left if feature not in gone]
    return torch.tensor(left + gone[::-1])


def _read(logits_q: Tensor, logits_k: Tensor, v: Tensor, act: str) -> Tensor:
    phi_q, phi_k = (x.softmax(-1) if act == "softmax" else F.elu(x) + 1 for x in (logits_q, logits_k))
    return phi_q @ (phi_k.T @ v / len(v)) / (EPS + phi_q @ phi_k.mean(dim=0))[:, None]
