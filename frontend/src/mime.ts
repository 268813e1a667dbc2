/** What is shown how: one table, the first type that is there wins. Pure. */
import type { Bundle } from "./store";

export type Shown =
  | { how: "image"; url: string; alt: string }
  | { how: "frame"; kind: "html" | "plotly"; data: unknown; alt: string }
  | { how: "text"; text: string }
  | { how: "json"; value: unknown }
  | { how: "script"; code: string; alt: string }
  | { how: "unknown"; text: string; mime: string }
  | { how: "large"; mime: string; data: string; why: string };

/** Pixels over which a picture is not decoded. */
const PIXELS = 50_000_000;
const PICTURES = ["image/png", "image/jpeg", "image/gif", "image/webp"];
export const PLOTLY = "application/vnd.plotly.v1+json";

/** How a MIME bundle is shown. */
export function shown(data: Bundle): Shown {
  const alt = text(data["text/plain"]);
  if (PLOTLY in data) return { how: "frame", kind: "plotly", data: data[PLOTLY], alt };
  if ("text/html" in data) return { how: "frame", kind: "html", data: text(data["text/html"]), alt };
  for (const mime of PICTURES) if (mime in data) return picture(mime, text(data[mime]), alt);
  if ("image/svg+xml" in data) {
    return {
      how: "image",
      url: `data:image/svg+xml,${encodeURIComponent(wellFormed(text(data["image/svg+xml"])))}`,
      alt,
    };
  }
  if ("application/json" in data) return { how: "json", value: data["application/json"] };
  for (const mime of ["text/markdown", "text/latex"]) if (mime in data) return { how: "text", text: text(data[mime]) };
  if ("application/javascript" in data) return { how: "script", code: text(data["application/javascript"]), alt };
  const widget = Object.keys(data).find((mime) => mime !== "text/plain");
  return widget ? { how: "unknown", text: alt, mime: widget } : { how: "text", text: alt };
}

function picture(mime: string, base64: string, alt: string): Shown {
  const clean = base64.replace(/\s/g, "");
  const size = mime === "image/png" ? pngSize(clean) : undefined;
  if (size && size[0] * size[1] > PIXELS) {
    return { how: "large", mime, data: clean, why: `A picture of ${size[0]} × ${size[1]} pixels is not drawn.` };
  }
  return { how: "image", url: `data:${mime};base64,${clean}`, alt };
}

/** Width and height that a PNG's header tells. */
export function pngSize(base64: string): [number, number] | undefined {
  let head: string;
  try {
    head = atob(base64.slice(0, 32));
  } catch {
    return undefined;
  }
  if (head.length < 24 || !head.startsWith("\x89PNG")) return undefined;
  const number = (at: number) => [0, 1, 2, 3].reduce((sum, next) => sum * 256 + head.charCodeAt(at + next), 0);
  return [number(16), number(20)];
}

/** The text of a bundle's value; Jupyter allows a list of lines. */
function text(value: unknown): string {
  if (Array.isArray(value)) return value.join("");
  return typeof value === "string" ? value : value === undefined ? "" : JSON.stringify(value);
}

/** Text without lone surrogates, which no address can hold. */
function wellFormed(value: string): string {
  return value.replace(/[\uD800-\uDBFF](?![\uDC00-\uDFFF])|(?<![\uD800-\uDBFF])[\uDC00-\uDFFF]/g, "\ufffd");
}
