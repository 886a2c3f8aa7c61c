#!/usr/bin/env bash
# httpx2 under openai-python: of a gzip body in several members only the first is read, silently.
#
# Packages: openai 3.57.0, httpx2 2.16.2; for comparison urllib3 2.6.3
# Behaviour: a gzip stream may be several members one after the other (RFC 1952, 2.2), which is
#   what a server writes that compresses each piece by itself. httpx2's decoder stops behind
#   the first and throws the rest away without an error; a stream of events just ends.
# Seen (2026-11-29): openai-python "Hel" and a quiet end; urllib3 and Python's gzip read both.
# One would have guessed: all members, or a DecodingError.
# Exit 0 while this holds.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check \
  'openai==3.57.0' 'httpx2==2.16.2' 'urllib3==2.6.3'
"$dir/venv/bin/python" - <<'PY'
import gzip
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import openai
import urllib3


def event(text):
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return f"data: {json.dumps(chunk | {'choices': [choice]})}\n\n".encode()


PIECES = [event("Hel"), event("lo"), b"data: [DONE]\n\n"]
BODY = b"".join(map(gzip.compress, PIECES))
assert gzip.decompress(BODY) == b"".join(PIECES)


class Upstream(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-encoding", "gzip")
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *args):
        pass


server = HTTPServer(("127.0.0.1", 0), Upstream)
Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}"

client = openai.OpenAI(api_key="none", base_url=url, max_retries=0, timeout=10)
chunks = client.chat.completions.create(model="m", messages=[], stream=True)
text = "".join(chunk.choices[0].delta.content for chunk in chunks)
other = urllib3.request("POST", url, timeout=10).data
print(repr(text), len(other), len(gzip.decompress(BODY)))
assert other == gzip.decompress(BODY)
assert text == "Hel"
PY
