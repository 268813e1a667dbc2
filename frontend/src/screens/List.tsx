import { useSignal } from "@preact/signals";
import { useRef } from "preact/hooks";
import { create, ending, extended, pausing, restarting } from "../actions";
import { of, send } from "../api";
import { signOut } from "../key";
import { go, to } from "../route";
import {
  type Ended,
  ended,
  feedTrouble,
  health,
  now,
  offers,
  type Sandbox,
  said,
  sandboxes,
  type Template,
  templates,
} from "../store";
import { Ask, Later, Menu, type Question, Trouble, useWork } from "../ui";
import { bytes, clock, REASONS, safe, time } from "../words";
import { HelpButton } from "./Help";
import { Snapshots } from "./Snapshots";
import { ThemeMenu } from "./Theme";

/** All sandboxes of the key, live. */
export function List() {
  const filter = useSignal("");
  const isEnded = useSignal(false);
  const question = useSignal<Question | undefined>(undefined);
  const all = sandboxes.value;
  const still = useRef<Sandbox[] | undefined>(undefined);
  const isPointedAt = useSignal(false);
  // Rows keep their places while the pointer is over the table, so that no click meets another row.
  if (!isPointedAt.value || !still.current) still.current = all;
  const rows = isPointedAt.value && all && still.current ? inOrderOf(all, still.current) : all;
  const wanted = filter.value.toLowerCase();
  const found = rows?.filter((each) => searchable(each).includes(wanted));
  const gone = ended.value.filter((each) => `${each.sandboxID} ${each.templateID}`.toLowerCase().includes(wanted));
  return (
    <>
      <header class="top">
        <h1 class="brand">
          <img src="ui/icon.svg" alt="" width="22" height="22" /> CellVM
        </h1>
        <ServerState />
        <span class="grow" />
        <NewSandbox />
        <HelpButton />
        <ThemeMenu />
        <button type="button" class="quiet" onClick={signOut}>
          Sign out
        </button>
      </header>
      <main class="list">
        {feedTrouble.value && (
          <p class="banner" role="alert">
            {feedTrouble.value} Trying again.
          </p>
        )}
        {!all && (
          <Later>
            <div class="skeleton" aria-hidden="true" />
          </Later>
        )}
        {all && all.length === 0 && gone.length === 0 && !wanted && <Empty />}
        {all && (all.length > 0 || gone.length > 0 || wanted) && (
          <>
            <div class="filters">
              <input
                type="search"
                aria-label="Filter by name, id, template or metadata"
                placeholder="Filter by name, id, template, metadata"
                value={filter.value}
                onInput={(event) => {
                  filter.value = event.currentTarget.value;
                }}
              />
              <fieldset class="choice" aria-label="Which sandboxes">
                <label>
                  <input type="radio" name="which" checked={!isEnded.value} onChange={() => (isEnded.value = false)} />
                  <span>Running {all.length}</span>
                </label>
                <label>
                  <input type="radio" name="which" checked={isEnded.value} onChange={() => (isEnded.value = true)} />
                  <span>Ended, 24 h {ended.value.length}</span>
                </label>
              </fieldset>
            </div>
            {isEnded.value ? (
              <EndedTable rows={gone} />
            ) : (
              <table
                class="cards"
                onPointerEnter={() => (isPointedAt.value = true)}
                onPointerLeave={() => (isPointedAt.value = false)}
              >
                <thead>
                  <tr>
                    <th scope="col">Sandbox</th>
                    <th scope="col">Template</th>
                    <th scope="col">Kernel</th>
                    <th scope="col" class="number">
                      CPU
                    </th>
                    <th scope="col" class="number">
                      Memory
                    </th>
                    <th scope="col" class="number">
                      Time left
                    </th>
                    <th scope="col">
                      <span class="hidden">Actions</span>
                    </th>
                  </tr>
                </thead>
                <tbody>
                  {found?.map((each) => (
                    <Row key={each.sandboxID} sandbox={each} ask={(asked) => (question.value = asked)} />
                  ))}
                </tbody>
              </table>
            )}
            {!isEnded.value && found?.length === 0 && <p class="muted none">No sandbox here.</p>}
          </>
        )}
      </main>
      {question.value && <Ask question={question.value} close={() => (question.value = undefined)} />}
    </>
  );
}

function inOrderOf(all: Sandbox[], order: Sandbox[]): Sandbox[] {
  const place = new Map(order.map((each, index) => [each.sandboxID, index]));
  return [...all].sort((a, b) => (place.get(a.sandboxID) ?? 1e9) - (place.get(b.sandboxID) ?? 1e9));
}

function searchable(sandbox: Sandbox): string {
  const { sandboxID, templateID, metadata } = sandbox;
  return [sandboxID, templateID, ...Object.entries(metadata).flat()].join(" ").toLowerCase();
}

/** How many sandboxes there are, and whether they are a boundary. */
function ServerState() {
  const told = health.value;
  if (!told) return null;
  const isBoundary = told.accelerator === "kvm";
  return (
    <p class="muted server">
      {sandboxes.value?.length ?? told.sandboxes} of {told.maxSandboxes} sandboxes
      <span class={isBoundary ? "chip" : "chip warn"}>
        {told.accelerator}
        {!isBoundary && " · no security boundary"}
      </span>
    </p>
  );
}

function Row({ sandbox, ask }: { sandbox: Sandbox; ask: (question: Question) => void }) {
  const work = useWork();
  const { sandboxID: id, metadata, usage } = sandbox;
  const left = (Date.parse(sandbox.endAt) - now.value) / 1000;
  const isPaused = sandbox.status === "paused";
  const act = (what: string, method: string, path: string, body?: unknown) =>
    work.run(
      () => send(method, path, body),
      () => {
        said.value = what;
      },
    );
  const kernel = `/api/kernels/${sandbox.kernelID}`;
  return (
    <tr>
      <th scope="row">
        <a href={to(id)}>{safe(metadata["name"] ?? "") || "unnamed"}</a>
        <code class="id">{id.slice(0, 12)}</code>
        <Trouble error={work.error.value} />
      </th>
      <td data-label="Template">{sandbox.templateID}</td>
      <td data-label="Kernel">
        <KernelState sandbox={sandbox} />
      </td>
      <td class="number" data-label="CPU">
        {usage ? `${Math.round(usage.cpuUsedPct)} %` : "–"}
      </td>
      <td class="number" data-label="Memory">
        {usage ? bytes(usage.memUsed) : "–"}
      </td>
      <td class={left < 60 && !isPaused ? "number short" : "number"} data-label="Time left">
        {isPaused ? "–" : clock(left)}
      </td>
      <td class="actions">
        <button
          type="button"
          class="quiet icon"
          aria-label={`Interrupt ${safe(metadata["name"] ?? id)}`}
          title="Interrupt the cell that runs"
          disabled={sandbox.kernel?.state !== "busy"}
          onClick={() => act("Interrupted.", "POST", `${kernel}/interrupt`)}
        >
          ■
        </button>
        <Menu label={`More for ${safe(metadata["name"] ?? id)}`}>
          <button type="button" onClick={() => go(id)}>
            Open
          </button>
          <button
            type="button"
            onClick={() => act("Extended.", "POST", of(id, "/refreshes"), { duration: extended(left) })}
          >
            10 more minutes
          </button>
          <button type="button" onClick={() => ask(restarting(() => act("Restarted.", "POST", `${kernel}/restart`)))}>
            Restart kernel…
          </button>
          {isPaused ? (
            <button type="button" onClick={() => act("Resumed.", "POST", of(id, "/resume"), {})}>
              Resume
            </button>
          ) : (
            offers("pause") && (
              <button type="button" onClick={() => ask(pausing(id))}>
                Pause…
              </button>
            )
          )}
          <button type="button" class="bad" onClick={() => ask(ending(id))}>
            End…
          </button>
        </Menu>
      </td>
    </tr>
  );
}

/** What a kernel does, by a sign and a word. */
export function KernelState({ sandbox }: { sandbox: Sandbox }) {
  const { kernel } = sandbox;
  if (sandbox.status === "paused") return <span class="state">❙❙ paused</span>;
  if (!kernel) return <span class="state">○ {sandbox.status}</span>;
  if (kernel.asks) return <span class="state asks">? asks for input</span>;
  const since = clock(now.value / 1000 - kernel.since);
  switch (kernel.state) {
    case "busy":
      return (
        <span class="state busy">
          ● busy {since} {kernel.by && <span class="muted">{safe(kernel.by.name)}</span>}
        </span>
      );
    case "idle":
      return <span class="state">○ idle {since}</span>;
    case "dead":
      return <span class="state bad">✕ dead</span>;
    default:
      return <span class="state">◌ {kernel.state}</span>;
  }
}

function EndedTable({ rows }: { rows: Ended[] }) {
  if (!rows.length) return <p class="muted none">Nothing has ended within a day.</p>;
  return (
    <table class="cards">
      <thead>
        <tr>
          <th scope="col">Sandbox</th>
          <th scope="col">Template</th>
          <th scope="col">Ended</th>
          <th scope="col">Why</th>
        </tr>
      </thead>
      <tbody>
        {rows.map((each) => (
          <tr key={each.sandboxID}>
            <th scope="row">
              <code class="id">{each.sandboxID}</code>
            </th>
            <td data-label="Template">{each.templateID}</td>
            <td data-label="Ended">{time(each.at)}</td>
            <td data-label="Why">
              {REASONS[each.reason] ?? each.reason} <code class="muted">{each.reason}</code>
            </td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

function NewSandbox() {
  const work = useWork();
  const isChoosing = useSignal(false);
  const hasWaysBack = useSignal(false);
  const fields = hasWaysBack.value ? { checkpoints: "cell" } : {};
  return (
    <>
      <Trouble error={work.error.value} />
      <Menu label="New sandbox" look="primary" text={work.isBusy.value ? "Starting …" : "+ New sandbox"}>
        {templates.value.map((each) => (
          <button key={each.templateID} type="button" onClick={() => open(work, each, fields)}>
            <strong>{each.templateID}</strong>
            <small class="muted">
              {each.cpuCount} CPU, {bytes(each.memoryMB * 1e6)}
            </small>
          </button>
        ))}
        {offers("snapshot") && (
          <button type="button" onClick={() => (isChoosing.value = true)}>
            From a snapshot…
          </button>
        )}
        {offers("checkpoints") && (
          // The menu stays open, because a choice of a template follows.
          <label onClick={(event) => event.stopPropagation()}>
            <input
              type="checkbox"
              checked={hasWaysBack.value}
              onChange={(event) => (hasWaysBack.value = event.currentTarget.checked)}
            />
            Checkpoint after each cell
          </label>
        )}
      </Menu>
      {isChoosing.value && <Snapshots close={() => (isChoosing.value = false)} />}
    </>
  );
}

function open(work: ReturnType<typeof useWork>, template: Template, fields: object = {}): void {
  void work.run(async () => go(await create(template.templateID, fields)));
}

function Empty() {
  const work = useWork();
  return (
    <section class="empty">
      <h2>No sandbox runs</h2>
      <p class="muted">A sandbox is a small machine of its own, with a live Python kernel. Start one:</p>
      <p class="row center">
        {templates.value.map((each, index) => (
          <button
            key={each.templateID}
            type="button"
            class={index ? "" : "primary"}
            disabled={work.isBusy.value}
            onClick={() => open(work, each)}
          >
            {each.templateID}
          </button>
        ))}
      </p>
      <Trouble error={work.error.value} />
      <p class="muted">Or let a program do it. What it runs shows up here as it happens:</p>
      <pre class="sample">{`curl -X POST ${location.origin}/sandboxes -H "Authorization: Bearer $KEY" \\
  -H "Content-Type: application/json" -d '{"templateID": "code_interpreter"}'`}</pre>
    </section>
  );
}
