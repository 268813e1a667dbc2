import { useSignal } from "@preact/signals";
import { useEffect, useMemo } from "preact/hooks";
import { ending, extended, pausing, restarting } from "../actions";
import { ApiError, of, send } from "../api";
import { may, share } from "../key";
import { notebook } from "../notebook";
import { go, type Route, to } from "../route";
import { Box, now, offers, type Sandbox, said, sandboxes } from "../store";
import { Stream } from "../stream";
import { Ask, Menu, type Question, save, Trouble, useWork } from "../ui";
import { clock, REASONS, safe } from "../words";
import { Files } from "./Files";
import { HelpButton } from "./Help";
import { JupyterLab } from "./JupyterLab";
import { Ports } from "./Ports";
import { Shares } from "./Shares";
import { Side } from "./Side";
import { Snapshots } from "./Snapshots";
import { Terminals } from "./Terminals";
import { ThemeMenu } from "./Theme";
import { Timeline } from "./Timeline";
import { Transcript } from "./Transcript";

/** One sandbox: its cells, files and terminals. */
export function BoxScreen({ route }: { route: Route }) {
  const { id, tab } = route;
  const box = useMemo(() => new Box(id), [id]);
  const stream = useMemo(() => new Stream(box), [box]);
  const question = useSignal<Question | undefined>(undefined);
  const opened = useSignal<"" | Opened>("");
  const close = () => (opened.value = "");
  useEffect(() => () => stream.close(), [stream]);
  const sandbox = sandboxes.value?.find((each) => each.sandboxID === id);
  const isGone = box.link.value.state === "gone";
  return (
    <>
      <header class="top">
        {may("own") && (
          <a class="quiet button icon" href={to()} aria-label="All sandboxes" title="All sandboxes">
            ‹
          </a>
        )}
        <h1>
          {safe(sandbox?.metadata["name"] ?? "") || "Sandbox"} <code class="id">{id.slice(0, 12)}</code>
        </h1>
        {share.value && <span class="chip">{may("use") ? "shared with you" : "you are watching"}</span>}
        <BoxState box={box} />
        <span class="grow" />
        {sandbox && !isGone && <TimeLeft sandbox={sandbox} />}
        <HelpButton />
        <ThemeMenu />
      </header>
      <nav class="bar" aria-label="Parts of the sandbox">
        <a href={to(id)} aria-current={tab === "cells" ? "page" : undefined}>
          Cells
        </a>
        <a href={to(id, "files")} aria-current={tab === "files" ? "page" : undefined}>
          Files
        </a>
        {offers("pty") && may("use") && (
          <a href={to(id, "terminal")} aria-current={tab === "terminal" ? "page" : undefined}>
            Terminal
          </a>
        )}
        <span class="grow" />
        {!isGone && (
          <Actions
            box={box}
            stream={stream}
            sandbox={sandbox}
            ask={(asked) => (question.value = asked)}
            open={(dialog) => (opened.value = dialog)}
          />
        )}
      </nav>
      <Banner box={box} stream={stream} />
      <div class={`box at-${tab}`}>
        {tab === "cells" && <Transcript box={box} stream={stream} />}
        {tab === "files" && <Files key={id} id={id} path={route.rest} isGone={isGone} />}
        {tab === "terminal" && <Terminals key={id} id={id} pid={route.rest} isGone={isGone} />}
        {tab === "cells" && <Side box={box} stream={stream} sandbox={sandbox} />}
      </div>
      {question.value && <Ask question={question.value} close={() => (question.value = undefined)} />}
      {opened.value === "lab" && sandbox && <JupyterLab sandbox={sandbox} close={close} />}
      {opened.value === "ports" && <Ports id={id} close={close} />}
      {opened.value === "shares" && <Shares id={id} close={close} />}
      {opened.value === "snapshots" && <Snapshots id={id} close={close} />}
      {opened.value === "timeline" && <Timeline id={id} close={close} />}
    </>
  );
}

/** What the kernel does, and who holds it. */
function BoxState({ box }: { box: Box }) {
  const link = box.link.value.state;
  if (link === "gone") return <span class="state bad">✕ ended</span>;
  if (link === "paused") return <span class="state">❙❙ paused</span>;
  const running = box.entries.value.find((each) => each.value.kind === "cell" && each.value.state === "running");
  const held = box.held.value;
  const waiting = box.waitingCount.value;
  return (
    <span class="states" aria-live="off">
      {box.asks.value ? (
        <span class="state asks">? asks for input</span>
      ) : running ? (
        <span class="state busy">
          ● busy {running.value.kind === "cell" && clock((now.value - running.value.startedAt) / 1000)}
        </span>
      ) : (
        <span class={box.kernel.value === "dead" ? "state bad" : "state"}>
          {box.kernel.value === "idle" ? "○ idle" : `◌ ${box.kernel.value}`}
        </span>
      )}
      {waiting > 0 && <span class="muted"> · {waiting} waiting</span>}
      {held && <span class="held"> · held by {held.isMine ? "you" : safe(held.by.name)}</span>}
    </span>
  );
}

function TimeLeft({ sandbox }: { sandbox: Sandbox }) {
  const work = useWork();
  const left = (Date.parse(sandbox.endAt) - now.value) / 1000;
  if (sandbox.status === "paused") return null;
  return (
    <span class="left">
      <span class={left < 60 ? "short" : "muted"} title="Time left">
        {clock(left)}
      </span>
      <button
        type="button"
        class="quiet"
        hidden={!may("own")}
        title="Let it live 10 minutes longer"
        onClick={() => work.run(() => send("POST", of(sandbox.sandboxID, "/refreshes"), { duration: extended(left) }))}
      >
        +10 min
      </button>
      <Trouble error={work.error.value} />
    </span>
  );
}

/** The dialogs that are about a whole sandbox. */
type Opened = "lab" | "ports" | "snapshots" | "shares" | "timeline";

/** One of the copies that a fork has made, or why there is none. */
interface Forked {
  sandbox?: Sandbox;
  error?: { code: number; error: string; message: string };
}

interface ActionsProps {
  box: Box;
  stream: Stream;
  sandbox: Sandbox | undefined;
  ask: (question: Question) => void;
  open: (dialog: Opened) => void;
}

/** What can be done with the whole sandbox. */
function Actions({ box, stream, sandbox, ask, open }: ActionsProps) {
  const work = useWork();
  const held = box.held.value;
  const isPaused = box.link.value.state === "paused";
  if (isPaused) return null;
  return (
    <div class="row actions" role="toolbar" aria-label="Actions">
      <Trouble error={work.error.value} />
      <button
        type="button"
        hidden={!may("use")}
        aria-label="Interrupt"
        onClick={() => stream.send({ type: "interrupt" })}
        title="Stop the cell that runs (i i)"
      >
        <span class="stop" aria-hidden="true">
          ■
        </span>
        <span class="wide">Interrupt</span>
      </button>
      {offers("hold") && may("use") && (
        <button
          type="button"
          class="optional"
          aria-pressed={held?.isMine === true}
          disabled={held !== undefined && !held.isMine}
          title="Cells of other clients wait until you let them run"
          onClick={() => stream.send(held?.isMine ? { type: "release" } : { type: "hold", seconds: 600 })}
        >
          {held?.isMine ? "Let others run" : "Hold others"}
        </button>
      )}
      <button
        type="button"
        class="optional"
        data-restart
        hidden={!may("use")}
        onClick={() => ask(restarting(() => stream.send({ type: "restart" })))}
      >
        Restart…
      </button>
      <Menu label="More">
        <button type="button" onClick={() => exportNotebook(box, work)}>
          Save as notebook
        </button>
        {may("own") && <OwnActions box={box} sandbox={sandbox} ask={ask} open={open} work={work} />}
      </Menu>
    </div>
  );
}

type OwnProps = Omit<ActionsProps, "stream"> & { work: ReturnType<typeof useWork> };

/** What only the owner of a sandbox may do. */
function OwnActions({ box, sandbox, ask, open, work }: OwnProps) {
  const fork = async () => {
    const [made]: Forked[] = await (await send("POST", of(box.id, "/fork"), {})).json();
    if (made?.error) throw new ApiError(made.error.code, made.error.error, made.error.message);
    if (made?.sandbox) go(made.sandbox.sandboxID);
  };
  return (
    <>
      <button type="button" disabled={!sandbox} onClick={() => open("lab")}>
        Open in JupyterLab…
      </button>
      {offers("share") && (
        <button type="button" onClick={() => open("shares")}>
          Share…
        </button>
      )}
      <button type="button" onClick={() => open("ports")}>
        Ports…
      </button>
      {offers("snapshot") && (
        <button type="button" onClick={() => open("snapshots")}>
          Snapshots…
        </button>
      )}
      {offers("checkpoints") && (
        <button type="button" onClick={() => open("timeline")}>
          Timeline…
        </button>
      )}
      {offers("fork") && (
        <button type="button" onClick={() => work.run(fork)}>
          Fork and open the copy
        </button>
      )}
      {offers("pause") && (
        <button type="button" onClick={() => ask(pausing(box.id))}>
          Pause…
        </button>
      )}
      <button type="button" class="bad" onClick={() => ask(ending(box.id))}>
        End…
      </button>
    </>
  );
}

function exportNotebook(box: Box, work: ReturnType<typeof useWork>): void {
  void work.run(async () => {
    const answer = await send("GET", of(box.id, "/export"));
    save(`${box.id}.ipynb`, await answer.blob());
    said.value = "The notebook is saved.";
  });
}

/** What is wrong with the connection or the sandbox, and what can be done about it. */
function Banner({ box, stream }: { box: Box; stream: Stream }) {
  const work = useWork();
  const { state, since, reason } = box.link.value;
  if (state === "lost") {
    const seconds = (now.value - since) / 1000;
    if (seconds < 0.5) return null;
    return (
      <p class="banner" role="alert">
        {reason} {clock(seconds)}, trying again. Cells go on.
      </p>
    );
  }
  if (state === "paused") {
    const resume = () => send("POST", of(box.id, "/resume"), {});
    return (
      <div class="banner" role="status">
        <p>The sandbox is paused. Its variables, files and programs are on disk.</p>
        <button
          type="button"
          class="primary"
          hidden={!may("own")}
          onClick={() => work.run(resume, () => stream.connect())}
        >
          {work.isBusy.value ? "Resuming …" : "Resume"}
        </button>
        <Trouble error={work.error.value} />
      </div>
    );
  }
  if (state !== "gone") return null;
  const word = Object.keys(REASONS).find((each) => new RegExp(`\\b${each}\\b`).test(reason));
  return (
    <div class="banner bad" role="alert">
      <p>
        <strong>The sandbox has ended{word ? `, because ${REASONS[word]}` : ""}.</strong>{" "}
        <span class="muted">{safe(reason)}</span>
      </p>
      <button type="button" onClick={() => save(`${box.id}.ipynb`, notebook(box))}>
        Save as notebook
      </button>
      <button type="button" hidden={!may("own")} onClick={() => go()}>
        All sandboxes
      </button>
    </div>
  );
}
