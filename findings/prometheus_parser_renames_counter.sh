#!/usr/bin/env bash
# prometheus_client: its parser of the text format renames a counter's samples.
#
# Packages: prometheus-client 0.26.0
# Behaviour: a family of TYPE counter whose name does not end in _total comes out with samples
#   that do; the name on the wire is nowhere in the result. Untyped or gauge: as written.
# Seen (2026-11-29): "# TYPE asks counter / asks 1": sample asks_total; as gauge: asks. With
#   both lines asks (counter) and asks_total (gauge) two families give the same sample name.
# One would have guessed: a parser of version 0.0.4, where the suffix is only a habit, gives the
#   names that it read.
# Exit 0 while this holds.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check 'prometheus-client==0.26.0'
"$dir/venv/bin/python" - <<'PY'
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

PAGES = {
    "/counter": "# TYPE asks counter\nasks 1\n",
    "/gauge": "# TYPE asks gauge\nasks 1\n",
    "/both": "# TYPE asks counter\nasks 1\n# TYPE asks_total gauge\nasks_total 2\n",
}


class Service(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-type", "text/plain; version=0.0.4; charset=utf-8")
        self.end_headers()
        self.wfile.write(PAGES[self.path].encode())

    def log_message(self, *args):
        pass


server = HTTPServer(("127.0.0.1", 0), Service)
Thread(target=server.serve_forever, daemon=True).start()


def scrape(path):
    with urlopen(f"http://127.0.0.1:{server.server_port}{path}", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return [(sample.name, sample.value) for family in families for sample in family.samples]


print(scrape("/counter"), scrape("/gauge"), scrape("/both"))
assert scrape("/gauge") == [("asks", 1)]
assert scrape("/counter") == [("asks_total", 1)]
assert scrape("/both") == [("asks_total", 1), ("asks_total", 2)]
PY
