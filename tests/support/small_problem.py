"""A problem that is trained in milliseconds: two factors of a matrix, learned from noisy inputs.

As a program, `python small_problem.py RANK SIZE FOLDER`, one of several processes that train it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "tools")]

import torch  # noqa: E402

from pack_loader import load  # noqa: E402

training = load(".training")
WIDTH = 6
MATERIAL = training.Material(9, (1.0, 0.8, 0.5, 0.2), seed=3)
FACTS = {"learning_rate": 0.02}


class Problem:
    """`up @ down` is to be a fixed matrix; without them the error is its own size.

    pause: seconds that a loss takes beside.
    """

    def __init__(self, pause: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.goal = torch.randn(WIDTH, WIDTH, generator=generator)
        self.up = torch.nn.Parameter(torch.zeros(WIDTH, 4))
        self.down = torch.nn.Parameter(torch.randn(4, WIDTH, generator=generator))
        self.parameters = {"up": self.up, "down": self.down}
        self.pause = pause
        self.seen = []  # numbers of the examples that were trained on

    def inputs(self, example):
        generator = torch.Generator().manual_seed(example.seed)
        return example.level * torch.randn(12, WIDTH, generator=generator) + example.latent

    def loss(self, example):
        time.sleep(self.pause)
        if example.number > 0:
            self.seen.append(example.number)
        x = self.inputs(example)
        return (x @ self.up @ self.down - x @ self.goal).square().mean()

    def untrained_loss(self, example):
        return (self.inputs(example) @ self.goal).square().mean()


class Watch:
    """Remembers what it is shown. ticks: after so many, raise Stop; path: where states go."""

    def __init__(self, path: Path | None = None, ticks: int = -1) -> None:
        self.path, self.ticks = path, ticks
        self.saves = 0

    def tick(self, _):
        self.ticks -= 1
        if self.ticks == 0:
            raise Stop

    def judged(self, _):
        pass

    def save(self, state):
        self.saves += 1
        if self.path is not None:
            training.write_state(state, self.path)


class Stop(Exception):
    """A person's button."""


def settings(**more):
    known = dict(
        steps=24, batch_size=2, learning_rate=0.02, evaluate_every=6, save_every=4, patience=0
    )
    return training.TrainSettings(**(known | more))


def make(problem=None, watch=None, state=None, **more):
    """A training of the problem, from its beginning or from a state."""
    problem = problem or Problem()
    found = training.Training(
        problem, problem.parameters, MATERIAL, settings(**more), watch or Watch()
    )
    found.begin_with(state or training.State(dict(FACTS)))
    return found


def main(rank: int, size: int, folder: Path) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    watch, problem = Watch(folder / "shared.state"), Problem()
    run = make(problem, watch, batch_size=2, grad_accumulation_steps=2)
    outcome = run.run()
    found = {"best": outcome.parameters, "errors": run.state.errors, "losses": run.state.losses}
    torch.save(found | {"saves": watch.saves, "seen": problem.seen}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
