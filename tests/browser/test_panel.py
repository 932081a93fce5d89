"""The panel in a real browser: follows the slider at once, asks no server, shows the run."""

import pytest

from workflow import fresh, load, tiny_workflow

PANEL = """() => {
    const node = app.graph.nodes.find((each) => each.type === "RoPeSLRSparseAttention")
    return node.widgets.find((each) => each.name === "ropeslr_panel").element.innerText
}"""
# Set a widget as a slider does, and wait in steps of one frame for the panel's text to change.
MOVE = """async ([name, value]) => {
    const node = app.graph.nodes.find((each) => each.type === "RoPeSLRSparseAttention")
    const panel = node.widgets.find((each) => each.name === "ropeslr_panel").element
    const widget = node.widgets.find((each) => each.name === name)
    const before = panel.innerText, started = performance.now()
    widget.value = value
    widget.callback?.(value, app.canvas, node)
    while (panel.innerText === before && performance.now() - started < 5000) {
        await new Promise((done) => requestAnimationFrame(done))
    }
    return [panel.innerText, panel.innerText !== before]
}"""

# Link an output of a new node to an input of the latent's node, and wait for the panel; -> the
# panel's text.
LINK = """async ([type, values, output, input, wanted]) => {
    const latent = app.graph.nodes.find((each) => each.type === "EmptyHunyuanLatentVideo")
    const source = LiteGraph.createNode(type)
    app.graph.add(source)
    for (const [name, value] of Object.entries(values)) source.widgets.find((each) => each.name === name).value = value
    source.connect(source.outputs.findIndex((each) => each.name === output), latent, latent.findInputSlot(input))
    const node = app.graph.nodes.find((each) => each.type === "RoPeSLRSparseAttention")
    const panel = node.widgets.find((each) => each.name === "ropeslr_panel").element
    for (let i = 0; i < 300 && !panel.innerText.includes(wanted); i++) {
        await new Promise((done) => requestAnimationFrame(done))
    }
    return panel.innerText
}"""
# What the server would send after a run, from anywhere; -> the panel's text two frames later.
REPORT = """async (detail) => {
    const node = app.graph.nodes.find((each) => each.type === "RoPeSLRSparseAttention")
    const whole = { node: String(node.id), sparsity: 0.9, sparse_calls: 4, dense_calls: {}, ...detail }
    app.api.dispatchEvent(new CustomEvent("ropeslr.report", { detail: whole }))
    for (let i = 0; i < 2; i++) await new Promise((done) => requestAnimationFrame(done))
    return node.widgets.find((each) => each.name === "ropeslr_panel").element.innerText
}"""


def test_it_follows_the_slider_and_asks_nobody(shown):
    shown.drop("wan2.1_t2v", load("wan2.1_t2v"))
    first = shown.page.evaluate(PANEL)
    assert "Keeps 204 of 2,048 blocks" in first and "attention FLOPs saved" in first
    asked = []
    shown.page.on("request", lambda request: asked.append(request.url))
    text, changed = shown.page.evaluate(MOVE, ["sparsity", 0.5])
    assert changed and "Keeps 1,024 of 2,048 blocks" in text
    text, changed = shown.page.evaluate(MOVE, ["sparsity", 0.0])
    assert changed and "FLOPs saved" not in text
    assert shown.page.evaluate(MOVE, ["sparsity", 0.9])[0] == first
    assert not [url for url in asked if "ropeslr" in url.lower() or "/prompt" in url]
    saved = next(
        node for node in shown.saved()["nodes"] if node["type"] == "RoPeSLRSparseAttention"
    )
    wanted = next(
        node for node in load("wan2.1_t2v")["nodes"] if node["type"] == "RoPeSLRSparseAttention"
    )
    assert saved["widgets_values"] == wanted["widgets_values"]  # the panel is in none of them


def test_a_report_finds_its_workflow_though_another_is_open(shown, server):
    """Nodes of two workflows often bear the same number."""
    small = fresh(
        tiny_workflow(load("wan2.1_t2v"), server.get("/object_info"), 128, 128, length=9, steps=2)
    )
    another = fresh(load("wan2.1_t2v"))
    shown.drop("mine", small)
    shown.page.evaluate("""() => {
        window.ropeslrHeard = false
        app.api.addEventListener("ropeslr.report", () => { window.ropeslrHeard = true }, { once: true })
        app.queuePrompt(0)
    }""")
    shown.drop("another", another)
    shown.page.wait_for_function("() => window.ropeslrHeard")
    shown.settle()
    assert "Last run" not in shown.page.evaluate(PANEL)
    shown.drop("mine", small)
    assert "Last run" in shown.page.evaluate(
        PANEL
    ) and "with other settings" not in shown.page.evaluate(PANEL)
    shown.drop("another", another)
    assert "Last run" not in shown.page.evaluate(PANEL)
    if shown.renderer == "classic":  # loading the page again takes long
        shown.open()
        shown.drop("mine", small)
        assert "Last run" in shown.page.evaluate(
            PANEL
        ) and "with other settings" not in shown.page.evaluate(PANEL)


def test_a_linked_size_is_that_of_the_very_output(shown):
    """With the frontend's own nodes, whose widgets and outputs are named as in that release."""
    shown.drop("wan2.1_t2v", fresh(load("wan2.1_t2v")))
    camera = {"width": 1280, "height": 720, "length": 33}
    for name, text in (("length", "832 × 480, 33 frames"), ("width", "1280 × 480, 33 frames")):
        assert text in shown.page.evaluate(LINK, ["WanCameraEmbedding", camera, name, name, text])
    text = "1280 × 480, 5 frames"
    assert text in shown.page.evaluate(LINK, ["PrimitiveInt", {"value": 5}, "INT", "length", text])
    text, math = "1280 × 480, 81 frames", {"expression": "5 * 16 + 1"}
    assert text in shown.page.evaluate(LINK, ["ComfyMathExpression", math, "INT", "length", text])


def test_an_unknown_size_is_asked_for_then_that_of_the_last_run(shown):
    workflow = fresh(load("wan2.1_t2v"))
    shown.drop("wan2.1_t2v", workflow)
    asked = "does not say how large the video is"
    assert asked in shown.page.evaluate(LINK, ["GetImageSize", {}, "width", "width", asked])
    assert "Last run" in shown.page.evaluate(REPORT, {"workflow": workflow["id"], "tokens": 32760})
    text, _ = shown.page.evaluate(MOVE, ["sparsity", 0.5])
    assert "32,760 tokens, as in the last run" in text and "Keeps 1,024 of 2,048 blocks" in text


def test_a_report_of_nobody_or_of_a_workflow_elsewhere_is_not_shown(shown):
    workflow = fresh(load("wan2.1_t2v"))
    shown.drop("wan2.1_t2v", workflow)
    for foreign in ({}, {"workflow": None}, {"workflow": "00000000-1111-2222-3333-444444444444"}):
        assert "Last run" not in shown.page.evaluate(REPORT, foreign)
    assert "Last run" in shown.page.evaluate(REPORT, {"workflow": workflow["id"]})


def test_the_help_page_is_shown_with_its_picture(shown):
    shown.drop("wan2.1_t2v", load("wan2.1_t2v"))
    shown.show("RoPeSLRSparseAttention")
    node = shown.place("RoPeSLRSparseAttention")
    shown.page.mouse.click(node["x"] + 150, node["y"] + 12)
    shown.page.locator("[data-testid=info-button]").first.click()
    page = shown.page.locator(".node-help-content")
    page.get_by_text("Start here").wait_for()
    shown.page.wait_for_function(
        "() => document.querySelector('.node-help-content img')?.naturalWidth > 100"
    )
    assert "Share of key blocks that are NOT computed" in page.inner_text()


def test_the_doctor_writes_on_its_own_node(shown):
    """Only the examination is left out, which takes its time."""
    text = shown.page.evaluate("""() => {
        const node = LiteGraph.createNode("RoPeSLRDoctor")
        app.graph.add(node)
        node.onExecuted({ text: ["Machine", "all is well"] })
        const widget = node.widgets.find((each) => each.name === "ropeslr_text")
        const last = [widget.element.textContent, node.serialize().widgets_values.length, widget.serialize]
        app.graph.remove(node)
        return last
    }""")
    assert text == ["Machine\nall is well", 6, False]


def test_after_a_run_it_tells_what_happened(shown, server):
    small = fresh(
        tiny_workflow(load("wan2.1_t2v"), server.get("/object_info"), 128, 128, length=9, steps=3)
    )
    shown.drop("wan2.1_t2v", small)
    assert "Last run" not in shown.page.evaluate(PANEL)
    shown.run()
    text = shown.page.evaluate(PANEL)
    assert "Last run" in text and "4 of 6 calls" in text and "dense first steps" in text
    assert " per call" in text and "Measured: a sparse call" in text
    shown.fit()
    shown.screenshot(f"panel_{shown.renderer}_done")


# Put a LoRA of some name before the node, wait for the panel's offer, take it; -> text before it, text after, values.
OFFER = """async (file) => {
    const node = app.graph.nodes.find((each) => each.type === "RoPeSLRSparseAttention")
    const link = app.graph.links[node.inputs.find((each) => each.name === "model").link] ??
        app.graph.links.get(node.inputs.find((each) => each.name === "model").link)
    const source = app.graph.getNodeById(link.origin_id), slot = link.origin_slot
    const lora = LiteGraph.createNode("LoraLoaderModelOnly")
    app.graph.add(lora)
    lora.widgets.find((each) => each.name === "lora_name").value = file
    source.connect(slot, lora, 0)
    lora.connect(0, node, node.findInputSlot("model"))
    const panel = node.widgets.find((each) => each.name === "ropeslr_panel").element
    const until = async (ready) => {
        for (let i = 0; i < 300 && !ready(); i++) await new Promise((done) => requestAnimationFrame(done))
    }
    await until(() => panel.querySelector("button"))
    const before = panel.innerText
    panel.querySelector("button").click()
    await until(() => !panel.querySelector("button"))
    const value = (name) => node.widgets.find((each) => each.name === name).value
    return [before, panel.innerText, ["method", "sparsity", "block_order", "dense_first_steps"].map(value)]
}"""


def test_the_settings_of_a_lora_that_was_trained_sparse_are_one_click(shown):
    shown.drop("wan2.1_t2v", fresh(load("wan2.1_t2v")))
    file = "minimax_h3_fl2v_turbo_4step_v0.1_768p_sla_comfyui_bf16.safetensors"
    before, after, values = shown.page.evaluate(OFFER, file)
    assert "MiniMax H3 Turbo-SLA" in before and "sparsity 0.85" in before
    assert "Turbo-SLA" not in after
    assert values == ["top-k plain", 0.85, "raster", 0]


@pytest.mark.parametrize(
    "name, told, small, ran",
    [
        (
            "minimax_h3_t2v",
            ["MiniMax H3 · 864 × 480, 124 frames", "19 of 20 steps sparse"],
            "MiniMax H3 · 128 × 128, 9 frames",
            ["2 of 4 calls sparse", "2 dense: dense first steps"],
        ),
        (
            "ltx2_two_stage_t2v",
            ["LTX-2 · 1280 × 704, 121 frames", "3 of 3 steps sparse"],
            "LTX-2 · 256 × 256, 9 frames",
            ["6 of 6 calls sparse"],
        ),
    ],
    ids=["minimax_h3_t2v", "ltx2_two_stage_t2v"],
)
def test_models_with_sound_show_the_size_of_the_video_and_then_its_run(
    shown, server, shipped, name, told, small, ran
):
    """Pictures and sound travel in one latent; of two stages the larger counts."""
    workflow = shipped(name)
    shown.drop(name, workflow)
    text = shown.page.evaluate(PANEL)
    assert all(each in text for each in told), text
    shown.drop(
        name,
        fresh(tiny_workflow(workflow, server.get("/object_info"), 128, 128, length=9, steps=2)),
    )
    text = shown.page.evaluate(PANEL)
    assert small in text and "Last run" not in text, text
    shown.run()
    text = shown.page.evaluate(PANEL)
    assert "Last run" in text and all(each in text for each in ran), text
    assert "with other settings" not in text
    shown.show("RoPeSLRSparseAttention")
    shown.screenshot(f"panel_{name}_{shown.renderer}_done")
