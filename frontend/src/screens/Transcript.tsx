import { type Signal, useSignal } from "@preact/signals";
import { useEffect, useLayoutEffect, useRef } from "preact/hooks";
import { may } from "../key";
import type { Box, Cell, Note } from "../store";
import type { Stream } from "../stream";
import { safe } from "../words";
import { CellView } from "./CellView";
import { Composer } from "./Composer";
import { showKeys } from "./Help";

/** Pixels from the end within which the page follows what is new. */
const NEAR = 120;
const EXAMPLES = [
  "1 + 1",
  "import sys\nprint(sys.version)",
  "import matplotlib.pyplot as plt\nplt.plot([1, 4, 9, 16])\nplt.show()",
];

/** All cells, whoever has sent them, and the editor for the next one. */
export function Transcript({ box, stream }: { box: Box; stream: Stream }) {
  const entries = box.entries.value;
  const follows = useRef(true);
  const seen = useRef(0);
  const news = useSignal(0);
  const list = useRef<HTMLDivElement>(null);
  const draft = useSignal("");
  const toEnd = () => scrollTo({ top: document.documentElement.scrollHeight });

  useEffect(() => {
    let before = scrollY;
    const scrolled = () => {
      const isNear = document.documentElement.scrollHeight - innerHeight - scrollY < NEAR;
      // What grows moves the end away, but only the user moves up.
      follows.current = isNear || (follows.current && scrollY >= before);
      before = scrollY;
      if (follows.current) news.value = 0;
    };
    addEventListener("scroll", scrolled, { passive: true });
    const grown = new ResizeObserver(() => {
      if (follows.current) toEnd();
    });
    if (list.current) grown.observe(list.current);
    return () => {
      removeEventListener("scroll", scrolled);
      grown.disconnect();
    };
  }, []);

  useLayoutEffect(() => {
    if (!follows.current) news.value += Math.max(entries.length - seen.current, 0);
    seen.current = entries.length;
  }, [entries]);

  const isReadOnly = box.link.value.state === "gone" || box.link.value.state === "paused";
  return (
    <main class="transcript" id="cells" tabIndex={-1} aria-label="Cells">
      <div class="cells" ref={list} onKeyDown={(event) => moveAmongCells(event, stream)}>
        {entries.map((each) => (
          <Entry key={each.peek().id} entry={each} box={box} stream={stream} />
        ))}
        {entries.length === 0 && box.link.value.state !== "connecting" && (
          <section class="empty">
            <h2>Nothing has run yet</h2>
            <p class="muted">Cells of any client of this sandbox show up here as they run.</p>
            <div class="examples" hidden={!may("use")}>
              {EXAMPLES.map((each) => (
                <button key={each} type="button" onClick={() => (draft.value = each)}>
                  <pre>{each}</pre>
                </button>
              ))}
            </div>
          </section>
        )}
        {box.waiting.value.map((each) => (
          <p key={each.id} class="waiting">
            <span class="muted">waiting · {safe(each.by.name)}</span> <code>{each.code.split("\n")[0]}</code>
          </p>
        ))}
        {box.refused.value && (
          <p class="trouble" role="alert">
            {box.refused.value}
          </p>
        )}
      </div>
      {news.value > 0 && (
        <button type="button" class="news" onClick={toEnd}>
          ↓ {news.value} new below
        </button>
      )}
      {!isReadOnly && may("use") && <Composer box={box} stream={stream} draft={draft} />}
    </main>
  );
}

function Entry({ entry, box, stream }: { entry: Signal<Cell | Note>; box: Box; stream: Stream }) {
  const value = entry.value;
  if (value.kind === "cell") return <CellView cell={value} box={box} stream={stream} />;
  return (
    <p class={value.isBad ? "note bad" : "note"} role="note">
      {safe(value.text)}
    </p>
  );
}

let lastKey = { key: "", at: 0 };

/** Keys of a cell that has the focus itself: they are not for fields and frames in it (WCAG 2.1.4). */
function moveAmongCells(event: KeyboardEvent, stream: Stream): void {
  const cell = event.target as HTMLElement;
  if (!cell.matches("article") || event.ctrlKey || event.metaKey || event.altKey) return;
  const isTwice = lastKey.key === event.key && event.timeStamp - lastKey.at < 1000;
  lastKey = { key: isTwice ? "" : event.key, at: event.timeStamp };
  const sibling = (name: "nextElementSibling" | "previousElementSibling") => {
    let next = cell[name];
    while (next && !next.matches("article")) next = next[name];
    (next as HTMLElement | null)?.focus();
  };
  switch (event.key) {
    case "ArrowDown":
      sibling("nextElementSibling");
      break;
    case "ArrowUp":
      sibling("previousElementSibling");
      break;
    case "i":
      if (isTwice) stream.send({ type: "interrupt" });
      break;
    case "0":
      if (isTwice) document.querySelector<HTMLElement>("[data-restart]")?.click();
      break;
    case "c":
      void navigator.clipboard.writeText(cell.querySelector(".code")?.textContent ?? "");
      break;
    case "?":
      showKeys();
      break;
    case ".":
      document.querySelector<HTMLElement>("article.running")?.focus();
      break;
    default:
      return;
  }
  event.preventDefault();
}
