// Walks through a graph as ComfyUI's frontend keeps it: what is linked to what, over subgraphs and Set/Get pairs.

const SUBGRAPH_INPUT = "-10"; // the ids that ComfyUI gives to a subgraph's own two ends
const SUBGRAPH_OUTPUT = "-20";
const SET = "SetNode"; // a pair that many workflows have in place of a long link; they exist in the browser alone
const GET = "GetNode";
export const FARTHEST = 400; // places looked at in one walk: no graph of a person has more from model to sampler

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
