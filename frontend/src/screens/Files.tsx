import { type Signal, useSignal } from "@preact/signals";
import { useEffect, useMemo, useRef } from "preact/hooks";
import { of, send } from "../api";
import { may } from "../key";
import { go, to } from "../route";
import { Ask, Dialog, Later, Menu, type Question, save, Trouble, useWork } from "../ui";
import { Uploads } from "../upload";
import { bytes, safe, time } from "../words";
import { Framed } from "./Framed";

interface Entry {
  name: string;
  path: string;
  isDir: boolean;
  type: string;
  size: number;
  modified: string;
}

const HOME = "~";
/** Entries of a folder that are shown. */
const MOST = 1000;
/** Milliseconds between two looks at the folder in view. */
const PAUSE = 3000;
/** Bytes of a text, and of a picture, that a preview reads. */
const TEXT = 1024 * 1024;
const PICTURE = 16 * 1024 * 1024;
const LINES = 200;
const PICTURES: Record<string, string> = {
  png: "image/png",
  jpg: "image/jpeg",
  jpeg: "image/jpeg",
  gif: "image/gif",
  webp: "image/webp",
  svg: "image/svg+xml",
};

/** The files of a sandbox, one folder at a time. */
export function Files({ id, path, isGone }: { id: string; path: string; isGone: boolean }) {
  const folder = path || HOME;
  const entries = useSignal<Entry[] | undefined>(undefined);
  const hasMore = useSignal(false);
  const chosen = useSignal<Entry | undefined>(undefined);
  const question = useSignal<Question | undefined>(undefined);
  const isNaming = useSignal(false);
  const isOver = useSignal(false);
  const work = useWork();
  const picker = useRef<HTMLInputElement>(null);
  const list = async () => {
    const answer = await send("GET", `${of(id, "/filesystem/list")}?limit=${MOST}&path=${encodeURIComponent(folder)}`);
    hasMore.value = answer.headers.get("X-More") === "true";
    const found: Entry[] = await answer.json();
    entries.value = found.sort((a, b) => Number(b.isDir) - Number(a.isDir) || a.name.localeCompare(b.name));
  };
  const refresh = () => work.run(list);
  const uploads = useMemo(() => new Uploads(id, refresh), [id, folder]);
  useEffect(() => {
    entries.value = undefined;
    chosen.value = undefined;
    if (isGone) return;
    void refresh();
    const timer = setInterval(() => {
      if (document.visibilityState === "visible" && !work.error.value) void list().catch(() => {}); // the next one tells
    }, PAUSE);
    return () => clearInterval(timer);
  }, [id, folder, isGone]);
  const remove = (entry: Entry) => {
    question.value = {
      title: `Delete ${safe(entry.name)}?`,
      text: entry.isDir ? "The folder is deleted with all it holds." : "The file is deleted for good.",
      button: "Delete",
      act: async () => {
        await send("DELETE", `${of(id, "/filesystem")}?path=${encodeURIComponent(entry.path)}`);
        chosen.value = undefined;
        await list();
      },
    };
  };
  const isRoot = folder === "/";
  const isReadOnly = isGone || !may("use");
  return (
    <main
      class={isOver.value ? "files over" : "files"}
      aria-label="Files"
      onDragOver={(event) => {
        event.preventDefault();
        isOver.value = true;
      }}
      onDragLeave={() => {
        isOver.value = false;
      }}
      onDrop={(event) => {
        event.preventDefault();
        isOver.value = false;
        if (!isReadOnly) uploads.add(folder, [...(event.dataTransfer?.files ?? [])]);
      }}
    >
      <div class="row tools">
        <Crumbs id={id} path={folder} />
        <span class="grow" />
        <input
          ref={picker}
          type="file"
          multiple
          hidden
          aria-label="Files to upload"
          onChange={(event) => {
            uploads.add(folder, [...(event.currentTarget.files ?? [])]);
            event.currentTarget.value = "";
          }}
        />
        <button type="button" class="primary" disabled={isReadOnly} onClick={() => picker.current?.click()}>
          Upload…
        </button>
        <button type="button" disabled={isReadOnly} onClick={() => (isNaming.value = true)}>
          New folder…
        </button>
        <button type="button" class="quiet icon" aria-label="Look again" disabled={isGone} onClick={refresh}>
          ⟳
        </button>
      </div>
      <Trouble error={work.error.value} again={refresh} />
      {isGone && <p class="muted none">The sandbox has ended, and its files with it.</p>}
      <UploadList uploads={uploads} />
      <div class="panes">
        <div class="listing">
          {!entries.value && !isGone && (
            <Later>
              <div class="skeleton" aria-hidden="true" />
            </Later>
          )}
          {entries.value && (
            <table class="cards">
              <thead>
                <tr>
                  <th scope="col">Name</th>
                  <th scope="col" class="number">
                    Size
                  </th>
                  <th scope="col" class="number">
                    Changed
                  </th>
                  <th scope="col">
                    <span class="hidden">Actions</span>
                  </th>
                </tr>
              </thead>
              <tbody>
                {!isRoot && (
                  <tr>
                    <th scope="row" colSpan={4}>
                      <a href={to(id, "files", parent(folder))}>..</a>
                    </th>
                  </tr>
                )}
                {entries.value.map((each) => (
                  <tr key={each.path} data-chosen={chosen.value?.path === each.path}>
                    <th scope="row">
                      {each.isDir ? (
                        <a href={to(id, "files", each.path)}>{safe(each.name)}/</a>
                      ) : (
                        <button type="button" class="link" onClick={() => (chosen.value = each)}>
                          {safe(each.name)}
                        </button>
                      )}
                    </th>
                    <td class="number" data-label="Size">
                      {each.isDir ? "–" : bytes(each.size)}
                    </td>
                    <td class="number" data-label="Changed">
                      {time(each.modified)}
                    </td>
                    <td class="actions">
                      <Menu label={`More for ${safe(each.name)}`}>
                        {!each.isDir && (
                          <button type="button" onClick={() => work.run(() => download(id, each))}>
                            Download
                          </button>
                        )}
                        <button type="button" class="bad" hidden={!may("use")} onClick={() => remove(each)}>
                          Delete…
                        </button>
                      </Menu>
                    </td>
                  </tr>
                ))}
              </tbody>
            </table>
          )}
          {entries.value?.length === 0 && <p class="muted none">The folder is empty. Drop files here.</p>}
          {hasMore.value && <p class="muted none">The folder has more than these {MOST} entries.</p>}
        </div>
        {chosen.value && (
          <Preview
            key={`${chosen.value.path}-${chosen.value.modified}`}
            id={id}
            entry={chosen.value}
            close={() => (chosen.value = undefined)}
            remove={remove}
          />
        )}
      </div>
      {isNaming.value && <NewFolder id={id} folder={folder} isOpen={isNaming} />}
      {question.value && <Ask question={question.value} close={() => (question.value = undefined)} />}
    </main>
  );
}

function parent(path: string): string {
  return path === HOME ? "/home" : path.replace(/\/[^/]+\/?$/, "") || "/";
}

function Crumbs({ id, path }: { id: string; path: string }) {
  const parts = path.split("/").filter(Boolean);
  const isAbsolute = path.startsWith("/");
  return (
    <nav class="crumbs" aria-label="Folder">
      <a href={to(id, "files", "/")}>/</a>
      {parts.map((part, index) => (
        <span key={`${index}-${part}`}>
          <a href={to(id, "files", (isAbsolute ? "/" : "") + parts.slice(0, index + 1).join("/"))}>
            {part === HOME ? "home" : safe(part)}
          </a>
          {index < parts.length - 1 && " / "}
        </span>
      ))}
    </nav>
  );
}

function UploadList({ uploads }: { uploads: Uploads }) {
  const all = uploads.all.value;
  if (!all.length) return null;
  return (
    <ul class="uploads" aria-label="Uploads">
      {all.map((each) => (
        <li key={each.name}>
          <span class="name">{safe(each.name)}</span>
          {each.error ? (
            <span class="bad" role="alert">
              {each.error}
            </span>
          ) : (
            <>
              <progress value={each.sent} max={each.size || 1} aria-label={`Upload of ${safe(each.name)}`} />
              <span class="number muted">
                {Math.round((100 * Math.min(each.sent, each.size)) / (each.size || 1))} %
                {each.speed > 0 && ` · ${bytes(each.speed)}/s`}
              </span>
            </>
          )}
          <button type="button" onClick={() => (each.error ? uploads.remove(each) : each.cancel())}>
            {each.error ? "Close" : "Cancel"}
          </button>
        </li>
      ))}
    </ul>
  );
}

function NewFolder({ id, folder, isOpen }: { id: string; folder: string; isOpen: Signal<boolean> }) {
  const name = useSignal("");
  const work = useWork();
  const close = () => {
    isOpen.value = false;
  };
  return (
    <Dialog title="New folder" close={close}>
      <form
        class="row"
        onSubmit={(event) => {
          event.preventDefault();
          const path = `${folder}/${name.value}`;
          void work.run(
            () => send("POST", of(id, "/filesystem/mkdir"), { path }),
            () => {
              close();
              go(id, "files", path);
            },
          );
        }}
      >
        <input
          type="text"
          aria-label="Name"
          required
          autofocus
          value={name.value}
          onInput={(event) => (name.value = event.currentTarget.value)}
        />
        <button type="submit" class="primary">
          Make
        </button>
      </form>
      <Trouble error={work.error.value} />
    </Dialog>
  );
}

async function download(id: string, entry: Entry): Promise<void> {
  const answer = await send("GET", `${of(id, "/files")}?path=${encodeURIComponent(entry.path)}`);
  save(entry.name, await answer.blob());
}

interface PreviewProps {
  id: string;
  entry: Entry;
  close: () => void;
  remove: (entry: Entry) => void;
}

type Content = { text: string; isCut: boolean } | { html: string } | { picture: string } | { none: string };

/** A file as far as it can be shown safely. */
function Preview({ id, entry, close, remove }: PreviewProps) {
  const content = useSignal<Content | undefined>(undefined);
  const work = useWork();
  useEffect(() => {
    const stop = new AbortController();
    void work.run(async () => {
      content.value = await read(id, entry, stop.signal);
    });
    return () => {
      stop.abort();
      if (content.value && "picture" in content.value) URL.revokeObjectURL(content.value.picture);
    };
  }, []);
  const shown = content.value;
  return (
    <section class="preview" aria-label={`Preview of ${safe(entry.name)}`}>
      <header class="row">
        <h2>{safe(entry.name)}</h2>
        <span class="muted">{bytes(entry.size)}</span>
        <span class="grow" />
        <button type="button" onClick={() => work.run(() => download(id, entry))}>
          Download
        </button>
        <button type="button" class="bad" hidden={!may("use")} onClick={() => remove(entry)}>
          Delete…
        </button>
        <button type="button" class="quiet icon" aria-label="Close the preview" onClick={close}>
          ✕
        </button>
      </header>
      <Trouble error={work.error.value} />
      {shown && "text" in shown && <pre class="content">{shown.text}</pre>}
      {shown && "text" in shown && shown.isCut && <p class="notice">This is the beginning of the file.</p>}
      {shown && "html" in shown && <Framed kind="html" data={shown.html} title={`Preview of ${safe(entry.name)}`} />}
      {shown && "picture" in shown && <img src={shown.picture} alt={safe(entry.name)} />}
      {shown && "none" in shown && <p class="muted">{shown.none}</p>}
    </section>
  );
}

async function read(id: string, entry: Entry, signal: AbortSignal): Promise<Content> {
  if (entry.type !== "file") return { none: "This is no file." };
  const path = `${of(id, "/files")}?path=${encodeURIComponent(entry.path)}`;
  const mime = PICTURES[entry.name.split(".").at(-1)?.toLowerCase() ?? ""];
  if (mime) {
    if (entry.size > PICTURE) return { none: "The picture is too large to be shown here." };
    const answer = await send("GET", path, undefined, { signal });
    // SVG as a data address, because a `blob:` that is opened in a tab would have our origin.
    if (mime === "image/svg+xml") return { picture: `data:${mime},${encodeURIComponent(await answer.text())}` };
    return { picture: URL.createObjectURL(new Blob([await answer.arrayBuffer()], { type: mime })) };
  }
  if (entry.size === 0) return { text: "", isCut: false };
  const headers = { Range: `bytes=0-${TEXT - 1}` };
  const data = new Uint8Array(await (await send("GET", path, undefined, { headers, signal })).arrayBuffer());
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(data, { stream: true });
  } catch {
    return { none: "This is no text, so there is nothing to show. Download it." };
  }
  if (/\.html?$/i.test(entry.name) && entry.size <= TEXT) return { html: text };
  const lines = text.split("\n");
  return { text: lines.slice(0, LINES).join("\n"), isCut: lines.length > LINES || entry.size > TEXT };
}
