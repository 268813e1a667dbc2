import assert from "node:assert/strict";
import { test } from "node:test";
import { Screen } from "../src/ansi";

/** The text that a screen shows after some pieces. */
function shown(...pieces: string[]): string {
  const screen = new Screen();
  for (const piece of pieces) screen.feed(piece);
  return screen.text();
}

const TABLE: [string, string, string][] = [
  ["plain", "a\nb\n", "a\nb\n"],
  ["carriage return", "10 %\r20 %\r100 %\n", "100 %\n"],
  ["a shorter line over a longer one", "abcdef\rxy\n", "xycdef\n"],
  ["backspace", "abc\b\bX\n", "aXc\n"],
  ["line end of Windows", "a\r\nb\r\n", "a\nb\n"],
  ["erase to the end", "abcdef\rab\x1b[K\n", "ab\n"],
  ["colours", "\x1b[1;31mred\x1b[0m plain", "red plain"],
  ["link", "\x1b]8;;javascript:alert(1)\x07text\x1b]8;;\x07", "text"],
  ["clipboard", "\x1b]52;c;aGFja2Vk\x07text", "text"],
  ["an escape that never ends", `\x1b]${"x".repeat(5000)}`, `]${"x".repeat(5000)}`],
  ["other controls", "a\x00\x07\x1b[2Jb", "ab"],
];

for (const [name, text, wanted] of TABLE) test(name, () => assert.equal(shown(text), wanted));

test("pieces may be cut anywhere", () => {
  const text = "\x1b[38;5;28mgreen\x1b[0m\rX\n\x1b]0;title\x07end\x1b[1;4mbold\x1b[0m\n";
  for (let at = 0; at <= text.length; at += 1) assert.equal(shown(text.slice(0, at), text.slice(at)), shown(text));
});

test("colours become class names, and others than 16 a colour of CSS", () => {
  const screen = new Screen();
  screen.feed("\x1b[1;31ma\x1b[22;39;48;5;9mb\x1b[0;38;2;1;2;300mc\x1b[m\x1b[38;5;244md");
  assert.deepEqual(
    screen.line.map(({ style, color }) => [style, color]),
    [
      ["bold f1", ""],
      ["g9", ""],
      ["", "rgb(1 2 255)"],
      ["", "rgb(128 128 128)"],
    ],
  );
});

test("random bytes never throw, and lose no printable text", () => {
  let seed = 1;
  const random = (below: number) => {
    seed = (seed * 48271) % 2147483647;
    return seed % below;
  };
  for (let round = 0; round < 300; round += 1) {
    const noise = Array.from({ length: 200 }, () => String.fromCharCode(random(256))).join("");
    shown(noise, noise.split("").reverse().join(""));
    const letters = Array.from({ length: 50 }, () => String.fromCharCode(97 + random(26))).join("");
    assert.equal(shown(letters.slice(0, 20), letters.slice(20)), letters);
  }
});

test("the oldest lines go when there are too many", () => {
  const screen = new Screen();
  const line = `${"x".repeat(999)}\n`;
  for (let n = 0; n < 100; n += 1) screen.feed(line.repeat(100));
  assert.ok(screen.dropped > 1000);
  assert.ok(screen.text().length < 9_000_000);
  assert.equal(screen.dropped + screen.blocks.reduce((sum, block) => sum + block.lines, 0), 10_000);
});
