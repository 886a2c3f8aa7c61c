#!/usr/bin/env bash
# openai (npm): `Content-Type: Application/JSON` gives a string instead of an object.
#
# Packages: npm openai 6.49.0 (Node 20)
# Behaviour: the client looks for "application/json" in the header as it stands. Media types are
#   compared without regard to case (RFC 9110, 8.3.1); written otherwise, the body is returned as
#   text from a call whose type says ChatCompletion. openai-python 3.57.0 parses both.
# Seen (2026-11-29): application/json: object, content "Hello"; Application/JSON: string, and
#   `.choices` is undefined.
# One would have guessed: case plays no part, or the call throws.
# Exit 0 while this holds.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
npm install --silent --no-audit --no-fund --prefix "$dir" openai@6.49.0
cat > "$dir/try.mjs" <<'JS'
import assert from 'node:assert';
import http from 'node:http';
import OpenAI from 'openai';

const message = { role: 'assistant', content: 'Hello' };
const answer = JSON.stringify({
  id: 'c', object: 'chat.completion', created: 1, model: 'm',
  choices: [{ index: 0, finish_reason: 'stop', message }],
});
let type;
const server = http.createServer((request, response) => {
  request.resume();
  response.writeHead(200, { 'content-type': type }).end(answer);
});
await new Promise((ready) => server.listen(0, '127.0.0.1', ready));
const client = new OpenAI({
  apiKey: 'none', baseURL: `http://127.0.0.1:${server.address().port}`, maxRetries: 0, timeout: 10000,
});

async function ask(contentType) {
  type = contentType;
  return client.chat.completions.create({ model: 'm', messages: [] });
}

const lower = await ask('application/json');
const mixed = await ask('Application/JSON');
console.log(typeof lower, typeof mixed);
assert.equal(lower.choices[0].message.content, 'Hello');
assert.equal(mixed, answer);
server.closeAllConnections();
server.close();
JS
node "$dir/try.mjs"
