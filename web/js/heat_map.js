// The map of a run, layers down and steps across: one cell for the share of blocks that a layer kept at a step.

import { mapWords, percent, sparseRange } from "./format.js";

const HEIGHT = 64;
const DENSE = [214, 137, 16]; // told from the blues by brightness too, not by hue alone
const FEWEST = [174, 214, 241];
const MOST = [31, 97, 141];

function colour(value, [least, most]) {
  if (value >= 1) return `rgb(${DENSE.join(",")})`;
  const place = most > least ? (value - least) / (most - least) : 0.5;
  const mix = FEWEST.map((low, channel) => Math.round(low + (MOST[channel] - low) * place));
  return `rgb(${mix.join(",")})`;
}

/** Draw the map into a canvas of the width that it has on the page, sharp at every zoom of the browser. */
export function draw(canvas, map) {
  const ratio = globalThis.devicePixelRatio || 1;
  const width = canvas.clientWidth || 280;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(HEIGHT * ratio);
  const context = canvas.getContext("2d");
  const range = sparseRange(map);
  const edge = (place, count, size) => Math.round((place * size) / count);
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

function make(document, tag, name, text = "") {
  return Object.assign(document.createElement(tag), { className: name, textContent: text });
}

function swatch(document, background, text) {
  const key = make(document, "span", "ropeslr-key", text);
  const sample = make(document, "i", "ropeslr-swatch");
  sample.style.background = background;
  key.prepend(sample);
  return key;
}

function legend(document, map) {
  const [least, most] = sparseRange(map);
  const element = make(document, "figcaption", "ropeslr-legend");
  const steps = `steps ${map.steps[0] + 1}–${map.steps[map.steps.length - 1] + 1} →`;
  const keys = make(document, "span", "ropeslr-keys");
  if (most > 0) {
    const [low, high] = [percent(least), percent(most)];
    const ends = [least, most].map((value) => colour(value, [least, most])).join(", ");
    const range = low === high ? low : `${low} – ${high}`;
    keys.append(swatch(document, `linear-gradient(90deg, ${ends})`, `${range} kept`));
  }
  if (map.density.flat().some((value) => value >= 1)) keys.append(swatch(document, colour(1, [0, 0]), "dense"));
  element.append(make(document, "span", "ropeslr-axes", `${steps}, layers 0–${map.layers - 1} ↓`), keys);
  return element;
}

/** The map with its legend: {element, canvas}; to be drawn once it is on the page. */
export function heatMap(document, map) {
  const element = make(document, "figure", "ropeslr-map");
  const canvas = make(document, "canvas", "ropeslr-cells");
  canvas.style.height = `${HEIGHT}px`;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", mapWords(map));
  canvas.title = mapWords(map);
  element.append(canvas, legend(document, map));
  return { element, canvas };
}
