import { signal } from "@preact/signals";
import { Dialog } from "../ui";

/** Whether the list of keys is open. */
const isOpen = signal(false);

const KEYS = [
  ["Editor", "Shift+Enter, Ctrl+Enter", "run the cell"],
  ["Editor", "↑ ↓ on the first or last line", "earlier cells"],
  ["Editor", "Tab", "complete a name, or indent"],
  ["Editor", "Esc, then Tab", "leave the editor"],
  ["A cell", "↑ ↓", "the cell before or after"],
  ["A cell", "i i", "interrupt"],
  ["A cell", "0 0", "restart the kernel, after a question"],
  ["A cell", "c", "copy its code"],
  ["A cell", ".", "go to the cell that runs"],
  ["A cell", "?", "this list"],
  ["Everywhere", "F6, Shift+F6", "the next part of the page, or the one before, also out of a terminal or an output"],
  ["Dialogs", "Esc", "close"],
] as const;

/** Shows which keys there are. */
export function showKeys(): void {
  isOpen.value = true;
}

/** The button that shows the keys. */
export function HelpButton() {
  return (
    <button type="button" class="quiet icon" aria-label="Keys" title="Keys" onClick={showKeys}>
      ?
    </button>
  );
}

/** The keys of the page, while they are asked for. */
export function Help() {
  if (!isOpen.value) return null;
  return (
    <Dialog title="Keys" close={() => (isOpen.value = false)} isWide>
      <table class="keys">
        <thead>
          <tr>
            <th scope="col">Where</th>
            <th scope="col">Key</th>
            <th scope="col">What it does</th>
          </tr>
        </thead>
        <tbody>
          {KEYS.map(([where, key, what]) => (
            <tr key={where + key}>
              <td>{where}</td>
              <td>
                <kbd>{key}</kbd>
              </td>
              <td>{what}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </Dialog>
  );
}
