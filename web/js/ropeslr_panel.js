// The live panel on RoPeSLR Sparse Attention: an estimate before the run, and what happened after it.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { estimate, MODELS } from "./estimate.js";
import { isMeant, valueOf } from "./graph.js";
import { graphContext, whyIdle } from "./graph_context.js";
import { createView, STYLE } from "./panel_view.js";

const NODE = "RoPeSLRSparseAttention";
const EVENT = "ropeslr.report";
const STORE = "ropeslr.reports"; // in the session's storage
const MARGIN = 6; // of the classic renderer around the element
const WIDTH = 340; // of a new node: the figures stand side by side
const PADDING = 4; // of the element above and below its body
const LOOK_AROUND_MS = 500; // how often a visible panel looks whether other nodes changed
const CHOSEN = { model: "ropeslr_model", size: "ropeslr_size" }; // node.properties
const NAMES = Object.fromEntries(Object.entries(MODELS).map(([key, model]) => [key, model.name]));
const DEFAULTS = {
  method: "auto", sparsity: 0.9, rank: 0, start_percent: 0, end_percent: 1, dense_first_steps: -1, dense_last_steps: 0,
  dense_layers: "", backend: "auto", block_order: "auto", min_tokens: 4096, keep_diagonal: false,
  keep_first_frame: false, sla_variant: "released",
};

/** Let the wheel and the middle button over an element of the classic renderer move the canvas below it. */
function passToCanvas(element) {
  const pass = (name, isMeant) => safely((event) => {
    if (!globalThis.LiteGraph?.vueNodesMode && isMeant(event)) app.canvas?.[name]?.(event);
  });
  const middle = (event) => event.button === 1 || (event.buttons & 4) !== 0;
  element.addEventListener("wheel", pass("processMouseWheel", () => true), { passive: false });
  element.addEventListener("pointerdown", pass("processMouseDown", middle));
  element.addEventListener("pointermove", pass("processMouseMove", middle));
  element.addEventListener("pointerup", pass("processMouseUp", middle));
}

/** A function that never throws into the graph. */
function safely(run) {
  return function (...given) {
    try {
      return run.apply(this, given);
    } catch (error) {
      console.debug("RoPeSLR panel:", error);
      return undefined;
    }
  };
}

/** Run `then` after a node's or widget's own callback, whose answer stays. */
function chain(owner, name, then) {
  const before = owner[name];
  owner[name] = function (...given) {
    const answer = before?.apply(this, given);
    then();
    return answer;
  };
}

function rootGraph() {
  return app.rootGraph ?? app.graph?.rootGraph ?? app.graph;
}

function settingsOf(node) {
  const entries = Object.entries(DEFAULTS).map(([name, initial]) => {
    const value = valueOf(rootGraph(), node, name);
    return [name, typeof value === typeof initial ? value : initial];
  });
  return Object.fromEntries(entries);
}

function chosenSize(node) {
  const size = node.properties?.[CHOSEN.size];
  return size && [size.width, size.height, size.length].every((side) => side > 0) ? size : null;
}

/** Everything that the view shows, read anew. */
function stateOf(node, report) {
  const around = graphContext(rootGraph(), node);
  const chosenModel = node.properties?.[CHOSEN.model];
  const model = around.model || (chosenModel in MODELS ? chosenModel : "");
  const size = around.size ?? chosenSize(node);
  const settings = settingsOf(node);
  const idle = whyIdle(node);
  let numbers = idle ? { why: idle } : null;
  if (!idle && model && size) numbers = estimate(settings, model, size, around.adapter, around.steps);
  const found = { model: Boolean(around.model), size: Boolean(around.size) };
  const basis = JSON.stringify([settings, model, size, around.adapter, around.steps, idle]);
  return { models: NAMES, model, size, found, numbers, basis, idle: idle && "before it was switched off",
    report: report?.detail ?? null, fresh: report?.basis === basis };
}

const KEPT = 30; // workflows whose last reports are kept
// workflow's id -> Map of execution id -> {detail, number, basis}: a node is made anew whenever its tab is opened.
const reports = new Map();
const panels = new Set(); // those on the page

/** Keep a report for its workflow, which may not be the one that is open, and show it where it is. */
const receive = safely(({ detail }) => {
  if (!detail) return;
  const workflow = detail.workflow ?? rootGraph()?.id;
  const ofWorkflow = reports.get(workflow) ?? new Map();
  reports.delete(workflow); // and to the end, as the latest
  reports.set(workflow, ofWorkflow);
  if (reports.size > KEPT) reports.delete(reports.keys().next().value);
  const number = (ofWorkflow.get(detail.node)?.number ?? 0) + 1;
  ofWorkflow.set(detail.node, { detail, number, basis: null });
  for (const panel of panels) panel.update();
});

/** Reports outlive a reload of the page, as long as its tab of the browser is open. */
const remember = safely(() => {
  sessionStorage.setItem(STORE, JSON.stringify([...reports].map(([id, ofWorkflow]) => [id, [...ofWorkflow]])));
});

const recall = safely(() => {
  const kept = JSON.parse(sessionStorage.getItem(STORE) ?? "[]");
  for (const [id, ofWorkflow] of kept) reports.set(id, new Map(ofWorkflow));
});

/** The last report of a node; undefined before the first. */
function reportOf(node) {
  const root = rootGraph();
  for (const [id, report] of reports.get(root?.id) ?? []) if (isMeant(root, node, id)) return report;
  return undefined;
}

class Panel {
  constructor(node) {
    this.node = node;
    this.shown = "";
    this.height = 0;
    this.loose = false;
    this.pending = false;
    this.visible = true;
    this.update = safely(() => this.refresh());
    this.view = createView(document, safely((kind, value) => this.choose(kind, value)));
    this.widget = node.addDOMWidget("ropeslr_panel", "ROPESLR_PANEL", this.view.element, {
      serialize: false, hideOnZoom: false, margin: MARGIN,
      getMinHeight: () => this.height + 2 * MARGIN, getMaxHeight: () => this.height + 2 * MARGIN,
    });
    this.widget.serialize = false; // neither in widgets_values nor in the prompt
    if (node.size[0] < WIDTH) node.setSize([WIDTH, node.size[1]]);
    passToCanvas(this.view.element);
    this.listen();
    this.later();
  }

  listen() {
    const { node } = this;
    const later = () => this.later();
    for (const widget of node.widgets ?? []) if (widget !== this.widget) chain(widget, "callback", later);
    for (const name of ["onConnectionsChange", "onConfigure", "onAdded"]) chain(node, name, later);
    chain(node, "onRemoved", safely(() => this.stop()));
    this.resized = new ResizeObserver(safely(() => this.fit()));
    this.seen = new IntersectionObserver(([entry]) => { this.visible = entry.isIntersecting; });
    this.start();
  }

  start() {
    if (this.timer) return;
    panels.add(this);
    this.resized.observe(this.view.body);
    this.seen.observe(this.view.element);
    this.timer = setInterval(() => { if (this.visible && !document.hidden) this.update(); }, LOOK_AROUND_MS);
  }

  stop() {
    panels.delete(this);
    this.resized.disconnect();
    this.seen.disconnect();
    clearInterval(this.timer);
    this.timer = null;
  }

  /** Refresh once after all that is going on now: a widget's callback may run before its value is set. */
  later() {
    if (this.node.graph) this.start(); // a node that comes back, as undo of a removal may do
    if (this.pending) return;
    this.pending = true;
    queueMicrotask(() => {
      this.pending = false;
      this.update();
    });
  }

  refresh() {
    if (!this.node.graph) return;
    const report = reportOf(this.node);
    let state = stateOf(this.node, report);
    if (report?.basis === null) {
      // Sliders may have moved while the run went on.
      report.basis = Math.abs(settingsOf(this.node).sparsity - report.detail.sparsity) < 1e-6 ? state.basis : "";
      state = stateOf(this.node, report);
    }
    const shown = JSON.stringify([state.basis, state.found, state.fresh, report?.number]);
    if (shown === this.shown) return;
    this.shown = shown;
    this.view.render(state); // the observer of its size calls fit, before the browser paints
  }

  /** Give the element as much height as it needs, and the node no more than that. */
  fit() {
    const height = this.view.body.offsetHeight + PADDING;
    this.view.redraw();
    if (height === PADDING || height === this.height) return; // not on the page, or nothing new
    this.height = height;
    const { node } = this;
    if (node.flags?.collapsed) return;
    if (globalThis.LiteGraph?.vueNodesMode) this.loosen();
    else node.setSize([node.size[0], node.computeSize()[1]]);
    node.graph?.setDirtyCanvas?.(true, true);
  }

  /**
   * Vue nodes take the height that they need by themselves, but never less than they were last set to, by a saved file
   * for one: set them to nothing, once. Where that changes nothing to be seen, the page does not measure them again.
   */
  loosen() {
    if (this.loose) return;
    this.loose = true;
    const { node } = this;
    node.setSize([node.size[0], 0]);
    requestAnimationFrame(() => requestAnimationFrame(safely(() => {
      const shown = this.view.element.closest("[data-node-id]");
      if (node.size[1] > 0) return;
      this.loose = false; // a height that is set holds the node up from now on
      const height = shown ? shown.offsetHeight - globalThis.LiteGraph.NODE_TITLE_HEIGHT : this.height + 2 * MARGIN;
      node.setSize([node.size[0], height]);
    })));
  }

  choose(kind, value) {
    const { properties } = this.node;
    if (value) properties[CHOSEN[kind]] = kind === "size" ? JSON.parse(value) : value;
    else delete properties[CHOSEN[kind]];
    this.refresh();
  }
}

app.registerExtension({
  name: "ropeslr.panel",
  setup() {
    recall();
    addEventListener("pagehide", remember);
    api.addEventListener(EVENT, receive);
    document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
  },
  nodeCreated: safely((node) => {
    if (node.comfyClass === NODE) node.ropeslrPanel = new Panel(node);
  }),
});
