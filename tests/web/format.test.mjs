// The panel's figures and sentences.

import assert from "node:assert/strict";
import { test } from "node:test";
import {
  count, duration, estimateWords, isMap, mapWords, percent, reportWords, sparseRange, times,
} from "../../web/js/format.js";

const REPORT = {
  node: "5", model: "WanModel", method: "ropeslr", adapter: "", sparsity: 0.9, backend: "triton", sparse_calls: 1740,
  dense_calls: { "dense layers": 12, "dense first steps": 60 }, density: 0.0996, recall: null, below: "",
  seconds: 372.4, completed: true, flops_saved: 0.861, attention_seconds: null, map: null,
};

test("numbers carry thousands separators and units", () => {
  assert.deepEqual([count(1182), count(12), count(1234567), count(999.6)], ["1,182", "12", "1,234,567", "1,000"]);
  assert.deepEqual([percent(0.8347), percent(1), percent(0.99999)], ["83.5 %", "100.0 %", "99.99 %"]);
  assert.deepEqual([times(9.04), times(12.34), times(9.97)], ["9.0×", "12×", "10×"]);
  assert.deepEqual([4.27, 9.97, 59.6, 372.4, 3600, 4000].map(duration), [
    "4.3 s", "10 s", "1:00 min", "6:12 min", "1:00 h", "1:06 h",
  ]);
});

test("an estimate says blocks, layers, steps", () => {
  const words = estimateWords({
    why: "", method: "rola", untrained: true, kept: 118, blocks: 1182, density: 0.1, saved: 0.89, attention: 9.04,
    step: 2.5, denseLayers: 1, windowed: false, run: { steps: 30, sparse: 29, speedUp: 2.4 },
  });
  assert.deepEqual(words.figures.map(([value]) => value), ["9.0×", "2.5×", "89.0 %"]);
  assert.deepEqual(words.lines, [
    "Keeps 118 of 1,182 blocks", "rola without its weights is the kept blocks alone", "1 layer dense",
    "29 of 30 steps sparse: sampling 2.4× faster",
  ]);
});

test("what runs dense is said alone", () => {
  assert.deepEqual(estimateWords({ why: "Dense." }), { figures: [], share: null, lines: ["Dense."] });
});

test("a report counts calls by reason, the most frequent first", () => {
  const words = reportWords(REPORT);
  assert.equal(words.title, "Last run · 6:12 min");
  assert.equal(words.brief, "1,740 of 1,812 calls sparse, 86.1 % attention FLOPs saved");
  assert.deepEqual(words.lines, [
    "1,740 of 1,812 calls sparse: ropeslr in triton, 10.0 % of blocks kept", "60 dense: dense first steps",
    "12 dense: dense layers",
  ]);
});

test("a report says time, recall, adapter, who lies below, and that it was cut short", () => {
  const words = reportWords({
    ...REPORT, adapter: "a.safetensors", recall: 0.9341, below: "sage of pack", completed: false,
    attention_seconds: { sparse: 141.2, dense: 38.4 }, call_seconds: { sparse: 0.081, dense: 0.533 },
  });
  assert.deepEqual(words.figures.slice(1), [["6.6×", "faster per call"], ["3:00 min", "in attention"]]);
  for (const wanted of [/recall 0\.934/, /a\.safetensors/, /sage of pack/, /cut short/, /a sparse call 81 ms, a dense one 533 ms/]) {
    assert.match(words.lines.join("\n"), wanted);
  }
});

test("a report of an older server, without most fields, is still told", () => {
  const words = reportWords({ sparse_calls: 0, dense_calls: {} });
  assert.equal(words.title, "Last run");
  assert.deepEqual(words.lines, ["0 of 0 calls sparse"]);
});

test("a run that cost more than dense says so, without a minus", () => {
  const words = reportWords({ sparse_calls: 4, dense_calls: {}, flops_saved: -0.224 });
  assert.deepEqual(words.figures[0], ["22.4 %", "more attention FLOPs"]);
  assert.equal(words.brief, "4 of 4 calls sparse, 22.4 % more attention FLOPs");
});

test("the map in words: dense steps, range, places that did not run", () => {
  const map = { layers: 3, steps: [0, 1, 2], density: [[1, 1, 1], [0.1, 0.3, 1], [0.1, null, 1]] };
  assert.ok(isMap(map) && !isMap(null) && !isMap({ layers: 3, steps: [], density: [] }));
  assert.deepEqual(sparseRange(map), [0.1, 0.3]);
  const words = mapWords(map);
  for (const wanted of [/3 steps by 3 layers/, /3 of 8 places sparse/, /10\.0 % to 30\.0 %/, /wholly dense: 1\./]) {
    assert.match(words, wanted);
  }
  assert.match(mapWords({ layers: 1, steps: [0], density: [[1]] }), /everything that ran was dense/);
  assert.deepEqual(sparseRange({ density: [[1, null]] }), [0, 0]);
});
