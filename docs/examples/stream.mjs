// Run a cell and follow it live, through lost connections: node stream.mjs SANDBOX_ID "CODE"
// Browsers and Node 22 have WebSocket; Node 20 has it with --experimental-websocket.
const { CELLVM_URL, CELLVM_API_KEY } = process.env;
const [sandbox, code] = process.argv.slice(2);
const run = { type: "execute", id: crypto.randomUUID(), code };
let since = "";

function connect() {
  const address = `${CELLVM_URL.replace("http", "ws")}/sandboxes/${sandbox}/stream?token=${CELLVM_API_KEY}${since}`;
  const socket = new WebSocket(address);
  socket.onopen = () => socket.send(JSON.stringify(run)); // again after a reconnect: the same id runs once
  socket.onclose = () => setTimeout(connect, 500);
  socket.onmessage = ({ data }) => {
    const event = JSON.parse(data);
    since = `&since=${event.seq}`;
    if (event.id !== run.id) return;
    const shown = event.text ?? JSON.stringify(event.data ?? event.error);
    if (shown) process.stdout.write(shown);
    if (event.type === "end" || event.type === "refused") process.exit(event.type === "end" ? 0 : 1);
  };
}
connect();
