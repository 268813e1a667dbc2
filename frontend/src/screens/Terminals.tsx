import { useSignal } from "@preact/signals";
import { useEffect, useLayoutEffect, useRef } from "preact/hooks";
import { get, of, send } from "../api";
import { toRegion } from "../regions";
import { go, to } from "../route";
import { commandPath, TerminalView } from "../terminal";
import { Ask, type Question, Trouble, useWork } from "../ui";
import { safe } from "../words";

interface Command {
  pid: number | null;
  cmd: string;
  pty: object | null;
  status: string;
}

const SHELL = { cmd: "bash", args: ["-i", "-l"], pty: { rows: 24, cols: 80 } };

/** The sandbox's shells, as tabs. They outlive the page, so a reload attaches again. */
export function Terminals({ id, pid, isGone }: { id: string; pid: string; isGone: boolean }) {
  const shells = useSignal<Command[] | undefined>(undefined);
  const question = useSignal<Question | undefined>(undefined);
  const work = useWork();
  const list = () =>
    get<Command[]>(of(id, "/commands")).then((found) => {
      shells.value = found.filter(
        (each) => each.pty !== null && (each.status === "running" || String(each.pid) === pid),
      );
    });
  const start = async () => {
    const made: Command = await (await send("POST", of(id, "/commands"), SHELL)).json();
    go(id, "terminal", String(made.pid));
    await list();
  };
  const open = () => work.run(start);
  useEffect(() => {
    if (isGone) return;
    void work.run(async () => {
      await list();
      const first = shells.value?.[0];
      if (pid) return;
      if (first) location.replace(to(id, "terminal", String(first.pid)));
      else await start();
    });
  }, [id]);
  const end = (shell: Command) =>
    send("POST", `${commandPath(id, String(shell.pid))}/signal`, { signal: "SIGKILL" }).then(() => {
      shells.value = shells.value?.filter((each) => each !== shell);
      go(id, "terminal", String(shells.value?.[0]?.pid ?? ""));
    });
  return (
    <main class="terminals" aria-label="Terminals">
      <div class="tabs">
        {shells.value?.map((each) => (
          <span key={each.pid} class="tab" data-current={String(each.pid) === pid}>
            <a href={to(id, "terminal", String(each.pid))} aria-current={String(each.pid) === pid ? "page" : undefined}>
              {safe(each.cmd)} <code class="muted">{each.pid}</code>
            </a>
            <button
              type="button"
              class="quiet icon"
              aria-label={`End ${safe(each.cmd)} ${each.pid}`}
              onClick={() => {
                question.value = {
                  title: "End this shell?",
                  text: "What runs in it gets SIGHUP. Files stay.",
                  button: "End",
                  act: () => end(each),
                };
              }}
            >
              ✕
            </button>
          </span>
        ))}
        <button type="button" class="quiet" disabled={isGone || work.isBusy.value} onClick={open}>
          + New shell
        </button>
      </div>
      <Trouble error={work.error.value} again={open} />
      {pid && !isGone && <Shell key={pid} id={id} pid={pid} />}
      {question.value && <Ask question={question.value} close={() => (question.value = undefined)} />}
    </main>
  );
}

function Shell({ id, pid }: { id: string; pid: string }) {
  const place = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    const view = new TerminalView(commandPath(id, pid), `Terminal ${pid}. F6 leaves it.`, () => toRegion(1));
    place.current?.replaceChildren(view.element);
    return () => view.close();
  }, [id, pid]);
  return <div class="terminal" ref={place} />;
}
