// E2B's builder of templates in JavaScript: node templates.mjs URL

import assert from 'node:assert/strict'
import { mkdtempSync, mkdirSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

const [url] = process.argv.slice(2)
Object.assign(process.env, { E2B_API_URL: url, E2B_SANDBOX_URL: url })
const { Sandbox, Template } = await import('e2b')

const folder = mkdtempSync(join(tmpdir(), 'templates-'))
mkdirSync(join(folder, 'app'))
writeFileSync(join(folder, 'app', 'main.js'), 'console.log(1)\n')

const said = []
const template = Template({ fileContextPath: folder })
  .fromTemplate('base')
  .setEnvs({ WORD: 'written' })
  .copy('app', '/srv/app')
  .runCmd('echo $WORD')
  .setWorkdir('/srv/app')
const info = await Template.build(template, 'script:v1', { onBuildLogs: (entry) => said.push(entry.message) })
assert(said.includes('written'), said.join('\n'))
assert.equal((await Template.getBuildStatus(info)).status, 'ready')
assert.equal(await Template.exists('script'), true)
assert.equal(await Template.exists('none'), false)
const box = await Sandbox.create('script:v1')
assert.equal(await box.files.read('/srv/app/main.js'), 'console.log(1)\n')
await box.kill()
const assigned = await Template.assignTags('script:v1', ['v2'])
assert.equal(assigned.buildId, info.buildId)
await Template.removeTags('script', ['v1'])
assert.deepEqual((await Template.getTags('script')).map((each) => each.tag), ['v2'])
await assert.rejects(Template.build(Template().fromImage('debian:12').runCmd('exit 3'), 'fails'), /exit status 3/)
const later = await Template.buildInBackground(Template().fromPythonImage('3.11'), 'later')
assert.equal(later.tags[0], 'default')
