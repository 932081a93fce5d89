// What attention costs, in FLOPs and blocks: the arithmetic of attention/accounting.py and block_layout.py.
// @ts-check

export const BLOCK = 64;
const TILE = 4; // the sides of a cube of 64 tokens; see attention/block_layout.py
/** @type {Set<RoPeSLR.Method>} Methods that score blocks in every call, as `Method.routes` says. */
const ROUTES = new Set(["ropeslr", "rola", "sla", "top-k", "top-k plain", "vsa"]);
const DEFAULT_RANK = 64; // of the released RoLA checkpoints; a file's own rank is not known before the run

/**
 * Key blocks that each query block keeps by score: at least one.
 * @param {number} sparsity
 * @param {number} blocks
 */
export function keptBlocks(sparsity, blocks) {
  return Math.max(1, Math.floor((1.0 - sparsity) * blocks + 1e-6));
}

/**
 * Cubes of 4 x 4 x 4 tokens in a grid, those that its far sides cut off included.
 * @param {number[]} sides
 */
function tiles(sides) {
  return sides.reduce((product, side) => product * Math.ceil(side / TILE), 1);
}

/**
 * The same of a grid's tiles, as VSA counts them: rounded up.
 * @param {number} sparsity
 * @param {number} count
 */
function keptTiles(sparsity, count) {
  return Math.max(1, Math.min(Math.ceil((1.0 - sparsity) * count), count));
}

/**
 * Key blocks of a video that hold tokens of its first frame. They come first, or count as if they did.
 * @param {RoPeSLR.Grid} grid
 * @param {string} order
 * @param {number} keyBlock tokens of a key block, at least 16
 */
export function firstFrameBlocks([frames, height, width], order, keyBlock) {
  if (order === "tile") return tiles([height, width]);
  if (order === "raster") return Math.ceil((height * width) / keyBlock);
  const depth = Math.floor(frames / Math.ceil(frames / TILE)); // frames in the first layer of tiles
  const bands = Math.ceil(height / TILE);
  const lastBand = height - Math.floor((height * (bands - 1)) / bands);
  const lastOfFirst = depth * height * width - depth * lastBand + lastBand - 1; // in the last column of the last band
  return Math.floor(lastOfFirst / keyBlock) + 1;
}

/**
 * Blocks of a layout and the share of key blocks that the video's queries keep, required blocks included.
 * @param {RoPeSLR.Grid} grid
 * @param {number} extra
 * @param {RoPeSLR.BlockSettings} settings
 * @returns {RoPeSLR.BlockCounts}
 */
export function blockDensity(grid, extra, { sparsity, order, keyBlock, queryBlock, keepDiagonal, keepFirstFrame }) {
  const tokens = grid[0] * grid[1] * grid[2];
  const cubes = order === "tile" ? tiles(grid) : 0;
  const queries = cubes || Math.ceil(tokens / queryBlock);
  const ranked = cubes || Math.ceil(tokens / keyBlock); // the video's key blocks
  const extraBlocks = Math.ceil(extra / keyBlock);
  const keys = ranked + extraBlocks;
  const keep = cubes ? keptTiles(sparsity, cubes) : keptBlocks(sparsity, ranked);
  const first = keepFirstFrame ? firstFrameBlocks(grid, order, keyBlock) : 0;
  const own = queryBlock / keyBlock; // key blocks of a query block
  /** @param {number} query */
  const keptBy = (query) => {
    const start = Math.max(query * own, first); // the first frame's blocks are kept already
    const diagonal = keepDiagonal ? Math.max(0, Math.min((query + 1) * own, ranked) - start) : 0;
    return Math.min(keys, extraBlocks + first + diagonal + keep);
  };
  // All before the edge of the first frame keep the same, and all between that and the last.
  const edge = Math.min(Math.floor(first / own), queries - 1);
  const between = Math.max(0, queries - edge - 2);
  let kept = edge * keptBy(0) + keptBy(edge) + between * keptBy(edge + 1);
  if (edge < queries - 1) kept += keptBy(queries - 1);
  return { queries, ranked, keys, keep, kept: kept / queries, density: kept / queries / keys };
}

/**
 * @param {number} tokens
 * @param {number} headDim
 * @param {number} heads
 */
export function denseFlops(tokens, headDim, heads) {
  return 4.0 * tokens * tokens * headDim * heads;
}

/**
 * @param {number} tokens
 * @param {number} headDim
 * @param {number} heads
 * @param {number} queries
 * @param {number} keys
 */
export function routingFlops(tokens, headDim, heads, queries, keys) {
  return (2.0 * queries * keys * headDim + 2.0 * tokens * headDim) * heads;
}

/**
 * FLOPs of what replaces the dropped blocks, for the video's queries.
 * @param {{ method: RoPeSLR.Method, trained: boolean, slaVariant?: string }} plan
 * @param {number} rank the plan's; 0 = all
 * @param {number} tokens
 * @param {number} headDim
 * @param {number} heads
 * @param {number} queries
 * @param {number} keys
 */
export function backgroundFlops({ method, trained, slaVariant }, rank, tokens, headDim, heads, queries, keys) {
  /** Channels and features are dropped in pairs. @param {number} number */
  const pairs = (number) => 2 * Math.floor((number + 1) / 2);
  const features = rank > 0 && rank < DEFAULT_RANK ? rank : DEFAULT_RANK;
  if (method === "vsa") return (4.0 * keys * keys + 2.0 * tokens) * headDim * heads; // its gate is a layer of the model
  if (method === "top-k") return 4.0 * tokens * keys * headDim * heads;
  if (method === "ropeslr") {
    const firstOrder = 4.0 * tokens * (rank > 0 && rank < headDim ? pairs(rank) : headDim) * headDim * heads;
    const lowRank = 8.0 * tokens * features * headDim * heads;
    const corrected = 2.0 * tokens * headDim * headDim * heads; // the values, where it calibrates, as it does by itself
    return firstOrder + (trained ? lowRank : corrected);
  }
  if (!trained) return 0.0; // without their weights, rola and sla are block-sparse attention alone
  if (method === "rola") return 8.0 * tokens * pairs(features) * headDim * heads;
  if (method !== "sla") return 0.0;
  return slaVariant === "paper"
    ? (6.0 * tokens + 2.0 * queries * keys) * headDim * headDim * heads
    : 4.0 * tokens * headDim * headDim * heads;
}

/**
 * FLOPs of one self-attention call between two calibrations.
 * @param {RoPeSLR.Grid} grid
 * @param {number} extra
 * @param {number} headDim
 * @param {number} heads
 * @param {RoPeSLR.CallSettings} settings
 * @returns {RoPeSLR.CallCost}
 */
export function attentionCost(grid, extra, headDim, heads, settings) {
  const video = grid[0] * grid[1] * grid[2];
  const tokens = video + extra;
  const blocks = blockDensity(grid, extra, settings);
  const density = 1.0 - (1.0 - blocks.density) * (video / tokens); // tokens that are not video attend to everything
  const dense = denseFlops(tokens, headDim, heads);
  const sparse = dense * density;
  const routing = ROUTES.has(settings.method) ? routingFlops(tokens, headDim, heads, blocks.queries, blocks.keys) : 0.0;
  const background = backgroundFlops(settings, settings.rank, video, headDim, heads, blocks.queries, blocks.keys);
  return { ...blocks, tokens, density, dense, sparse, routing, background, total: sparse + routing + background };
}

/**
 * FLOPs of everything in a layer but self-attention: projections, feed-forward, and cross-attention to text.
 * @param {RoPeSLR.Model} model
 * @param {number} tokens
 */
export function linearFlops(model, tokens) {
  const { dim, inner = dim, ffn, gated, text } = model;
  const crossAttention = text && (tokens + text) * 4.0 * dim * inner + 4.0 * tokens * text * inner;
  return tokens * (8.0 * dim * inner + (gated ? 6.0 : 4.0) * dim * ffn) + crossAttention;
}
