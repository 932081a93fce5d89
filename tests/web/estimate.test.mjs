// The panel's numbers: what it keeps, counts and calls dense.

import assert from "node:assert/strict";
import { test } from "node:test";
import { attentionCost, blockDensity, firstFrameBlocks, keptBlocks } from "../../web/js/costs.js";
import { estimate, readLayers, resolve, sparseSteps } from "../../web/js/estimate.js";
import { MODELS, tokenGrid } from "../../web/js/models.js";

const SETTINGS = {
  method: "auto", sparsity: 0.9, rank: 0, start_percent: 0, end_percent: 1, dense_first_steps: -1, dense_last_steps: 0,
  dense_layers: "", backend: "auto", block_order: "auto", min_tokens: 4096, keep_diagonal: false,
  keep_first_frame: false, sla_variant: "released", key_block: "auto", allocation: "auto", target: "sparsity", error: 0.05,
  query_block: "auto", precision: "auto",
};
const SIZE_480 = { width: 832, height: 480, length: 81 };
const SIZE_720 = { width: 1280, height: 720, length: 81 };

test("tokens of published sizes", () => {
  const tokens = (model, size) => tokenGrid(MODELS[model], size).reduce((one, other) => one * other);
  assert.equal(tokens("wan-1.3b", SIZE_480), 32760);
  assert.equal(tokens("wan-14b", SIZE_720), 75600);
  assert.equal(tokens("wan-5b", { width: 1280, height: 704, length: 121 }), 27280);
  assert.equal(tokens("hunyuan", { width: 1280, height: 720, length: 129 }), 118800);
  assert.equal(tokens("hunyuan-1.5", { width: 848, height: 480, length: 121 }), 31 * 30 * 53);
  assert.equal(tokens("h3", { width: 1344, height: 768, length: 124 }), 37 * 24 * 42);
  assert.equal(tokens("h3", { width: 640, height: 640, length: 5 }), 2 * 20 * 20);
  assert.equal(tokens("ltx-2", { width: 1280, height: 704, length: 121 }), 16 * 22 * 40);
  assert.equal(tokens("kandinsky-lite", { width: 768, height: 512, length: 121 }), 31 * 32 * 48);
  assert.equal(tokens("mochi", { width: 848, height: 480, length: 163 }), 28 * 30 * 53);
});

test("a side that the patch does not divide is padded up", () => {
  assert.deepEqual(tokenGrid(MODELS["wan-5b"], { width: 1280, height: 720, length: 121 }), [31, 23, 40]);
});

test("kept blocks round down, never below one, and 1 - 0.9 counts as a tenth", () => {
  assert.equal(keptBlocks(0.9, 1182), 118);
  assert.equal(keptBlocks(0.9, 10), 1);
  assert.equal(keptBlocks(0.9, 20), 2);
  assert.equal(keptBlocks(0.98, 3), 1);
});

test("required blocks are added to those kept by score", () => {
  const options = { sparsity: 0.9, order: "raster", keyBlock: 64, queryBlock: 64, keepDiagonal: true, keepFirstFrame: false };
  const { keys, kept } = blockDensity([1, 64, 64], 0, options);
  assert.deepEqual([keys, kept], [64, 7]);
  const all = blockDensity([1, 64, 64], 0, { ...options, keepFirstFrame: true });
  assert.equal(all.density, 1);
  const fine = blockDensity([1, 64, 64], 0, { ...options, keyBlock: 16 });
  assert.deepEqual([fine.keys, fine.kept], [256, 29], "25 by score, 4 of its own");
});

test("the first frame of a raster fills its blocks; in cube order it touches those of three or four frames", () => {
  assert.equal(firstFrameBlocks([21, 30, 52], "raster", 64), Math.ceil(1560 / 64));
  const cube = firstFrameBlocks([21, 30, 52], "cube", 64);
  assert.ok(cube >= 3 * 1560 / 64 - 1 && cube <= 4 * 1560 / 64 + 1, String(cube));
});

test("auto follows the adapter, and released weights start sparse", () => {
  const auto = (adapter) => resolve(SETTINGS, adapter);
  assert.deepEqual(auto(""), { method: "ropeslr", trained: false, order: "cube", keyBlock: 16, queryBlock: 64, shared: true, first: 1 });
  assert.deepEqual(auto("rola"), { method: "rola", trained: true, order: "raster", keyBlock: 64, queryBlock: 64, shared: false, first: 0 });
  assert.equal(resolve({ ...SETTINGS, method: "sla" }, "").first, 1);
  assert.equal(resolve({ ...SETTINGS, method: "adaspa" }, "").first, 0);
  assert.deepEqual(auto("unknown"), { method: "ropeslr", trained: true, order: "cube", keyBlock: 64, queryBlock: 64, shared: false, first: 1 });
  for (const [method, keyBlock, shared] of [["top-k", 16, true], ["top-k plain", 16, true], ["adaspa", 64, false]]) {
    const found = resolve({ ...SETTINGS, method }, "rola");
    assert.deepEqual([found.keyBlock, found.shared], [keyBlock, shared], method);
  }
  assert.equal(resolve({ ...SETTINGS, allocation: "uniform" }, "").shared, false);
  assert.deepEqual([auto("vsa").method, auto("vsa").order, auto("vsa").first], ["vsa", "tile", 0]);
  assert.equal(resolve({ ...SETTINGS, key_block: "32" }, "rola").keyBlock, 32);
  assert.ok(resolve({ ...SETTINGS, method: "sla" }, "unknown").trained);
});

test("sparse steps leave out first, last, and AdaSpa's warm-up with its search", () => {
  const whole = (total) => ({ total, from: 0, to: total });
  assert.equal(sparseSteps(whole(30), "ropeslr", 1, 2), 27);
  assert.equal(sparseSteps(whole(50), "adaspa", 0, 0), 39);
  assert.equal(sparseSteps(whole(4), "adaspa", 0, 0), 3);
  assert.equal(sparseSteps(whole(2), "ropeslr", 5, 0), 0);
});

test("two experts share one schedule's first and last steps", () => {
  const [high, low] = [{ total: 20, from: 0, to: 10 }, { total: 20, from: 10, to: 20 }];
  assert.deepEqual([high, low].map((steps) => sparseSteps(steps, "ropeslr", 1, 2)), [9, 8]);
  assert.deepEqual([high, low].map((steps) => sparseSteps(steps, "ropeslr", 12, 0)), [0, 8]);
  assert.deepEqual([high, low].map((steps) => sparseSteps(steps, "adaspa", 0, 0)), [5, 9]);
});

test("steps that go on from a video are sparse from the first, unless someone asks for dense ones", () => {
  const stage = { total: 3, from: 0, to: 3 };
  const sparse = (steps, first) => estimate({ ...SETTINGS, dense_first_steps: first }, "ltx-2", SIZE_720, "", steps).run.sparse;
  assert.deepEqual([sparse(stage, -1), sparse({ ...stage, begun: true }, -1), sparse({ ...stage, begun: true }, 1)], [2, 3, 2]);
});

test("dense layers count once, within the model, and none in a text that cannot be read", () => {
  const counted = (text) => readLayers(text, 40).count;
  assert.deepEqual(["0, 1, 38-39, 39", "38-45", "", " 0, 2 - 5,"].map(counted), [4, 2, 0, 5]);
  assert.deepEqual(["abc, -, 7x, 1-2-3", "0, 5-4"].map(counted), [0, 0]);
});

test("dense layers that cannot be read, or that the model lacks, are named", () => {
  const warning = (text) => estimate({ ...SETTINGS, dense_layers: text }, "wan-1.3b", SIZE_480).warning;
  assert.match(warning("0, abc"), /cannot read “abc”; the run will be refused/);
  assert.match(warning("0, 28-99"), /28-99 is more than this model has \(0–29\)/);
  assert.equal(warning(" 0, 2 - 5,"), "");
});

test("dense layers of more than 1000 characters are refused in the plan's words, whatever they hold", () => {
  const warning = (text) => estimate({ ...SETTINGS, dense_layers: text }, "wan-14b", SIZE_480).warning;
  assert.equal(warning("0-9999,".repeat(500)), "dense_layers is 3500 characters long; at most 1000 are read.");
  assert.equal(warning(`${"0,".repeat(500)}`), "");
  assert.match(warning(`${"0,".repeat(500)}1`), /is 1001 characters long/);
  const started = performance.now();
  for (let i = 0; i < 20; i++) warning("0-9999,".repeat(20_000));
  assert.ok(performance.now() - started < 1000, "140,000 characters took most of two seconds each");
});

test("a range costs what the model has of it", () => {
  const started = performance.now();
  for (let i = 0; i < 200; i++) readLayers("0-9999,".repeat(142), 40);
  assert.ok(performance.now() - started < 1000, "each took 20 ms or more");
});

test("the paper's own case: 90 % and rank 64 are ten times fewer FLOPs", () => {
  const numbers = estimate({ ...SETTINGS, rank: 64 }, "wan-1.3b", SIZE_480);
  assert.ok(Math.abs(numbers.attention - 10) < 0.5, String(numbers.attention));
  assert.ok(Math.abs(numbers.saved - (1 - 1 / numbers.attention)) < 1e-12);
});

test("higher sparsity and lower rank never cost more; a step gains less than its attention", () => {
  let before = null;
  for (const sparsity of [0.5, 0.7, 0.8, 0.9, 0.95, 0.98]) {
    const numbers = estimate({ ...SETTINGS, sparsity }, "wan-14b", SIZE_720, "", { total: 30, from: 0, to: 30 });
    assert.ok(numbers.step < numbers.attention && numbers.run.speedUp < numbers.step && numbers.run.speedUp > 1);
    if (before) assert.ok(numbers.attention > before.attention && numbers.step > before.step);
    before = numbers;
  }
  const rank = (value) => estimate({ ...SETTINGS, rank: value }, "wan-14b", SIZE_720).attention;
  assert.ok(rank(16) > rank(64) && rank(64) > rank(0));
});

test("methods differ in what replaces dropped blocks", () => {
  const total = (method, trained = false) => attentionCost([21, 30, 52], 0, 128, 12, {
    method, trained, order: "cube", keyBlock: 64, queryBlock: 64, rank: 0, sparsity: 0.9, slaVariant: "released",
  }).total;
  assert.ok(total("adaspa") < total("top-k plain") && total("top-k plain") < total("ropeslr"));
  assert.equal(total("rola"), total("top-k plain"));
  assert.ok(total("rola", true) > total("rola") && total("ropeslr", true) > total("ropeslr"));
});

test("text tokens of HunyuanVideo are kept whole", () => {
  const cost = attentionCost([10, 30, 52], 256, 128, 24, {
    method: "top-k plain", order: "cube", keyBlock: 64, queryBlock: 64, rank: 0, sparsity: 0.9, trained: false,
  });
  const blocks = Math.ceil(15600 / 64);
  const video = (keptBlocks(0.9, blocks) + 4) / (blocks + 4);
  assert.ok(Math.abs(cost.density - (1 - (1 - video) * 15600 / 15856)) < 1e-12);
});

for (const [name, change, size, words] of [
  ["backend dense", { backend: "dense" }, SIZE_480, /backend is set to dense/],
  ["sparsity 0", { sparsity: 0 }, SIZE_480, /sparsity 0 drops/],
  ["too few tokens", {}, { width: 448, height: 448, length: 9 }, /2,352 tokens, fewer than min tokens \(4,096\)\./],
  ["nothing to drop", { sparsity: 0.01, min_tokens: 0 }, { width: 64, height: 64, length: 1 }, /drops no block/],
  ["every layer dense", { dense_layers: "0-29" }, SIZE_480, /every layer/],
  ["an empty window", { start_percent: 0.8, end_percent: 0.2 }, SIZE_480, /start percent is not below end percent/],
  ["a window of no length", { start_percent: 0.5, end_percent: 0.5 }, SIZE_480, /start percent is not below end percent/],
]) {
  test(`said plainly instead of numbers: ${name}`, () => {
    const numbers = estimate({ ...SETTINGS, ...change }, "wan-1.3b", size);
    assert.match(numbers.why, words);
    assert.equal(numbers.attention, undefined);
  });
}

test("a mere number of tokens is estimated like the size that has as many", () => {
  for (const model of ["wan-14b", "hunyuan"]) {
    const known = estimate(SETTINGS, model, SIZE_720);
    const text = model === "hunyuan" ? 256 : 0; // which the report counts too
    const counted = estimate({ ...SETTINGS, keep_first_frame: true }, model, { tokens: known.tokens + text });
    assert.deepEqual([counted.tokens, counted.attention, counted.step], [known.tokens, known.attention, known.step]);
  }
  assert.equal(estimate({ ...SETTINGS, min_tokens: 0 }, "hunyuan", { tokens: 100 }).tokens, 1);
});

test("dense layers take their share of what is saved", () => {
  const all = estimate(SETTINGS, "wan-1.3b", SIZE_480);
  const half = estimate({ ...SETTINGS, dense_layers: "0-14" }, "wan-1.3b", SIZE_480);
  assert.ok(Math.abs(half.saved - all.saved / 2) < 1e-12);
});
