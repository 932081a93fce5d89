// What an input is given: its own widget's value, or that of the very output linked to it.

import assert from "node:assert/strict";
import { test } from "node:test";
import { numberOf, valueOf } from "../../web/js/values.js";
import { graphOf, LINKED, withSubgraph } from "./small_graphs.mjs";

/** The length of node 4, which is linked to output `slot` of node 9. */
function lengthFrom(source, slot = 0, others = {}, wires = []) {
  const { graph, node } = graphOf({ 4: LINKED, 9: source, ...others }, [[9, slot, 4, "length"], ...wires]);
  return valueOf(graph, node(4), "length");
}

test("an input that is not linked has its widget's value", () => {
  const { graph, node } = graphOf({ 4: LINKED }, []);
  assert.equal(valueOf(graph, node(4), "width"), 16);
  assert.equal(valueOf(graph, node(4), "nothing"), undefined);
});

test("a constant gives its only value, with or without a control below it", () => {
  assert.equal(lengthFrom(["PrimitiveInt", {}, ["INT"], { value: 81 }]), 81);
  assert.equal(lengthFrom(["PrimitiveInt", {}, ["INT"], { value: 81, fixed: "fixed" }]), 81);
  assert.equal(lengthFrom(["PrimitiveNode", {}, ["INT"], { value: 81, control_after_generate: "randomize" }]), 81);
});

test("an output follows its own widget, not the first", () => {
  const outputs = ["width:INT", "height:INT", "frames:INT"];
  const settings = ["Settings", {}, outputs, { width: 1280, height: 720, frames: 81 }];
  assert.deepEqual([0, 1, 2].map((slot) => lengthFrom(settings, slot)), [1280, 720, 81]);
});

test("an output without a widget of its own is unknown", () => {
  const video = ["LoadVideo", {}, ["IMAGE:IMAGE", "frame_count:INT"], { force_size: 1280, frame_cap: 81 }];
  assert.equal(lengthFrom(video, 1), undefined);
  assert.equal(lengthFrom(["AddInts", {}, ["INT"], { a: 1280, b: 81 }]), undefined);
  assert.equal(lengthFrom(["SquareRoot", {}, ["FLOAT"], { x: 6561 }]), undefined);
});

test("what a node measures in a picture is not what its widget says", () => {
  const resize = ["ImageResize", { image: "IMAGE" }, ["IMAGE:IMAGE", "width:INT"], { width: 1280 }];
  const wires = [[8, 0, 9, "image"]];
  assert.equal(lengthFrom(resize, 1, { 8: ["LoadImage", {}, ["IMAGE"], { image: "a.png" }] }, wires), undefined);
});

test("values are followed through constants that are linked themselves, and over a subgraph's border", () => {
  const { root, ours, outer } = withSubgraph();
  ours.inputs.push({ name: "rank", type: "INT", link: 92, widget: { name: "rank" } });
  ours.graph.links.set(92, { origin_id: -10, origin_slot: 1, target_id: 7, target_slot: 2 });
  outer.node(12).inputs.push({ name: "rank_1", type: "INT", link: null });
  outer.node(12).widgets.push({ name: "text", value: "x" }, { name: "rank_1", value: 32 });
  assert.equal(valueOf(root, ours, "rank"), 32);
  const chain = ["PrimitiveInt", { value: "INT" }, ["INT"], { value: 5 }];
  assert.equal(lengthFrom(chain, 0, { 8: ["PrimitiveInt", {}, ["INT"], { value: 97 }] }, [[8, 0, 9, "value"]]), 97);
});

test("a switch gives the side that it is set to", () => {
  const int = (value) => ["PrimitiveInt", {}, ["INT"], { value }];
  const side = (on, wired = true) => lengthFrom(
    ["ComfySwitchNode", { on_false: "INT", on_true: "INT", switch: "BOOLEAN" }, ["output:INT"], { switch: on }], 0,
    { 7: int(81), 8: int(121) }, wired ? [[7, 0, 9, "on_false"], [8, 0, 9, "on_true"]] : [],
  );
  assert.deepEqual([side(false), side(true), side(true, false), side("?")], [81, 121, undefined, undefined]);
});

test("a converted number is whole on its second output", () => {
  const convert = (value) => ["ComfyNumberConvert", {}, ["FLOAT", "INT"], { value }];
  assert.equal(lengthFrom(convert("81.7"), 1), 81);
  assert.equal(lengthFrom(convert("81.5"), 0), 81.5);
  const { graph, node } = graphOf({ 4: LINKED, 9: convert("many") }, [[9, 1, 4, "length"]]);
  assert.equal(numberOf(graph, node(4), "length"), undefined);
});

test("a question about nodes that all depend on each other ends soon", () => {
  const inputs = { "values.a": "INT", "values.b": "INT" };
  const math = ["ComfyMathExpression", inputs, ["FLOAT", "INT", "BOOL"], { expression: "a + b" }];
  const nodes = { 4: LINKED };
  const wires = [[10, 1, 4, "length"]];
  for (let id = 10; id < 60; id++) {
    nodes[id] = math;
    wires.push([id === 59 ? 10 : id + 1, 1, id, "values.a"], [id === 59 ? 10 : id + 1, 1, id, "values.b"]);
  }
  const { graph, node } = graphOf(nodes, wires);
  assert.equal(valueOf(graph, node(4), "length"), undefined);
});
