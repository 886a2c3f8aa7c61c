#!/usr/bin/env bash
# AI SDK: `x-should-retry: false` is not read; a 502 that carries it is asked three times.
#
# Packages: npm ai 6.0.326, @ai-sdk/openai 3.0.141, openai 6.49.0 (Node 20)
# Behaviour: OpenAI's own client does what the header says. The AI SDK goes by the status alone,
#   behind a gateway that has tried again already as well.
# Seen (2026-11-30): calls of one request: AI SDK 3, openai 1.
# One would have guessed: the provider package for OpenAI reads the header of OpenAI's API.
#   (`maxRetries: 0` is the remedy.)
# Exit 0 while this holds.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
npm install --silent --no-audit --no-fund --prefix "$dir" ai@6.0.326 @ai-sdk/openai@3.0.141 openai@6.49.0
cat > "$dir/try.mjs" <<'JS'
import assert from 'node:assert';
import http from 'node:http';
import { createOpenAI } from '@ai-sdk/openai';
import { generateText } from 'ai';
import OpenAI from 'openai';

let calls = 0;
const server = http.createServer((request, response) => {
  calls += 1;
  request.resume();
  response.writeHead(502, { 'content-type': 'application/json', 'x-should-retry': 'false' });
  response.end(JSON.stringify({ error: { message: 'tried already', type: 'server_error', param: null, code: null } }));
});
await new Promise((ready) => server.listen(0, '127.0.0.1', ready));
const options = { apiKey: 'none', baseURL: `http://127.0.0.1:${server.address().port}` };

async function callsOf(ask) {
  calls = 0;
  await assert.rejects(ask);
  return calls;
}

const sdk = await callsOf(() => generateText({ model: createOpenAI(options).chat('m'), prompt: 'hi' }));
const own = await callsOf(() => new OpenAI(options).chat.completions.create({ model: 'm', messages: [] }));
console.log({ sdk, own });
assert.deepEqual({ sdk, own }, { sdk: 3, own: 1 });
server.closeAllConnections();
server.close();
JS
node "$dir/try.mjs"
