import assert from "node:assert/strict";
import { test } from "node:test";
import { before, type Happened } from "../src/timeline";

const cell = (id: string): Happened => ({ type: "cell", id, number: 1, code: "", at: "", status: "ok" });
const back = (checkpoint: number): Happened => ({ type: "restored", checkpoint, at: "" });
const mark = (number: number, after: string, state: "kept" | "thinned" = "kept"): Happened => ({
  type: "checkpoint",
  number,
  at: "",
  bytes: 1,
  cell: after,
  automatic: false,
  state,
});

const ways = (...entries: Happened[]) => Object.fromEntries(before(entries));

test("a cell right after a checkpoint has a way back to before it", () => {
  assert.deepEqual(ways(mark(1, ""), cell("a"), cell("b"), mark(2, "b"), cell("c")), { a: 1, c: 2 });
});

test("a cell after a return begins at the checkpoint, whatever ran between", () => {
  assert.deepEqual(ways(mark(1, ""), cell("a"), back(1), cell("b")), { a: 1, b: 1 });
});

test("there is no way to a checkpoint that has gone, or that was taken while a cell ran", () => {
  assert.deepEqual(ways(mark(1, "", "thinned"), cell("a"), mark(2, ""), cell("b")), {});
});
