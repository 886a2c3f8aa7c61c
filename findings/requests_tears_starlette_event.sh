#!/usr/bin/env bash
# requests and starlette: the charset that starlette adds makes requests tear an event at U+2028.
#
# Packages: starlette 1.10.0, uvicorn 0.54.0, requests 2.34.2
# Behaviour: iter_lines(decode_unicode=True) ends a line where str.splitlines() does, so also at
#   U+2028, U+2029 and U+0085, all legal inside a JSON string. What it splits depends on the
#   header: StreamingResponse appends "; charset=utf-8" to text/*, and then the true characters
#   are seen and the event is torn. Without the charset requests reads ISO-8859-1: whole, garbled.
# Seen (2026-11-29): one event of one line with U+2028 in it: with the charset 2 lines, the first
#   of them broken JSON; without it 1 line in which the character is three others.
# One would have guessed: lines end at CR and LF as in the format, and SSE is UTF-8 by definition.
# Exit 0 while this holds.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check \
  'starlette==1.10.0' 'uvicorn==0.54.0' 'requests==2.34.2'
"$dir/venv/bin/python" - <<'PY'
import json
import socket
import time
from threading import Thread

import requests
import uvicorn
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

EVENT = f"data: {json.dumps({'text': 'one' + chr(0x2028) + 'two'}, ensure_ascii=False)}\n\n"


async def events():
    yield EVENT


async def usual(request):
    return StreamingResponse(events(), media_type="text/event-stream")


async def bare(request):
    return StreamingResponse(events(), headers={"content-type": "text/event-stream"})


app = Starlette(routes=[Route("/usual", usual), Route("/bare", bare)])
listener = socket.create_server(("127.0.0.1", 0))
server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
deadline = time.monotonic() + 20
while not server.started and time.monotonic() < deadline:
    time.sleep(0.02)


def lines(path):
    url = f"http://127.0.0.1:{listener.getsockname()[1]}{path}"
    with requests.get(url, stream=True, timeout=10) as answer:
        seen = [line for line in answer.iter_lines(decode_unicode=True) if line]
        return answer.headers["content-type"], seen


print(lines("/usual"), lines("/bare"))
kind, torn = lines("/usual")
assert kind == "text/event-stream; charset=utf-8" and torn == ['data: {"text": "one', 'two"}']
kind, garbled = lines("/bare")
assert kind == "text/event-stream" and garbled == [EVENT.strip().encode().decode("iso-8859-1")]
PY
