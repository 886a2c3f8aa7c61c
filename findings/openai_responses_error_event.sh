#!/usr/bin/env bash
# openai-python: the Responses API's own `error` event raises nothing; a nested one would.
#
# Packages: openai 3.57.0, httpx2 2.16.2
# Behaviour: the stream reader raises for events whose data has a truthy field `error`. The
#   documented event has its code and message at the top: {"type": "error", "code", "message"}.
#   So it is handed out like a piece of text, and the loop ends as if all were well.
# Seen (2026-11-29): flat: ['response.output_text.delta', 'error'] and a quiet end;
#   {"type": "error", "error": {...}}: APIError "overloaded".
# One would have guessed: the form that OpenAI documents raises; the other form perhaps.
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

DELTA = {
    "type": "response.output_text.delta", "sequence_number": 1, "item_id": "i",
    "output_index": 0, "content_index": 0, "delta": "Hel", "logprobs": [],
}
REASON = {"code": "server_error", "message": "overloaded", "param": None}
ERRORS = {
    "/flat/responses": {"type": "error", "sequence_number": 2, **REASON},
    "/nested/responses": {"type": "error", "sequence_number": 2, "error": REASON},
}


class Upstream(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for data in (DELTA, ERRORS[self.path]):
            self.wfile.write(f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode())

    def log_message(self, *args):
        pass


server = HTTPServer(("127.0.0.1", 0), Upstream)
Thread(target=server.serve_forever, daemon=True).start()


def ask(path):
    client = openai.OpenAI(
        api_key="none", base_url=f"http://127.0.0.1:{server.server_port}/{path}", max_retries=0, timeout=10
    )
    try:
        return [event.type for event in client.responses.create(model="m", input="hi", stream=True)]
    except openai.APIError as error:
        return error.message


print(ask("flat"), ask("nested"))
assert ask("flat") == ["response.output_text.delta", "error"]
assert ask("nested") == "overloaded"
PY
