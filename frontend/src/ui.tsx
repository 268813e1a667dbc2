/** Small parts that several screens use. */
import { useComputed, useSignal } from "@preact/signals";
import type { ComponentChildren } from "preact";
import { useEffect, useId, useRef } from "preact/hooks";
import { ApiError } from "./api";

/** A question that can't be taken back: what is lost, and what the button says. */
export interface Question {
  title: string;
  text: string;
  button: string;
  act: () => void | Promise<void>;
}

/** A dialog that is open while it is there. */
export function Dialog(props: { title: string; close: () => void; children: ComponentChildren; isWide?: boolean }) {
  const element = useRef<HTMLDialogElement>(null);
  const title = useId();
  useEffect(() => {
    element.current?.showModal();
  }, []);
  return (
    <dialog
      ref={element}
      class={props.isWide ? "wide" : ""}
      aria-labelledby={title}
      onClose={props.close}
      onClick={(event) => event.target === element.current && element.current?.close()}
    >
      <div class="dialog">
        <header>
          <h2 id={title}>{props.title}</h2>
          <button type="button" class="quiet icon" aria-label="Close" onClick={() => element.current?.close()}>
            ✕
          </button>
        </header>
        {props.children}
      </div>
    </dialog>
  );
}

/** Asks once before something is lost. */
export function Ask({ question, close }: { question: Question; close: () => void }) {
  const work = useWork();
  return (
    <Dialog title={question.title} close={close}>
      <p>{question.text}</p>
      <Trouble error={work.error.value} />
      <footer>
        <button type="button" onClick={close}>
          Cancel
        </button>
        <button
          type="button"
          class="danger"
          disabled={work.isBusy.value}
          onClick={() => work.run(async () => question.act(), close)}
        >
          {question.button}
        </button>
      </footer>
    </Dialog>
  );
}

/** Something that is under way, and what went wrong with it last. */
export function useWork() {
  const begun = useSignal(0);
  const isBusy = useComputed(() => begun.value > 0);
  const error = useSignal<ApiError | undefined>(undefined);
  const run = async (act: () => Promise<unknown>, then: () => void = () => {}) => {
    begun.value += 1;
    error.value = undefined;
    try {
      await act();
      then();
    } catch (caught) {
      if (!(caught instanceof ApiError)) throw caught;
      error.value = caught;
    } finally {
      begun.value -= 1;
    }
  };
  return { isBusy, error, run };
}

/** What went wrong: the message, what to do about it, and the word for programs. */
export function Trouble({ error, again }: { error: ApiError | undefined; again?: () => void }) {
  if (!error) return null;
  return (
    <div class="trouble" role="alert">
      <p>
        <strong>{error.message}</strong> {error.hint}
        {error.outcome === "unknown" && " It may have run."}
      </p>
      <p class="muted">
        <code>{error.word}</code>
      </p>
      {again && error.isRetryable && (
        <button type="button" onClick={again}>
          Try again
        </button>
      )}
    </div>
  );
}

/** A button that opens a list of actions. The browser closes it on Escape and on a click elsewhere. */
export function Menu(props: { label: string; text?: string; look?: string; children: ComponentChildren }) {
  const { label, children, text = "⋯", look = "quiet" } = props;
  const id = useId();
  const button = useRef<HTMLButtonElement>(null);
  const items = useRef<HTMLDivElement>(null);
  const place = () => {
    const at = button.current?.getBoundingClientRect();
    if (!at || !items.current) return;
    items.current.style.top = `${at.bottom + 4}px`;
    items.current.style.right = `${Math.max(document.documentElement.clientWidth - Math.max(at.right, 230), 8)}px`;
  };
  return (
    <>
      <button
        ref={button}
        type="button"
        class={look}
        popovertarget={id}
        aria-label={label}
        title={text === label ? undefined : label}
      >
        {text}
      </button>
      <div
        ref={items}
        id={id}
        popover="auto"
        class="items"
        onBeforeToggle={place}
        onClick={() => items.current?.hidePopover()}
      >
        {children}
      </div>
    </>
  );
}

/** A line of readings, the last one at the right. */
export function Sparkline({ values, top }: { values: number[]; top: number }) {
  const width = 64;
  const step = width / Math.max(values.length - 1, 1);
  const y = (value: number) => (18 - 16 * Math.min(value / (top || 1), 1)).toFixed(1);
  const points = values.map((value, index) => `${(index * step).toFixed(1)},${y(value)}`);
  return (
    <svg class="sparkline" viewBox={`0 0 ${width} 20`} aria-hidden="true">
      {points.length > 1 && <polygon points={`0,20 ${points.join(" ")} ${width},20`} />}
      {points.length > 1 && <polyline points={points.join(" ")} />}
    </svg>
  );
}

/** Shows its children only after 150 ms, because a shorter wait needs no sign of it. */
export function Later({ children }: { children: ComponentChildren }) {
  const isLate = useSignal(false);
  useEffect(() => {
    const timer = setTimeout(() => {
      isLate.value = true;
    }, 150);
    return () => clearTimeout(timer);
  }, []);
  return isLate.value ? <div>{children}</div> : null;
}

/** Offers bytes as a file. The type is one that no browser shows, because a page of ours would run in our origin. */
export function save(name: string, content: BlobPart): void {
  const url = URL.createObjectURL(new Blob([content], { type: "application/octet-stream" }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
