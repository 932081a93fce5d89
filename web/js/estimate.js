// What a choice of settings saves, in numbers: the arithmetic of attention/accounting.py and attention/plan.py again.

import { count } from "./format.js";

export const BLOCK = 64;
const TRAINED = ["ropeslr", "rola", "sla"];
const TILE = 4; // the sides of a cube of 64 tokens; see attention/layout.py
const WAN_TEXT = 512; // Wan pads its prompt to so many tokens
const HUNYUAN_TEXT = 256; // HunyuanVideo's prompt is as long as it is; this is its usual bound
const DEFAULT_RANK = 64; // of the released RoLA checkpoints; a file's own rank is not known before the run

// Published dimensions. spatial: pixels per latent cell; patch: latent cells per token, in rows and columns.
export const MODELS = {
  "wan-14b": { name: "Wan 14B", family: "wan", dim: 5120, ffn: 13824, layers: 40, heads: 40, spatial: 8, patch: 2 },
  "wan-1.3b": { name: "Wan 1.3B", family: "wan", dim: 1536, ffn: 8960, layers: 30, heads: 12, spatial: 8, patch: 2 },
  "wan-5b": { name: "Wan 2.2 5B", family: "wan", dim: 3072, ffn: 14336, layers: 30, heads: 24, spatial: 16, patch: 2 },
  "hunyuan": {
    name: "HunyuanVideo", family: "hunyuan", dim: 3072, ffn: 12288, layers: 60, heads: 24, spatial: 8, patch: 2,
  },
  "hunyuan-1.5": {
    name: "HunyuanVideo 1.5", family: "hunyuan", dim: 2048, ffn: 8192, layers: 54, heads: 16, spatial: 16, patch: 1,
  },
};

/** Key blocks that a row keeps by score, out of `blocks`: at least one. */
export function keptBlocks(sparsity, blocks) {
  return Math.max(1, Math.floor((1.0 - sparsity) * blocks + 1e-6));
}

/** The grid of tokens [frames, rows, columns] of a video in pixels. */
export function tokenGrid(model, { width, height, length }) {
  const side = (pixels) => Math.max(1, Math.ceil(Math.floor(pixels / model.spatial) / model.patch));
  return [Math.floor((Math.max(1, length) - 1) / 4) + 1, side(height), side(width)];
}

/** Tokens that stand in the same sequence as the video's, and are always kept. */
export function extraTokens(model) {
  return model.family === "hunyuan" ? HUNYUAN_TEXT : 0;
}

/** Blocks of a video that hold tokens of its first frame. They come first in either block order. */
export function firstFrameBlocks([frames, rows, columns], order) {
  if (order === "raster") return Math.ceil((rows * columns) / BLOCK);
  const span = Math.floor(frames / Math.ceil(frames / TILE)); // frames that one bar of the walk is deep
  const parts = Math.ceil(rows / TILE);
  const lastRows = rows - Math.floor((rows * (parts - 1)) / parts);
  const lastOfFirst = span * rows * columns - span * lastRows + lastRows - 1; // in the last slice of the last bar
  return Math.floor(lastOfFirst / BLOCK) + 1;
}

/** Blocks of a layout and the share of key blocks that the video's queries keep, forced blocks included. */
export function blockDensity(grid, extra, { sparsity, order, keepDiagonal, keepFirstFrame }) {
  const queries = Math.ceil((grid[0] * grid[1] * grid[2]) / BLOCK);
  const extraBlocks = Math.ceil(extra / BLOCK);
  const keys = queries + extraBlocks;
  const keep = keptBlocks(sparsity, queries);
  const first = keepFirstFrame ? firstFrameBlocks(grid, order) : 0;
  const keptBy = (diagonal) => Math.min(keys, extraBlocks + first + diagonal + keep);
  // A row within the first frame has its diagonal among the first frame's blocks already.
  const mean = (first * keptBy(0) + (queries - first) * keptBy(keepDiagonal ? 1 : 0)) / queries;
  return { queries, keys, keep, kept: mean, density: mean / keys };
}

export function denseFlops(tokens, width, heads) {
  return 4.0 * tokens * tokens * width * heads;
}

export function routingFlops(tokens, width, heads, queries, keys) {
  return (2.0 * queries * keys * width + 2.0 * tokens * width) * heads;
}

/** FLOPs of what stands in for the blocks left out, of the video's queries. rank: the plan's, 0 = all. */
export function backgroundFlops({ method, trained, slaVariant }, rank, tokens, width, heads, queries, keys) {
  const pairs = (number) => 2 * Math.floor((number + 1) / 2); // channels and turned features are left out in pairs
  const features = rank > 0 && rank < DEFAULT_RANK ? rank : DEFAULT_RANK;
  if (method === "top-k") return 4.0 * tokens * keys * width * heads;
  if (method === "ropeslr") {
    const firstOrder = 4.0 * tokens * (rank > 0 && rank < width ? pairs(rank) : width) * width * heads;
    return firstOrder + (trained ? 8.0 * tokens * features * width * heads : 0.0);
  }
  if (!trained) return 0.0; // rola and sla without their weights are the kept blocks alone
  if (method === "rola") return 8.0 * tokens * pairs(features) * width * heads;
  if (method !== "sla") return 0.0;
  return slaVariant === "paper"
    ? (6.0 * tokens + 2.0 * queries * keys) * width * width * heads
    : 4.0 * tokens * width * width * heads;
}

/** FLOPs of one self-attention call between two calibrations, as AttentionCost has them. */
export function attentionCost(grid, extra, width, heads, settings) {
  const video = grid[0] * grid[1] * grid[2];
  const tokens = video + extra;
  const blocks = blockDensity(grid, extra, settings);
  const density = 1.0 - (1.0 - blocks.density) * (video / tokens); // what is not video attends to everything
  const dense = denseFlops(tokens, width, heads);
  const sparse = dense * density;
  const routes = settings.method !== "adaspa";
  const routing = routes ? routingFlops(tokens, width, heads, blocks.queries, blocks.keys) : 0.0;
  const background = backgroundFlops(settings, settings.rank, video, width, heads, blocks.queries, blocks.keys);
  return { ...blocks, tokens, density, dense, sparse, routing, background, total: sparse + routing + background };
}

/** FLOPs of everything in a layer but self-attention: projections, feed-forward, and Wan's cross-attention. */
export function linearFlops(model, tokens) {
  const { dim, ffn, family } = model;
  if (family === "hunyuan") return tokens * (8.0 * dim * dim + 4.0 * dim * ffn);
  const crossAttention = tokens * 4.0 * dim * dim + WAN_TEXT * 4.0 * dim * dim + 4.0 * tokens * WAN_TEXT * dim;
  return tokens * (8.0 * dim * dim + 4.0 * dim * ffn) + crossAttention;
}

/**
 * The method that runs, its block order, its dense first steps, and whether trained weights stand behind it.
 * adapter: the method it was trained for; "unknown", which is taken to fit; "" where there is none.
 */
export function resolve(settings, adapter) {
  if (adapter === "unknown") adapter = TRAINED.includes(settings.method) ? settings.method : "ropeslr";
  const method = settings.method === "auto" ? adapter || "ropeslr" : settings.method;
  const trained = Boolean(adapter) && method === adapter;
  const released = method === "rola" || method === "sla";
  const order = settings.block_order === "auto" ? (released ? "raster" : "cube") : settings.block_order;
  let first = settings.dense_first_steps;
  if (first < 0) first = (released && trained) || method === "adaspa" ? 0 : 1;
  return { method, trained, order, first };
}

/** How many of the steps [from, to) of a schedule run sparse; AdaSpa stays dense through its first search. */
export function sparseSteps({ total, from, to }, method, first, last) {
  let start = Math.max(from, first);
  if (method === "adaspa") start = Math.max(start, total <= 8 ? 0 : Math.floor(0.2 * total)) + 1;
  return Math.max(0, Math.min(to, total - last) - start);
}

/** What is wrong with dense layers, in a sentence; "" where nothing is. */
export function layersAmiss(text, layers) {
  const pieces = String(text ?? "").split(",").map((piece) => piece.trim()).filter(Boolean);
  const rising = (piece) => Number(piece.split("-")[0]) <= Number(piece.split("-").pop());
  const unreadable = pieces.filter((piece) => !/^\d{1,4}(\s*-\s*\d{1,4})?$/.test(piece) || !rising(piece));
  if (unreadable.length) return `dense layers: “${unreadable[0]}” cannot be read, so the run will be refused`;
  const beyond = pieces.filter((piece) => Number(piece.split("-").pop()) >= layers);
  return beyond.length ? `dense layers: ${beyond[0]} is more than the model has (0–${layers - 1})` : "";
}

/** Layer numbers such as "0, 1, 38-39" that a model of so many layers has; what cannot be read counts as none. */
export function countLayers(text, layers) {
  const chosen = new Set();
  for (const piece of String(text ?? "").split(",")) {
    const ends = piece.split("-").map((end) => end.trim());
    if (!ends.every((end) => /^\d{1,4}$/.test(end)) || ends.length > 2) continue;
    for (let layer = Number(ends[0]); layer <= Number(ends[ends.length - 1]); layer++) {
      if (layer < layers) chosen.add(layer);
    }
  }
  return chosen.size;
}

/** Why nothing will run sparse with these settings, in a sentence; "" where something will. */
export function whyDense(settings, model, tokens, blocks) {
  if (settings.backend === "dense") return "Everything runs dense: backend is set to dense. Calls are still counted.";
  if (settings.sparsity <= 0) return "Everything runs dense: sparsity 0 leaves no block out.";
  if (tokens < settings.min_tokens) {
    return `Everything runs dense: this video has ${count(tokens)} tokens, fewer than min tokens ` +
      `(${count(settings.min_tokens)}). Make it larger or longer, or lower min tokens to try anyway.`;
  }
  if (blocks.keep >= blocks.queries) return "Everything runs dense: this sparsity leaves no block out.";
  if (settings.start_percent > settings.end_percent) {
    return "Everything runs dense: start percent is behind end percent.";
  }
  if (countLayers(settings.dense_layers, model.layers) === model.layers) {
    return "Everything runs dense: dense layers names every layer.";
  }
  return "";
}

/**
 * The estimate for a panel: settings by widget name, a key of MODELS, a size in pixels, the adapter's method or "",
 * and the sampler's steps {total, from, to} or null. -> {tokens, why} or, where something runs sparse, its numbers too.
 */
export function estimate(settings, modelKey, size, adapter = "", steps = null) {
  const model = MODELS[modelKey];
  const width = model.dim / model.heads;
  const grid = tokenGrid(model, size);
  const tokens = grid[0] * grid[1] * grid[2];
  const plan = resolve(settings, adapter);
  const cost = attentionCost(grid, extraTokens(model), width, model.heads, {
    method: plan.method, trained: plan.trained, order: plan.order, rank: settings.rank, sparsity: settings.sparsity,
    slaVariant: settings.sla_variant, keepDiagonal: settings.keep_diagonal, keepFirstFrame: settings.keep_first_frame,
  });
  const why = whyDense(settings, model, tokens, cost);
  const amiss = layersAmiss(settings.dense_layers, model.layers);
  if (why) return { tokens, method: plan.method, why, amiss };

  const sparseLayers = model.layers - countLayers(settings.dense_layers, model.layers);
  const linear = linearFlops(model, cost.tokens) * model.layers;
  const dense = cost.dense * model.layers;
  const spent = cost.total * sparseLayers + cost.dense * (model.layers - sparseLayers);
  const numbers = {
    tokens, method: plan.method, why: "",
    untrained: ["rola", "sla"].includes(plan.method) && !plan.trained,
    kept: Math.round(cost.kept), blocks: cost.keys, density: cost.density,
    saved: 1.0 - spent / dense, attention: dense / spent, step: (dense + linear) / (spent + linear),
    denseLayers: model.layers - sparseLayers, amiss, call: cost.dense / cost.total,
    windowed: settings.start_percent > 0 || settings.end_percent < 1,
  };
  const own = steps ? steps.to - steps.from : 0; // of this sampler
  if (own > 0) {
    const sparse = sparseSteps(steps, plan.method, plan.first, settings.dense_last_steps);
    const now = sparse * (spent + linear) + (own - sparse) * (dense + linear);
    numbers.run = { steps: own, sparse, speedUp: (own * (dense + linear)) / now };
  }
  return numbers;
}
