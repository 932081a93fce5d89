"""A real browser on a real server: drops, queues, saves and photographs workflows.

Debian's Chromium, or any other, driven by playwright; playwright's own download is never used.
ROPESLR_CHROMIUM names the program where it is not found by itself, ROPESLR_SCREENSHOTS a folder for
pictures of what the tests see.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:  # playwright is only there where a browser is driven
    from playwright.sync_api import FloatRect, Page

SECONDS = 1000  # playwright counts in milliseconds
PATIENCE = 120 * SECONDS  # a busy machine takes many times the usual two seconds to load the page
PICTURE_WIDTHS, PICTURE_BYTES = (1600, 1440, 1280, 1120, 960, 800), 70_000
# Nothing is to cover the canvas: no tour, no template browser, no floating tools.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.47.12",
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.RightSidePanel.IsOpen": False,
    "Comfy.Workflow.Persist": False,
    "Comfy.Validation.Workflows": True,
    "Comfy.Workflow.ConfirmDelete": False,
}
DROP = """([name, text]) => {
    const canvas = document.querySelector("#graph-canvas")
    const carried = new DataTransfer()
    carried.items.add(new File([text], name, { type: "application/json" }))
    const at = { bubbles: true, cancelable: true, dataTransfer: carried, clientX: 900, clientY: 500 }
    for (const kind of ["dragenter", "dragover", "drop"]) canvas.dispatchEvent(new DragEvent(kind, at))
}"""
DIALOGS = ".p-dialog:visible, .p-toast-message:visible, [role=dialog]:visible, [data-testid=error-overlay]:visible"
# Until no node has changed its size for some frames, and everything that was asked of the canvas is
# drawn.
SETTLE = """() => new Promise((done) => {
    let before = "", same = 0
    const look = () => {
        const now = JSON.stringify([
            app.graph.nodes.map((node) => [...node.boundingRect]), app.canvas.ds.scale, app.canvas.ds.offset,
            document.querySelectorAll("canvas, video, textarea, [data-node-id]").length,
        ])
        same = now === before ? same + 1 : 0
        before = now
        same === 12 ? done(true) : requestAnimationFrame(look)
    }
    look()
})"""
# Where nodes of a type, or with null the whole graph, lie on the page.
PLACE = """([type, margin]) => {
    const shown = type ? app.graph.nodes.filter((each) => each.type === type).slice(0, 1)
        : [...app.graph.nodes, ...app.graph.groups]
    const boxes = shown.map((each) => each.boundingRect)
    const ds = app.canvas.ds, view = document.querySelector("#graph-canvas").getBoundingClientRect()
    const x = (value) => view.x + (value + ds.offset[0]) * ds.scale
    const y = (value) => view.y + (value + ds.offset[1]) * ds.scale
    const left = x(Math.min(...boxes.map((b) => b[0]))) - margin
    const top = y(Math.min(...boxes.map((b) => b[1]))) - margin
    return {
        x: left, y: top, width: x(Math.max(...boxes.map((b) => b[0] + b[2]))) + margin - left,
        height: y(Math.max(...boxes.map((b) => b[1] + b[3]))) + margin - top,
    }
}"""
# What stands on the canvas: each node's box with its title, its size and the size that it needs at
# least.
SEEN = """() => app.graph.nodes.map((node) => ({
    id: node.id, type: node.type, missing: !LiteGraph.registered_node_types[node.type],
    box: [...node.boundingRect], size: [...node.size], least: [...node.computeSize()],
}))"""


def find_chromium() -> str | None:
    """The program, or None without Chromium; dev.py looks further and sets ROPESLR_CHROMIUM."""
    return (
        os.environ.get("ROPESLR_CHROMIUM")
        or shutil.which("chromium")
        or shutil.which("google-chrome")
    )


@dataclass
class Window:
    """One page of a browser with ComfyUI in it, and what went wrong in it."""

    page: Page
    url: str
    errors: list[str] = field(default_factory=list)

    def open(self, vue: bool = False) -> None:
        """Load ComfyUI with an empty canvas, in the classic renderer or with Vue nodes."""
        from playwright.sync_api import TimeoutError

        for name, value in {**SETTINGS, "Comfy.VueNodes.Enabled": vue}.items():
            body = json.dumps(value).encode()
            request = urllib.request.Request(
                f"{self.url}/api/settings/{name}", body, {"Content-Type": "application/json"}
            )
            urllib.request.urlopen(request, timeout=60).close()
        self.page.goto(self.url, timeout=PATIENCE)
        self.page.wait_for_function(
            "() => window.LiteGraph?.registered_node_types.RoPeSLRSparseAttention && "
            "window.app?.graph?.nodes",
            timeout=PATIENCE,
        )
        try:
            self.page.wait_for_function("() => app.graph.nodes.length", timeout=PATIENCE // 8)
        except TimeoutError:
            # The default workflow stands on the canvas last; older frontends have none.
            pass
        self.settle()
        if self.page.evaluate("() => LiteGraph.vueNodesMode === true") != vue:
            raise RuntimeError(f"the page did not take Comfy.VueNodes.Enabled = {vue}")

    def drop(self, name: str, workflow: dict) -> list[dict]:
        """Drop a file as a person does; -> the nodes that stand on the canvas then."""
        self.page.evaluate(DROP, [f"{name}.json", json.dumps(workflow)])
        self.page.wait_for_function(
            "([id, count]) => app.graph.id === id && app.graph.nodes.length === count",
            arg=[workflow["id"], len(workflow["nodes"])],
            timeout=PATIENCE,
        )
        self.settle()  # nodes grow and widgets appear a few frames later
        return self.nodes()

    def settle(self) -> None:
        """Wait until the canvas has come to rest."""
        self.page.evaluate(SETTLE)

    def theme(self, name: str) -> None:
        """Change the colours: dark, light, or another of ComfyUI's palettes."""
        self.page.evaluate(
            "(name) => app.extensionManager.setting.set('Comfy.ColorPalette', name)", name
        )
        self.settle()

    def show(self, type_: str, margin: int = 12) -> bytes:
        """The first node of a type at its full size, as PNG."""
        self.page.evaluate(
            """(type) => {
            const [x, y] = app.graph.nodes.find((each) => each.type === type).boundingRect, ds = app.canvas.ds
            ds.scale = 1
            ds.offset[0] = 260 - x
            ds.offset[1] = 140 - y
            app.canvas.setDirty(true, true)
        }""",
            type_,
        )
        self.settle()
        return self.page.screenshot(clip=self.place(type_, margin))

    def place(self, type_: str | None = None, margin: int = 0) -> FloatRect:
        """x, y, width, height on the page of the first node of a type, or of the whole graph."""
        return self.page.evaluate(PLACE, [type_, margin])

    def heed(self, message) -> None:
        """Keep what the console says of our scripts.

        An address out of reach is the machine's affair.
        """
        about = f"{message.text} {message.location.get('url')}"
        # A help page falls back to the other.
        asked = "ERR_NAME_NOT_RESOLVED" in about or about.endswith("/en.md")
        if message.type == "error" and "ropeslr" in about.lower() and not asked:
            self.errors.append(message.text)

    def nodes(self) -> list[dict]:
        return self.page.evaluate(SEEN)

    def saved(self) -> dict:
        """What saving would write: as JSON, which leaves out what is undefined."""
        return json.loads(self.page.evaluate("() => JSON.stringify(app.graph.serialize())"))

    def dialogs(self) -> str:
        """The text of dialogs and messages over the canvas."""
        return "\n".join(self.page.locator(DIALOGS).all_inner_texts())

    def wait_for_dialog(self, text: str) -> None:
        """Until a dialog or message has the text; raises when none does."""
        self.page.locator(DIALOGS).filter(has_text=text).first.wait_for()

    def close_dialogs(self) -> None:
        for _ in range(3):
            self.page.keyboard.press("Escape")
            self.settle()
        for button in self.page.locator(".p-toast-close-button:visible").all():
            button.click()

    def run(self) -> dict:
        """Queue the canvas as the button does: -> outputs by node id, when it is done."""
        self.page.evaluate("""() => {
            window.ropeslrDone = null
            const finish = (kind) => (event) => { window.ropeslrDone ??= { kind, detail: event.detail } }
            for (const kind of ["execution_success", "execution_error", "execution_interrupted"]) {
                app.api.addEventListener(kind, finish(kind), { once: true })
            }
        }""")
        self.page.evaluate("async () => { await app.queuePrompt(0) }")
        refused = self.page.evaluate("() => app.lastNodeErrors")
        if refused or self.dialogs():
            raise RuntimeError(f"the server refused the prompt: {refused or self.dialogs()}")
        self.page.wait_for_function("() => window.ropeslrDone", timeout=PATIENCE)
        done = self.page.evaluate("() => window.ropeslrDone")
        if done["kind"] != "execution_success":
            raise RuntimeError(f"{done['kind']}: {done['detail'].get('exception_message')}")
        self.settle()
        return self.page.evaluate("() => app.nodeOutputs")

    def fit(self, room: float = 0.92) -> None:
        """Everything into view, frames and titles included."""
        self.page.evaluate(
            """(room) => {
            const boxes = [...app.graph.nodes, ...app.graph.groups].map((each) => each.boundingRect)
            const left = Math.min(...boxes.map((b) => b[0])), top = Math.min(...boxes.map((b) => b[1]))
            const right = Math.max(...boxes.map((b) => b[0] + b[2]))
            const bottom = Math.max(...boxes.map((b) => b[1] + b[3]))
            const ds = app.canvas.ds, view = document.querySelector("#graph-canvas").getBoundingClientRect()
            ds.scale = room * Math.min(view.width / (right - left), view.height / (bottom - top))
            ds.offset[0] = view.width / 2 / ds.scale - (left + right) / 2
            ds.offset[1] = view.height / 2 / ds.scale - (top + bottom) / 2
            app.canvas.setDirty(true, true)
        }""",
            room,
        )
        self.settle()

    def clear_view(self) -> None:
        """Hide everything but the canvas."""
        self.page.evaluate(
            "async () => await app.extensionManager.command.execute('Workspace.ToggleFocusMode')"
        )
        self.settle()

    def picture(self, margin: int = 16) -> bytes:
        """The graph alone as PNG, cut out of the page; `fit` comes first."""
        return self.page.screenshot(clip=self.place(None, margin))

    def screenshot(self, name: str) -> None:
        """A picture into the folder that ROPESLR_SCREENSHOTS names; nothing without one."""
        folder = os.environ.get("ROPESLR_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder) / f"{name}.png")


@contextmanager
def window(url: str, width: int = 1920, height: int = 1080) -> Iterator[Window]:
    """A browser with one page at a ComfyUI server."""
    from playwright.sync_api import sync_playwright

    program = find_chromium()
    if program is None:
        raise RuntimeError("no Chromium or Chrome was found; ROPESLR_CHROMIUM can name one")
    with sync_playwright() as playwright:
        # Without --no-sandbox Chromium refuses to start as root, as in a container.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(PATIENCE)
            opened = Window(page, url)
            page.on("pageerror", lambda error: opened.errors.append(str(error)))
            page.on("console", opened.heed)
            yield opened
        finally:
            browser.close()


def placeholders(base: Path) -> None:
    """Empty files under the names that workflows ask for: listed by nodes, loaded by nothing."""
    import graphs

    for model in graphs.MODELS.values():
        path = base / "models" / model.directory / model.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    start_image(base / "input" / "example.png")


def start_image(path: Path) -> None:
    """A picture with slow waves of colour, under the name of the one that ComfyUI brings."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        y, x = np.mgrid[0:480, 0:832] / 120
        waves = [np.sin(x + y), np.sin(1.7 * x - y), np.cos(x - 2.3 * y)]
        Image.fromarray((140 + 60 * np.stack(waves, axis=-1)).astype(np.uint8)).save(path)


def take_pictures(
    tree: Path, base: Path, folder: Path, names: list[str], vue: bool = False
) -> None:
    """Write folder/NAME.jpg for shipped workflows, as the canvas shows them with all files there."""
    from comfy_server import ComfyServer
    from workflow import load

    placeholders(base)
    with ComfyServer(tree, base) as server, window(server.url, 2400, 1200) as shown:
        shown.open(vue)
        shown.clear_view()
        for name in names:
            shown.drop(name, load(name))
            shown.close_dialogs()
            shown.fit()
            (folder / f"{name}.jpg").write_bytes(
                _small_jpeg(Image.open(io.BytesIO(shown.picture())))
            )


def readme_pictures(seen: Path, folder: Path) -> None:
    """Put together what tests/browser/test_pictures.py has seen: node, panel, graph and report."""
    parts = {
        "node": (
            "node_classic_dark",
            "node_classic_dark_done",
            "node_vue_light",
            "node_vue_light_done",
        ),
        "panel": ("node_vue_dark_done",),
        "graph": ("graph_vue",),
        "report": ("report",),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, of in parts.items():
        images = [Image.open(seen / f"{each}.png").convert("RGB") for each in of]
        whole = Image.new(
            "RGB",
            (sum(each.width for each in images), max(each.height for each in images)),
            "white",
        )
        left = 0
        for each in images:
            whole.paste(each, (left, 0))
            left += each.width
        (folder / f"{name}.jpg").write_bytes(_small_jpeg(whole))


def _small_jpeg(image: Image.Image) -> bytes:
    """The picture as a JPEG of at most PICTURE_BYTES."""
    image = image.convert("RGB")
    for width in PICTURE_WIDTHS:
        image.thumbnail((width, width), Image.Resampling.LANCZOS)
        for quality in range(88, 55, -4):
            out = io.BytesIO()
            image.save(out, "JPEG", quality=quality, optimize=True, progressive=True)
            if out.tell() <= PICTURE_BYTES:
                return out.getvalue()
    raise RuntimeError(f"the picture does not become smaller than {PICTURE_BYTES} bytes")


if __name__ == "__main__":
    import graphs

    wanted = sys.argv[1:] or ["readme", *graphs.GRAPHS]
    if "readme" in wanted:
        wanted.remove("readme")
        readme_pictures(
            Path(os.environ["ROPESLR_SCREENSHOTS"]), graphs.ROOT / "web" / "docs" / "images"
        )
    if wanted:
        base = Path(os.environ["ROPESLR_TEST_BASE"]) / "pictures"
        take_pictures(Path(os.environ["COMFYUI_PATH"]), base, graphs.FOLDER, wanted)
