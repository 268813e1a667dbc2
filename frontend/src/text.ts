/** Shows a Screen in the DOM. Printing adds text nodes and renders nothing anew. */
import type { Block, Run, Screen } from "./ansi";

/** Characters that are added in one animation frame, so that a flood leaves time for clicks. */
const FRAME = 256 * 1024;

/** The elements of one Screen, in `element`. Call `close` when they are not shown any more. */
export class TextView {
  readonly element = document.createElement("div");
  private readonly tail = document.createElement("pre");
  private readonly notice = document.createElement("p");
  private readonly drawn: Drawn[] = [];
  private gone = 0;
  private frame = 0;

  constructor(private readonly screen: Screen) {
    this.element.className = "text";
    this.notice.className = "notice";
    this.notice.hidden = true;
    this.element.append(this.notice, this.tail);
    screen.onChange = () => this.soon();
    this.draw();
  }

  close(): void {
    this.screen.onChange = () => {};
    cancelAnimationFrame(this.frame);
  }

  private soon(): void {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.draw();
    });
  }

  private draw(): void {
    const { blocks, droppedBlocks } = this.screen;
    for (; this.gone < droppedBlocks; this.gone += 1) this.drawn.shift()?.element.remove();
    if (this.screen.dropped) {
      this.notice.hidden = false;
      this.notice.textContent = `${this.screen.dropped.toLocaleString()} earlier lines are not kept in this page.`;
    }
    let room = FRAME;
    for (let index = Math.max(this.drawn.length - 1, 0); index < blocks.length; index += 1) {
      const block = blocks[index] as Block;
      let drawn = this.drawn[index];
      if (!drawn) {
        drawn = new Drawn();
        this.drawn.push(drawn);
        this.tail.before(drawn.element);
      }
      room -= drawn.update(block);
      if (room < 0 && index + 1 < blocks.length) {
        this.soon();
        return;
      }
    }
    this.tail.replaceChildren(...this.screen.line.map(node));
  }
}

/** A block's element, and how much of the block is in it. */
class Drawn {
  readonly element = document.createElement("pre");
  private runs = 0;
  private size = 0;
  private last: Text | undefined;
  private lastSize = 0;

  /** Adds what is new, and tells how many characters that is. */
  update(block: Block): number {
    if (block.size === this.size) return 0;
    const added = block.size - this.size;
    const known = block.runs[this.runs - 1];
    if (known && this.last && known.text.length > this.lastSize) {
      this.last.appendData(known.text.slice(this.lastSize));
      this.lastSize = known.text.length;
    }
    for (; this.runs < block.runs.length; this.runs += 1) {
      const run = block.runs[this.runs] as Run;
      const made = node(run);
      this.element.append(made);
      this.last = (made instanceof Text ? made : made.firstChild) as Text;
      this.lastSize = run.text.length;
    }
    this.size = block.size;
    return added;
  }
}

function node(run: Run): Text | HTMLElement {
  const text = document.createTextNode(run.text);
  if (!run.style && !run.color && !run.background) return text;
  const span = document.createElement("span");
  span.className = run.color ? `${run.style} extended` : run.style;
  if (run.color) span.style.setProperty("--color", run.color); // the style sheet makes it readable on both grounds
  span.style.background = run.background;
  span.append(text);
  return span;
}

/** Shows text with colours that does not grow: a traceback. */
export function drawOnce(element: HTMLElement, screen: Screen): void {
  const runs = [...screen.blocks.flatMap((block) => block.runs), ...screen.line];
  element.replaceChildren(...runs.map(node));
}
