#!/usr/bin/env bash
# openai-python and httpx2: the path of a request goes behind the query of the base URL.
#
# Packages: openai 3.57.0, httpx2 2.16.2
# Behaviour: the base URL's path and query are one string (`raw_path`) to which the request's
#   path is glued. So OPENAI_BASE_URL=.../v1?api-version=1 asks /v1/ with a parameter
#   "1chat/completions". (httpx2 alone: `Client(base_url="https://h?x=1")` asks /?x=1/chat.)
# Seen (2026-11-29): "POST /v1/?api-version=1chat/completions"; what does work is
#   default_query={"api-version": "1"}: "POST /v1/chat/completions?api-version=1".
# One would have guessed: the path joins the path and the query stays behind it, or a ValueError.
# Exit 0 while this holds.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check 'openai==3.57.0' 'httpx2==2.16.2'
"$dir/venv/bin/python" - <<'PY'
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import httpx2
import openai

paths = []


class Upstream(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        paths.append(self.path)
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args):
        pass


server = HTTPServer(("127.0.0.1", 0), Upstream)
Thread(target=server.serve_forever, daemon=True).start()
root = f"http://127.0.0.1:{server.server_port}/v1"
for options in (
    {"base_url": root, "default_query": {"api-version": "1"}},
    {"base_url": root + "?api-version=1"},
):
    client = openai.OpenAI(api_key="none", max_retries=0, timeout=10, **options)
    client.chat.completions.create(model="m", messages=[])
alone = httpx2.Client(base_url="https://host?x=1").build_request("POST", "/chat").url
print(paths, alone)
assert alone == "https://host/?x=1/chat"
assert paths[0] == "/v1/chat/completions?api-version=1"
assert paths[1] == "/v1/?api-version=1chat/completions"
PY
