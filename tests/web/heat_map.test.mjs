// The map of a run: what can be drawn, and what it says in words.

import assert from "node:assert/strict";
import { test } from "node:test";
import { isMap, mapText, sparseRange } from "../../web/js/heat_map.js";

const MAP = { layers: 3, steps: [0, 1, 2], density: [[1, 1, 1], [0.1, 0.3, 1], [0.1, null, 1]] };

test("a map needs layers, and densities for every step", () => {
  assert.ok(isMap(MAP));
  const empty = { layers: 3, steps: [], density: [] };
  for (const map of [null, undefined, {}, empty, { ...MAP, layers: 0 }, { ...MAP, density: [[1]] }]) {
    assert.ok(!isMap(map), JSON.stringify(map));
  }
});

test("the range leaves out dense cells and those that did not run", () => {
  assert.deepEqual(sparseRange(MAP), [0.1, 0.3]);
  assert.deepEqual(sparseRange({ layers: 2, steps: [0], density: [[1, null]] }), [0, 0]);
});

test("in words: dense steps, range, cells that did not run", () => {
  const text = mapText(MAP).replaceAll("\u00a0", " ");
  assert.match(text, /3 steps by 3 layers: 3 of 8 cells sparse, from 10\.0 % to 30\.0 %, mean 16\.7 %\./);
  assert.match(text, /Dense steps: 1\.$/);
});

test("a map of one step and one layer", () => {
  const text = mapText({ layers: 1, steps: [0], density: [[1]] });
  assert.equal(text, "Map of kept blocks, 1 step by 1 layer: every cell is dense.");
});

test("a map of many cells", () => {
  const density = Array.from({ length: 10_000 }, () => Array(60).fill(0.25));
  assert.deepEqual(sparseRange({ layers: 60, steps: density.map((_, step) => step), density }), [0.25, 0.25]);
});

test("a step with no cell that ran is not dense", () => {
  const text = mapText({ layers: 2, steps: [0, 1], density: [[null, null], [0.5, 1]] });
  assert.match(text, /1 of 2 cells sparse/);
  assert.ok(!text.includes("Dense steps"));
});
