/**
 * The page's side of the frames that show what a sandbox says. A frame's origin is opaque, and no script of the sandbox
 * runs in it before the user says so. The page listens to no window messages, only to the port that it gave.
 *
 * A live frame could take the keyboard, so `guard` removes one that has the focus without a click, and one that does not
 * answer is removed with all others, because they share a process.
 */
import { address } from "./api";
import { toRegion } from "./regions";

/** Frames that exist at once; others leave a box of the same height. */
const MOST = 12;
const HEIGHTS = [20, 2000] as const;
/** Milliseconds between questions to a live frame, and of silence after which all frames are made anew. */
const PING = 2000;
const SILENCE = 6000;
/** Messages that the page takes from one frame in a second. */
const RATE = 10;

export type FrameKind = "html" | "plotly" | "script";

const shown = new Set<Frame>();
const near = new IntersectionObserver(
  (seen) => {
    for (const { target, isIntersecting } of seen) {
      const frame = [...shown].find((each) => each.element === target);
      if (isIntersecting) frame?.load();
      else frame?.rest();
    }
  },
  { rootMargin: "600px 0px" },
);

/** One output. `element` is its place in the page. Call `close` when it is not shown any more. */
export class Frame {
  readonly element = document.createElement("div");
  private inner: HTMLIFrameElement | undefined;
  private readonly cover = document.createElement("button");
  private port: MessagePort | undefined;
  private timer: ReturnType<typeof setInterval> | undefined;
  private heard = 0;
  private taken = 0;
  private second = 0;
  private isRemoved = false;

  constructor(
    private readonly kind: FrameKind,
    private readonly data: unknown,
    private readonly title: string,
    readonly isLive: boolean,
    private readonly onBlocked: () => void,
  ) {
    this.element.className = "frame";
    this.element.style.height = kind === "plotly" ? "440px" : "60px";
    this.cover.type = "button";
    this.cover.className = "cover";
    this.cover.setAttribute("aria-label", `${title}: click to use it`);
    this.cover.onclick = () => this.open();
    shown.add(this);
    near.observe(this.element);
  }

  close(): void {
    shown.delete(this);
    near.unobserve(this.element);
    this.rest();
  }

  /** Makes the frame, if there is none and there may be one more. */
  load(): void {
    if (this.inner || this.isRemoved) return;
    const loaded = [...shown].filter((each) => each.inner);
    if (loaded.length >= MOST) loaded[0]?.rest();
    const inner = document.createElement("iframe");
    inner.setAttribute("sandbox", "allow-scripts");
    inner.setAttribute("allow", "");
    inner.title = this.title;
    inner.referrerPolicy = "no-referrer";
    inner.src = address(this.isLive ? "/ui/live.html" : "/ui/still.html");
    inner.onload = () => this.greet(inner);
    this.inner = inner;
    this.cover.hidden = false;
    this.element.replaceChildren(inner, this.cover);
  }

  /** Takes the frame away and leaves its place. */
  rest(): void {
    clearInterval(this.timer);
    this.port?.close();
    this.port = undefined;
    this.inner = undefined;
    if (!this.isRemoved) this.element.replaceChildren();
  }

  /** Takes the frame away for good, and says why in its place. */
  remove(why: string): void {
    this.isRemoved = true;
    this.rest();
    this.element.style.height = "auto";
    const notice = document.createElement("p");
    notice.className = "notice";
    notice.setAttribute("role", "alert");
    notice.textContent = why;
    this.element.replaceChildren(notice);
  }

  /** Whether that element is this frame's. */
  has(element: Element | null): boolean {
    return element !== null && element === this.inner;
  }

  get isOpen(): boolean {
    return this.cover.hidden === true;
  }

  /** Gives the frame the keyboard, because the user has clicked it. */
  private open(): void {
    this.cover.hidden = true;
    this.inner?.focus();
  }

  /** Covers it again, because the user is elsewhere. */
  leave(): void {
    this.cover.hidden = false;
  }

  private greet(inner: HTMLIFrameElement): void {
    if (this.port) return this.remove("This output tried to load another page, so it was taken away.");
    const { port1, port2 } = new MessageChannel();
    this.port = port1;
    this.heard = Date.now();
    port1.onmessage = ({ data }) => this.receive(data);
    const isDark = getComputedStyle(document.documentElement).getPropertyValue("--is-dark").trim() === "1";
    const library = address("/ui/lib/plotly.min.js");
    const order = { kind: this.kind, data: this.data, isLive: this.isLive, isDark, library };
    inner.contentWindow?.postMessage(order, "*", [port2]); // its origin is opaque, so it can't be named
    if (this.isLive) this.timer = setInterval(() => this.ask(), PING);
  }

  private receive(data: unknown): void {
    const second = Math.floor(Date.now() / 1000);
    if (second !== this.second) [this.second, this.taken] = [second, 0];
    this.taken += 1;
    if (this.taken > RATE || typeof data !== "object" || data === null) return;
    if ("pong" in data) this.heard = Date.now();
    if ("blocked" in data) this.onBlocked();
    if ("leave" in data && this.has(document.activeElement)) toRegion(1);
    if ("height" in data && typeof data.height === "number" && data.height > 0) {
      this.element.style.height = `${Math.min(Math.max(data.height, HEIGHTS[0]), HEIGHTS[1])}px`;
    }
  }

  private ask(): void {
    this.port?.postMessage("ping");
    if (Date.now() - this.heard > SILENCE) restartAll();
  }
}

/** Makes all frames anew after one has stopped answering. Live ones are gone for good. */
function restartAll(): void {
  for (const frame of shown) {
    if (frame.isLive) frame.remove("Scripts of an output did not answer any more, so the output was taken away.");
    else frame.rest();
  }
  for (const frame of shown) {
    near.unobserve(frame.element); // observed again, it tells at once whether it is near
    near.observe(frame.element);
  }
}

/** Sees to it that a frame has the keyboard only when the user gave it. A thief is removed, and gives back what it took. */
export function guard(): void {
  let last: HTMLElement | undefined;
  addEventListener("blur", () => {
    const thief = [...shown].find((frame) => frame.has(document.activeElement));
    if (!thief || thief.isOpen) return;
    thief.remove("This output tried to take the keyboard, so it was taken away.");
    last?.focus({ preventScroll: true });
  });
  const leave = (event: Event) => {
    for (const frame of shown) if (!frame.element.contains(event.target as Node)) frame.leave();
  };
  addEventListener("pointerdown", leave, true);
  addEventListener(
    "focusin",
    (event) => {
      const [focused] = event.composedPath(); // the editor is in a shadow root
      if (!(focused instanceof HTMLIFrameElement)) last = focused as HTMLElement;
      leave(event);
    },
    true,
  );
}
