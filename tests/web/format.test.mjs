// The panel's figures and sentences.

import assert from "node:assert/strict";
import { test } from "node:test";
import {
  count, duration, estimateText, percent, plural, reportText, shortDuration, sizeText, times,
} from "../../web/js/format.js";

/** Numbers keep together with their units; the tests do not show that everywhere. */
const spaced = (value) => JSON.parse(JSON.stringify(value).replaceAll("\u00a0", " "));

const REPORT = {
  node: "5", model: "WanModel", method: "ropeslr", adapter: "", sparsity: 0.9, backend: "triton", sparse_calls: 1740,
  dense_calls: { "dense layers": 12, "dense first steps": 60 }, density: 0.0996, recall: null, previous: "",
  seconds: 372.4, completed: true, flops_saved: 0.861, attention_seconds: null, map: null,
};

test("numbers carry thousands separators and units", () => {
  assert.deepEqual([count(1182), count(12), count(1234567), count(999.6)], ["1,182", "12", "1,234,567", "1,000"]);
  assert.equal(percent(0.8347), "83.5\u00a0%");
  assert.deepEqual(spaced([0.8347, 1, 0.99999].map(percent)), ["83.5 %", "100.0 %", "99.99 %"]);
  assert.deepEqual([times(9.04), times(12.34), times(9.97)], ["9.0×", "12×", "10×"]);
  assert.deepEqual(spaced([4.27, 9.97, 59.6, 372.4, 3600, 4000].map(duration)), [
    "4.3 s", "10 s", "1:00 min", "6:12 min", "1:00 h", "1:06 h",
  ]);
  assert.deepEqual(spaced([0.0042, 0.0123, 0.49, 1.2].map(shortDuration)), ["4.2 ms", "12 ms", "490 ms", "1.2 s"]);
});

test("one is one, everything else many", () => {
  const steps = [0, 1, 2, 1000].map((each) => plural(each, "step"));
  assert.deepEqual(steps, ["0 steps", "1 step", "2 steps", "1,000 steps"]);
});

test("a size is said in pixels and frames, or as the tokens of the last run", () => {
  assert.equal(sizeText({ width: 832, height: 480, length: 81 }), "832 × 480, 81 frames");
  assert.equal(sizeText({ width: 832.4, height: 480, length: 1 }), "832 × 480, 1 frame");
  assert.equal(sizeText({ tokens: 32760 }), "32,760 tokens, as in the last run");
});

test("an estimate says blocks, layers, steps", () => {
  const text = spaced(estimateText({
    why: "", method: "rola", untrained: true, kept: 118, blocks: 1182, density: 0.1, saved: 0.89, attention: 9.04,
    step: 2.5, denseLayers: 1, windowed: false, run: { steps: 30, sparse: 29, speedUp: 2.4 },
  }));
  assert.deepEqual(text.figures.map(([value]) => value), ["9.0×", "2.5×", "89.0 %"]);
  assert.deepEqual(text.lines, [
    "Keeps 118 of 1,182 blocks", "rola has no trained weights here: only block-sparse attention runs", "1 layer dense",
    "29 of 30 steps sparse: sampling 2.4× faster",
  ]);
});

test("steps that are none sparse are counted, without a gain", () => {
  const numbers = { why: "", kept: 1, blocks: 2, attention: 1, step: 1, saved: 0, density: 1 };
  const text = (run) => estimateText({ ...numbers, run }).lines[1];
  assert.equal(text({ steps: 1, sparse: 0, speedUp: 1 }), "0 of 1 step sparse");
  assert.equal(text({ steps: 4, sparse: 0, speedUp: 1 }), "0 of 4 steps sparse");
});

test("what runs dense is said alone", () => {
  assert.deepEqual(estimateText({ why: "Dense." }), { figures: [], share: null, lines: ["Dense."] });
});

test("a report counts calls by reason, the most frequent first", () => {
  const text = spaced(reportText(REPORT));
  assert.equal(text.title, "Last run · 6:12 min");
  assert.equal(text.brief, "1,740 of 1,812 calls sparse, 86.1 % attention FLOPs saved");
  assert.deepEqual(text.lines, [
    "1,740 of 1,812 calls sparse: ropeslr in triton, 10.0 % of blocks kept", "60 dense: dense first steps",
    "12 dense: dense layers",
  ]);
});

test("a report says time, recall, adapter, the previous override, and that it did not finish", () => {
  const text = spaced(reportText({
    ...REPORT, adapter: "a.safetensors", recall: 0.9341, previous: "sage of pack", completed: false,
    attention_seconds: { sparse: 141.2, dense: 38.4 }, call_seconds: { sparse: 0.081, dense: 0.533 },
  }));
  assert.deepEqual(text.figures.slice(1), [["6.6×", "faster per call"], ["3:00 min", "in attention"]]);
  for (const wanted of [
    /recall 0\.934/, /a\.safetensors/, /Dense calls used sage of pack/, /did not finish/,
    /a sparse call 81 ms, a dense call 533 ms/,
  ]) {
    assert.match(text.lines.join("\n"), wanted);
  }
});

test("a report of an older server, without most fields, is still told", () => {
  const text = spaced(reportText({ sparse_calls: 0, dense_calls: {} }));
  assert.equal(text.title, "Last run");
  assert.deepEqual(text.lines, ["0 of 0 calls sparse"]);
});

test("a run that cost more than dense says so, without a minus", () => {
  const text = spaced(reportText({ sparse_calls: 4, dense_calls: {}, flops_saved: -0.224 }));
  assert.deepEqual(text.figures[0], ["22.4 %", "more attention FLOPs"]);
  assert.equal(text.brief, "4 of 4 calls sparse, 22.4 % more attention FLOPs");
});
