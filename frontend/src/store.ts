/** All state of the page. `apply` is the only one that changes a sandbox's transcript. Pure but for signals. */
import { type Signal, signal } from "@preact/signals";
import { Screen } from "./ansi";

// -- the server

/** What `GET /health` tells. */
export interface Health {
  version: string;
  isolation: string;
  accelerator: string;
  network: string;
  sandboxes: number;
  maxSandboxes: number;
  capabilities: string[];
}

/** Who has sent a cell. */
export interface By {
  via: string;
  name: string;
}

/** A sandbox of `GET /sandboxes`. */
export interface Sandbox {
  sandboxID: string;
  templateID: string;
  status: string;
  startedAt: string;
  endAt: string;
  metadata: Record<string, string>;
  cpuCount: number;
  memoryMB: number;
  diskSizeMB: number;
  kernelID: string;
  kernel?: { state: string; since: number; by?: By; asks: string; waiting: number; connections: number };
  usage?: { cpuUsedPct: number; memUsed: number; memTotal: number; diskUsed: number; diskTotal: number };
  endedAt?: string;
  endReason?: string;
}

/** A sandbox that has ended, from its events. */
export interface Ended {
  sandboxID: string;
  templateID: string;
  reason: string;
  at: string;
}

export interface Template {
  templateID: string;
  description: string;
  cpuCount: number;
  memoryMB: number;
}

// -- a transcript

export type Bundle = Record<string, unknown>;

export interface CellError {
  name: string;
  value: string;
  traceback: string[];
  code?: string | null;
  stateKept?: boolean | null;
}

export type Output =
  | { kind: "text"; isError: boolean; screen: Screen }
  | { kind: "rich"; data: Bundle; displayId: string }
  | { kind: "failure"; error: CellError }
  | { kind: "prompt"; prompt: string; isPassword: boolean }
  | { kind: "gap"; messages: number };

export type CellState = "sent" | "running" | "done" | "failed" | "unknown" | "not_started";

/** One cell. It is replaced whenever it changes, but for the text in its screens. */
export interface Cell {
  kind: "cell";
  id: string;
  code: string;
  by: By | undefined;
  at: string;
  count: number | undefined;
  state: CellState;
  outputs: Output[];
  prompts: number;
  isClearDue: boolean;
  startedAt: number;
  endedAt: number;
}

/** A line between cells: what became of the kernel, or that messages are not kept. */
export interface Note {
  kind: "note";
  id: string;
  text: string;
  isBad: boolean;
}

export interface Waiting {
  id: string;
  by: By;
  code: string;
}

export interface Variable {
  name: string;
  type: string;
  value: string;
}

export interface Link {
  state: "connecting" | "open" | "lost" | "paused" | "gone";
  since: number;
  reason: string;
}

/** What the page knows of the sandbox in view. */
export class Box {
  readonly entries = signal<Signal<Cell | Note>[]>([]);
  readonly kernel = signal("idle");
  readonly waiting = signal<Waiting[]>([]);
  readonly waitingCount = signal(0);
  readonly held = signal<{ by: By; isMine: boolean; until: number } | undefined>(undefined);
  readonly asks = signal("");
  readonly variables = signal<Variable[] | undefined>(undefined);
  /** Who waits for completions, by the id of the question. */
  readonly asked = new Map<string, (found: Completions) => void>();
  /** Counts the cells that have ended, because variables may be others then. */
  readonly changes = signal(0);
  readonly answered = signal<{ id: string; by: By } | undefined>(undefined);
  readonly link = signal<Link>({ state: "connecting", since: Date.now(), reason: "" });
  /** Cells that were sent and have not begun, by id. They are sent again after a lost connection. */
  readonly outbox = new Map<string, string>();
  /** Number of the last message; what comes after it is asked for after a lost connection. */
  seq = 0;
  /** What is told of cells that have not begun, such as a refusal. */
  readonly refused = signal("");
  private readonly cells = new Map<string, Signal<Cell | Note>>();
  private readonly displays = new Map<string, Set<string>>();

  constructor(readonly id: string) {}

  cell(id: string): Cell | undefined {
    return this.cells.get(id)?.value as Cell | undefined;
  }

  /** Puts a cell of this page at the end, before the server has said anything of it. */
  add(id: string, code: string): void {
    this.outbox.set(id, code);
    this.begin(id, { code, state: "sent" });
  }

  /** Takes the next event (docs/stream.md). */
  apply(event: StreamEvent): void {
    if (event.seq > this.seq) this.seq = event.seq;
    switch (event.type) {
      case "started":
        this.outbox.delete(event.id);
        this.started(event);
        break;
      case "stdout":
      case "stderr":
        this.print(event.id, event.type === "stderr", event.text ?? "");
        break;
      case "result":
      case "display":
        this.show(event.id, event.data ?? {}, event.displayId ?? "");
        break;
      case "update":
        this.update(event.id, event.data ?? {}, event.displayId ?? "");
        break;
      case "clear":
        this.change(event.id, (cell) => (event.wait ? { isClearDue: true } : { outputs: keepPrompts(cell.outputs) }));
        break;
      case "error":
        if (event.error) this.addOutput(event.id, { kind: "failure", error: event.error }, { state: "failed" });
        break;
      case "input_request":
        this.asks.value = event.id;
        this.change(event.id, (cell) => ({
          prompts: cell.prompts + 1,
          outputs: [
            ...cell.outputs,
            { kind: "prompt", prompt: event.prompt ?? "", isPassword: event.password === true },
          ],
        }));
        break;
      case "end":
        this.outbox.delete(event.id);
        this.ended(event);
        break;
      case "status":
        this.status(event);
        break;
      case "gap":
        this.note(
          `gap-${event.seq}`,
          `${(event.messages ?? 0).toLocaleString()} messages are not kept any more.`,
          false,
        );
        break;
      case "state":
        this.asks.value = event.asks ?? "";
        this.answered.value = event.answered;
        this.waiting.value = event.waiting ?? [];
        this.waitingCount.value = event.waitingCount ?? 0;
        this.held.value = event.held;
        break;
      case "variables":
        this.variables.value = event.variables ?? [];
        break;
      case "completions":
        this.asked.get(event.id)?.({ matches: event.matches ?? [], start: event.start ?? 0, end: event.end ?? 0 });
        break;
      case "refused":
        this.refusal(event);
        break;
    }
  }

  private begin(id: string, fields: Partial<Cell>): Signal<Cell | Note> {
    const known = this.cells.get(id);
    if (known) return known;
    const cell: Cell = {
      kind: "cell",
      id,
      code: "",
      by: undefined,
      at: "",
      count: undefined,
      state: "running",
      outputs: [],
      prompts: 0,
      isClearDue: false,
      startedAt: 0,
      endedAt: 0,
      ...fields,
    };
    const made = signal<Cell | Note>(cell);
    this.cells.set(id, made);
    this.entries.value = [...this.entries.value, made];
    return made;
  }

  private change(id: string, change: (cell: Cell) => Partial<Cell>): void {
    const of = this.begin(id, {});
    const cell = of.value as Cell;
    of.value = { ...cell, ...change(cell) };
  }

  private started(event: StreamEvent): void {
    const known = this.cells.get(event.id);
    if (known && (known.value as Cell).state === "sent") {
      // It runs after cells that were sent before it, so it is put where it has begun.
      this.entries.value = [...this.entries.value.filter((each) => each !== known), known];
    }
    this.change(event.id, (cell) => ({
      state: "running",
      code: event.code ?? cell.code,
      by: event.by ?? cell.by,
      at: event.at ?? "",
      count: event.executionCount ?? undefined,
      startedAt: Date.parse(event.at ?? "") || 0,
    }));
  }

  private ended(event: StreamEvent): void {
    if (!this.cells.has(event.id)) return; // a cell that was never shown has nothing to tell
    this.change(event.id, (cell) => ({
      count: event.executionCount ?? cell.count,
      endedAt: Date.parse(event.at ?? "") || 0,
      state:
        event.outcome === "unknown" || event.outcome === "not_started"
          ? event.outcome
          : cell.state === "failed"
            ? "failed"
            : "done",
    }));
    if (this.asks.value === event.id) this.asks.value = "";
    this.changes.value += 1;
  }

  private print(id: string, isError: boolean, text: string): void {
    const cell = this.begin(id, {}).value as Cell;
    const last = cell.isClearDue ? undefined : cell.outputs.at(-1);
    if (last?.kind === "text" && last.isError === isError) {
      last.screen.feed(text);
      return;
    }
    const screen = new Screen();
    screen.feed(text);
    this.addOutput(id, { kind: "text", isError, screen });
  }

  private show(id: string, data: Bundle, displayId: string): void {
    if (displayId) this.displays.set(displayId, (this.displays.get(displayId) ?? new Set()).add(id));
    this.addOutput(id, { kind: "rich", data, displayId });
  }

  private update(id: string, data: Bundle, displayId: string): void {
    const shownIn = this.displays.get(displayId);
    if (!shownIn) return this.show(id, data, displayId);
    for (const each of shownIn) {
      this.change(each, (cell) => ({
        outputs: cell.outputs.map((output) =>
          output.kind === "rich" && output.displayId === displayId ? { ...output, data } : output,
        ),
      }));
    }
  }

  private addOutput(id: string, output: Output, more: Partial<Cell> = {}): void {
    this.change(id, (cell) => ({
      outputs: [...(cell.isClearDue ? keepPrompts(cell.outputs) : cell.outputs), output],
      isClearDue: false,
      ...more,
    }));
  }

  private status(event: StreamEvent): void {
    const state = event.state ?? "";
    const isNews = state !== this.kernel.value;
    this.kernel.value = state;
    if (state === "idle" && /^the sandbox went back to checkpoint \d+$/.test(event.reason ?? "")) {
      const text = `${event.reason}. Variables, files and programs are as they were then.`;
      this.note(`status-${event.seq}`, text.replace("the", "The"), false);
      this.changes.value += 1;
    }
    if (!isNews || (state !== "restarting" && state !== "dead" && state !== "starting")) return;
    const cause = [
      event.exitCode ? `exit code ${event.exitCode}` : "",
      event.signal ? `signal ${event.signal}` : "",
    ].filter(Boolean);
    const why = [event.reason ?? "", ...cause].filter(Boolean).join(", ");
    const what = {
      restarting: "The kernel has ended",
      dead: "The kernel is dead",
      starting: "The kernel is restarted",
    };
    const lost = state === "dead" ? "Its variables are gone." : "Its variables are gone, files stay.";
    this.note(`status-${event.seq}`, `${what[state]}: ${why}. ${lost}`, true);
  }

  private refusal(event: StreamEvent): void {
    const text = event.error?.value ?? "";
    if (event.id && this.cells.has(event.id)) {
      this.outbox.delete(event.id);
      this.change(event.id, () => ({
        state: "not_started",
        outputs: [{ kind: "failure", error: { name: "Refused", value: text, traceback: [] } }],
      }));
    } else {
      this.refused.value = text;
    }
  }

  private note(id: string, text: string, isBad: boolean): void {
    this.entries.value = [...this.entries.value, signal<Cell | Note>({ kind: "note", id, text, isBad })];
  }
}

/** Outputs without those that `clear_output` takes away. */
function keepPrompts(outputs: Output[]): Output[] {
  return outputs.filter((each) => each.kind === "prompt");
}

/** An event of the stream for agents (docs/stream.md). */
export interface StreamEvent {
  type: string;
  seq: number;
  id: string;
  text?: string;
  data?: Bundle;
  displayId?: string;
  error?: CellError;
  executionCount?: number | null;
  prompt?: string;
  password?: boolean;
  wait?: boolean;
  state?: string;
  reason?: string;
  exitCode?: number;
  signal?: number;
  messages?: number;
  outcome?: string;
  code?: string;
  by?: By;
  at?: string;
  asks?: string;
  waiting?: Waiting[];
  waitingCount?: number;
  held?: { by: By; isMine: boolean; until: number };
  answered?: { id: string; by: By };
  variables?: Variable[];
  matches?: string[];
  start?: number;
  end?: number;
}

/** What may stand between two places of a cell's code, in characters. */
export interface Completions {
  matches: string[];
  start: number;
  end: number;
}

// -- the page

export const health = signal<Health | undefined>(undefined);
export const sandboxes = signal<Sandbox[] | undefined>(undefined);
export const ended = signal<Ended[]>([]);
export const templates = signal<Template[]>([]);
/** What went wrong with the list; empty while it is live. */
export const feedTrouble = signal("");
/** Whether the server names a capability. What it does not name has no button. */
export function offers(capability: string): boolean {
  return health.value?.capabilities?.includes(capability) ?? false;
}
/** The clock of everything that counts seconds on the screen. */
export const now = signal(Date.now());
/** What the live region says. */
export const said = signal("");
