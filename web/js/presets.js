// Settings that belong to a file which was trained for sparse attention, recognised by its name.
// @ts-check

import { filesOf, nodesAfter, nodesBefore } from "./graph_context.js";
import { valueOf } from "./values.js";

/**
 * lightx2v's LoRA was trained on blocks of 64 in raster order, of which a row kept 15 %, in every step.
 * @type {RoPeSLR.Preset[]}
 */
export const PRESETS = [
  {
    name: "MiniMax H3 Turbo-SLA",
    file: /h3.*turbo.*[-_.]sla([-_.]|$)/i,
    settings: {
      method: "top-k plain", sparsity: 0.85, block_order: "raster", key_block: "64", allocation: "uniform",
      dense_first_steps: 0,
    },
  },
];

/**
 * The preset of a file that a node on the same MODEL line names, before or after ours; null for none.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 */
export function presetAround(root, node) {
  const files = filesOf([...nodesBefore(root, node), ...nodesAfter(root, node)]);
  return PRESETS.find(({ file }) => files.some((path) => file.test(path.split(/[\\/]/).at(-1) ?? ""))) ?? null;
}

/**
 * The settings of a preset that a node's differ from, by name.
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 * @param {RoPeSLR.Preset} preset
 */
export function missingOf(root, node, preset) {
  return Object.fromEntries(Object.entries(preset.settings).filter(([name, value]) => {
    const now = valueOf(root, node, name);
    return now !== undefined && now !== value;
  }));
}
