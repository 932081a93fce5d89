// Follows links through ComfyUI's graph: over subgraph borders, Set/Get pairs, reroutes and bypassed nodes.
// @ts-check

export const MUTED = 2; // a node's mode
export const BYPASSED = 4;
export const FARTHEST = 400; // nodes visited in one search: no graph has more from model to sampler
const DEEPEST = 20; // subgraphs and Set/Get pairs that one output is followed through
const SUBGRAPH_INPUT = "-10"; // the ids that ComfyUI gives to a subgraph's own two ends
const SUBGRAPH_OUTPUT = "-20";
const SET = "SetNode"; // many workflows have this pair instead of a long link; it exists in the browser alone
const GET = "GetNode";
const REROUTE = "Reroute";

/** @typedef {{ node: Comfy.Node, slot: number, border?: boolean }} Port `border`: an input of a subgraph's node. */

/**
 * The link of an id, in any of the forms that versions of the frontend keep links in; null where there is none.
 * @param {Comfy.Graph | null | undefined} graph
 * @param {number | null | undefined} id
 * @returns {Comfy.Link | null}
 */
export function linkOf(graph, id) {
  if (!graph || id === null || id === undefined) return null;
  const { links } = graph;
  const found = graph.getLink?.(id) ?? (links instanceof Map ? links.get(id) : undefined);
  if (found) return found;
  return links && !(links instanceof Map) && Object.hasOwn(links, id) ? links[id] : null;
}

/**
 * @param {Comfy.Graph | null | undefined} graph
 * @returns {Comfy.Node[]}
 */
function nodesOf(graph) {
  return graph?.nodes ?? graph?._nodes ?? [];
}

/**
 * The node of an id, which may be a number on one side and a text on the other.
 * @param {Comfy.Graph | null | undefined} graph
 * @param {Comfy.Id} id
 */
function nodeOf(graph, id) {
  return nodesOf(graph).find((node) => String(node.id) === String(id));
}

/**
 * `root` and every subgraph in it.
 * @param {Comfy.Graph | null | undefined} root
 * @returns {Comfy.Graph[]}
 */
export function allGraphs(root) {
  /** @type {Set<Comfy.Graph>} */
  const found = new Set();
  /** @param {Comfy.Graph | null | undefined} graph */
  const visit = (graph) => {
    if (!graph || found.has(graph)) return;
    found.add(graph);
    for (const node of nodesOf(graph)) visit(node.subgraph);
  };
  visit(root);
  return [...found];
}

/**
 * The nodes anywhere in `root` whose inside is `graph`.
 * @param {Comfy.Graph} root
 * @param {Comfy.Graph | null | undefined} graph
 */
function subgraphNodes(root, graph) {
  return allGraphs(root).flatMap((each) => nodesOf(each).filter((node) => node.subgraph === graph));
}

/**
 * The node with an execution id such as "5" or "12:7"; null where there is none.
 * @param {Comfy.Graph | null | undefined} root
 * @param {Comfy.Id} id
 * @returns {Comfy.Node | null}
 */
export function findByExecutionId(root, id) {
  const path = String(id).split(":");
  let graph = root;
  for (const part of path.slice(0, -1)) graph = nodeOf(graph, part)?.subgraph;
  return nodeOf(graph, path[path.length - 1]) ?? null;
}

/**
 * Whether an execution id is that of this node: by its whole path, else by its last part.
 * @param {Comfy.Graph | null | undefined} root
 * @param {Comfy.Node} node
 * @param {Comfy.Id} id
 */
export function hasExecutionId(root, node, id) {
  const found = findByExecutionId(root, id);
  return found ? found === node : String(id).split(":").pop() === String(node.id);
}

/**
 * The Set or Get nodes that share the name in the first widget of `node`.
 * @param {Comfy.Graph | null | undefined} graph
 * @param {string} type
 * @param {Comfy.Node} node
 */
function partners(graph, type, node) {
  const name = node.widgets?.[0]?.value;
  return nodesOf(graph).filter((each) => each.type === type && each.widgets?.[0]?.value === name);
}

/**
 * The input that a node hands on unchanged as an output: a reroute's only one, a bypassed node's of the same type.
 * @param {Comfy.Node} node
 * @param {number} slot
 * @returns {Comfy.Input | undefined}
 */
function passedOn(node, slot) {
  if (node.type === REROUTE) return node.inputs?.[0];
  const type = node.outputs?.[slot]?.type;
  const opposite = node.inputs?.[slot];
  return opposite?.type === type ? opposite : node.inputs?.find((input) => input.type === type);
}

/**
 * Where an input's value comes from; null where nothing is connected.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 * @param {Comfy.Input | undefined} input
 * @returns {Port | null}
 */
export function sourceOf(root, node, input) {
  let graph = node.graph;
  let link = linkOf(graph, input?.link);
  for (let steps = 0; link && steps < FARTHEST; steps++) {
    if (String(link.origin_id) === SUBGRAPH_INPUT) {
      const outer = subgraphNodes(root, graph)[0];
      const next = linkOf(outer?.graph, outer?.inputs?.[link.origin_slot]?.link);
      if (!next) return outer ? { node: outer, slot: link.origin_slot, border: true } : null;
      graph = outer.graph;
      link = next;
      continue;
    }
    const origin = nodeOf(graph, link.origin_id);
    if (!origin || origin.mode === MUTED) return null;
    if (origin.type === GET) {
      link = linkOf(graph, partners(graph, SET, origin)[0]?.inputs?.[0]?.link);
    } else if (origin.type === REROUTE || origin.mode === BYPASSED) {
      link = linkOf(graph, passedOn(origin, link.origin_slot)?.link);
    } else if (origin.subgraph) {
      graph = origin.subgraph;
      link = linkOf(graph, graph.outputs?.[link.origin_slot]?.linkIds?.[0]);
    } else {
      return { node: origin, slot: link.origin_slot };
    }
  }
  return null;
}

/**
 * Every input that an output reaches.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 * @param {number} slot
 * @returns {Port[]}
 */
export function targetsOf(root, node, slot) {
  /** @type {Port[]} */
  const found = [];
  /** @type {(graph: Comfy.Graph | null | undefined, ids: number[] | null | undefined, depth: number) => void} */
  const follow = (graph, ids, depth) => {
    for (const link of (ids ?? []).map((id) => linkOf(graph, id))) {
      if (!link || depth > DEEPEST) continue;
      if (String(link.target_id) === SUBGRAPH_OUTPUT) {
        for (const outer of subgraphNodes(root, graph)) {
          follow(outer.graph, outer.outputs?.[link.target_slot]?.links, depth + 1);
        }
        continue;
      }
      const target = nodeOf(graph, link.target_id);
      if (target?.subgraph) follow(target.subgraph, target.subgraph.inputs?.[link.target_slot]?.linkIds, depth + 1);
      else if (target) found.push({ node: target, slot: link.target_slot });
      if (target?.type !== SET) continue;
      for (const getter of partners(graph, GET, target)) follow(graph, getter.outputs?.[0]?.links, depth + 1);
    }
  };
  follow(node.graph, node.outputs?.[slot]?.links, 0);
  return found;
}
