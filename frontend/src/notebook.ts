/** The transcript as a notebook, for a sandbox that the server has nothing of any more. Pure. */
import type { Box, Cell, Output } from "./store";

/** A notebook of format 4.5 as text. */
export function notebook(box: Box): string {
  const cells = box.entries.value.flatMap(({ value }) => (value.kind === "cell" ? [cellOf(value)] : []));
  const kernelspec = { name: "python3", display_name: "Python 3", language: "python" };
  const metadata = { kernelspec, language_info: { name: "python" } };
  return JSON.stringify({ nbformat: 4, nbformat_minor: 5, metadata, cells }, null, 1);
}

function cellOf(cell: Cell) {
  return {
    cell_type: "code",
    id: cell.id.replace(/[^a-zA-Z0-9-_]/g, "-").slice(0, 64),
    metadata: {},
    execution_count: cell.count ?? null,
    source: cell.code,
    outputs: cell.outputs.flatMap((output) => outputOf(output)),
  };
}

function outputOf(output: Output): object[] {
  switch (output.kind) {
    case "text":
      return [{ output_type: "stream", name: output.isError ? "stderr" : "stdout", text: output.screen.text() }];
    case "rich":
      return [{ output_type: "display_data", data: output.data, metadata: {} }];
    case "failure": {
      const { name, value, traceback } = output.error;
      return [{ output_type: "error", ename: name, evalue: value, traceback }];
    }
    default:
      return [];
  }
}
