/* The page's part of cells.py: after a reload, cells show what came for them meanwhile, and what is still to come.

   JupyterLab loads this file as a container of webpack's module federation, which is two functions: `init` gets the
   packages that JupyterLab shares, and `get` gives the plugin. So the file needs no build and no packages of its own. */
"use strict";

(window._JUPYTERLAB ??= {})["cellvm-lab"] = (() => {
  let shared;

  async function load(name) {
    const [version] = Object.values(shared[name]);
    return (await version.get())();
  }

  async function plugin() {
    const { INotebookTracker } = await load("@jupyterlab/notebook");
    const { ServerConnection } = await load("@jupyterlab/services");

    async function ask(kernel, place, method = "GET") {
      const settings = kernel.serverSettings;
      const url = `${settings.baseUrl}cellvm/kernels/${kernel.id}/${place}`;
      const answer = await ServerConnection.makeRequest(url, { method }, settings);
      if (!answer.ok) {
        throw await ServerConnection.ResponseError.create(answer);
      }
      return method === "GET" ? answer.json() : null;
    }

    /** What an output area expects of a request's future. This one's messages come from the journal. */
    class Future {
      constructor(kernel, request, cell) {
        this.kernel = kernel;
        this.cell = cell;
        this.isDisposed = false;
        this.missing = new Set(["execute_reply", "idle"]);
        this.msg = { header: { msg_id: request }, parent_header: {}, metadata: {}, content: {}, channel: "shell" };
        this.done = new Promise((resolve, reject) => Object.assign(this, { resolve, reject }));
        this.done.catch(() => {}); // an output area that is not attached yet does not look
        cell.model.trusted = true;
        cell.model.clearExecution();
        cell.model.executionState = "running";
        cell.outputArea.future = this;
      }

      dispose() {
        if (!this.isDisposed) {
          this.isDisposed = true;
          this.reject(new Error("another request took the cell"));
        }
      }

      sendInputReply(content, parent) {
        this.kernel.sendInputReply(content, parent);
      }

      registerMessageHook() {}
      removeMessageHook() {}

      async take(message) {
        const { msg_type: kind } = message.header;
        this.question = kind === "input_request" ? message : null;
        if (message.channel === "iopub") {
          await this.onIOPub(message);
        } else if (message.channel === "shell") {
          await this.onReply(message);
          this.reply = message;
          this.cell.model.executionCount = message.content.execution_count;
        }
        this.missing.delete(kind === "status" ? message.content.execution_state : kind);
        if (!this.missing.size) {
          this.end();
          this.resolve(this.reply);
        }
      }

      /** Ask the user what the cell has asked last, unless it has gone on since. */
      put() {
        if (this.question) {
          this.onStdin(this.question);
          this.question = null;
        }
      }

      end() {
        this.isDisposed = true;
        if (!this.cell.isDisposed) {
          this.cell.model.executionState = "idle";
        }
      }
    }

    function decoded(message) {
      message.buffers = message.buffers.map(text => Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
      return message;
    }

    /** Give each message to its cell, until no cell waits for any. */
    async function follow(panel, kernel, { cells, since }) {
      const widgets = new Map(panel.content.widgets.map(each => [each.model.sharedModel.getId(), each]));
      const waiting = new Map();
      for (const { request, cell } of cells) {
        if (widgets.get(cell)?.model.type === "code") {
          waiting.set(request, widgets.get(cell));
        }
      }
      const futures = new Map();
      let page = { next: since };
      const attach = request => {
        futures.set(request, new Future(kernel, request, waiting.get(request)));
        waiting.delete(request);
      };
      const gap = count => {
        const running = [...futures.values()].find(each => !each.isDisposed);
        const text = `[${count} messages of output are not kept any more]\n`;
        running?.onIOPub({
          ...running.msg,
          header: { msg_type: "stream" },
          content: { name: "stderr", text },
        });
      };
      // The kernel answers this page's first request after all cells that were sent before.
      let hasAnswered = false;
      kernel.info.then(
        () => (hasAnswered = true),
        () => {} // the connection was given up, and `isOpen` tells that
      );
      const isOpen = () => !panel.isDisposed && panel.sessionContext.session?.kernel === kernel;
      try {
        while (isOpen() && (waiting.size || [...futures.values()].some(each => !each.isDisposed))) {
          const isOver = hasAnswered;
          page = await ask(kernel, `messages?since=${page.next}`);
          if (page.missing) {
            [...waiting.keys()].slice(0, 1).forEach(attach);
            gap(page.missing);
          }
          for (const message of page.messages.map(decoded)) {
            const request = message.parent_header.msg_id;
            if (waiting.has(request)) {
              const isChanged = waiting.get(request).model.sharedModel.getSource() !== message.content.code;
              if (message.header.msg_type === "execute_input" && isChanged) {
                waiting.delete(request); // the notebook that was saved has other code in this cell
              } else if (message.header.msg_type !== "status") {
                attach(request);
              }
            }
            const future = futures.get(request);
            if (future && !future.isDisposed) {
              await future.take(message);
            }
          }
          if (page.next >= page.last && isOver) {
            break; // what is still waited for is not kept any more
          }
          if (page.next >= page.last) {
            [...waiting.keys()].forEach(attach); // they wait in the kernel's queue
            futures.forEach(each => each.put());
          }
        }
      } finally {
        futures.forEach(each => each.isDisposed || each.end());
      }
    }

    async function restore(panel, kernel) {
      await panel.context.ready;
      const known = await ask(kernel, "cells");
      if (known.cells.length) {
        await follow(panel, kernel, known);
      }
    }

    function watch(panel) {
      const context = panel.sessionContext;
      let last = null;
      const look = () => {
        const kernel = context.session?.kernel ?? null;
        if (kernel && kernel !== last) {
          restore(panel, kernel).catch(error => console.warn("cellvm-lab: output of running cells:", error));
        }
        last = kernel;
      };
      context.kernelChanged.connect(look);
      context.ready.then(look);
      panel.context.saveState.connect((_, state) => {
        if (state === "completed" && last) {
          ask(last, "cells", "DELETE").catch(error => console.warn("cellvm-lab: a saved notebook:", error));
        }
      });
    }

    return {
      id: "cellvm-lab:running-cells",
      description: "Shows output that came while the page was not there.",
      autoStart: true,
      requires: [INotebookTracker],
      activate: (app, notebooks) => {
        notebooks.forEach(watch);
        notebooks.widgetAdded.connect((_, panel) => watch(panel));
      },
    };
  }

  return {
    init: scope => {
      shared = scope;
    },
    get: async () => {
      const found = await plugin();
      return () => ({ __esModule: true, default: found });
    },
  };
})();
