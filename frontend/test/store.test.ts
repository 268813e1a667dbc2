import assert from "node:assert/strict";
import { test } from "node:test";
import { notebook } from "../src/notebook";
import { Box, type StreamEvent } from "../src/store";

const cell = (id: string, from: number, count: number): StreamEvent[] => [
  {
    type: "started",
    seq: from,
    id,
    executionCount: count,
    code: `run(${id})`,
    by: { via: "execute", name: "a" },
    at: "",
  },
  { type: "stdout", seq: from + 1, id, text: "one\n" },
  { type: "display", seq: from + 2, id, data: { "text/plain": "old" }, displayId: "d" },
  { type: "stdout", seq: from + 3, id, text: "two\n" },
  { type: "update", seq: from + 4, id, data: { "text/plain": "new" }, displayId: "d" },
  { type: "input_request", seq: from + 5, id, prompt: "? ", password: true },
  { type: "clear", seq: from + 6, id, wait: true },
  { type: "stderr", seq: from + 7, id, text: "late\n" },
  { type: "error", seq: from + 8, id, error: { name: "E", value: "v", traceback: ["t"] } },
  { type: "end", seq: from + 9, id, executionCount: count, outcome: "finished", at: "" },
];

const JOURNAL: StreamEvent[] = [
  { type: "status", seq: 0, id: "", state: "idle" },
  ...cell("a", 1, 1),
  { type: "gap", seq: 11, id: "", messages: 3 },
  ...cell("b", 12, 2),
  { type: "status", seq: 30, id: "", state: "restarting", reason: "it ended", exitCode: 1 },
  { type: "status", seq: 31, id: "", state: "idle" },
];

/** What a box shows, as a value. */
function state(box: Box): unknown {
  return box.entries.value.map(({ value }) =>
    value.kind === "note"
      ? value
      : { ...value, outputs: value.outputs.map((each) => (each.kind === "text" ? each.screen.text() : each)) },
  );
}

function played(...events: StreamEvent[]): Box {
  const box = new Box("sbx");
  for (const event of events) box.apply(event);
  return box;
}

test("a journal that is cut and continued at any number ends in the same state", () => {
  const whole = state(played(...JOURNAL));
  for (let at = 0; at <= JOURNAL.length; at += 1) {
    const box = played(...JOURNAL.slice(0, at));
    for (const event of JOURNAL.filter((each) => each.seq > box.seq)) box.apply(event);
    assert.deepEqual(state(box), whole);
  }
});

test("a cell that was sent is shown at once, and moves to where it begins", () => {
  const box = new Box("sbx");
  box.add("mine", "1");
  box.apply({ type: "started", seq: 1, id: "other", code: "2" });
  assert.deepEqual(
    box.entries.value.map(({ value }) => value.id),
    ["mine", "other"],
  );
  box.apply({ type: "started", seq: 2, id: "mine", code: "1" });
  assert.deepEqual(
    box.entries.value.map(({ value }) => value.id),
    ["other", "mine"],
  );
  assert.equal(box.outbox.size, 0);
});

test("a refusal ends the cell that it is about, and no other", () => {
  const box = new Box("sbx");
  box.add("mine", "1");
  box.apply({ type: "refused", seq: 0, id: "mine", error: { name: "Conflict", value: "no", traceback: [] } });
  assert.equal(box.cell("mine")?.state, "not_started");
  box.apply({ type: "refused", seq: 0, id: "", error: { name: "Conflict", value: "held", traceback: [] } });
  assert.equal(box.refused.value, "held");
});

test("a notebook has the code, and the outputs as they are shown", () => {
  const book = JSON.parse(notebook(played(...JOURNAL)));
  assert.deepEqual(book.cells[0].outputs, [
    { output_type: "stream", name: "stderr", text: "late\n" },
    { output_type: "error", ename: "E", evalue: "v", traceback: ["t"] },
  ]);
  assert.equal(book.cells[1].source, "run(b)");
});
