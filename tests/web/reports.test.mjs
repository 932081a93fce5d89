// Reports of runs: whose they are, which are kept, and which are of the settings of now.

import assert from "node:assert/strict";
import { test } from "node:test";
import { Reports, updateStatus } from "../../web/js/reports.js";
import { graphOf, OURS } from "./small_graphs.mjs";

const storage = (items = {}) => ({
  getItem: (key) => items[key] ?? null, setItem: (key, text) => { items[key] = text; },
});

/** Reports of a page that shows workflow "w", and its node 2. */
function page(store = storage()) {
  const reports = new Reports(store);
  reports.open("w");
  const { graph, node } = graphOf({ 2: OURS }, []);
  graph.id = "w";
  return { reports, graph, last: () => reports.of(graph, node(2)) };
}

test("a report is kept for its workflow", () => {
  const { reports, last } = page();
  assert.equal(last(), undefined);
  assert.ok(reports.receive({ node: "2", workflow: "w", sparsity: 0.9 }));
  assert.deepEqual([last().number, last().status, last().detail.sparsity], [1, "new", 0.9]);
  reports.receive({ node: "2", workflow: "w", sparsity: 0.5 });
  assert.deepEqual([last().number, last().detail.sparsity], [2, 0.5]);
});

test("a report without a workflow, or of one that the page never showed, is somebody else's", () => {
  const { reports, last } = page();
  for (const detail of [
    { node: "2" }, { node: "2", workflow: null }, { node: "2", workflow: "" }, { node: "2", workflow: "another" },
    { workflow: "w" }, null, undefined,
  ]) {
    assert.equal(reports.receive(detail), false);
  }
  assert.equal(last(), undefined);
});

test("a workflow that was queued here and then left still gets its report", () => {
  const { reports, last } = page();
  reports.open("another");
  assert.ok(reports.receive({ node: "2", workflow: "w" }));
  assert.ok(last());
});

test("a workflow without an id is none", () => {
  const reports = new Reports(storage());
  reports.open(undefined);
  assert.equal(reports.receive({ node: "2", workflow: undefined }), false);
});

test("reports and the workflows of the page outlive a reload", () => {
  const store = storage();
  const before = page(store);
  before.reports.receive({ node: "2", workflow: "w", sparsity: 0.9 });
  updateStatus(before.last(), "settings", 0.9);
  before.reports.save();
  const after = new Reports(store);
  after.load();
  assert.equal(after.byWorkflow.get("w").get("2").status, "fresh");
  assert.ok(after.receive({ node: "2", workflow: "w" }), "its run went on while the page was loaded again");
  new Reports(storage()).load(); // nothing stored
});

test("the reports of thirty workflows are kept, the latest", () => {
  const { reports } = page();
  for (let i = 0; i < 40; i++) {
    reports.open(String(i));
    reports.receive({ node: "2", workflow: String(i) });
  }
  const kept = reports.byWorkflow;
  assert.deepEqual([kept.size, kept.has("9"), kept.has("10")], [30, false, true]);
});

test("a new report is of the settings of now, unless sparsity has moved since", () => {
  const report = (sparsity) => ({ detail: { node: "2", sparsity }, number: 1, status: "new", basis: "" });
  const [same, moved, old] = [report(0.9), report(0.5), report(undefined)];
  for (const each of [same, moved, old]) updateStatus(each, "settings", 0.9);
  assert.deepEqual([same.status, moved.status, old.status], ["fresh", "stale", "fresh"]);
});

test("a report goes stale as settings move, and is fresh again as they come back", () => {
  const report = { detail: { node: "2", sparsity: 0.9 }, number: 1, status: "new", basis: "" };
  const seen = ["a", "b", "a"].map((basis) => {
    updateStatus(report, basis, 0.9);
    return report.status;
  });
  assert.deepEqual(seen, ["fresh", "stale", "fresh"]);
  const moved = { detail: { node: "2", sparsity: 0.5 }, number: 1, status: "new", basis: "" };
  updateStatus(moved, "a", 0.9);
  updateStatus(moved, "a", 0.5);
  assert.equal(moved.status, "stale", "which settings it had is not known");
});
