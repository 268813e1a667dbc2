import { useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { get, of, send } from "../api";
import { said } from "../store";
import { before, type Checkpoint, type Happened } from "../timeline";
import { Ask, Dialog, type Question, Trouble, useWork } from "../ui";
import { bytes, safe, time } from "../words";

interface Told {
  entries: Happened[];
  bytes: number;
  budget: number;
  trouble: string;
}

/** What happened in a sandbox, the newest first, and the ways back. */
export function Timeline({ id, close }: { id: string; close: () => void }) {
  const told = useSignal<Told | undefined>(undefined);
  const question = useSignal<Question | undefined>(undefined);
  const work = useWork();
  const list = async () => {
    told.value = await get<Told>(of(id, "/timeline"));
  };
  useEffect(() => void work.run(list), []);
  const keep = () =>
    work.run(async () => {
      await send("POST", of(id, "/checkpoints"));
      said.value = "The moment is kept.";
      await list();
    });
  const goBack = (number: number, where: string) => {
    question.value = {
      title: `Go back to ${where}?`,
      text: "Variables, files and programs become as they were then. What has happened since is undone, and a cell that runs is ended.",
      button: "Go back",
      act: async () => {
        await send("POST", of(id, `/checkpoints/${number}/restore`));
        said.value = `The sandbox went back to ${where}.`;
        await list();
      },
    };
  };
  const remove = ({ number }: Checkpoint) =>
    work.run(async () => {
      await send("DELETE", of(id, `/checkpoints/${number}`));
      await list();
    });
  const entries = told.value?.entries ?? [];
  const ways = before(entries);
  return (
    <Dialog title="Timeline" close={close} isWide>
      <p>A checkpoint is this sandbox as it stood: variables, files and programs. The sandbox can go back to it.</p>
      <div class="row">
        <button type="button" class="primary" disabled={work.isBusy.value} onClick={keep}>
          Take a checkpoint
        </button>
        {told.value && (
          <span class="muted">
            {bytes(told.value.bytes)} of {bytes(told.value.budget)} used
          </span>
        )}
      </div>
      <Trouble error={work.error.value} />
      {told.value?.trouble && <p class="trouble">There is no checkpoint after the last cell: {told.value.trouble}.</p>}
      {told.value && entries.length === 0 && <p class="muted">Nothing has happened yet.</p>}
      <ol class="things" reversed>
        {[...entries].reverse().map((each) => (
          <li key={`${each.type} ${each.at}`}>
            <What happened={each} />
            {each.type === "cell" && ways.has(each.id) && (
              <button type="button" onClick={() => goBack(ways.get(each.id) ?? 0, `before cell ${each.number ?? ""}`)}>
                Go back to before cell {each.number}…
              </button>
            )}
            {each.type === "checkpoint" && each.state === "kept" && (
              <>
                <button type="button" onClick={() => goBack(each.number, `checkpoint ${each.number}`)}>
                  Go back to checkpoint {each.number}…
                </button>
                <button
                  type="button"
                  class="quiet"
                  disabled={work.isBusy.value}
                  aria-label={`Delete checkpoint ${each.number}`}
                  onClick={() => remove(each)}
                >
                  Delete
                </button>
              </>
            )}
          </li>
        ))}
      </ol>
      {question.value && <Ask question={question.value} close={() => (question.value = undefined)} />}
    </Dialog>
  );
}

/** One line of the timeline. */
function What({ happened }: { happened: Happened }) {
  switch (happened.type) {
    case "cell":
      return (
        <span class="grow">
          [{happened.number ?? " "}] <code>{safe(happened.code.split("\n")[0] ?? "")}</code>{" "}
          <span class="muted">
            {time(happened.at)}
            {happened.status !== "ok" && ` · ${happened.status}`}
          </span>
        </span>
      );
    case "checkpoint":
      return (
        <span class="grow">
          <strong>Checkpoint {happened.number}</strong>{" "}
          <span class="muted">
            {time(happened.at)} · {happened.state === "kept" ? bytes(happened.bytes) : happened.state}
          </span>
        </span>
      );
    case "restored":
      return (
        <span class="grow">
          ↩ Went back to checkpoint {happened.checkpoint} <span class="muted">{time(happened.at)}</span>
        </span>
      );
  }
}
