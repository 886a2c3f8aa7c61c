#!/usr/bin/env bash
# openai-python: an answer cut by max_output_tokens has no final response in its stream helper.
#
# Packages: openai 3.57.0, httpx2 2.16.2
# Behaviour: `responses.stream()` keeps the final response from `response.completed` only. The
#   regular last event of an answer that met its limit is `response.incomplete`, which holds
#   the whole response too, with text and usage.
# Seen (2026-11-29): the loop hands out both events, then get_final_response() raises
#   RuntimeError "Didn't receive a `response.completed` event."
# One would have guessed: the response with status "incomplete", as the plain call returns it.
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

EMPTY = {
    "id": "r", "object": "response", "created_at": 1, "model": "m", "status": "in_progress",
    "output": [], "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
}
TEXT = {"type": "output_text", "text": "Hel", "annotations": []}
ITEM = {"id": "i", "type": "message", "role": "assistant", "status": "incomplete", "content": [TEXT]}
CUT = EMPTY | {
    "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}, "output": [ITEM]
}


class Upstream(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        events = (
            {"type": "response.created", "sequence_number": 0, "response": EMPTY},
            {"type": "response.incomplete", "sequence_number": 1, "response": CUT},
        )
        stream = "".join(f"event: {data['type']}\ndata: {json.dumps(data)}\n\n" for data in events)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream" if asked.get("stream") else "application/json")
        self.end_headers()
        self.wfile.write((stream if asked.get("stream") else json.dumps(CUT)).encode())

    def log_message(self, *args):
        pass


server = HTTPServer(("127.0.0.1", 0), Upstream)
Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(
    api_key="none", base_url=f"http://127.0.0.1:{server.server_port}", max_retries=0, timeout=10
)

plain = client.responses.create(model="m", input="hi")
assert (plain.status, plain.output_text) == ("incomplete", "Hel")
with client.responses.stream(model="m", input="hi") as stream:
    types = [event.type for event in stream]
    try:
        outcome = stream.get_final_response().status
    except RuntimeError as error:
        outcome = error
print(types, repr(outcome))
assert types == ["response.created", "response.incomplete"]
assert isinstance(outcome, RuntimeError) and "response.completed" in str(outcome)
PY
