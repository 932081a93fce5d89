// The models that the panel knows: their dimensions, their tokens, and how a graph shows which one it is.
// @ts-check

const WAN_TEXT = 512; // Wan pads its prompt to this many tokens
const HUNYUAN_TEXT = 256; // HunyuanVideo does not pad its prompt; this is its usual bound
const H3_OTHERS = 640; // a prompt, and the sound of five seconds: two rows for each of 207 latents

/** @param {number} frames that make a latent frame, after the first @returns {(length: number) => number} */
const every = (frames) => (length) => Math.floor((Math.max(1, length) - 1) / frames) + 1;
/** 17k + 5 frames make 5k + 2 latent ones. @param {number} length */
const h3Frames = (length) => 5 * Math.max(0, Math.ceil((length - 5) / 17)) + 2;

const WAN = { spatial: 8, patch: 2, text: WAN_TEXT, others: 0, frames: every(4) };
const HUNYUAN = { patch: 2, text: 0, others: HUNYUAN_TEXT, frames: every(4) };
const LTX = { heads: 32, spatial: 32, patch: 1, others: 0, frames: every(8) };
const COGVIDEO = { spatial: 8, patch: 2, text: 0, others: 226, frames: every(4) };
const KANDINSKY = { spatial: 8, patch: 2, text: 256, others: 0, frames: every(4) };

/** Published dimensions of the models. @type {Record<string, RoPeSLR.Model>} */
export const MODELS = {
  "wan-14b": { ...WAN, name: "Wan 14B", dim: 5120, ffn: 13824, layers: 40, heads: 40 },
  "wan-1.3b": { ...WAN, name: "Wan 1.3B", dim: 1536, ffn: 8960, layers: 30, heads: 12 },
  "wan-5b": { ...WAN, name: "Wan 2.2 5B", dim: 3072, ffn: 14336, layers: 30, heads: 24, spatial: 16 },
  "hunyuan": { ...HUNYUAN, name: "HunyuanVideo", dim: 3072, ffn: 12288, layers: 60, heads: 24, spatial: 8 },
  "hunyuan-1.5": {
    ...HUNYUAN, name: "HunyuanVideo 1.5", dim: 2048, ffn: 8192, layers: 54, heads: 16, spatial: 16, patch: 1,
  },
  "h3": {
    name: "MiniMax H3", dim: 5376, inner: 7168, ffn: 14336, gated: true, layers: 50, heads: 56, spatial: 16, patch: 2,
    text: 0, others: H3_OTHERS, frames: h3Frames,
  },
  "ltx-2": { ...LTX, name: "LTX-2", dim: 4096, ffn: 16384, layers: 48, text: 1024 },
  "ltxv-13b": { ...LTX, name: "LTX-Video 13B", dim: 4096, ffn: 16384, layers: 48, text: 256 },
  "ltxv-2b": { ...LTX, name: "LTX-Video 2B", dim: 2048, ffn: 8192, layers: 28, text: 256 },
  "kandinsky-lite": { ...KANDINSKY, name: "Kandinsky 5 Lite", dim: 1792, ffn: 7168, layers: 32, heads: 28 },
  "kandinsky-pro": { ...KANDINSKY, name: "Kandinsky 5 Pro", dim: 4096, ffn: 16384, layers: 60, heads: 32 },
  "cosmos-2b": { ...WAN, name: "Cosmos Predict2 2B", dim: 2048, ffn: 8192, layers: 28, heads: 16 },
  "cosmos-14b": { ...WAN, name: "Cosmos Predict2 14B", dim: 5120, ffn: 20480, layers: 36, heads: 40 },
  "mochi": {
    name: "Mochi", dim: 3072, ffn: 8192, gated: true, layers: 48, heads: 24, spatial: 8, patch: 2,
    text: 0, others: 256, frames: every(6),
  },
  "cogvideox": { ...COGVIDEO, name: "CogVideoX 5B", dim: 3072, ffn: 12288, layers: 42, heads: 48 },
  "cogvideox-2b": { ...COGVIDEO, name: "CogVideoX 2B", dim: 1920, ffn: 7680, layers: 30, heads: 30 },
  "cogvideox-1.5": {
    ...COGVIDEO, name: "CogVideoX 1.5 5B", dim: 3072, ffn: 12288, layers: 42, heads: 48,
    frames: (length) => Math.ceil(every(4)(length) / 2),
  },
};

/**
 * The tokens of a video as frames, height and width.
 * @param {RoPeSLR.Model} model
 * @param {RoPeSLR.VideoSize} size
 * @returns {RoPeSLR.Grid}
 */
export function tokenGrid(model, { width, height, length }) {
  /** @param {number} pixels */
  const side = (pixels) => Math.max(1, Math.ceil(Math.floor(pixels / model.spatial) / model.patch));
  return [model.frames(length), side(height), side(width)];
}

/** Of families with names of their own. @type {[RegExp, string][]} */
const OTHERS = [
  [/minimax.?h3|(^|[^a-z0-9])h3[-_.]|fasth3/, "h3"],
  [/ltx.?v?.?2([._-]|$)|ltx.*(19|22)b/, "ltx-2"],
  [/ltx.?v.*13b/, "ltxv-13b"],
  [/ltx.?v/, "ltxv-2b"],
  [/ltx/, "ltx-2"],
  [/kandinsky.?5.*pro/, "kandinsky-pro"],
  [/kandinsky.?5/, "kandinsky-lite"],
  [/cosmos.*predict.?2.*14b/, "cosmos-14b"],
  [/cosmos.*predict.?2/, "cosmos-2b"],
  [/mochi/, "mochi"],
  [/cogvideox?[-_.]?1[._]5/, "cogvideox-1.5"],
  [/cogvideo.*[-_.]2b/, "cogvideox-2b"],
  [/cogvideo/, "cogvideox"],
];

/**
 * The key of MODELS that a file's name means; "" where it says nothing.
 * @param {string} file
 */
export function guessModel(file) {
  const name = file.toLowerCase();
  const other = OTHERS.find(([pattern]) => pattern.test(name));
  if (other) return other[1];
  if (/hunyuan|hyvideo|skyreels.?(v1|hunyuan)/.test(name)) {
    return /(video|hy)[-_. ]?v?1[._-]?5|(480|720|1080)p_(t2v|i2v|sr)/.test(name) ? "hunyuan-1.5" : "hunyuan";
  }
  if (/humo.*1[._-]7b|1[._-]3b/.test(name)) return "wan-1.3b"; // HuMo counts its audio layers among its billions
  if (/14b|humo/.test(name)) return "wan-14b";
  if (/(^|[^\d.])5b|ti2v/.test(name)) return "wan-5b";
  return /wan.*(high|low|move|animate)/.test(name) ? "wan-14b" : ""; // these exist in one size
}

/**
 * The same from the type of the node that makes the latent.
 * @param {string | undefined} type
 */
export function guessModelByLatent(type) {
  const known = LATENTS.find(([part]) => type?.includes(part));
  return known ? known[1] : "";
}

/** What the type of such a node contains. @type {[string, string][]} */
const LATENTS = [
  ["HunyuanVideo15", "hunyuan-1.5"],
  ["Wan22ImageToVideoLatent", "wan-5b"],
  ["MiniMaxH3", "h3"],
  ["LTXV", "ltx-2"],
  ["Kandinsky5", "kandinsky-lite"],
  ["Mochi", "mochi"],
  ["CogVideoX", "cogvideox"],
];
