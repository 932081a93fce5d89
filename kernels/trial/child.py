"""Kernel variants, one after another, in a process of their own: is it right here, how fast is it?

Run by its path, in a folder of its own: `kernels` on sys.path would hide Python's own `types`. A
JSON object on stdin says what to try (see `tuning.Trial`); each line on stdout is one: {"begin":
number} before a variant, {"number", "error", "ms"} or {"number", "failed"} after it, {"done": true}
at the end.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SMALL = 1000  # tokens of the self-test
SAMPLES = 7


def load_kernels() -> ModuleType:
    """This pack's kernels under a name of their own; no ComfyUI."""
    spec = importlib.util.spec_from_file_location("ropeslr_trial", ROOT / "kernels" / "__init__.py")
    assert spec is not None and spec.loader is not None
    spec.submodule_search_locations = [str(ROOT / "kernels")]
    found = importlib.util.module_from_spec(spec)
    sys.modules["ropeslr_trial"] = found
    spec.loader.exec_module(found)
    return found


def say(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    asked = json.loads(sys.stdin.read())
    load_kernels()
    import torch

    with torch.inference_mode():
        for number, variant in asked["variants"]:
            say(begin=number)
            try:
                say(number=number, **examine(variant, asked))
            except Exception as error:
                first = str(error).partition("\n")[0][:200]
                say(number=number, failed=f"{type(error).__name__}: {first}")
    say(done=True)


def examine(variant: dict, asked: dict) -> dict:
    """Error against the definition on a small case, and milliseconds at the asked size."""
    import torch
    from ropeslr_trial import ops, reference, tuning, types

    device, backend = torch.device(asked["device"]), asked["backend"]
    tuning.put(variant["precision"], variant["rows"], variant["launch"])

    def case(tokens: int, heads: int, kept: float, dtype: torch.dtype) -> tuple:
        generator = torch.Generator(device).manual_seed(0)
        shape = (1, tokens, heads, asked["head_dim"])
        q, k, v = (
            torch.randn(shape, generator=generator, device=device, dtype=dtype).transpose(1, 2)
            for _ in range(3)
        )
        order = torch.arange(tokens, device=device)
        q_blocks, kv_blocks = (
            types.TokenBlocks.cut(order, size) for size in (variant["rows"], asked["key_block"])
        )
        layout = types.BlockLayout(q_blocks, kv_blocks)
        pooled = ops.block_pool(q, q_blocks), ops.block_pool(k, kv_blocks)
        topk = max(1, int(kept * kv_blocks.num_blocks))
        mask, _ = ops.block_select(*pooled, layout, topk, backend=backend)
        return q, k, v, mask, k.float().mean(dim=2)

    def attend(q, k, v, mask, k_mean) -> torch.Tensor:
        """As a run does it: rounding belongs to a call in 8 bits, the keys' means are there."""
        small = None
        if variant["precision"] == "8-bit":
            v_mean = ops.block_pool(v, mask.kv_blocks, backend=backend).mean(dim=2)
            small = ops.quantize_kv(k, v, mask.kv_blocks, k_mean, v_mean, backend=backend)
        return ops.block_sparse_attention(q, k, v, mask, backend=backend, eight_bit=small)[0]

    dtype = getattr(torch, asked["dtype"])
    small_case = case(SMALL, 2, 0.3, dtype)
    found = attend(*small_case).cpu().double()
    q, k, v, mask, _ = small_case
    exact, _ = reference.block_sparse_attention(
        *(x.cpu().double() for x in (q, k, v)), mask.to("cpu")
    )
    error = ((found - exact).norm() / exact.norm()).item()
    if not error <= asked["limits"][variant["precision"]]:  # also NaN
        return {"failed": f"wrong: relative error {error:.1e}"}
    large = case(asked["tokens"], asked["heads"], 1 - asked["sparsity"], dtype)
    samples = []
    for turn in range(SAMPLES + 2):
        _wait(device)
        started = time.perf_counter()
        attend(*large)
        _wait(device)
        if turn > 1:
            samples.append(1e3 * (time.perf_counter() - started))
    return {"error": error, "ms": statistics.median(samples)}


def _wait(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.current_stream(device).synchronize()


if __name__ == "__main__":
    main()
