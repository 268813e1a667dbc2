/** The WebSocket of the sandbox in view: it connects again after a loss, from where it was (docs/stream.md). */
import { ApiError, address, CLIENT, get, of } from "./api";
import { key, keyProtocol } from "./key";
import { type Box, type Completions, type Link, type Sandbox, said } from "./store";

/** Milliseconds before the first and before the last try to connect again. */
const FIRST = 250;
const LONGEST = 8000;
/** Milliseconds that the kernel has to complete a name. */
const COMPLETING = 4000;

/** This tab's session. Ids of its cells begin with it, and by it the tab knows its own after a reload. */
export const SESSION = tabSession();

function tabSession(): string {
  const known = sessionStorage.getItem("cellvm.session") ?? crypto.randomUUID().slice(0, 8);
  sessionStorage.setItem("cellvm.session", known);
  return known;
}

/** Whether a cell is this tab's. */
export function isMine(id: string): boolean {
  return id.startsWith(`${SESSION}-`);
}

/** The connection of one box. Call `close` when the box is not in view any more. */
export class Stream {
  private socket: WebSocket | undefined;
  private timer: ReturnType<typeof setTimeout> | undefined;
  private pause = FIRST;
  private isClosed = false;
  private readonly hurry = () => {
    if (document.visibilityState === "visible" && this.box.link.value.state === "lost") this.connect();
  };

  constructor(private readonly box: Box) {
    addEventListener("online", this.hurry);
    document.addEventListener("visibilitychange", this.hurry);
    this.connect();
  }

  close(): void {
    this.isClosed = true;
    removeEventListener("online", this.hurry);
    document.removeEventListener("visibilitychange", this.hurry);
    clearTimeout(this.timer);
    this.socket?.close();
  }

  /** Runs a cell. Without a connection it waits in the outbox. */
  run(code: string): void {
    const id = `${SESSION}-${crypto.randomUUID().slice(0, 8)}`;
    this.box.add(id, code);
    this.send({ type: "execute", id, code });
  }

  /** What may stand at a place of the code, in characters. There is none after a while without an answer. */
  complete(code: string, cursor: number): Promise<Completions> {
    const id = crypto.randomUUID();
    return new Promise<Completions>((resolve) => {
      this.box.asked.set(id, resolve);
      setTimeout(() => resolve({ matches: [], start: 0, end: 0 }), COMPLETING);
      this.send({ type: "complete", id, code, cursor });
    }).finally(() => this.box.asked.delete(id));
  }

  /** Sends a command; nothing happens without a connection. */
  send(command: object): void {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(command));
  }

  /** Connects again, for one who knows that it may help now: after a resume. */
  connect(): void {
    clearTimeout(this.timer);
    if (this.isClosed || !key.value) return;
    this.socket?.close();
    const query = new URLSearchParams({
      since: String(this.box.seq),
      session_id: SESSION,
      client: CLIENT,
      state: "true",
    });
    const socket = new WebSocket(address(`${of(this.box.id, "/stream")}?${query}`, "ws"), ["cellvm.v1", keyProtocol()]);
    this.socket = socket;
    socket.onopen = () => {
      if (this.box.link.value.state === "lost") said.value = "Connected again.";
      this.pause = FIRST;
      this.tell("open");
      for (const [id, code] of this.box.outbox) this.send({ type: "execute", id, code });
    };
    socket.onmessage = ({ data }) => this.box.apply(JSON.parse(data));
    socket.onclose = ({ code, reason }) => {
      if (socket === this.socket) this.lost(code, reason);
    };
  }

  private lost(code: number, reason: string): void {
    if (this.isClosed) return;
    if (code === 4411) return this.tell("paused", reason);
    if (code === 4410) return void this.gone(reason);
    if (this.box.link.value.state !== "lost") {
      this.tell("lost", code === 1012 ? "The server is restarting" : "Disconnected");
      said.value = "Disconnected.";
    }
    void this.findOut();
    this.timer = setTimeout(() => this.connect(), this.pause * (0.5 + Math.random()));
    this.pause = Math.min(this.pause * 2, LONGEST);
  }

  /** Asks why there is no connection, because a WebSocket that is refused tells nothing. */
  private async findOut(): Promise<void> {
    try {
      const found = await get<Sandbox>(of(this.box.id));
      if (found.status === "paused") this.tell("paused");
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) await this.gone(error.hint || error.message);
    }
  }

  private async gone(reason: string): Promise<void> {
    clearTimeout(this.timer);
    this.tell("gone", reason);
    said.value = "The sandbox has ended.";
    const why = await get(of(this.box.id)).catch((error) => (error instanceof ApiError ? error.hint : ""));
    if (typeof why === "string" && why) this.tell("gone", why);
  }

  private tell(state: Link["state"], reason = ""): void {
    if (state === "paused" || state === "gone") clearTimeout(this.timer);
    this.box.link.value = { state, reason, since: Date.now() };
  }
}
