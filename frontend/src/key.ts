/** The key: in memory and in `sessionStorage`, shared with other tabs, never in an address. */
import { signal } from "@preact/signals";

const NAME = "cellvm.key";

/** The key that is signed in with; empty when nobody is. */
export const key = signal("");

const SHARE = "cellvm.share";

/** What the link of this tab lets one do, and with which sandbox. */
export interface Share {
  mode: "watch" | "use";
  id: string;
}

/** The link that this tab was opened with; undefined for whoever has a key of their own. */
export const share = signal<Share | undefined>(undefined);

/** Whether whoever is here may use a sandbox, or decide about it as its owner does. The server checks it, too. */
export function may(what: "use" | "own"): boolean {
  return !share.value || (what === "use" && share.value.mode === "use");
}

type Told = { ask: true } | { key: string };
const tabs = new BroadcastChannel(NAME);

/** Finds the key: in the address (`#key=…`, which is wiped at once), in this tab's storage, or in another tab. */
export function findKey(): void {
  if (!takeFromAddress()) {
    share.value = JSON.parse(sessionStorage.getItem(SHARE) ?? "null") ?? undefined;
    key.value = sessionStorage.getItem(NAME) ?? "";
  }
  addEventListener("hashchange", takeFromAddress); // somebody pastes the address into a tab that has the page already
  tabs.onmessage = ({ data }: MessageEvent<Told>) => {
    if (share.value) return; // a link is this tab's alone
    if ("ask" in data) {
      if (key.value) tabs.postMessage({ key: key.value } satisfies Told);
    } else if (data.key && !key.value) keep(data.key);
    else if (!data.key) keep("");
  };
  if (!key.value && !share.value) tabs.postMessage({ ask: true } satisfies Told);
}

function takeFromAddress(): boolean {
  const link = /^#(watch|use)=([\w-]+)&at=([\w-]+)$/.exec(location.hash);
  if (link) {
    const [, mode, given = "", id = ""] = link;
    history.replaceState(null, "", `${location.pathname}#/${id}`);
    take({ mode: mode === "use" ? "use" : "watch", id });
    keep(given);
    return true;
  }
  const given = /^#key=([!-~]+)$/.exec(location.hash)?.[1];
  if (!given) return false;
  history.replaceState(null, "", location.pathname);
  signIn(decodeURIComponent(given));
  return true;
}

/** Takes a key for this tab and for those that have none. */
export function signIn(given: string): void {
  take(undefined);
  keep(given);
  tabs.postMessage({ key: given } satisfies Told);
}

/** Forgets the key, in all tabs. */
export function signOut(): void {
  keep("");
  tabs.postMessage({ key: "" } satisfies Told);
}

/** Forgets a key that the server does not know any more, in this tab. */
export function forgetKey(): void {
  keep("");
}

function take(link: Share | undefined): void {
  share.value = link;
  if (link) sessionStorage.setItem(SHARE, JSON.stringify(link));
  else sessionStorage.removeItem(SHARE);
}

function keep(given: string): void {
  key.value = given;
  if (given) sessionStorage.setItem(NAME, given);
  else sessionStorage.removeItem(NAME);
}

/** The key as a WebSocket's subprotocol, because a page can set no header of one. */
export function keyProtocol(): string {
  const bytes = new TextEncoder().encode(key.value);
  const encoded = btoa(String.fromCharCode(...bytes));
  return `cellvm.key.${encoded.replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "")}`;
}
