"""A slow transcription of the methods' formulas in float64, head by head, for golden tests.

Shapes: q, k before RoPE and v `(H, L, D)`, angles `(L, D/2)` or None for no rotation, x `(L, H*D)`;
`blocks` lists the token numbers of each query and each key block, and `keep` is 1 - sparsity. Every
token is a video token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64
Grid = tuple[int, int, int]


class Blocks(NamedTuple):
    """Token numbers of each block."""

    queries: list[list[int]]
    keys: list[list[int]]


Kept = list[list[list[int]]]  # per head, per query block: sorted numbers of the kept key blocks


# RoPE


def wan_angles(grid: Grid, width: int) -> Tensor:
    """Angles `(L, width / 2)` in raster order, ordered [t | h | w]."""
    axes = (width - 4 * (width // 6), 2 * (width // 6), 2 * (width // 6))
    angles = []
    for token in _places(grid):
        angles.append([])
        for place, channels in zip(token, axes):
            angles[-1] += [place * 10000.0 ** (-2.0 * i / channels) for i in range(channels // 2)]
    return torch.tensor(angles, dtype=torch.float64)


def rotate(x: Tensor, angles: Tensor | None) -> Tensor:
    """Turn each interleaved pair of `x` `(..., L, D)` by its angle `(L, D/2)`."""
    x = x.double()
    if angles is None:
        return x
    turned = torch.empty_like(x)
    cos, sin = torch.cos(angles.double()), torch.sin(angles.double())
    turned[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    turned[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return turned


def _places(grid: Grid) -> list[tuple[int, int, int]]:
    frames, rows, columns = grid
    return [(t, h, w) for t in range(frames) for h in range(rows) for w in range(columns)]


# dense, routing, block-sparse


def dense(q: Tensor, k: Tensor, v: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor]:
    """Plain softmax attention: output `(H, L, D)` and log-sum-exp `(H, L)`."""
    q, k, v = rotate(q, angles), rotate(k, angles), v.double()
    heads, tokens, _ = q.shape
    out, lse = torch.zeros_like(v), torch.zeros(heads, tokens, dtype=torch.float64)
    for h in range(heads):
        for i in range(tokens):
            out[h, i], lse[h, i] = _attend(q[h, i], k[h], v[h])
    return out, lse


def kept_blocks(q: Tensor, k: Tensor, angles: Tensor | None, blocks: Blocks, keep: float) -> Kept:
    """The key blocks of largest pooled score, for each head and query block."""
    count = _kept_count(keep, len(blocks.keys))
    return [
        [sorted(order[:count]) for order in head] for head in _ranked_blocks(q, k, angles, blocks)
    ]


def sparse(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor | None, blocks: Blocks, kept: Kept
) -> tuple[Tensor, Tensor]:
    """Softmax over the kept blocks only: O_s `(H, L, D)`, LSE `(H, L)`.

    No kept block gives 0 and -inf.
    """
    q, k, v = rotate(q, angles), rotate(k, angles), v.double()
    out = torch.zeros_like(v)
    lse = torch.full(v.shape[:2], -math.inf, dtype=torch.float64)
    for h in range(q.shape[0]):
        for block, rows in enumerate(blocks.queries):
            columns = _tokens(blocks.keys, kept[h][block])
            if not columns:
                continue
            for i in rows:
                out[h, i], lse[h, i] = _attend(q[h, i], k[h, columns], v[h, columns])
    return out, lse


def _attend(row: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """One query `(D,)` over keys and values `(n, D)`: output `(D,)` and log-sum-exp."""
    return _softmax_mix(keys @ row / math.sqrt(row.shape[0]), values)


def _softmax_mix(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logsumexp(logits, dim=0)
    return torch.exp(logits - lse) @ values, lse


def _kept_count(keep: float, blocks: int) -> int:
    # 1 - 0.9 is slightly less than 0.1: without the small term a tenth of ten blocks would be none.
    return min(blocks, max(1, math.floor(keep * blocks + 1e-6)))


def _ranked_blocks(q: Tensor, k: Tensor, angles: Tensor | None, blocks: Blocks) -> Kept:
    """All key block numbers, best pooled score first, for each head and query block."""
    q, k = rotate(q, angles), rotate(k, angles)
    ranked = []
    for h in range(q.shape[0]):
        pooled_k = _pool(k[h], blocks.keys) - k[h].mean(0)
        ranked.append(
            [_descending(pooled_k @ pooled_q) for pooled_q in _pool(q[h], blocks.queries)]
        )
    return ranked


def _descending(values: Tensor) -> list[int]:
    return torch.argsort(values, descending=True, stable=True).tolist()


def _pool(x: Tensor, blocks: list[list[int]]) -> Tensor:
    """`(L, D)` to the blocks' means `(N, D)`.

    A short block is divided by its own number of tokens.
    """
    return torch.stack([x[block].mean(0) for block in blocks])


def _tokens(blocks: list[list[int]], numbers: list[int]) -> list[int]:
    return [token for number in numbers for token in blocks[number]]


def _dropped(kept: list[int], blocks: list[list[int]]) -> list[int]:
    return [j for j in range(len(blocks)) if j not in kept]


# top-k with pooled keys


def top_k(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Tensor | None,
    blocks: Blocks,
    keep: float,
    pooled: bool,
) -> Tensor:
    """Block top-k `(H, L, D)`.

    With `pooled` every unkept block is one pseudo-key of the same softmax.
    """
    kept = kept_blocks(q, k, angles, blocks, keep)
    if not pooled:
        return sparse(q, k, v, angles, blocks, kept)[0]
    q, k, v = rotate(q, angles), rotate(k, angles), v.double()
    out = torch.zeros_like(v)
    for h in range(q.shape[0]):
        pooled_k, pooled_v = _pool(k[h], blocks.keys), _pool(v[h], blocks.keys)
        for block, rows in enumerate(blocks.queries):
            columns, rest = (
                _tokens(blocks.keys, kept[h][block]),
                _dropped(kept[h][block], blocks.keys),
            )
            keys = torch.cat((k[h, columns], pooled_k[rest]))
            values = torch.cat((v[h, columns], pooled_v[rest]))
            weight = torch.tensor(
                [0.0] * len(columns) + [math.log(len(blocks.keys[j])) for j in rest],
                dtype=torch.float64,
            )
            for i in rows:
                out[h, i], _ = _softmax_mix(
                    keys @ q[h, i] / math.sqrt(q.shape[-1]) + weight, values
                )
    return out


# AdaSpa


def block_mass(q: Tensor, k: Tensor, angles: Tensor | None, blocks: Blocks, lse: Tensor) -> Tensor:
    """Softmax mass `(H, Nq, Nk)` of each block under the given normaliser `lse` `(H, L)`."""
    q, k, lse = rotate(q, angles), rotate(k, angles), lse.double()
    mass = torch.zeros(q.shape[0], len(blocks.queries), len(blocks.keys), dtype=torch.float64)
    for h in range(q.shape[0]):
        for block, rows in enumerate(blocks.queries):
            for i in rows:
                share = torch.exp(k[h] @ q[h, i] / math.sqrt(q.shape[-1]) - lse[h, i])
                for j, columns in enumerate(blocks.keys):
                    mass[h, block, j] += share[columns].sum()
    return mass


def adaspa_masks(mass: Tensor, sparsity: float) -> tuple[Kept, list[float], list[float]]:
    """From mass `(H, Nq, Nk)`: kept blocks, each head's sparsity, its recall at the uniform one."""
    mass = mass.double()
    recalls = []
    for head in mass:
        kept = _heaviest(head, sparsity)
        recalls.append(
            sum(row[blocks].sum().item() for row, blocks in zip(head, kept)) / head.sum().item()
        )
    sparsities = _head_sparsities(recalls, sparsity)
    return [_heaviest(head, own) for head, own in zip(mass, sparsities)], sparsities, recalls


def _heaviest(mass: Tensor, sparsity: float) -> list[list[int]]:
    count = _kept_count(1.0 - sparsity, mass.shape[-1])
    return [sorted(_descending(row)[:count]) for row in mass]


def _head_sparsities(recalls: list[float], sparsity: float) -> list[float]:
    sparsities = [sparsity] * len(recalls)
    if sparsity < 1.0 / 3.0:  # (3s - 1) / 2 would be negative
        return sparsities
    moved = min(sum(recall > 0.8 for recall in recalls), len(recalls) // 2)
    best_first = sorted(range(len(recalls)), key=lambda h: -recalls[h])
    for h in best_first[:moved]:
        sparsities[h] = (1.0 + sparsity) / 2.0
    for h in best_first[len(recalls) - moved :]:
        sparsities[h] = (3.0 * sparsity - 1.0) / 2.0
    return sparsities


# SLA


def sla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Tensor | None,
    blocks: Blocks,
    keep: float,
    weight: Tensor,
    bias: Tensor,
    variant: str = "released",
    negligible: float = 0.10,
) -> Tensor:
    """O_s + W O_l + b, `(H, L, D)`.

    O_l over all tokens ("released"), or over the marginal blocks only ("paper").
    """
    if variant not in ("released", "paper"):
        raise ValueError(f"unknown variant {variant!r}")
    ranked = _ranked_blocks(q, k, angles, blocks)
    kept = kept_blocks(q, k, angles, blocks, keep)
    out_sparse, _ = sparse(q, k, v, angles, blocks, kept)
    phi_q, phi_k = torch.softmax(rotate(q, angles), -1), torch.softmax(rotate(k, angles), -1)
    v, weight, bias = v.double(), weight.double(), bias.double()
    count = _kept_count(keep, len(blocks.keys))
    skipped = min(math.floor(negligible * len(blocks.keys) + 1e-6), len(blocks.keys) - count)
    out = torch.zeros_like(v)
    for h in range(q.shape[0]):
        for block, rows in enumerate(blocks.queries):
            columns = list(range(v.shape[1]))
            if variant == "paper":
                columns = _tokens(blocks.keys, ranked[h][block][count : len(blocks.keys) - skipped])
            state, total = phi_k[h, columns].T @ v[h, columns], phi_k[h, columns].sum(0)
            for i in rows:
                linear = phi_q[h, i] @ state / (1e-5 + phi_q[h, i] @ total)
                out[h, i] = out_sparse[h, i] + weight @ linear + bias
    return out


# VSA


def vsa_tiles(segments: list[int], grid: Grid) -> tuple[list[list[int]], int]:
    """Tokens of every tile, those of the segments before the video first; and how many those are."""
    tiles, start = [], 0
    for length in segments:
        tiles += [
            list(range(i, min(i + BLOCK, start + length)))
            for i in range(start, start + length, BLOCK)
        ]
        start += length
    before = len(tiles)
    frames, rows, columns = grid
    for t in range(0, frames, 4):
        for h in range(0, rows, 4):
            for w in range(0, columns, 4):
                tiles.append(
                    [
                        start + (a * rows + b) * columns + c
                        for a in range(t, min(t + 4, frames))
                        for b in range(h, min(h + 4, rows))
                        for c in range(w, min(w + 4, columns))
                    ]
                )
    return tiles, before


def vsa(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, segments: list[int], grid: Grid, sparsity: float
) -> Tensor:
    """O_s + gate C, `(H, L, D)`; q and k after RoPE, gate `(H, L, D)`."""
    q, k, v, gate = (x.double() for x in (q, k, v, gate))
    tiles, before = vsa_tiles(segments, grid)
    count = max(1, min(math.ceil((1 - sparsity) * (len(tiles) - before)), len(tiles) - before))
    out = torch.zeros_like(v)
    for h in range(q.shape[0]):
        means = [torch.stack([x[h, tile].mean(0) for tile in tiles]) for x in (q, k, v)]
        scores = means[0] @ means[1].T / math.sqrt(q.shape[-1])
        coarse = torch.softmax(scores, -1) @ means[2]
        for number, rows in enumerate(tiles):
            kept = list(range(len(tiles)))
            if number >= before:
                best = _descending(scores[number, before:])[:count]
                kept = [*range(before), *sorted(before + each for each in best)]
            columns = _tokens(tiles, kept)
            for i in rows:
                near, _ = _attend(q[h, i], k[h, columns], v[h, columns])
                out[h, i] = near + gate[h, i] * coarse[number]
    return out


# RoLA


def rola(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    angles: Tensor | None,
    blocks: Blocks,
    keep: float,
    a_q: Tensor,
    a_k: Tensor,
    w_g: Tensor,
    b_h: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """RoLA `(H, L, D)` with a_q, a_k `(r, D)`, w_g `(1, D)`, b_h `(H,)`.

    `dtype` is the activations'.
    """
    heads = q.shape[0]
    phi_q = torch.stack(
        [
            _rotate_features(_silu(q[h].double() @ a_q.double().T), angles, dtype)
            for h in range(heads)
        ]
    )
    phi_k = torch.stack(
        [
            _rotate_features(_silu(k[h].double() @ a_k.double().T), angles, dtype)
            for h in range(heads)
        ]
    )
    gate = _rms_gate(x, w_g.reshape(-1), b_h)
    return _rms_fusion(q, k, v, angles, blocks, keep, phi_q, phi_k, gate, dtype)


def _rotate_features(features: Tensor, angles: Tensor | None, dtype: torch.dtype) -> Tensor:
    """RoPE of `(L, r)` with the first r/2 angles; features beyond the angles stay as they are."""
    if angles is None:
        return features
    pairs = min(features.shape[-1] // 2, angles.shape[-1])
    # Training rounded the angles themselves, not their cosines, so the rounding has to come first.
    rounded = angles[:, :pairs].to(dtype).double()
    return torch.cat((rotate(features[:, : 2 * pairs], rounded), features[:, 2 * pairs :]), dim=-1)


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _rms_gate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """sigmoid(x_h . w + b_h), `(H, L)`."""
    return torch.sigmoid(_gate_input(x, weight, bias.shape[0]) + bias.double()[:, None])


def _gate_input(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """x_h . w, `(H, L)`, from x `(L, H*D)` and w `(D,)`."""
    x, weight = x.double(), weight.double()
    width = x.shape[-1] // heads
    return torch.stack([x[:, h * width : (h + 1) * width] @ weight for h in range(heads)])


def _rms_fusion(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Tensor | None,
    blocks: Blocks,
    keep: float,
    phi_q: Tensor,
    phi_k: Tensor,
    gate: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """(O_s / s + g O_l) s, O_l = RMSNorm(phi_q (phi_k^T v)), s the root mean square of O_s."""
    kept = kept_blocks(q, k, angles, blocks, keep)
    out_sparse, _ = sparse(q, k, v, angles, blocks, kept)
    v = v.double()
    eps = torch.finfo(dtype).eps
    out = torch.zeros_like(v)
    for h in range(v.shape[0]):
        state = phi_k[h].T @ v[h]
        for i in range(v.shape[1]):
            linear = phi_q[h, i] @ state
            linear = linear / torch.sqrt((linear**2).mean() + eps)
            if v.shape[1] < BLOCK:  # too short for a sparse branch
                out[h, i] = gate[h, i] * linear
                continue
            scale = torch.sqrt((out_sparse[h, i] ** 2).mean() + 1e-5)
            out[h, i] = (out_sparse[h, i] / scale + gate[h, i] * linear) * scale
    return out


# RoPeSLR


def ropeslr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor | None,
    angles: Tensor | None,
    blocks: Blocks,
    keep: float,
    grid: Grid,
    weights: dict[str, Tensor],
    act: str = "softmax",
    pe: str = "none",
    pe_grid: Grid | None = None,
    rank: int = 0,
) -> Tensor:
    """Kept and background attention mixed by mass, `(H, L, D)`; missing weights are initial.

    weights: beta `(H, D/2)`, gate_c, gate_b, eta `(H,)`, gate_w `(D,)`, a_q, a_k `(H, r, D)`, pe_q,
    pe_k `(H, r, D)` ("fourier") or `(H, T+Hh+Ww, r)` on `pe_grid` ("table"). `x` may be None
    without gate_w. `rank` 0 keeps everything. query_map, kept_map `(H, D, D)`: see `correct`.
    """
    heads, tokens, width = q.shape
    _, out_sparse, lse, dropped_lse = _kept_part(q, k, v, angles, blocks, keep)
    query_map, kept_map = (
        _weight(weights, name, torch.zeros(heads, width, width))
        for name in ("query_map", "kept_map")
    )
    c = _weight(weights, "gate_slope", torch.ones(heads))
    b = _weight(weights, "gate_bias", torch.zeros(heads))
    beta = _weight(
        weights,
        "channel_scale",
        torch.full((heads, width // 2), 1.0 / math.sqrt(width), dtype=torch.float64),
    )
    gate_x = torch.zeros(heads, tokens, dtype=torch.float64)
    if "gate_weight" in weights:
        gate_x = _gate_input(x, weights["gate_weight"], heads)
    branch = low_rank_branch(q, k, v, angles, grid, weights, act, pe, pe_grid, rank)
    turned_q, turned_k, v = rotate(q, angles), rotate(k, angles), v.double()
    out = torch.zeros_like(v)
    for h in range(heads):
        mean_v, c_matrix = v[h].mean(0), _covariance(turned_k[h], v[h])
        scale = _per_channel(_strongest_pairs(beta[h], c_matrix, rank))
        for i in range(tokens):
            gate = _mass_gate(dropped_lse[h, i], lse[h, i], c[h], b[h], gate_x[h, i])
            background = mean_v + (scale * turned_q[h, i]) @ c_matrix + branch[h, i]
            background = background + turned_q[h, i] @ query_map[h]
            of_kept = out_sparse[h, i] + out_sparse[h, i] @ kept_map[h]
            out[h, i] = (1.0 - gate) * of_kept + gate * background
    return out


def ropeslr_rms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    angles: Tensor | None,
    blocks: Blocks,
    keep: float,
    grid: Grid,
    weights: dict[str, Tensor],
    pe: str,
    pe_grid: Grid | None,
    dtype: torch.dtype,
) -> Tensor:
    """RoLA's additive form `(H, L, D)` with a projection per head and no feature RoPE.

    weights: a_q, a_k `(H, r, D)`, gate_w `(D,)`, gate_b `(H,)`, and pe_q, pe_k as in `ropeslr`,
    zero where missing.
    """
    phi_q, phi_k = (
        _silu(_projected(side, weights, name, angles, grid, pe, pe_grid, 0))
        for side, name in ((q, "q"), (k, "k"))
    )
    gate = _rms_gate(x, weights["gate_weight"], weights["gate_bias"])
    return _rms_fusion(q, k, v, angles, blocks, keep, phi_q, phi_k, gate, dtype)


def calibrate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Tensor | None,
    blocks: Blocks,
    keep: float,
    rows: list[int],
    start: dict[str, Tensor | None],
) -> dict[str, Tensor]:
    """Slope `(H,)`, bias `(H,)`, channel scale `(H, D/2)` fitted to the dense output of `rows`.

    start: gate_c, gate_b `(H,)` and beta `(H, D/2)`, which the fit shrinks to (and keeps where it
    is not finite); gate_x `(H, L)`, a known term of the gate's logit, or None; branch `(H, L, D)`,
    a known background, or None.
    """
    kept, out_sparse, lse_kept, dropped_lse = _kept_part(q, k, v, angles, blocks, keep)
    gate_c, gate_b, beta = (
        start[name].double().clone() for name in ("gate_slope", "gate_bias", "channel_scale")
    )
    gate_x, branch = start.get("gate_logits"), start.get("branch")
    turned_q, turned_k, v = rotate(q, angles), rotate(k, angles), v.double()
    gate_x = torch.zeros(v.shape[:2], dtype=torch.float64) if gate_x is None else gate_x.double()
    branch = torch.zeros_like(v) if branch is None else branch.double()
    block_of = {token: number for number, block in enumerate(blocks.queries) for token in block}
    for h in range(v.shape[0]):
        estimate, truth = [], []
        for i in rows:
            rest = _tokens(blocks.keys, _dropped(kept[h][block_of[i]], blocks.keys))
            logits = turned_k[h, rest] @ turned_q[h, i] / math.sqrt(v.shape[-1])
            estimate.append((dropped_lse[h, i] - lse_kept[h, i]).item())
            # log(exp(LSE_all - LSE_kept) - 1) is the unkept keys' own log-sum-exp against LSE_kept:
            # nothing cancels so.
            truth.append((torch.logsumexp(logits, 0) - lse_kept[h, i] - gate_x[h, i]).item())
        c, b = _fit_line(estimate, truth, gate_c[h].item())
        if math.isfinite(c) and math.isfinite(b):
            gate_c[h], gate_b[h] = c, b
        # The gate that beta works behind is the fitted one, not the true mass: that is what it will
        # meet in use.
        gates = [
            _mass_gate(dropped_lse[h, i], lse_kept[h, i], gate_c[h], gate_b[h], gate_x[h, i])
            for i in rows
        ]
        solved = _fit_beta(
            turned_q[h], turned_k[h], v[h], branch[h], out_sparse[h], rows, gates, beta[h]
        )
        if solved is not None:
            beta[h] = solved
    return {"gate_slope": gate_c, "gate_bias": gate_b, "channel_scale": beta}


def correct(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Tensor | None,
    blocks: Blocks,
    keep: float,
    values: dict[str, Tensor],
    before: Tensor,
) -> dict[str, Tensor]:
    """What is linear in the rest of a calibration by all tokens: query_map, kept_map.

    values: of `calibrate`. before `(H, L, D)`: the output without a correction. Every query is
    predicted by a fit to all the others, by two strengths of shrinking, and the better one counts.
    """
    _, out_sparse, lse_kept, dropped_lse = _kept_part(q, k, v, angles, blocks, keep)
    turned_q, (exact, _) = rotate(q, angles), dense(q, k, v, angles)
    heads, tokens, width = q.shape
    gate_x = values.get("gate_logits")
    maps = torch.zeros(heads, 2 * width, width, dtype=torch.float64)
    for h in range(heads):
        rest = exact[h] - before[h]
        slope, bias = values["gate_slope"][h], values["gate_bias"][h]
        own = torch.zeros(tokens) if gate_x is None else gate_x[h]
        gates = [
            _mass_gate(dropped_lse[h, i], lse_kept[h, i], slope, bias, own[i])
            for i in range(tokens)
        ]
        gate = torch.stack([each.double() for each in gates])[:, None]
        sizes = [x[h].square().mean().sqrt() for x in (turned_q, out_sparse)]
        rows = torch.cat(
            (gate * turned_q[h] / sizes[0], (1 - gate) * out_sparse[h] / sizes[1]), dim=1
        )
        least, found = rest.square().sum(), torch.zeros(2 * width, width).double()
        for strength in (0.01, 0.3):
            ridge = strength * rows.square().sum() / tokens * torch.eye(2 * width).double()
            missed = 0.0
            for i in range(tokens):
                others = [j for j in range(tokens) if j != i]
                fit = torch.linalg.solve(
                    rows[others].T @ rows[others] + ridge, rows[others].T @ rest[others]
                )
                missed += (rest[i] - rows[i] @ fit).square().sum()
            if missed < least:
                least = missed
                found = torch.linalg.solve(rows.T @ rows + ridge, rows.T @ rest)
        maps[h] = found
        maps[h, :width] /= sizes[0]
        maps[h, width:] /= sizes[1]
    return {"query_map": maps[:, :width], "kept_map": maps[:, width:]}


def interpolate_noise(values: Tensor, levels: list[float], noise: float) -> Tensor:
    """values `(N, ...)` at N noise levels, read linearly at `noise`.

    Constant outside the levels.
    """
    points = sorted(zip(levels, values.double()), key=lambda point: point[0])
    if noise <= points[0][0]:
        return points[0][1]
    for (low, below), (high, above) in zip(points, points[1:]):
        if noise <= high:
            share = (noise - low) / (high - low)
            return (1.0 - share) * below + share * above
    return points[-1][1]


def _weight(weights: dict[str, Tensor], name: str, initial: Tensor) -> Tensor:
    return weights.get(name, initial).double()


def _kept_part(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor | None, blocks: Blocks, keep: float
) -> tuple[Kept, Tensor, Tensor, Tensor]:
    """Which blocks are kept, what attention over them gives, its LSE, and that of the others."""
    kept = kept_blocks(q, k, angles, blocks, keep)
    out_sparse, lse = sparse(q, k, v, angles, blocks, kept)
    return kept, out_sparse, lse, _dropped_lse(q, k, angles, blocks, kept)


def _dropped_lse(q: Tensor, k: Tensor, angles: Tensor | None, blocks: Blocks, kept: Kept) -> Tensor:
    """T `(H, L)`.

    Estimated log mass of the unkept blocks, one number per query block; -inf where none is unkept.
    """
    q, k = rotate(q, angles), rotate(k, angles)
    dropped_lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    for h in range(q.shape[0]):
        pooled_q, pooled_k = _pool(q[h], blocks.queries), _pool(k[h], blocks.keys)
        for block, rows in enumerate(blocks.queries):
            logits = [
                (pooled_q[block] @ pooled_k[j]).item() / math.sqrt(q.shape[-1])
                + math.log(len(blocks.keys[j]))
                for j in _dropped(kept[h][block], blocks.keys)
            ]
            if logits:
                dropped_lse[h, rows] = torch.logsumexp(torch.tensor(logits, dtype=torch.float64), 0)
    return dropped_lse


def _mass_gate(dropped_lse: Tensor, lse: Tensor, c: Tensor, b: Tensor, gate_x: Tensor) -> Tensor:
    # Nothing is dropped: no mass to give away, whatever c's sign (0 * inf would not be a number).
    if torch.isinf(dropped_lse):
        return torch.zeros((), dtype=torch.float64)
    return torch.sigmoid(c * (dropped_lse - lse) + b + gate_x)


def _covariance(turned_k: Tensor, v: Tensor) -> Tensor:
    """C `(D, D)` = mean over tokens of (k - mean k)^T v, of one head."""
    centred = turned_k - turned_k.mean(0)
    total = torch.zeros(v.shape[-1], v.shape[-1], dtype=torch.float64)
    for key, value in zip(centred, v):
        total += torch.outer(key, value)
    return total / v.shape[0]


def _per_channel(pairs: Tensor) -> Tensor:
    """One number per RoPE pair `(D/2,)` to one per channel `(D,)`."""
    return pairs.repeat_interleave(2)


def _strongest_pairs(beta: Tensor, c_matrix: Tensor, rank: int) -> Tensor:
    """beta `(D/2,)` of one head with all but its ceil(rank / 2) strongest pairs set to zero."""
    pairs = beta.shape[0]
    if rank <= 0 or math.ceil(rank / 2) >= pairs:
        return beta
    strength = torch.stack(
        [beta[p].abs() * c_matrix[2 * p : 2 * p + 2].norm() for p in range(pairs)]
    )
    cut = torch.zeros_like(beta)
    for p in _descending(strength)[: math.ceil(rank / 2)]:
        cut[p] = beta[p]
    return cut


def low_rank_branch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Tensor | None,
    grid: Grid,
    weights: dict[str, Tensor],
    act: str,
    pe: str,
    pe_grid: Grid | None,
    rank: int,
) -> Tensor:
    """eta_h (O_lr - mean v), `(H, L, D)`; zero without projections or without eta."""
    v = v.double()
    branch = torch.zeros_like(v)
    if "proj_q" not in weights or "proj_k" not in weights:
        return branch
    eta = _weight(weights, "low_rank_scale", torch.zeros(v.shape[0]))
    phi_q = _activate(_projected(q, weights, "q", angles, grid, pe, pe_grid, rank), act)
    phi_k = _activate(_projected(k, weights, "k", angles, grid, pe, pe_grid, rank), act)
    for h in range(v.shape[0]):
        state, mean_phi = phi_k[h].T @ v[h] / v.shape[1], phi_k[h].mean(0)
        for i in range(v.shape[1]):
            low_rank = phi_q[h, i] @ state / (1e-5 + phi_q[h, i] @ mean_phi)
            branch[h, i] = eta[h] * (low_rank - v[h].mean(0))
    return branch


def _activate(x: Tensor, act: str) -> Tensor:
    if act == "softmax":
        return torch.softmax(x, -1)
    if act in ("elu", "elu1", "elu+1"):
        return torch.where(x > 0, x + 1.0, torch.exp(x))
    raise ValueError(f"unknown activation {act!r}")


def _projected(
    x: Tensor,
    weights: dict[str, Tensor],
    side: str,
    angles: Tensor | None,
    grid: Grid,
    pe: str,
    pe_grid: Grid | None,
    rank: int,
) -> Tensor:
    """A_h x + E_h(p), `(H, L, r)`, from x `(H, L, D)` before RoPE.

    A rank > 0 keeps the first features only.
    """
    a = weights[f"proj_{side}"].double()
    features = torch.stack([x[h].double() @ a[h].T for h in range(x.shape[0])])
    table = weights.get(f"pe_{side}")
    if pe != "none" and table is not None:
        features = features + _position_term(table.double(), angles, grid, pe, pe_grid)
    return features[..., :rank] if rank > 0 else features


def _position_term(
    table: Tensor, angles: Tensor | None, grid: Grid, pe: str, pe_grid: Grid | None
) -> Tensor:
    """E `(H, L, r)` from `(H, r, D)` ("fourier") or `(H, T+Hh+Ww, r)` ("table")."""
    if pe == "fourier":
        if angles is None:  # no grid position: c(p) = 0
            return torch.zeros((), dtype=torch.float64)
        waves = torch.cat((torch.cos(angles.double()), torch.sin(angles.double())), dim=-1)
        return torch.stack([waves @ head.T for head in table])
    if pe != "table":
        raise ValueError(f"unknown position encoding {pe!r}")
    out = []
    for head in table:
        axes = [
            _resample(part, size) for part, size in zip(head.split(list(pe_grid or grid)), grid)
        ]
        out.append(torch.stack([axes[0][t] + axes[1][h] + axes[2][w] for t, h, w in _places(grid)]))
    return torch.stack(out)


def _resample(table: Tensor, size: int) -> Tensor:
    """`(n, r)` to `(size, r)`, linearly, first on first and last on last."""
    last = table.shape[0] - 1
    out = []
    for place in range(size):
        at = place * last / (size - 1) if size > 1 else 0.0
        low = min(math.floor(at), last)
        high = min(low + 1, last)
        out.append(table[low] + (at - low) * (table[high] - table[low]))
    return torch.stack(out)


def _fit_line(u: list[float], y: list[float], c_start: float) -> tuple[float, float]:
    """c and b of y = c u + b, c shrunk to its start."""
    mean_u, mean_y = sum(u) / len(u), sum(y) / len(y)
    covariance = sum((a - mean_u) * (b - mean_y) for a, b in zip(u, y)) / len(u)
    variance = sum((a - mean_u) ** 2 for a in u) / len(u)
    c = (covariance + 0.1 * c_start) / (variance + 0.1)
    return c, mean_y - c * mean_u


def _fit_beta(
    turned_q: Tensor,
    turned_k: Tensor,
    v: Tensor,
    branch: Tensor,
    out_sparse: Tensor,
    rows: list[int],
    gates: list[Tensor],
    start: Tensor,
) -> Tensor | None:
    """Ridge solution `(D/2,)` of one head for the dense output of `rows`; None if unsolvable.

    The equations: g [mean v + (beta * q) C + branch] = O_dense - (1 - g) O_s, for every row and
    channel.
    """
    pairs, mean_v, c_matrix = start.shape[0], v.mean(0), _covariance(turned_k, v)
    normal = torch.zeros(pairs, pairs, dtype=torch.float64)
    right = torch.zeros(pairs, dtype=torch.float64)
    for i, gate in zip(rows, gates):
        goal, _ = _attend(turned_q[i], turned_k, v)
        goal = goal - (1.0 - gate) * out_sparse[i] - gate * (mean_v + branch[i])
        design = gate * (turned_q[i][:, None] * c_matrix).reshape(pairs, 2, -1).sum(1)  # (D/2, D)
        normal += design @ design.T
        right += design @ goal
    ridge = 0.05 * normal.diagonal().mean()
    if ridge <= 0 or not torch.isfinite(ridge):
        return None
    solved = torch.linalg.solve(
        normal + ridge * torch.eye(pairs, dtype=torch.float64), right + ridge * start
    )
    return solved if torch.isfinite(solved).all() else None
