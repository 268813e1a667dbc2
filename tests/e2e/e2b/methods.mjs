// Every public method of E2B's JavaScript SDK, called on a server: node methods.mjs URL
// Each step prints a JSON line with what it has shown. The last step compares the methods with those of the SDK's classes.

import assert from 'node:assert/strict'

const url = process.argv[2]
Object.assign(process.env, { E2B_API_URL: url, E2B_SANDBOX_URL: url })
const e2b = await import('e2b')
const { Sandbox } = await import('@e2b/code-interpreter')

const seen = new Set()
const INTERNAL = new Set((
  'Sandbox.fileUrl Sandbox.getJupyterRequestUrl Sandbox.handleRequestError Sandbox.includeDiagnostics ' +
  'Sandbox.resolveApiOpts Sandbox.resolveOpts Sandbox.connectSandbox Sandbox.createSandbox Sandbox.forkSandbox ' +
  'Sandbox.jupyterUrl Commands.start Git.getRemoteUrl Git.hasUpstream Git.resolveRemoteName Git.runGit Git.runShell ' +
  'Git.withRemoteCredentials Sandbox.getFullInfo'
).split(' '))
const pauses = 'needs machines that can be saved, which this server has not'
const sleep = (ms) => new Promise((done) => setTimeout(done, ms))

function tell(answer, methods, note = '') {
  for (const method of methods.split(' ')) {
    seen.add(method)
    console.log(JSON.stringify({ method, answer, note }))
  }
}

async function refused(methods, note, call, word = '') {
  await assert.rejects(async () => await call(), (error) => String(error.message).includes(word), methods)
  tell('not offered', methods, note)
}

async function lifecycle() {
  const box = await Sandbox.create({ timeoutMs: 60_000, metadata: { 'team j': 'a&b' }, envs: { GIVEN: 'yes' } })
  assert(await box.isRunning())
  const info = await box.getInfo()
  assert.deepEqual([info.sandboxId, info.templateId], [box.sandboxId, 'code_interpreter'])
  assert.deepEqual(info.metadata, { 'team j': 'a&b' })
  assert.equal(box.getHost(3000), `3000-${box.sandboxId}.${box.sandboxDomain}`)
  const again = await Sandbox.connect(box.sandboxId, { timeoutMs: 90_000 })
  assert.equal((await again.commands.run('echo $GIVEN')).stdout, 'yes\n')
  const extended = (await box.getInfo()).endAt
  assert(extended > info.endAt)
  await box.setTimeout(50_000)
  assert((await box.getInfo()).endAt < extended)
  tell('works', 'Sandbox.create Sandbox.isRunning Sandbox.getInfo Sandbox.getHost Sandbox.connect Sandbox.setTimeout')
  const pages = Sandbox.list({ query: { metadata: { 'team j': 'a&b' } }, limit: 1 })
  assert(pages.hasNext)
  assert.deepEqual((await pages.nextItems()).map((each) => each.sandboxId), [box.sandboxId])
  assert(!pages.hasNext)
  tell('works', 'Sandbox.list')
  let readings = []
  for (let n = 0; n < 40 && !readings.length; n++) {
    await sleep(250)
    readings = await box.getMetrics()
  }
  assert(readings[0].memTotal > readings[0].memUsed)
  await box.updateNetwork({})
  tell('works', 'Sandbox.getMetrics Sandbox.updateNetwork')
  assert(await box.kill())
  assert(!(await box.isRunning()))
  assert(!(await box.kill()))
  tell('works', 'Sandbox.kill')
}

async function files(box) {
  const f = box.files
  const written = await f.write('notes/a.txt', 'hällo')
  assert.equal(written.name, 'a.txt')
  assert.equal(await f.read('notes/a.txt'), 'hällo')
  assert.equal(Buffer.from(await f.read('notes/a.txt', { format: 'bytes' })).toString(), 'hällo')
  await f.write('empty', '')
  assert.equal(await f.read('empty'), '')
  const several = await f.write([{ path: 'many/1', data: 'one' }, { path: 'many/2', data: 'two' }])
  assert.deepEqual(several.map((each) => each.name), ['1', '2'])
  await f.writeFiles([{ path: 'many/3', data: 'three' }])
  assert.equal(await f.read('many/3'), 'three')
  await assert.rejects(f.read('missing'), e2b.NotFoundError)
  assert(await f.exists('many/1'))
  assert(!(await f.exists('missing')))
  const info = await f.getInfo('many/1')
  assert.deepEqual([info.type, info.size, info.permissions], ['file', 3, '-rw-r--r--'])
  assert(await f.makeDir('deep/er'))
  assert(!(await f.makeDir('deep/er')))
  await f.write('deep/er/x', '1')
  assert.deepEqual((await f.list('deep', { depth: 2 })).map((each) => each.name), ['er', 'x'])
  assert.equal((await f.rename('deep/er/x', 'deep/y')).name, 'y')
  await f.remove('deep')
  assert(!(await f.exists('deep')))
  await f.makeDir('watched')
  const events = []
  const handle = await f.watchDir('watched', (event) => { events.push(event) }, { recursive: true })
  await f.write('watched/a', '1')
  for (let n = 0; n < 100 && events.length < 3; n++) await sleep(20)
  assert.deepEqual(events.map((each) => [each.type, each.name]), [['create', 'a'], ['chmod', 'a'], ['write', 'a']])
  await handle.stop()
  tell('works', ['write', 'read', 'writeFiles', 'exists', 'getInfo', 'makeDir', 'list', 'rename', 'remove', 'watchDir']
    .map((name) => `Filesystem.${name}`).join(' '))
  const signed = await box.downloadUrl('notes/a.txt', { useSignatureExpiration: 60 })
  assert.equal(await (await fetch(signed)).text(), 'hällo')
  assert.equal((await fetch(signed.replace('v1_', 'v1_0'))).status, 401)
  const form = new FormData()
  form.append('file', new Blob(['up']), 'any')
  assert.equal((await fetch(await box.uploadUrl('up.txt'), { method: 'POST', body: form })).status, 200)
  assert.equal(await f.read('up.txt'), 'up')
  tell('works', 'Sandbox.downloadUrl Sandbox.uploadUrl')
}

async function commands(box) {
  const c = box.commands
  let out = ''
  const done = await c.run('echo $A; pwd; echo no >&2',
    { onStdout: (data) => { out += data }, envs: { A: 'b' }, cwd: '/tmp' })
  assert.deepEqual([done.stdout, done.stderr, done.exitCode, out], ['b\n/tmp\n', 'no\n', 0, 'b\n/tmp\n'])
  await assert.rejects(c.run('exit 3'), (error) => error.exitCode === 3)
  await assert.rejects(c.run('sleep 20', { timeoutMs: 500 }), e2b.TimeoutError)
  await assert.rejects(c.run('true', { cwd: '/missing' }), e2b.InvalidArgumentError)
  await assert.rejects(c.run('true', { user: 'nobody-here' }), e2b.AuthenticationError)
  const handle = await c.run('cat; echo over', { background: true, stdin: true })
  assert((await c.list()).some((each) => each.pid === handle.pid))
  await c.sendStdin(handle.pid, 'typed\n')
  await c.closeStdin(handle.pid)
  assert.equal((await handle.wait()).stdout, 'typed\nover\n')
  const slow = await c.run('sleep 0.5; echo later', { background: true })
  await slow.disconnect()
  assert.equal((await (await c.connect(slow.pid)).wait()).stdout, 'later\n')
  const endless = await c.run('sleep 100', { background: true })
  assert(await endless.kill())
  assert(!(await c.kill(endless.pid)))
  tell('works', ['run', 'list', 'sendStdin', 'closeStdin', 'connect', 'kill', 'supportsStdinClose']
    .map((name) => `Commands.${name}`).join(' '))
}

async function terminals(box) {
  let out = ''
  const onData = (data) => { out += Buffer.from(data).toString() }
  const handle = await box.pty.create({ cols: 90, rows: 20, onData })
  await box.pty.resize(handle.pid, { cols: 44, rows: 33 })
  await box.pty.sendInput(handle.pid, Buffer.from("echo $((20 + 3))-$(stty size | tr ' ' x); exit\n"))
  await handle.wait()
  assert(out.includes('23-33x44'), out)
  const other = await box.pty.create({ cols: 90, rows: 20, onData })
  assert.equal((await box.pty.connect(other.pid, { onData })).pid, other.pid)
  assert(await box.pty.kill(other.pid))
  tell('works', 'Pty.create Pty.resize Pty.sendInput Pty.connect Pty.kill')
}

async function code(box) {
  const out = []
  const ran = await box.runCode("print('ü')\nx = 41\nx + 1", { onStdout: (each) => { out.push(each.line) } })
  assert.deepEqual([ran.text, ran.logs.stdout, out], ['42', ['ü\n'], ['ü\n']])
  assert.equal((await box.runCode('1 / 0')).error.name, 'ZeroDivisionError')
  assert.equal((await box.runCode("import os; os.environ['E']", { envs: { E: '5' } })).text, '5')
  assert.equal((await box.runCode('echo $((6 * 7))', { language: 'bash' })).logs.stdout.join(''), '42\n')
  tell('differs', 'Sandbox.runCode', 'Python, and bash with a fresh shell each time; no other language')
  const [context] = await box.listCodeContexts()
  assert.equal(context.language, 'python')
  assert.equal((await box.runCode('x', { context })).text, '41')
  await box.restartCodeContext(context)
  assert.equal((await box.runCode('x')).error.name, 'NameError')
  tell('works', 'Sandbox.listCodeContexts Sandbox.restartCodeContext')
  await refused('Sandbox.createCodeContext', 'one context only', () => box.createCodeContext())
  await refused('Sandbox.removeCodeContext', 'one context only', () => box.removeCodeContext(context), '')
}

async function git(box) {
  const g = box.git
  await g.init('repo', { initialBranch: 'main' })
  await g.configureUser('Ada', 'ada@example.com')
  await g.setConfig('user.name', 'Ada', { scope: 'global' })
  assert.equal(await g.getConfig('user.name', { scope: 'global' }), 'Ada')
  await box.files.write('repo/a', '1')
  await g.add('repo')
  await g.commit('repo', 'first')
  assert((await g.status('repo')).isClean)
  await g.createBranch('repo', 'next')
  await g.checkoutBranch('repo', 'main')
  assert((await g.branches('repo')).branches.includes('next'))
  await g.deleteBranch('repo', 'next')
  await box.files.write('repo/a', '2')
  await g.add('repo')
  await g.reset('repo')
  await g.restore('repo', { paths: ['a'] })
  assert.equal(await box.files.read('repo/a'), '1')
  await box.commands.run('git init --bare -b main far')
  const far = (await box.commands.run('echo $PWD/far')).stdout.trim()
  await g.remoteAdd('repo', 'origin', far)
  assert.equal(await g.remoteGet('repo', 'origin'), far)
  await g.push('repo', { remote: 'origin', branch: 'main' })
  await g.pull('repo', { remote: 'origin', branch: 'main' })
  await g.clone(far, { path: 'copy' })
  await g.dangerouslyAuthenticate({ username: 'ada', password: 'not-a-secret' })
  tell('works', names(g.constructor).filter((name) => !INTERNAL.has(`Git.${name}`)).map((name) => `Git.${name}`).join(' '))
}

async function notOffered(box) {
  await refused('Sandbox.pause Sandbox.betaPause', pauses, () => Sandbox.pause(box.sandboxId), '501')
  await refused('Sandbox.createSnapshot', pauses, () => Sandbox.createSnapshot(box.sandboxId), '501')
  await refused('Sandbox.fork', pauses, () => Sandbox.fork(box.sandboxId), '501')
  assert.deepEqual(await Sandbox.listSnapshots().nextItems(), [])
  assert.equal(await Sandbox.deleteSnapshot('missing'), false)
  tell('works', 'Sandbox.listSnapshots Sandbox.deleteSnapshot')
  await refused('Sandbox.getMcpToken Sandbox.getMcpUrl', 'there is no template mcp-gateway',
    () => Sandbox.create({ mcp: { x: {} } }), 'mcp')
}

function names(kind) {
  const found = new Set()
  for (let each = kind.prototype; each && each !== Object.prototype; each = Object.getPrototypeOf(each)) {
    Object.getOwnPropertyNames(each).forEach((name) => found.add(name))
  }
  for (let each = kind; each && each !== Function.prototype; each = Object.getPrototypeOf(each)) {
    Object.getOwnPropertyNames(each).filter((name) => typeof each[name] === 'function').forEach((name) => found.add(name))
  }
  found.delete('constructor')
  return [...found].filter((name) => !name.startsWith('_') && name !== 'prototype')
}

function checkComplete(box) {
  const kinds = { Sandbox, Filesystem: box.files.constructor, Commands: box.commands.constructor,
    Pty: box.pty.constructor, Git: box.git.constructor }
  const missing = Object.entries(kinds)
    .flatMap(([name, kind]) => names(kind).map((method) => `${name}.${method}`))
    .filter((method) => !seen.has(method) && !INTERNAL.has(method))
  assert.deepEqual(missing, [])
}

await lifecycle()
const box = await Sandbox.create({ timeoutMs: 120_000 })
try {
  for (const part of [files, commands, terminals, code, git, notOffered]) await part(box)
  checkComplete(box)
} finally {
  await box.kill()
}
process.exit(0)
