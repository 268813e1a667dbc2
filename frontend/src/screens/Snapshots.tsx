import { useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { create } from "../actions";
import { get, of, send } from "../api";
import { go } from "../route";
import { said } from "../store";
import { Ask, Dialog, type Question, Trouble, useWork } from "../ui";
import { bytes, safe, time } from "../words";

interface Snapshot {
  snapshotID: string;
  names: string[];
  sandboxID: string;
  createdAt: string;
  size: number;
}

/** The snapshots of the key: start from one, or delete it. With a sandbox's `id`, one of it can be taken. */
export function Snapshots({ id, close }: { id?: string; close: () => void }) {
  const found = useSignal<Snapshot[] | undefined>(undefined);
  const name = useSignal("");
  const question = useSignal<Question | undefined>(undefined);
  const work = useWork();
  const list = async () => {
    found.value = await get<Snapshot[]>("/snapshots");
  };
  useEffect(() => void work.run(list), []);
  const take = (event: Event) => {
    event.preventDefault();
    void work.run(async () => {
      await send("POST", of(id ?? "", "/snapshots"), { name: name.value.trim() });
      name.value = "";
      said.value = "The snapshot is taken.";
      await list();
    });
  };
  const remove = (each: Snapshot) => {
    question.value = {
      title: "Delete this snapshot?",
      text: `${called(each)} is deleted for good. Sandboxes that were started from it go on.`,
      button: "Delete",
      act: async () => {
        await send("DELETE", `/snapshots/${encodeURIComponent(each.snapshotID)}`);
        await list();
      },
    };
  };
  return (
    <Dialog title="Snapshots" close={close} isWide>
      <p>
        A snapshot is a sandbox as it stood: variables, files and programs. Each sandbox started from it goes on there.
      </p>
      {id && (
        <form class="row" onSubmit={take}>
          <label for="snapshot">Name</label>
          <input
            id="snapshot"
            type="text"
            placeholder="may be empty"
            value={name.value}
            onInput={(event) => {
              name.value = event.currentTarget.value;
            }}
          />
          <button type="submit" class="primary" disabled={work.isBusy.value}>
            Take a snapshot
          </button>
        </form>
      )}
      <Trouble error={work.error.value} />
      {found.value?.length === 0 && <p class="muted">There is no snapshot yet.</p>}
      <ul class="things">
        {found.value?.map((each) => (
          <li key={each.snapshotID}>
            <span class="grow">
              <strong>{called(each)}</strong>{" "}
              <span class="muted">
                {time(each.createdAt)} · {bytes(each.size)} · of <code>{each.sandboxID.slice(0, 12)}</code>
              </span>
            </span>
            <button
              type="button"
              disabled={work.isBusy.value}
              aria-label={`Start ${called(each)}`}
              onClick={() => work.run(async () => go(await create(each.snapshotID)), close)}
            >
              Start
            </button>
            <button type="button" class="quiet" aria-label={`Delete ${called(each)}`} onClick={() => remove(each)}>
              Delete…
            </button>
          </li>
        ))}
      </ul>
      {question.value && <Ask question={question.value} close={() => (question.value = undefined)} />}
    </Dialog>
  );
}

function called({ names, snapshotID }: Snapshot): string {
  return safe(names[0] ?? "") || snapshotID;
}
