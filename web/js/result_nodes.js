// Room on RoPeSLR Report and RoPeSLR Doctor for their results.
// @ts-check

import { app } from "../../../scripts/app.js";

/** Large enough to read the report's picture. @type {[number, number]} */
const REPORT_SIZE = [620, 560];
const DOCTOR_WIDTH = 520;
const TEXT_HEIGHT = 260;
const LOOK = "box-sizing: border-box; width: 100%; height: 100%; margin: 0; padding: 8px 10px; overflow: auto; " +
  "white-space: pre-wrap; font: 12px/1.4 ui-monospace, monospace; user-select: text; border-radius: 6px; " +
  "color: var(--fg-color, #ddd); background: var(--comfy-menu-bg, #222); " +
  "border: 1px solid var(--border-color, #4e4e4e);";

/**
 * A read-only text on a node; it is in neither widgets_values nor the prompt.
 * @param {Comfy.CanvasNode} node
 */
function addText(node) {
  const element = document.createElement("pre");
  element.textContent = "Run the workflow to test this machine.";
  element.style.cssText = LOOK;
  element.tabIndex = 0; // so that a keyboard can scroll it
  element.setAttribute("role", "log");
  element.setAttribute("aria-label", "RoPeSLR Doctor: results");
  // The wheel scrolls a long text; over a short one it zooms the canvas.
  element.addEventListener("wheel", (event) => {
    if (element.scrollHeight > element.clientHeight) event.stopPropagation();
  }, { passive: true });
  const widget = node.addDOMWidget("ropeslr_text", "ROPESLR_TEXT", element, {
    serialize: false, hideOnZoom: false, getMinHeight: () => TEXT_HEIGHT,
  });
  widget.serialize = false;
  const before = node.onExecuted;
  node.onExecuted = function (output) {
    before?.call(this, output);
    const text = [output?.text].flat().filter(Boolean).join("\n");
    if (text) element.textContent = text;
  };
  node.setSize([Math.max(node.size[0], DOCTOR_WIDTH), node.computeSize()[1]]);
}

app.registerExtension({
  name: "ropeslr.results",
  nodeCreated(node) {
    try {
      if (node.comfyClass === "RoPeSLRDoctor") addText(node);
      if (node.comfyClass === "RoPeSLRReport") node.setSize(REPORT_SIZE); // a saved size comes later, and stays
    } catch (error) {
      console.debug("RoPeSLR results:", error);
    }
  },
});
