// Small graphs for the tests, in the shapes that ComfyUI's frontend keeps them in.

export const MODEL = "MODEL";
export const LATENT = "LATENT";

/**
 * A graph from nodes {id: [type, inputs {name: type}, outputs [type or "name:type"], widgets {name: value}, more]} and
 * wires [from, slot, to, input's name].
 */
export function graphOf(nodes, wires) {
  const graph = { links: new Map(), nodes: [] };
  for (const [id, [type, inputs, outputs, widgets = {}, more = {}]] of Object.entries(nodes)) {
    graph.nodes.push({
      id: Number(id), type, graph, mode: 0,
      inputs: Object.entries(inputs).map(([name, kind]) => ({
        name, type: kind, link: null, ...(name in widgets ? { widget: { name } } : {}),
      })),
      outputs: outputs.map((output) => {
        const [name, kind] = output.includes(":") ? output.split(":") : [output, output];
        return { name, type: kind, links: [] };
      }),
      widgets: Object.entries(widgets).map(([name, value]) => ({ name, value })), ...more,
    });
  }
  const byId = (id) => graph.nodes.find((node) => node.id === id);
  wires.forEach(([from, fromSlot, to, name], number) => {
    const toSlot = byId(to).inputs.findIndex((input) => input.name === name);
    graph.links.set(number, { origin_id: from, origin_slot: fromSlot, target_id: to, target_slot: toSlot });
    byId(from).outputs[fromSlot].links.push(number);
    byId(to).inputs[toSlot].link = number;
  });
  return { graph, node: byId };
}

export const LOADER = [
  "UNETLoader", {}, [MODEL], { unet_name: "wan2.1_t2v_1.3B_fp16.safetensors", weight_dtype: "default" },
];
export const OURS = ["RoPeSLRSparseAttention", { model: MODEL, adapter: "ROPESLR_ADAPTER" }, [MODEL]];
export const KSAMPLER = ["KSampler", { model: MODEL, latent_image: LATENT }, [LATENT], { steps: 30 }];
export const EMPTY = [
  "EmptyHunyuanLatentVideo", {}, [LATENT], { width: 832, height: 480, length: 81, batch_size: 1 },
];
const SIZED = { width: "INT", height: "INT", length: "INT" };
/** The same with inputs for its size, of which only those are read that are linked. */
export const LINKED = ["EmptyHunyuanLatentVideo", SIZED, [LATENT], { width: 16, height: 16, length: 1, batch_size: 1 }];

/** Our node inside subgraph 12, its model coming from outside, its output going there; `id` makes ids of links. */
export function withSubgraph(id = Number) {
  const inner = graphOf({ 7: OURS }, []);
  inner.graph.links.set(90, { origin_id: id(-10), origin_slot: 0, target_id: id(7), target_slot: 0 });
  inner.graph.links.set(91, { origin_id: id(7), origin_slot: 0, target_id: id(-20), target_slot: 0 });
  inner.node(7).inputs[0].link = 90;
  inner.node(7).outputs[0].links.push(91);
  inner.graph.inputs = [{ linkIds: [90] }];
  inner.graph.outputs = [{ linkIds: [91] }];
  const outer = graphOf({
    1: LOADER, 12: ["subgraph", { model: MODEL }, [MODEL], {}, { subgraph: inner.graph }], 3: KSAMPLER, 4: EMPTY,
  }, [[1, 0, 12, "model"], [12, 0, 3, "model"], [4, 0, 3, "latent_image"]]);
  return { root: outer.graph, ours: inner.node(7), outer };
}
