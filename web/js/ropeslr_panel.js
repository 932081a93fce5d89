// The live panel on RoPeSLR Sparse Attention: an estimate before the run, and what happened after it.
// @ts-check

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { CHOSEN, panelState } from "./panel_state.js";
import { PanelView, STYLE } from "./panel_view.js";
import { Reports } from "./reports.js";

const NODE = "RoPeSLRSparseAttention";
const EVENT = "ropeslr.report";
const MARGIN = 6; // of the classic renderer around the element
const WIDTH = 340; // of a new node: the figures stand side by side
const PADDING = 4; // pixels that the element adds to the height of its body
const LOOK_AROUND_MS = 500; // how often a visible panel looks whether other nodes changed

const reports = new Reports(sessionStorage);
/** Those on the page. @type {Set<Panel>} */
const panels = new Set();

/**
 * A function that never throws into the graph.
 * @template {unknown[]} Given
 * @param {(...given: Given) => void} run
 */
function safely(run) {
  return (/** @type {Given} */ ...given) => {
    try {
      run(...given);
    } catch (error) {
      console.debug("RoPeSLR panel:", error);
    }
  };
}

/**
 * Run `then` after a node's or widget's own callback, whose answer stays.
 * @param {object} owner
 * @param {string} name
 * @param {() => void} then
 */
function chain(owner, name, then) {
  const methods = /** @type {Record<string, unknown>} */ (owner);
  const before = methods[name];
  /** @this {unknown} @param {unknown[]} given */
  methods[name] = function (...given) {
    const answer = typeof before === "function" ? before.apply(this, given) : undefined;
    then();
    return answer;
  };
}

/**
 * Let the wheel and the middle button over an element of the classic renderer move the canvas under it.
 * @param {HTMLElement} element
 */
function passToCanvas(element) {
  /** @type {(name: keyof Comfy.Canvas, isMeant: (event: PointerEvent) => boolean) => (event: Event) => void} */
  const pass = (name, isMeant) => safely((event) => {
    if (globalThis.LiteGraph?.vueNodesMode) return;
    if (isMeant(/** @type {PointerEvent} */ (event))) app.canvas?.[name]?.(event);
  });
  /** @param {PointerEvent} event */
  const middle = (event) => event.button === 1 || (event.buttons & 4) !== 0;
  element.addEventListener("wheel", pass("processMouseWheel", () => true), { passive: false });
  element.addEventListener("pointerdown", pass("processMouseDown", middle));
  element.addEventListener("pointermove", pass("processMouseMove", middle));
  element.addEventListener("pointerup", pass("processMouseUp", middle));
}

function rootGraph() {
  return app.rootGraph ?? app.graph?.rootGraph ?? app.graph;
}

/** Keep a report and show it where its node is on the page. @type {(event: Event) => void} */
const receive = safely((event) => {
  reports.open(rootGraph()?.id);
  const { detail } = /** @type {CustomEvent<RoPeSLR.Report>} */ (event);
  if (reports.receive(detail)) for (const panel of panels) panel.update();
});

class Panel {
  /** @param {Comfy.CanvasNode} node */
  constructor(node) {
    this.node = node;
    this.shown = "";
    this.height = 0;
    this.loose = false;
    this.pending = false;
    this.visible = true;
    /** @type {ReturnType<typeof setInterval> | undefined} */
    this.timer = undefined;
    this.update = safely(() => this.refresh());
    this.view = new PanelView(safely((kind, value) => this.choose(kind, value)));
    this.resized = new ResizeObserver(safely(() => this.fit()));
    this.seen = new IntersectionObserver(([entry]) => { this.visible = entry.isIntersecting; });
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
    this.timer = undefined;
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
    const root = rootGraph();
    if (!root || !this.node.graph) return;
    reports.open(root.id);
    const report = reports.of(root, this.node);
    const state = panelState(root, this.node, report);
    const shown = JSON.stringify([state.basis, state.found, state.offer, state.status, report?.number]);
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
      const title = globalThis.LiteGraph?.NODE_TITLE_HEIGHT ?? 0;
      const height = shown instanceof HTMLElement ? shown.offsetHeight - title : this.height + 2 * MARGIN;
      node.setSize([node.size[0], height]);
    })));
  }

  /** @param {RoPeSLR.Choice} kind @param {string} value */
  choose(kind, value) {
    if (kind === "preset") {
      this.set(JSON.parse(value));
      return;
    }
    const { properties } = this.node;
    if (value) properties[CHOSEN[kind]] = kind === "size" ? JSON.parse(value) : value;
    else delete properties[CHOSEN[kind]];
    this.refresh();
  }

  /** Set widgets as if a person had. @param {Record<string, unknown>} settings */
  set(settings) {
    for (const widget of this.node.widgets ?? []) {
      if (!Object.hasOwn(settings, widget.name)) continue;
      widget.value = settings[widget.name];
      widget.callback?.(widget.value);
    }
    this.node.graph?.setDirtyCanvas?.(true, true);
    this.refresh();
  }
}

app.registerExtension({
  name: "ropeslr.panel",
  setup() {
    safely(() => reports.load())();
    addEventListener("pagehide", safely(() => reports.save()));
    api.addEventListener(EVENT, receive);
    document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
  },
  nodeCreated: safely((node) => {
    if (node.comfyClass === NODE) new Panel(node);
  }),
});
