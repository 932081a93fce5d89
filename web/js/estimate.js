// What a choice of settings saves: what "auto" means, what stays dense and why, and how much faster the rest is.
// @ts-check

import { attentionCost, BLOCK, linearFlops } from "./costs.js";
import { count } from "./format.js";
import { MODELS, tokenGrid } from "./models.js";

/** @type {string[]} */
const TRAINED = ["ropeslr", "rola", "sla"];
/** @type {string[]} Methods whose heads find their own share of blocks, and whose key blocks are FINE. */
const ALLOCATED = ["ropeslr", "top-k", "top-k plain"];
const FINE = 16; // tokens of a key block where nothing asks for BLOCK
const LONGEST_LAYERS = 1000; // characters of dense_layers, as in attention/plan.py

/**
 * The method that runs, its block order and blocks, its dense first steps, whether it has trained weights, and whether
 * heads share the kept blocks. Query blocks whose size the run itself finds out are taken to be the smaller ones; an
 * unknown adapter is taken to fit, and every adapter to have been trained with key blocks of 64.
 * @param {Pick<RoPeSLR.Settings,
 *   "method" | "block_order" | "key_block" | "query_block" | "allocation" | "dense_first_steps">} settings
 * @param {RoPeSLR.AdapterMethod} adapter
 * @returns {RoPeSLR.ResolvedPlan}
 */
export function resolve(settings, adapter) {
  const fits = TRAINED.includes(settings.method) ? settings.method : "ropeslr";
  const known = adapter === "unknown" ? fits : adapter;
  const method = settings.method === "auto" ? adapterOr(known, "ropeslr") : settings.method;
  const trained = Boolean(known) && method === known;
  const released = method === "rola" || method === "sla";
  if (method === "vsa") { // its tiles are part of it
    const first = Math.max(0, settings.dense_first_steps);
    return { method, trained, order: "tile", keyBlock: BLOCK, queryBlock: BLOCK, shared: false, first };
  }
  const order = settings.block_order === "auto" ? (released ? "raster" : "cube") : settings.block_order;
  const free = !trained && ALLOCATED.includes(method);
  const keyBlock = settings.key_block === "auto" ? (free ? FINE : BLOCK) : Number(settings.key_block);
  const queryBlock = settings.query_block === "auto" ? BLOCK : Number(settings.query_block);
  let first = settings.dense_first_steps;
  if (first < 0) first = (released && trained) || method === "adaspa" ? 0 : 1;
  const shared = free && settings.allocation === "auto";
  return { method, trained, order, keyBlock, queryBlock, shared, first };
}

/**
 * @param {string} adapter
 * @param {RoPeSLR.Method} otherwise
 */
function adapterOr(adapter, otherwise) {
  return adapter ? /** @type {RoPeSLR.Method} */ (adapter) : otherwise;
}

/**
 * How many steps of a sampler run sparse; AdaSpa stays dense until its first search is done.
 * @param {RoPeSLR.Steps} steps
 * @param {string} method
 * @param {number} first dense steps at the start of the whole schedule
 * @param {number} last and at its end
 */
export function sparseSteps({ total, from, to }, method, first, last) {
  let start = Math.max(from, first);
  if (method === "adaspa") start = Math.max(start, total <= 8 ? 0 : Math.floor(0.2 * total)) + 1;
  return Math.max(0, Math.min(to, total - last) - start);
}

/**
 * Layer numbers such as "0, 1, 38-39": how many of them a model has, and what is wrong with the text. As in the plan, a
 * text with a mistake names no layer at all.
 * @param {string} text
 * @param {number} layers
 * @returns {{ count: number, warning: string }}
 */
export function readLayers(text, layers) {
  const length = text.length > LONGEST_LAYERS ? [...text].length : text.length; // as Python counts them
  if (length > LONGEST_LAYERS) {
    return { count: 0, warning: `dense_layers is ${length} characters long; at most ${LONGEST_LAYERS} are read.` };
  }
  const chosen = new Set();
  let beyond = "";
  for (const piece of text.split(",").map((each) => each.trim()).filter(Boolean)) {
    const found = /^(\d{1,4})(?:\s*-\s*(\d{1,4}))?$/.exec(piece);
    const [first, last] = found ? [Number(found[1]), Number(found[2] ?? found[1])] : [1, 0];
    if (first > last) return { count: 0, warning: `dense layers: cannot read “${piece}”; the run will be refused` };
    if (last >= layers) beyond ||= piece;
    for (let layer = first; layer <= Math.min(last, layers - 1); layer++) chosen.add(layer);
  }
  const warning = beyond && `dense layers: ${beyond} is more than this model has (0–${layers - 1})`;
  return { count: chosen.size, warning };
}

/**
 * Why nothing will run sparse; "" where something will.
 * @param {RoPeSLR.Settings} settings
 * @param {number} tokens
 * @param {RoPeSLR.BlockCounts} blocks
 * @param {boolean} everyLayer whether dense_layers lists them all
 * @param {boolean} always whether the method runs whatever length and sparsity
 */
export function whyDense(settings, tokens, blocks, everyLayer, always = false) {
  if (settings.backend === "dense") return "Everything runs dense: backend is set to dense. Calls are still counted.";
  if (settings.sparsity <= 0 && !always) return "Everything runs dense: sparsity 0 drops no block.";
  if (tokens < settings.min_tokens && !always) {
    return `Everything runs dense: this video has ${count(tokens)} tokens, fewer than min tokens ` +
      `(${count(settings.min_tokens)}). Make it larger or longer, or lower min tokens to try anyway.`;
  }
  if (blocks.keep >= blocks.ranked && !always) return "Everything runs dense: this sparsity drops no block.";
  if (settings.start_percent >= settings.end_percent) {
    return "Everything runs dense: start percent is not below end percent.";
  }
  return everyLayer ? "Everything runs dense: dense layers lists every layer." : "";
}

/**
 * The estimate for a panel.
 * @param {RoPeSLR.Settings} settings
 * @param {string} modelKey of MODELS
 * @param {RoPeSLR.Size} size
 * @param {RoPeSLR.AdapterMethod} adapter
 * @param {RoPeSLR.Steps | null} steps
 * @returns {RoPeSLR.Estimate}
 */
export function estimate(settings, modelKey, size, adapter = "", steps = null) {
  const model = MODELS[modelKey];
  const plan = resolve(settings, adapter);
  const grid = gridOf(model, size);
  const cost = attentionCost(grid, model.others, (model.inner ?? model.dim) / model.heads, model.heads, {
    method: plan.method, trained: plan.trained, order: plan.order, keyBlock: plan.keyBlock,
    queryBlock: plan.queryBlock, rank: settings.rank, sparsity: settings.sparsity, slaVariant: settings.sla_variant,
    keepDiagonal: settings.keep_diagonal,
    // How many tokens a frame has is not known from a count of them; what is left out keeps this an upper bound.
    keepFirstFrame: settings.keep_first_frame && !("tokens" in size),
  });
  const tokens = grid[0] * grid[1] * grid[2];
  const denseLayers = readLayers(settings.dense_layers, model.layers);
  const why = whyDense(settings, tokens, cost, denseLayers.count === model.layers, plan.method === "vsa");
  const { warning } = denseLayers;
  if (why) return { tokens, method: plan.method, why, warning };

  const sparseLayers = model.layers - denseLayers.count;
  const linear = linearFlops(model, cost.tokens) * model.layers;
  const dense = cost.dense * model.layers;
  const spent = cost.total * sparseLayers + cost.dense * denseLayers.count;
  const own = steps ? steps.to - steps.from : 0; // of this sampler
  /** @type {RoPeSLR.SparseEstimate} */
  const numbers = {
    tokens, method: plan.method, why: "", warning,
    untrained: ["rola", "sla"].includes(plan.method) && !plan.trained,
    kept: Math.round(cost.kept), blocks: cost.keys, density: cost.density,
    saved: 1.0 - spent / dense, attention: dense / spent, step: (dense + linear) / (spent + linear),
    call: cost.dense / cost.total, denseLayers: denseLayers.count,
    shared: plan.shared ? (settings.target === "error" ? "error" : "sparsity") : "",
    windowed: settings.start_percent > 0 || settings.end_percent < 1,
  };
  if (steps && own > 0) {
    const first = steps.begun && settings.dense_first_steps < 0 ? 0 : plan.first;
    const sparse = sparseSteps(steps, plan.method, first, settings.dense_last_steps);
    const now = sparse * (spent + linear) + (own - sparse) * (dense + linear);
    numbers.run = { steps: own, sparse, speedUp: (own * (dense + linear)) / now };
  }
  return numbers;
}

/**
 * The grid of a size; of a mere number of tokens, one that has as many.
 * @param {RoPeSLR.Model} model
 * @param {RoPeSLR.Size} size
 * @returns {RoPeSLR.Grid}
 */
function gridOf(model, size) {
  return "tokens" in size ? [1, 1, Math.max(1, size.tokens - model.others)] : tokenGrid(model, size);
}
