#!/usr/bin/env bash
# openai-python: once an event carried an `id:`, a comment block becomes an empty event.
#
# Packages: openai 3.57.0, httpx2 2.16.2
# Behaviour: its SSE decoder drops an empty block only while no last event id is known. After
#   `id: 1`, a keep-alive comment with an empty line is dispatched as an event without data,
#   and that empty string is parsed as JSON.
# Seen (2026-11-29): without the id "Hello"; with it "Hel", then json.JSONDecodeError
#   "Expecting value: line 1 column 1 (char 0)", which is no OpenAIError.
# One would have guessed: a comment is skipped, id or no id (the standard's "if the data buffer
#   is empty, set it and the event type buffer to the empty string and return").
# Exit 0 while this holds.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check 'openai==3.57.0' 'httpx2==2.16.2'
"$dir/venv/bin/python" - <<'PY'
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import openai


def event(text):
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return f"data: {json.dumps(chunk | {'choices': [choice]})}\n\n"


class Upstream(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        first = "id: 1\n" if self.path.startswith("/with-id/") else ""
        body = first + event("Hel") + ": keep-alive\n\n" + event("lo") + "data: [DONE]\n\n"
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args):
        pass


server = HTTPServer(("127.0.0.1", 0), Upstream)
Thread(target=server.serve_forever, daemon=True).start()


def ask(path):
    client = openai.OpenAI(
        api_key="none", base_url=f"http://127.0.0.1:{server.server_port}/{path}", max_retries=0, timeout=10
    )
    text = ""
    try:
        for chunk in client.chat.completions.create(model="m", messages=[], stream=True):
            text += chunk.choices[0].delta.content
    except Exception as error:
        return text, error
    return text, None


print(ask("without-id"), ask("with-id"))
assert ask("without-id") == ("Hello", None)
text, error = ask("with-id")
assert text == "Hel"
assert isinstance(error, json.JSONDecodeError) and not isinstance(error, openai.OpenAIError)
PY
