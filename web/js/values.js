// What an input of a node is given: its widget's value, or that of the output linked to it, where the graph says so.
// @ts-check

import { evaluateExpression, roundHalfEven } from "./expression.js";
import { FARTHEST, sourceOf } from "./graph.js";

/**
 * @typedef {import("./graph.js").Port} Port
 * @typedef {{ root: Comfy.Graph, left: number }} Search one question, and how many more inputs it may look at
 * @typedef {{ width?: number, height?: number, frames?: number }} PictureSize
 */

/** Values of the widget that ComfyUI adds to a number; its name differs between nodes. */
const CONTROLS = new Set(["fixed", "increment", "decrement", "randomize"]);
/** Names that a node's only value goes by. */
const CONSTANTS = new Set(["value", "number", "int", "float", "integer"]);
/** A node that takes one of these may give out what it measures there, and not what its widget says. */
const MEASURED = new Set(["IMAGE", "MASK", "LATENT", "VIDEO"]);

/**
 * The value of a widget or of what is linked to its input; undefined where the graph does not say.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 * @param {string} name
 * @returns {unknown}
 */
export function valueOf(root, node, name) {
  return read({ root, left: FARTHEST }, node, name);
}

/**
 * The same, where only a number will do.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 * @param {string} name
 */
export function numberOf(root, node, name) {
  return asNumber(valueOf(root, node, name));
}

/**
 * Whether a node has a setting of this name, known or not.
 * @param {Comfy.Node} node
 * @param {string} name
 */
export function hasValue(node, name) {
  return Boolean(inputOf(node, name)) || Boolean(widgetOf(node, name));
}

/** @param {Comfy.Node} node @param {string} name */
function inputOf(node, name) {
  return node.inputs?.find((each) => each.widget?.name === name || each.name === name);
}

/** @param {Comfy.Node} node @param {string} name */
function widgetOf(node, name) {
  return node.widgets?.find((each) => each.name === name);
}

/** @param {Comfy.Input | undefined} input */
function hasLink(input) {
  return input !== undefined && input.link !== null && input.link !== undefined;
}

/**
 * Whether another node gives a node's input.
 * @param {Comfy.Node} node
 * @param {string} name
 */
export function isLinked(node, name) {
  return hasLink(inputOf(node, name));
}

/** @param {unknown} value */
function asNumber(value) {
  return typeof value === "number" && Number.isFinite(value) ? value : undefined;
}

/** @param {Search} search @param {Comfy.Node} node @param {string} name @returns {unknown} */
function read(search, node, name) {
  const input = inputOf(node, name);
  if (!hasLink(input)) return widgetOf(node, name)?.value;
  if (search.left-- <= 0) return undefined;
  const source = sourceOf(search.root, node, input);
  return source ? outputValue(search, source) : undefined;
}

/** @param {Search} search @param {Comfy.Node} node @param {string} name */
function readNumber(search, node, name) {
  return asNumber(read(search, node, name));
}

/**
 * The value of an output, or of a subgraph's input, which is a widget of the subgraph's node.
 * @param {Search} search
 * @param {Port} port
 */
function outputValue(search, { node, slot, border }) {
  if (border) {
    const input = node.inputs?.[slot];
    return widgetOf(node, input?.widget?.name ?? input?.name ?? "")?.value;
  }
  const compute = OUTPUTS.get(node.type);
  if (compute) return compute(search, node, slot);
  const name = ownWidget(node, slot);
  return name === undefined ? undefined : read(search, node, name);
}

/**
 * The name of the widget whose value an output gives out: the one of the same name, or a constant's only one.
 * @param {Comfy.Node} node
 * @param {number} slot
 */
function ownWidget(node, slot) {
  if (node.inputs?.some((input) => hasLink(input) && MEASURED.has(input.type))) return undefined;
  const name = node.outputs?.[slot]?.name;
  if (name && widgetOf(node, name)) return name;
  const widgets = (node.widgets ?? []).filter(({ value }) => typeof value !== "string" || !CONTROLS.has(value));
  const constant = node.outputs?.length === 1 && widgets.filter((each) => CONSTANTS.has(each.name.toLowerCase()));
  return constant && constant.length === 1 && widgets.length === 1 ? constant[0].name : undefined;
}

/**
 * Outputs that ComfyUI's own nodes compute.
 * @type {Map<string, (search: Search, node: Comfy.Node, slot: number) => unknown>}
 */
const OUTPUTS = new Map(Object.entries({
  ComfyMathExpression: mathExpression,
  ComfyNumberConvert(search, node, slot) {
    const value = read(search, node, "value");
    const number = value === undefined || String(value).trim() === "" ? NaN : Number(value);
    return slot === 0 ? number : Math.trunc(number);
  },
  ComfySwitchNode(search, node) {
    const chosen = read(search, node, "switch");
    return typeof chosen === "boolean" ? read(search, node, chosen ? "on_true" : "on_false") : undefined;
  },
  ResolutionSelector: selectedResolution,
  GetImageSize(search, node, slot) {
    const { width, height, frames } = inputPicture(search, node, "image");
    return [width, height, frames][slot];
  },
}));

/**
 * @param {Search} search
 * @param {Comfy.Node} node
 * @param {number} slot 0: as it is, 1: a whole number, 2: a switch
 */
function mathExpression(search, node, slot) {
  const text = read(search, node, "expression");
  if (typeof text !== "string") return undefined;
  /** @type {import("./expression.js").Names} */
  const names = new Map();
  const given = (node.inputs ?? []).filter((each) => hasLink(each) && each.name.startsWith("values."));
  for (const { name } of given) {
    const value = read(search, node, name);
    if (typeof value === "number" || typeof value === "boolean") names.set(name.slice("values.".length), Number(value));
  }
  if (names.size === given.length) names.set("values", [.../** @type {Iterable<number>} */ (names.values())]);
  const result = evaluateExpression(text, names);
  if (result === undefined) return undefined;
  return slot === 2 ? Boolean(result) : slot === 1 ? Math.trunc(result) : result;
}

/**
 * Width and height from an aspect ratio and a number of pixels.
 * @param {Search} search
 * @param {Comfy.Node} node
 * @param {number} slot
 */
function selectedResolution(search, node, slot) {
  const shape = /^(\d+):(\d+)/.exec(String(read(search, node, "aspect_ratio")));
  const megapixels = readNumber(search, node, "megapixels");
  const multiple = readNumber(search, node, "multiple") ?? 8;
  if (!shape || megapixels === undefined || slot > 1) return undefined;
  const [across, down] = [Number(shape[1]), Number(shape[2])];
  const scale = Math.sqrt((megapixels * 1024 * 1024) / (across * down));
  return roundHalfEven(((slot === 0 ? across : down) * scale) / multiple) * multiple;
}

/**
 * The size of the picture that enters a node.
 * @param {Search} search
 * @param {Comfy.Node} node
 * @param {string} name
 * @returns {PictureSize}
 */
function inputPicture(search, node, name) {
  if (search.left-- <= 0) return {};
  const source = sourceOf(search.root, node, inputOf(node, name));
  const size = source && !source.border && PICTURES.get(source.node.type);
  return size ? size(search, source.node) : {};
}

/**
 * The size that a node brings a picture to.
 * @param {Search} search
 * @param {Comfy.Node} node
 * @param {string} prefix
 * @returns {PictureSize}
 */
function writtenSize(search, node, prefix = "") {
  const width = readNumber(search, node, `${prefix}width`);
  const height = readNumber(search, node, `${prefix}height`);
  return width && height ? { width, height } : {}; // 0 keeps the picture's shape, which is not known
}

/**
 * Pictures whose size ComfyUI's own nodes set. Files are not looked into.
 * @type {Map<string, (search: Search, node: Comfy.Node) => PictureSize>}
 */
const PICTURES = new Map(Object.entries({
  EmptyImage: (search, node) => ({ ...writtenSize(search, node), frames: readNumber(search, node, "batch_size") }),
  ImageScale: (search, node) => ({ frames: inputPicture(search, node, "image").frames, ...writtenSize(search, node) }),
  ResizeImageMaskNode(search, node) {
    const { frames } = inputPicture(search, node, "input");
    const how = read(search, node, "resize_type");
    if (how === "scale dimensions") return { frames, ...writtenSize(search, node, "resize_type.") };
    return how === "match size" ? { ...inputPicture(search, node, "resize_type.match"), frames } : { frames };
  },
  ImageFromBatch(search, node) { // how many there are is not known, so neither is how many are left
    const { width, height } = inputPicture(search, node, "image");
    return { width, height };
  },
}));
