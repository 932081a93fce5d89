// Walks through small graphs in the shapes that ComfyUI's frontend keeps them in.

import assert from "node:assert/strict";
import { test } from "node:test";
import { findByExecutionId, isMeant, valueOf } from "../../web/js/graph.js";
import {
  adapterMethod, guessModel, latentSize, samplersBehind, graphContext, whyIdle,
} from "../../web/js/graph_context.js";

const MODEL = "MODEL";
const LATENT = "LATENT";
const whole = (total) => ({ total, from: 0, to: total });

/** A graph from nodes {id: [type, inputs {name: type}, outputs [type], widgets {name: value}]} and wires. */
function graphOf(nodes, wires) {
  const graph = { links: new Map(), nodes: [] };
  for (const [id, [type, inputs, outputs, widgets = {}, more = {}]] of Object.entries(nodes)) {
    graph.nodes.push({
      id: Number(id), type, graph, mode: 0,
      inputs: Object.entries(inputs).map(([name, kind]) => ({
        name, type: kind, link: null, ...(name in widgets ? { widget: { name } } : {}),
      })),
      outputs: outputs.map((kind) => ({ type: kind, links: [] })),
      widgets: Object.entries(widgets).map(([name, value]) => ({ name, value })), ...more,
    });
  }
  const byId = (id) => graph.nodes.find((node) => node.id === id);
  wires.forEach(([from, fromSlot, to, name], number) => {
    const toSlot = byId(to).inputs.findIndex((input) => input.name === name);
    graph.links.set(number, { origin_id: from, origin_slot: fromSlot, target_id: to, target_slot: toSlot });
    byId(from).outputs[fromSlot].links.push(number);
    byId(to).inputs[toSlot].link = number;
  });
  return { graph, node: byId };
}

const LOADER = ["UNETLoader", {}, [MODEL], { unet_name: "wan2.1_t2v_1.3B_fp16.safetensors", weight_dtype: "default" }];
const OURS = ["RoPeSLRSparseAttention", { model: MODEL, adapter: "ROPESLR_ADAPTER" }, [MODEL]];
const KSAMPLER = ["KSampler", { model: MODEL, latent_image: LATENT }, [LATENT], { steps: 30 }];
const EMPTY = ["EmptyHunyuanLatentVideo", {}, [LATENT], { width: 832, height: 480, length: 81, batch_size: 1 }];

test("a plain graph: size, model and steps", () => {
  const { graph, node } = graphOf({ 1: LOADER, 2: OURS, 3: KSAMPLER, 4: EMPTY }, [
    [1, 0, 2, "model"], [2, 0, 3, "model"], [4, 0, 3, "latent_image"],
  ]);
  const found = graphContext(graph, node(2));
  assert.deepEqual([found.size.width, found.size.height, found.size.length], [832, 480, 81]);
  assert.deepEqual([found.model, found.steps, found.adapter], ["wan-1.3b", whole(30), ""]);
});

test("links kept as a plain object work too, and an unconnected node finds nothing", () => {
  const { graph, node } = graphOf({ 2: OURS, 3: KSAMPLER }, [[2, 0, 3, "model"]]);
  graph.links = Object.fromEntries(graph.links);
  assert.equal(samplersBehind(graph, node(2)).length, 1);
  assert.deepEqual(graphContext(graph, node(2)), { size: null, model: "", adapter: "", steps: null });
});

test("through LoRA, reroutes and a guider to SamplerCustomAdvanced, steps from its scheduler", () => {
  const { graph, node } = graphOf({
    1: LOADER, 2: OURS, 5: ["LoraLoaderModelOnly", { model: MODEL }, [MODEL], { lora_name: "x.safetensors" }],
    6: ["Reroute", { "": "*" }, ["*"]], 7: ["CFGGuider", { model: MODEL }, ["GUIDER"]],
    8: ["SamplerCustomAdvanced", { guider: "GUIDER", sigmas: "SIGMAS", latent_image: LATENT }, [LATENT]],
    9: ["BasicScheduler", { model: MODEL }, ["SIGMAS"], { steps: 12 }], 4: EMPTY,
    10: ["Reroute", { "": "*" }, ["*"]],
  }, [
    [1, 0, 6, ""], [6, 0, 5, "model"], [5, 0, 2, "model"], [2, 0, 7, "model"], [2, 0, 9, "model"], [7, 0, 8, "guider"],
    [9, 0, 8, "sigmas"], [4, 0, 10, ""], [10, 0, 8, "latent_image"],
  ]);
  const found = graphContext(graph, node(2));
  assert.deepEqual([found.size?.length, found.model, found.steps], [81, "wan-1.3b", whole(12)]);
});

test("Set and Get nodes stand for a link, of the model and of the latent", () => {
  const set = (name, kind) => ["SetNode", { [kind]: kind }, [kind], { Constant: name }];
  const get = (name, kind) => ["GetNode", {}, [kind], { Constant: name }];
  const { graph, node } = graphOf({
    1: LOADER, 2: OURS, 3: KSAMPLER, 4: EMPTY, 5: set("base", MODEL), 6: get("base", MODEL), 7: set("size", LATENT),
    8: get("size", LATENT), 9: set("sparse", MODEL), 10: get("sparse", MODEL), 11: get("nobody", MODEL), 12: OURS,
  }, [
    [1, 0, 5, MODEL], [6, 0, 2, "model"], [2, 0, 9, MODEL], [10, 0, 3, "model"], [4, 0, 7, LATENT],
    [8, 0, 3, "latent_image"], [11, 0, 12, "model"],
  ]);
  const found = graphContext(graph, node(2));
  assert.deepEqual([found.size?.width, found.model, found.steps], [832, "wan-1.3b", whole(30)]);
  assert.deepEqual(graphContext(graph, node(12)), { size: null, model: "", adapter: "", steps: null });
});

test("the steps of a sampler: of two experts, of split noise levels, of a preset", () => {
  const expert = (from, to) => ["KSamplerAdvanced", { model: MODEL, latent_image: LATENT }, [LATENT],
    { steps: 20, start_at_step: from, end_at_step: to }];
  const custom = ["SamplerCustom", { model: MODEL, sigmas: "SIGMAS", latent_image: LATENT }, [LATENT]];
  const { graph, node } = graphOf({
    1: OURS, 2: OURS, 3: expert(0, 10), 4: expert(10, 10000), 5: EMPTY, 6: OURS, 7: OURS, 8: custom, 9: custom,
    10: ["BasicScheduler", {}, ["SIGMAS"], { steps: 8 }],
    11: ["SplitSigmas", { sigmas: "SIGMAS" }, ["SIGMAS", "SIGMAS"], { step: 3 }],
    12: OURS, 13: custom, 14: ["RoPeSLRFewStepSigmas", {}, ["SIGMAS"], { preset: "SparkWan 2.1, 4 steps" }],
    15: OURS, 16: custom, 17: ["RoPeSLRFewStepSigmas", {}, ["SIGMAS"], { preset: "TurboWan 2.2 I2V low noise, of 3 steps" }],
  }, [
    [1, 0, 3, "model"], [2, 0, 4, "model"], [5, 0, 3, "latent_image"], [3, 0, 4, "latent_image"], [6, 0, 8, "model"],
    [7, 0, 9, "model"], [10, 0, 11, "sigmas"], [11, 0, 8, "sigmas"], [11, 1, 9, "sigmas"], [5, 0, 8, "latent_image"],
    [8, 0, 9, "latent_image"], [12, 0, 13, "model"], [14, 0, 13, "sigmas"], [5, 0, 13, "latent_image"],
    [15, 0, 16, "model"], [17, 0, 16, "sigmas"], [5, 0, 16, "latent_image"],
  ]);
  assert.deepEqual([1, 2, 6, 7, 12, 15].map((id) => graphContext(graph, node(id)).steps), [
    { total: 20, from: 0, to: 10 }, { total: 20, from: 10, to: 20 }, { total: 8, from: 0, to: 3 },
    { total: 8, from: 3, to: 8 }, whole(4), null,
  ]);
});

test("chained samplers pass on the size, and latent upscalers change it", () => {
  const { graph, node } = graphOf({
    2: OURS, 3: KSAMPLER, 5: KSAMPLER, 4: EMPTY,
    6: ["LatentUpscaleBy", { samples: LATENT }, [LATENT], { scale_by: 1.5 }],
    7: ["LatentUpscale", { samples: LATENT }, [LATENT], { width: 1280, height: 720 }], 8: KSAMPLER,
  }, [
    [4, 0, 3, "latent_image"], [3, 0, 6, "samples"], [6, 0, 5, "latent_image"], [5, 0, 7, "samples"],
    [7, 0, 8, "latent_image"],
  ]);
  const size = (id) => {
    const { width, height, length } = latentSize(graph, node(id));
    return [width, height, length];
  };
  assert.deepEqual(size(3), [832, 480, 81]);
  assert.deepEqual(size(5), [1248, 720, 81]);
  assert.deepEqual(size(8), [1280, 720, 81]);
});

test("a linked width is read from the node that gives it", () => {
  const primitive = ["PrimitiveInt", {}, ["INT"], { value: 640 }];
  const linked = ["EmptyHunyuanLatentVideo", { width: "INT" }, [LATENT], { width: 832, height: 480, length: 81 }];
  const { graph, node } = graphOf({ 3: KSAMPLER, 4: linked, 5: primitive }, [
    [4, 0, 3, "latent_image"], [5, 0, 4, "width"],
  ]);
  assert.equal(latentSize(graph, node(3)).width, 640);
  assert.equal(valueOf(graph, node(4), "height"), 480);
});

test("bypassed and muted samplers do not count, and our own node says when it is off", () => {
  const { graph, node } = graphOf({ 2: OURS, 3: KSAMPLER, 5: KSAMPLER, 6: KSAMPLER }, [
    [2, 0, 3, "model"], [2, 0, 5, "model"], [2, 0, 6, "model"],
  ]);
  node(3).mode = 4;
  node(5).mode = 2;
  assert.deepEqual(samplersBehind(graph, node(2)), [node(6)]);
  assert.match(whyIdle(node(3)), /bypassed/);
  assert.match(whyIdle(node(5)), /muted/);
  assert.equal(whyIdle(node(2)), "");
});

test("a circle of latents ends", () => {
  const { graph, node } = graphOf({ 3: KSAMPLER, 5: KSAMPLER }, [[3, 0, 5, "latent_image"], [5, 0, 3, "latent_image"]]);
  assert.equal(latentSize(graph, node(3)), null);
});

/** Our node inside subgraph 12, its model coming from outside, its output going there; `id` makes ids of links. */
function withSubgraph(id = Number) {
  const inner = graphOf({ 7: OURS }, []);
  inner.graph.links.set(90, { origin_id: id(-10), origin_slot: 0, target_id: id(7), target_slot: 0 });
  inner.graph.links.set(91, { origin_id: id(7), origin_slot: 0, target_id: id(-20), target_slot: 0 });
  inner.node(7).inputs[0].link = 90;
  inner.node(7).outputs[0].links.push(91);
  inner.graph.inputs = [{ linkIds: [90] }];
  inner.graph.outputs = [{ linkIds: [91] }];
  const outer = graphOf({
    1: LOADER, 12: ["subgraph", { model: MODEL }, [MODEL], {}, { subgraph: inner.graph }], 3: KSAMPLER, 4: EMPTY,
  }, [[1, 0, 12, "model"], [12, 0, 3, "model"], [4, 0, 3, "latent_image"]]);
  return { root: outer.graph, ours: inner.node(7), outer };
}

for (const id of [Number, String]) {
  test(`subgraph borders are crossed both ways, ids of links being a ${id.name}`, () => {
    const { root, ours } = withSubgraph(id);
    const found = graphContext(root, ours);
    assert.deepEqual([found.size?.width, found.model, found.steps], [832, "wan-1.3b", whole(30)]);
  });
}

test("execution ids name nodes in subgraphs", () => {
  const { root, ours, outer } = withSubgraph();
  assert.equal(findByExecutionId(root, "12:7"), ours);
  assert.equal(findByExecutionId(root, 3), outer.node(3));
  assert.equal(findByExecutionId(root, "99:7"), null);
  assert.ok(isMeant(root, ours, "12:7") && isMeant(root, ours, "99:7"));
  assert.ok(!isMeant(root, ours, "3") && !isMeant(root, ours, "12:8"));
});

test("the adapter's method is read off its file's name", () => {
  const method = (type, file) => {
    const loader = [type, {}, [MODEL, "ROPESLR_ADAPTER"], { name: file }];
    const { graph, node } = graphOf({ 1: loader, 2: OURS }, [[1, 1, 2, "adapter"]]);
    return adapterMethod(graph, node(2));
  };
  assert.equal(method("RoPeSLRLoadSparseCheckpoint", "SparkWan2.2-T2V-High-0.95Sparsity.pth"), "rola");
  assert.equal(method("RoPeSLRLoadSparseCheckpoint", "TurboWan2.1-T2V-1.3B-480P.pth"), "sla");
  assert.equal(method("RoPeSLRLoadAdapter", "my_ropeslr_rank32.safetensors"), "ropeslr");
  assert.equal(method("RoPeSLRLoadAdapter", "mine.safetensors"), "unknown");
  assert.equal(method("RoPeSLRLoadAdapter", "none (training-free)"), "");
});

for (const [file, model] of [
  ["wan2.1_t2v_14B_fp8_e4m3fn.safetensors", "wan-14b"],
  ["wan2.1_t2v_1.3B_fp16.safetensors", "wan-1.3b"],
  ["wan2.1_vace_1_3B.safetensors", "wan-1.3b"],
  ["wan2.2_ti2v_5B_fp16.safetensors", "wan-5b"],
  ["wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "wan-14b"],
  ["SparkWan2.2-T2V-High-0.95Sparsity.pth", "wan-14b"],
  ["TurboWan2.1-T2V-1.3B-480P-quant.pth", "wan-1.3b"],
  ["folder/Wan2.1-I2V-14B-720P-Q4_K_M.gguf", "wan-14b"],
  ["hunyuan_video_t2v_720p_bf16.safetensors", "hunyuan"],
  ["hunyuanvideo1.5_720p_t2v_fp16.safetensors", "hunyuan-1.5"],
  ["skyreels_hunyuan_i2v_bf16.safetensors", "hunyuan"],
  ["flux1-dev.safetensors", ""],
  ["wan_something.safetensors", ""],
]) {
  test(`${file} is ${model || "unknown"}`, () => assert.equal(guessModel(file), model));
}
