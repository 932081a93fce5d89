// The Math Expression node's arithmetic; tests/web/test_panel.py compares it with simpleeval, which ComfyUI uses.

import assert from "node:assert/strict";
import { test } from "node:test";
import { evaluateExpression, roundHalfEven } from "../../web/js/expression.js";

const value = (text, names = {}) => evaluateExpression(text, new Map(Object.entries(names)));

test("operators bind as Python's do", () => {
  assert.equal(value("2 + 3 * 4"), 14);
  assert.equal(value("-2 ** 2"), -4);
  assert.equal(value("2 ** 3 ** 2"), 512);
  assert.equal(value("2 ** -1"), 0.5);
  assert.equal(value("7 // 2 * 2 % 5"), 1);
  assert.equal(value("-7 // 2"), -4);
  assert.equal(value("-7 % 5"), 3);
  assert.equal(value("1 + 2 < 4 and 3 or 9"), 3);
  assert.equal(value("not 1 == 2"), 1);
});

test("expressions of official templates", () => {
  assert.equal(value("floor (a * b + 1)", { a: 5, b: 16 }), 81);
  assert.equal(value("max(4, (int(a) // 16) * 16)", { a: 519.5 }), 512);
  assert.equal(value("max(5, round(a * 24)) + (5 - (max(5, round(a * 24)) % 17)) % 17", { a: 5 }), 124);
  assert.equal(value("a & ~1", { a: 721 }), 720);
  assert.equal(value("a % b if b > 0 else 0", { a: 7, b: 0 }), 0);
  assert.equal(value("(a % 4 == 1) and ((b - 1) % 4 == 0)", { a: 81, b: 81 }), 1);
  assert.equal(value("ceil(1.5 * log2(max(a, b))) + 2", { a: 1024, b: 512 }), 17);
});

test("lists of all values go into functions alone", () => {
  assert.equal(value("sum(values) + max(values, 9)", { values: [1, 2] }), 12);
  assert.equal(value("values + 1", { values: [1, 2] }), undefined);
});

test("what cannot be computed is unknown", () => {
  for (const text of [
    "", "a +", "(1", "1)", "a b", "1 / 0", "1 // 0", "5 % 0", "b", "a.real", "f(1)", "1 < 2 < 3", "a[0]", "1 << 9",
    "'1'",
    "sqrt(-1)", "10 ** 999", "0.5 & 1", "lambda: 1", "toString", "constructor(1)", "__proto__",
  ]) {
    assert.equal(value(text, { a: 1 }), undefined, text);
  }
});

test("a text too long or nested too deep is left alone", () => {
  assert.equal(value(`${"(".repeat(200)}1${")".repeat(200)}`), 1);
  assert.equal(value(`${"1+".repeat(300)}1`), undefined);
  assert.equal(value("(".repeat(100_000)), undefined);
});

test("a half goes to the even neighbour", () => {
  const rounded = [0.5, 1.5, 2.5, -0.5, -1.5, 2.4, 2.6].map((each) => roundHalfEven(each) + 0);
  assert.deepEqual(rounded, [0, 2, 2, 0, -2, 2, 3]);
});
