// The models that the panel knows: their dimensions, their tokens, and how a graph shows which one it is.
// @ts-check

const HUNYUAN_TEXT = 256; // HunyuanVideo does not pad its prompt; this is its usual bound

/** Published dimensions of the models. @type {Record<string, RoPeSLR.Model>} */
export const MODELS = {
  "wan-14b": { name: "Wan 14B", family: "wan", dim: 5120, ffn: 13824, layers: 40, heads: 40, spatial: 8, patch: 2 },
  "wan-1.3b": { name: "Wan 1.3B", family: "wan", dim: 1536, ffn: 8960, layers: 30, heads: 12, spatial: 8, patch: 2 },
  "wan-5b": { name: "Wan 2.2 5B", family: "wan", dim: 3072, ffn: 14336, layers: 30, heads: 24, spatial: 16, patch: 2 },
  "hunyuan": {
    name: "HunyuanVideo", family: "hunyuan", dim: 3072, ffn: 12288, layers: 60, heads: 24, spatial: 8, patch: 2,
  },
  "hunyuan-1.5": {
    name: "HunyuanVideo 1.5", family: "hunyuan", dim: 2048, ffn: 8192, layers: 54, heads: 16, spatial: 16, patch: 1,
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
  return [Math.floor((Math.max(1, length) - 1) / 4) + 1, side(height), side(width)];
}

/**
 * Tokens in the same sequence that are not the video's; they are always kept.
 * @param {RoPeSLR.Model} model
 */
export function extraTokens(model) {
  return model.family === "hunyuan" ? HUNYUAN_TEXT : 0;
}

/**
 * The key of MODELS that a file's name means; "" where it says nothing.
 * @param {string} file
 */
export function guessModel(file) {
  const name = file.toLowerCase();
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
  if (type?.includes("HunyuanVideo15")) return "hunyuan-1.5";
  return type === "Wan22ImageToVideoLatent" ? "wan-5b" : "";
}
