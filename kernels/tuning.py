"""Which kernel variants may run on this machine's GPU, and which of them is fastest there.

A variant is a precision, a number of query rows, and launch parameters. One is admitted after a
self-test in a child process, where a crash costs the variant and nothing else; of those that are
admitted the fastest measured one wins. What was found is kept in a file, for this GPU, driver,
torch, Triton and version of the pack. Until then the shipped parameters run, in 16 bits.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import triton_support
from .types import EightBit

logger = logging.getLogger(__name__)

PRECISIONS = ("16-bit", "8-bit")
ROWS = (64, 128)
LIMITS = {"16-bit": 2e-2, "8-bit": 6e-2}  # of the self-test's error
WORTH_IT = 0.95  # of the time in 16 bits, that 8 bits may take
VERSION = 1
SECONDS_EACH = 90.0  # for one variant, its compilation included
CHILD = Path(__file__).parent / "trial" / "child.py"

Launch = tuple[int, int, bool]  # warps, stages, lean; see `triton.launch.Launch`


@dataclass(frozen=True)
class Variant:
    """One way to run the forward kernels. launch None: the shipped parameters."""

    precision: str
    rows: int
    launch: Launch | None = None

    @property
    def name(self) -> str:
        how = "as shipped"
        if self.launch is not None:
            how = f"{self.launch[0]} warps, {self.launch[1]} stages"
        return f"{self.precision}, {self.rows} rows, {how}"


@dataclass(frozen=True)
class Outcome:
    """What a trial found: failed says why a variant is not admitted."""

    variant: Variant
    error: float | None = None
    ms: float | None = None
    failed: str | None = None


@dataclass(frozen=True)
class Tuning:
    """What is known of one machine.

    withdrawn: what failed later on, during a run: "8-bit", or "16-bit" for its tuned parameters.
    """

    outcomes: tuple[Outcome, ...] = ()
    withdrawn: tuple[str, ...] = ()

    def best(self, precision: str, rows: int | None = None) -> Outcome | None:
        """The fastest admitted variant of a precision."""
        known = [
            each
            for each in self.outcomes
            if each.ms is not None
            and each.variant.precision == precision
            and rows in (None, each.variant.rows)
            and (precision != "8-bit" or precision not in self.withdrawn)
        ]
        return min(known, key=lambda each: each.ms or 0.0, default=None)

    def eight_bit_pays(self, rows: int | None = None) -> bool:
        """With so many query rows; None: with any."""
        small, usual = self.best("8-bit", rows), self.best("16-bit", rows)
        if small is None or usual is None or small.ms is None or usual.ms is None:
            return False
        return small.ms <= WORTH_IT * usual.ms


@dataclass
class _Here:
    """What this process goes by on one device: nothing until `use` or `put` says more."""

    tuning: Tuning | None = None
    path: Path | None = None
    launches: dict[tuple[str, int], Launch] = field(default_factory=dict)
    withdrawn: set[str] = field(default_factory=set)  # precisions that failed in this process


_devices: dict[str, _Here] = {}


def _on(device: torch.device | None = None) -> _Here:
    """What is known of a device; None: of the current one."""
    name = "cpu"
    if device is None and torch.cuda.is_available():
        name = f"cuda:{torch.cuda.current_device()}"
    elif device is not None and device.type == "cuda":
        index = device.index
        if index is None:
            index = torch.cuda.current_device() if torch.cuda.is_available() else 0
        name = f"cuda:{index}"
    return _devices.setdefault(name, _Here())


def launch_here(precision: str, rows: int) -> Launch | None:
    """Launch parameters that were measured to be best here, None for the shipped ones."""
    return _on().launches.get((precision, rows))


def put(precision: str, rows: int, launch: Sequence[Any] | None) -> None:
    """Go by these parameters on the current device from now on; None: the shipped ones."""
    _set(_on(), precision, rows, launch)


def _set(here: _Here, precision: str, rows: int, launch: Sequence[Any] | None) -> None:
    here.launches.pop((precision, rows), None)
    if launch is not None:
        warps, stages, lean = launch
        here.launches[precision, rows] = int(warps), int(stages), bool(lean)


def prefers_eight_bit(device: torch.device, rows: int) -> bool:
    """Whether 8 bits were measured to be right and faster there, with so many query rows."""
    here = _on(device)
    if device.type != "cuda" or here.tuning is None or "8-bit" in here.withdrawn:
        return False
    return here.tuning.eight_bit_pays(rows)


def works(precision: str, device: torch.device) -> bool:
    """Whether a precision has not failed on a device in this process."""
    return precision not in _on(device).withdrawn


def refuses(device: torch.device, rows: int) -> bool:
    """Whether every 16-bit variant with so many query rows was tried there, and is wrong."""
    tuning = _on(device).tuning
    if tuning is None or tuning.best("16-bit", rows) is not None:
        return False
    return any((x.variant.precision, x.variant.rows) == ("16-bit", rows) for x in tuning.outcomes)


def state(device: torch.device) -> str:
    """In words, for a log line; empty where there is nothing to tune."""
    if device.type != "cuda":
        return ""
    return "tuned" if _on(device).tuning is not None else "not tuned: run RoPeSLR Doctor once"


def withdraw(precision: str, why: str, device: torch.device) -> None:
    """Do without a precision, or (16-bit) without tuned parameters, on a device, for good."""
    here = _on(device)
    if precision not in here.withdrawn:
        logger.warning("RoPeSLR: %s attention failed and is withdrawn: %s", precision, why)
    here.launches = {key: x for key, x in here.launches.items() if key[0] != precision}
    if precision == "8-bit":
        here.withdrawn.add(precision)
    if here.tuning is None or precision in here.tuning.withdrawn:
        return
    here.tuning = replace(here.tuning, withdrawn=(*here.tuning.withdrawn, precision))
    if here.path is not None:
        with contextlib.suppress(OSError):
            save(here.path, here.tuning, device)


# Operations whose calls depend on what was measured.
FORWARD = (
    "dense_attention",
    "block_sparse_attention",
    "block_sparse_mixed",
    "block_sparse_linear",
)


def measured_part(operation: str, arguments: Sequence[object], device: torch.device) -> str | None:
    """What a call could do without: "8-bit", or "16-bit", which stands for tuned parameters."""
    if operation not in FORWARD:
        return None
    if any(isinstance(x, EightBit) for x in arguments):
        return "8-bit"
    return "16-bit" if _on(device).launches else None


def without(part: str, arguments: Sequence[object], device: torch.device) -> list[object]:
    """The same call without it; `withdraw` makes that last."""
    if part == "8-bit":
        return [None if isinstance(x, EightBit) else x for x in arguments]
    _on(device).launches.clear()
    return list(arguments)


def machine_key(device: torch.device) -> str:
    """GPU, driver, torch, Triton and the pack: what a measurement holds for."""
    pack = CHILD.parents[2] / "pyproject.toml"
    version = "unknown"
    with contextlib.suppress(OSError):
        lines = pack.read_text(encoding="utf-8").splitlines()
        version = next((x.split('"')[1] for x in lines if x.startswith("version")), version)
    gpu, driver = "cpu", "none"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = f"{properties.name} sm_{properties.major}{properties.minor}"
        driver = _driver()
    triton = " ".join(triton_support.installed_triton() or ("no triton",))
    return " | ".join((gpu, driver, f"torch {torch.__version__}", triton, f"pack {version}"))


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return f"cuda {torch.version.cuda or torch.version.hip}"
    return f"driver {done.stdout.strip().partition(chr(10))[0]}"


def use(path: Path, device: torch.device) -> str:
    """Go by what a file says of this machine: -> what that is, in words."""
    here = _on(device)
    here.tuning, here.path, here.launches = None, path, {}
    try:
        known = read(path)
    except FileNotFoundError:
        return "not tuned"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{path.name} cannot be read ({error}) and is ignored"
    found = known.get(machine_key(device))
    if found is None:
        return f"{path.name} is of another GPU, driver, torch, Triton or pack, and is ignored"
    here.tuning = found
    for precision in PRECISIONS:
        for rows in ROWS:
            best = found.best(precision, rows)
            if best is not None and precision not in found.withdrawn:
                _set(here, precision, rows, best.variant.launch)
    return "tuned"


def read(path: Path) -> dict[str, Tuning]:
    """All machines in a file. Raises ValueError, TypeError or KeyError for any other contents."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(whole, dict) or whole.get("version") != VERSION:
        raise ValueError(f"expected version {VERSION}")
    if not isinstance(whole["machines"], dict):
        raise ValueError("expected machines by name")
    return {key: _tuning_of(value) for key, value in whole["machines"].items()}


def _tuning_of(value: dict) -> Tuning:
    outcomes = []
    for each in value["outcomes"]:
        own = each["variant"]
        launch = own["launch"]
        if launch is not None:
            warps, stages, lean = launch
            if not (warps in (1, 2, 4, 8, 16) and 1 <= stages <= 12 and isinstance(lean, bool)):
                raise ValueError(f"launch {launch}")
            launch = warps, stages, lean
        if own["precision"] not in PRECISIONS or own["rows"] not in ROWS:
            raise ValueError(f"variant {own}")
        ms = each["ms"]
        if ms is not None and not 0 < float(ms) < float("inf"):
            raise ValueError(f"ms {ms}")
        variant = Variant(own["precision"], own["rows"], launch)
        outcomes.append(Outcome(variant, each["error"], ms, each["failed"]))
    return Tuning(tuple(outcomes), tuple(map(str, value["withdrawn"])))


def save(path: Path, tuning: Tuning, device: torch.device) -> None:
    """Write what was found of this machine, beside what the file knows of others."""
    machines: dict[str, Tuning] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        machines = read(path)
    machines[machine_key(device)] = tuning
    whole = {"version": VERSION, "machines": {key: asdict(x) for key, x in machines.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


@dataclass(frozen=True)
class Trial:
    """What a child is asked: a size, and how right is right."""

    device: str
    tokens: int
    heads: int = 8
    head_dim: int = 128
    sparsity: float = 0.9
    key_block: int = 16
    dtype: str = "bfloat16"
    backend: str = "triton"
    limits: dict[str, float] = field(default_factory=lambda: dict(LIMITS))


def run_trials(
    variants: Sequence[Variant],
    trial: Trial,
    progress: Callable[[int, int], None] = lambda done, of: None,
    seconds_each: float = SECONDS_EACH,
    command: Sequence[str] = (sys.executable, str(CHILD)),
) -> Tuning:
    """Try every variant in child processes; one that crashes or hangs costs its child alone."""
    waiting, outcomes = dict(enumerate(variants)), dict[int, Outcome]()
    while waiting:
        before = len(outcomes)
        for number, outcome in _one_child(waiting, trial, seconds_each, command):
            outcomes[number] = outcome
            waiting.pop(number, None)
            progress(len(outcomes), len(variants))
        if len(outcomes) == before:  # not even a first variant was begun
            for number, variant in waiting.items():
                outcomes[number] = Outcome(variant, failed="the trial process does not start")
            break
    return Tuning(tuple(outcomes[number] for number in sorted(outcomes)))


def _one_child(
    waiting: dict[int, Variant], trial: Trial, seconds_each: float, command: Sequence[str]
):
    """Outcomes of one child, until it ends, crashes or takes too long."""
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert child.stdin is not None and child.stdout is not None
    asked = asdict(trial) | {"variants": [[n, asdict(each)] for n, each in waiting.items()]}
    with contextlib.suppress(OSError):
        child.stdin.write(json.dumps(asked))
        child.stdin.close()
    lines: queue.Queue[str] = queue.Queue()
    output = child.stdout

    def listen() -> None:
        for line in output:
            lines.put(line)
        lines.put("")

    threading.Thread(target=listen, daemon=True).start()
    current: int | None = None
    try:
        while True:
            try:
                line = lines.get(timeout=seconds_each)
            except queue.Empty:
                if current is not None:
                    failed = f"took longer than {seconds_each:g} s"
                    yield current, Outcome(waiting[current], failed=failed)
                return
            said = _parsed(line)
            if "begin" in said:
                current = said["begin"]
            elif "number" in said:
                found = {name: said.get(name) for name in ("error", "ms", "failed")}
                yield said["number"], Outcome(waiting[said["number"]], **found)
                current = None
            elif "done" in said or not line:
                if current is not None:
                    try:
                        failed = f"its process ended with {child.wait(timeout=60)}"
                    except subprocess.TimeoutExpired:
                        failed = "its process does not end"
                    yield current, Outcome(waiting[current], failed=failed)
                return
    finally:
        child.kill()
        child.wait()


def _parsed(line: str) -> dict:
    """A line of a child; compilers may print others."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def short_list(device: torch.device) -> list[Variant]:
    """The variants that are worth a trial: as shipped, and with one stage more."""
    from .triton import launch  # not where Triton is missing: nobody asks there

    found = []
    for precision in PRECISIONS:
        for rows in ROWS:
            with torch.cuda.device(device):
                shipped = launch.shipped(precision, rows)
            found.append(Variant(precision, rows))
            other = shipped.warps, shipped.stages + 1, shipped.lean
            found.append(Variant(precision, rows, other))
    return found
