/** What several screens do with a sandbox, and what they ask before something is lost. */
import { of, send } from "./api";
import { type Sandbox, said } from "./store";
import type { Question } from "./ui";

/** Seconds that a sandbox of this page lives at first. It can be extended. */
const LIFETIME = 1800;

/** Creates a sandbox of a template or a snapshot, with further fields of the request, and returns its id. */
export async function create(templateID: string, fields: object = {}): Promise<string> {
  const made: Sandbox = await (await send("POST", "/sandboxes", { templateID, timeout: LIFETIME, ...fields })).json();
  return made.sandboxID;
}

/** Ten minutes more than what is left, as far as the server allows. */
export function extended(left: number): number {
  return Math.min(Math.max(Math.round(left), 0) + 600, 3600);
}

/** Asks whether to restart a kernel. */
export function restarting(act: Question["act"]): Question {
  return {
    title: "Restart the kernel?",
    text: "All variables are lost, and the cell that runs is ended. Files stay.",
    button: "Restart",
    act,
  };
}

/** Asks whether to pause a sandbox. */
export function pausing(id: string): Question {
  return {
    title: "Pause this sandbox?",
    text: "All of it is saved to disk, with its variables. It costs no memory until it is resumed.",
    button: "Pause",
    act: () => done("Paused.", send("POST", of(id, "/pause"), {})),
  };
}

/** Asks whether to end a sandbox. */
export function ending(id: string): Question {
  return {
    title: "End this sandbox?",
    text: "Its variables, files and programs are gone for good. Save the notebook first if you need it.",
    button: "End",
    act: () => done("Ended.", send("DELETE", of(id))),
  };
}

async function done(what: string, work: Promise<unknown>): Promise<void> {
  await work;
  said.value = what;
}
