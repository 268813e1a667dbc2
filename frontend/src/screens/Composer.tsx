import type { Signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import type { Editor } from "../editor";
import { key } from "../key";
import { type Box, offers } from "../store";
import type { Stream } from "../stream";

/** Where the next cell is written: a plain field until the editor's part of the page has come. */
export function Composer({ box, stream, draft }: { box: Box; stream: Stream; draft: Signal<string> }) {
  const place = useRef<HTMLDivElement>(null);
  const field = useRef<HTMLTextAreaElement>(null);
  const editor = useRef<Editor | undefined>(undefined);
  const run = () => {
    const code = draft.peek();
    if (!code.trim()) return;
    draft.value = "";
    stream.run(code);
    scrollTo({ top: document.documentElement.scrollHeight });
  };
  const past = () =>
    box.entries.peek().flatMap(({ value }) => (value.kind === "cell" && value.code ? [value.code] : []));

  useEffect(() => {
    let isGone = false;
    // The browser heeds `autofocus` once only, and that was the field for the key.
    if (document.activeElement === document.body) field.current?.focus({ preventScroll: true });
    void import("../editor").then(({ Editor, paint }) => {
      if (isGone || !place.current || !key.value) return;
      const hadFocus = document.activeElement === field.current;
      const complete = offers("complete") ? stream.complete.bind(stream) : undefined;
      const onChange = (text: string) => (draft.value = text);
      const made = new Editor({ text: draft.peek(), onRun: run, onChange, past, complete });
      editor.current = made;
      place.current.replaceChildren(made.element);
      paint();
      if (hadFocus) made.focus();
    });
    return () => {
      isGone = true;
      editor.current?.close();
    };
  }, []);
  useEffect(() => draft.subscribe((text) => editor.current?.show(text)), []);

  return (
    <section class="composer" aria-label="New cell">
      <div class="editor" ref={place}>
        <textarea
          ref={field}
          aria-label="Code of the next cell"
          placeholder="Python, %magic or !command"
          rows={1}
          spellcheck={false}
          value={draft.value}
          onInput={(event) => {
            draft.value = event.currentTarget.value;
          }}
          onKeyDown={(event) => {
            if (event.key === "Enter" && (event.shiftKey || event.ctrlKey || event.metaKey)) {
              event.preventDefault();
              run();
            }
          }}
        />
      </div>
      <button type="button" class="primary run" onClick={run} disabled={!draft.value.trim()} title="Run (Shift+Enter)">
        Run <kbd aria-hidden="true">⇧⏎</kbd>
      </button>
    </section>
  );
}
