// Types for editors and tsc: ComfyUI's objects as far as the panel uses them, and its own data. No browser loads this.

/** ComfyUI's scripts, under whatever address the pack is served. */
declare module "*/scripts/app.js" {
  export const app: Comfy.App;
}
declare module "*/scripts/api.js" {
  export const api: EventTarget;
}

/** The frontend's graph library; undefined outside a page of ComfyUI. */
declare var LiteGraph: { vueNodesMode?: boolean; NODE_TITLE_HEIGHT: number } | undefined;

declare namespace Comfy {
  /** Ids are numbers in old files and texts in new ones. */
  type Id = number | string;

  interface Link {
    origin_id: Id;
    origin_slot: number;
    target_id: Id;
    target_slot: number;
  }

  interface Widget {
    name: string;
    value?: unknown;
    serialize?: boolean;
    callback?(value: unknown): void;
  }

  interface Input {
    name: string;
    type: string;
    link?: number | null;
    widget?: { name: string };
  }

  interface Output {
    name?: string;
    type: string;
    links?: number[] | null;
  }

  /** An input or output of a subgraph, seen from inside. */
  interface SubgraphSlot {
    linkIds?: number[];
  }

  interface Graph {
    id?: string;
    nodes?: Node[];
    _nodes?: Node[];
    links?: Map<number, Link> | Record<number, Link>;
    getLink?(id: number): Link | null | undefined;
    inputs?: SubgraphSlot[];
    outputs?: SubgraphSlot[];
    rootGraph?: Graph;
    setDirtyCanvas?(front: boolean, back: boolean): void;
  }

  interface Node {
    id: Id;
    type: string;
    mode?: number;
    graph?: Graph | null;
    subgraph?: Graph;
    inputs?: Input[];
    outputs?: Output[];
    widgets?: Widget[];
    properties?: Record<string, unknown>;
  }

  interface WidgetOptions {
    serialize: boolean;
    hideOnZoom: boolean;
    margin?: number;
    getMinHeight(): number;
    getMaxHeight?(): number;
  }

  /** A node on the canvas, which extensions are given. */
  interface CanvasNode extends Node {
    comfyClass?: string;
    size: [number, number];
    flags?: { collapsed?: boolean };
    properties: Record<string, unknown>;
    onExecuted?(output?: { text?: string | string[] }): void;
    addDOMWidget(name: string, type: string, element: HTMLElement, options: WidgetOptions): Widget;
    setSize(size: [number, number]): void;
    computeSize(): [number, number];
  }

  interface Canvas {
    processMouseWheel?(event: Event): void;
    processMouseDown?(event: Event): void;
    processMouseMove?(event: Event): void;
    processMouseUp?(event: Event): void;
  }

  interface Extension {
    name: string;
    setup?(): void;
    nodeCreated?(node: CanvasNode): void;
  }

  interface App {
    graph?: Graph;
    rootGraph?: Graph;
    canvas?: Canvas;
    registerExtension(extension: Extension): void;
  }
}

declare namespace RoPeSLR {
  type Method = "ropeslr" | "rola" | "sla" | "adaspa" | "top-k" | "top-k plain" | "vsa";
  /** What an adapter was trained for; "" without one, "unknown" where its file's name does not say. */
  type AdapterMethod = "" | "unknown" | "ropeslr" | "rola" | "sla" | "vsa";

  /** Published dimensions of a model. */
  interface Model {
    name: string;
    dim: number;
    /** Channels of all heads, where they are not `dim`. */
    inner?: number;
    ffn: number;
    /** The feed-forward part has three matrices. */
    gated?: boolean;
    layers: number;
    heads: number;
    /** Pixels per latent cell. */
    spatial: number;
    /** Latent cells per token, in height and width. */
    patch: number;
    /** Tokens of the text that layers attend to besides themselves. */
    text: number;
    /** Tokens in the same sequence that are not the video's; they are always kept. */
    others: number;
    /** Frames in tokens of a video of so many. */
    frames: (length: number) => number;
  }

  /** Of a video, in pixels and frames. */
  interface VideoSize {
    width: number;
    height: number;
    length: number;
  }

  /** Of a latent, and the type of the node that says so. */
  interface LatentSize extends VideoSize {
    type: string;
  }

  /** All that is known of a video whose size the graph does not say: the tokens of its last run. */
  interface TokenCount {
    tokens: number;
  }

  type Size = VideoSize | TokenCount;

  /** Frames, height and width of a video in tokens. */
  type Grid = [number, number, number];

  /** Steps [from, to) of a schedule of `total` steps; `begun`: it starts below full noise, as a second stage does. */
  interface Steps {
    total: number;
    from: number;
    to: number;
    begun?: boolean;
  }

  /** The main node's widgets that change an estimate. */
  interface Settings {
    method: Method | "auto";
    sparsity: number;
    rank: number;
    start_percent: number;
    end_percent: number;
    dense_first_steps: number;
    dense_last_steps: number;
    dense_layers: string;
    backend: string;
    block_order: string;
    min_tokens: number;
    keep_diagonal: boolean;
    keep_first_frame: boolean;
    sla_variant: string;
    key_block: string;
    allocation: string;
    target: string;
    error: number;
    query_block: string;
    precision: string;
  }

  /** Settings without an "auto". */
  interface ResolvedPlan {
    method: Method;
    trained: boolean;
    order: string;
    keyBlock: number;
    queryBlock: number;
    shared: boolean;
    first: number;
  }

  interface BlockSettings {
    sparsity: number;
    order: string;
    keyBlock: number;
    queryBlock: number;
    keepDiagonal?: boolean;
    keepFirstFrame?: boolean;
  }

  /** Settings of one attention call. */
  interface CallSettings extends BlockSettings {
    method: Method;
    trained: boolean;
    rank: number;
    slaVariant?: string;
  }

  interface BlockCounts {
    queries: number;
    ranked: number;
    keys: number;
    keep: number;
    kept: number;
    density: number;
  }

  /** FLOPs of one attention call, as AttentionCost has them. */
  interface CallCost extends BlockCounts {
    tokens: number;
    dense: number;
    sparse: number;
    routing: number;
    background: number;
    total: number;
  }

  interface RunEstimate {
    steps: number;
    sparse: number;
    speedUp: number;
  }

  /** Nothing runs sparse, and why. */
  interface DenseEstimate {
    why: string;
    tokens?: number;
    method?: Method;
    warning?: string;
  }

  interface SparseEstimate {
    why: "";
    tokens: number;
    method: Method;
    warning: string;
    untrained: boolean;
    kept: number;
    blocks: number;
    density: number;
    saved: number;
    attention: number;
    step: number;
    call: number;
    denseLayers: number;
    /** Heads share the kept blocks, and what the run aims at. */
    shared: "" | "sparsity" | "error";
    windowed: boolean;
    run?: RunEstimate;
  }

  type Estimate = DenseEstimate | SparseEstimate;

  /** What a graph says about our node. */
  interface GraphContext {
    size: LatentSize | null;
    model: string;
    adapter: AdapterMethod;
    steps: Steps | null;
  }

  /** Density by step (or head) and layer; 1 = dense, null = did not run. */
  interface DensityMap {
    layers: number;
    steps: number[];
    density: (number | null)[][];
    across?: "head";
  }

  /** Mean density by head and layer of the calls whose heads differed; null = none in that layer. */
  interface HeadMap {
    layers: number;
    heads: number[];
    density: (number | null)[][];
  }

  interface SparseAndDense {
    sparse?: number | null;
    dense?: number | null;
  }

  /** The event `ropeslr.report`. Another version of the server may leave fields out. */
  interface Report {
    node: string;
    workflow?: string | null;
    model?: string;
    method?: string;
    adapter?: string;
    backend?: string;
    sparsity?: number;
    density?: number;
    recall?: number | null;
    tokens?: number;
    sparse_calls?: number;
    dense_calls?: Record<string, number>;
    flops_saved?: number;
    seconds?: number;
    attention_seconds?: SparseAndDense | null;
    call_seconds?: SparseAndDense | null;
    previous?: string;
    completed?: boolean;
    map?: DensityMap | null;
    heads?: HeadMap | null;
  }

  /** new: not compared yet. fresh: of the settings now on the node. stale: of others. */
  type ReportStatus = "new" | "fresh" | "stale";

  /** A node's last report. */
  interface StoredReport {
    detail: Report;
    /** Counts the reports of this node. */
    number: number;
    status: ReportStatus;
    /** The settings that the run had, as `PanelState.basis`; "" where they have changed since it was queued. */
    basis: string;
  }

  /** Everything that the panel shows. */
  interface PanelState {
    models: Record<string, string>;
    model: string;
    size: Size | null;
    /** What the graph says by itself, so that no menu asks for it. */
    found: { model: boolean; size: boolean };
    numbers: Estimate | null;
    report: Report | null;
    status: ReportStatus;
    /** When the report was made, where the node is off now; "" where it is on. */
    idle: string;
    /** What the estimate had to assume, in sentences. */
    assumptions: string[];
    /** All that an estimate depends on, as a text to compare. */
    basis: string;
    /** What a file in the graph was trained with, where the settings differ. */
    offer: Offer | null;
  }

  /** Settings that belong to a file, recognised by its name. */
  interface Preset {
    name: string;
    file: RegExp;
    settings: Partial<Settings>;
  }

  interface Offer {
    name: string;
    settings: Partial<Settings>;
  }

  /** What a person does on the panel, with its value. */
  type Choice = "model" | "size" | "preset";

  /** Big number and what it means. */
  type Figure = [value: string, caption: string];
}
