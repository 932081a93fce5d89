// Evaluates the panel's functions for the Python tests: [[name, ...arguments], ...] in, a list of answers out.

import { readFileSync } from "node:fs";
import * as costs from "../../web/js/costs.js";
import * as estimate from "../../web/js/estimate.js";
import { evaluateExpression } from "../../web/js/expression.js";

const FUNCTIONS = {
  ...costs, ...estimate, expression: (text, names) => evaluateExpression(text, new Map(Object.entries(names))) ?? null,
};

const calls = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(calls.map(([name, ...given]) => FUNCTIONS[name](...given))));
