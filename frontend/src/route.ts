/** Where the page is: `#/`, `#/ID`, `#/ID/files/PATH`, `#/ID/terminal/PID`. */
import { signal } from "@preact/signals";

export type Tab = "cells" | "files" | "terminal";

export interface Route {
  /** The sandbox in view; empty for the list. */
  id: string;
  tab: Tab;
  /** The rest: a path, or a terminal's pid. */
  rest: string;
}

export const route = signal<Route>(read());

/** Follows the address. */
export function followAddress(): void {
  route.value = read();
  addEventListener("hashchange", () => {
    route.value = read();
  });
}

/** The address of a place in the page. */
export function to(id = "", tab: Tab = "cells", rest = ""): string {
  if (!id) return "#/";
  return `#/${[id, ...(tab === "cells" ? [] : [tab]), ...(rest ? [encodeURIComponent(rest)] : [])].join("/")}`;
}

/** Goes there. */
export function go(...where: Parameters<typeof to>): void {
  location.hash = to(...where);
}

function read(): Route {
  const [id = "", tab = "", ...rest] = location.hash.replace(/^#\/?/, "").split("/");
  const known: Tab = tab === "files" || tab === "terminal" ? tab : "cells";
  return { id: /^[A-Za-z0-9_-]+$/.test(id) ? id : "", tab: known, rest: decode(rest.join("/")) };
}

function decode(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return "";
  }
}
