// Figures and sentences of the panel: numbers in, plain English out.

const UNTRAINED = "without its weights is the kept blocks alone";

export const SIZES = [
  { width: 832, height: 480, length: 33 },
  { width: 832, height: 480, length: 81 },
  { width: 1280, height: 720, length: 33 },
  { width: 1280, height: 720, length: 81 },
  { width: 1280, height: 720, length: 121 },
];

/** 1182 -> "1,182". */
export function count(number) {
  return String(Math.round(number)).replace(/\B(?=(\d{3})+$)/g, ",");
}

/** 0.8347 -> "83.5 %", 0.99962 -> "99.96 %": never rounded up to 100 %. */
export function percent(share) {
  const value = 100 * share;
  if (share < 1 && value.toFixed(1) === "100.0") return `${(Math.floor(value * 100) / 100).toFixed(2)} %`;
  return `${value.toFixed(1)} %`;
}

/** 9.04 -> "9.0×", 12.3 -> "12×". */
export function times(factor) {
  return `${factor < 9.95 ? factor.toFixed(1) : count(factor)}×`;
}

/** 4.27 -> "4.3 s", 372 -> "6:12 min", 4000 -> "1:06 h". */
export function duration(seconds) {
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  const parts = (big, small) => `${big}:${String(small).padStart(2, "0")}`;
  if (whole < 3600) return `${parts(Math.floor(whole / 60), whole % 60)} min`;
  return `${parts(Math.floor(whole / 3600), Math.floor((whole % 3600) / 60))} h`;
}

/** 0.0123 -> "12 ms", 0.49 -> "490 ms", 1.2 -> "1.2 s". */
export function short(seconds) {
  if (seconds >= 1) return duration(seconds);
  const ms = 1000 * seconds;
  return `${ms < 9.95 ? ms.toFixed(1) : count(ms)} ms`;
}

export function sizeText({ width, height, length }) {
  return `${Math.round(width)} × ${Math.round(height)}, ${count(length)} frames`;
}

/** What an estimate says: {figures: [[value, caption]], share, lines}. A `why` stands alone. */
export function estimateWords(numbers) {
  if (numbers.why) return { figures: [], share: null, lines: [numbers.why, numbers.amiss].filter(Boolean) };
  const lines = [`Keeps ${count(numbers.kept)} of ${count(numbers.blocks)} blocks`];
  if (numbers.amiss) lines.push(numbers.amiss);
  if (numbers.untrained) lines.push(`${numbers.method} ${UNTRAINED}`);
  if (numbers.denseLayers) lines.push(`${count(numbers.denseLayers)} ${plural(numbers.denseLayers, "layer")} dense`);
  if (numbers.run && !numbers.windowed) lines.push(runWords(numbers.run));
  if (numbers.windowed) lines.push("Steps outside start and end percent stay dense");
  return {
    figures: [
      [times(numbers.attention), "faster attention"],
      [times(numbers.step), "faster step"],
      savedWords(numbers.saved),
    ],
    share: numbers.density, lines,
  };
}

/** [value, caption] of the share saved; a short video's background may cost more than was left out. */
function savedWords(share) {
  return share >= 0 ? [percent(share), "attention FLOPs saved"] : [percent(-share), "more attention FLOPs"];
}

function runWords({ steps, sparse, speedUp }) {
  if (!sparse) return `None of ${count(steps)} steps is sparse`;
  return `${count(sparse)} of ${count(steps)} steps sparse: sampling ${times(speedUp)} faster`;
}

function plural(number, word) {
  return number === 1 ? word : `${word}s`;
}

/** What a report says: {title, figures, lines, brief}. Fields that an older server leaves out are skipped. */
export function reportWords(report) {
  const dense = Object.entries(report.dense_calls ?? {}).sort((one, other) => other[1] - one[1]);
  const denseCalls = dense.reduce((sum, [, number]) => sum + number, 0);
  const sparse = report.sparse_calls ?? 0;
  const calls = `${count(sparse)} of ${count(sparse + denseCalls)} calls sparse`;
  const saved = savedWords(report.flops_saved ?? 0).join(" ");
  const seconds = report.attention_seconds;
  const inAttention = seconds ? (seconds.sparse ?? 0) + (seconds.dense ?? 0) : null;
  const one = report.call_seconds;
  const gain = one?.sparse && one.dense ? one.dense / one.sparse : null;

  const figures = [savedWords(report.flops_saved ?? 0)];
  if (gain) figures.push([times(Math.max(gain, 1 / gain)), gain >= 1 ? "faster per call" : "slower per call"]);
  if (inAttention !== null) figures.push([duration(inAttention), "in attention"]);

  const recall = typeof report.recall === "number" ? `, recall ${report.recall.toFixed(3)}` : "";
  const backend = report.backend ? ` in ${report.backend}` : "";
  const how = sparse ? `: ${report.method ?? "sparse"}${backend}, ${percent(report.density ?? 1)} of blocks kept` : "";
  const lines = [`${calls}${how}${recall}`];
  for (const [reason, number] of dense) lines.push(`${count(number)} dense: ${reason}`);
  if (["rola", "sla"].includes(report.method) && !report.adapter) lines.push(`${report.method} ${UNTRAINED}`);
  if (report.adapter) lines.push(`Adapter: ${report.adapter}`);
  if (gain) lines.push(`Measured: a sparse call ${short(one.sparse)}, a dense one ${short(one.dense)}`);
  if (report.below) lines.push(`Dense calls went to ${report.below}`);
  if (report.completed === false) lines.push("The run was cut short.");
  const title = `Last run${typeof report.seconds === "number" ? ` · ${duration(report.seconds)}` : ""}`;
  return { title, figures, lines, brief: `${calls}, ${saved}` };
}

/** What the map of a run shows, for those who cannot see it. */
export function mapWords(map) {
  const cells = map.density.flat().filter((value) => value !== null && value !== undefined);
  const sparse = cells.filter((value) => value < 1);
  const where = `${count(map.steps.length)} ${plural(map.steps.length, "step")} by ${count(map.layers)} layers`;
  if (!sparse.length) return `Map of kept blocks, ${where}: everything that ran was dense.`;
  const denseSteps = map.steps.filter((_, row) => isDenseRow(map.density[row])).map((step) => step + 1);
  const mean = sparse.reduce((sum, value) => sum + value, 0) / sparse.length;
  const dense = denseSteps.length ? ` Steps wholly dense: ${denseSteps.map(count).join(", ")}.` : "";
  const range = `from ${percent(Math.min(...sparse))} to ${percent(Math.max(...sparse))}, mean ${percent(mean)}`;
  const places = `${count(sparse.length)} of ${count(cells.length)} places sparse`;
  return `Map of kept blocks, ${where}: ${places}, ${range}.${dense}`;
}

function isDenseRow(row) {
  const ran = (row ?? []).filter((value) => value !== null && value !== undefined);
  return ran.length > 0 && ran.every((value) => value >= 1);
}

/** The smallest and the largest density below 1 of a map; [0, 0] where nothing ran sparse. */
export function sparseRange(map) {
  const sparse = map.density.flat().filter((value) => typeof value === "number" && value < 1);
  return sparse.length ? [Math.min(...sparse), Math.max(...sparse)] : [0, 0];
}

/** Whether a report's map can be drawn. */
export function isMap(map) {
  return Boolean(map && map.layers > 0 && map.steps?.length && map.density?.length === map.steps.length);
}
