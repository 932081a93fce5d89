"""Node, graph and report as a person sees them, in both themes: nothing clipped, all readable.

ROPESLR_SCREENSHOTS names a folder for what is seen, ROPESLR_LARGE takes a video that is worth
looking at; `python dev.py pictures` sets both for the README's pictures.
"""

import os
import shutil
from pathlib import Path

from PIL import Image

from workflow import TRAINED, TRAINED_SIZE, fresh, load, tiny_workflow, use_trained

NODE = "RoPeSLRSparseAttention"
LARGE, SCREENSHOTS = "ROPESLR_LARGE" in os.environ, os.environ.get("ROPESLR_SCREENSHOTS")
# Every text of the panel with its box, its colour, and the colour that it stands on.
LOOK = """() => {
    const node = app.graph.nodes.find((each) => each.type === "RoPeSLRSparseAttention")
    const root = node.widgets.find((each) => each.name === "ropeslr_panel").element
    const frame = root.querySelector(".ropeslr-body").getBoundingClientRect()
    const box = ({ left, top, right, bottom }) => [left, top, right, bottom]
    const ground = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const colour = getComputedStyle(at).backgroundColor
            if (!/^(transparent|rgba\\(.*, 0\\))$/.test(colour)) return colour
        }
    }
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true })
    const rgb = (colours) => {
        canvas.clearRect(0, 0, 1, 1)
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1) }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
    }
    const texts = []
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT)
    while (walker.nextNode()) {
        const parent = walker.currentNode.parentElement
        if (parent.closest("option") || !walker.currentNode.data.trim()) continue
        const range = document.createRange()
        range.selectNodeContents(walker.currentNode)
        const behind = ground(parent)
        texts.push({
            text: walker.currentNode.data, box: box(range.getBoundingClientRect()),
            colours: [rgb([behind, getComputedStyle(parent).color]), rgb([behind])],
        })
    }
    const around = root.parentElement.getBoundingClientRect()
    return { frame: box(frame), around: box(around), texts }
}"""


def luminance(colour):
    parts = [each / 255 for each in colour]
    red, green, blue = (
        each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    """Contrast as WCAG 2 defines it, 1 to 21; 4.5 is what small text needs."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def check(look, node):
    """Nothing in the panel is clipped or overlapped, and every text contrasts with its background.

    node: its position.
    """
    left, top, right, bottom = look["frame"]
    for i, each in enumerate(look["texts"]):
        x, y, end, low = each["box"]
        assert left <= x and end <= right + 1 and top <= y and low <= bottom + 1, f"clipped: {each}"
        assert contrast(*each["colours"]) >= 4.5, f"hard to read: {each}"
        for other in look["texts"][:i]:
            a, b, c, d = other["box"]
            apart = min(end, c) - max(x, a) < 1 or min(low, d) - max(y, b) < 1
            assert apart, f"{each['text']!r} over {other['text']!r}"
    x, y, end, low = look["around"]
    assert x <= left + 1 and right <= end + 1 and bottom <= low + 1, (
        f"the panel leaves its place: {look}"
    )
    edge = node["y"] + node["height"]
    # Buttons stand below.
    assert bottom <= edge <= bottom + 90, f"the node ends at {edge}, its panel at {bottom}"


def runnable(server, name, steps):
    """A workflow with tiny checkpoints.

    For pictures that are kept, a trained one and a video that is worth looking at.
    """
    size = TRAINED_SIZE if LARGE else dict(width=128, height=128, length=9)
    small = tiny_workflow(
        load(name), server.get("/object_info"), **size, steps=steps if LARGE else 2
    )
    if not LARGE:
        return fresh(small)
    shutil.copy(TRAINED, server.base / "models" / "diffusion_models")
    return fresh(use_trained(small))


def keep(name, png):
    """In the folder that wants it."""
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        (Path(SCREENSHOTS) / f"{name}.png").write_bytes(png)


def looked_at(shown, name):
    """The node in both themes, checked and kept."""
    for theme in ("dark", "light"):
        shown.theme(theme)
        png = shown.show(NODE)
        look = shown.page.evaluate(LOOK)
        check(look, shown.place(NODE))
        keep(f"node_{shown.renderer}_{theme}{name}", png)
    shown.theme("dark")
    return [each["text"] for each in look["texts"]]


def test_the_node_before_and_after_a_run(shown, server):
    shown.drop("wan2.1_t2v", load("wan2.1_t2v"))
    assert "attention FLOPs saved" in looked_at(shown, "")
    shown.drop("wan2.1_t2v", runnable(server, "wan2.1_t2v", 10))
    shown.run()
    assert any(text.startswith("Last run") for text in looked_at(shown, "_done"))
    shown.fit()
    keep(f"graph_{shown.renderer}", shown.picture())


def test_the_report_is_a_picture_on_its_node(shown, server):
    shown.drop("dense_vs_sparse", runnable(server, "dense_vs_sparse", 10))
    outputs = shown.run()
    (report,) = (node["id"] for node in shown.nodes() if node["type"] == "RoPeSLRReport")
    (saved,) = outputs[str(report)]["images"]
    path = server.base / "temp" / saved["subfolder"] / saved["filename"]
    assert Image.open(path).size == (1700, 850)
    keep("report", path.read_bytes())
    assert any(text.startswith("Last run") for text in looked_at(shown, "_compared"))
    shown.fit()
    keep(f"dense_vs_sparse_{shown.renderer}", shown.picture())
    assert shown.dialogs() == ""
