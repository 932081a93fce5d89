// The last report of every node, by workflow: whether it is ours, and whether it is of the settings of now.
// @ts-check

import { hasExecutionId } from "./graph.js";

const STORE = "ropeslr.run_reports"; // in the session's storage: reports outlive a reload of the page
const KEPT = 30; // workflows whose reports are kept

/** Reports by workflow and node: a node is made anew whenever its tab is opened, so it cannot hold its own. */
export class Reports {
  /** @param {Pick<Storage, "getItem" | "setItem">} storage */
  constructor(storage) {
    this.storage = storage;
    /** Workflows that this page has shown, so that it may have queued them. @type {Set<string>} */
    this.opened = new Set();
    /** By workflow, the latest last; in each by execution id. @type {Map<string, Map<string, RoPeSLR.StoredReport>>} */
    this.byWorkflow = new Map();
  }

  /** Remember that the page shows a workflow. @param {string | undefined} workflow */
  open(workflow) {
    if (workflow) this.opened.add(workflow);
  }

  /**
   * Keep a report for its workflow, which may not be the one that is open now. A report without a workflow, or of one
   * that this page never showed, belongs to somebody else.
   * @param {RoPeSLR.Report | null | undefined} detail
   * @returns {boolean} whether it was kept
   */
  receive(detail) {
    const workflow = detail?.workflow;
    if (!detail?.node || !workflow || !this.opened.has(workflow)) return false;
    const ofWorkflow = this.byWorkflow.get(workflow) ?? new Map();
    this.byWorkflow.delete(workflow); // and to the end, as the latest
    this.byWorkflow.set(workflow, ofWorkflow);
    if (this.byWorkflow.size > KEPT) this.byWorkflow.delete([...this.byWorkflow.keys()][0]);
    const number = (ofWorkflow.get(detail.node)?.number ?? 0) + 1;
    ofWorkflow.set(detail.node, { detail, number, status: "new", basis: "" });
    return true;
  }

  /**
   * The last report of a node; undefined before the first.
   * @param {Comfy.Graph | undefined} root
   * @param {Comfy.Node} node
   */
  of(root, node) {
    const found = [...(this.byWorkflow.get(root?.id ?? "") ?? [])].find(([id]) => hasExecutionId(root, node, id));
    return found?.[1];
  }

  save() {
    const reports = [...this.byWorkflow].map(([id, ofWorkflow]) => [id, [...ofWorkflow]]);
    this.storage.setItem(STORE, JSON.stringify({ opened: [...this.opened], reports }));
  }

  load() {
    const { opened, reports } = JSON.parse(this.storage.getItem(STORE) ?? '{"opened": [], "reports": []}');
    for (const id of opened) this.opened.add(id);
    for (const [id, ofWorkflow] of reports) this.byWorkflow.set(id, new Map(ofWorkflow));
  }
}

/**
 * Whether a report is of these settings. A new one is taken to be, unless sparsity has changed since it was queued:
 * sliders may have moved while the run went on.
 * @param {RoPeSLR.StoredReport} report its status is brought up to date
 * @param {string} basis all that an estimate depends on
 * @param {number} sparsity
 */
export function updateStatus(report, basis, sparsity) {
  if (report.status === "new") {
    const moved = Math.abs(sparsity - (report.detail.sparsity ?? sparsity)) > 1e-6;
    report.basis = moved ? "" : basis;
  }
  report.status = report.basis === basis ? "fresh" : "stale";
}
