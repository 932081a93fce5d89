// All that the panel shows, from a graph, the node's own properties and its last report.

import assert from "node:assert/strict";
import { test } from "node:test";
import { panelState } from "../../web/js/panel_state.js";
import { presetAround } from "../../web/js/presets.js";
import { EMPTY, graphOf, KSAMPLER, LATENT, LINKED, LOADER, MODEL } from "./small_graphs.mjs";

const SETTINGS = { sparsity: 0.9, method: "auto", min_tokens: 4096, dense_layers: "" };
const OURS = ["RoPeSLRSparseAttention", { model: MODEL, sparsity: "FLOAT" }, [MODEL], SETTINGS];
const WIRES = [[1, 0, 2, "model"], [2, 0, 3, "model"], [4, 0, 3, "latent_image"]];
const report = (more = {}) => ({
  detail: { node: "2", sparsity: 0.9, tokens: 32760, ...more }, number: 1, status: "new", basis: "",
});

/** Our node in a plain graph; `latent` makes its latent, `more` are further nodes, `wires` their links. */
function plain({ latent = EMPTY, properties = {}, more = {}, wires = [], loader = LOADER } = {}) {
  const { graph, node } = graphOf({ 1: loader, 2: OURS, 3: KSAMPLER, 4: latent, ...more }, [...WIRES, ...wires]);
  node(2).properties = properties;
  return { graph, node: node(2), state: (last) => panelState(graph, node(2), last) };
}

/** The size is set by a node that nobody knows. */
const unknownSize = (properties = {}) => plain({
  latent: LINKED, properties, more: { 9: ["Anything", { image: "IMAGE" }, ["INT"]] }, wires: [[9, 0, 4, "length"]],
});
const UNKNOWN_LOADER = ["UNETLoader", {}, [MODEL], { unet_name: "mine.safetensors" }];

test("a plain graph is estimated, and nothing is asked", () => {
  const state = plain().state();
  assert.deepEqual(state.found, { model: true, size: true });
  assert.deepEqual([state.model, state.numbers.blocks, state.status, state.report], ["wan-1.3b", 2048, "new", null]);
});

test("a size that the graph does not say is that of the last run, and said as such", () => {
  assert.equal(unknownSize().state().numbers, null);
  const state = unknownSize().state(report());
  assert.deepEqual([state.size, state.found.size, state.numbers.blocks], [{ tokens: 32760 }, false, 2048]);
  assert.equal(unknownSize().state(report({ tokens: 0 })).size, null, "the run was dense");
});

test("a chosen size goes before the last run's, and the graph's before both", () => {
  const chosen = { ropeslr_size: { width: 1280, height: 720, length: 33 } };
  assert.deepEqual(unknownSize(chosen).state(report()).size, { width: 1280, height: 720, length: 33 });
  assert.equal(plain({ properties: chosen }).state(report()).size.width, 832);
});

test("the last run's tokens stand for the same number of blocks as its size", () => {
  const known = plain().state();
  const counted = unknownSize().state(report({ tokens: known.numbers.tokens }));
  assert.deepEqual(counted.numbers.attention, known.numbers.attention);
});

for (const key of ["toString", "constructor", "__proto__", "hasOwnProperty", 5, null, ["wan-14b"]]) {
  test(`the property ${JSON.stringify(key)} is no model`, () => {
    const state = plain({ loader: UNKNOWN_LOADER, properties: { ropeslr_model: key } }).state();
    assert.deepEqual([state.model, state.numbers], ["", null]);
  });
}

test("a model that is known is taken from the property where the file says nothing", () => {
  assert.equal(plain({ loader: UNKNOWN_LOADER, properties: { ropeslr_model: "hunyuan" } }).state().model, "hunyuan");
});

for (const size of [{}, { width: 832, height: 480 }, { width: "832", height: 480, length: 81 }, 5, null,
  { width: 1e300, height: 480, length: 81 }, { width: -8, height: 480, length: 81 }]) {
  test(`the property ${JSON.stringify(size)} is no size`, () => {
    assert.equal(unknownSize({ ropeslr_size: size }).state().size, null);
  });
}

test("a setting that another node computes is assumed, and said to be", () => {
  const set = (source) => plain({ more: { 9: source }, wires: [[9, 0, 2, "sparsity"]] }).state();
  const state = set(["Anything", { image: "IMAGE" }, ["FLOAT"]]);
  assert.deepEqual(state.assumptions, ["Another node sets sparsity: the estimate assumes 0.9"]);
  const known = set(["PrimitiveFloat", {}, ["FLOAT"], { value: 0.5 }]);
  assert.deepEqual([known.assumptions, known.numbers.kept], [[], 1024]);
});

test("a report is fresh until a setting moves", () => {
  const { node, state } = plain();
  const last = report();
  assert.equal(state(last).status, "fresh");
  node.widgets.find(({ name }) => name === "sparsity").value = 0.8;
  assert.equal(state(last).status, "stale");
});

test("a node that is off says so, and the report is of before", () => {
  const { node, state } = plain();
  node.mode = 4;
  assert.match(state(report()).numbers.why, /bypassed/);
  assert.match(state(report()).idle, /before it was switched off/);
  node.mode = 2;
  assert.match(state().numbers.why, /muted: nothing after it runs/);
});

const FILE = "h3/minimax_h3_fl2v_turbo_4step_v0.1_768p_sla_comfyui_bf16.safetensors";
const H3 = ["UNETLoader", {}, [MODEL], { unet_name: "minimax_h3_fl2v_bf16.safetensors" }];
const lora = (file) => ["LoraLoaderModelOnly", { model: MODEL }, [MODEL], { lora_name: file, strength_model: 1 }];
const UNTOUCHED = {
  method: "auto", sparsity: 0.9, block_order: "auto", key_block: "auto", allocation: "auto", dense_first_steps: -1,
  min_tokens: 4096, dense_layers: "",
};
const withSettings = (settings = {}) => ["RoPeSLRSparseAttention", { model: MODEL }, [MODEL], { ...UNTOUCHED, ...settings }];
const H3_LATENT = ["EmptyLatent", {}, [LATENT], { width: 864, height: 480, length: 124 }];

function line(nodes, order) {
  const wires = order.slice(1).map((id, i) => [order[i], 0, id, "model"]);
  const { graph, node } = graphOf({ 9: H3_LATENT, ...nodes }, [...wires, [9, 0, order.at(-1), "latent_image"]]);
  return { graph, node: node(3) };
}

test("the LoRA is found before the node and after it, by the file's name alone", () => {
  for (const order of [[1, 2, 3, 4], [1, 3, 2, 4]]) {
    const { graph, node } = line({ 1: H3, 2: lora(FILE), 3: withSettings(), 4: KSAMPLER }, order);
    assert.equal(presetAround(graph, node)?.name, "MiniMax H3 Turbo-SLA");
  }
  for (const file of ["minimax_h3_turbo_4step.safetensors", "h3_slalom_turbo.safetensors", "wan_sla.safetensors"]) {
    const { graph, node } = line({ 1: H3, 2: lora(file), 3: withSettings(), 4: KSAMPLER }, [1, 2, 3, 4]);
    assert.equal(presetAround(graph, node), null, file);
  }
});

test("a LoRA that is switched off offers nothing, wherever it stands", () => {
  for (const order of [[1, 2, 3, 4], [1, 3, 2, 4]]) {
    const { graph, node } = line({ 1: H3, 2: [...lora(FILE), { mode: 4 }], 3: withSettings(), 4: KSAMPLER }, order);
    assert.equal(presetAround(graph, node), null);
  }
});

test("what differs from its settings is offered, and nothing once they are set", () => {
  const offer = (settings) => {
    const { graph, node } = line({ 1: H3, 2: lora(FILE), 3: withSettings(settings), 4: KSAMPLER }, [1, 2, 3, 4]);
    return panelState(graph, node).offer;
  };
  const own = {
    method: "top-k plain", sparsity: 0.85, block_order: "raster", key_block: "64", allocation: "uniform",
    dense_first_steps: 0,
  };
  assert.deepEqual(offer({}), { name: "MiniMax H3 Turbo-SLA", settings: own });
  assert.deepEqual(offer({ ...own, sparsity: 0.9 }).settings, { sparsity: 0.85 });
  assert.equal(offer(own), null);
});
