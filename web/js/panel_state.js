// Everything that the panel shows, read anew from the node, the graph around it and the node's last report.
// @ts-check

import { estimate } from "./estimate.js";
import { graphContext, whyOff } from "./graph_context.js";
import { MODELS } from "./models.js";
import { missingOf, presetAround } from "./presets.js";
import { updateStatus } from "./reports.js";
import { isLinked, valueOf } from "./values.js";

/** The node's properties that the menus write. */
export const CHOSEN = { model: "ropeslr_model", size: "ropeslr_size" };
const LARGEST = 16384; // pixels or frames, as ComfyUI's own widgets have it
const NAMES = Object.fromEntries(Object.entries(MODELS).map(([key, model]) => [key, model.name]));
/** @type {RoPeSLR.Settings} */
const DEFAULTS = {
  method: "auto", sparsity: 0.9, rank: 0, start_percent: 0, end_percent: 1, dense_first_steps: -1, dense_last_steps: 0,
  dense_layers: "", backend: "auto", block_order: "auto", min_tokens: 4096, keep_diagonal: false,
  keep_first_frame: false, sla_variant: "released", key_block: "auto", allocation: "auto", target: "sparsity",
  error: 0.05, query_block: "auto", precision: "auto",
};

/**
 * The node's settings, and what had to be assumed: the value of an input that another node computes during the run.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 * @returns {{ settings: RoPeSLR.Settings, assumptions: string[] }}
 */
export function settingsOf(root, node) {
  /** @type {string[]} */
  const assumptions = [];
  const entries = Object.entries(DEFAULTS).map(([name, initial]) => {
    const value = valueOf(root, node, name);
    if (typeof value === typeof initial) return [name, value];
    if (isLinked(node, name)) assumptions.push(assumed(name, initial));
    return [name, initial];
  });
  return { settings: Object.fromEntries(entries), assumptions };
}

/** @param {string} name @param {string | number | boolean} value */
function assumed(name, value) {
  const text = value === "" ? "none" : value === false ? "off" : value;
  return `Another node sets ${name.replaceAll("_", " ")}: the estimate assumes ${text}`;
}

/** @param {Comfy.Node} node */
function chosenModel(node) {
  const key = node.properties?.[CHOSEN.model];
  return typeof key === "string" && Object.hasOwn(MODELS, key) ? key : "";
}

/** @param {Comfy.Node} node @returns {RoPeSLR.VideoSize | null} */
function chosenSize(node) {
  const { width, height, length } = /** @type {any} */ (node.properties?.[CHOSEN.size] ?? {});
  const fits = [width, height, length].every((side) => Number.isInteger(side) && side > 0 && side <= LARGEST);
  return fits ? { width, height, length } : null;
}

/** @param {RoPeSLR.Report | undefined} report @returns {RoPeSLR.TokenCount | null} */
function lastSize(report) {
  const tokens = report?.tokens ?? 0;
  return tokens > 0 ? { tokens } : null;
}

/**
 * The settings that a file on the model's line was trained with, where the node has others.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 * @returns {RoPeSLR.Offer | null}
 */
function offerOf(root, node) {
  const preset = presetAround(root, node);
  const settings = preset && missingOf(root, node, preset);
  return preset && settings && Object.keys(settings).length ? { name: preset.name, settings } : null;
}

/**
 * What the panel shows; brings the status of the report up to date.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 * @param {RoPeSLR.StoredReport} [report]
 * @returns {RoPeSLR.PanelState}
 */
export function panelState(root, node, report) {
  const context = graphContext(root, node);
  const model = context.model || chosenModel(node);
  const size = context.size ?? chosenSize(node) ?? lastSize(report?.detail);
  const { settings, assumptions } = settingsOf(root, node);
  const off = whyOff(node);
  const offer = offerOf(root, node);
  const basis = JSON.stringify([settings, assumptions, model, size, context.adapter, context.steps, off]);
  if (report) updateStatus(report, basis, settings.sparsity);
  /** @type {RoPeSLR.Estimate | null} */
  let numbers = null;
  if (off) numbers = { why: off };
  else if (model && size) numbers = estimate(settings, model, size, context.adapter, context.steps);
  return {
    models: NAMES, model, size, numbers, assumptions, basis,
    found: { model: Boolean(context.model), size: Boolean(context.size) },
    idle: off && "before it was switched off",
    offer, report: report?.detail ?? null, status: report?.status ?? "new",
  };
}
