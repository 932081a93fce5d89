// Links followed through small graphs.

import assert from "node:assert/strict";
import { test } from "node:test";
import { allGraphs, findByExecutionId, hasExecutionId, linkOf, sourceOf, targetsOf } from "../../web/js/graph.js";
import { graphOf, LOADER, MODEL, OURS, withSubgraph } from "./small_graphs.mjs";

const LORA = ["LoraLoaderModelOnly", { model: MODEL }, [MODEL], { lora_name: "x.safetensors" }];

/** The id of the node that the model of `node` comes from. */
const loaderOf = ({ graph, node }) => sourceOf(graph, node(2), node(2).inputs[0])?.node.id;

test("links are found in every form that frontends keep them in", () => {
  const link = { origin_id: 1, origin_slot: 0, target_id: 2, target_slot: 0 };
  const getLink = (id) => (id === 7 ? link : null);
  for (const graph of [{ links: new Map([[7, link]]) }, { links: { 7: link } }, { getLink }]) {
    assert.equal(linkOf(graph, 7), link);
    assert.equal(linkOf(graph, 8), null);
    assert.equal(linkOf(graph, null), null);
  }
});

test("a link's id is no name of JavaScript's", () => {
  assert.equal(linkOf({ links: {} }, "toString"), null);
  assert.equal(linkOf({ links: {} }, "constructor"), null);
});

test("reroutes and bypassed nodes hand on what enters them", () => {
  const graph = graphOf({ 1: LOADER, 2: OURS, 5: LORA, 6: ["Reroute", { "": "*" }, ["*"]] }, [
    [1, 0, 6, ""], [6, 0, 5, "model"], [5, 0, 2, "model"],
  ]);
  assert.equal(loaderOf(graph), 5);
  graph.node(5).mode = 4;
  assert.equal(loaderOf(graph), 1);
  graph.node(1).mode = 4; // a bypassed node without an input hands on nothing
  assert.equal(loaderOf(graph), undefined);
});

test("a muted node gives nothing", () => {
  const graph = graphOf({ 1: LOADER, 2: OURS }, [[1, 0, 2, "model"]]);
  graph.node(1).mode = 2;
  assert.equal(loaderOf(graph), undefined);
});

test("a circle ends", () => {
  const reroute = ["Reroute", { "": "*" }, ["*"]];
  const graph = graphOf({ 2: OURS, 5: reroute, 6: reroute }, [[5, 0, 6, ""], [6, 0, 5, ""], [5, 0, 2, "model"]]);
  assert.equal(loaderOf(graph), undefined);
});

test("subgraphs are crossed both ways, and counted once", () => {
  const { root, ours, outer } = withSubgraph();
  assert.equal(allGraphs(root).length, 2);
  assert.equal(sourceOf(root, ours, ours.inputs[0]).node, outer.node(1));
  assert.deepEqual(targetsOf(root, ours, 0).map(({ node }) => node), [outer.node(3)]);
});

test("execution ids name nodes in subgraphs", () => {
  const { root, ours, outer } = withSubgraph();
  assert.equal(findByExecutionId(root, "12:7"), ours);
  assert.equal(findByExecutionId(root, 3), outer.node(3));
  assert.equal(findByExecutionId(root, "99:7"), null);
  assert.ok(hasExecutionId(root, ours, "12:7") && hasExecutionId(root, ours, "99:7"));
  assert.ok(!hasExecutionId(root, ours, "3") && !hasExecutionId(root, ours, "12:8"));
});
