#!/usr/bin/env bash
# openai-python with its aiohttp transport: what came at once is handed on 16 KiB at a time.
#
# Packages: openai[aiohttp] 3.57.0, httpx2 2.16.2, aiohttp 3.14.5
# Behaviour: the transport reads the body in pieces of 16,384 bytes at most, wherever they end.
#   The default transport hands on whole what the socket had, up to 64 KiB.
# Seen (2026-11-30): a body of 60 events of 1,000 bytes, sent in one write and read a moment
#   later: aiohttp [16384, 16384, 16384, 10848], the last three begin inside of an event; httpx2
#   [60000].
# One would have guessed: aiter_raw without a size hands on what has come. (Who passes whole
#   events on has to join them again, and a burst takes four times as many turns.)
# Exit 0 while this holds.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check \
  'openai[aiohttp]==3.57.0' 'httpx2==2.16.2' 'aiohttp==3.14.5'
"$dir/venv/bin/python" - <<'PY'
import asyncio

import openai

EVENT = b"data: " + b"x" * 992 + b"\n\n"
BODY = EVENT * 60
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(BODY)


async def answer(reader, writer):
    await reader.readuntil(b"\r\n\r\n")
    writer.write(HEAD + BODY)
    await reader.read()
    writer.close()


async def read(http_client, port):
    """The sizes of the pieces, and how many begin inside of an event."""
    async with http_client, http_client.stream("GET", f"http://127.0.0.1:{port}/") as response:
        await asyncio.sleep(0.5)  # until all of it has come
        pieces = [piece async for piece in response.aiter_raw()]
    assert b"".join(pieces) == BODY
    return [len(piece) for piece in pieces], sum(not piece.startswith(b"data: ") for piece in pieces)


async def main():
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    default = await read(openai.DefaultAsyncHttpxClient(), port)
    aiohttp = await read(openai.DefaultAioHttpClient(), port)
    print("httpx2", default, "aiohttp", aiohttp)
    assert aiohttp == ([16384, 16384, 16384, 10848], 3)
    assert max(default[0]) > 16384
    server.close()


asyncio.run(main())
PY
