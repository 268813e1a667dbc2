// Drives a CellVM server with JupyterLab's own client library, as a program without a browser.
// node services.mjs URL TOKEN v1|legacy
// Each step prints one JSON object on a line. The first step that fails is the last.
import assert from 'node:assert/strict';
import services from '@jupyterlab/services';
import WebSocket from 'ws';

const { KernelManager, KernelSpecAPI, KernelAPI, ServerConnection, SessionAPI, SessionManager } = services;
const [url, token, layout] = process.argv.slice(2);
const BYTES = Uint8Array.from({ length: 256 }, (_, index) => index);

// The library always offers v1. This class does not offer it, so it gets the legacy layout.
class LegacyWebSocket extends WebSocket {
  constructor(address) {
    super(address);
  }
}

const serverSettings = ServerConnection.makeSettings({
  baseUrl: url,
  wsUrl: url.replace(/^http/, 'ws'),
  token,
  appendToken: true,
  WebSocket: layout === 'legacy' ? LegacyWebSocket : WebSocket,
});

const kernels = new KernelManager({ serverSettings });
const sessions = new SessionManager({ serverSettings, kernelManager: kernels });
let session, kernel;

console.log = console.info = console.debug = console.warn = console.error; // stdout is for results only

function tell(found) {
  process.stdout.write(JSON.stringify(found) + '\n');
}

/** A promise that can be resolved from outside. It fails after `seconds`. */
function awaited(what, seconds = 60) {
  const pending = Promise.withResolvers?.() ?? withResolvers();
  const timer = setTimeout(() => pending.reject(new Error(`${what}: nothing in ${seconds} s`)), seconds * 1000);
  pending.promise.finally(() => clearTimeout(timer)).catch(() => {});
  return pending;
}

function withResolvers() {
  const pending = {};
  pending.promise = new Promise((resolve, reject) => Object.assign(pending, { resolve, reject }));
  return pending;
}

/** Run a cell to its end. Returns its reply, and all messages that it sent. */
async function run(code, { onIOPub, onStdin, on = kernel } = {}) {
  const future = on.requestExecute({ code, allow_stdin: Boolean(onStdin) });
  const messages = [];
  future.onIOPub = message => {
    messages.push(message);
    onIOPub?.(message);
  };
  if (onStdin) future.onStdin = message => onStdin(message, future);
  const reply = (await future.done).content;
  const stdout = messages.filter(each => each.header.msg_type === 'stream').map(each => each.content.text).join('');
  return { reply, messages, stdout, types: messages.map(each => each.header.msg_type) };
}

function bytesOf(buffers) {
  return buffers.map(each => [...(each instanceof ArrayBuffer ? new Uint8Array(each) : new Uint8Array(each.buffer, each.byteOffset, each.byteLength))]);
}

const steps = {
  async specs() {
    const specs = await KernelSpecAPI.getSpecs(serverSettings);
    return { default: specs.default, names: Object.keys(specs.kernelspecs).sort() };
  },

  async start() {
    session = await sessions.startNew({
      path: 'test.ipynb', name: 'test.ipynb', type: 'notebook', kernel: { name: 'code_interpreter' },
    });
    kernel = session.kernel;
    const info = await kernel.info;
    return { status: info.status, language: info.language_info.name, debugger: info.supported_features?.includes('debugger') };
  },

  async execute() {
    const { reply, stdout, types, messages } = await run('print("hello")\n6 * 7');
    const result = messages.find(each => each.header.msg_type === 'execute_result');
    return { status: reply.status, stdout, types, value: result.content.data['text/plain'] };
  },

  async stdin() {
    let prompt;
    const { stdout } = await run('print("got " + input("name? "))', {
      onStdin(message, future) {
        prompt = message.content.prompt;
        future.sendInputReply({ status: 'ok', value: 'Ada ✓' }, message.parent_header);
      },
    });
    return { prompt, stdout };
  },

  async 'comm to the kernel'() {
    await run(`
from comm import get_comm_manager
def echo(comm, opened):
    comm.on_msg(lambda message: comm.send({"n": len(message["buffers"])}, buffers=[bytes(b)[::-1] for b in message["buffers"]]))
get_comm_manager().register_target("echo", echo)`);
    const answer = awaited('an answer on the comm');
    const comm = kernel.createComm('echo');
    comm.onMsg = message => answer.resolve(message);
    await comm.open({}).done;
    await comm.send({ text: 'é' }, {}, [BYTES, BYTES.slice(0, 3)]).done;
    const message = await answer.promise;
    assert.deepEqual(bytesOf(message.buffers), [[...BYTES].reverse(), [2, 1, 0]]);
    await comm.close().done;
    return { buffers: message.content.data.n, bytes: 256 };
  },

  async 'comm from the kernel'() {
    const opened = awaited('a comm of the kernel');
    const told = awaited('a message on it');
    kernel.registerCommTarget('told', (comm, message) => {
      opened.resolve(message);
      comm.onMsg = message => told.resolve(message);
    });
    await run(`
from comm import create_comm
telling = create_comm(target_name="told", data={"a": 1}, buffers=[bytes(range(256))])
telling.send({"b": 2}, buffers=[b"", bytes(range(256)) * 4096])`);
    const [first, second] = [await opened.promise, await told.promise];
    assert.deepEqual(bytesOf(first.buffers), [[...BYTES]]);
    const [empty, large] = bytesOf(second.buffers);
    assert.equal(empty.length, 0);
    assert.ok(large.length === 2 ** 20 && large.every((byte, index) => byte === index % 256));
    return { opened: first.content.data, told: second.content.data };
  },

  async subshell() {
    const { content } = await kernel.requestCreateSubshell({}).done;
    const beside = kernel.clone();
    beside.subshellId = content.subshell_id;
    await beside.info;
    const busy = kernel.requestExecute({ code: 'import time; started = time.monotonic(); time.sleep(4); slept = True' });
    await run('assert time.monotonic() - started < 4; print("beside")', { on: beside });
    const meanwhile = await run('"slept" in globals()', { on: beside });
    await busy.done;
    const listed = (await kernel.requestListSubshell({}).done).content.subshell_id;
    const { content: deleted } = await kernel.requestDeleteSubshell({ subshell_id: content.subshell_id }).done;
    beside.dispose();
    const value = meanwhile.messages.find(each => each.header.msg_type === 'execute_result')?.content.data['text/plain'];
    return { created: content.status, listed: listed.includes(content.subshell_id), deleted: deleted.status, value };
  },

  async debugger() {
    const { content } = await kernel.requestDebug({ type: 'request', seq: 1, command: 'debugInfo' }).done;
    return { success: content.success, isStarted: content.body.isStarted };
  },

  async interrupt() {
    const { reply } = await run('print("asleep", flush=True)\nimport time\ntime.sleep(120)', {
      onIOPub: message => message.header.msg_type === 'stream' && kernel.interrupt(),
    });
    return { status: reply.status, ename: reply.ename };
  },

  async 'large display'() {
    const { messages } = await run('display({"text/plain": "x" * (11 * 1024 * 1024)}, raw=True)');
    const text = messages.find(each => each.header.msg_type === 'display_data').content.data['text/plain'];
    return { characters: text.length };
  },

  async restart() {
    await kernel.restart();
    const { reply } = await run('slept');
    return { id: kernel.id === session.kernel.id, ename: reply.ename };
  },

  async death() {
    const statuses = [];
    const usable = awaited('a kernel after the dead one', 120);
    kernel.statusChanged.connect((_, status) => {
      statuses.push(status);
      if (status === 'idle' && statuses.includes('autorestarting')) usable.resolve();
    });
    const lost = kernel.requestExecute({ code: 'import os; os._exit(3)' });
    lost.done.catch(() => {}); // the library drops requests to a dead kernel
    await usable.promise;
    const { reply, stdout } = await run('print("again")');
    return { statuses, status: reply.status, stdout };
  },

  async sessions() {
    await session.setPath('renamed.ipynb');
    const listed = await SessionAPI.listRunning(serverSettings);
    const found = listed.find(each => each.id === session.id);
    const running = await KernelAPI.listRunning(serverSettings);
    return { path: found.path, kernel: found.kernel.id === kernel.id, running: running.some(each => each.id === kernel.id) };
  },

  async shutdown() {
    const { id } = kernel;
    await session.shutdown();
    const running = await KernelAPI.listRunning(serverSettings);
    const left = await SessionAPI.listRunning(serverSettings);
    return { gone: !running.some(each => each.id === id), sessions: left.length };
  },
};

for (const [step, take] of Object.entries(steps)) {
  const began = performance.now();
  try {
    const found = await take();
    tell({ step, ms: Math.round(performance.now() - began), ...found });
  } catch (error) {
    tell({ step, error: String(error.stack ?? error) });
    process.exit(1);
  }
}
process.exit(0);
