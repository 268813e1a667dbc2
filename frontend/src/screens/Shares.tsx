import { useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { get, of, send } from "../api";
import { now } from "../store";
import { Dialog, Trouble, useWork } from "../ui";
import { clock } from "../words";

interface Share {
  shareID: string;
  mode: string;
  expiresAt: string;
  uses: number;
  url?: string;
}

const SPANS = [
  [3600, "one hour"],
  [24 * 3600, "one day"],
  [7 * 24 * 3600, "one week"],
] as const;

/** Links to one sandbox for other people: made, listed, revoked. */
export function Shares({ id, close }: { id: string; close: () => void }) {
  const found = useSignal<Share[] | undefined>(undefined);
  const made = useSignal<Share | undefined>(undefined);
  const mode = useSignal("watch");
  const seconds = useSignal("3600");
  const work = useWork();
  const list = async () => {
    found.value = await get<Share[]>(of(id, "/share"));
  };
  useEffect(() => void work.run(list), []);
  const make = (event: Event) => {
    event.preventDefault();
    void work.run(async () => {
      const body = { mode: mode.value, seconds: Number(seconds.value) };
      made.value = await (await send("POST", of(id, "/share"), body)).json();
      await list();
    });
  };
  const revoke = (each: Share) =>
    work.run(async () => {
      await send("DELETE", of(id, `/share/${each.shareID}`));
      if (made.value?.shareID === each.shareID) made.value = undefined;
      await list();
    });
  return (
    <Dialog title="Share this sandbox" close={close} isWide>
      <p>
        A link is for this sandbox alone. Whoever has it can watch, or run cells and use files and terminals. It is good
        until its time is over, the sandbox ends, or you revoke it.
      </p>
      <form class="row" onSubmit={make}>
        <label for="mode">Others may</label>
        <select id="mode" value={mode.value} onChange={(event) => (mode.value = event.currentTarget.value)}>
          <option value="watch">watch</option>
          <option value="use">use it</option>
        </select>
        <label for="seconds">for</label>
        <select id="seconds" value={seconds.value} onChange={(event) => (seconds.value = event.currentTarget.value)}>
          {SPANS.map(([span, name]) => (
            <option key={span} value={span}>
              {name}
            </option>
          ))}
        </select>
        <button type="submit" class="primary" disabled={work.isBusy.value}>
          Make a link
        </button>
      </form>
      <Trouble error={work.error.value} />
      {made.value?.url && (
        <div class="row notice">
          <label for="link">Link, shown once</label>
          <input
            id="link"
            class="grow"
            type="text"
            readOnly
            value={made.value.url}
            onFocus={(event) => event.currentTarget.select()}
          />
          <button type="button" onClick={() => navigator.clipboard.writeText(made.value?.url ?? "")}>
            Copy
          </button>
        </div>
      )}
      {found.value?.length === 0 && <p class="muted">There is no link.</p>}
      <ul class="things">
        {found.value?.map((each) => (
          <li key={each.shareID}>
            <span class="grow">
              <strong>{each.mode}</strong>{" "}
              <span class="muted">
                {clock((Date.parse(each.expiresAt) - now.value) / 1000)} left · used {each.uses} times
              </span>
            </span>
            <button type="button" class="quiet" aria-label={`Revoke ${each.shareID}`} onClick={() => revoke(each)}>
              Revoke
            </button>
          </li>
        ))}
      </ul>
    </Dialog>
  );
}
