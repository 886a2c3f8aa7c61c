#!/usr/bin/env bash
# openai (npm): its stream helper rejects a whole answer because no delta named the role.
#
# Packages: npm openai 6.49.0 (Node 20)
# Behaviour: `delta.role` is optional in the API's schema and in the client's own types, but
#   without it `chat.completions.stream()` refuses to build the final completion. Plain iteration
#   and openai-python's helper do not ask for it.
# Seen (2026-11-29): helper with role: "Hello"; without: OpenAIError "missing role for choice 0";
#   plain iteration of the same stream: "Hello".
# One would have guessed: "assistant", the only role that an answer has.
# Exit 0 while this holds.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
npm install --silent --no-audit --no-fund --prefix "$dir" openai@6.49.0
cat > "$dir/try.mjs" <<'JS'
import assert from 'node:assert';
import http from 'node:http';
import OpenAI from 'openai';

const event = (delta, finish_reason = null) => `data: ${JSON.stringify({
  id: 'c', object: 'chat.completion.chunk', created: 1, model: 'm',
  choices: [{ index: 0, delta, finish_reason }],
})}\n\n`;
const server = http.createServer((request, response) => {
  request.resume();
  const role = request.url.startsWith('/with/') ? { role: 'assistant' } : {};
  response.writeHead(200, { 'content-type': 'text/event-stream' });
  response.end(event({ ...role, content: 'Hel' }) + event({ content: 'lo' }) + event({}, 'stop') + 'data: [DONE]\n\n');
});
await new Promise((ready) => server.listen(0, '127.0.0.1', ready));

const client = (path) => new OpenAI({
  apiKey: 'none', baseURL: `http://127.0.0.1:${server.address().port}/${path}`, maxRetries: 0, timeout: 10000,
});

async function iterate(path) {
  let text = '';
  for await (const chunk of await client(path).chat.completions.create({ model: 'm', messages: [], stream: true })) {
    text += chunk.choices[0].delta.content ?? '';
  }
  return text;
}

async function ask(path) {
  const stream = client(path).chat.completions.stream({ model: 'm', messages: [] });
  return (await stream.finalChatCompletion()).choices[0].message.content;
}

const whole = await ask('with');
const error = await ask('without').catch((reason) => reason);
const plain = await iterate('without');
console.log(whole, '|', String(error), '|', plain);
assert.equal(whole, 'Hello');
assert.equal(plain, 'Hello');
assert.ok(error instanceof OpenAI.OpenAIError && /missing role/.test(error.message));
server.closeAllConnections();
server.close();
JS
node "$dir/try.mjs"
