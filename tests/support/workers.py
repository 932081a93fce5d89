"""A worker of Raylight's, on gloo: `python workers.py RANK SIZE FOLDER`; each saves what it makes.

Where Raylight can be imported (with xfuser 0.4.5 and yunchang), its own code spreads the models over
the processes, else a stand-in of the same form. Raylight's worker itself needs a GPU to begin with.
"""

from __future__ import annotations

import builtins
import importlib.util
import logging
import marshal
import os
import sys
import types
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "tools")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402


def sent(function) -> bytes:
    """A function as Ray sends it that cannot be imported elsewhere: its code and what it encloses."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return marshal.dumps((function.__code__, cells))


def received(message: bytes):
    """The same function again, which has nothing of its module."""
    code, cells = marshal.loads(message)
    closure = tuple(types.CellType(each) for each in cells)
    return types.FunctionType(code, {"__builtins__": builtins}, closure=closure)


def raylight_is_here() -> bool:
    return importlib.util.find_spec("raylight") is not None


def spread_out(rank: int, size: int):
    """-> a function that spreads a MODEL over the processes; guided: prompts instead of tokens."""
    if not raylight_is_here():
        from support import spread

        for name in ("xfuser", "xfuser.core"):
            sys.modules[name] = types.ModuleType(name)
        own = [dist.new_group([each]) for each in range(size)][rank]

        def stand_in(model, guided: bool) -> None:
            groups = (own, dist.group.WORLD) if guided else (dist.group.WORLD, None)
            distributed = spread.stand_in_for_xfuser(*groups)
            sys.modules["xfuser.core.distributed"] = distributed
            sys.modules["xfuser.core"].distributed = distributed
            if guided:
                spread.spread_prompts(model)
            else:
                spread.spread(model.model.diffusion_model)

        return stand_in

    import yunchang  # noqa: F401  before it is told that there is a GPU

    available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    import raylight  # noqa: F401

    torch.cuda.is_available = available
    from comfy.patcher_extension import CallbacksMP
    from raylight.distributed_modules.usp import USPInjectRegistry
    from raylight.distributed_worker.parallel_group_manager import initialize_xfuser_parallel

    degrees = dict(ulysses_degree=size, ring_degree=1, cfg_degree=1, pp_degree=1)
    attention = dict(is_xdit=True, attention="TORCH_MATH", sync_ulysses=False)
    initialize_xfuser_parallel(rank, size, attention | degrees)
    return lambda model, _: model.add_callback(CallbacksMP.ON_LOAD, USPInjectRegistry.inject)


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["ROPESLR_TEST_BASE"] = str(folder / f"base{rank}")
    logging.basicConfig(level=logging.ERROR)
    import comfy_host

    comfy_host.boot()
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    spread = spread_out(rank, size)
    from support.data.variants import VARIANTS

    found = {}
    for name, job in torch.load(folder / "jobs.pt", weights_only=False).items():
        variant = VARIANTS[job["variant"]]
        model = variant.model().clone()
        spread(model, job["guided"])
        model = received(job["work"])(model, job["request"])
        if job.get("breaks") == rank:
            _break_one(model)
        out = variant.sample(model, variant.odd, cfg=5.0)
        last = model.get_attachment("ropeslr").last_report
        found[name] = out, last.sparse_calls, dict(last.dense_calls)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _break_one(model) -> None:
    """Let this process's third sparse output hold a NaN."""
    run = sys.modules[type(model.get_attachment("ropeslr")).__module__].AttentionRun
    attend, calls = run.attend, []

    def broken(self, q, k, v, call):
        out, cost = attend(self, q, k, v, call)
        calls.append(call)
        return (out * torch.nan if len(calls) == 3 else out), cost

    run.attend = broken


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
