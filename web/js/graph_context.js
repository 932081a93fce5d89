// What the graph around a node tells: the size of the latent that its model samples, the kind of model, the adapter.

import { FARTHEST, sourceOf, targetsOf, valueOf } from "./graph.js";

const MUTED = 2; // a node's mode
const BYPASSED = 4;
const LENGTHS = ["length", "num_frames", "video_length", "frames"];

function numberOf(root, node, names) {
  for (const name of names) {
    const value = valueOf(root, node, name);
    if (typeof value === "number" && value > 0) return value;
  }
  return undefined;
}

function isKind(slot, ...kinds) {
  return kinds.includes(slot?.type) || slot?.type === "*";
}

/** Samplers that a node's model reaches, nearest first: nodes that take the model, or its guider, and a latent. */
export function samplersBehind(root, node) {
  const seen = new Set();
  const samplers = [];
  let places = (node.outputs ?? []).map((output, slot) => ({ node, slot })).filter(
    ({ slot }) => isKind(node.outputs[slot], "MODEL"),
  );
  while (places.length && seen.size < FARTHEST) {
    const reached = places.flatMap((place) => targetsOf(root, place.node, place.slot)).filter(
      (target) => !seen.has(target.node) && target.node.mode !== MUTED,
    );
    places = [];
    for (const { node: target } of reached) {
      if (seen.has(target)) continue;
      seen.add(target);
      const takesLatent = target.inputs?.some((input) => input.type === "LATENT");
      if (takesLatent && target.mode !== BYPASSED) samplers.push(target);
      (target.outputs ?? []).forEach((output, slot) => {
        if (isKind(output, "MODEL", "GUIDER")) places.push({ node: target, slot });
      });
    }
  }
  return samplers;
}

/** The size of the latent that enters a node: {width, height, length, type of the node that says so}; or null. */
export function latentSize(root, node) {
  const seen = new Set();
  const scale = { by: 1, width: undefined, height: undefined }; // set by upscalers on the way
  const visit = (each) => {
    if (!each || seen.has(each) || seen.size > FARTHEST) return null;
    seen.add(each);
    const width = numberOf(root, each, ["width"]);
    const height = numberOf(root, each, ["height"]);
    const length = numberOf(root, each, LENGTHS);
    if (width && height && length) {
      return {
        width: scale.width ?? width * scale.by, height: scale.height ?? height * scale.by, length, type: each.type,
      };
    }
    if (width && height && each.inputs?.some((input) => input.type === "LATENT")) {
      scale.width ??= width * scale.by;
      scale.height ??= height * scale.by;
    }
    scale.by *= numberOf(root, each, ["scale_by"]) ?? 1;
    for (const input of each.inputs ?? []) {
      if (!isKind(input, "LATENT")) continue;
      const found = visit(sourceOf(root, each, input)?.node);
      if (found) return found;
    }
    return null;
  };
  for (const input of node.inputs ?? []) {
    if (!isKind(input, "LATENT")) continue;
    const found = visit(sourceOf(root, node, input)?.node);
    if (found) return found;
  }
  return null;
}

/** Names of files in the widgets of the node at the upper end of an input's chain of models. */
export function loaderFiles(root, node, input = "model") {
  let at = node;
  let slot = at.inputs?.find((each) => each.name === input);
  const kind = slot?.type;
  for (let steps = 0; slot && steps < FARTHEST; steps++) {
    const source = sourceOf(root, at, slot);
    if (!source) break;
    at = source.node;
    slot = at.inputs?.find((each) => isKind(each, kind));
  }
  if (at === node) return [];
  return (at.widgets ?? []).map((widget) => widget.value).filter(
    (value) => typeof value === "string" && /\.(safetensors|sft|gguf|pth?|ckpt|bin)$/i.test(value),
  );
}

/** The key of estimate.js's MODELS that a file's name means; "" where it does not tell. */
export function guessModel(file) {
  const name = String(file).toLowerCase();
  if (/hunyuan|hyvideo|skyreels.?(v1|hunyuan)/.test(name)) {
    return /(video|hy)[-_. ]?v?1[._-]?5|(480|720|1080)p_(t2v|i2v|sr)/.test(name) ? "hunyuan-1.5" : "hunyuan";
  }
  if (/14b/.test(name)) return "wan-14b";
  if (/1[._-]3b/.test(name)) return "wan-1.3b";
  if (/(^|[^\d.])5b|ti2v/.test(name)) return "wan-5b";
  return /wan.*(high|low)/.test(name) ? "wan-14b" : "";
}

/** The same from the type of the node that makes the latent. */
export function guessModelByLatent(type) {
  if (/HunyuanVideo15/.test(type ?? "")) return "hunyuan-1.5";
  return type === "Wan22ImageToVideoLatent" ? "wan-5b" : "";
}

/** The method that the connected adapter was trained for, by its file's name, or "unknown"; "" without an adapter. */
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

/** Steps that an output of noise levels makes: {total, from, to}; null where nobody says. */
function stepsOfSigmas(root, { node, slot }, depth = 0) {
  const input = node.inputs?.find((each) => isKind(each, "SIGMAS"));
  if (!input) {
    const total = numberOf(root, node, ["steps"]) ?? presetSteps(valueOf(root, node, "preset"));
    return total ? { total, from: 0, to: total } : null;
  }
  const source = depth < 20 ? sourceOf(root, node, input) : null;
  const whole = source && stepsOfSigmas(root, source, depth + 1);
  const border = whole && valueOf(root, node, "step"); // SplitSigmas: high, low
  if (!whole || typeof border !== "number") return node.type === "Reroute" ? whole : null; // others may change them
  const step = Math.min(whole.from + border, whole.to);
  return slot === 0 ? { ...whole, to: step } : { ...whole, from: step };
}

/** "SparkWan 2.1, 4 steps" -> 4; of Few-Step Sigmas. The experts' presets are parts of a schedule that is not named. */
function presetSteps(preset) {
  const found = typeof preset === "string" && / (\d+) steps?$/.exec(preset);
  return found && !/ noise/.test(preset) ? Number(found[1]) : null;
}

/** The steps that a sampler runs, of its schedule's: {total, from, to}; null where nothing says. */
function stepsOf(root, sampler) {
  const total = numberOf(root, sampler, ["steps"]);
  if (total) {
    const end = valueOf(root, sampler, "end_at_step");
    const to = typeof end === "number" ? Math.min(end, total) : total;
    return { total, from: Math.min(valueOf(root, sampler, "start_at_step") ?? 0, to), to };
  }
  const input = sampler.inputs?.find((each) => each.type === "SIGMAS");
  const source = input && sourceOf(root, sampler, input);
  return source ? stepsOfSigmas(root, source) : null;
}

/** Why a node does nothing at all; "" where it works. */
export function whyIdle(node) {
  if (node.mode === BYPASSED) return "This node is bypassed: the model runs dense.";
  return node.mode === MUTED ? "This node is muted: nothing behind it runs." : "";
}

/** All that a panel wants to know of the graph: {size, model, adapter, steps}, each null or "" where not found. */
export function graphContext(root, node) {
  let size = null;
  let steps = null;
  for (const sampler of samplersBehind(root, node)) {
    const found = latentSize(root, sampler);
    if (!found) continue;
    size = found;
    steps = stepsOf(root, sampler);
    break;
  }
  const files = loaderFiles(root, node);
  const model = files.map(guessModel).find(Boolean) || guessModelByLatent(size?.type);
  return { size, model, adapter: adapterMethod(root, node), steps };
}
