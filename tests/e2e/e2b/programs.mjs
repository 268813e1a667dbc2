// Programs as people write them with E2B's JavaScript SDK: node programs.mjs NAME URL

import assert from 'node:assert/strict'
import http from 'node:http'

const [name, url] = process.argv.slice(2)
Object.assign(process.env, { E2B_API_URL: url, E2B_SANDBOX_URL: url })
const { Sandbox } = await import('@e2b/code-interpreter')
const sleep = (ms) => new Promise((done) => setTimeout(done, ms))

function get(headers) {
  return new Promise((resolve, reject) => {
    const request = http.get(url, { headers }, async (answer) => {
      let body = ''
      for await (const piece of answer) body += piece
      resolve({ status: answer.statusCode, body })
    })
    request.on('error', reject)
  })
}

const programs = {
  // Lines of a long command arrive while it runs.
  async long_command(box) {
    const arrived = []
    let said = ''
    const onStdout = (text) => { arrived.push(Date.now()); said += text }
    await box.commands.run('for n in 1 2 3; do echo line $n; sleep 1; done', { onStdout })
    assert.equal(said, 'line 1\nline 2\nline 3\n')
    assert(arrived[arrived.length - 1] - arrived[0] > 1000, 'they came all at once')
  },

  // A web server is reached by its host name, with the sandbox's token for its ports.
  async web_server(box) {
    await box.files.write('site/index.html', '<h1>here</h1>')
    const server = await box.commands.run('exec python3 -m http.server 31457 --directory site', { background: true })
    const Host = box.getHost(31457)
    let answer
    for (let n = 0; n < 200 && answer?.status !== 200; n++) {
      await sleep(100)
      answer = await get({ Host, 'e2b-traffic-access-token': box.trafficAccessToken })
    }
    assert.deepEqual(answer, { status: 200, body: '<h1>here</h1>' })
    assert.equal((await get({ Host })).status, 403)
    await server.kill() // without isolation nobody else ends it
  },

  // Somebody types in a terminal.
  async terminal(box) {
    let out = ''
    const terminal = await box.pty.create({ cols: 80, rows: 24, onData: (data) => { out += Buffer.from(data) } })
    const type = (text) => box.pty.sendInput(terminal.pid, Buffer.from(text))
    await type('cat > note\n')
    await type('typed by hand\n\x04')
    await type('exit\n')
    await terminal.wait()
    assert.equal(await box.files.read('note'), 'typed by hand\n')
    assert(out.includes('typed by hand'))
  },

  // A sandbox is killed while a command runs.
  async killed(box) {
    setTimeout(() => box.kill(), 1000)
    await assert.rejects(box.commands.run('sleep 30'))
    assert(!(await box.isRunning()))
  },
}

const box = await Sandbox.create({ timeoutMs: 60_000 })
try {
  await programs[name](box)
} finally {
  await box.kill()
}
process.exit(0)
