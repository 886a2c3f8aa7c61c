#!/usr/bin/env bash
# openai-python with its aiohttp transport: a refused connection is a time-out, after no time.
#
# Packages: openai[aiohttp] 3.57.0, httpx2 2.16.2, aiohttp 3.14.5
# Behaviour: the transport maps aiohttp's connection errors to ConnectTimeout, and the client
#   makes APITimeoutError of it. The default transport says APIConnectionError.
# Seen (2026-11-29): port without a listener: aiohttp APITimeoutError ("Request timed out.")
#   after 1-10 ms, with a limit of 30 s; httpx2 APIConnectionError.
# One would have guessed: the transport changes the speed, not the class of the error. (An
#   APITimeoutError is an APIConnectionError too: `except APITimeoutError` first is what differs.)
# Exit 0 while this holds.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check \
  'openai[aiohttp]==3.57.0' 'httpx2==2.16.2' 'aiohttp==3.14.5'
"$dir/venv/bin/python" - <<'PY'
import asyncio
import socket
import time

import openai


async def ask(http_client, port):
    """The class of the error and the seconds until it came."""
    started = time.monotonic()
    async with openai.AsyncOpenAI(
        api_key="none", base_url=f"http://127.0.0.1:{port}", http_client=http_client, max_retries=0, timeout=30
    ) as client:
        try:
            await client.models.list()
        except openai.APIConnectionError as error:
            return type(error), time.monotonic() - started


async def main():
    with socket.socket() as bound:  # bound, but it does not listen: connecting is refused
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        default = await ask(openai.DefaultAsyncHttpxClient(), port)
        aiohttp = await ask(openai.DefaultAioHttpClient(), port)
    print(default, aiohttp)
    assert default[0] is openai.APIConnectionError
    assert aiohttp[0] is openai.APITimeoutError and aiohttp[1] < 5


asyncio.run(main())
PY
