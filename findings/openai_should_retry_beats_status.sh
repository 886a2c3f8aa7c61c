#!/usr/bin/env bash
# openai-python: the answer's header `x-should-retry` beats its status, both ways.
#
# Packages: openai 3.57.0, httpx2 2.16.2
# Behaviour: before it looks at the status of an error the client obeys `x-should-retry: true` or
#   `false`, also where a gateway has handed the header on from another hop.
# Seen (2026-11-29): requests for one call with max_retries=2: 400 without the header 1, with
#   `true` 3; 503 without it 3, with `false` 1.
# One would have guessed: a 400 is never sent again, a 503 always.
# Exit 0 while this holds.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check 'openai==3.57.0' 'httpx2==2.16.2'
"$dir/venv/bin/python" - <<'PY'
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import openai

requests = []


class Upstream(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        requests.append(self.path)
        _, status, header, *_ = self.path.split("/")
        self.send_response(int(status))
        self.send_header("retry-after-ms", "1")
        if header != "without":
            self.send_header("x-should-retry", header)
        self.end_headers()

    def log_message(self, *args):
        pass


server = HTTPServer(("127.0.0.1", 0), Upstream)
Thread(target=server.serve_forever, daemon=True).start()


def count(status, header):
    """How often one call is sent."""
    requests.clear()
    url = f"http://127.0.0.1:{server.server_port}/{status}/{header}"
    client = openai.OpenAI(api_key="none", base_url=url, max_retries=2, timeout=10)
    try:
        client.chat.completions.create(model="m", messages=[])
    except openai.APIStatusError as error:
        assert error.status_code == status
    return len(requests)


seen = {(status, header): count(status, header) for status in (400, 503) for header in ("without", "true", "false")}
print(seen)
assert seen[400, "without"] == 1 and seen[400, "true"] == 3
assert seen[503, "without"] == 3 and seen[503, "false"] == 1
PY
