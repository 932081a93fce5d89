// Maps of a run, layers down, steps or heads across: one cell for the share of blocks that was kept there.
// @ts-check

import { count, percent, plural } from "./format.js";

/** @typedef {[number, number]} Range the smallest and the largest density of sparse cells */

const HEIGHT = 64;
const DENSE = [214, 137, 16]; // differs from the blues in brightness too, not in hue alone
const FEWEST = [174, 214, 241];
const MOST = [31, 97, 141];

/**
 * Whether a report's map can be drawn.
 * @param {RoPeSLR.DensityMap | null | undefined} map
 * @returns {map is RoPeSLR.DensityMap}
 */
export function isMap(map) {
  return Boolean(map && map.layers > 0 && map.steps?.length && map.density?.length === map.steps.length);
}

/**
 * A report's densities by head, as a map.
 * @param {RoPeSLR.HeadMap | null | undefined} heads
 * @returns {RoPeSLR.DensityMap | null}
 */
export function headMap(heads) {
  return heads ? { layers: heads.layers, steps: heads.heads, density: heads.density, across: "head" } : null;
}

/**
 * Densities of the cells that ran.
 * @param {(number | null)[]} cells
 */
function ran(cells) {
  return cells.flatMap((value) => (typeof value === "number" ? [value] : []));
}

/**
 * The smallest and the largest density of sparse cells; [0, 0] where nothing ran sparse.
 * @param {RoPeSLR.DensityMap} map
 * @returns {Range}
 */
export function sparseRange(map) {
  const sparse = ran(map.density.flat()).filter((value) => value < 1).sort((one, other) => one - other);
  return sparse.length ? [sparse[0], sparse[sparse.length - 1]] : [0, 0];
}

/**
 * What the map shows, for those who cannot see it.
 * @param {RoPeSLR.DensityMap} map
 */
export function mapText(map) {
  const cells = ran(map.density.flat());
  const sparse = cells.filter((value) => value < 1);
  const across = map.across ?? "step";
  const title = `Map of kept blocks, ${plural(map.steps.length, across)} by ${plural(map.layers, "layer")}`;
  if (!sparse.length) return `${title}: every cell is dense.`;
  const [least, most] = sparseRange(map);
  const mean = sparse.reduce((sum, value) => sum + value, 0) / sparse.length;
  const dense = map.steps.filter((_, row) => isDense(map.density[row])).map((step) => count(step + 1));
  const range = `from ${percent(least)} to ${percent(most)}, mean ${percent(mean)}`;
  const steps = dense.length && across === "step" ? ` Dense steps: ${dense.join(", ")}.` : "";
  return `${title}: ${count(sparse.length)} of ${plural(cells.length, "cell")} sparse, ${range}.${steps}`;
}

/** @param {(number | null)[]} row */
function isDense(row) {
  const cells = ran(row);
  return cells.length > 0 && cells.every((value) => value >= 1);
}

/**
 * @param {number} value
 * @param {Range} range
 */
function colour(value, [least, most]) {
  if (value >= 1) return `rgb(${DENSE.join(",")})`;
  const position = most > least ? (value - least) / (most - least) : 0.5;
  const mix = FEWEST.map((low, channel) => Math.round(low + (MOST[channel] - low) * position));
  return `rgb(${mix.join(",")})`;
}

/**
 * Draw the map into a canvas of the width that it has on the page, sharp at every zoom of the browser.
 * @param {HTMLCanvasElement} canvas
 * @param {RoPeSLR.DensityMap} map
 */
export function draw(canvas, map) {
  const ratio = globalThis.devicePixelRatio || 1;
  const width = canvas.clientWidth || 280;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(HEIGHT * ratio);
  const context = canvas.getContext("2d");
  if (!context) return;
  const range = sparseRange(map);
  /** @type {(cell: number, cells: number, size: number) => number} */
  const edge = (cell, cells, size) => Math.round((cell * size) / cells);
  map.steps.forEach((_, column) => {
    const left = edge(column, map.steps.length, canvas.width);
    const right = edge(column + 1, map.steps.length, canvas.width);
    for (let layer = 0; layer < map.layers; layer++) {
      const value = map.density[column]?.[layer];
      if (typeof value !== "number") continue;
      const top = edge(layer, map.layers, canvas.height);
      context.fillStyle = colour(value, range);
      context.fillRect(left, top, right - left, edge(layer + 1, map.layers, canvas.height) - top);
    }
  });
}

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Document} document
 * @param {Tag} tag
 * @param {string} name
 */
function make(document, tag, name, text = "") {
  return Object.assign(document.createElement(tag), { className: name, textContent: text });
}

/**
 * @param {Document} document
 * @param {string} background
 * @param {string} text
 */
function swatch(document, background, text) {
  const key = make(document, "span", "ropeslr-key", text);
  const sample = make(document, "i", "ropeslr-swatch");
  sample.style.background = background;
  key.prepend(sample);
  return key;
}

/**
 * @param {Document} document
 * @param {RoPeSLR.DensityMap} map
 */
function legend(document, map) {
  const [least, most] = sparseRange(map);
  const element = make(document, "figcaption", "ropeslr-legend");
  const [first, last] = [map.steps[0], map.steps[map.steps.length - 1]];
  const steps = map.across === "head" ? `heads ${first}–${last} →` : `steps ${first + 1}–${last + 1} →`;
  const keys = make(document, "span", "ropeslr-keys");
  if (most > 0) {
    const [low, high] = [percent(least), percent(most)];
    const ends = [least, most].map((value) => colour(value, [least, most])).join(", ");
    const range = low === high ? low : `${low} – ${high}`;
    keys.append(swatch(document, `linear-gradient(90deg, ${ends})`, `${range} kept`));
  }
  if (ran(map.density.flat()).some((value) => value >= 1)) keys.append(swatch(document, colour(1, [0, 0]), "dense"));
  element.append(make(document, "span", "ropeslr-axes", `${steps}, layers 0–${map.layers - 1} ↓`), keys);
  return element;
}

/**
 * The map with its legend; `draw` fills the canvas once it is on the page.
 * @param {Document} document
 * @param {RoPeSLR.DensityMap} map
 */
export function heatMap(document, map) {
  const element = make(document, "figure", "ropeslr-map");
  const canvas = make(document, "canvas", "ropeslr-cells");
  canvas.style.height = `${HEIGHT}px`;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", mapText(map));
  canvas.title = mapText(map);
  element.append(canvas, legend(document, map));
  return { element, canvas };
}
