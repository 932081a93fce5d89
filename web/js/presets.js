// Settings that belong to a file which was trained for sparse attention, recognised by its name.
// @ts-check

import { FARTHEST, sourceOf, targetsOf } from "./graph.js";
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
  const files = [...upstream(root, node), ...downstream(root, node)].flatMap(({ widgets }) =>
    (widgets ?? []).flatMap(({ value }) => (typeof value === "string" ? [value.split(/[\\/]/).at(-1) ?? ""] : [])));
  return PRESETS.find(({ file }) => files.some((name) => file.test(name))) ?? null;
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

/**
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 */
function upstream(root, node) {
  const found = [];
  for (let at = node; found.length < FARTHEST;) {
    const input = at.inputs?.find(({ type }) => type === "MODEL");
    const source = input && sourceOf(root, at, input);
    if (!source || source.border) break;
    at = source.node;
    found.push(at);
  }
  return found;
}

/**
 * @param {Comfy.Graph} root
 * @param {Comfy.Node} node
 */
function downstream(root, node) {
  /** @type {Set<Comfy.Node>} */
  const found = new Set();
  const open = [node];
  for (let at = open.pop(); at && found.size < FARTHEST; at = open.pop()) {
    for (const [slot, { type }] of (at.outputs ?? []).entries()) {
      for (const { node: target } of type === "MODEL" ? targetsOf(root, at, slot) : []) {
        if (found.has(target)) continue;
        found.add(target);
        open.push(target);
      }
    }
  }
  return found;
}
