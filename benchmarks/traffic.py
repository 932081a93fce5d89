"""Bytes that one call of the default method moves, per token and head, pass by pass.

A row is D numbers. k and v are counted once per pass: each query block reads the blocks that it
keeps again, from the cache as far as it holds. The floor reads q, k and v once and writes out once;
routing has to see every key before the first query block can start, so no kernel that routes by
content reaches it. A test counts these rows, load by load.
"""

from __future__ import annotations

ROWS = {  # pass -> rows read of (q, k, v), rows written
    "block_pool": ((1, 0, 0), 0),
    "block_pool_state": ((0, 1, 1), 0),
    "add_mapped": ((0, 0, 1), 1),  # the values, as the correction changes them
    "block_sparse_mixed": ((1, 1, 1), 1),
}
FLOOR = 4
BLOCK, BLOCKS_PER_STATE = 64, 64


def bytes_per_token(
    width: int = 128, item: int = 2, kept: int = 118, key_blocks: int = 1182
) -> dict[str, float]:
    """Bytes per token and head of every pass, small tensors included.

    By default Wan 720p at 90 %, half precision.
    """
    row, mean = width * item, 4 * width / BLOCK
    lists = 4 * kept / BLOCK
    # Parts written, then read to be added up.
    state = 2 * 4 * width * width / (BLOCK * BLOCKS_PER_STATE)
    found: dict[str, float] = {
        name: row * (sum(read) + written) for name, (read, written) in ROWS.items()
    }
    found["block_pool"] += mean
    found["block_pool_state"] += 4 * mean + state  # of k and of v, written, then read to be centred
    # Scores of a few heads stay in cache.
    found["block_select"] = 2 * mean + 2 * 4 * key_blocks / BLOCK + lists
    found["block_sparse_mixed"] += lists
    found["whole call"] = sum(found.values())
    found["floor"] = FLOOR * row
    return {name: round(value, 1) for name, value in found.items()}
