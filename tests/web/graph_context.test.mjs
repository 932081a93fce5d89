// What the panel reads off a graph: the size of the video, the model, the adapter, the steps.

import assert from "node:assert/strict";
import { test } from "node:test";
import { adapterMethod, graphContext, latentSize, samplersAfter, whyOff } from "../../web/js/graph_context.js";
import { guessModel } from "../../web/js/models.js";
import { EMPTY, graphOf, KSAMPLER, LATENT, LINKED, LOADER, MODEL, OURS, withSubgraph } from "./small_graphs.mjs";

const whole = (total) => ({ total, from: 0, to: total });

/** The size of the latent of sampler 3, as "832x480x81" or "". */
function sizeOf({ graph, node }) {
  const size = latentSize(graph, node(3));
  return size ? [size.width, size.height, size.length].join("x") : "";
}

test("a plain graph: size, model and steps", () => {
  const { graph, node } = graphOf({ 1: LOADER, 2: OURS, 3: KSAMPLER, 4: EMPTY }, [
    [1, 0, 2, "model"], [2, 0, 3, "model"], [4, 0, 3, "latent_image"],
  ]);
  const found = graphContext(graph, node(2));
  assert.deepEqual([found.size.width, found.size.height, found.size.length], [832, 480, 81]);
  assert.deepEqual([found.model, found.steps, found.adapter], ["wan-1.3b", whole(30), ""]);
});

test("a checkpoint that holds the gate of VSA is estimated as it will run", () => {
  for (const [file, method] of [["MiniMax-H3-FastH3-8step_bf16.safetensors", "vsa"], ["h3_vsa.gguf", "vsa"], ["h3.safetensors", ""]]) {
    const loader = ["UNETLoader", {}, [MODEL], { unet_name: file }];
    const { graph, node } = graphOf({ 1: loader, 2: OURS, 3: KSAMPLER, 4: EMPTY }, [
      [1, 0, 2, "model"], [2, 0, 3, "model"], [4, 0, 3, "latent_image"],
    ]);
    assert.equal(graphContext(graph, node(2)).adapter, method, file);
  }
});

test("links kept as a plain object work too, and an unconnected node finds nothing", () => {
  const { graph, node } = graphOf({ 2: OURS, 3: KSAMPLER }, [[2, 0, 3, "model"]]);
  graph.links = Object.fromEntries(graph.links);
  assert.equal(samplersAfter(graph, node(2)).length, 1);
  assert.deepEqual(graphContext(graph, node(2)), { size: null, model: "", adapter: "", steps: whole(30) });
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
    15: OURS, 16: custom,
    17: ["RoPeSLRFewStepSigmas", {}, ["SIGMAS"], { preset: "TurboWan 2.2 I2V low noise, of 3 steps" }],
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

test("a latent scaled by what is not known has no known size", () => {
  const steps = { 9: ["Measure", { image: "IMAGE" }, ["INT"]], 3: KSAMPLER, 4: EMPTY };
  const by = graphOf({
    ...steps, 6: ["LatentUpscaleBy", { samples: LATENT, scale_by: "FLOAT" }, [LATENT], { scale_by: 2 }],
  }, [[4, 0, 6, "samples"], [9, 0, 6, "scale_by"], [6, 0, 3, "latent_image"]]);
  const to = graphOf({
    ...steps, 6: ["LatentUpscale", { samples: LATENT, width: "INT" }, [LATENT], { width: 512, height: 512 }],
  }, [[4, 0, 6, "samples"], [9, 0, 6, "width"], [6, 0, 3, "latent_image"]]);
  assert.deepEqual([sizeOf(by), sizeOf(to)], ["", ""]);
});

test("a bypassed upscaler leaves the size alone, and a muted source gives none", () => {
  const nodes = { 3: KSAMPLER, 4: EMPTY, 6: ["LatentUpscaleBy", { samples: LATENT }, [LATENT], { scale_by: 2 }] };
  const chain = () => graphOf(nodes, [[4, 0, 6, "samples"], [6, 0, 3, "latent_image"]]);
  const [on, bypassed, muted] = [chain(), chain(), chain()];
  bypassed.node(6).mode = 4;
  muted.node(4).mode = 2;
  assert.deepEqual([on, bypassed, muted].map(sizeOf), ["1664x960x81", "832x480x81", ""]);
});

/** LTX-2 in two stages, as ComfyUI's templates have it: sampler 3 at half size, sampler 5 after the upscaler. */
function twoStages(file) {
  const custom = ["SamplerCustomAdvanced", { guider: "GUIDER", sigmas: "SIGMAS", latent_image: LATENT }, [LATENT]];
  const concat = ["LTXVConcatAVLatent", { video_latent: LATENT, audio_latent: LATENT }, [LATENT]];
  const sigmas = (text) => ["ManualSigmas", {}, ["SIGMAS"], { sigmas: text }];
  return graphOf({
    1: ["CheckpointLoaderSimple", {}, [MODEL, "CLIP", "VAE"], { ckpt_name: "ltx-2.3-22b-dev-fp8.safetensors" }],
    2: OURS, 3: custom, 5: custom, 6: concat, 7: concat, 8: sigmas("1., 0.99375, 0.909375, 0.421875, 0.0"),
    9: sigmas("0.85, 0.7250, 0.4219, 0.0"), 10: ["CFGGuider", { model: MODEL }, ["GUIDER"]],
    11: ["EmptyLTXVLatentVideo", {}, [LATENT], { width: 640, height: 360, length: 121 }],
    12: ["LTXVEmptyLatentAudio", {}, [LATENT], { frames_number: 121, frame_rate: 25 }],
    13: ["LTXVSeparateAVLatent", { av_latent: LATENT }, ["video_latent:LATENT", "audio_latent:LATENT"]],
    14: ["LatentUpscaleModelLoader", {}, ["LATENT_UPSCALE_MODEL"], { model_name: file }],
    15: ["LTXVLatentUpsampler", { samples: LATENT, upscale_model: "LATENT_UPSCALE_MODEL", vae: "VAE" }, [LATENT]],
  }, [
    [1, 0, 2, "model"], [2, 0, 10, "model"], [10, 0, 3, "guider"], [10, 0, 5, "guider"], [8, 0, 3, "sigmas"],
    [9, 0, 5, "sigmas"], [11, 0, 6, "video_latent"], [12, 0, 6, "audio_latent"], [6, 0, 3, "latent_image"],
    [3, 0, 13, "av_latent"], [13, 0, 15, "samples"], [14, 0, 15, "upscale_model"], [15, 0, 7, "video_latent"],
    [13, 1, 7, "audio_latent"], [7, 0, 5, "latent_image"],
  ]);
}

test("of two stages with one model, the larger is shown; its few steps go on from a video", () => {
  const shown = (file) => {
    const { graph, node } = twoStages(file);
    const { size, model, steps } = graphContext(graph, node(2));
    return [size.width, size.height, size.length, model, steps];
  };
  const second = { total: 3, from: 0, to: 3, begun: true };
  assert.deepEqual(shown("ltx-2.3-spatial-upscaler-x2-1.1.safetensors"), [1280, 704, 121, "ltx-2", second]);
  assert.deepEqual(shown("ltx-2.3-spatial-upscaler-x1.5-1.0.safetensors"), [960, 512, 121, "ltx-2", second]);
  assert.deepEqual(shown("ltx-2-temporal-upscaler-x2-1.0.safetensors"), [640, 360, 241, "ltx-2", second]);
  assert.deepEqual(shown("mine.safetensors"), [640, 360, 121, "ltx-2", whole(4)], "what it multiplies is not known");
});

test("noise levels that are written out are one more than there are steps", () => {
  const stepsOf = (sigmas) => {
    const { graph, node } = graphOf({
      2: OURS, 3: ["SamplerCustom", { model: MODEL, sigmas: "SIGMAS", latent_image: LATENT }, [LATENT]],
      4: ["ManualSigmas", {}, ["SIGMAS"], { sigmas }],
    }, [[2, 0, 3, "model"], [4, 0, 3, "sigmas"]]);
    return graphContext(graph, node(2)).steps;
  };
  assert.deepEqual(["1, 0.5, 0", ".97 0.5", "0.9, 0", "0.2, 0.9"].map(stepsOf), [
    whole(2), whole(1), { ...whole(1), begun: true }, whole(1),
  ]);
  assert.deepEqual(["", "1", "none"].map(stepsOf), [null, null, null]);
});

const CAMERA = [
  "WanCameraEmbedding", {}, ["camera_embedding:WAN_CAMERA_EMBEDDING", "width:INT", "height:INT", "length:INT"],
  { camera_pose: "Zoom In", width: 720, height: 480, length: 81, speed: 1 },
];

test("size and length are those of the camera's embedding, each from its own output", () => {
  const camera = graphOf({ 3: KSAMPLER, 4: LINKED, 9: CAMERA }, [
    [4, 0, 3, "latent_image"], [9, 1, 4, "width"], [9, 2, 4, "height"], [9, 3, 4, "length"],
  ]);
  assert.equal(sizeOf(camera), "720x480x81");
});

test("length from a Math Expression, as in the official Wan 2.2 templates", () => {
  const float = (value) => ["PrimitiveFloat", {}, ["FLOAT"], { value }];
  const math = (expression) => [
    "ComfyMathExpression", { "values.a": "FLOAT,INT,BOOLEAN", "values.b": "FLOAT,INT,BOOLEAN" },
    ["FLOAT", "INT", "BOOL"], { expression },
  ];
  const lengthOf = (expression) => sizeOf(graphOf({
    3: KSAMPLER, 4: LINKED, 5: float(5), 6: float(16), 7: math(expression),
    8: ["PrimitiveInt", {}, ["INT"], { value: 640 }],
  }, [
    [4, 0, 3, "latent_image"], [8, 0, 4, "width"], [8, 0, 4, "height"], [7, 1, 4, "length"], [5, 0, 7, "values.a"],
    [6, 0, 7, "values.b"],
  ]));
  assert.equal(lengthOf("floor (a * b + 1)"), "640x640x81");
  assert.equal(lengthOf("a * unknown"), "");
});

test("size from a Resolution Selector", () => {
  const selector = ["ResolutionSelector", {}, ["width:INT", "height:INT"],
    { aspect_ratio: "16:9 (Widescreen)", megapixels: 0.4, multiple: 16 }];
  const graph = graphOf({ 3: KSAMPLER, 4: LINKED, 9: selector }, [
    [4, 0, 3, "latent_image"], [9, 0, 4, "width"], [9, 1, 4, "height"],
  ]);
  assert.equal(sizeOf(graph), "864x480x1");
});

test("size of a picture that a node of ComfyUI has scaled, as in the official Wan-Move template", () => {
  const measured = (scaler) => graphOf({
    3: KSAMPLER, 4: LINKED, 7: ["LoadImage", {}, ["IMAGE", "MASK"], { image: "a.png" }], 8: scaler,
    9: ["GetImageSize", { image: "IMAGE" }, ["width:INT", "height:INT", "batch_size:INT"]],
  }, [
    [4, 0, 3, "latent_image"], [7, 0, 8, Object.keys(scaler[1])[0]], [8, 0, 9, "image"], [9, 0, 4, "width"],
    [9, 1, 4, "height"],
  ]);
  const scale = (width, height) => [
    "ImageScale", { image: "IMAGE" }, ["IMAGE"], { upscale_method: "lanczos", width, height, crop: "center" },
  ];
  const resize = (type) => ["ResizeImageMaskNode", { input: "IMAGE" }, ["resized:IMAGE"],
    { resize_type: type, "resize_type.width": 720, "resize_type.height": 400, scale_method: "area" }];
  assert.equal(sizeOf(measured(scale(832, 480))), "832x480x1");
  assert.equal(sizeOf(measured(scale(832, 0))), "", "the height follows a picture whose shape is not known");
  assert.equal(sizeOf(measured(resize("scale dimensions"))), "720x400x1");
  assert.equal(sizeOf(measured(resize("scale longer dimension"))), "");
  assert.equal(sizeOf(measured(["ImageInvert", { image: "IMAGE" }, ["IMAGE"]])), "");
});

test("steps that another node computes are not those of a widget", () => {
  const advanced = ["KSamplerAdvanced", { model: MODEL, latent_image: LATENT, start_at_step: "INT" }, [LATENT],
    { steps: 20, start_at_step: 0, end_at_step: 10000 }];
  const { graph, node } = graphOf({ 2: OURS, 3: advanced, 4: EMPTY, 9: ["Anything", { image: "IMAGE" }, ["INT"]] }, [
    [2, 0, 3, "model"], [4, 0, 3, "latent_image"], [9, 0, 3, "start_at_step"],
  ]);
  assert.equal(graphContext(graph, node(2)).steps, null);
});

test("bypassed and muted samplers do not count, and our own node says when it is off", () => {
  const { graph, node } = graphOf({ 2: OURS, 3: KSAMPLER, 5: KSAMPLER, 6: KSAMPLER }, [
    [2, 0, 3, "model"], [2, 0, 5, "model"], [2, 0, 6, "model"],
  ]);
  node(3).mode = 4;
  node(5).mode = 2;
  assert.deepEqual(samplersAfter(graph, node(2)), [node(6)]);
  assert.match(whyOff(node(3)), /bypassed/);
  assert.match(whyOff(node(5)), /muted/);
  assert.equal(whyOff(node(2)), "");
});

test("a circle of latents ends", () => {
  const { graph, node } = graphOf({ 3: KSAMPLER, 5: KSAMPLER }, [[3, 0, 5, "latent_image"], [5, 0, 3, "latent_image"]]);
  assert.equal(latentSize(graph, node(3)), null);
});

for (const id of [Number, String]) {
  test(`subgraph borders are crossed both ways, ids of links being a ${id.name}`, () => {
    const { root, ours } = withSubgraph(id);
    const found = graphContext(root, ours);
    assert.deepEqual([found.size?.width, found.model, found.steps], [832, "wan-1.3b", whole(30)]);
  });
}

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
  ["humo_17B_fp8_e4m3fn.safetensors", "wan-14b"],
  ["humo_1.7B_fp16.safetensors", "wan-1.3b"],
  ["Wan21-WanMove_fp8_scaled_e4m3fn_KJ.safetensors", "wan-14b"],
  ["wan_animate_2_int8_convrot.safetensors", "wan-14b"],
  ["minimax_h3_fl2v_bf16.safetensors", "h3"],
  ["FastH3_8step.safetensors", "h3"],
  ["ltx-2.3-22b-dev-fp8.safetensors", "ltx-2"],
  ["ltxv-13b-0.9.8-distilled.safetensors", "ltxv-13b"],
  ["ltx-video-2b-v0.9.5.safetensors", "ltxv-2b"],
  ["kandinsky5lite_t2v_sft_5s.safetensors", "kandinsky-lite"],
  ["kandinsky5pro_i2v_5s.safetensors", "kandinsky-pro"],
  ["cosmos_predict2_14B_video2world_720p.safetensors", "cosmos-14b"],
  ["cosmos_predict2_2B_video2world.safetensors", "cosmos-2b"],
  ["mochi_preview_bf16.safetensors", "mochi"],
  ["ltxv_0.9.6_dev_fp8.safetensors", "ltxv-2b"],
  ["LTXV2-22b-dev.safetensors", "ltx-2"],
  ["ltx-2-19b-distilled.safetensors", "ltx-2"],
  ["CogVideoX_1_5_5b.safetensors", "cogvideox-1.5"],
  ["CogVideoX1.5-5B-I2V.safetensors", "cogvideox-1.5"],
  ["CogVideoX-2b.safetensors", "cogvideox-2b"],
  ["cogvideox_5b.safetensors", "cogvideox"],
  ["flux1-dev.safetensors", ""],
  ["wan_something.safetensors", ""],
]) {
  test(`${file} is ${model || "unknown"}`, () => assert.equal(guessModel(file), model));
}
