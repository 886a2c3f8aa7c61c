#!/usr/bin/env bash
# AI SDK: an error that comes in a chunk with `choices` is dropped; the stream ends without one.
#
# Packages: npm ai 6.0.326, @ai-sdk/openai 3.0.141, openai 6.49.0 (Node 20)
# Behaviour: OpenRouter reports an error in the middle of a stream as a regular chunk with
#   choices[0].finish_reason "error" and the reason in `error` beside `choices`. The schema of
#   @ai-sdk/openai's chat model takes it for a chunk and strips the field.
# Seen (2026-11-29): streamText: text "Hel", no part of type "error", finishReason "other";
#   openai's own client throws APIError "upstream gone".
# One would have guessed: an error part with the message, as it gives for a chunk that has
#   nothing but `error`.
# Exit 0 while this holds.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
npm install --silent --no-audit --no-fund --prefix "$dir" ai@6.0.326 @ai-sdk/openai@3.0.141 openai@6.49.0
cat > "$dir/try.mjs" <<'JS'
import assert from 'node:assert';
import http from 'node:http';
import { createOpenAI } from '@ai-sdk/openai';
import { streamText } from 'ai';
import OpenAI from 'openai';

const chunk = { id: 'c', object: 'chat.completion.chunk', created: 1, model: 'm' };
const error = { code: 'server_error', message: 'upstream gone' };
const choices = (delta, finish_reason) => ({ choices: [{ index: 0, delta, finish_reason }] });
const last = { beside: { ...chunk, error, ...choices({ content: '' }, 'error') }, alone: { error } };
const server = http.createServer((request, response) => {
  request.resume();
  const first = { ...chunk, ...choices({ role: 'assistant', content: 'Hel' }, null) };
  const events = [first, last[request.url.split('/')[1]]];
  response.writeHead(200, { 'content-type': 'text/event-stream' });
  response.end(events.map((data) => `data: ${JSON.stringify(data)}\n\n`).join('') + 'data: [DONE]\n\n');
});
await new Promise((ready) => server.listen(0, '127.0.0.1', ready));
const base = `http://127.0.0.1:${server.address().port}`;

async function parts(path) {
  const model = createOpenAI({ apiKey: 'none', baseURL: `${base}/${path}` }).chat('m');
  const seen = [];
  for await (const part of streamText({ model, prompt: 'hi', maxRetries: 0, onError() {} }).fullStream) {
    if (part.type === 'text-delta') seen.push(part.text);
    if (part.type === 'error') seen.push('error part');
    if (part.type === 'finish') seen.push(part.finishReason);
  }
  return seen;
}

const beside = await parts('beside');
const alone = await parts('alone');
console.log(beside, alone);
assert.deepEqual(alone, ['Hel', 'error part', 'error']);
assert.deepEqual(beside, ['Hel', 'other']);

const client = new OpenAI({ apiKey: 'none', baseURL: `${base}/beside`, maxRetries: 0, timeout: 10000 });
await assert.rejects(async () => {
  for await (const _ of await client.chat.completions.create({ model: 'm', messages: [], stream: true }));
}, /upstream gone/);
server.closeAllConnections();
server.close();
JS
node "$dir/try.mjs"
