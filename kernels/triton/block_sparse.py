"""Block-sparse attention, forward, with the background mixed in before anything is written.

One program per query block and head walks the list of key blocks that the block keeps. Its epilogue may add, in
registers, what the dropped blocks would have said; see `_forward`. Rows of D numbers that a whole call of the
training-free method moves per token and head (D = 128, half precision: 256 bytes a row):

    block_pool           read q                      1 row
    block_pool_state     read k, v                   2 rows
    this kernel          read q, k, v; write out     4 rows       a low-rank branch reads q once more
    floor                read q, k, v; write out     4 rows

With the small tensors 2,018 bytes at 75,600 tokens against a floor of 1,024 (benchmarks/traffic.py; a test counts the
rows load by load): routing needs every key before the first query block can start, so q, k and v are read twice. k and
v are counted once here; each query block that keeps them reads them again, from the cache as far as it holds. Sparse
output and background never travel to memory.
"""

from __future__ import annotations

import triton.language as tl

from .features import add_linear, feature_tile
from .launch import kernel
from .tiles import LN_2, LOG2_E, block_rows, is_short, load_rows, softmax_step, store_rows


@kernel
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_table_ptr, k_table_ptr, lists_ptr, counts_ptr,
    tail_k_ptr, tail_v_ptr, log_sizes_ptr,
    mass_ptr, gate_c_ptr, gate_b_ptr, gate_x_ptr, first_ptr, first_scale_ptr, v_mean_ptr, bias_ptr,
    a_ptr, cos_ptr, sin_ptr, pe_ptr, places_ptr, state_ptr, state_scale_ptr, norm_ptr, eps_ptr, eta_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    heads, q_tokens, k_tokens, n_q, n_k, list_width, rank, pe_rows, scale,
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ACT: tl.constexpr,
):
    """Every group of pointers is optional: None leaves its code out.

    lists, counts: without them every block is kept. tail_*: one pooled pseudo-key per dropped block.
    mass ...: out = (1 - g) sparse + g background, g = sigmoid(c (mass - LSE) + b + x), background = v_mean + q M
    [+ eta (low rank - v_mean)]. Without mass, state ... bias: out = sparse + linear + bias (SLA).
    """
    q_block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    q_ptr += b * q_batch * 8 + h * q_head * 8
    k_ptr += b * k_batch * 8 + h * k_head * 8
    v_ptr += b * v_batch * 8 + h * v_head * 8
    out_ptr += b * out_batch * 8 + h * out_head * 8
    line = head * n_q + q_block
    if lists_ptr is None:
        count = n_k
    else:
        count = tl.load(counts_ptr + line)
        lists_ptr += line * list_width

    q_rows = block_rows(q_table_ptr, q_block, q_tokens, BLOCK_Q)
    q = load_rows(q_ptr, q_rows, q_row, D, DP)
    scale2 = scale * LOG2_E
    best = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, DP), tl.float32)
    for i in range(0, count):
        if lists_ptr is None:
            k_block = i
        else:
            k_block = tl.load(lists_ptr + i)
        rows = block_rows(k_table_ptr, k_block, k_tokens, BLOCK_K)
        k = load_rows(k_ptr, rows, k_row, D, DP)
        scores = tl.dot(q, k.T) * scale2
        if is_short(k_table_ptr, k_block, k_tokens, BLOCK_K):
            scores = tl.where((rows >= 0)[None, :], scores, -float("inf"))
        v = load_rows(v_ptr, rows, v_row, D, DP)
        best, total, acc = softmax_step(scores, v, best, total, acc)

    if tail_k_ptr is not None:
        passed = 0                          # list entries before this tile: the list is sorted
        for start in range(0, n_k, BLOCK_K):
            blocks = start + tl.arange(0, BLOCK_K)
            place = passed + tl.arange(0, BLOCK_K)
            listed = tl.load(lists_ptr + place, mask=place < count, other=n_k)
            kept = tl.max((listed[:, None] == blocks[None, :]).to(tl.int32), 0) > 0
            passed += tl.sum((listed < start + BLOCK_K).to(tl.int32), 0)
            dropped = (blocks < n_k) & (kept == 0)
            rows = tl.where(blocks < n_k, blocks, -1)
            k = load_rows(tail_k_ptr + head * n_k * D, rows, D // 8, D, DP)
            sizes = tl.load(log_sizes_ptr + blocks, mask=blocks < n_k, other=0.0)
            scores = tl.dot(q, k.T) * scale2 + sizes[None, :]
            scores = tl.where(dropped[None, :], scores, -float("inf"))
            v = load_rows(tail_v_ptr + head * n_k * D, rows, D // 8, D, DP)
            best, total, acc = softmax_step(scores, v, best, total, acc)

    lse = tl.where(total > 0, (best + tl.log2(total)) * LN_2, -float("inf"))
    if lse_ptr is not None:
        tl.store(lse_ptr + head * q_tokens + q_rows, lse, mask=q_rows >= 0)
    share = 1.0 / tl.where(total > 0, total, 1.0)
    q_rows = block_rows(q_table_ptr, q_block, q_tokens, BLOCK_Q, True)
    channels = tl.arange(0, DP)
    if mass_ptr is not None:
        mass = tl.load(mass_ptr + line)
        # A row that keeps nothing has LSE -inf; the bound keeps c = 0 from making 0 * inf of it.
        odds = tl.load(gate_c_ptr + head) * (mass - tl.maximum(lse, -1e30)) + tl.load(gate_b_ptr + head)
        if gate_x_ptr is not None:
            odds += tl.load(gate_x_ptr + head * q_tokens + q_rows, mask=q_rows >= 0, other=0.0)
        gate = tl.where(mass == -float("inf"), 0.0, tl.sigmoid(odds))
        mean = tl.load(v_mean_ptr + head * D + channels, mask=channels < D, other=0.0)
        if state_ptr is not None:
            eta = tl.load(eta_ptr + h)
            mean = mean * (1.0 - eta)
        # The gate goes into q and into phi, so every product adds to the one tile that is already there.
        size = tl.load(first_scale_ptr + head)
        acc = (acc * (share * (1.0 - gate))[:, None] + gate[:, None] * mean[None, :]) / size
        inside = (channels < D)[:, None] & (channels < D)[None, :]
        at = channels[:, None] * D + channels[None, :]
        first = tl.load((first_ptr + head * D * D) + at, mask=inside, other=0.0)
        acc = tl.dot((q.to(tl.float32) * gate[:, None]).to(first.dtype), first, acc) * size
        share = gate
        if state_ptr is not None:
            share = gate * eta
    else:
        acc = acc * share[:, None]
        share = tl.full((BLOCK_Q,), 1.0, tl.float32)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + channels, mask=channels < D, other=0.0)[None, :]
    if state_ptr is not None:
        phi = feature_tile(
            q_ptr, q_rows, q_row, h, a_ptr, cos_ptr, sin_ptr, pe_ptr, places_ptr, pe_rows, rank,
            D, DP, RP, BLOCK_Q, ACT,
        )
        acc = add_linear(
            acc, phi, share, head, state_ptr, state_scale_ptr, norm_ptr, eps_ptr, rank, D, DP, RP
        )
    store_rows(out_ptr, q_rows, out_row, acc, D, DP)
