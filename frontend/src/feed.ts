/** The live list of sandboxes: a stream of JSON lines while the page is visible, because a hidden one needs none. */
import { effect } from "@preact/signals";
import { ApiError, get, lines, of, send } from "./api";
import { key, share } from "./key";
import {
  type Ended,
  ended,
  feedTrouble,
  type Health,
  health,
  type Sandbox,
  sandboxes,
  type Template,
  templates,
} from "./store";

/** Milliseconds between two tries. */
const PAUSE = 2000;
const DAY = 24 * 3600 * 1000;

type Line =
  | { type: "snapshot"; sandboxes: Sandbox[] }
  | { type: "sandbox"; sandbox: Sandbox }
  | { type: "gone"; sandboxID: string };

/** Follows the list, or the one sandbox of a link, for as long as somebody is signed in. */
export function follow(): void {
  let stop = new AbortController();
  const begin = () => {
    stop.abort();
    stop = new AbortController();
    if (key.value && document.visibilityState === "visible") void run(stop.signal);
  };
  document.addEventListener("visibilitychange", begin);
  addEventListener("online", begin);
  effect(() => {
    if (!key.value) {
      sandboxes.value = undefined;
      ended.value = [];
    }
    begin();
  });
}

async function run(stop: AbortSignal): Promise<void> {
  while (!stop.aborted) {
    try {
      if (share.value) {
        health.value ??= await get<Health>("/health", { signal: stop });
        return await watch(share.value.id, stop);
      }
      const [told, offered] = await Promise.all([
        get<Health>("/health", { signal: stop }),
        get<Template[]>("/templates", { signal: stop }),
      ]);
      health.value = told;
      templates.value = offered;
      await listen(stop);
    } catch (error) {
      if (stop.aborted) return;
      feedTrouble.value = error instanceof ApiError ? error.message : "The server can't be reached.";
    }
    await new Promise((resolve) => setTimeout(resolve, PAUSE));
  }
}

/** Reads the one sandbox that a link is for, because it has no list. */
async function watch(id: string, stop: AbortSignal): Promise<void> {
  while (!stop.aborted) {
    sandboxes.value = [await get<Sandbox>(of(id), { signal: stop })];
    await new Promise((resolve) => setTimeout(resolve, PAUSE));
  }
}

async function listen(stop: AbortSignal): Promise<void> {
  const answer = await send("GET", "/sandboxes", undefined, {
    signal: stop,
    headers: { Accept: "application/x-ndjson" },
  });
  void readEnded();
  for await (const line of lines<Line>(answer)) {
    feedTrouble.value = "";
    const known = sandboxes.value ?? [];
    switch (line.type) {
      case "snapshot":
        sandboxes.value = line.sandboxes;
        break;
      case "sandbox": {
        const { sandbox } = line;
        const at = known.findIndex((each) => each.sandboxID === sandbox.sandboxID);
        sandboxes.value = at < 0 ? [sandbox, ...known] : known.with(at, sandbox);
        break;
      }
      case "gone":
        sandboxes.value = known.filter((each) => each.sandboxID !== line.sandboxID);
        void readEnded();
    }
  }
}

interface LifecycleEvent {
  sandboxID: string;
  sandboxTemplateId: string;
  data: { reason?: string };
  createdAt: string;
}

/** Reads which sandboxes have ended within a day, and why. */
async function readEnded(): Promise<void> {
  try {
    const found = await get<LifecycleEvent[]>("/events/sandboxes?types=sandbox.lifecycle.killed&limit=100");
    ended.value = found
      .filter((each) => Date.now() - Date.parse(each.createdAt) < DAY)
      .map(({ sandboxID, sandboxTemplateId, data, createdAt }) => ({
        sandboxID,
        templateID: sandboxTemplateId,
        reason: data.reason ?? "",
        at: createdAt,
      })) satisfies Ended[];
  } catch (error) {
    if (!(error instanceof ApiError)) throw error; // a list without the ended ones is better than none
  }
}
