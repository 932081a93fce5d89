// Figures and sentences of the panel: numbers in, plain English out.
// @ts-check

/** @param {number} digits @param {Intl.NumberFormatOptions} [options] */
const fixed = (digits, options) => new Intl.NumberFormat("en", {
  minimumFractionDigits: digits, maximumFractionDigits: digits, ...options,
});
const WHOLE = fixed(0);
const TENTHS = fixed(1);
const THOUSANDTHS = fixed(3);
const TWO_DIGITS = fixed(0, { minimumIntegerDigits: 2 });
const PLURAL = new Intl.PluralRules("en");
const SPACE = "\u00a0"; // between a number and its unit, so that no line breaks there

/** 1182 -> "1,182". @param {number} number */
export function count(number) {
  return WHOLE.format(number);
}

/** 1, "step" -> "1 step"; 2, "step" -> "2 steps". @param {number} number @param {string} noun */
export function plural(number, noun) {
  return `${count(number)} ${PLURAL.select(Math.round(number)) === "one" ? noun : `${noun}s`}`;
}

/** 0.8347 -> "83.5 %", 0.99962 -> "99.96 %": never rounded up to 100 %. @param {number} share */
export function percent(share) {
  const text = TENTHS.format(100 * share);
  const hundredths = Math.floor(10_000 * share) / 100;
  return `${share < 1 && text === "100.0" ? hundredths : text}${SPACE}%`;
}

/** 9.04 -> "9.0×", 12.3 -> "12×". @param {number} factor */
export function times(factor) {
  return `${factor < 9.95 ? TENTHS.format(factor) : count(factor)}×`;
}

/** 4.27 -> "4.3 s", 372 -> "6:12 min", 4000 -> "1:06 h". @param {number} seconds */
export function duration(seconds) {
  if (seconds < 9.95) return `${TENTHS.format(seconds)}${SPACE}s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole}${SPACE}s`;
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes}:${TWO_DIGITS.format(whole % 60)}${SPACE}min`;
  return `${count(Math.floor(minutes / 60))}:${TWO_DIGITS.format(minutes % 60)}${SPACE}h`;
}

/** Of less than a second too: 0.0123 -> "12 ms", 1.2 -> "1.2 s". @param {number} seconds */
export function shortDuration(seconds) {
  if (seconds >= 1) return duration(seconds);
  const ms = 1000 * seconds;
  return `${ms < 9.95 ? TENTHS.format(ms) : count(ms)}${SPACE}ms`;
}

/** @param {RoPeSLR.Size} size */
export function sizeText(size) {
  if ("tokens" in size) return `${count(size.tokens)} tokens, as in the last run`;
  return `${Math.round(size.width)} × ${Math.round(size.height)}, ${plural(size.length, "frame")}`;
}

/** @param {string} method */
function untrained(method) {
  return `${method} has no trained weights here: only block-sparse attention runs`;
}

/**
 * [value, caption] of the share saved; on a short video, replacing dropped blocks may cost more than it saves.
 * @param {number} share
 * @returns {RoPeSLR.Figure}
 */
function savedFigure(share) {
  return share >= 0 ? [percent(share), "attention FLOPs saved"] : [percent(-share), "more attention FLOPs"];
}

/** @param {RoPeSLR.RunEstimate} run */
function runText({ steps, sparse, speedUp }) {
  const text = `${count(sparse)} of ${plural(steps, "step")} sparse`;
  return sparse ? `${text}: sampling ${times(speedUp)} faster` : text;
}

/**
 * What an estimate says; where nothing runs sparse, only why.
 * @param {RoPeSLR.Estimate} numbers
 * @returns {{ figures: RoPeSLR.Figure[], share: number | null, lines: string[] }}
 */
export function estimateText(numbers) {
  const warnings = numbers.warning ? [numbers.warning] : [];
  if (numbers.why !== "") {
    return { figures: [], share: null, lines: [numbers.why, ...warnings] };
  }
  const sparse = /** @type {RoPeSLR.SparseEstimate} */ (numbers);
  const mean = sparse.shared ? ", a mean: each head finds its own share" : "";
  const lines = [`Keeps ${count(sparse.kept)} of ${count(sparse.blocks)} blocks${mean}`, ...warnings];
  if (sparse.shared === "error") lines.push("The error target decides during the run; these figures are for sparsity");
  if (sparse.untrained) lines.push(untrained(sparse.method));
  if (sparse.denseLayers) lines.push(`${plural(sparse.denseLayers, "layer")} dense`);
  if (sparse.windowed) lines.push("Steps outside start and end percent stay dense");
  else if (sparse.run) lines.push(runText(sparse.run));
  return {
    figures: [
      [times(sparse.attention), "faster attention"], [times(sparse.step), "faster step"], savedFigure(sparse.saved),
    ],
    share: sparse.density, lines,
  };
}

/**
 * What a report says. Fields that another version of the server leaves out are skipped.
 * @param {RoPeSLR.Report} report
 * @returns {{ title: string, figures: RoPeSLR.Figure[], lines: string[], brief: string }}
 */
export function reportText(report) {
  const dense = Object.entries(report.dense_calls ?? {}).sort((one, other) => other[1] - one[1]);
  const sparse = report.sparse_calls ?? 0;
  const all = dense.reduce((sum, [, number]) => sum + number, sparse);
  const calls = `${count(sparse)} of ${count(all)} calls sparse`;
  const saved = savedFigure(report.flops_saved ?? 0);
  const time = report.attention_seconds;
  const call = measuredCall(report.call_seconds);

  const figures = [saved];
  if (call) figures.push(call.figure);
  if (time) figures.push([duration((time.sparse ?? 0) + (time.dense ?? 0)), "in attention"]);

  const lines = [sparse ? `${calls}: ${sparseText(report)}` : calls];
  for (const [reason, number] of dense) lines.push(`${count(number)} dense: ${reason}`);
  if (["rola", "sla"].includes(report.method ?? "") && !report.adapter) lines.push(untrained(report.method ?? ""));
  if (report.adapter) lines.push(`Adapter: ${report.adapter}`);
  if (call) lines.push(call.line);
  if (report.previous) lines.push(`Dense calls used ${report.previous}`);
  if (report.completed === false) lines.push("The run did not finish.");
  const title = typeof report.seconds === "number" ? `Last run · ${duration(report.seconds)}` : "Last run";
  return { title, figures, lines, brief: `${calls}, ${saved.join(" ")}` };
}

/** @param {RoPeSLR.Report} report */
function sparseText({ method, backend, density, recall, heads }) {
  const how = [backend ? `${method ?? "sparse"} in ${backend}` : method ?? "sparse"];
  how.push(`${percent(density ?? 1)} of blocks kept${headRange(heads)}`);
  if (typeof recall === "number") how.push(`recall ${THOUSANDTHS.format(recall)}`);
  return how.join(", ");
}

/**
 * From the head that kept least to the one that kept most.
 * @param {RoPeSLR.HeadMap | null | undefined} heads
 */
function headRange(heads) {
  const each = (heads?.density ?? []).flat().flatMap((share) => (typeof share === "number" ? [share] : []));
  return each.length ? ` (heads: ${percent(Math.min(...each))} to ${percent(Math.max(...each))})` : "";
}

/**
 * How one sparse call compares with one dense call; null where one of them was not measured.
 * @param {RoPeSLR.SparseAndDense | null | undefined} seconds
 * @returns {{ figure: RoPeSLR.Figure, line: string } | null}
 */
function measuredCall(seconds) {
  if (!seconds?.sparse || !seconds.dense) return null;
  const gain = seconds.dense / seconds.sparse;
  return {
    figure: gain >= 1 ? [times(gain), "faster per call"] : [times(1 / gain), "slower per call"],
    line: `Measured: a sparse call ${shortDuration(seconds.sparse)}, a dense call ${shortDuration(seconds.dense)}`,
  };
}
