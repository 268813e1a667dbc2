import { useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { get, of, send } from "../api";
import { Dialog, Trouble, useWork } from "../ui";

interface Opened {
  allPublic: boolean;
  ports: { port: number; host: string }[];
}

/** The services of a sandbox: an open port has an address, which leads to a tab of its own (docs/ports.md). */
export function Ports({ id, close }: { id: string; close: () => void }) {
  const found = useSignal<Opened | undefined>(undefined);
  const port = useSignal("8000");
  const work = useWork();
  const list = async () => {
    found.value = await get<Opened>(of(id, "/ports"));
  };
  useEffect(() => void work.run(list), []);
  const set = (body: { port?: number; public: boolean }) =>
    work.run(async () => {
      await send("PUT", of(id, "/ports"), body);
      await list();
    });
  return (
    <Dialog title="Ports" close={close} isWide>
      <p>
        A service that listens in the sandbox can be opened in a tab of its own. Whoever has the address of an open port
        can use it without a key, until it is closed.
      </p>
      <form
        class="row"
        onSubmit={(event) => {
          event.preventDefault();
          void set({ port: Number(port.value), public: true });
        }}
      >
        <label for="port">Port</label>
        <input
          id="port"
          type="number"
          min={1}
          max={65535}
          required
          value={port.value}
          onInput={(event) => {
            port.value = event.currentTarget.value;
          }}
        />
        <button type="submit" class="primary" disabled={work.isBusy.value}>
          Open
        </button>
      </form>
      <Trouble error={work.error.value} />
      {found.value?.allPublic && (
        <p class="notice">
          All ports of this sandbox are open.{" "}
          <button type="button" onClick={() => set({ public: false })}>
            Close all
          </button>
        </p>
      )}
      <ul class="things">
        {found.value?.ports.map((each) => (
          <li key={each.port}>
            <a class="grow" href={addressOf(each.host)} target="_blank" rel="noopener noreferrer">
              {each.port} <span class="muted">{addressOf(each.host)}</span>
            </a>
            <button
              type="button"
              class="quiet"
              aria-label={`Close port ${each.port}`}
              onClick={() => set({ port: each.port, public: false })}
            >
              Close
            </button>
          </li>
        ))}
      </ul>
    </Dialog>
  );
}

/** The address of a service. A domain without a port is behind the port of this page. */
function addressOf(host: string): string {
  const port = host.includes(":") || !location.port ? "" : `:${location.port}`;
  return `${location.protocol}//${host}${port}/`;
}
