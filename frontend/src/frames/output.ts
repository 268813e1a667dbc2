/**
 * Runs in a frame with an opaque origin, and shows one output there. It shares the frame with what the output brings, so
 * the page believes nothing that it says.
 */
interface Order {
  kind: "html" | "plotly" | "script";
  data: unknown;
  isLive: boolean;
  isDark: boolean;
  library: string;
}

const style = `
  :root { color-scheme: light dark; font: 14px/1.5 system-ui, sans-serif; }
  :root[data-dark="false"] { color-scheme: light; } :root[data-dark="true"] { color-scheme: dark; }
  body { margin: 0; padding: 2px; background: transparent; overflow: auto; }
  table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; border: 0; }
  th, td { padding: 3px 10px; text-align: right; border: 0; white-space: nowrap; }
  thead th { border-bottom: 1px solid light-dark(#d5d5d2, #44464b); font-weight: 600; }
  tbody th { font-weight: 600; } tbody tr:nth-child(even) { background: light-dark(#00000008, #ffffff0a); }
  td { max-width: 40em; overflow: hidden; text-overflow: ellipsis; }
  pre, code { font: 13px/1.5 ui-monospace, monospace; }
  img, svg { max-width: 100%; }
`;

addEventListener(
  "message",
  (event) => {
    const [port] = event.ports;
    if (event.source !== parent || !port) return;
    event.stopImmediatePropagation();
    show(event.data as Order, port);
  },
  { once: true },
);

function show(order: Order, port: MessagePort): void {
  document.documentElement.dataset.dark = String(order.isDark);
  const sheet = document.createElement("style");
  sheet.textContent = style;
  document.head.append(sheet);
  if (order.isLive) tame();
  document.addEventListener("securitypolicyviolation", () => port.postMessage({ blocked: true }), { once: true });
  port.onmessage = () => port.postMessage({ pong: true });
  addEventListener("keydown", (event) => event.key === "F6" && port.postMessage({ leave: true }));
  const tell = () => port.postMessage({ height: document.body.scrollHeight });
  new ResizeObserver(tell).observe(document.body);
  addEventListener("load", tell, true); // pictures change the height when they come
  if (order.kind === "plotly") void draw(order);
  else if (order.kind === "script") run(String(order.data));
  else write(String(order.data), order.isLive);
}

/** Writes HTML. Scripts of HTML that is set do not run, so a live frame makes them anew, one after the other. */
function write(html: string, isLive: boolean): void {
  document.body.innerHTML = html;
  if (!isLive) {
    // A blocked script is reported only when it would run, and the page offers to run it.
    for (const script of document.body.querySelectorAll("script")) script.replaceWith(copy(script));
    return;
  }
  for (const script of [...document.body.querySelectorAll("script")]) script.replaceWith(copy(script));
}

function copy(script: HTMLScriptElement): HTMLScriptElement {
  const made = document.createElement("script");
  for (const { name, value } of script.attributes) made.setAttribute(name, value);
  made.textContent = script.textContent;
  made.async = false;
  return made;
}

function run(code: string): void {
  const script = document.createElement("script");
  script.textContent = code;
  document.body.append(script);
}

/**
 * Takes away what ignores the policy: WebRTC, and scrolling to an element, which would also scroll the page. Nested frames
 * would bring both back.
 */
function tame(): void {
  for (const name of ["scrollIntoView", "scrollIntoViewIfNeeded"]) {
    Object.defineProperty(Element.prototype, name, { value: () => {}, writable: false, configurable: false });
  }
  const remove = (scope: Window & typeof globalThis) => {
    for (const name of ["RTCPeerConnection", "webkitRTCPeerConnection", "RTCDataChannel", "WebTransport"]) {
      Object.defineProperty(scope, name, { value: undefined, writable: false, configurable: false });
    }
  };
  remove(window);
  new MutationObserver(() => {
    for (const nested of document.querySelectorAll("iframe, frame, object, embed")) nested.remove();
  }).observe(document, { childList: true, subtree: true });
}

interface Plotly {
  newPlot(element: HTMLElement, data: unknown, layout: unknown, config: unknown): Promise<unknown>;
}

/** Draws a chart with the server's own copy of plotly.js, which the figure's data can't choose. */
async function draw(order: Order): Promise<void> {
  const figure = order.data as { data?: unknown; layout?: Record<string, unknown> };
  const script = document.createElement("script");
  script.src = order.library;
  script.onload = () => {
    const { Plotly } = window as unknown as { Plotly: Plotly };
    const layout = { ...figure.layout, autosize: true, height: Number(figure.layout?.height) || 420 };
    void Plotly.newPlot(document.body, figure.data, layout, { responsive: true, displaylogo: false });
  };
  script.onerror = () => {
    document.body.textContent = "This server has no plotly.js, so the chart can't be drawn here.";
  };
  document.head.append(script);
}
