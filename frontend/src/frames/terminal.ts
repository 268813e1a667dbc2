/**
 * Runs in a frame with an opaque origin, and shows a terminal there, because xterm.js can't live with the page's policy.
 * The page sends what the program prints, and gets what is typed, the size, and F6, which leaves the frame.
 */
import { type ITheme, Terminal } from "@xterm/xterm";
import "@xterm/xterm/css/xterm.css";

/** Pixels at the right that no text stands in. */
const SCROLLBAR = 14;

type Order = { write: string } | { focus: true } | { theme: ITheme } | { ended: string };

addEventListener(
  "message",
  (event) => {
    const [port] = event.ports;
    if (event.source === parent && port) start(port, event.data.theme as ITheme);
  },
  { once: true },
);

function start(port: MessagePort, theme: ITheme): void {
  Object.assign(document.body.style, { margin: "0", height: "100vh", overflow: "hidden", padding: "8px 4px 4px 10px" });
  document.body.style.boxSizing = "border-box";
  document.body.style.background = String(theme.background);
  const terminal = new Terminal({
    fontFamily: 'ui-monospace, "SF Mono", "Cascadia Code", "DejaVu Sans Mono", monospace',
    fontSize: 13,
    lineHeight: 1.2,
    scrollback: 5000,
    minimumContrastRatio: 4.5,
    screenReaderMode: false,
    linkHandler: null,
    theme,
  });
  const place = document.createElement("div");
  place.style.height = "100%";
  document.body.append(place);
  terminal.open(place);
  // A program may ask the terminal for its clipboard, its title or its settings, and gets no answer.
  terminal.parser.registerOscHandler(52, () => true);
  terminal.parser.registerDcsHandler({ intermediates: "$", final: "q" }, () => true);
  terminal.parser.registerCsiHandler({ final: "t" }, () => true);
  terminal.attachCustomKeyEventHandler((event) => {
    if (event.key !== "F6") return true;
    if (event.type === "keydown") port.postMessage({ leave: true });
    event.preventDefault();
    return false;
  });
  terminal.onData((data) => port.postMessage({ data }));
  terminal.onBinary((data) => port.postMessage({ data }));
  const tell = () => {
    const screen = place.querySelector(".xterm-screen")?.getBoundingClientRect();
    if (!screen?.width) return;
    const cols = Math.floor((place.clientWidth - SCROLLBAR) / (screen.width / terminal.cols));
    const rows = Math.floor(place.clientHeight / (screen.height / terminal.rows));
    terminal.resize(Math.max(cols, 2), Math.max(rows, 1));
    port.postMessage({ rows: terminal.rows, cols: terminal.cols });
  };
  new ResizeObserver(tell).observe(place);
  port.onmessage = ({ data }: MessageEvent<Order>) => {
    if ("write" in data) terminal.write(data.write, () => port.postMessage({ written: true }));
    else if ("focus" in data) terminal.focus();
    else if ("theme" in data) terminal.options.theme = data.theme;
    else terminal.write(`\r\n\x1b[2m${data.ended}\x1b[0m\r\n`);
  };
  tell();
  terminal.focus();
}
