/** Requests to the server this page comes from, with one type of error (docs/errors.md). */
import { forgetKey, key } from "./key";

/** What others see as the name of this page's cells. */
export const CLIENT = "web page";
const BASE = new URL(".", location.href).href;

/** An answer that says no, or none at all (`status` 0). */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    /** A stable word of docs/errors.md. */
    readonly word: string,
    message: string,
    readonly hint = "",
    readonly outcome = "",
  ) {
    super(message);
  }

  /** Whether the same request again may help and does no harm. */
  get isRetryable(): boolean {
    return (
      this.status === 0 || ["too_many_requests", "host_full", "template_not_ready", "draining"].includes(this.word)
    );
  }
}

/** The address of a path of the server. */
export function address(path: string, protocol = ""): string {
  const url = new URL(path.replace(/^\//, ""), BASE);
  if (protocol) url.protocol = url.protocol.replace("http", protocol);
  return url.href;
}

/** The address of a sandbox's part. */
export function of(id: string, part = ""): string {
  return `/sandboxes/${encodeURIComponent(id)}${part}`;
}

/** The headers of every request. */
export function headers(more: Record<string, string> = {}): Record<string, string> {
  return { Authorization: `Bearer ${key.value}`, "X-Client-Name": CLIENT, ...more };
}

/** Sends a request, and returns its answer if that is a success. */
export async function send(method: string, path: string, body?: unknown, options: RequestInit = {}): Promise<Response> {
  const sent = key.value;
  let answer: Response;
  try {
    answer = await fetch(address(path), {
      method,
      cache: "no-store",
      credentials: "omit",
      ...options,
      headers: {
        ...headers(),
        ...(body === undefined ? {} : { "Content-Type": "application/json" }),
        ...options.headers,
      },
      ...(body === undefined ? {} : { body: JSON.stringify(body) }),
    });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError(0, "unreachable", "The server can't be reached.");
  }
  if (answer.ok) return answer;
  if (answer.status === 401 && sent === key.value) forgetKey();
  throw await errorOf(answer);
}

/** The error that an answer tells. */
async function errorOf(answer: Response): Promise<ApiError> {
  const told = await answer.json().catch(() => ({}));
  const text = (name: string) => (typeof told[name] === "string" ? told[name] : "");
  const message = text("message") || answer.statusText || `status ${answer.status}`;
  return new ApiError(answer.status, text("error"), message, text("hint"), text("outcome"));
}

/** The JSON of an answer. */
export async function get<T>(path: string, options: RequestInit = {}): Promise<T> {
  return (await send("GET", path, undefined, options)).json();
}

/** The objects of a stream of JSON lines, as they come. */
export async function* lines<T>(answer: Response): AsyncGenerator<T> {
  const reader = (answer.body as ReadableStream<Uint8Array>).pipeThrough(new TextDecoderStream() as never).getReader();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop() ?? "";
      for (const part of parts) if (part) yield JSON.parse(part);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
