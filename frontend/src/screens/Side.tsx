import { useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { get, of, send } from "../api";
import { may } from "../key";
import { type Box, health, offers, type Sandbox } from "../store";
import type { Stream } from "../stream";
import { Sparkline, Trouble, useWork } from "../ui";
import { bytes, safe } from "../words";

interface Reading {
  timestampUnix: number;
  cpuUsedPct: number;
  memUsed: number;
  memTotal: number;
  diskUsed: number;
  diskTotal: number;
}

interface Refusal {
  destination: string;
  port: number;
  protocol: string;
  reason: string;
  count: number;
}

interface Network {
  mechanism: string;
  allowInternetAccess: boolean;
  allowOut: string[];
  denyOut: string[];
  refused: Refusal[];
}

/** Milliseconds between two readings, while they are in view. */
const PAUSE = 5000;
/** Milliseconds after a cell's end before variables are asked for, because another may follow at once. */
const SETTLED = 300;
/** Seconds of the past that are drawn. */
const PAST = 600;

/** What goes on in the sandbox beside its cells. */
export function Side({ box, stream, sandbox }: { box: Box; stream: Stream; sandbox: Sandbox | undefined }) {
  if (sandbox?.status !== "running" || box.link.value.state === "gone") return <aside class="side" hidden />;
  return (
    <aside class="side" aria-label="About the sandbox">
      {offers("variables") && may("use") && <Variables box={box} stream={stream} />}
      <Load id={box.id} />
      {health.value?.network !== "host" && may("own") && <Connections id={box.id} />}
      <About sandbox={sandbox} />
    </aside>
  );
}

/** Types of variables that are no data. */
const NO_DATA = ["module", "function", "type", "builtin_function_or_method", "method", "ZMQExitAutocall"];

/** The variables of the kernel, asked for after each cell and from time to time while one runs. */
function Variables({ box, stream }: { box: Box; stream: Stream }) {
  const changes = box.changes.value;
  const isOpen = box.link.value.state === "open";
  useEffect(() => {
    if (!isOpen) return;
    const ask = () => document.visibilityState === "visible" && stream.send({ type: "variables" });
    const soon = setTimeout(ask, SETTLED);
    const timer = setInterval(ask, PAUSE);
    return () => {
      clearTimeout(soon);
      clearInterval(timer);
    };
  }, [changes, isOpen]);
  const found = box.variables.value?.filter((each) => !NO_DATA.includes(each.type));
  return (
    <section>
      <h2>Variables</h2>
      {!found?.length && <p class="muted">None yet.</p>}
      {found && found.length > 0 && (
        <dl class="variables">
          {found.map((each) => (
            <div key={each.name}>
              <dt>
                <code>{safe(each.name)}</code> <span class="muted">{safe(each.type)}</span>
              </dt>
              <dd title={safe(each.value)}>{safe(each.value)}</dd>
            </div>
          ))}
        </dl>
      )}
    </section>
  );
}

function Load({ id }: { id: string }) {
  const readings = useReading<Reading[]>(() => of(id, `/metrics?start=${Math.floor(Date.now() / 1000) - PAST}`));
  const last = readings?.at(-1);
  return (
    <section>
      <h2>Load</h2>
      {!last && <p class="muted">No reading yet.</p>}
      {last && (
        <dl class="load">
          <Line
            name="CPU"
            values={readings?.map((each) => each.cpuUsedPct)}
            top={100}
            text={`${Math.round(last.cpuUsedPct)} %`}
          />
          <Line
            name="Memory"
            values={readings?.map((each) => each.memUsed)}
            top={last.memTotal}
            text={bytes(last.memUsed)}
          />
          <Line
            name="Disk"
            values={readings?.map((each) => each.diskUsed)}
            top={last.diskTotal}
            text={bytes(last.diskUsed)}
          />
        </dl>
      )}
    </section>
  );
}

function Line({ name, values, top, text }: { name: string; values: number[] | undefined; top: number; text: string }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>
        <Sparkline values={values ?? []} top={top} />
        <span class="number">{text}</span>
      </dd>
    </div>
  );
}

/** What the sandbox tried to reach and was refused, and a way to allow it that keeps the rest of the policy. */
function Connections({ id }: { id: string }) {
  const network = useReading<Network>(() => of(id, "/network"));
  const work = useWork();
  if (!network) return null;
  const allow = (destination: string) =>
    work.run(async () => {
      const { allowInternetAccess, allowOut, denyOut } = await get<Network>(of(id, "/network"));
      await send("PUT", of(id, "/network"), { allowInternetAccess, denyOut, allowOut: [...allowOut, destination] });
    });
  return (
    <section>
      <h2>Network</h2>
      {network.refused.length === 0 && <p class="muted">Nothing was refused.</p>}
      <ul class="refused">
        {network.refused.slice(0, 20).map((each) => (
          <li key={`${each.destination}:${each.port}/${each.protocol}`}>
            <code>
              {safe(each.destination)}
              {each.port > 0 && `:${each.port}`}
            </code>{" "}
            ×{each.count}
            <span class="muted"> {safe(each.reason)}</span>
            <button type="button" class="quiet" onClick={() => allow(each.destination)}>
              Allow
            </button>
          </li>
        ))}
      </ul>
      <Trouble error={work.error.value} />
    </section>
  );
}

function About({ sandbox }: { sandbox: Sandbox }) {
  return (
    <section>
      <h2>Sandbox</h2>
      <dl class="about">
        <dt>Id</dt>
        <dd>
          <code>{sandbox.sandboxID}</code>
        </dd>
        <dt>Template</dt>
        <dd>{sandbox.templateID}</dd>
        <dt>Machine</dt>
        <dd>
          {sandbox.cpuCount} CPU, {bytes(sandbox.memoryMB * 1e6)}
        </dd>
        {Object.entries(sandbox.metadata).map(([name, value]) => (
          <>
            <dt>{safe(name)}</dt>
            <dd>{safe(value)}</dd>
          </>
        ))}
      </dl>
    </section>
  );
}

/** What the server answers, read again from time to time while the page is visible. */
function useReading<T>(path: () => string): T | undefined {
  const found = useSignal<T | undefined>(undefined);
  useEffect(() => {
    const stop = new AbortController();
    const read = async () => {
      if (document.visibilityState === "hidden") return;
      // A reading that does not come is shown by the banner of the connection, so it is left out here.
      found.value = await get<T>(path(), { signal: stop.signal }).catch(() => found.value);
    };
    void read();
    const timer = setInterval(read, PAUSE);
    return () => {
      clearInterval(timer);
      stop.abort();
    };
  }, []);
  return found.value;
}
