#!/usr/bin/env bash
# uvicorn with httptools: a stream to an HTTP/1.0 client is sent in chunks, which it cannot know.
#
# Packages: uvicorn 0.54.0, starlette 1.10.0, httptools 0.9.0, h11 0.16.0
# Behaviour: without a content-length the httptools protocol sends `transfer-encoding: chunked`
#   whatever the version of the request. A 1.0 client (ab, an old proxy) finds the sizes in the
#   middle of the events. With h11 the body is plain.
# Seen (2026-11-29): httptools: body "9\r\ndata: a\n\n\r\n0\r\n\r\n" under HTTP/1.1 200;
#   h11: "data: a\n\n" and the end of the connection.
# One would have guessed: both do what RFC 9112, 6.1 demands ("MUST NOT send a response containing
#   Transfer-Encoding unless the corresponding request indicates HTTP/1.1 or later").
# Exit 0 while this holds.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check \
  'uvicorn==0.54.0' 'starlette==1.10.0' 'httptools==0.9.0' 'h11==0.16.0'
"$dir/venv/bin/python" - <<'PY'
import socket
import time
from threading import Thread

import uvicorn
from starlette.responses import StreamingResponse


async def events():
    yield "data: a\n\n"


async def app(scope, receive, send):
    await StreamingResponse(events(), media_type="text/event-stream")(scope, receive, send)


def ask(http):
    """The head and the body that an HTTP/1.0 client gets."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=http, lifespan="off", log_level="error"))
    thread = Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    with socket.create_connection(listener.getsockname(), timeout=10) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        received = b"".join(iter(lambda: client.recv(4096), b""))
    server.should_exit = True
    thread.join(10)
    head, _, body = received.partition(b"\r\n\r\n")
    return head.lower(), body


head, body = ask("h11")
print(body)
assert b"transfer-encoding" not in head and body == b"data: a\n\n"
head, body = ask("httptools")
print(body)
assert b"transfer-encoding: chunked" in head and body == b"9\r\ndata: a\n\n\r\n0\r\n\r\n"
PY
