/** The painter of code. The editor's part of the page brings it, because it has Python's grammar. */
import { signal } from "@preact/signals";

/** Makes nodes of code; undefined until the editor has come. */
export const highlight = signal<((code: string) => Node[]) | undefined>(undefined);
