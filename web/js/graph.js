// What the graph around a node tells: the size of the latent that its model samples, the kind of model, the adapter.

const SUBGRAPH_INPUT = "-10"; // the ids that ComfyUI gives to a subgraph's own two ends
const SUBGRAPH_OUTPUT = "-20";
const SET = "SetNode"; // a pair that many workflows have in place of a long link; they exist in the browser alone
const GET = "GetNode";
const MUTED = 2; // a node's mode
const BYPASSED = 4;
const LENGTHS = ["length", "num_frames", "video_length", "frames"];
const FARTHEST = 400; // places looked at in one walk: no graph that a person made has more between model and sampler

/** The link of an id, in any of the forms that versions of the frontend keep links in; null where there is none. */
export function linkOf(graph, id) {
  if (id === null || id === undefined) return null;
  const links = graph?.links;
  return graph?.getLink?.(id) ?? links?.get?.(id) ?? links?.[id] ?? null;
}

function nodesOf(graph) {
  return graph?.nodes ?? graph?._nodes ?? [];
}

/** The node of an id, which may be a number on one side and a text on the other. */
function nodeOf(graph, id) {
  return nodesOf(graph).find((node) => String(node.id) === String(id));
}

/** Every graph below and including `root`. */
export function allGraphs(root) {
  const found = new Set();
  const visit = (graph) => {
    if (!graph || found.has(graph)) return;
    found.add(graph);
    for (const node of nodesOf(graph)) visit(node.subgraph);
  };
  visit(root);
  return [...found];
}

/** The subgraph nodes that stand for `graph` anywhere below `root`. */
function standIns(root, graph) {
  return allGraphs(root).flatMap((each) => nodesOf(each).filter((node) => node.subgraph === graph));
}

/** The node with an execution id such as "5" or "12:7", below `root`; null where there is none. */
export function findByExecutionId(root, id) {
  const path = String(id).split(":");
  let graph = root;
  for (const part of path.slice(0, -1)) {
    graph = nodeOf(graph, part)?.subgraph;
  }
  return nodeOf(graph, path[path.length - 1]) ?? null;
}

/** Whether an execution id means this node: by its whole path, else by its last part. */
export function isMeant(root, node, id) {
  const found = findByExecutionId(root, id);
  return found ? found === node : String(id).split(":").pop() === String(node.id);
}

/** The nodes of a type whose first widget, the name of what they pass on, is that of `node`. */
function namesakes(graph, type, node) {
  const name = node.widgets?.[0]?.value;
  return nodesOf(graph).filter((each) => each.type === type && each.widgets?.[0]?.value === name);
}

/** Where an input's value comes from: {node, slot} behind subgraph borders; null where nothing is connected. */
export function sourceOf(root, node, input) {
  let graph = node.graph;
  let link = linkOf(graph, input?.link);
  for (let steps = 0; link && steps < FARTHEST; steps++) {
    if (String(link.origin_id) === SUBGRAPH_INPUT) {
      const outer = standIns(root, graph)[0];
      const next = linkOf(outer?.graph, outer?.inputs?.[link.origin_slot]?.link);
      if (!next) return outer ? { node: outer, slot: link.origin_slot, border: true } : null;
      graph = outer.graph;
      link = next;
      continue;
    }
    const origin = nodeOf(graph, link.origin_id);
    if (origin?.type === GET) {
      const setter = namesakes(graph, SET, origin)[0];
      link = linkOf(graph, setter?.inputs?.[0]?.link);
      if (!link) return null;
      continue;
    }
    if (!origin?.subgraph) return origin ? { node: origin, slot: link.origin_slot } : null;
    graph = origin.subgraph;
    link = linkOf(graph, (graph.outputs?.[link.origin_slot]?.linkIds ?? [])[0]);
  }
  return null;
}

/** Every {node, slot} that an output reaches, behind subgraph borders. */
export function targetsOf(root, node, slot) {
  const found = [];
  const follow = (graph, ids, depth) => {
    for (const link of (ids ?? []).map((id) => linkOf(graph, id))) {
      if (!link || depth > 20) continue;
      if (String(link.target_id) === SUBGRAPH_OUTPUT) {
        for (const outer of standIns(root, graph)) {
          follow(outer.graph, outer.outputs?.[link.target_slot]?.links, depth + 1);
        }
        continue;
      }
      const target = nodeOf(graph, link.target_id);
      if (target?.subgraph) follow(target.subgraph, target.subgraph.inputs?.[link.target_slot]?.linkIds, depth + 1);
      else if (target) found.push({ node: target, slot: link.target_slot });
      if (target?.type !== SET) continue;
      for (const getter of namesakes(graph, GET, target)) follow(graph, getter.outputs?.[0]?.links, depth + 1);
    }
  };
  follow(node.graph, node.outputs?.[slot]?.links, 0);
  return found;
}

/** The value of a widget, or of what is linked to its input; undefined where neither says. */
export function valueOf(root, node, name) {
  const input = node.inputs?.find((each) => each.widget?.name === name || each.name === name);
  if (input?.link !== null && input?.link !== undefined) {
    const source = sourceOf(root, node, input);
    if (!source) return undefined;
    const wanted = source.border ? source.node.inputs[source.slot].name : null;
    const widget = source.node.widgets?.find((each) => wanted === null || each.name === wanted);
    return widget?.value;
  }
  return node.widgets?.find((each) => each.name === name)?.value;
}

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
  const input = node.inputs?.find((each) => each.type === "SIGMAS");
  const total = numberOf(root, node, ["steps"]) ?? presetSteps(valueOf(root, node, "preset"));
  if (total) return { total, from: 0, to: total };
  const source = input && depth < 20 ? sourceOf(root, node, input) : null;
  const whole = source && stepsOfSigmas(root, source, depth + 1);
  const border = whole && valueOf(root, node, "step"); // SplitSigmas: high, low
  if (!whole || typeof border !== "number") return whole;
  const step = Math.min(whole.from + border, whole.to);
  return slot === 0 ? { ...whole, to: step } : { ...whole, from: step };
}

/** "SparkWan 2.1, 4 steps" -> 4; of Few-Step Sigmas. */
function presetSteps(preset) {
  const found = typeof preset === "string" && / (\d+) steps?$/.exec(preset);
  return found && !/ of \d+ steps?$/.test(preset) ? Number(found[1]) : null;
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
export function surroundings(root, node) {
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
