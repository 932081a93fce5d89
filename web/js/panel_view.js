// The panel's page elements, made from a plain state object; it knows nothing of ComfyUI.

import { draw, heatMap } from "./heat_map.js";
import { estimateWords, isMap, reportWords, SIZES, sizeText, times } from "./format.js";

const BOUND = "Upper bounds from counted operations: kernels reach a part of them, plain PyTorch less.";

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
 * A view: {element, body, render(state), redraw()}. state: {models: {key: name}, model, size, found: {model, size},
 * numbers | null, report | null, fresh, idle}; onChoose(kind, value) hears the two menus.
 */
export function createView(document, onChoose) {
  const make = (tag, name = "", text = "") => {
    return Object.assign(document.createElement(tag), { className: name, textContent: text });
  };
  const element = make("div", "ropeslr-panel");
  const body = make("div", "ropeslr-body");
  body.setAttribute("role", "group");
  body.setAttribute("aria-label", "RoPeSLR: what these settings save, and what the last run did");
  element.append(body);
  let shownMap = null; // {canvas, map} on the page now

  function head(title, aside) {
    const row = make("div", "ropeslr-head");
    row.append(make("span", "ropeslr-title", title), make("span", "ropeslr-quiet", aside));
    return row;
  }

  function figures(pairs) {
    const grid = make("div", "ropeslr-figures");
    for (const [value, caption] of pairs) {
      const cell = make("div", "ropeslr-figure");
      cell.append(make("b", "", value), make("span", "ropeslr-quiet", caption));
      grid.append(cell);
    }
    return grid;
  }

  function list(lines) {
    const items = make("ul", "ropeslr-lines");
    items.append(...lines.map((line) => make("li", "", line)));
    return items;
  }

  function bar(share) {
    const track = make("div", "ropeslr-bar");
    const filled = make("i");
    filled.style.width = `${100 * share}%`;
    track.append(filled);
    return track; // says nothing that the line below it does not say
  }

  function menu(kind, caption, options, chosen) {
    const label = make("label");
    label.append(make("span", "ropeslr-quiet", caption));
    const select = make("select");
    select.dataset.kind = kind;
    select.append(new Option("choose …", ""), ...options.map(([value, text]) => new Option(text, value)));
    select.value = chosen ?? "";
    select.addEventListener("change", () => onChoose(kind, select.value));
    // The graph's own keys (Delete, Ctrl+C) must not act on the node while a menu is used.
    select.addEventListener("keydown", (event) => event.ctrlKey || event.metaKey || event.stopPropagation());
    label.append(select);
    return label;
  }

  function menus(state) {
    const row = make("div", "ropeslr-asks");
    if (!state.found.model) row.append(menu("model", "model", Object.entries(state.models), state.model));
    if (!state.found.size) {
      const sizes = SIZES.map((size) => [JSON.stringify(size), sizeText(size)]);
      row.append(menu("size", "video", sizes, state.size ? JSON.stringify(state.size) : ""));
    }
    return row.childElementCount ? [row] : [];
  }

  function estimateSection(state) {
    const section = make("section");
    const aside = [state.models[state.model], state.size && sizeText(state.size)].filter(Boolean).join(" · ");
    section.append(head("Estimate", aside), ...menus(state));
    if (!state.numbers) {
      section.append(make("div", "ropeslr-quiet", "Not found in the graph: choose here to see an estimate."));
      return section;
    }
    const words = estimateWords(state.numbers);
    if (words.figures.length) section.append(figures(words.figures), bar(words.share));
    section.append(list(words.lines));
    if (words.figures.length) section.append(make("div", "ropeslr-quiet", BOUND));
    return section;
  }

  function reportSection(state) {
    const section = make("section");
    section.setAttribute("aria-live", "polite");
    const words = reportWords(state.report);
    const model = state.models[state.model] ?? state.report.model ?? "";
    section.append(head(words.title, state.fresh ? model : state.idle || "with other settings"));
    if (!state.fresh) {
      section.append(make("div", "", words.brief));
      return section;
    }
    section.append(figures(words.figures), list(words.lines));
    if (state.numbers?.call) {
      const most = times(state.numbers.call);
      section.append(make("div", "ropeslr-quiet", `The estimate was at most ${most} per call.`));
    }
    if (isMap(state.report.map)) {
      const { element: figure, canvas } = heatMap(document, state.report.map);
      shownMap = { canvas, map: state.report.map };
      section.append(figure);
    }
    return section;
  }

  function redraw() {
    if (shownMap) draw(shownMap.canvas, shownMap.map);
  }

  function render(state) {
    shownMap = null;
    const sections = [];
    if (!state.report || !state.fresh) sections.push(estimateSection(state));
    if (state.report) sections.push(reportSection(state));
    const focused = body.contains(document.activeElement) ? document.activeElement.dataset.kind : null;
    body.replaceChildren(...sections);
    if (focused) body.querySelector(`select[data-kind="${focused}"]`)?.focus();
    redraw();
  }

  return { element, body, render, redraw };
}
