#!/usr/bin/env bash
# openai-python: `stream=True` answered with plain JSON is an empty stream, also when it is an error.
#
# Packages: openai 3.57.0, httpx2 2.16.2
# Behaviour: the stream reader never looks at Content-Type. A JSON body has no line that begins
#   with a known SSE field, so every line is ignored and the loop ends without an item.
# Seen (2026-11-29): [] for a whole chat.completion and [] for {"error": {"message": "quota"}},
#   both with 200 and application/json (an upstream or a gateway that has no streaming).
# One would have guessed: an error about the content type, or the answer in one chunk; at least
#   the APIError that the same error object raises when it comes as an event.
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

MESSAGE = {"role": "assistant", "content": "Hello"}
ANSWER = {
    "id": "c", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": MESSAGE}],
}
ERROR = json.dumps({"error": {"message": "quota"}})
BODIES = {
    "/answer/chat/completions": ("application/json", json.dumps(ANSWER)),
    "/error/chat/completions": ("application/json", ERROR),
    "/event/chat/completions": ("text/event-stream", f"data: {ERROR}\n\n"),
}


class Upstream(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        kind, body = BODIES[self.path]
        self.send_response(200)
        self.send_header("content-type", kind)
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
    try:
        return list(client.chat.completions.create(model="m", messages=[], stream=True))
    except openai.APIError as error:
        return error.message


print(ask("answer"), ask("error"), ask("event"))
assert ask("answer") == [] and ask("error") == []
assert ask("event") == "quota"
PY
