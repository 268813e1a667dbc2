/** The editor, which comes after the first paint. It lives in a shadow root, because its styles then need no `<style>`. */
import { acceptCompletion, autocompletion, type CompletionContext, startCompletion } from "@codemirror/autocomplete";
import { defaultKeymap, history, historyKeymap, indentWithTab } from "@codemirror/commands";
import { python, pythonLanguage } from "@codemirror/lang-python";
import { bracketMatching, HighlightStyle, indentUnit, syntaxHighlighting } from "@codemirror/language";
import { EditorState, Prec } from "@codemirror/state";
import { drawSelection, EditorView, keymap, placeholder } from "@codemirror/view";
import { highlightCode, tagHighlighter, tags } from "@lezer/highlight";
import { highlight } from "./highlight";
import type { Completions } from "./store";
import { safe } from "./words";

const COLORS = [
  { tag: [tags.keyword, tags.operatorKeyword, tags.modifier], name: "keyword" },
  { tag: [tags.string, tags.special(tags.string), tags.escape], name: "string" },
  { tag: [tags.number, tags.bool, tags.null, tags.self], name: "number" },
  { tag: [tags.comment], name: "comment" },
  { tag: [tags.function(tags.variableName), tags.definition(tags.variableName), tags.className], name: "name" },
];

interface Options {
  text: string;
  onRun: () => void;
  onChange: (text: string) => void;
  /** The code of earlier cells, the oldest first. */
  past: () => string[];
  /** What may stand at a place of the code, in characters; undefined where nobody can tell. */
  complete: ((code: string, cursor: number) => Promise<Completions>) | undefined;
}

/** An editor of one cell. */
export class Editor {
  readonly element = document.createElement("div");
  private readonly view: EditorView;
  private place = 0;

  constructor(private readonly options: Options) {
    const root = this.element.attachShadow({ mode: "open" });
    const inner = document.createElement("div");
    root.append(inner);
    this.view = new EditorView({
      root,
      parent: inner,
      state: EditorState.create({ doc: options.text, extensions: this.extensions() }),
    });
  }

  close(): void {
    this.view.destroy();
  }

  focus(): void {
    this.view.focus();
  }

  /** Shows a text that was not typed here. */
  show(text: string): void {
    if (text === this.text) return;
    this.view.dispatch({
      changes: { from: 0, to: this.text.length, insert: text },
      selection: { anchor: text.length },
    });
    this.view.focus();
  }

  private get text(): string {
    return this.view.state.doc.toString();
  }

  private extensions() {
    const run = () => {
      this.place = 0;
      this.options.onRun();
      return true;
    };
    const keys = [
      { key: "Shift-Enter", run },
      { key: "Mod-Enter", run },
      { key: "ArrowUp", run: () => this.walk(1) },
      { key: "ArrowDown", run: () => this.walk(-1) },
      { key: "Tab", run: (view: EditorView) => acceptCompletion(view) || this.begin(view) },
    ];
    return [
      autocompletion({
        activateOnTyping: false,
        interactionDelay: 0,
        icons: false,
        override: [(context) => this.complete(context)],
      }),
      Prec.high(keymap.of(keys)),
      keymap.of([...defaultKeymap, ...historyKeymap, indentWithTab]),
      history(),
      drawSelection(),
      bracketMatching(),
      indentUnit.of("    "),
      python(),
      syntaxHighlighting(HighlightStyle.define(COLORS.map(({ tag, name }) => ({ tag, color: `var(--code-${name})` })))),
      placeholder("Python, %magic or !command"),
      EditorView.lineWrapping,
      EditorView.contentAttributes.of({ "aria-label": "Code of the next cell" }),
      EditorView.updateListener.of((update) => update.docChanged && this.options.onChange(this.text)),
      EditorView.theme({
        "&": { fontSize: "13px", maxHeight: "40vh" },
        "&.cm-focused": { outline: "none" },
        ".cm-scroller": { fontFamily: "var(--mono)", lineHeight: "1.55" },
        ".cm-content": { padding: "10px 0", caretColor: "var(--text)" },
        ".cm-line": { padding: "0 12px" },
        ".cm-tooltip": { background: "var(--surface)", border: "1px solid var(--line)", borderRadius: "6px" },
        ".cm-tooltip.cm-tooltip-autocomplete > ul": { fontFamily: "var(--mono)" },
        ".cm-tooltip-autocomplete ul li[aria-selected]": { background: "var(--accent)", color: "var(--on-accent)" },
        ".cm-placeholder": { color: "var(--muted)" },
        ".cm-cursor": { borderLeftColor: "var(--text)" },
        "&.cm-focused .cm-selectionBackground, .cm-selectionBackground": { background: "var(--selection) !important" },
        "&.cm-focused .cm-matchingBracket": { background: "var(--selection)", color: "inherit" },
      }),
    ];
  }

  /** Begins to complete the name before the cursor, if there is one. */
  private begin(view: EditorView): boolean {
    const { main } = view.state.selection;
    const before = view.state.sliceDoc(Math.max(main.head - 1, 0), main.head);
    return (
      this.options.complete !== undefined && main.empty && /[\p{L}\p{N}_.%]/u.test(before) && startCompletion(view)
    );
  }

  /** The kernel counts characters, and the editor UTF-16 units. */
  private async complete({ state, pos }: CompletionContext) {
    const code = state.doc.toString();
    const found = await this.options.complete?.(code, [...code.slice(0, pos)].length);
    if (!found?.matches.length) return null;
    const at = (place: number) => [...code].slice(0, place).join("").length;
    const options = found.matches.map((each) => ({ label: each, displayLabel: safe(each) }));
    return { from: at(found.start), to: at(found.end), options };
  }

  /** Walks through earlier cells, from the first line up and from the last one down. */
  private walk(by: number): boolean {
    const { state } = this.view;
    const line = state.doc.lineAt(state.selection.main.head);
    if (line.number !== (by > 0 ? 1 : state.doc.lines)) return false;
    const past = this.options.past();
    const next = this.place + by;
    if (next < 0 || next > past.length) return false;
    this.place = next;
    this.show(next ? (past.at(-next) ?? "") : "");
    return true;
  }
}

const painter = tagHighlighter(
  COLORS.flatMap(({ tag, name }) => tag.map((each) => ({ tag: each, class: `code-${name}` }))),
);

/** Lets the page's code have its colours. */
export function paint(): void {
  highlight.value = (code) => {
    const nodes: Node[] = [];
    const put = (text: string, style: string) => {
      const node = document.createTextNode(text);
      if (!style) return nodes.push(node);
      const span = document.createElement("span");
      span.className = style;
      span.append(node);
      return nodes.push(span);
    };
    highlightCode(code, pythonLanguage.parser.parse(code), painter, put, () => put("\n", ""));
    return nodes;
  };
}
