// Computes what ComfyUI's Math Expression node computes: Python's arithmetic on numbers, with the node's functions.
// @ts-check

/**
 * @typedef {number | number[]} Value a list: `values`, all inputs of the node
 * @typedef {Map<string, Value>} Names
 * @typedef {(names: Names) => Value} Term
 */

const LONGEST = 500; // characters; a longer expression is left alone, which bounds the depth of the parser too
/** A number, a name or an operator, the longest that fits. */
const TOKEN = /\s*((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[a-z_]\w*|\*\*|\/\/|<=|>=|==|!=|[-+*/%&|^~()<>,])/iy;
const NOT = 3; // binds looser than a comparison
const UNARY = 11;
/** How strongly binary operators bind. @type {Map<string, number>} */
const BINDS = new Map(Object.entries({
  or: 1, and: 2, "<": 4, ">": 4, "<=": 4, ">=": 4, "==": 4, "!=": 4, "|": 5, "^": 6, "&": 7,
  "+": 9, "-": 9, "*": 10, "/": 10, "//": 10, "%": 10,
}));

/** @type {Map<string, (left: number, right: number) => number>} */
const BINARY = new Map(Object.entries({
  "<": (left, right) => Number(left < right), ">": (left, right) => Number(left > right),
  "<=": (left, right) => Number(left <= right), ">=": (left, right) => Number(left >= right),
  "==": (left, right) => Number(left === right), "!=": (left, right) => Number(left !== right),
  "|": (left, right) => Number(BigInt(left) | BigInt(right)), // BigInt refuses what is not whole
  "^": (left, right) => Number(BigInt(left) ^ BigInt(right)),
  "&": (left, right) => Number(BigInt(left) & BigInt(right)),
  "+": (left, right) => left + right, "-": (left, right) => left - right, "*": (left, right) => left * right,
  "/": (left, right) => left / nonzero(right), "//": (left, right) => Math.floor(left / nonzero(right)),
  "%": (left, right) => left - right * Math.floor(left / nonzero(right)), "**": (left, right) => left ** right,
}));

/** @type {Map<string, (...given: number[]) => number>} */
const FUNCTIONS = new Map(Object.entries({
  sum: (...given) => given.reduce((one, other) => one + other, 0),
  min: Math.min, max: Math.max, abs: Math.abs, pow: Math.pow, sqrt: Math.sqrt, ceil: Math.ceil, floor: Math.floor,
  log: (value, base = Math.E) => Math.log(value) / Math.log(base), log2: Math.log2, log10: Math.log10,
  sin: Math.sin, cos: Math.cos, tan: Math.tan, int: Math.trunc, float: (value) => value,
  round: (value, digits = 0) => roundHalfEven(value * 10 ** digits) / 10 ** digits,
}));

/** Python's round: a half goes to the even neighbour. @param {number} value */
export function roundHalfEven(value) {
  const low = Math.floor(value);
  if (value - low !== 0.5) return Math.round(value);
  return low % 2 === 0 ? low : low + 1;
}

/** @param {number} value */
function nonzero(value) {
  if (value === 0) throw new Error("division by zero");
  return value;
}

/** @param {Value} value */
function single(value) {
  if (typeof value !== "number") throw new Error("a list where a number belongs");
  return value;
}

/** @param {string} text @returns {string[]} */
function tokensOf(text) {
  const tokens = [];
  TOKEN.lastIndex = 0;
  for (let at = 0; text.slice(at).trim(); at = TOKEN.lastIndex) {
    const found = TOKEN.exec(text);
    if (!found) throw new Error(`cannot read ${text.slice(at)}`);
    tokens.push(found[0].trim());
  }
  return tokens;
}

/** A recursive-descent parser; every method takes what it reads off the front and returns what computes it. */
class Parser {
  /** @param {string} text */
  constructor(text) {
    this.tokens = tokensOf(text);
    this.at = 0;
  }

  /** Take the next token if it is this one. @param {string} token */
  takes(token) {
    if (this.tokens[this.at] !== token) return false;
    this.at++;
    return true;
  }

  /** @param {string} token */
  expects(token) {
    if (!this.takes(token)) throw new Error(`${token} expected`);
  }

  /** @returns {Term} */
  whole() {
    const term = this.conditional();
    if (this.at < this.tokens.length) throw new Error("more than one expression");
    return term;
  }

  /** `then if condition else otherwise`. @returns {Term} */
  conditional() {
    const then = this.binary(1);
    if (!this.takes("if")) return then;
    const condition = this.binary(1);
    this.expects("else");
    const otherwise = this.conditional();
    return (names) => (condition(names) ? then(names) : otherwise(names));
  }

  /** Operators that bind at least this strongly. @param {number} least @returns {Term} */
  binary(least) {
    let left = this.unary();
    for (;;) {
      const token = this.tokens[this.at];
      const level = BINDS.get(token) ?? 0;
      if (level < least || level === 0) return left;
      this.at++;
      left = joined(token, left, this.binary(level + 1));
      // Python reads a < b < c as two comparisons; nobody needs that here.
      if (level === 4 && BINDS.get(this.tokens[this.at]) === 4) throw new Error("chained comparison");
    }
  }

  /** @returns {Term} */
  unary() {
    if (this.takes("not")) {
      const term = this.binary(NOT);
      return (names) => Number(!term(names));
    }
    for (const [sign, apply] of UNARIES) {
      if (!this.takes(sign)) continue;
      const term = this.binary(UNARY);
      return (names) => apply(single(term(names)));
    }
    const base = this.atom();
    return this.takes("**") ? joined("**", base, this.unary()) : base;
  }

  /** @returns {Term} */
  atom() {
    if (this.takes("(")) {
      const term = this.conditional();
      this.expects(")");
      return term;
    }
    const token = this.tokens[this.at++] ?? "";
    if (/^[\d.]/.test(token)) return () => Number(token);
    if (!/^[a-z_]/i.test(token)) throw new Error("a number or a name expected");
    if (this.takes("(")) return called(token, this.given());
    return (names) => {
      const value = names.get(token);
      if (value === undefined) throw new Error(`${token} is unknown`);
      return value;
    };
  }

  /** The arguments of a call, its opening bracket taken. @returns {Term[]} */
  given() {
    const terms = [];
    while (!this.takes(")")) {
      if (terms.length) this.expects(",");
      terms.push(this.conditional());
    }
    return terms;
  }
}

/** @type {[string, (value: number) => number][]} */
const UNARIES = [["-", (value) => -value], ["+", (value) => value], ["~", (value) => Number(~BigInt(value))]];

/** @param {string} operator @param {Term} left @param {Term} right @returns {Term} */
function joined(operator, left, right) {
  if (operator === "and") return (names) => left(names) && right(names);
  if (operator === "or") return (names) => left(names) || right(names);
  const apply = BINARY.get(operator);
  if (!apply) throw new Error(`${operator} is unknown`);
  return (names) => apply(single(left(names)), single(right(names)));
}

/** @param {string} name @param {Term[]} terms @returns {Term} */
function called(name, terms) {
  const apply = FUNCTIONS.get(name);
  if (!apply) throw new Error(`${name} is unknown`);
  return (names) => apply(...terms.flatMap((term) => term(names)));
}

/**
 * The value of an expression; undefined where it cannot be computed, for whatever reason.
 * @param {string} text
 * @param {Names} names
 * @returns {number | undefined}
 */
export function evaluateExpression(text, names) {
  if (text.length > LONGEST) return undefined;
  try {
    const value = new Parser(text).whole()(names);
    return typeof value === "number" && Number.isFinite(value) ? value : undefined;
  } catch {
    return undefined;
  }
}
