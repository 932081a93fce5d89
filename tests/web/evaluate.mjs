// Evaluates functions of estimate.js for the Python tests: [[name, ...arguments], ...] in, a list of answers out.

import { readFileSync } from "node:fs";
import * as estimate from "../../web/js/estimate.js";

const calls = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(calls.map(([name, ...given]) => estimate[name](...given))));
