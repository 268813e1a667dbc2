/** What happened in a sandbox, and to which moments of it one can go back (docs/rest.md, "Undo"). Pure. */

export type Happened = PastCell | Checkpoint | Return;

export interface PastCell {
  type: "cell";
  id: string;
  number: number | null;
  code: string;
  at: string;
  status: "running" | "ok" | "error" | "unknown";
}

export interface Checkpoint {
  type: "checkpoint";
  number: number;
  at: string;
  bytes: number;
  /** The last cell that was over. */
  cell: string;
  automatic: boolean;
  state: "kept" | "thinned" | "deleted";
}

export interface Return {
  type: "restored";
  checkpoint: number;
  at: string;
}

/** The checkpoint that is the sandbox just before a cell, by the cell's id, for the cells that have one. */
export function before(entries: Happened[]): Map<string, number> {
  const found = new Map<string, number>();
  const kept = new Set(
    entries.flatMap((each) => (each.type === "checkpoint" && each.state === "kept" ? each.number : [])),
  );
  let last = "";
  let current: number | undefined;
  for (const each of entries) {
    if (each.type === "cell") {
      if (current !== undefined && kept.has(current)) found.set(each.id, current);
      last = each.id;
      current = undefined;
    } else if (each.type === "restored") {
      current = each.checkpoint;
    } else if (current === undefined && (each.cell || "") === last) {
      current = each.number; // else a cell ran while it was taken
    }
  }
  return found;
}
