/** Uploads, one after the other. They use XMLHttpRequest, because `fetch` tells no progress. */
import { signal } from "@preact/signals";
import { address, CLIENT, of } from "./api";
import { key } from "./key";

/** A file on its way into a sandbox. `error` is empty while nothing is wrong. */
export interface Upload {
  name: string;
  size: number;
  sent: number;
  speed: number;
  error: string;
  cancel: () => void;
}

/** The queue of one folder's screen. */
export class Uploads {
  readonly all = signal<Upload[]>([]);
  private readonly queue: (() => Promise<void>)[] = [];
  private isBusy = false;

  constructor(
    private readonly id: string,
    private readonly onDone: () => void,
  ) {}

  /** Puts files into the queue, to be stored in a folder of the sandbox. */
  add(folder: string, files: File[]): void {
    for (const file of files) {
      const upload: Upload = { name: file.name, size: file.size, sent: 0, speed: 0, error: "", cancel: () => {} };
      let isCancelled = false;
      upload.cancel = () => {
        isCancelled = true;
        this.remove(upload);
      };
      this.all.value = [...this.all.value, upload];
      this.queue.push(() => (isCancelled ? Promise.resolve() : this.send(`${folder}/${file.name}`, file, upload)));
    }
    void this.work();
  }

  /** Takes a file that failed off the list. */
  remove(upload: Upload): void {
    this.all.value = this.all.value.filter((each) => each !== upload);
  }

  private async work(): Promise<void> {
    if (this.isBusy) return;
    this.isBusy = true;
    for (let next = this.queue.shift(); next; next = this.queue.shift()) await next();
    this.isBusy = false;
  }

  private send(path: string, file: File, upload: Upload): Promise<void> {
    const request = new XMLHttpRequest();
    const began = performance.now();
    const fail = (error: string) => {
      upload.error = error;
      this.all.value = [...this.all.value];
    };
    return new Promise((resolve) => {
      upload.cancel = () => {
        request.abort();
        this.remove(upload);
        resolve();
      };
      request.upload.onprogress = ({ loaded }) => {
        upload.sent = loaded;
        upload.speed = loaded / ((performance.now() - began) / 1000);
        this.all.value = [...this.all.value];
      };
      request.onload = () => {
        if (request.status === 200) this.remove(upload);
        else fail(messageOf(request));
        this.onDone();
        resolve();
      };
      request.onerror = () => {
        fail("The connection was lost. The old file is as it was.");
        resolve();
      };
      request.open("POST", address(`${of(this.id, "/files")}?path=${encodeURIComponent(path)}`));
      request.setRequestHeader("Authorization", `Bearer ${key.value}`);
      request.setRequestHeader("X-Client-Name", CLIENT);
      const form = new FormData();
      form.append("file", file, "file");
      request.send(form);
    });
  }
}

function messageOf(request: XMLHttpRequest): string {
  try {
    return String(JSON.parse(request.responseText).message);
  } catch {
    return `status ${request.status}`;
  }
}
