import { useSignal } from "@preact/signals";
import { useEffect, useLayoutEffect, useRef } from "preact/hooks";
import { Screen } from "../ansi";
import { highlight } from "../highlight";
import { may } from "../key";
import { shown } from "../mime";
import { type Box, type Bundle, type Cell, type CellError, now, type Output, said } from "../store";
import { isMine, type Stream } from "../stream";
import { drawOnce, TextView } from "../text";
import { save } from "../ui";
import { duration, safe, time } from "../words";
import { Allow, Framed } from "./Framed";

const STATES: Record<Cell["state"], string> = {
  sent: "waiting",
  running: "running",
  done: "",
  failed: "failed",
  unknown: "may have run in part",
  not_started: "did not run",
};

/** One cell: its code, who has sent it, and what came of it. */
export function CellView({ cell, box, stream }: { cell: Cell; box: Box; stream: Stream }) {
  const author = isMine(cell.id) ? "you" : safe(cell.by?.name ?? "somebody");
  const name = `Cell ${cell.count ?? ""} by ${author}${STATES[cell.state] ? `, ${STATES[cell.state]}` : ""}`;
  const failure = cell.outputs.findLast((each) => each.kind === "failure");
  useEffect(() => {
    if (cell.state === "failed" && isMine(cell.id)) said.value = `Cell ${cell.count} failed.`;
  }, [cell.state]);
  const isOver = cell.state !== "running" && cell.state !== "sent";
  return (
    <article class={`cell ${cell.state}`} tabIndex={0} aria-label={name}>
      <header>
        <span class="count">[{cell.state === "sent" ? " " : (cell.count ?? "*")}]</span>
        <span class="author">{author}</span>
        <span class="muted">
          {cell.by && !isMine(cell.id) && `${cell.by.via} · `}
          {time(cell.at)}
        </span>
        {isOver && cell.startedAt > 0 && cell.endedAt > 0 && (
          <span class="muted">{duration(cell.endedAt - cell.startedAt)}</span>
        )}
        {cell.state === "running" && <Running since={cell.startedAt} />}
        {STATES[cell.state] && cell.state !== "running" && (
          <span class={`word ${cell.state}`}>
            {cell.state === "failed" && failure?.kind === "failure" ? safe(failure.error.name) : STATES[cell.state]}
          </span>
        )}
        <button
          type="button"
          class="quiet copy"
          aria-label="Copy the code"
          onClick={() => navigator.clipboard.writeText(cell.code)}
        >
          Copy
        </button>
      </header>
      <Code code={cell.code} />
      <div class="outputs" aria-live="off">
        {cell.outputs.map((output, index) => (
          <OutputView
            key={`${index}-${output.kind}`}
            output={output}
            title={`Output ${index + 1} of cell ${cell.count ?? ""}`}
            isOpen={box.asks.value === cell.id && isLastPrompt(cell, output) && may("use")}
            answered={
              box.answered.value?.id === cell.id && isLastPrompt(cell, output) ? box.answered.value.by.name : ""
            }
            answer={(text) => stream.send({ type: "input", text })}
          />
        ))}
      </div>
    </article>
  );
}

function isLastPrompt(cell: Cell, output: Output): boolean {
  return output === cell.outputs.findLast((each) => each.kind === "prompt");
}

function Running({ since }: { since: number }) {
  return <span class="state busy">{since ? duration(now.value - since) : "running"}</span>;
}

/** Code, coloured once the editor's part of the page is there. */
export function Code({ code }: { code: string }) {
  const element = useRef<HTMLPreElement>(null);
  const paint = highlight.value;
  useLayoutEffect(() => {
    if (!element.current) return;
    if (paint) element.current.replaceChildren(...paint(code));
    else element.current.textContent = code;
  }, [code, paint]);
  return <pre class="code" ref={element} />;
}

interface OutputProps {
  output: Output;
  title: string;
  isOpen: boolean;
  answered: string;
  answer: (text: string) => void;
}

function OutputView({ output, title, isOpen, answered, answer }: OutputProps) {
  switch (output.kind) {
    case "text":
      return <Text screen={output.screen} isError={output.isError} />;
    case "rich":
      return <Rich data={output.data} title={title} />;
    case "failure":
      return <Failure error={output.error} />;
    case "prompt":
      return <Prompt output={output} isOpen={isOpen} answered={answered} answer={answer} />;
    case "gap":
      return <p class="notice">{output.messages.toLocaleString()} messages are not kept any more.</p>;
  }
}

function Text({ screen, isError }: { screen: Screen; isError: boolean }) {
  const element = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    const view = new TextView(screen);
    element.current?.replaceChildren(view.element);
    return () => view.close();
  }, [screen]);
  return <div class={isError ? "stream stderr" : "stream"} ref={element} />;
}

/** Text with colours that does not grow. */
function Coloured({ text }: { text: string }) {
  const element = useRef<HTMLPreElement>(null);
  useLayoutEffect(() => {
    const screen = new Screen();
    screen.feed(text);
    if (element.current) drawOnce(element.current, screen);
  }, [text]);
  return <pre class="stream" ref={element} />;
}

function Failure({ error }: { error: CellError }) {
  const text = error.traceback.join("\n");
  const isOurs = error.code !== undefined && error.code !== null;
  return (
    <div class="failure">
      {isOurs || !text ? (
        <p>
          <strong>{safe(error.name)}</strong> {safe(error.value)}
          {error.stateKept === false &&
            (error.name === "SandboxDied" ? ". Variables and files are gone." : ". Variables are gone, files stay.")}
          {error.stateKept === true && ". Variables are kept."}
        </p>
      ) : (
        <Coloured text={text} />
      )}
    </div>
  );
}

function Prompt({ output, isOpen, answered, answer }: Omit<OutputProps, "title">) {
  const text = useSignal("");
  if (output.kind !== "prompt") return null;
  const submit = (event: Event) => {
    event.preventDefault();
    answer(text.value);
    text.value = "";
  };
  const field = {
    autocomplete: "off" as const,
    spellcheck: false,
    value: text.value,
    onInput: (event: { currentTarget: HTMLInputElement }) => {
      text.value = event.currentTarget.value;
    },
  };
  if (!isOpen) {
    return (
      <p class="prompt answered">
        <span class="asked">{output.prompt}</span>{" "}
        <span class="muted">{answered && `answered by ${safe(answered)}`}</span>
      </p>
    );
  }
  return (
    <form class="prompt" onSubmit={submit}>
      <label>
        <span class="asked">{output.prompt || "The cell asks for input"}</span>
        {output.isPassword ? <input type="password" {...field} /> : <input type="text" {...field} />}
      </label>
      <button type="submit" class="primary">
        Send
      </button>
    </form>
  );
}

/** A rich output, in the first of its forms that the page can show (mime.ts). */
function Rich({ data, title }: { data: Bundle; title: string }) {
  const form = shown(data);
  switch (form.how) {
    case "image":
      return (
        <figure class="picture">
          <img src={form.url} alt={form.alt || title} />
        </figure>
      );
    case "frame":
      return <Framed kind={form.kind} data={form.data} title={title} />;
    case "script":
      return <Script code={form.code} title={title} />;
    case "json":
      return (
        <details class="json">
          <summary>JSON</summary>
          <pre>{JSON.stringify(form.value, null, 2)}</pre>
        </details>
      );
    case "large":
      return (
        <p class="notice">
          {form.why}{" "}
          <button
            type="button"
            onClick={() =>
              save(
                "picture.png",
                Uint8Array.from(atob(form.data), (c) => c.charCodeAt(0)),
              )
            }
          >
            Save
          </button>
        </p>
      );
    case "unknown":
      return (
        <>
          <Coloured text={form.text} />
          <p class="notice">
            This output is interactive ({safe(form.mime)}). Open the sandbox in JupyterLab to use it.
          </p>
        </>
      );
    case "text":
      return <Coloured text={form.text} />;
  }
}

/** JavaScript of an output: nothing of it runs before the user says so. */
function Script({ code, title }: { code: string; title: string }) {
  const isAllowed = useSignal(false);
  if (isAllowed.value) return <Framed kind="script" data={code} title={title} />;
  return (
    <p class="notice">
      This output is a script. <Allow allow={() => (isAllowed.value = true)} />
    </p>
  );
}
