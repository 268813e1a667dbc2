/** The page's side of a terminal: a frame that shows it, and the command behind it (docs/rest.md, Commands). */
import { ApiError, address, lines, of, send } from "./api";
import { said } from "./store";

/** Milliseconds before a stream that broke is asked for again. */
const PAUSE = 1000;
/** Characters of input that one request takes. */
const INPUT = 64 * 1024;

interface CommandEvent {
  type: string;
  seq: number;
  text?: string;
  messages?: number;
  outcome?: string;
  exitCode?: number;
  signal?: number;
}

/** A terminal in view. `element` is its place. Call `close` when it is not in view any more; the program goes on. */
export class TerminalView {
  readonly element = document.createElement("iframe");
  private port: MessagePort | undefined;
  private readonly stop = new AbortController();
  private typed = "";
  private isSending = false;
  private written: () => void = () => {};
  private seen = 0;

  constructor(
    private readonly path: string,
    title: string,
    private readonly onLeave: () => void,
  ) {
    this.element.setAttribute("sandbox", "allow-scripts");
    this.element.setAttribute("allow", "");
    this.element.title = title;
    this.element.src = address("/ui/terminal.html");
    this.element.onload = () => this.greet();
  }

  close(): void {
    this.stop.abort();
    this.port?.close();
  }

  focus(): void {
    this.element.focus();
    this.port?.postMessage({ focus: true });
  }

  private greet(): void {
    if (this.port) return this.close(); // it can only be led away by a fault of its parser
    const { port1, port2 } = new MessageChannel();
    this.port = port1;
    port1.onmessage = ({ data }) => this.receive(data);
    this.element.contentWindow?.postMessage({ theme: colours() }, "*", [port2]); // its origin is opaque
    void this.follow();
  }

  private receive(data: Record<string, unknown>): void {
    if (typeof data["data"] === "string") this.type(data["data"]);
    if (data["written"] === true) this.written();
    if (data["leave"] === true) this.onLeave();
    const { rows, cols } = data;
    if (isSide(rows) && isSide(cols)) void send("PUT", `${this.path}/size`, { rows, cols }).catch(ignoreEnded);
  }

  /** Sends what was typed in order: while a request is under way, what follows is gathered for the next one. */
  private async type(text: string): Promise<void> {
    this.typed += text;
    if (this.isSending) return;
    this.isSending = true;
    try {
      while (this.typed) {
        const now = this.typed.slice(0, INPUT);
        this.typed = this.typed.slice(now.length);
        await send("POST", `${this.path}/stdin`, { text: now });
      }
    } catch (error) {
      this.typed = "";
      ignoreEnded(error);
      if (error instanceof ApiError && error.status !== 409) said.value = `Not sent: ${error.message}`;
    } finally {
      this.isSending = false;
    }
  }

  /** Shows what the program prints, from the beginning that is kept, and goes on after a lost connection. */
  private async follow(): Promise<void> {
    while (!this.stop.signal.aborted) {
      try {
        const answer = await send("GET", `${this.path}?since=${this.seen}`, undefined, {
          headers: { Accept: "application/x-ndjson" },
          signal: this.stop.signal,
        });
        for await (const event of lines<CommandEvent>(answer)) {
          if (await this.show(event)) return;
        }
      } catch (error) {
        if (this.stop.signal.aborted) return;
        if (error instanceof ApiError && error.status === 404) return this.end("The program is not known any more.");
      }
      await new Promise((resolve) => setTimeout(resolve, PAUSE));
    }
  }

  /** Shows an event, and tells whether it was the last one. */
  private async show(event: CommandEvent): Promise<boolean> {
    this.seen = Math.max(this.seen, event.seq);
    if (event.type === "end") {
      const how = event.signal ? `signal ${event.signal}` : `exit code ${event.exitCode ?? "unknown"}`;
      this.end(event.outcome === "finished" ? `The program has ended: ${how}.` : "The sandbox ended first.");
      return true;
    }
    const text = event.type === "gap" ? `\r\n[${event.messages} pieces are not kept any more]\r\n` : event.text;
    if (text) {
      // The next piece is read when this one is on the screen, so a flood waits in the sandbox.
      await new Promise<void>((resolve) => {
        this.written = resolve;
        this.stop.signal.addEventListener("abort", () => resolve(), { once: true });
        this.port?.postMessage({ write: text });
      });
    }
    return false;
  }

  private end(text: string): void {
    this.port?.postMessage({ ended: text });
  }
}

function isSide(value: unknown): value is number {
  return typeof value === "number" && Number.isInteger(value) && value >= 1 && value <= 10_000;
}

/** A program that is over takes no input and no size, and the terminal has said so already. */
function ignoreEnded(error: unknown): void {
  if (!(error instanceof ApiError)) throw error;
}

/** The page's colours as xterm.js wants them. */
function colours() {
  const of = (name: string) => {
    const probe = document.createElement("span");
    probe.style.color = `var(${name})`;
    document.body.append(probe);
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  };
  return {
    background: of("--surface"),
    foreground: of("--text"),
    cursor: of("--accent"),
    selectionBackground: of("--selection"),
  };
}

/** The address of a sandbox's command. */
export function commandPath(id: string, pid: string): string {
  return of(id, `/commands/${encodeURIComponent(pid)}`);
}
