// The panel's page elements, made from a plain state object; it knows nothing of ComfyUI.
// @ts-check

import { estimateText, reportText, sizeText, times } from "./format.js";
import { draw, headMap, heatMap, isMap } from "./heat_map.js";

const BOUND = "Upper bounds, from operation counts: kernels reach part of them, plain PyTorch less.";
const UNKNOWN_SIZE = "The graph does not say how large the video is: choose a size here, or run once.";
const UNKNOWN_MODEL = "The graph does not say which model this is: choose it here.";

/** What the menu offers where the graph does not say the size. @type {RoPeSLR.VideoSize[]} */
const SIZES = [
  { width: 832, height: 480, length: 33 },
  { width: 832, height: 480, length: 81 },
  { width: 1280, height: 720, length: 33 },
  { width: 1280, height: 720, length: 81 },
  { width: 1280, height: 720, length: 121 },
];

export const STYLE = `
.ropeslr-panel { --ropeslr-line: color-mix(in srgb, var(--border-color, #4e4e4e) 60%, transparent);
  --ropeslr-quiet: color-mix(in srgb, var(--fg-color, #ddd) 72%, transparent);
  box-sizing: border-box; width: 100%; padding: 2px 0; overflow: hidden; font: 12px/1.4 system-ui, sans-serif;
  color: var(--fg-color, #ddd); text-align: left; cursor: default; }
.ropeslr-body { box-sizing: border-box; display: flex; flex-direction: column; gap: 6px; padding: 8px 10px;
  border: 1px solid var(--ropeslr-line); border-radius: 6px;
  background: var(--comfy-menu-bg, var(--comfy-input-bg, #222)); }
.ropeslr-panel section { display: flex; flex-direction: column; gap: 5px; }
.ropeslr-panel section + section { padding-top: 6px; border-top: 1px solid var(--ropeslr-line); }
.ropeslr-head { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 10px; }
.ropeslr-title { font-weight: 600; }
.ropeslr-quiet { color: var(--ropeslr-quiet); font-size: 11px; }
.ropeslr-figures { display: flex; gap: 10px; }
.ropeslr-figure { flex: 0 1 auto; min-width: 56px; }
.ropeslr-figure b { display: block; font-size: 17px; font-weight: 600; line-height: 1.25;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.ropeslr-bar { height: 4px; border-radius: 2px; overflow: hidden;
  background: color-mix(in srgb, var(--fg-color, #ddd) 18%, transparent); }
.ropeslr-bar i { display: block; height: 100%; min-width: 2px; border-radius: 2px; background: #3d8fd1; }
.ropeslr-lines { margin: 0; padding: 0; list-style: none; overflow-wrap: anywhere; }
.ropeslr-asks { display: flex; flex-wrap: wrap; gap: 6px; }
.ropeslr-panel label { display: flex; align-items: center; gap: 6px; flex: 1 1 auto; }
.ropeslr-panel label span { min-width: 36px; }
.ropeslr-panel select { flex: 1 1 auto; min-width: 0; padding: 2px 4px; font: inherit; border-radius: 4px;
  color: var(--input-text, #ddd); background: var(--bg-color, #202020);
  border: 1px solid var(--border-color, #4e4e4e); }
.ropeslr-panel button { align-self: flex-start; padding: 2px 8px; font: inherit; border-radius: 4px; cursor: pointer;
  color: var(--input-text, #ddd); background: var(--bg-color, #202020);
  border: 1px solid var(--border-color, #4e4e4e); }
.ropeslr-panel :focus-visible { outline: 2px solid #3d8fd1; outline-offset: 1px; }
.ropeslr-map { margin: 0; }
.ropeslr-cells { display: block; width: 100%; border-radius: 3px;
  background: color-mix(in srgb, var(--fg-color, #ddd) 10%, transparent); }
.ropeslr-legend { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 10px; margin-top: 3px;
  font-size: 11px; }
.ropeslr-keys { display: flex; gap: 10px; }
.ropeslr-axes, .ropeslr-key { color: var(--ropeslr-quiet); white-space: nowrap; }
.ropeslr-swatch { display: inline-block; width: 18px; height: 8px; margin-right: 4px; border-radius: 2px; }
`;

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 */
function make(tag, name = "", text = "") {
  return Object.assign(document.createElement(tag), { className: name, textContent: text });
}

/** @param {string} title @param {string} aside */
function head(title, aside) {
  const row = make("div", "ropeslr-head");
  row.append(make("span", "ropeslr-title", title), make("span", "ropeslr-quiet", aside));
  return row;
}

/** @param {RoPeSLR.Figure[]} pairs */
function figures(pairs) {
  const grid = make("div", "ropeslr-figures");
  for (const [value, caption] of pairs) {
    const cell = make("div", "ropeslr-figure");
    cell.append(make("b", "", value), make("span", "ropeslr-quiet", caption));
    grid.append(cell);
  }
  return grid;
}

/** @param {string[]} lines */
function list(lines) {
  const items = make("ul", "ropeslr-lines");
  items.append(...lines.map((line) => make("li", "", line)));
  return items;
}

/** A bar that repeats what the line under it says. @param {number} share */
function bar(share) {
  const track = make("div", "ropeslr-bar");
  const filled = make("i");
  filled.style.width = `${100 * share}%`;
  track.append(filled);
  return track;
}

/** @param {string} text */
function note(text) {
  return make("div", "ropeslr-quiet", text);
}

/** The panel: `element` goes on the node, `body` has the height that it needs. */
export class PanelView {
  /** @param {(kind: RoPeSLR.Choice, value: string) => void} onChoose hears the menus and the button */
  constructor(onChoose) {
    this.onChoose = onChoose;
    this.element = make("div", "ropeslr-panel");
    this.body = make("div", "ropeslr-body");
    this.body.setAttribute("role", "group");
    this.body.setAttribute("aria-label", "RoPeSLR: estimate and last run");
    this.element.append(this.body);
    /** The maps now on the page. @type {{ canvas: HTMLCanvasElement, map: RoPeSLR.DensityMap }[]} */
    this.shownMaps = [];
  }

  /** @param {RoPeSLR.PanelState} state */
  render(state) {
    this.shownMaps = [];
    const sections = [];
    if (state.offer) sections.push(this.offerSection(state.offer));
    if (!state.report || state.status !== "fresh") sections.push(this.estimateSection(state));
    if (state.report) sections.push(this.reportSection(state, state.report));
    const active = document.activeElement;
    const focused = active instanceof HTMLSelectElement && this.body.contains(active) ? active.dataset.kind : null;
    this.body.replaceChildren(...sections);
    const again = focused ? this.body.querySelector(`select[data-kind="${focused}"]`) : null;
    if (again instanceof HTMLSelectElement) again.focus();
    this.redraw();
  }

  redraw() {
    for (const { canvas, map } of this.shownMaps) draw(canvas, map);
  }

  /** What a file was trained with, and a button that sets it. @param {RoPeSLR.Offer} offer */
  offerSection({ name, settings }) {
    const section = make("section");
    const values = Object.entries(settings).map(([key, value]) => `${key.replaceAll("_", " ")} ${value}`);
    const button = make("button", "", "Use its settings");
    button.type = "button";
    button.addEventListener("click", () => this.onChoose("preset", JSON.stringify(settings)));
    section.append(head(name, "trained sparse"), make("div", "", `It was trained with ${values.join(", ")}.`), button);
    return section;
  }

  /** @param {RoPeSLR.PanelState} state */
  estimateSection(state) {
    const section = make("section");
    const aside = [state.models[state.model], state.size && sizeText(state.size)].filter(Boolean).join(" · ");
    section.append(head("Estimate", aside), ...this.menus(state));
    if (!state.numbers) {
      section.append(note(state.model ? UNKNOWN_SIZE : UNKNOWN_MODEL));
      return section;
    }
    const text = estimateText(state.numbers);
    if (text.share !== null) section.append(figures(text.figures), bar(text.share));
    section.append(list([...text.lines, ...state.assumptions]));
    if (text.share !== null) section.append(note(BOUND));
    return section;
  }

  /** @param {RoPeSLR.PanelState} state @param {RoPeSLR.Report} report */
  reportSection(state, report) {
    const section = make("section");
    section.setAttribute("aria-live", "polite");
    const text = reportText(report);
    if (state.status !== "fresh") {
      section.append(head(text.title, state.idle || "with other settings"), make("div", "", text.brief));
      return section;
    }
    section.append(head(text.title, state.models[state.model] ?? report.model ?? ""));
    section.append(figures(text.figures), list(text.lines));
    const numbers = state.numbers;
    if (numbers && "call" in numbers) section.append(note(`The estimate was at most ${times(numbers.call)} per call.`));
    for (const map of [report.map, headMap(report.heads)]) {
      if (!isMap(map)) continue;
      const { element, canvas } = heatMap(document, map);
      this.shownMaps.push({ canvas, map });
      section.append(element);
    }
    return section;
  }

  /** Menus for what the graph does not say. @param {RoPeSLR.PanelState} state */
  menus({ models, model, size, found }) {
    const row = make("div", "ropeslr-asks");
    if (!found.model) row.append(this.menu("model", "model", "choose …", Object.entries(models), model));
    if (!found.size) {
      const counted = size !== null && "tokens" in size;
      const chosen = size && !counted ? JSON.stringify(size) : "";
      const sizes = SIZES.map((each) => /** @type {[string, string]} */ ([JSON.stringify(each), sizeText(each)]));
      row.append(this.menu("size", "video", counted ? "as in the last run" : "choose …", sizes, chosen));
    }
    return row.childElementCount ? [row] : [];
  }

  /**
   * @param {"model" | "size"} kind
   * @param {string} caption
   * @param {string} none the text for no choice
   * @param {[value: string, text: string][]} options
   * @param {string} chosen
   */
  menu(kind, caption, none, options, chosen) {
    const label = make("label");
    label.append(make("span", "ropeslr-quiet", caption));
    const select = make("select");
    select.dataset.kind = kind;
    select.append(new Option(none, ""), ...options.map(([value, text]) => new Option(text, value)));
    select.value = chosen;
    select.addEventListener("change", () => this.onChoose(kind, select.value));
    // The graph's own keys (Delete, Ctrl+C) must not act on the node while a menu is used.
    select.addEventListener("keydown", (event) => event.ctrlKey || event.metaKey || event.stopPropagation());
    label.append(select);
    return label;
  }
}
