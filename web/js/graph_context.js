// What the graph says about our node: the size of the latent that its model samples, the model, the adapter, the steps.
// @ts-check

import { BYPASSED, FARTHEST, MUTED, sourceOf, targetsOf } from "./graph.js";
import { guessModel, guessModelByLatent } from "./models.js";
import { hasValue, numberOf, valueOf } from "./values.js";

const LENGTHS = ["length", "num_frames", "video_length", "frames"];
const MODEL_FILE = /\.(safetensors|sft|gguf|pth?|ckpt|bin)$/i;
const GATED = /fasth3|[-_.]vsa([-_.]|$)/i; // checkpoints that hold the gate of VSA
const DEEPEST = 20; // nodes that change one output of sigmas, one after the other
const BEGUN = 0.95; // share of noise: what starts with less has a composition already, as the run itself sees it
const LTX_PIXELS = 32; // of a side of LTX's latents

/**
 * @param {{ type?: string } | undefined} slot
 * @param {...string} kinds
 */
function isKind(slot, ...kinds) {
  return slot?.type === "*" || kinds.includes(slot?.type ?? "");
}

/**
 * Samplers that a node's model reaches, nearest first: nodes that take the model, or its guider, and a latent.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 * @returns {Comfy.Node[]}
 */
export function samplersAfter(root, node) {
  return nodesAfter(root, node).filter(({ inputs }) => inputs?.some((input) => input.type === "LATENT"));
}

/**
 * Nodes at work that a node's model or its guider reaches, nearest first.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 * @returns {Comfy.Node[]}
 */
export function nodesAfter(root, node) {
  /** @type {Set<Comfy.Node>} */
  const seen = new Set();
  let ports = outputsOf(node, "MODEL");
  while (ports.length && seen.size < FARTHEST) {
    const reached = ports.flatMap((port) => targetsOf(root, port.node, port.slot));
    ports = [];
    for (const { node: target } of reached) {
      if (seen.has(target) || target.mode === MUTED) continue;
      seen.add(target);
      ports.push(...outputsOf(target, "MODEL", "GUIDER"));
    }
  }
  return [...seen].filter(({ mode }) => mode !== BYPASSED);
}

/**
 * @param {Comfy.Node} node
 * @param {...string} kinds
 */
function outputsOf(node, ...kinds) {
  return (node.outputs ?? []).flatMap((output, slot) => (isKind(output, ...kinds) ? [{ node, slot }] : []));
}

/**
 * The size of the latent that enters a node; null where the graph does not say.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 * @returns {RoPeSLR.LatentSize | null}
 */
export function latentSize(root, node) {
  /** @type {Set<Comfy.Node>} */
  const seen = new Set();
  /** The first size found upstream. @type {(each: Comfy.Node) => RoPeSLR.LatentSize | null} */
  const upstream = (each) => {
    for (const input of each.inputs ?? []) {
      const source = isKind(input, "LATENT") ? sourceOf(root, each, input) : null;
      const found = source && !source.border ? sizeFrom(source.node) : null;
      if (found) return found;
    }
    return null;
  };
  /** @type {(each: Comfy.Node) => RoPeSLR.LatentSize | null} */
  const sizeFrom = (each) => {
    if (seen.has(each) || seen.size > FARTHEST) return null;
    seen.add(each);
    const made = madeSize(root, each);
    if (made) return made;
    const before = upstream(each);
    return before && rescaled(root, each, before);
  };
  return upstream(node);
}

/**
 * The size of the latent that a node makes; null where it makes none or its size is not known.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 */
function madeSize(root, node) {
  const [width, height, ...lengths] = ["width", "height", ...LENGTHS].map((name) => numberOf(root, node, name) ?? 0);
  const length = lengths.find((each) => each > 0) ?? 0;
  return width > 0 && height > 0 && length > 0 ? { width, height, length, type: node.type } : null;
}

/**
 * The size of a latent after a node that may scale it.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 * @param {RoPeSLR.LatentSize} size
 * @returns {RoPeSLR.LatentSize | null} null where it is scaled by what is not known
 */
function rescaled(root, node, size) {
  if (node.type === "LTXVLatentUpsampler") return upsampled(root, node, size);
  let { width, height } = size;
  if (hasValue(node, "scale_by")) {
    const by = numberOf(root, node, "scale_by") ?? 0;
    [width, height] = [width * by, height * by];
  }
  if (hasValue(node, "width") && hasValue(node, "height")) {
    [width, height] = [numberOf(root, node, "width") ?? 0, numberOf(root, node, "height") ?? 0];
  }
  return width > 0 && height > 0 ? { ...size, width, height } : null;
}

/**
 * The size after LTX's upscaler, whose file's name says what it multiplies.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 * @param {RoPeSLR.LatentSize} size
 * @returns {RoPeSLR.LatentSize | null}
 */
function upsampled(root, node, size) {
  const [file = ""] = loaderFiles(root, node, "upscale_model");
  const found = /(spatial|temporal)\D*[-_]x(\d+(?:\.\d+)?)/i.exec(file);
  if (!found) return null;
  const by = Number(found[2]);
  if (found[1].toLowerCase() === "temporal") return { ...size, length: (size.length - 1) * by + 1 };
  /** @param {number} pixels */
  const side = (pixels) => Math.floor(Math.floor(pixels / LTX_PIXELS) * by) * LTX_PIXELS;
  return { ...size, width: side(size.width), height: side(size.height) };
}

/**
 * Names of files in the widgets of the node at the upper end of an input's chain of models.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 * @returns {string[]}
 */
export function loaderFiles(root, node, input = "model") {
  return filesOf(nodesBefore(root, node, input).slice(-1));
}

/**
 * Nodes of an input's chain of models, nearest first.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 */
export function nodesBefore(root, node, input = "model") {
  const found = [];
  let at = node;
  let slot = at.inputs?.find((each) => each.name === input);
  const kind = slot?.type ?? "";
  while (slot && found.length < FARTHEST) {
    const source = sourceOf(root, at, slot);
    if (!source) break;
    at = source.node;
    found.push(at);
    slot = at.inputs?.find((each) => isKind(each, kind));
  }
  return found;
}

/**
 * Names of files in the widgets of some nodes.
 * @param {Comfy.Node[]} nodes
 */
export function filesOf(nodes) {
  const values = nodes.flatMap(({ widgets }) => (widgets ?? []).map(({ value }) => value));
  return values.filter((value) => typeof value === "string").filter((value) => MODEL_FILE.test(value));
}

/**
 * The method that the connected adapter was trained for, by its file's name.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 * @returns {RoPeSLR.AdapterMethod}
 */
export function adapterMethod(root, node) {
  const input = node.inputs?.find((each) => each.name === "adapter");
  const source = input && sourceOf(root, node, input);
  if (!source || source.border) return "";
  const [file] = loaderFiles(root, node, "adapter");
  if (!file) return "";
  if (/turbo|sla/i.test(file)) return "sla";
  if (/spark|rola/i.test(file)) return "rola";
  return /ropeslr/i.test(file) ? "ropeslr" : "unknown";
}

/**
 * The steps that an output of sigmas makes; null where the graph does not say.
 * @param {Comfy.Graph} root
 * @param {import("./graph.js").Port} port
 * @returns {RoPeSLR.Steps | null}
 */
function stepsOfSigmas(root, { node, slot }, depth = 0) {
  const input = node.inputs?.find((each) => isKind(each, "SIGMAS"));
  if (node.type === "ManualSigmas") return stepsOfLevels(valueOf(root, node, "sigmas"));
  if (!input) {
    const total = numberOf(root, node, "steps") ?? presetSteps(valueOf(root, node, "preset")) ?? 0;
    return total > 0 ? { total, from: 0, to: total } : null;
  }
  const source = depth < DEEPEST ? sourceOf(root, node, input) : null;
  const whole = source && stepsOfSigmas(root, source, depth + 1);
  const border = numberOf(root, node, "step"); // of SplitSigmas: high, low. Other nodes may change the number of steps.
  if (!whole || border === undefined) return null;
  const step = Math.min(whole.from + border, whole.to);
  return slot === 0 ? { ...whole, to: step } : { ...whole, from: step };
}

/**
 * The steps of noise levels that are written out, one less than there are numbers.
 * @param {unknown} text
 * @returns {RoPeSLR.Steps | null}
 */
function stepsOfLevels(text) {
  const levels = typeof text === "string" ? text.match(/[-+]?\d*\.*\d+/g)?.map(Number) : null;
  if (!levels || levels.length < 2) return null;
  const total = levels.length - 1;
  const steps = { total, from: 0, to: total };
  return levels[0] < BEGUN && levels[0] > levels[total] ? { ...steps, begun: true } : steps;
}

/**
 * "SparkWan 2.1, 4 steps" of Few-Step Sigmas -> 4. The experts' presets are parts of a schedule that is not named.
 * @param {unknown} preset
 */
function presetSteps(preset) {
  const found = typeof preset === "string" && !/ noise/.test(preset) && / (\d+) steps?$/.exec(preset);
  return found ? Number(found[1]) : undefined;
}

/**
 * The steps that a sampler runs, of its schedule's; null where the graph does not say.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} sampler
 * @returns {RoPeSLR.Steps | null}
 */
function stepsOf(root, sampler) {
  if (hasValue(sampler, "steps")) {
    const total = numberOf(root, sampler, "steps") ?? 0;
    const from = hasValue(sampler, "start_at_step") ? numberOf(root, sampler, "start_at_step") : 0;
    const end = hasValue(sampler, "end_at_step") ? numberOf(root, sampler, "end_at_step") : total;
    if (total <= 0 || from === undefined || end === undefined) return null;
    const to = Math.min(end, total);
    return { total, from: Math.min(from, to), to };
  }
  const input = sampler.inputs?.find((each) => each.type === "SIGMAS");
  const source = input && sourceOf(root, sampler, input);
  return source ? stepsOfSigmas(root, source) : null;
}

/** @param {RoPeSLR.VideoSize} size */
function volume({ width, height, length }) {
  return width * height * length;
}

/**
 * Why a node does nothing at all; "" where it works.
 * @param {Comfy.Node} node
 */
export function whyOff(node) {
  if (node.mode === BYPASSED) return "This node is bypassed: the model runs dense.";
  return node.mode === MUTED ? "This node is muted: nothing after it runs." : "";
}

/**
 * All that the panel asks of the graph.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 * @returns {RoPeSLR.GraphContext}
 */
export function graphContext(root, node) {
  const samplers = samplersAfter(root, node);
  let [first] = samplers;
  /** @type {RoPeSLR.LatentSize | null} */
  let size = null;
  for (const sampler of samplers) { // of several passes the largest, where the time goes; of equal ones the nearest
    const found = latentSize(root, sampler);
    if (!found || (size && volume(found) <= volume(size))) continue;
    [first, size] = [sampler, found];
  }
  const files = loaderFiles(root, node);
  const model = files.map(guessModel).find(Boolean) || guessModelByLatent(size?.type);
  const adapter = adapterMethod(root, node) || (files.some((file) => GATED.test(file)) ? "vsa" : "");
  return { size, model, adapter, steps: first ? stepsOf(root, first) : null };
}
