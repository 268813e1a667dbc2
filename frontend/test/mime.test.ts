import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";
import { pngSize, shown } from "../src/mime";
import { bytes, clock, safe } from "../src/words";

const CHOICES: [Record<string, unknown>, string][] = [
  [{ "text/plain": "a", "text/html": "<b>" }, "frame"],
  [{ "text/plain": "a", "image/png": "AAAA" }, "image"],
  [{ "image/svg+xml": ["<svg>", "\ud800"] }, "image"],
  [{ "application/json": { a: 1 } }, "json"],
  [{ "application/javascript": "x" }, "script"],
  [{ "application/vnd.jupyter.widget-view+json": {}, "text/plain": "w" }, "unknown"],
  [{ "text/plain": 3 }, "text"],
  [{}, "text"],
];

for (const [data, how] of CHOICES) test(`${Object.keys(data)}`, () => assert.equal(shown(data).how, how));

test("a picture's size is read from its header, and nothing else is believed to be one", () => {
  const head = Buffer.from([
    0x89, 0x50, 0x4e, 0x47, 13, 10, 26, 10, 0, 0, 0, 13, 73, 72, 68, 82, 0, 0, 195, 80, 0, 0, 195, 80,
  ]);
  assert.deepEqual(pngSize(head.toString("base64")), [50000, 50000]);
  assert.equal(shown({ "image/png": head.toString("base64") }).how, "large");
  for (const bad of ["", "!", "AAAA", "iVBORw=="]) assert.equal(pngSize(bad), undefined);
});

test("numbers in words", () => {
  assert.deepEqual([0, 999, 1000, 1_250_000, 5e9].map(bytes), ["0 B", "999 B", "1.0 kB", "1.3 MB", "5.0 GB"]);
  assert.deepEqual([0, 42.9, 3482, 3723].map(clock), ["0:00", "0:42", "58:02", "1:02:03"]);
  assert.equal(safe("a\u202eb\nc\u0000"), "a\u00b7b\u00b7c\u00b7");
});

test("no source has a way from text to markup or code", () => {
  const forbidden =
    /innerHTML|outerHTML|insertAdjacentHTML|document\.write|dangerouslySetInnerHTML|srcdoc|\beval\(|new Function|allow-same-origin|https?:\/\//;
  const read = (folder: string): [string, string][] =>
    readdirSync(folder, { withFileTypes: true }).flatMap((each) =>
      each.isDirectory()
        ? read(`${folder}/${each.name}`)
        : [[`${folder}/${each.name}`, readFileSync(`${folder}/${each.name}`, "utf8")] as [string, string]],
    );
  const found = read("src").filter(([name, text]) => forbidden.test(text) && name !== "src/frames/output.ts");
  assert.deepEqual(
    found.map(([name]) => name),
    [],
  );
});
