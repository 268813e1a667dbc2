/** Text as a terminal would show it: colours (SGR), carriage return and backspace. All other escapes are dropped. Pure. */

/** Text of one look. `style` are class names of style.css; `color` and `background` are set for colours beyond 16. */
export interface Run {
  text: string;
  style: string;
  color: string;
  background: string;
}

type Look = Omit<Run, "text">;
const PLAIN: Look = { style: "", color: "", background: "" };

/** Lines of a block, which is what is drawn and dropped as a whole. */
const BLOCK = 200;
/** Characters of a text that are kept; the oldest blocks go first. */
const KEPT = 8 * 1024 * 1024;
/** Characters of an escape sequence that is not over. A longer one is no escape sequence. */
const PENDING = 4096;
/** Characters after which a line is cut into two. */
const LONGEST = 64 * 1024;

// A whole escape sequence: CSI, a string up to BEL or ST, or a short one.
const ESCAPE = /\x1b(?:\[([0-?]*)[ -/]*([@-~])|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-Z\\^-~])/y;
const UNFINISHED = /\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b]*\x1b?|[ -/]*)$/;
const SPECIAL = /[\x00-\x08\x0a-\x1f\x7f]/g;

/** Some lines. `runs` holds their text with the line ends. */
export interface Block {
  runs: Run[];
  lines: number;
  size: number;
}

/** A text that grows. `blocks` are its finished lines, `line` is the one that is not over. */
export class Screen {
  blocks: Block[] = [];
  line: Run[] = [];
  /** Number of lines that are not kept any more. */
  dropped = 0;
  /** Number of blocks that are not kept any more, so that a view knows which ones it has drawn. */
  droppedBlocks = 0;
  onChange: () => void = () => {};
  private column = 0;
  private length = 0;
  private size = 0;
  private look: Look = PLAIN;
  private pending = "";

  /** Takes the next piece of text. Pieces may be cut anywhere. */
  feed(piece: string): void {
    let text = this.pending + piece;
    this.pending = "";
    const rest = UNFINISHED.exec(text.slice(-PENDING));
    if (rest) {
      this.pending = rest[0];
      text = text.slice(0, text.length - rest[0].length);
    }
    let at = 0;
    SPECIAL.lastIndex = 0;
    for (let found = SPECIAL.exec(text); found; found = SPECIAL.exec(text)) {
      if (found.index > at) this.write(text.slice(at, found.index));
      at = this.control(text, found.index);
      SPECIAL.lastIndex = at;
    }
    if (at < text.length) this.write(text.slice(at));
    this.forget();
    this.onChange();
  }

  /** The whole text that is kept, without its looks. */
  text(): string {
    const runs = [...this.blocks.flatMap((block) => block.runs), ...this.line];
    return runs.map((run) => run.text).join("");
  }

  private control(text: string, at: number): number {
    switch (text[at]) {
      case "\n":
        this.put("\n");
        return at + 1;
      case "\r":
        this.column = 0;
        return at + 1;
      case "\b":
        this.column = Math.max(this.column - 1, 0);
        return at + 1;
      case "\x1b": {
        ESCAPE.lastIndex = at;
        const found = ESCAPE.exec(text);
        if (!found) return at + 1;
        if (found[2] === "m") this.setLook(found[1] ?? "");
        if (found[2] === "K" && !Number(found[1])) this.cut();
        return ESCAPE.lastIndex;
      }
      default:
        return at + 1;
    }
  }

  private write(text: string): void {
    for (let from = 0; from < text.length; from += LONGEST) {
      if (this.length >= LONGEST) this.put("");
      this.writeShort(text.slice(from, from + LONGEST));
    }
  }

  private writeShort(text: string): void {
    if (this.column < this.length) {
      const over = Math.min(text.length, this.length - this.column);
      const [before, from] = split(this.line, this.column);
      const [, after] = split(from, over);
      this.line = [...append(before, text, this.look), ...after];
      this.length += text.length - over;
    } else {
      append(this.line, text, this.look);
      this.length += text.length;
    }
    this.column += text.length;
  }

  private cut(): void {
    if (this.column < this.length) {
      [this.line] = split(this.line, this.column);
      this.length = this.column;
    }
  }

  /** Moves the line that is not over to the finished ones, with what ends it. */
  private put(end: string): void {
    let block = this.blocks.at(-1);
    if (!block || block.lines >= BLOCK || block.size >= LONGEST * 4) {
      block = { runs: [], lines: 0, size: 0 };
      this.blocks.push(block);
    }
    for (const run of this.line) append(block.runs, run.text, run);
    if (end) append(block.runs, end, block.runs.at(-1) ?? PLAIN);
    block.lines += 1;
    block.size += this.length + end.length;
    this.size += this.length + end.length;
    this.line = [];
    this.column = this.length = 0;
  }

  private forget(): void {
    while (this.size > KEPT && this.blocks.length > 1) {
      const gone = this.blocks.shift();
      if (!gone) return;
      this.size -= gone.size;
      this.dropped += gone.lines;
      this.droppedBlocks += 1;
    }
  }

  private setLook(codes: string): void {
    const numbers = codes.split(/[;:]/).map(Number);
    const has = new Set(this.look.style.split(" ").filter(Boolean));
    let { color, background } = this.look;
    const drop = (prefix: RegExp) => {
      for (const each of has) if (prefix.test(each)) has.delete(each);
    };
    for (let at = 0; at < numbers.length; at += 1) {
      const code = numbers[at] ?? 0;
      if (code === 0) {
        has.clear();
        color = background = "";
      } else if (code in ON) has.add(ON[code] as string);
      else if (code in OFF) for (const each of OFF[code] ?? []) has.delete(each);
      else if (code === 38 || code === 48) {
        const [found, used] = extended(numbers.slice(at + 1));
        at += used;
        drop(code === 38 ? /^f\d/ : /^g\d/);
        if (typeof found === "number") has.add(`${code === 38 ? "f" : "g"}${found}`);
        if (code === 38) color = typeof found === "string" ? found : "";
        else background = typeof found === "string" ? found : "";
      } else if (code === 39) {
        drop(/^f\d/);
        color = "";
      } else if (code === 49) {
        drop(/^g\d/);
        background = "";
      } else {
        const [kind, base] = code >= 90 ? (code >= 100 ? ["g", 92] : ["f", 82]) : code >= 40 ? ["g", 40] : ["f", 30];
        const index = code - Number(base);
        if (index < 0 || index > 15 || (code < 90 && index > 7)) continue;
        drop(kind === "f" ? /^f\d/ : /^g\d/);
        has.add(`${kind}${index}`);
        if (kind === "f") color = "";
        else background = "";
      }
    }
    this.look = { style: [...has].sort().join(" "), color, background };
  }
}

const ON: Record<number, string> = { 1: "bold", 2: "dim", 3: "italic", 4: "underline", 7: "inverse", 9: "strike" };
const OFF: Record<number, string[]> = {
  22: ["bold", "dim"],
  23: ["italic"],
  24: ["underline"],
  27: ["inverse"],
  29: ["strike"],
};

/** The colour that the numbers after 38 or 48 mean: one of the 16, or a CSS colour; and how many numbers it takes. */
function extended(numbers: number[]): [number | string | undefined, number] {
  const byte = (value: number | undefined) => Math.max(0, Math.min(255, value || 0));
  if (numbers[0] === 2) return [`rgb(${byte(numbers[1])} ${byte(numbers[2])} ${byte(numbers[3])})`, 4];
  if (numbers[0] !== 5) return [undefined, numbers.length];
  const index = byte(numbers[1]);
  if (index < 16) return [index, 2];
  if (index >= 232) {
    const grey = 8 + 10 * (index - 232);
    return [`rgb(${grey} ${grey} ${grey})`, 2];
  }
  const level = (part: number) => (part ? 55 + 40 * part : 0);
  const cube = index - 16;
  return [`rgb(${level(Math.floor(cube / 36))} ${level(Math.floor(cube / 6) % 6)} ${level(cube % 6)})`, 2];
}

function isAlike(one: Look, other: Look): boolean {
  return one.style === other.style && one.color === other.color && one.background === other.background;
}

function append(runs: Run[], text: string, look: Look): Run[] {
  const last = runs.at(-1);
  if (last && isAlike(last, look)) last.text += text;
  else runs.push({ text, style: look.style, color: look.color, background: look.background });
  return runs;
}

/** The runs before a column, and those from it on. */
function split(runs: Run[], column: number): [Run[], Run[]] {
  const before: Run[] = [];
  let left = column;
  for (const [index, run] of runs.entries()) {
    if (run.text.length > left) {
      if (left) before.push({ ...run, text: run.text.slice(0, left) });
      return [before, [{ ...run, text: run.text.slice(left) }, ...runs.slice(index + 1).map((each) => ({ ...each }))]];
    }
    before.push({ ...run });
    left -= run.text.length;
  }
  return [before, []];
}
