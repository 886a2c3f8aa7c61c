"""The promises of the service, over real sockets.

Every test speaks to a real uvicorn over a real socket; behind it stands the real HTTP client, and
behind that an upstream whose bytes the test writes one by one. What is pure has a table at the end.
"""

import asyncio
import base64
import gzip
import hashlib
import hmac
import http.client
import itertools
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import struct
import sys
import time
import tomllib
import zlib
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import ANY

import httpx2
import openai
import pytest
import pytest_asyncio
import structlog
import uvicorn
from dotenv import dotenv_values
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAI
from pydantic import TypeAdapter
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import service
from service import (
    AskCounts,
    ConfigError,
    EventLog,
    Failure,
    Histogram,
    LogDatabase,
    Metrics,
    Settings,
)

HERE = Path(__file__).parent
SERVICE = str(HERE / "service.py")
UVICORN = ("-m", "uvicorn", "service:app", "--port", "0")
KEY = "sk-test-0123456789"
TOKEN = "correct-horse-battery"
PAGE = "http://localhost:4200"  # a browser app that may call by default
JSON = {"Content-Type": "application/json"}
TURN = {"role": "user", "content": "Hola"}
ASK = {"prompt": "Hola"}
PLAIN = {"prompt": "Hola", "stream": False}
FULL = {"prompt": "Hola", "temperature": 0.7, "max_tokens": 9}
MIB = 2**20
PING = b": ping\n\n"
NOTHING_YET = {"active": 0, "total": 0, "failed": 0, "cancelled": 0}
TITLES = {
    "400 Bad Request": "invalid_json host_not_allowed upgrade_not_supported upstream_rejected",
    "401 Unauthorized": "unauthorized",
    "403 Forbidden": "origin_not_allowed",
    "404 Not Found": "not_found model_not_found",
    "405 Method Not Allowed": "method_not_allowed",
    "408 Request Timeout": "request_timeout",
    "413 Content Too Large": "body_too_large",
    "415 Unsupported Media Type": "unsupported_media_type",
    "422 Unprocessable Content": "invalid_request",
    "429 Too Many Requests": "rate_limited too_many_asks budget_exhausted",
    "500 Internal Server Error": "internal_error",
    "502 Bad Gateway": "upstream_auth upstream_unreachable upstream_error",
    "503 Service Unavailable": "not_configured overloaded",
    "504 Gateway Timeout": "upstream_timeout",
}
PROBLEMS = {code: title for title, codes in TITLES.items() for code in codes.split()}
# Cases of one rule share one service, which lives in the loop of the module.
in_module = pytest.mark.asyncio(loop_scope="module")


def cases(names: str, table: dict[str, Any]) -> pytest.MarkDecorator:
    """A parametrize whose cases have names."""
    return pytest.mark.parametrize(names, table.values(), ids=table.keys())


@dataclass
class Call:
    """One request that the upstream got, and the connection to answer it on.

    A test says in a *script* what the upstream does with a call. A script is a function of the
    call; each method here that takes nothing else is one, such as `Call.hang`. Longer ones are put
    together:

        play(a, b, ...)        the steps one after the other: a script, or bytes for one HTTP chunk
        stream(a, b, ...)      the same after the head of a 200 with an event stream
        replies(400, body)     a whole answer
        lambda _: go.wait()    a step that waits for an event of the test

    `start(script, script, ...)` makes the upstream play one script for each call, and the last one
    for all further calls. So `stream(chunk("Ho"), Call.reset)` is an answer that is lost after two
    letters, and `start(replies(503), answer)` an upstream that works at the second try.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self, status: int = 200, /, **headers: str) -> None:
        """The head of a chunked answer, an event stream unless *headers* say otherwise."""
        fields = {"content-type": "text/event-stream", "transfer-encoding": "chunked"}
        await self.raw(head_of(status, fields, headers))

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def write(self, data: bytes) -> None:
        """One HTTP chunk."""
        await self.raw(b"%x\r\n%b\r\n" % (len(data), data))

    async def say(self, *texts: str) -> None:
        """One event for each of *texts*, all in one HTTP chunk."""
        await self.write(b"".join(chunk(text) for text in texts))

    async def end(self) -> None:
        """The proper end of a chunked answer."""
        await self.raw(b"0\r\n\r\n")

    async def reply(self, status: int, body: object, **headers: str) -> None:
        """A whole answer, JSON unless *body* is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        usual = {"content-type": "application/json", "content-length": str(len(data))}
        await self.raw(head_of(status, usual, headers) + data)

    def abort(self) -> None:
        self.writer.transport.abort()

    async def reset(self) -> None:
        """End the connection with a RST."""
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.abort()

    async def close(self) -> None:
        """End the connection, whether or not the answer is complete."""
        self.writer.close()

    async def hang(self) -> None:
        """Say nothing more until the service closes the connection, then set `left`."""
        with suppress(ConnectionError):
            await self.reader.read(1)
        self.left.set()

    async def talk(self) -> None:
        """An answer without an end, until the service closes the connection."""
        await self.start()
        leaving = asyncio.create_task(self.hang())
        with suppress(ConnectionError):
            while not leaving.done():
                await self.say("la")
                await asyncio.sleep(0.005)
        await leaving


Script = Callable[[Call], Awaitable[object]]


def head_of(status: int, usual: dict[str, str], more: dict[str, str]) -> bytes:
    """The head of an answer; `_` in the names of *more* stands for `-`."""
    named = usual | {name.replace("_", "-"): value for name, value in more.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"HTTP/1.1 {status} Scripted\r\n{lines}\r\n".encode()


def chunk(text: str | None = None, **more: Any) -> bytes:
    """One upstream event; *more* goes beside `choices`, `finish_reason` into the choice."""
    reason = more.pop("finish_reason", None)
    said = {} if text is None else {"content": text}
    choices = [{"index": 0, "delta": said, "finish_reason": reason}]
    parsed = {"model": "gpt-real", "choices": choices, **more}
    # Compact, as OpenAI writes it.
    return f"data: {json.dumps(parsed, separators=(',', ':'))}\n\n".encode()


def completion(text: str, total_tokens: int = 7) -> dict[str, Any]:
    """A plain answer of the upstream."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"model": "gpt-real", "choices": [choice], "usage": {"total_tokens": total_tokens}}


def refused(message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error body as OpenAI writes it."""
    return {"error": {"message": message, "code": code, "param": param, "type": "x"}}


HOLA = chunk("Hola")
FINISH = chunk(finish_reason="stop") + b'data: {"choices":[],"usage":{"total_tokens":7}}\n\n'
DONE = b"data: [DONE]\n\n"


async def answer(call: Call) -> None:
    """What the upstream does when a test says nothing else: it answers "Hola"."""
    if call.method == "GET":
        await call.reply(200, {"data": []})
    elif call.body["stream"]:
        await call.start()
        await call.say("Ho", "la")
        await call.write(FINISH + DONE)
        await call.end()
    else:
        await call.reply(200, completion("Hola"))


def play(*steps: bytes | Script) -> Script:
    """A script of these steps; bytes are one HTTP chunk."""

    async def script(call: Call) -> None:
        for step in steps:
            await (call.write(step) if isinstance(step, bytes) else step(call))

    return script


def stream(*steps: bytes | Script) -> Script:
    return play(Call.start, *steps)


def replies(status: int, body: object = b"", **headers: str) -> Script:
    return lambda call: call.reply(status, body, **headers)


@dataclass
class Flood:
    """A script that talks until the service takes no more, and goes on with *then*."""

    then: Script
    pieces: int = 0
    blocked: asyncio.Event = field(default_factory=asyncio.Event)
    piece = "x" * 2**18

    async def __call__(self, call: Call) -> None:
        await call.start()
        with suppress(TimeoutError):
            while self.pieces < 256:
                self.pieces += 1
                async with asyncio.timeout(0.5):
                    await call.say(self.piece)
        self.blocked.set()
        await self.then(call)


@dataclass
class FakeUpstream:
    """An OpenAI-compatible server that plays *scripts*, one a call, and the last one for ever."""

    scripts: list[Script] = field(default_factory=lambda: [answer])
    calls: list[Call] = field(default_factory=list)
    called: asyncio.Event = field(default_factory=asyncio.Event)
    connections: int = 0
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = head[0].split(" ")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                data = await reader.readexactly(int(headers.get("content-length", 0)))
                body = json.loads(data) if data else None
                call = Call(method, path, headers, body, reader, writer)
                self.calls.append(call)
                self.called.set()
                script = self.scripts[0] if len(self.scripts) == 1 else self.scripts.pop(0)
                await script(call)
        writer.close()


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    fake = FakeUpstream()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    yield fake
    server.close()
    for call in fake.calls:
        call.abort()


@pytest.fixture
def proxy(upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> FakeUpstream:
    """The fake upstream, reached at the address of any host but 127.0.0.1."""
    monkeypatch.setenv("HTTP_PROXY", upstream.url.removesuffix("/v1"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return upstream


@asynccontextmanager
async def serve(app: ASGIApp) -> AsyncIterator[str]:
    """Run *app* under a real server on a free loopback port; yields its base URL."""
    config = uvicorn.Config(app, port=0, log_config=None, http=service.HTTPProtocol)
    config.load()
    # Not Server.serve(), whose pauses would cost each test a quarter of a second.
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        for each in server.servers:
            each.close()
        await server.lifespan.shutdown()


class Client(DefaultAsyncHttpxClient):
    """A client that waits at most ten seconds for a whole answer."""

    def __init__(self, base_url: str) -> None:
        super().__init__(base_url=base_url, timeout=10, verify=False)

    async def request(self, *args: Any, **kwargs: Any) -> Any:
        async with asyncio.timeout(10):
            return await super().request(*args, **kwargs)


Start = Callable[..., Awaitable[Client]]


@pytest.fixture
async def start(upstream: FakeUpstream) -> AsyncIterator[Start]:
    """Start a service before an upstream that plays *scripts*, with other *settings* if need be."""
    async with AsyncExitStack() as owned:

        async def started(*scripts: Script, **settings: Any) -> Client:
            upstream.scripts = [*scripts] or upstream.scripts
            usual = {"openai_api_key": KEY, "openai_base_url": upstream.url}
            app = service.create_app(Settings(**{**usual, **settings}))
            url = await owned.enter_async_context(serve(app))
            return await owned.enter_async_context(Client(url))

        yield started


@pytest.fixture
async def client(start: Start) -> Client:
    """A client of a service with the usual settings."""
    return await start()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Client]:
    """A client of a service without a key: a page that may call, with the token."""
    app = service.create_app(Settings(api_token=TOKEN))
    async with serve(app) as url, Client(url) as client:
        client.headers |= {"Origin": PAGE, "Authorization": f"Bearer {TOKEN}"}
        yield client


@asynccontextmanager
async def python(*args: str, cwd: Path, **env: str) -> AsyncIterator[Process]:
    """A process with nothing in its environment but *env*, for 20 seconds at most."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE), **env}
    run = asyncio.create_subprocess_exec
    child = await run(sys.executable, *args, cwd=cwd, env=env, stdout=PIPE, stderr=PIPE)
    try:
        async with asyncio.timeout(20):
            yield child
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()


async def finished(*args: str, cwd: Path, **env: str) -> tuple[int | None, str, list[str]]:
    """The exit code, the output and the error lines of a process that ends by itself."""
    async with python(*args, cwd=cwd, **env) as child:
        out, err = await child.communicate()
    return child.returncode, out.decode(), err.decode().splitlines()


@dataclass
class Running:
    """A service in a process of its own; its output is read as far as a test asks for it."""

    process: Process
    client: Client
    output: str = ""

    async def read(self, pattern: str) -> str:
        """What *pattern* finds in the next line that has it."""
        assert self.process.stdout
        while line := (await self.process.stdout.readline()).decode():
            self.output += line
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError(self.output)

    async def ended(self) -> list[Any]:
        """All events that it has written, and nothing else, once the process is gone."""
        out, err = await self.process.communicate()
        self.output += out.decode()
        assert (err, "Traceback" in self.output) == (b"", False)
        return [json.loads(line) for line in self.output.splitlines()]

    async def refuses(self) -> None:
        """Returns as soon as no new connection is taken."""
        with suppress(ConnectionError):
            while True:
                async with connection(self.client):
                    pass

    def peak(self) -> int:
        """The most memory that it has had so far, in MiB."""
        told = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(told.partition("VmHWM:")[2].split()[0]) // 1024


@asynccontextmanager
async def launched(*args: str, cwd: Path, **env: str) -> AsyncIterator[Running]:
    """A process that serves, as soon as its log says where."""
    async with python(*args, cwd=cwd, **env) as child, Client("") as client:
        running = Running(child, client)
        client.base_url = "http://127.0.0.1:" + await running.read(r"http://[\w.]+:(\d+)")
        yield running


@asynccontextmanager
async def connection(
    client: Client,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A bare connection to the service that *client* speaks to."""
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def post(body: str, *headers: str, path: str = "/ask", host: str = "localhost") -> bytes:
    """A POST of JSON as it goes over the wire."""
    usual = ("Content-Type: application/json", f"Content-Length: {len(body.encode())}")
    lines = (f"POST {path} HTTP/1.1", f"Host: {host}", *usual, *headers)
    return "\r\n".join((*lines, "", body)).encode()


async def raw(client: Client, data: str | bytes) -> str:
    """The code of the problem that answers *data*, which need not be a whole request."""
    async with connection(client) as (reader, writer), asyncio.timeout(10):
        writer.write(data if isinstance(data, bytes) else data.encode())
        found = re.search(rb'"code":"(\w+)"', await reader.readuntil(b"}"))
    return found[1].decode() if found else ""


@dataclass
class Wire:
    """A client on a bare socket, which sees what the service wrote at a time."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    head: str = ""
    length: int | None = None

    async def write(self) -> bytes:
        """One write of the service, an HTTP chunk or a whole body; empty where there is no more."""
        async with asyncio.timeout(5):
            if not self.head:
                self.head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
                if whole := re.search(r"content-length: (\d+)", self.head):
                    self.length = int(whole[1])
            if self.length is not None:
                size, self.length = self.length, 0
                return await self.reader.readexactly(size)
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            return (await self.reader.readexactly(size + 2))[:-2]

    async def rest(self) -> list[bytes]:
        """All further writes."""
        writes = []
        while data := await self.write():
            writes.append(data)
        return writes


@asynccontextmanager
async def asking(client: Client, **ask: Any) -> AsyncIterator[Wire]:
    """An ask under way; its client leaves at the end of the block."""
    async with connection(client) as (reader, writer):
        writer.write(post(json.dumps({**ASK, **ask}), "X-Request-ID: ask-1"))
        yield Wire(reader, writer)


def events(text: bytes | str) -> list[Any]:
    """The data of each event of a stream; `[DONE]` as it stands, all else as JSON."""
    text = text if isinstance(text, str) else text.decode()
    assert text.endswith("\n\n"), "an event is closed by an empty line"
    lines = [line for line in text.split("\n\n") if line and line != ": ping"]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


def delta(text: str) -> dict[str, str]:
    return {"type": "delta", "content": text}


def done(**facts: object) -> dict[str, object]:
    usual = {"type": "done", "finish_reason": "stop", "tokens_used": 7, "model": "gpt-real"}
    return usual | facts


def fault(code: str, status: int, **more: object) -> dict[str, object]:
    """An `error` event; what it says to a person is its own business."""
    event = {"type": "error", "error": ANY, "code": code, "status": status}
    return event | {"request_id": ANY, **more}


def conforms(value: object, kind: Any) -> bool:
    """Whether *value* is a *kind* of the service's own types, without a key more."""
    return bool(TypeAdapter(kind).validate_python(value, strict=True) == value)


def problem(response: Any, code: str) -> dict[str, Any]:
    """The body of *response*, which is the problem JSON of *code*, readable for a browser."""
    body: dict[str, Any] = response.json()
    assert (body["code"], f"{body['status']} {body['title']}") == (code, PROBLEMS[code])
    assert conforms(body, service.Problem)
    assert body["status"] == response.status_code
    assert response.headers["content-type"] == "application/problem+json"
    assert body["request_id"] == response.headers["x-request-id"]
    assert " " in body["detail"] or code in {"upstream_rejected", "rate_limited"}, (
        "a sentence for a person"
    )
    assert ("errors" in body) == (code == "invalid_request")
    if response.request.headers.get("origin") == PAGE:
        assert response.headers["access-control-allow-origin"] == PAGE
        exposed = response.headers["access-control-expose-headers"].lower()
        assert {"retry-after", "x-request-id"} == set(re.split(", *", exposed))
    return body


async def load(client: Client, path: str = "/logs?limit=1000") -> Any:
    response = await client.get(path)
    assert response.status_code == 200
    return response.json()


async def closings(client: Client, count: int = 1) -> list[Any]:
    """The closing events in the log, oldest first, as soon as there are *count* of them."""
    async with asyncio.timeout(5):
        while True:
            logged = await load(client)
            closed = [event for event in logged if event["message"].startswith("ask ")]
            if len(closed) >= count:
                return closed


async def cancelled(client: Client) -> None:
    """The one ask there was is over and counted as cancelled."""
    (closing,) = await closings(client)
    assert (closing["level"], closing["message"]) == ("WARNING", "ask cancelled")
    counts = (await load(client, "/status"))["asks"]
    assert counts == {"active": 0, "total": 1, "failed": 0, "cancelled": 1}


async def soon(event: asyncio.Event, limit: float = 5) -> None:
    async with asyncio.timeout(limit):
        await event.wait()


async def test_what_arrives_together_leaves_together_while_the_upstream_is_still_talking(start):
    go = asyncio.Event()
    rest = (lambda _: go.wait(), FINISH, DONE, Call.end)
    async with asking(await start(stream(chunk("Ho") + chunk("la"), *rest))) as wire:
        assert events(await wire.write()) == [delta("Ho"), delta("la")]
        go.set()
        assert [events(write) for write in await wire.rest()] == [[done(), "[DONE]"]]


async def test_a_stream_says_what_it_is(client):
    async with asking(client) as wire:
        await wire.rest()
    _, *lines = wire.head.splitlines()
    assert {
        "content-type: text/event-stream; charset=utf-8",
        "cache-control: no-cache, no-transform",
        "x-accel-buffering: no",
        "x-request-id: ask-1",
    } < {*lines}


@cases("end", {"LF": "\n", "CRLF": "\r\n", "CR": "\r"})
async def test_a_stream_in_single_bytes_arrives_to_the_letter(start, end):
    text = 'Olá, señor 😀\u2028 "\\"\r\n\tend\n\n'
    lines = []
    for letter in text:
        data = json.dumps({"choices": [{"delta": {"content": letter}}]}, ensure_ascii=False)
        lines += ["id: 1", f"data:{data[:12]}", ": in the middle", f"data: {data[12:]}", ""]
    sent = end.join(["\ufeffdata: {}", "", *lines, *(FINISH + DONE).decode().split("\n")]).encode()
    client = await start(stream(*(sent[i : i + 1] for i in range(len(sent))), Call.end))
    async with asking(client) as wire:
        writes = [events(write) for write in await wire.rest()]
    *said, last, mark = [event for write in writes for event in write]
    assert said == [delta(letter) for letter in text]
    assert [last, mark] == writes[-1][-2:] == [done(), "[DONE]"]


async def test_an_event_of_eight_megabytes_arrives_in_one_write(start):
    text = "é" * 2**20 + "x" * 2**21  # an escape of six bytes for each é
    event = chunk(text)
    pieces = (event[i : i + 2**14] for i in range(0, len(event), 2**14))
    async with asking(await start(stream(*pieces, FINISH + DONE, Call.end))) as wire:
        assert events(await wire.write())[0] == delta(text)


async def test_text_goes_out_as_it_reads_but_for_half_a_surrogate_pair_and_odd_line_ends(start):
    text = "é😀\x85\u2028\u2029\ud83d"
    streams = stream(chunk(text), chunk("\ude00"), FINISH + DONE, Call.end)
    client = await start(streams, replies(200, completion(text)))
    streamed = await client.post("/ask", json=ASK)
    assert events(streamed.content)[:2] == [delta(text), delta("\ude00")]
    plain = await client.post("/ask", json=PLAIN)
    assert plain.json()["response"] == text
    for response in (streamed, plain):
        assert 'é😀\\u0085\\u2028\\u2029\\ud83d"'.encode() in response.content


async def test_chunks_without_text_are_skipped_and_a_refusal_is_text(start):
    empty: list[object] = [{}, {"choices": []}, {"choices": None}, {"choices": [{}]}]
    for nothing in (None, {}, {"role": "assistant"}, {"content": ""}, {"content": None}):
        empty.append({"choices": [{"delta": nothing}]})
    skipped = b"".join(b"data: %b\n\n" % json.dumps(each).encode() for each in empty)
    no = b'data: {"choices":[{"delta":{"content":null,"refusal":"No."}}]}\n\n'
    client = await start(stream(skipped + chunk("Ho") + skipped + no, FINISH + DONE, Call.end))
    response = await client.post("/ask", json=ASK)
    assert events(response.content) == [delta("Ho"), delta("No."), done(), "[DONE]"]


@cases(
    "reason, more, facts",
    {
        "length": ("length", {}, {"finish_reason": "length"}),
        "filter": ("content_filter", {}, {"finish_reason": "content_filter"}),
        "Ollama's end": (None, {}, {"finish_reason": None}),
        "model": ("stop", {"model": "gpt-other"}, {"model": "gpt-other"}),
        "usage": ("stop", {"usage": {"total_tokens": 9}}, {"tokens_used": 9}),
        "Groq's": ("stop", {"x_groq": {"usage": {"total_tokens": 9}}}, {"tokens_used": 9}),
        "no usage": ("stop", {"usage": None, "x_groq": {"id": "x"}}, {"tokens_used": None}),
        "nonsense": (7, {"usage": {"total_tokens": math.nan}, "model": 5}, {"finish_reason": None}),
    },
)
async def test_what_the_upstream_tells_of_its_answer_is_told(start, reason, more, facts):
    said = {"finish_reason": reason, "delta": {"content": "Hola"}, "message": {"content": "Hola"}}
    last = {"choices": [said], **more}
    streams = stream(b"data: %b\n\n" % json.dumps(last).encode() + DONE, Call.end)
    client = await start(streams, replies(200, last))
    expected = {"finish_reason": "stop", "tokens_used": None, "model": "gpt-5.4-mini", **facts}
    response = await client.post("/ask", json=ASK)
    assert events(response.content) == [delta("Hola"), {"type": "done", **expected}, "[DONE]"]
    response = await client.post("/ask", json=PLAIN)
    assert response.json() == {"response": "Hola", **expected}
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers["content-length"]) == len(response.content)
    assert (await client.get("/logs")).status_code == 200


async def unsized(call: Call) -> None:
    """A stream without a length: it ends where the connection does."""
    await call.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
    await call.raw(chunk("Hola") + FINISH)
    await call.close()


ERROR = b'data: {"error":{"message":"SECRET","code":500}}\n\n'
HALF = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
HTML = b"<html><h1>SECRET</h1></html>"


async def cut(call: Call) -> None:
    await call.raw(HALF)
    await call.close()


async def half(call: Call) -> None:
    await call.raw(HALF)
    await call.hang()


async def garbage(call: Call) -> None:
    await call.raw(b"\x00\xffSECRET that is no HTTP\r\n\r\n")
    await call.close()


@cases(
    "script",
    {
        "finish_reason, close": stream(HOLA, FINISH, Call.end),
        "finish_reason, end of connection": unsized,
        "[DONE], open": stream(HOLA, FINISH + DONE, Call.hang),
        "[DONE], reset": stream(HOLA, FINISH + DONE, Call.reset),
        "[DONE], more": stream(HOLA, FINISH + DONE + chunk("more") + b"data: {\n\n", Call.end),
        "[DONE] alone, in an open line": stream(HOLA, DONE.strip(), Call.end),
    },
)
async def test_an_end_of_the_upstream_is_an_end(start, script):
    response = await (await start(script)).post("/ask", json=ASK)
    text, last, mark = events(response.content)
    assert (text, last["type"], mark) == (delta("Hola"), "done", "[DONE]")


@cases(
    "script",
    {
        "close": stream(HOLA, Call.end),
        "cut": stream(HOLA, Call.close),
        "reset": stream(HOLA, Call.reset),
        "finish_reason, cut": stream(HOLA + FINISH, Call.close),
        "finish_reason, reset": stream(HOLA + FINISH, Call.reset),
        "error": stream(HOLA + ERROR + DONE, Call.end),
        "HTML": stream(HOLA + b"data: " + HTML + b"\n\n" + DONE, Call.end),
        "more than JSON": stream(HOLA + b'data: {"choices":[]}{}\n\n' + DONE, Call.end),
        "null": stream(HOLA + b"data: null\n\n" + DONE, Call.end),
        "number": stream(HOLA + b'data: {"choices":[{"delta":{"content":5}}]}\n\n', Call.hang),
        "depth": stream(HOLA + b"data: " + b"[" * 100_000 + b"\n\n" + DONE, Call.end),
    },
)
async def test_anything_else_is_an_error_and_never_looks_complete(start, script):
    client = await start(script)
    response = await client.post("/ask", json=ASK, headers={"X-Request-ID": "ask-1"})
    expected = fault("upstream_error", 502, request_id="ask-1")
    assert events(response.content) == [delta("Hola"), expected]
    assert "SECRET" not in response.text
    (closing,) = await closings(client)
    assert (closing["level"], closing["message"]) == ("ERROR", "ask failed")


@cases(
    "ask, script",
    {
        "close": (ASK, Call.close),
        "reset": (ASK, Call.reset),
        "no HTTP": (ASK, garbage),
        "empty stream": (ASK, stream(Call.end)),
        "cut stream": (ASK, stream(Call.reset)),
        "error": (ASK, stream(ERROR, DONE, Call.end)),
        "HTML for a stream": (ASK, replies(200, HTML, content_type="text/html")),
        "HTML": (PLAIN, replies(200, HTML, content_type="text/html")),
        "more than JSON": (PLAIN, replies(200, json.dumps(completion("Hola")).encode() + HTML)),
        "error object": (PLAIN, replies(200, refused("SECRET"))),
        "no choices": (PLAIN, replies(200, {"choices": []})),
        "no message": (PLAIN, replies(200, {"choices": [{"message": None}]})),
        "list": (PLAIN, replies(200, [])),
        "nothing": (PLAIN, replies(200, b"")),
        "cut": (PLAIN, cut),
        "plain close": (PLAIN, Call.close),
    },
)
async def test_an_answer_that_is_none_has_a_status(start, ask, script):
    response = await (await start(script, openai_max_retries=0)).post("/ask", json=ask)
    problem(response, "upstream_error")
    assert "SECRET" not in response.text


@pytest.mark.parametrize("body", [b"", b" ", b"[DONE]", b"[]", HTML])
async def test_a_plain_200_that_is_no_json_object_is_an_error_in_both_formats(start, body):
    client = await start(replies(200, body))
    problem(await client.post("/ask", json=PLAIN), "upstream_error")
    response = await client.post("/v1/chat/completions", json={"messages": [TURN]})
    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_error")


async def test_bytes_that_are_no_text_are_replaced(start):
    script = stream(chunk("?").replace(b"?", b"\xff"), FINISH + DONE, Call.end)
    client = await start(script, replies(200, b'{"choices":[{"message":{"content":"\xff"}}]}'))
    response = await client.post("/ask", json=ASK)
    assert events(response.content) == [delta("\ufffd"), done(), "[DONE]"]
    assert (await client.post("/ask", json=PLAIN)).json()["response"] == "\ufffd"


async def test_pings_fill_the_silence_before_the_head_and_between_deltas(start):
    go = [asyncio.Event() for _ in range(3)]
    head, first, second = (lambda _, each=each: each.wait() for each in go)
    rest = stream(first, chunk("Ho"), second, chunk("la"), FINISH + DONE, Call.end)
    written = b""
    async with asking(await start(play(head, rest), heartbeat_seconds=0.05)) as wire:
        for each in go:
            while (write := await wire.write()) != PING:
                written += write
            each.set()
        written += b"".join(await wire.rest())
    assert events(written) == [delta("Ho"), delta("la"), done(), "[DONE]"]


@cases(
    "script, expected",
    {
        "500": (replies(500), fault("upstream_error", 502)),
        "429": (replies(429, retry_after="1.5"), fault("rate_limited", 429, retry_after=2)),
        "400": (replies(400, refused("No.")), fault("upstream_rejected", 400, error="No.")),
        "close": (Call.close, fault("upstream_error", 502)),
    },
)
async def test_what_fails_after_a_ping_is_an_event(start, upstream, script, expected):
    go = asyncio.Event()
    client = await start(play(lambda _: go.wait(), script), heartbeat_seconds=0.05)
    async with asking(client) as wire:
        assert await wire.write() == PING
        go.set()
        assert events(b"".join(await wire.rest())) == [expected]
    assert len(upstream.calls) == 1
    (closing,) = await closings(client)
    assert (closing["message"], closing["metadata"]["code"]) == ("ask failed", expected["code"])


async def test_what_failed_before_a_ping_is_not_tried_again_after_it(start, upstream):
    # Between two tries pass 0.19 s at least: time for a ping, if that is sent between them.
    client = await start(replies(503), answer, heartbeat_seconds=0.05)
    response = await client.post("/ask", json=ASK)
    assert (PING in response.content, len(upstream.calls)) in {(True, 1), (False, 2)}


async def test_a_plain_ask_has_a_status_however_late_it_fails(start):
    async def late(call: Call) -> None:
        await asyncio.sleep(0.1)  # Ten heartbeats, of which a plain answer has none.
        await call.reply(404, refused("No such model."))

    response = await (await start(late, heartbeat_seconds=0.01)).post("/ask", json=PLAIN)
    problem(response, "upstream_rejected")


async def test_only_what_was_asked_goes_upstream(client, upstream):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Yes."}]
    last = {"role": "user", "content": "Hola"}
    await client.post("/ask", json=ASK)
    await client.post("/ask", json={**ASK, "history": turns, "temperature": 0, "max_tokens": 9})
    await client.post("/ask", json={**PLAIN, "temperature": 0.7})
    usual = {"model": "gpt-5.4-mini", "stream": True, "stream_options": {"include_usage": True}}
    assert [call.body for call in upstream.calls] == [
        {**usual, "messages": [last]},
        {**usual, "messages": [*turns, last], "temperature": 0, "max_tokens": 9},
        {"model": "gpt-5.4-mini", "stream": False, "messages": [last], "temperature": 0.7},
    ]
    assert {call.path for call in upstream.calls} == {"/v1/chat/completions"}
    assert {call.headers["authorization"] for call in upstream.calls} == {f"bearer {KEY}"}


async def test_no_ask_has_a_header_that_the_upstream_has_no_use_for(start, upstream, monkeypatch):
    for name in ("ORG_ID", "PROJECT_ID", "CUSTOM_HEADERS"):
        monkeypatch.delenv(f"OPENAI_{name}", raising=False)
    client = await start()
    await client.post("/ask", json=ASK)
    await client.post("/ask", json=PLAIN)
    useful = {"host", "authorization", "accept", "accept-encoding", "user-agent"}
    useful |= {"content-type", "content-length"}
    asks = [call.headers for call in upstream.calls]
    assert [{*each} for each in asks] == [useful, useful]
    await client.get("/status")
    assert {call.headers["accept-encoding"] for call in upstream.calls} == {"identity"}


async def test_asks_and_the_probe_say_for_whom_they_are(start, upstream, monkeypatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Team: blue")
    client = await start()
    await client.post("/ask", json=ASK)
    await client.get("/status")
    for call in upstream.calls:
        said = [call.headers[f"openai-{name}"] for name in ("organization", "project")]
        assert [*said, call.headers["x-team"]] == ["org-1", "proj-1", "blue"]
    assert len(upstream.calls) == 2


OLD, NEW, HEAT = "max_tokens", "max_completion_tokens", "temperature"


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("api.openai.com", NEW),
        ("EU.API.OpenAI.com", NEW),
        ("x.openai.azure.com", NEW),
        ("x.services.ai.azure.com", NEW),
        ("evil-openai.com", OLD),
        ("openai.com.example", OLD),
        ("localhost:11434", OLD),
    ],
)
async def test_the_host_decides_how_the_token_limit_is_called(start, proxy, host, name):
    await (await start(openai_base_url=f"http://{host}/v1")).post("/ask", json=FULL)
    body = proxy.calls[0].body
    assert {key: body[key] for key in (OLD, NEW) if key in body} == {name: 9}


UNSUPPORTED = "Unsupported parameter: '{}' is not supported with this model."
USE_NEW = f"{UNSUPPORTED.format(OLD)} Use '{NEW}' instead."
ONLY_ONE = (
    f"Unsupported value: '{HEAT}' does not support 0.7 with this model. "
    "Only the default (1) value is supported."
)
LITELLM = (
    f"litellm.UnsupportedParamsError: gpt-5 models (including codex) don't support {HEAT}=0.7."
    f" Only {HEAT}=1 is supported. For gpt-5.1, {HEAT} is supported when reasoning_effort='none'"
)


@pytest.mark.parametrize(
    ("field", "code", "message"),
    [
        (OLD, "unsupported_parameter", USE_NEW),
        (OLD, "unsupported_parameter", "Nein."),
        (OLD, "invalid_request_body", USE_NEW),  # Copilot
        (OLD, None, USE_NEW),
        (NEW, None, f"Unrecognized request argument supplied: {NEW}"),  # Azure
        (NEW, None, f"property '{NEW}' is unsupported, did you mean '{OLD}'?"),  # Groq
        (HEAT, "unsupported_value", ONLY_ONE),
        (HEAT, None, ONLY_ONE),
        (HEAT, None, UNSUPPORTED.format(HEAT)),
        (HEAT, None, f"Model x does not support the {HEAT} parameter."),  # Databricks
        (HEAT, "400", LITELLM),
        (HEAT, "400", f"openai does not support parameters: {{'{HEAT}': 1}}, for model=o1-mini."),
        (HEAT, None, f"`{HEAT}` is deprecated for this model."),  # Anthropic
    ],
)
async def test_a_refused_field_costs_one_call_the_first_time(start, proxy, field, code, message):
    first = replies(400, refused(message, code, code and field))
    url = "http://api.openai.com/v1" if field == NEW else "http://localhost/v1"
    client = await start(first, answer, openai_base_url=url, openai_max_retries=0)
    ignored = {"ignored": [HEAT]} if field == HEAT else {}
    for _ in range(2):
        response = await client.post("/ask", json=FULL)
        assert events(response.content)[-2] == done(**ignored)
    plain = await client.post("/ask", json={**FULL, "stream": False})
    assert plain.json().get("ignored") == ignored.get("ignored")
    without = await client.post("/ask", json=PLAIN)
    assert "ignored" not in without.json()
    sent, *later, _ = [call.body for call in proxy.calls]
    assert sent.pop(field)
    sent |= {OLD: {NEW: 9}, NEW: {OLD: 9}, HEAT: {}}[field]
    assert later[:2] == [sent, sent]
    del sent["stream_options"]
    assert later[2:] == [sent | {"stream": False}]
    (warning,) = (await client.get("/logs?level=WARNING")).json()
    assert field in str(warning["metadata"])


async def test_a_model_that_refuses_two_fields_costs_three_calls(start, upstream):
    client = await start(*(replies(400, refused(each)) for each in (ONLY_ONE, USE_NEW)), answer)
    for calls in (3, 4):
        response = await client.post("/ask", json=FULL)
        assert events(response.content)[-2] == done(ignored=[HEAT])
        assert len(upstream.calls) == calls


async def test_a_model_that_refuses_both_token_fields_is_not_asked_for_ever(start, upstream):
    refusals = (USE_NEW, UNSUPPORTED.format(NEW))
    client = await start(*(replies(400, refused(each)) for each in refusals))
    response = await client.post("/ask", json=FULL)
    problem(response, "upstream_rejected")
    assert len(upstream.calls) == 2


async def test_asks_that_are_refused_at_the_same_time_learn_the_same(start, upstream):
    both = asyncio.Barrier(2)
    refusal = play(lambda _: both.wait(), replies(400, refused(USE_NEW)))
    client = await start(refusal, refusal, answer)
    asks = (client.post("/ask", json=PLAIN | {OLD: 9}) for _ in range(2))
    assert [response.status_code for response in await asyncio.gather(*asks)] == [200, 200]
    assert [OLD in call.body for call in upstream.calls] == [True, True, False, False]


@pytest.mark.parametrize(
    ("status", "param", "code", "message"),
    [
        (400, None, None, f"Setting '{OLD}' and '{NEW}' at the same time is not supported."),
        (400, OLD, None, f"{OLD} is too large: 6000. This model supports at most 4096 tokens."),
        (400, None, None, f"'{OLD}' or '{NEW}' is too large: 64000."),  # vLLM
        (400, OLD, "InvalidParameter", f"The parameter `{OLD}` specified is not valid: too large"),
        (400, HEAT, "decimal_above_max_value", f"Invalid '{HEAT}': decimal above maximum value."),
        (400, None, None, f"`{HEAT}` and `top_p` cannot both be specified for this model."),
        (400, "tools", "unsupported_parameter", UNSUPPORTED.format("tools")),
        (400, None, None, f"Parameter 'top_p' is not supported. Lower '{HEAT}' instead."),
        (422, OLD, "unsupported_parameter", USE_NEW),
    ],
)
async def test_a_mere_mention_is_handed_on(start, upstream, status, param, code, message):
    client = await start(replies(status, refused(message, code, param)), answer)
    response = await client.post("/ask", json=FULL)
    problem(response, "upstream_rejected")
    assert response.json()["detail"] == message
    response = await client.post("/ask", json=FULL)
    assert events(response.content)[-2] == done()
    assert upstream.calls[0].body == upstream.calls[1].body


async def test_the_refusal_of_a_field_that_was_not_sent_is_handed_on(start, upstream):
    client = await start(replies(400, refused(ONLY_ONE, "unsupported_value", HEAT)))
    problem(await client.post("/ask", json=ASK), "upstream_rejected")
    assert len(upstream.calls) == 1


@pytest.mark.parametrize(
    ("theirs", "code", "calls"),
    [
        *((status, "upstream_rejected", 1) for status in (400, 404, 413, 422)),
        *((status, "upstream_auth", 1) for status in (401, 403)),
        (429, "rate_limited", 2),
        *((status, "upstream_error", 2) for status in (408, 409, 500, 503, 529)),
        *((status, "upstream_error", 1) for status in (302, 307, 402, 418)),
    ],
)
async def test_a_status_of_the_upstream_becomes_ours(start, upstream, theirs, code, calls):
    script = replies(theirs, refused("SECRET"), location=f"{upstream.url}/models")
    client = await start(script, openai_max_retries=1)
    for each in await asyncio.gather(*(client.post("/ask", json=ask) for ask in (ASK, PLAIN))):
        status = problem(each, code)["status"]
        assert ("SECRET" in each.text) is (status != 502)
    assert len(upstream.calls) == 2 * calls
    for event in await closings(client, 2):
        assert event["message"] == "ask failed"
        assert (event["metadata"]["status"], event["metadata"]["code"]) == (status, code)


async def test_an_upstream_without_a_port_is_unreachable(start):
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}/v1"
        client = await start(openai_base_url=url, openai_max_retries=1)
        problem(await client.post("/ask", json=ASK), "upstream_unreachable")


@cases(
    "body",
    {
        "OpenAI": {"error": {"message": "Too long: é"}},
        "Ollama": {"error": "Too long: é"},
        "Mistral": {"object": "error", "message": "Too long: é"},
        "FastAPI": {"detail": "Too long: é"},
        "Google": [{"error": {"message": "Too long: é"}}],
    },
)
async def test_the_upstreams_own_message_is_handed_on(start, body):
    response = await (await start(replies(400, body))).post("/ask", json=ASK)
    assert response.json()["detail"] == "Too long: é"


@pytest.mark.parametrize("status", [400, 429])
@pytest.mark.parametrize("kind", ["text/html", "application/json"])
@pytest.mark.parametrize("body", [HTML, refused(HTML.decode())], ids=["bare", "in JSON"])
async def test_a_page_of_html_is_never_handed_on(start, status, kind, body):
    client = await start(replies(status, body, content_type=kind), openai_max_retries=0)
    response = await client.post("/ask", json=ASK)
    assert (response.status_code, "<" in response.text) == (status, False)


async def test_a_key_in_the_upstreams_message_is_masked(start):
    keys = ("sk-test/a+b=0123456789", "sk-other-0123456789", "Bearer abc.def")
    script = replies(400, refused(f"risk-free: {', '.join(keys)}, HTTPBearer Bearer abc.def"))
    response = await (await start(script, openai_api_key=keys[0])).post("/ask", json=ASK)
    assert response.json()["detail"] == "risk-free: ***, ***, ***, HTTPBearer ***"


LONG_AGO = formatdate(0, usegmt=True)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("2.2", "3"), (LONG_AGO, "0"), ("1e308", "86400"), ("nan", None), ("", None), (None, None)],
)
async def test_retry_after_is_handed_on_in_whole_seconds(start, theirs, ours):
    header = {} if theirs is None else {"retry_after": theirs}
    client = await start(replies(429, refused("Slow down."), **header), openai_max_retries=0)
    response = await client.post("/ask", json=ASK)
    assert (response.status_code, response.json()["detail"]) == (429, "Slow down.")
    assert response.headers.get("retry-after") == ours


async def test_a_long_retry_after_is_told_at_once_a_date_in_seconds(start, upstream):
    later = formatdate(time.time() + 30, usegmt=True)
    response = await (await start(replies(429, retry_after=later))).post("/ask", json=ASK)
    assert 25 <= int(response.headers["retry-after"]) <= 30
    assert len(upstream.calls) == 1


@pytest.mark.parametrize("fails", [replies(429, retry_after="1"), replies(503), Call.close])
async def test_another_try_may_help(start, upstream, fails):
    client = await start(fails, answer, openai_max_retries=1)
    assert (await client.post("/ask", json=ASK)).status_code == 200
    assert len(upstream.calls) == 2
    (closing,) = await closings(client)
    assert closing["message"] == "ask finished"


@pytest.mark.parametrize("retries", [0, 2])
async def test_there_are_as_many_further_tries_as_allowed(start, upstream, retries):
    client = await start(replies(503), openai_max_retries=retries)
    problem(await client.post("/ask", json=ASK), "upstream_error")
    assert len(upstream.calls) == 1 + retries


@cases(
    "ask, script",
    {
        "stream": (ASK, Call.hang),
        "stream, after its head": (ASK, stream(Call.hang)),
        "plain": (PLAIN, Call.hang),
        "plain, half said": (PLAIN, half),
    },
)
async def test_silence_from_the_start_is_a_504(start, upstream, ask, script):
    client = await start(script, openai_timeout=0.2, openai_max_retries=9)
    begun = time.monotonic()
    problem(await client.post("/ask", json=ask), "upstream_timeout")
    assert 0.2 <= time.monotonic() - begun < 1.2
    await soon(upstream.calls[0].left, 1)
    assert len(upstream.calls) == 1


async def test_nothing_but_openai_timeout_says_how_long_the_upstream_may_be_silent():
    # httpx2 would say 5 s, and AsyncOpenAI 600; OPENAI_TIMEOUT may be longer.
    async with service.create_http_client(Settings()) as http_client:
        assert set(http_client.timeout.as_dict().values()) == {None}


async def test_tries_that_hear_nothing_share_one_timeout(start):
    async def hang_up(call: Call) -> None:
        await asyncio.sleep(0.2)  # Each try is shorter than the time-out, all of them are not.
        await call.close()

    client = await start(hang_up, openai_timeout=0.4, openai_max_retries=4)
    begun = time.monotonic()
    assert (await client.post("/ask", json=ASK)).status_code in {502, 504}
    assert time.monotonic() - begun < 1.4


@cases(
    "script, heartbeat, said",
    {
        "delta": (stream(chunk("Ho"), Call.hang), 15, [delta("Ho")]),
        "ping": (Call.hang, 0.05, []),
    },
)
async def test_silence_after_the_first_byte_is_an_event(start, upstream, script, heartbeat, said):
    client = await start(script, openai_timeout=0.2, heartbeat_seconds=heartbeat)
    response = await client.post("/ask", json=ASK)
    assert events(response.content) == [*said, fault("upstream_timeout", 504)]
    await soon(upstream.calls[0].left, 1)


async def test_an_upstream_that_keeps_talking_is_not_timed_out_nor_are_pings_kept_back(start):
    async def drip(call: Call) -> None:
        for piece in (b": thinking\n\n", b"data: ", b'{"choices":[]}', b"\n\n") * 3:
            await asyncio.sleep(0.05)  # A fifth of the time-out, and twice as long in all.
            await call.write(piece)

    script = stream(drip, HOLA, FINISH + DONE, Call.end)
    client = await start(script, openai_timeout=0.25, heartbeat_seconds=0.1)
    response = await client.post("/ask", json=ASK)
    assert response.text.startswith(": ping\n\n")
    assert events(response.content) == [delta("Hola"), done(), "[DONE]"]


@cases(
    "ask, script, said",
    {
        "before its head": (ASK, Call.hang, False),
        "after its head": (ASK, stream(Call.hang), False),
        "after a delta": (ASK, stream(HOLA, Call.hang), True),
        "while it talks": (ASK, Call.talk, True),
        "plain": (PLAIN, Call.hang, False),
        "plain, half said": (PLAIN, half, False),
    },
)
async def test_a_client_that_leaves_closes_the_upstream(start, upstream, ask, script, said):
    client = await start(script, answer)
    async with asking(client, **ask) as wire:
        await soon(upstream.called)
        if said:
            await wire.write()
    await soon(upstream.calls[0].left, 1)
    await cancelled(client)


async def test_a_client_that_leaves_unread_text_closes_the_upstream(start, upstream):
    flood = Flood(then=Call.hang)
    client = await start(flood, answer)
    async with asking(client):
        await soon(flood.blocked, 10)
    await soon(upstream.calls[0].left, 1)
    await cancelled(client)


async def test_a_client_that_leaves_between_two_tries_is_not_tried_for_again(start, upstream):
    client = await start(replies(500), answer)
    async with asking(client):
        await soon(upstream.called)
    await cancelled(client)
    assert [call.method for call in upstream.calls] == ["POST", "GET"]


async def test_a_client_that_closes_at_the_end_mark_has_its_answer(start, upstream):
    client = await start(stream(HOLA, FINISH + DONE, Call.hang))
    async with asking(client) as wire:
        while b"[DONE]" not in await wire.write():
            pass
    (closing,) = await closings(client)
    assert (closing["level"], closing["message"]) == ("INFO", "ask finished")
    await soon(upstream.calls[0].left, 1)


@pytest.mark.parametrize("heartbeat", [0.1, 15])
async def test_a_client_that_does_not_read_holds_up_the_upstream_and_the_clocks(start, heartbeat):
    flood = Flood(then=play(FINISH + DONE, Call.end))
    client = await start(flood, openai_timeout=0.4, heartbeat_seconds=heartbeat)
    async with asking(client) as wire:
        await soon(flood.blocked, 10)
        assert flood.pieces < 128, "32 MB under way is more than the buffers of sockets hold"
        spent = time.process_time()
        await asyncio.sleep(0.3)  # Three heartbeats, and more than OPENAI_TIMEOUT in all.
        assert time.process_time() - spent < 0.2
        written = b"".join(await wire.rest())
    assert written.count(PING) < 9
    assert events(written) == [*[delta(Flood.piece)] * flood.pieces, done(), "[DONE]"]


async def test_asks_over_the_limit_are_refused_until_a_place_is_free(start, upstream):
    scripts = (Call.hang, replies(400), stream(HOLA, Call.reset), answer)
    client = await start(*scripts, max_concurrent_asks=1)
    async with asking(client):
        await soon(upstream.called)
        response = await client.post("/ask", json=ASK)
        problem(response, "overloaded")
        assert response.headers["retry-after"] == "1"
    assert [event["message"] for event in await closings(client)] == ["ask cancelled"]
    statuses = [(await client.post("/ask", json=ask)).status_code for ask in (ASK, ASK, ASK, PLAIN)]
    assert statuses == [400, 200, 200, 200]


@pytest.mark.parametrize(("status", "calls"), [(400, 1), (503, 3)])
async def test_a_refusal_that_breaks_off_is_an_error_and_tried_again_by_its_status(
    start, upstream, status, calls
):
    async def broken(call: Call) -> None:
        await call.start(status)
        await call.write(b'{"error":{"mess')
        await call.close()

    client = await start(broken)
    problem(await client.post("/ask", json=PLAIN), "upstream_error")
    assert len(upstream.calls) == calls


async def test_an_upstream_that_goes_on_after_its_end_is_left(start, upstream):
    async def drip(call: Call) -> None:
        await call.start()
        await call.write(HOLA + FINISH + DONE)
        leaving = asyncio.create_task(call.hang())
        with suppress(ConnectionError):
            while not leaving.done():
                await call.write(b": x\n\n")
                await asyncio.sleep(0.02)
        await leaving

    client = await start(drip)
    assert (await client.post("/ask", json=ASK)).status_code == 200
    await soon(upstream.calls[0].left)


async def test_a_clients_connection_outlives_what_the_upstream_does_in_the_end(start, upstream):
    client = await start(stream(HOLA + FINISH + DONE, Call.hang), answer)
    async with connection(client) as (reader, writer), asyncio.timeout(10):
        writer.write(post(json.dumps(ASK)))
        await reader.readuntil(DONE)
        await soon(upstream.calls[0].left)
        writer.write(post(json.dumps(ASK)))
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"


async def test_a_connection_to_the_upstream_is_used_again(start, upstream):
    go = asyncio.Event()
    client = await start(stream(HOLA, FINISH + DONE, lambda _: go.wait(), Call.end), answer)
    async with asking(client) as wire:
        await wire.rest()
        go.set()
        await closings(client)
    for ask in (ASK, PLAIN, ASK):
        await client.post("/ask", json=ask)
    assert upstream.connections == 1


@cases(
    "host, path, lower",
    {
        "no path": ("api.example", "", "/chat/completions"),
        "slash": ("api.example", "/", "/chat/completions"),
        "port": ("api.example:8080", "", "/chat/completions"),
        "port, slash": ("api.example:8080", "/", "/chat/completions"),
        "path": ("api.example", "/api/v1", "/api/v1/chat/completions"),
        "port, path, slash": ("[2001:db8::1]:81", "/v1/", "/v1/chat/completions"),
    },
)
async def test_the_host_of_the_base_url_alone_gets_the_key(start, proxy, host, path, lower):
    settings = Settings.from_env({"OPENAI_BASE_URL": f"http://{host}{path}"})
    client = await start(openai_base_url=settings.openai_base_url)
    assert (await client.post("/ask", json=ASK)).status_code == 200
    await load(client, "/status")
    paths = (lower, lower.replace("chat/completions", "models"))
    assert [call.path for call in proxy.calls] == [f"http://{host}{each}" for each in paths]
    assert {call.headers["host"] for call in proxy.calls} == {host}


async def test_a_base_url_without_a_path_is_reached_at_its_port(start, upstream):
    client = await start(openai_base_url=upstream.url.removesuffix("/v1"))
    assert (await client.post("/ask", json=ASK)).status_code == 200
    assert [call.path for call in upstream.calls] == ["/chat/completions"]


def zipped(data: object) -> bytes:
    return gzip.compress(json.dumps(data).encode())


async def test_an_upstream_that_compresses_all_the_same_is_read(start):
    go = asyncio.Event()
    packer = zlib.compressobj(wbits=31)
    first = packer.compress(HOLA) + packer.flush(zlib.Z_SYNC_FLUSH)
    last = packer.compress(FINISH + DONE) + packer.flush()
    script = play(
        lambda call: call.start(content_encoding="gzip"), first, lambda _: go.wait(), last, Call.end
    )
    client = await start(
        script,
        replies(200, zipped(completion("Hola")), content_encoding="gzip"),
        replies(400, zipped(refused("Too long.")), content_encoding="gzip"),
        replies(200, b"no gzip", content_encoding="gzip"),
    )
    async with asking(client) as wire:
        assert events(await wire.write()) == [delta("Hola")], "while the upstream is still talking"
        go.set()
        assert events(b"".join(await wire.rest())) == [done(), "[DONE]"]
    assert (await client.post("/ask", json=PLAIN)).json()["response"] == "Hola"
    body = problem(await client.post("/ask", json=PLAIN), "upstream_rejected")
    assert body["detail"] == "Too long."
    problem(await client.post("/ask", json=PLAIN), "upstream_error")


async def test_cookies_of_the_upstream_are_not_kept(start, upstream):
    sets: Any = {"set_cookie": "session=SECRET; Path=/; Max-Age=99"}
    client = await start(
        replies(200, completion("Hola"), **sets),
        replies(400, refused("No."), **sets),
        play(lambda call: call.start(**sets), HOLA, FINISH, DONE, Call.end),
        answer,
        # To an IP address no client would send them.
        openai_base_url=upstream.url.replace("127.0.0.1", "localhost"),
    )
    for ask in (PLAIN, PLAIN, ASK, PLAIN):
        assert "set-cookie" not in (await client.post("/ask", json=ask)).headers
    assert len(upstream.calls) == 4
    assert not any("cookie" in call.headers for call in upstream.calls)


@pytest.mark.parametrize(("status", "told"), [(503, "7"), (529, "7"), (500, None)])
async def test_a_busy_upstream_s_patience_is_handed_on_and_not_tried(start, upstream, status, told):
    client = await start(replies(status, retry_after="7"))
    response = await client.post("/ask", json=ASK)
    problem(response, "upstream_error")
    assert (response.headers.get("retry-after"), len(upstream.calls)) == (told, 1)


async def test_a_short_patience_is_kept_to(start, upstream):
    client = await start(replies(503, retry_after="1"), answer)
    begun = time.monotonic()
    assert (await client.post("/ask", json=ASK)).status_code == 200
    assert time.monotonic() - begun >= 0.99
    assert len(upstream.calls) == 2


@cases(
    "figure",
    {
        "4,300 digits": 10**4299,
        "more than can be": 10**12 + 1,
        "true": True,
        "negative": -1,
        "broken": 1.5,
        "text": "7",
    },
)
async def test_a_figure_that_is_none_is_not_counted(start, figure):
    usage = {"total_tokens": figure, "prompt_tokens": figure, "completion_tokens": figure}
    usage["completion_tokens_details"] = {"reasoning_tokens": figure}
    body = completion("Hola") | {"usage": usage}
    client = await start(stream(chunk("Hola", finish_reason="stop", usage=usage), DONE, Call.end))
    assert events((await client.post("/ask", json=ASK)).content)[1] == done(tokens_used=None)
    client = await start(replies(200, body))
    assert (await client.post("/ask", json=PLAIN)).json() == {
        "response": "Hola",
        "finish_reason": "stop",
        "tokens_used": None,
        "model": "gpt-real",
    }
    assert (await load(client, "/status"))["tokens_used"] == 0


@cases(
    "ask",
    {
        "prompt": FULL
        | {"prompt": f"What does \"unsupported  PARAMETER: '{'temperature'}'\" mean?"},
        "history": FULL
        | {"history": [TURN | {"content": "Unsupported parameter: `temperature`."}]},
    },
)
async def test_an_upstream_that_quotes_the_caller_teaches_nothing(start, upstream, ask):
    quoted = "Refused by policy. You wrote: Unsupported parameter: 'temperature'"
    client = await start(replies(400, refused(quoted)), answer)
    problem(await client.post("/ask", json=ask), "upstream_rejected")
    assert events((await client.post("/ask", json=FULL)).content)[-2] == done()
    assert [call.body["temperature"] for call in upstream.calls] == [0.7, 0.7]


def endless(first: bytes, piece: bytes, status: int = 200, coding: str = "identity") -> Script:
    """An answer of 200 pieces, as far as the service takes them."""

    async def script(call: Call) -> None:
        await call.start(status, content_encoding=coding)
        with suppress(ConnectionError):
            await call.write(first)
            for _ in range(200):
                await call.write(piece)
        await call.close()

    return script


def bomb() -> tuple[bytes, bytes]:
    """The beginning of a gzip file, and 4 KiB of it that are 4 MiB of blanks however often read."""
    packer = zlib.compressobj(9, wbits=31)
    first = packer.compress(b"{") + packer.flush(zlib.Z_FULL_FLUSH)
    return first, packer.compress(b" " * 4 * MIB) + packer.flush(zlib.Z_FULL_FLUSH)


async def test_an_upstream_without_end_is_cut_in_bounded_memory(upstream, tmp_path):
    x = b"x" * MIB
    plain, error = b'{"choices":[{"message":{"content":"', b'{"error":{"message":"'
    tried = {
        "plain answer": (PLAIN, endless(plain, x)),
        "error": (PLAIN, endless(error, x, 400)),
        "event": (ASK, endless(b'data: {"choices":[{"delta":{"content":"', x)),
        "event in lines": (ASK, endless(b"data: x\n", b"data: x\n" * 2**17)),
        "gzip, plain answer": (PLAIN, endless(*bomb(), coding="gzip")),
        "gzip, error": (PLAIN, endless(*bomb(), 400, "gzip")),
        "gzip, event": (ASK, endless(*bomb(), coding="gzip")),
    }
    env = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": upstream.url, "API_PORT": "0"}
    async with launched(SERVICE, cwd=tmp_path, **env) as running:
        before = running.peak()
        for name, (ask, script) in tried.items():
            upstream.scripts = [script]
            problem(await running.client.post("/ask", json=ask), "upstream_error")
            assert running.peak() - before < 150, name
    assert len(upstream.calls) == len(tried), "none is worth another try"


async def test_a_client_that_reads_nothing_gives_its_place_back(start, upstream):
    async def pour(call: Call) -> None:
        await call.start()
        with suppress(ConnectionError):
            while True:
                await call.say(Flood.piece)
        call.left.set()

    client = await start(pour, answer, client_timeout=0.5, max_concurrent_asks=1)
    async with asking(client):
        await soon(upstream.called)
        await soon(upstream.calls[0].left, 10)
        await cancelled(client)
        assert (await client.post("/ask", json=ASK)).status_code == 200


async def test_every_accepted_ask_leaves_one_closing_event(start):
    client = await start(answer, answer, replies(404), stream(chunk("Ho"), Call.end))
    for body in ({}, {"prompt": " "}, {"prompt": "Hola", "n": 1}):
        assert (await client.post("/ask", json=body)).status_code == 422
    for name, ask in {"a": ASK, "b": PLAIN, "c": ASK, "d": ASK}.items():
        await client.post("/ask", json=ask, headers={"X-Request-ID": name})
    closed = await closings(client, 4)
    for event in closed:
        event["metadata"].pop("cause", None)
        times = [event["metadata"].get("first_token_ms", 0), event["metadata"]["duration_ms"]]
        assert 0 <= times[0] <= times[1] < 5000
    common = {"prompt_chars": 4, "duration_ms": ANY, "stream": True, "model": "gpt-real"}
    whole = {**common, "answer_chars": 4, "tokens_used": 7, "finish_reason": "stop"}
    rejected = {"model": "gpt-5.4-mini", "code": "upstream_rejected", "status": 400}
    broken = {"first_token_ms": ANY, "answer_chars": 2, "code": "upstream_error", "status": 502}
    assert [(event["level"], event["message"], event["metadata"]) for event in closed] == [
        ("INFO", "ask finished", {**whole, "request_id": "a", "first_token_ms": ANY}),
        ("INFO", "ask finished", {**whole, "request_id": "b", "stream": False}),
        ("ERROR", "ask failed", {**common, "request_id": "c", **rejected}),
        ("ERROR", "ask failed", {**common, "request_id": "d", **broken}),
    ]


async def test_prompts_answers_keys_and_upstream_messages_reach_no_log(capfd, start, upstream):
    scripts = [
        stream(chunk("SECRET"), FINISH + DONE, Call.end),
        *(replies(status, refused(f"SECRET {KEY}")) for status in (400, 401, 429, 500)),
        replies(200, HTML),
        stream(chunk("SECRET") + b"data: SECRET\n\n", Call.end),
        stream(ERROR, Call.end),
        garbage,
        replies(200, completion("SECRET")),
    ]
    client = await start(*scripts, log_level="DEBUG", openai_max_retries=0)
    turns = [{"role": "user", "content": "SECRET"}]
    for number in range(len(scripts)):
        ask = {"prompt": "SECRET", "history": turns, "stream": number < len(scripts) - 1}
        await client.post("/ask", json=ask)
    await closings(client, len(scripts))
    seen = capfd.readouterr().out + (await client.get("/logs?limit=1000")).text
    assert (seen.count("ask finished"), seen.count("ask failed")) == (4, 2 * len(scripts) - 4)
    assert "SECRET" not in seen
    assert KEY not in seen


def example() -> dict[str, str]:
    """The settings of .env.example, in its order."""
    return {name: text or "" for name, text in dotenv_values(HERE / ".env.example").items()}


def test_the_env_example_lists_every_setting_with_its_default_and_a_line_of_meaning():
    assert list(example()) == [each.name.upper() for each in fields(Settings)]
    assert Settings.from_env(example()) == Settings.from_env({}) == Settings()
    lines = (HERE / ".env.example").read_text().splitlines()
    assert all(line.startswith("# ") for line in lines[::2])
    assert lines[1::2] == [f"{name}={text}" for name, text in example().items()]


def test_the_readme_lists_every_setting_with_its_default():
    rows = re.findall(r"^\| *`([A-Z_]+)` *\| *([^|]*?) *\|", (HERE / "README.md").read_text(), re.M)
    words = {"empty": "", "OpenAI's own": "https://api.openai.com/v1"}
    shown = [(name, words.get(text, text.strip("`"))) for name, text in rows if name in example()]
    assert shown == list(example().items())


# What each variable may say, and what is made of it.
TEXTS: dict[str, tuple[str, Any]] = {
    "OPENAI_API_KEY": (KEY, KEY),
    "OPENAI_MODEL": ("llama3.2:1b", "llama3.2:1b"),
    "OPENAI_MODELS": (" gpt-5, a/b:c ,", ("gpt-5", "a/b:c")),
    "OPENAI_BASE_URL": ("http://[::1]:11434/v1/", "http://[::1]:11434/v1"),
    "OPENAI_TIMEOUT": ("0.5", 0.5),
    "OPENAI_MAX_RETRIES": ("0", 0),
    "OPENAI_EXTRA_BODY": ('{"reasoning_effort": "low"}', {"reasoning_effort": "low"}),
    "SYSTEM_PROMPT": (" Sé breve.\n¿Sí? ", "Sé breve.\n¿Sí?"),
    "MAX_OUTPUT_TOKENS": ("1", 1),
    "API_HOST": ("::1", "::1"),
    "API_PORT": ("0", 0),
    "MAX_CONCURRENT_ASKS": ("1", 1),
    "MAX_BODY_BYTES": ("10", 10),
    "HEARTBEAT_SECONDS": ("0.1", 0.1),
    "CLIENT_TIMEOUT": ("2.5", 2.5),
    "CORS_ORIGINS": (
        "https://a.example,http://B.example:81",
        ("https://a.example", "http://b.example:81"),
    ),
    "ALLOWED_HOSTS": ("App.example,, b.example,", ("app.example", "b.example")),
    "API_TOKEN": (TOKEN, TOKEN),
    "JWT_SECRET": ("s" * 32, "s" * 32),
    "JWT_AUDIENCE": ("my app", "my app"),
    "ADMIN_TOKEN": (TOKEN, TOKEN),
    "RATE_LIMIT": ("60", 60),
    "DAILY_TOKENS": ("1000000", 1_000_000),
    "LOG_LEVEL": ("dEbug", "DEBUG"),
    "LOG_BUFFER_SIZE": ("100000", 100_000),
    "LOG_DATABASE": ("logs.db", "logs.db"),
}


def test_each_variable_is_read_and_an_empty_one_counts_as_not_set_but_for_the_origins():
    settings = Settings.from_env({name: text for name, (text, _) in TEXTS.items()})
    read = {name.upper(): value for name, value in vars(settings).items()}
    assert read == {name: value for name, (_, value) in TEXTS.items()}
    assert list(TEXTS) == list(example())
    assert Settings.from_env(dict.fromkeys(example(), "")) == Settings(cors_origins=())


@pytest.mark.parametrize(
    ("name", "accepted", "texts"),
    [
        ("OPENAI_BASE_URL", "http", "ftp://a.example a.example:80 http://a:b http://[/v1"),
        ("OPENAI_BASE_URL", "http", "http://a.example:99999/v1 http://999.1.1.1/v1 http://é..x/v1"),
        (
            "OPENAI_BASE_URL",
            "http",
            "http://a.example/?x=1 http://u:p@a.example http://a.example:0",
        ),
        ("OPENAI_BASE_URL", "http", "http://a.example/\x01 http://a\x7f.example http://a/\x85x"),
        ("OPENAI_BASE_URL", "http", f"http://a.example/\nv1 http://a.example/{'x' * 70_000}"),
        ("OPENAI_MODEL", "name of a model", f"gpt\x1b[31m {'x' * 257}"),
        ("OPENAI_MODELS", "names of models", "gpt,caf\u00e9 gpt\x1b"),
        ("OPENAI_EXTRA_BODY", "JSON object", '{ [] {"model":1} {"stream":0} {"x":NaN} {"x":1e999}'),
        ("SYSTEM_PROMPT", "UTF-8", "\ud83d"),
        ("MAX_OUTPUT_TOKENS", "from 1", "0 -1 many"),
        ("OPENAI_TIMEOUT", "number", "abc nan inf 0 0.0 -1"),
        ("OPENAI_MAX_RETRIES", "0", "-1 1.5 two sk-secret-in-the-wrong-line"),
        ("API_HOST", "address", "http://localhost a.example/b é..x"),
        ("API_PORT", "65535", "abc 1_0 70000 -1 +5 80.0"),
        ("ALLOWED_HOSTS", "host names", "http://app.example app.example:80 a/b"),
        ("CORS_ORIGINS", "://", "app.example https://app.example/ null"),
        ("CORS_ORIGINS", "://", "https://*.app.example"),
        ("MAX_CONCURRENT_ASKS", "1", "0 many"),
        ("MAX_BODY_BYTES", "1", "0 1MB"),
        ("HEARTBEAT_SECONDS", "0.1", "nan inf 0 0.09 -1 soon"),
        ("CLIENT_TIMEOUT", "number", "nan inf 0 -1 soon"),
        ("RATE_LIMIT", "from 0", "-1 1.5 many"),
        ("DAILY_TOKENS", "from 0", "-1 1e6 many"),
        ("JWT_SECRET", "32 bytes", "secret"),
        ("LOG_LEVEL", "DEBUG, INFO, WARNING, ERROR", "loud 10 NOTSET"),
        ("LOG_BUFFER_SIZE", "1 to 100000", "0 100001"),
        ("OPENAI_API_KEY", "", "sk-secret\u00a0key"),
        *((f"{each}_TOKEN", "visible ASCII", "t\u00f6ken-secret") for each in ("API", "ADMIN")),
        ("LOG_DATABASE", "UTF-8", "\ud83d"),
    ],
)
def test_a_wrong_value_is_told_in_one_line_with_what_is_accepted(name, accepted, texts):
    for text in texts.split(" "):
        with pytest.raises(ConfigError, match=rf"\A{name}\b.*{accepted}.*\Z") as caught:
            pytest.fail(f"{text} was taken: {Settings.from_env({name: text})}")
        assert "secret" not in str(caught.value)


def test_settings_are_frozen_and_show_no_secrets():
    settings = Settings(openai_api_key=KEY, api_token=TOKEN)
    assert not re.search(f"{KEY}|{TOKEN}", repr(settings))
    with pytest.raises(FrozenInstanceError):
        setattr(settings, "api_port", 1)  # noqa: B010 - mypy knows that it is frozen


async def test_what_cannot_be_used_stops_the_start_with_a_line_each(tmp_path):
    (tmp_path / ".env").write_bytes(b"OPENAI_MODEL=caf\xe9")
    inner = tmp_path / "inner"  # to which the file above it means nothing
    inner.mkdir()
    wrong = {"API_PORT": "abc", "LOG_LEVEL": "loud", "OPENAI_API_KEY": "sk-secret key"}
    many = "a" + " , ," * 5000
    slow = {
        "ALLOWED_HOSTS": f"{many}!",
        "CORS_ORIGINS": f"http://{many},a",
        "OPENAI_MODELS": f"{many}é",
    }
    long = {"OPENAI_BASE_URL": f"http://a.example/{'x' * 70_000}", "OPENAI_MODEL": "x" * 70_000}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ends = await asyncio.gather(
            finished(SERVICE, cwd=inner, **wrong),
            finished(SERVICE, cwd=tmp_path),
            finished(*UVICORN, cwd=inner, LOG_LEVEL="loud"),
            finished(SERVICE, cwd=inner, **slow, **long),
            finished(SERVICE, cwd=inner, OPENAI_BASE_URL="http://a.example/\x1b[2J"),
            finished(SERVICE, cwd=inner, API_PORT=port),
        )
    named = (list(wrong), [".env"], ["LOG_LEVEL"], [*slow, *long], ["OPENAI_BASE_URL"], [port])
    *codes, taken_code = (code for code, *_ in ends)
    assert codes == [2] * 5
    assert taken_code not in {0, None}
    for (_, out, err), names in zip(ends, named, strict=True):
        assert (out, len(err)) == ("", len(names))
        assert all(name in str(err) for name in names)
        assert "secret" not in str(err)
        assert "\x1b" not in "".join(err)
        assert all(len(line) < 1000 for line in err)


async def test_importing_the_service_starts_nothing(tmp_path):
    program = """if True:
        import logging, sys
        seen = []
        acts = {"socket.bind", "socket.connect", "socket.getaddrinfo"}
        sys.addaudithook(lambda event, args: event in acts and seen.append(event))
        import service, structlog
        print(seen, logging.root.handlers, structlog.is_configured())"""
    found = await finished("-c", program, cwd=tmp_path, API_PORT="abc")
    assert found == (0, "[] [] False\n", [])


async def test_an_env_file_fills_in_what_the_environment_does_not_set(tmp_path):
    lines = ["OPENAI_API_KEY=demo", f"API_TOKEN={TOKEN}", "API_PORT=wrong"]
    lines += ["ALLOWED_HOSTS=file.example", f"CORS_ORIGINS={PAGE}"]
    (tmp_path / ".env").write_text("\n".join(lines))
    real = {"API_PORT": "0", "API_TOKEN": "", "ALLOWED_HOSTS": "real.example", "CORS_ORIGINS": ""}
    async with launched(SERVICE, cwd=tmp_path, **real) as running:
        client = running.client
        mine = await client.get("/status", headers={"Host": "real.example", "Origin": PAGE})
        assert (mine.status_code, "access-control-allow-origin" in mine.headers) == (200, False)
        wrong = await client.get("/status", headers={"Host": "file.example"})
        problem(wrong, "host_not_allowed")
        problem(await client.post("/ask", json=PLAIN), "unauthorized")
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        assert (await client.post("/ask", json=PLAIN)).json()["model"] == "demo"


@in_module
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("prompt", ["", " \n\t\u00a0\u3000", 5, None, []]),
        ("history", [[TURN] * 1001, None, {}, "Hola"]),
        ("history.0", [["Hola"], [None]]),
        ("history.0.role", [[TURN | {"role": "boss"}], [{"content": ""}], [TURN | {"role": None}]]),
        ("history.1.content", [[TURN, {"role": "user"}], [TURN, TURN | {"content": None}]]),
        ("history.0.name", [[TURN | {"name": "Eve"}]]),
        ("temperature", ["0.7", True, None, -0.1, 2.1]),
        ("max_tokens", [0, -1, 1.5, "5", True, None]),
        ("stream", [1, 0, "true", None]),
        ("top_p", [1, None]),
    ],
)
async def test_a_wrong_field_is_named(shared, name, values):
    for value in values:
        asked = ASK | {name.partition(".")[0]: value}
        (error,) = problem(await shared.post("/ask", json=asked), "invalid_request")["errors"]
        assert error == {"field": name, "detail": ANY}
        assert error["detail"]


@in_module
async def test_all_wrong_fields_are_named_at_once(shared):
    asked = {"history": [{"role": "x", "content": 1}], "temperature": "0.7", "top_p": 1}
    wrong = problem(await shared.post("/ask", json=asked), "invalid_request")["errors"]
    names = ["history.0.content", "history.0.role", "prompt", "temperature", "top_p"]
    assert sorted(error["field"] for error in wrong) == names


async def test_the_bounds_themselves_are_taken(client):
    bounds: list[Any] = [{"temperature": 0, "max_tokens": 1}, {"temperature": 2, "history": []}]
    for bound in (*bounds, {"history": [TURN] * 1000}):
        assert (await client.post("/ask", json=ASK | bound)).status_code == 200


@in_module
@pytest.mark.parametrize(
    "bodies",
    [
        [b"", b"Hola", b"[]", b'"Hola"', b'{"prompt": "Hola"} {}', b"{'prompt': 'Hola'}"],
        [b'{"prompt": "caf\xe9"}', '{"prompt": "Hola"}'.encode("utf-16")],
        [b'{"prompt": "Hola", "x": %b}' % each for each in (b"NaN", b"Infinity", b"-Infinity")],
        [rb'{"prompt": "\ud83d"}', rb'{"prompt": "Hola", "\ude00": 1}'],
        [b"[" * 100_000, b'{"prompt":' * 100_000],
    ],
    ids=["no object", "not UTF-8", "no number", "half surrogate pairs", "too deep"],
)
async def test_a_body_that_is_no_json_object_is_refused(shared, bodies):
    for body in bodies:
        problem(await shared.post("/ask", content=body, headers=JSON), "invalid_json")


@in_module
async def test_a_body_is_refused_as_soon_as_it_is_over_the_bound(shared):
    head = f"POST /ask HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += "Content-Type: application/json\r\n"
    size, chunked = 1_048_576, "Transfer-Encoding: chunked\r\n\r\n"
    for rest, code in [
        (f"Content-Length: {size + 1}\r\n\r\n", "body_too_large"),
        (f"{chunked}{size + 1:x}\r\n{'':{size + 1}}", "body_too_large"),
        (f"Content-Length: {size}\r\n\r\n{json.dumps(ASK):{size}}", "not_configured"),
        (f"{chunked}{size:x}\r\n{json.dumps(ASK):{size}}\r\n0\r\n\r\n", "not_configured"),
    ]:
        assert await raw(shared, head + rest) == code


@in_module
async def test_only_a_body_that_is_announced_as_json_is_read(shared):
    for kind in ("application/json;charset=utf-8", "Application/JSON", "application/json ; x=y"):
        response = await shared.post("/ask", content=b"{}", headers={"Content-Type": kind})
        problem(response, "invalid_request")
    for kind in ("", "text/plain", "text/plain;application/json", "application/jsonp"):
        response = await shared.post("/ask", content=b"{}", headers={"Content-Type": kind})
        problem(response, "unsupported_media_type")
    problem(await shared.post("/ask", content=b"{}"), "unsupported_media_type")


@in_module
@pytest.mark.parametrize(
    ("methods", "path", "allowed"),
    [
        ("GET POST PUT", "/nothing", None),
        ("GET POST", "/ask/more", None),
        ("GET POST", "/status/", None),
        ("GET PUT DELETE OPTIONS", "/ask", "POST"),
        ("POST PUT", "/status", "GET"),
        ("POST DELETE", "/logs", "GET"),
        ("POST", "/docs", "GET"),
    ],
)
async def test_no_such_path_is_404_and_no_such_method_405(shared, methods, path, allowed):
    for method in methods.split():
        response = await shared.request(method, path)
        problem(response, "method_not_allowed" if allowed else "not_found")
        assert not allowed or allowed in response.headers["allow"].split(", ")


def inside(app: Any) -> Starlette:
    """The application in whatever middleware stands around it."""
    return app if isinstance(app, Starlette) else inside(app.app)


async def test_a_defect_is_a_500_whose_traceback_stays_in_the_log():
    async def boom(request: object) -> NoReturn:
        raise RuntimeError("boom")

    app = service.create_app(Settings())
    inside(app).router.routes.append(Route("/boom", boom))
    async with serve(app) as url, Client(url) as client:
        response = await client.get("/boom", headers={"Origin": PAGE})
        request_id = problem(response, "internal_error")["request_id"]
        assert "boom" not in response.text
        logged = await load(client, "/logs?level=error")
    assert [event["metadata"]["request_id"] for event in logged] == [request_id]
    assert re.search("Traceback.*RuntimeError: boom", str(logged))


async def test_a_place_is_wanted_last_and_one_ask_too_many_is_told_to_come_back(start, upstream):
    client = await start(max_concurrent_asks=1)
    upstream.scripts = [Call.hang]
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(client.post("/ask", json=ASK))
        await upstream.called.wait()
        problem(await client.post("/ask", json={}), "invalid_request")
        response = await client.post("/ask", json=ASK)
        first.cancel()
    problem(response, "overloaded")
    assert response.headers["retry-after"] == "1"


@in_module
async def test_a_request_id_is_taken_or_made_on_every_response(shared):
    made = set()
    for given in ("", "x" * 65, "a b", "a/b", b"caf\xe9", "sk-abcdefgh", "x.sk-abcdefgh"):
        response = await shared.get("/status", headers={"X-Request-ID": given})
        assert re.fullmatch("[A-Za-z0-9._-]{8,64}", response.headers["x-request-id"])
        made.add(response.headers["x-request-id"])
    assert len(made - {"sk-abcdefgh", "x.sk-abcdefgh"}) == 7
    for given in ("a", "x" * 64):
        response = await shared.get("/status", headers={"X-Request-ID": given})
        assert response.headers["x-request-id"] == given
    headers = {"X-Request-ID": "A-z_0.9", "Access-Control-Request-Method": "POST"}
    for path in ("/", "/ask", "/status", "/logs", "/openapi.json", "/docs", "/redoc", "/nothing"):
        for way in ("GET", "OPTIONS"):
            response = await shared.request(way, path, headers=headers, follow_redirects=False)
            assert response.headers.get_list("x-request-id") == ["A-z_0.9"]


async def test_the_events_of_a_request_carry_its_id(client):
    for each in "abcd":
        await client.post("/ask", json=ASK, headers={"X-Request-ID": each})
    assert [event["metadata"]["request_id"] for event in await closings(client, 4)] == [*"abcd"]


async def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_no_trace(client):
    async with connection(client) as (reader, writer):
        writer.write(post(json.dumps(ASK), "Expect: 100-continue")[:-1])
        async with asyncio.timeout(5):
            assert b"100 Continue" in await reader.readline()
        before = await load(client)
    assert [(await load(client, "/status"))["asks"] for _ in range(5)] == [NOTHING_YET] * 5
    assert await load(client) == before


@in_module
@pytest.mark.parametrize(
    ("origins", "code"),
    [
        (f"{PAGE} http://localhost:9999 https://localhost:9999", "invalid_request"),
        ("http://localhost:9998 http://evil.example null", "origin_not_allowed"),
        (f"{PAGE}.evil.example https://localhost:4200 http://localhost", "origin_not_allowed"),
    ],
)
async def test_pages_may_post_from_allowed_origins_and_the_service_s_own(shared, origins, code):
    for origin in origins.split():
        headers = {"Host": "localhost:9999", "Origin": origin}
        problem(await shared.post("/ask", json={}, headers=headers), code)
        read = await shared.get("/status", headers=headers)
        shown = origin if origin == PAGE else None
        assert (read.status_code, read.headers.get("access-control-allow-origin")) == (200, shown)


@pytest.mark.parametrize("way", ["POST", "OPTIONS"])
async def test_a_foreign_origin_is_warned_about_by_name_and_at_its_preflight_too(client, way):
    headers = {"Origin": "http://127.0.0.1:4200", "X-Request-ID": "mine"}
    if way == "POST":
        problem(await client.post("/ask", json=ASK, headers=headers), "origin_not_allowed")
    else:
        # A post of JSON is preflighted, and the browser does not send it when that is refused.
        headers["Access-Control-Request-Method"] = "POST"
        assert (await client.options("/ask", headers=headers)).status_code == 400
    (warning,) = await load(client, "/logs?level=WARNING")
    assert warning["metadata"]["request_id"] == "mine"
    assert all(word in str(warning) for word in ("http://127.0.0.1:4200", "CORS_ORIGINS"))


async def test_a_flood_of_foreign_origins_is_warned_about_once_a_second(client):
    begun = time.monotonic()
    for number in range(40):
        headers = {"Origin": f"http://{number}.example"}
        problem(await client.post("/ask", json=ASK, headers=headers), "origin_not_allowed")
        preflight = headers | {"Access-Control-Request-Method": "POST"}
        assert (await client.options("/ask", headers=preflight)).status_code == 400
    passed = time.monotonic() - begun
    assert 1 <= len(await load(client, "/logs?level=WARNING")) <= 1 + passed


async def test_a_star_lets_every_origin_in(start):
    client = await start(openai_api_key="", cors_origins=("*",))
    for origin in ("http://evil.example", "null"):
        response = await client.post("/ask", json=ASK, headers={"Origin": origin})
        problem(response, "not_configured")
        assert response.headers["access-control-allow-origin"] in {"*", origin}


@in_module
async def test_a_preflight_is_granted_for_what_pages_may_do_without_credentials(shared):
    names = "content-type, authorization, x-stainless-lang, user-agent, x-of-its-own"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": names}
    for path, method in ("/ask", "POST"), ("/logs", "GET"):
        headers = asked | {"Access-Control-Request-Method": method}
        granted = (await shared.options(path, headers=headers)).headers
        assert granted["access-control-allow-origin"] == PAGE
        assert method in granted["access-control-allow-methods"]
        assert all(name in granted["access-control-allow-headers"] for name in names.split(", "))
        assert "access-control-allow-credentials" not in granted
    for worse in {"Origin": "http://evil.example"}, {"Access-Control-Request-Method": "PUT"}:
        assert (await shared.options("/ask", headers=asked | worse)).status_code == 400


@pytest.mark.parametrize(
    ("allowed", "address", "served", "not_served"),
    [
        ("", "127.0.0.1", "localhost LOCALHOST:80 127.0.0.1 [::1] 10.1.2.3:81", "evil.example"),
        ("", "::1", "localhost [::1]:80", "localhost.evil.example 127.0.0.1.evil.example:80"),
        ("", "::ffff:127.0.0.1", "localhost", "evil.example"),
        ("", "192.0.2.1", "any.example", ""),
        ("app.example", "127.0.0.1", "APP.example:8000 localhost", "evil.example"),
        ("app.example", "192.0.2.1", "app.example:80 192.0.2.1", "any.example"),
        ("*", "127.0.0.1", "evil.example", ""),
    ],
)
async def test_the_address_decides_which_hosts_are_served(allowed, address, served, not_served):
    app = service.create_app(Settings(allowed_hosts=tuple(allowed.split())))

    async def elsewhere(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "server": (address, 80)}, receive, send)

    async with serve(elsewhere) as url, Client(url) as client:
        for host in served.split():
            assert (await client.get("/status", headers={"Host": host})).status_code == 200
        for host in not_served.split():
            for path in ("/status", "/logs", "/docs", "/nothing"):
                response = await client.get(path, headers={"Host": host, "Origin": PAGE})
                problem(response, "host_not_allowed")


@in_module
async def test_a_request_without_a_host_is_refused(shared):
    for head in "GET /status HTTP/1.0\r\n\r\n", "GET /status HTTP/1.1\r\nHost:\r\n\r\n":
        assert await raw(shared, head) == "host_not_allowed"


@in_module
async def test_asks_and_logs_want_the_token_and_the_status_does_not(shared):
    for scheme in ("Bearer", "bearer", "BEARER "):
        headers: Any = {"Authorization": f"{scheme} {TOKEN}"}
        problem(await shared.post("/ask", json=ASK, headers=headers), "not_configured")
        assert (await shared.get("/logs", headers=headers)).status_code == 200
    nearly = f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, b"Bearer \xe9"
    for wrong in ("", "Bearer", "Bearer x", *nearly):
        headers = {"Authorization": wrong}
        asked = await shared.post("/ask", json=ASK, headers=headers)
        for response in asked, await shared.get("/logs", headers=headers):
            problem(response, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
        assert (await shared.get("/status", headers=headers)).status_code == 200


async def test_the_status_counts_the_asks_and_their_tokens(client, upstream):
    async def refuse(call: Call) -> None:
        await call.reply(400, refused("no"))

    about = {"status": "running", "version": "1.0.0", "openai_connected": True, "tokens_used": 0}
    about |= {"model": "gpt-5.4-mini", "uptime_seconds": ANY, "asks": NOTHING_YET}
    assert await load(client, "/status") == about
    upstream.scripts = [answer, answer, refuse, Call.hang]
    for asked in {}, ASK, PLAIN, ASK:
        await client.post("/ask", json=asked)
    upstream.called.clear()
    async with asyncio.TaskGroup() as tasks:
        last = tasks.create_task(client.post("/ask", json=ASK))
        await upstream.called.wait()
        asks = {"active": 1, "total": 4, "failed": 1, "cancelled": 0}
        assert await load(client, "/status") == about | {"asks": asks, "tokens_used": 14}
        last.cancel()
    await closings(client, 4)
    assert (await load(client, "/status"))["asks"] == asks | {"active": 0, "cancelled": 1}
    assert [call.path for call in upstream.calls].count("/v1/models") == 1, "the answer is kept"


@pytest.mark.parametrize(
    ("did", "connected"),
    [
        *((200, True), (404, True), (405, True)),
        *((401, False), (403, False), (500, False), ("closed", False), ("was not there", False)),
    ],
)
async def test_the_models_list_tells_of_a_connection(start, upstream, did, connected):
    async def listing(call: Call) -> None:
        assert (call.method, call.path) == ("GET", "/v1/models")
        assert call.headers["authorization"] == f"bearer {KEY}"
        await call.reply(did, {"data": []}) if did != "closed" else call.abort()

    upstream.scripts = [listing]
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}/v1"
    client = await start(openai_base_url=url if did == "was not there" else upstream.url)
    assert (await load(client, "/status"))["openai_connected"] is connected
    # Where the connection was closed, aiohttp itself sends a GET once more.
    assert len(upstream.calls) == {"closed": 2, "was not there": 0}.get(did, 1)


async def test_without_a_key_nothing_is_connected_or_asked(start, upstream):
    client = await start(openai_api_key="")
    assert (await load(client, "/status"))["openai_connected"] is False
    assert not upstream.calls


async def test_there_may_be_files_enough_for_every_ask(start):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
    try:
        await start(max_concurrent_asks=400)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 2 * 400
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_calls_share_a_probe_that_hangs_for_six_seconds_at_most(client, upstream):
    upstream.scripts = [Call.hang]
    async with asyncio.timeout(6):
        states = await asyncio.gather(*(load(client, "/status") for _ in range(3)))
        states.append(await load(client, "/status"))
    assert [each["openai_connected"] for each in states] == [False] * 4
    assert len(upstream.calls) == 1


async def test_what_other_libraries_log_is_in_the_log_whatever_its_text(client):
    logging.getLogger("library").error("worker died: %s", "CancelledError()")
    (event,) = await load(client, "/logs?level=ERROR")
    assert event["message"] == "worker died: CancelledError()"


async def test_logs_hold_the_newest_events_oldest_first_and_no_more_than_the_buffer(start):
    client = await start(log_buffer_size=5)
    for number in range(4):
        structlog.get_logger().info("counted", number=number)
        logging.getLogger("a.library").warning("warned %d times", number)
    messages = ["warned 1 times", "counted", "warned 2 times", "counted", "warned 3 times"]
    assert [event["message"] for event in await load(client)] == messages
    assert [event["message"] for event in await load(client, "/logs?limit=2")] == messages[-2:]
    last = {"level": "INFO", "message": "counted", "metadata": {"number": 3}, "timestamp": ANY}
    assert await load(client, "/logs?level=INFO&limit=1") == [last]
    assert (await load(client, "/logs?level=info&page=2"))[-1] == last
    (event,) = await load(client, "/logs?limit=1")
    assert (event["level"], event["metadata"]) == ("WARNING", None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", event["timestamp"])
    assert abs(datetime.now(UTC) - datetime.fromisoformat(event["timestamp"])).total_seconds() < 5
    assert await load(client, "/logs?level=ERROR") == []


@in_module
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("limit", ["0", "1001", "-1", "abc", "1_0", "+5", "1.0", " 5", "", "9" * 5000, "\u0665"]),
        ("level", ["LOUD", "", "INFO,ERROR", "20", "NOTSET", " INFO"]),
    ],
)
async def test_a_limit_or_a_level_that_is_none_is_refused(shared, name, values):
    for value in values:
        response = await shared.get("/logs", params={name: value})
        (error,) = problem(response, "invalid_request")["errors"]
        assert error["field"] == name


@pytest.mark.parametrize("level", ["DEBUG", "INFO"])
async def test_polling_writes_no_event(start, level):
    client = await start(log_level=level)
    before = await load(client)
    assert "startup complete" in str(before), "uvicorn's events go the same way"
    for path in ("/status", "/logs", "/status"):
        await load(client, path)
    assert await load(client) == before


async def test_the_log_level_holds_for_everything(start):
    client = await start(log_level="WARNING")
    await client.post("/ask", json=ASK)
    structlog.get_logger().info("quiet")
    for name in ("a.library", "uvicorn.error", "openai", "httpx2"):
        logging.getLogger(name).info("quiet")
        logging.getLogger(name).warning("loud")
    assert [event["message"] for event in await load(client)] == ["loud"] * 4


async def test_what_is_shaped_like_a_key_is_masked_and_values_are_cut(capsys, start):
    client = await start(api_token=TOKEN)
    client.headers["Authorization"] = f"Bearer {TOKEN}"
    secrets = ("sk-proj-abcdefgh_123", "BEARER abc.def-123", KEY, TOKEN)
    try:
        raise ZeroDivisionError(*secrets)
    except ZeroDivisionError:
        logging.getLogger("a.library").exception("failed with %s", secrets)
        structlog.get_logger().exception("failed", text=" ".join(secrets), inner={"key": secrets})
    long = "\u20ac" * 3000
    structlog.get_logger().error(long, value=long, inner=[long])
    logged = await load(client, "/logs?level=ERROR")
    assert ["ZeroDivisionError" in str(event) for event in logged] == [True, True, False]
    shown = json.dumps(logged) + capsys.readouterr().out
    assert not re.search(f"abc|{TOKEN}|{KEY}", shown)
    values = [logged[2]["message"], logged[2]["metadata"]["value"], *logged[2]["metadata"]["inner"]]
    assert [len(value) for value in values] == [2000] * 3


async def test_the_demo_model_streams_word_by_word_and_quotes_the_prompt(start):
    client = await start(openai_api_key="demo")
    asked = {"prompt": "¿Qué\ntal? 🙂", "history": [TURN]}
    async with client.stream("POST", "/ask", json=asked) as response:
        reads = response.aiter_raw()
        first = await anext(reads)
        assert (await load(client, "/status"))["asks"]["active"] == 1, "it has only begun"
        *deltas, last, end = events(first + b"".join([read async for read in reads]))
    words = [each["content"] for each in deltas]
    assert all(len(word.split()) == 1 for word in words)
    assert re.search("demo model.*¿Qué\ntal? 🙂".replace("?", "[?]"), "".join(words))
    used = last["tokens_used"]
    assert used > len(words)
    assert [last, end] == [done(model="demo", tokens_used=used, usage=ANY), "[DONE]"]
    assert sum(last["usage"].values()) == used
    state = await load(client, "/status")
    state = (state["model"], state["openai_connected"], state["tokens_used"])
    assert state == ("demo", False, used)
    assert "demo model" in str(await load(client, "/logs?level=WARNING"))


async def test_the_demo_model_answers_plainly_and_keeps_to_max_tokens(start):
    client = await start(openai_api_key="demo")
    whole = (await client.post("/ask", json=PLAIN)).json()
    short = (await client.post("/ask", json=PLAIN | {"max_tokens": 3, "temperature": 0})).json()
    assert (whole["finish_reason"], short["finish_reason"]) == ("stop", "length")
    assert short["response"].split() == whole["response"].split()[:3]
    assert whole["tokens_used"] > short["tokens_used"] > 3


async def test_standard_output_shows_what_logs_shows_and_no_prompt_at_any_level(tmp_path):
    env = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    env |= {"OPENAI_API_KEY": "demo", "API_PORT": "0", "LOG_LEVEL": "DEBUG"}
    async with launched(SERVICE, cwd=tmp_path, **env) as running:
        for streamed in (True, False):
            asked = {"prompt": "xylophone", "history": [TURN | {"content": "zyzzyva"}]}
            response = await running.client.post("/ask", json=asked | {"stream": streamed})
            assert "xylophone" in response.text, "the demo model needs no proxy"
        kept = await load(running.client)
        running.process.send_signal(signal.SIGINT)
        shown = await running.ended()
    for line in shown:
        rest = line.keys() - {"timestamp", "level", "message"}
        line["metadata"] = {key: line.pop(key) for key in rest} or None
    assert shown[: len(kept)] == kept
    assert [event["message"] for event in kept].count("ask finished") == 2
    assert not re.search("xylophone|zyzzyva", running.output)


async def test_each_event_is_one_write_since_processes_may_share_the_output(tmp_path):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    env = {"OPENAI_API_KEY": "demo", "API_PORT": "0", "PYTHONUNBUFFERED": "1"}
    with ours, theirs:
        run = asyncio.create_subprocess_exec
        child = await run(sys.executable, SERVICE, cwd=tmp_path, env=env, stdout=theirs.fileno())
        async with asyncio.timeout(20):
            read = asyncio.get_running_loop().sock_recv
            writes = [await read(ours, 2**16) for _ in range(3)]
        child.terminate()
        await child.wait()
    assert all(json.loads(write) and write.endswith(b"\n") for write in writes)


async def test_a_stop_takes_nothing_new_and_lets_a_stream_under_way_finish(upstream, tmp_path):
    resume = asyncio.Event()

    async def pause(call: Call) -> None:
        await call.start()
        await call.say("Ho")
        await resume.wait()
        await call.write(FINISH + DONE)
        await call.end()

    upstream.scripts = [pause]
    env = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": upstream.url, "API_PORT": "0"}
    async with launched(SERVICE, cwd=tmp_path, **env) as running:
        async with running.client.stream("POST", "/ask", json=ASK) as response:
            reads = response.aiter_raw()
            first = await anext(reads)
            running.process.send_signal(signal.SIGTERM)
            await running.refuses()
            await running.read("(Waiting for connections)")
            resume.set()
            rest = b"".join([read async for read in reads])
        assert events(first + rest)[-1] == "[DONE]"
        assert "ask finished" in str(await running.ended())
        assert "API_TOKEN" not in running.output, "nobody else can ask"


async def test_a_second_interrupt_cuts_the_streams_and_prints_no_traceback(upstream, tmp_path):
    async def pause(call: Call) -> None:
        await call.start()
        await call.say("Ho")
        await call.hang()

    upstream.scripts = [pause]
    env = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": upstream.url, "API_PORT": "0"}
    async with launched(SERVICE, cwd=tmp_path, API_HOST="0.0.0.0", **env) as running:
        assert "API_TOKEN" in await running.read('(.*"WARNING".*)'), "anyone may ask"
        async with running.client.stream("POST", "/ask", json=ASK) as response:
            reads = response.aiter_raw()
            await anext(reads)
            running.process.send_signal(signal.SIGINT)
            await running.refuses()
            running.process.send_signal(signal.SIGINT)
            assert "ask cancelled" in str(await running.ended())
        await upstream.calls[0].left.wait()


async def test_uvicorn_runs_the_very_same_app(upstream, tmp_path):
    env = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": upstream.url}
    async with launched(*UVICORN, cwd=tmp_path, **env) as running:
        running.client.headers["Origin"] = PAGE
        response = await running.client.post("/ask", json=ASK)
        assert events(response.content)[-1] == "[DONE]"
        problem(await running.client.post("/ask", json={}), "invalid_request")
        running.process.send_signal(signal.SIGINT)
        assert "ask finished" in str(await running.ended())


async def test_what_a_stop_cuts_after_its_grace_is_closed_and_logged(upstream, tmp_path):
    upstream.scripts = [stream(chunk("Ho"), Call.hang)]
    env = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": upstream.url}
    grace = ("--timeout-graceful-shutdown", "1")
    async with (
        launched(*UVICORN, *grace, cwd=tmp_path, **env) as running,
        running.client.stream("POST", "/ask", json=ASK) as response,
    ):
        reads = response.aiter_raw()
        await anext(reads)
        running.process.send_signal(signal.SIGTERM)
        await soon(upstream.calls[0].left)
        assert "ask cancelled" in str(await running.ended())


def test_both_lists_of_dependencies_are_the_same():
    project = tomllib.loads((HERE / "pyproject.toml").read_text())
    assert project["project"]["dependencies"] == project["dependency-groups"]["run"]


def wrong_bodies(size: int = MIB) -> dict[str, str]:
    """Bodies of a MiB at most that hold as much that is wrong as they can."""
    names = ",".join(f'"{number:x}":0' for number in range(109_000))
    return {
        "turns": f'{{"prompt":"p","history":[{",".join(["{}"] * 349_000)}]}}',
        "fields": f'{{"prompt":"p",{names}}}',
        "fields of a turn": f'{{"prompt":"p","history":[{{"role":"user","content":"p",{names}}}]}}',
        "fields of turns": f'{{"history":[{",".join([f"{{{names[:886]}}}"] * 1000)}]}}',
    }


async def test_a_body_that_is_all_wrong_holds_up_nobody_and_costs_little(tmp_path):
    env = {"OPENAI_API_KEY": "demo", "API_PORT": "0"}
    async with launched(SERVICE, cwd=tmp_path, **env) as running, asyncio.TaskGroup() as tasks:
        before = running.peak()
        for name, body in wrong_bodies().items():
            assert len(body) <= MIB
            asked = running.client.post("/ask", content=body, headers=JSON)
            task = tasks.create_task(asked)
            longest = 0.0
            while not task.done():
                begun = time.monotonic()
                await load(running.client, "/status")
                longest = max(longest, time.monotonic() - begun)
            wrong = problem(task.result(), "invalid_request")["errors"]
            assert 1 <= len(wrong) <= 100, name
            assert longest < 2, name
        assert running.peak() - before < 150


H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
async def test_a_wish_for_http_2_is_served_as_http_1(tmp_path, late):
    head, body = (part.encode() for part in post(json.dumps(PLAIN), *H2C).decode().split("{"))
    env = {"OPENAI_API_KEY": "demo", "API_PORT": "0"}
    async with (
        launched(SERVICE, cwd=tmp_path, **env) as running,
        connection(running.client) as (reader, writer),
    ):
        for _ in range(2):
            writer.write(head if late else head + b"{" + body)
            if late:
                await load(running.client, "/status")  # so the head has been read
                writer.write(b"{" + body)
            wire = Wire(reader, writer)
            assert "demo" in json.loads(await wire.write())["response"]
            assert wire.head.startswith("http/1.1 200 ")


@cases(
    "late, method, host",
    {
        "at once": (False, b"POST", "localhost"),
        "late": (True, b"POST", "localhost"),
        "late, of another host": (True, b"POST", "evil.example"),
        "late, by PUT": (True, b"PUT", "localhost"),
        "late, by GET": (True, b"GET", "localhost"),
    },
)
async def test_under_uvicorns_command_it_is_refused_and_no_body_is_a_request(
    tmp_path, late, method, host
):
    request = b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = post("", *H2C, host=host).replace(b"Length: 0", b"Length: %d" % len(request))
    head = head.replace(b"POST", method)
    async with (
        launched(*UVICORN, cwd=tmp_path, OPENAI_API_KEY="demo") as running,
        connection(running.client) as (reader, writer),
        asyncio.timeout(10),
    ):
        writer.write(head if late else head + request)
        said = await reader.readuntil(b"}")
        writer.write(request)
        with suppress(ConnectionError):
            said += await reader.read()
    assert len(re.findall(rb"HTTP/1.1 [0-9]{3} ", said)) == 1
    assert b'"code":"upgrade_not_supported"' in said
    assert b"\r\nconnection: close\r\n" in said.lower()
    assert b"HTTP_1_1" in said, "the remedy for Java"


async def test_a_wish_that_is_split_over_two_reads_is_refused_and_spoils_no_header(start):
    client = await start(api_token=TOKEN)
    sent = post(json.dumps(ASK), f"Authorization: Bearer {TOKEN}", *H2C)
    at = sent.index(b"h2c") + 2
    async with connection(client) as (reader, writer), asyncio.timeout(10):
        writer.write(sent[:at])
        await load(client, "/status")  # so it has been read
        writer.write(sent[at:])
        assert b'"code":"upgrade_not_supported"' in await reader.read()


async def test_a_body_that_is_refused_early_goes_by_as_it_came(start):
    client = await start()
    body = "\r\nUpgrade: " + "a" * 60 + "\r\n"
    sent = post(body).replace(b"application/json", b"text/plain")
    async with connection(client) as (reader, writer), asyncio.timeout(10):
        writer.write(sent[: -len(body)])
        assert b'"code":"unsupported_media_type"' in await reader.readuntil(b"}")
        writer.write(body.encode() + b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 404 ")


async def test_a_host_of_megabytes_is_refused_and_not_kept(tmp_path):
    env = {"OPENAI_API_KEY": "demo", "API_PORT": "0"}
    async with launched(SERVICE, cwd=tmp_path, **env) as running:
        before = running.peak()
        for number in range(30):
            sent = f"GET /status HTTP/1.1\r\nHost: {number}.{'x' * 4 * MIB}\r\n\r\n"
            assert await raw(running.client, sent) == "host_not_allowed"
        assert running.peak() - before < 100


@pytest.mark.parametrize("body", [0, -1], ids=["nothing", "all but its last byte"])
async def test_a_body_that_never_comes_is_a_408_and_the_end_of_the_connection(start, body):
    client = await start(client_timeout=0.3)
    whole = post(json.dumps(ASK))
    async with connection(client) as (reader, writer), asyncio.timeout(10):
        writer.write(whole[: body or whole.index(b"{")])
        said = await reader.read()
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nconnection: close\r\n" in said.lower()
    assert b'"code":"request_timeout"' in said
    assert (await load(client, "/status"))["asks"] == NOTHING_YET


async def test_a_body_that_never_comes_does_not_hold_up_a_stop(tmp_path):
    env = {"OPENAI_API_KEY": "demo", "API_PORT": "0", "CLIENT_TIMEOUT": "1"}
    async with (
        launched(SERVICE, cwd=tmp_path, **env) as running,
        connection(running.client) as (reader, writer),
    ):
        writer.write(post(json.dumps(ASK), "Expect: 100-continue")[:-1])
        assert b"100 Continue" in await reader.readline()
        running.process.send_signal(signal.SIGTERM)
        assert b'"code":"request_timeout"' in await reader.read()
        await running.ended()


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
async def test_a_client_that_sends_all_before_it_reads_sees_the_413(client, chunked):
    def send() -> tuple[int, Any]:
        body: Any = iter([b"x" * MIB] * 8) if chunked else b"x" * MIB * 8
        sender = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=10)
        with closing(sender):
            # As urllib does it: the service closes the connection, which loses what is unread.
            sender.request("POST", "/ask", body, JSON | {"Connection": "close"})
            response = sender.getresponse()
            return response.status, json.loads(response.read())["code"]

    assert await asyncio.to_thread(send) == (413, "body_too_large")


TERMINAL = "import pty, sys; pty.spawn([sys.executable, sys.argv[1]])"


async def test_control_characters_never_reach_a_terminal_raw_and_the_log_has_them(
    upstream, tmp_path
):
    nasty = "\x1b]0;title\x07\x1b[2J\x9b2J\x7f\x08\r\n\x00"
    upstream.scripts = [stream(chunk("Hola", finish_reason=nasty, model=f"gpt{nasty}"), DONE)]
    upstream.scripts[0] = play(upstream.scripts[0], Call.end)
    env = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": upstream.url, "API_PORT": "0"}
    async with launched("-c", TERMINAL, SERVICE, cwd=tmp_path, **env) as running:
        headers: Any = {"Origin": b"http://\x9b2J.example"}
        await running.client.post("/ask", json=ASK, headers=headers)
        await running.client.post("/ask", json=ASK)
        (event,) = await closings(running.client)
        await running.read("(ask finished)")
    assert event["metadata"]["finish_reason"] == nasty
    assert event["metadata"]["model"] == f"gpt{nasty}"
    colours = re.findall(r"\x1b\[[0-9;]*m", running.output)
    assert colours, "it is a terminal"
    shown = re.sub(r"\x1b\[[0-9;]*m", "", running.output).replace("\r\n", "")
    assert "2J.example" in shown
    assert shown.isprintable()


async def test_it_runs_without_a_standard_output(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    program = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, sys.argv[1]])"
    env = {"OPENAI_API_KEY": "demo", "API_PORT": port}
    async with (
        python("-c", program, SERVICE, cwd=tmp_path, **env) as child,
        Client(f"http://127.0.0.1:{port}") as client,
    ):
        while True:
            with suppress(OSError, httpx2.ConnectError):
                assert (await client.post("/ask", json=PLAIN)).json()["model"] == "demo"
                break
            await asyncio.sleep(0.02)  # nothing tells when it listens
        assert "ask finished" in str(await load(client))
        child.send_signal(signal.SIGTERM)
        assert await child.communicate() == (b"", b"")


@pytest.mark.parametrize("module", ["asyncio.events", "openai", "uvicorn"])
async def test_an_interrupt_during_the_start_prints_no_traceback(tmp_path, module):
    env = {"OPENAI_API_KEY": "demo", "API_PORT": "0"}
    async with python("-X", "importtime", SERVICE, cwd=tmp_path, **env) as child:
        assert child.stderr
        while not (await child.stderr.readline()).endswith(b" %b\n" % module.encode()):
            pass
        child.send_signal(signal.SIGINT)
        out, err = await child.communicate()
    assert b"Traceback" not in out + err
    assert child.returncode in {0, -signal.SIGINT}


async def test_an_interrupt_as_soon_as_it_listens_prints_no_traceback(tmp_path):
    async with launched(SERVICE, cwd=tmp_path, OPENAI_API_KEY="demo", API_PORT="0") as running:
        running.process.send_signal(signal.SIGINT)
        await running.ended()
        assert running.process.returncode in {0, -signal.SIGINT}


async def test_a_hard_limit_of_files_is_a_warning(tmp_path):
    program = """if True:
        import os, resource, sys
        resource.setrlimit(resource.RLIMIT_NOFILE, (90, 90))
        os.execv(sys.executable, [sys.executable, sys.argv[1]])"""
    env = {"OPENAI_API_KEY": "demo", "API_PORT": "0"}
    async with launched("-c", program, SERVICE, cwd=tmp_path, **env) as running:
        assert (await running.client.post("/ask", json=PLAIN)).status_code == 200
        running.process.send_signal(signal.SIGTERM)
        (warning,) = (each for each in await running.ended() if "files" in each["message"])
    assert (warning["level"], warning["limit"]) == ("WARNING", 90)
    assert "ulimit -n" in warning["remedy"]


@pytest.mark.parametrize("way", [(SERVICE,), UVICORN], ids=["python", "uvicorn"])
async def test_the_caller_s_address_is_the_same_under_both_ways_to_start_it(tmp_path, way):
    env = {"OPENAI_API_KEY": "demo", "API_PORT": "0", "RATE_LIMIT": "1"}
    async with launched(*way, cwd=tmp_path, **env) as running:
        for address in ("192.0.2.1", "192.0.2.2"):
            headers = {"X-Forwarded-For": f"198.51.100.7, {address}"}
            asked = [await running.client.post("/ask", json=PLAIN, headers=headers) for _ in "12"]
            assert asked[0].status_code == 200
            problem(asked[1], "too_many_asks")


async def test_the_app_of_the_module_is_one_app(tmp_path):
    program = "import service; print(service.app is service.app)"
    env = {"OPENAI_API_KEY": "demo", "LOG_LEVEL": "CRITICAL"}
    assert await finished("-c", program, cwd=tmp_path, **env) == (0, "True\n", [])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def document(shared: Client) -> Any:
    return await load(shared, "/openapi.json")


def operations(document: Any) -> Iterator[tuple[str, str, Any]]:
    for path, item in document["paths"].items():
        for way, operation in item.items():
            yield path, way.upper(), operation


def test_the_document_lists_the_routes_and_methods_that_there_are(document):
    routes: list[Any] = list(inside(service.create_app(Settings())).routes)
    there = {(each.path, way) for each in routes for way in each.methods - {"HEAD"}}
    assert {(path, way) for path, way, _ in operations(document)} == there


def test_generators_of_clients_can_read_the_document(document):
    assert document["openapi"].startswith("3.1.")
    names = [operation["operationId"] for *_, operation in operations(document)]
    assert len({*names}) == len(names)
    assert all("://" not in server["url"] for server in document["servers"]), "relative"
    for path in ("/ask", "/v1/chat/completions"):
        # They take the first content there is.
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert [*content][:2] == ["application/json", "text/event-stream"]
    text = json.dumps(document)
    for name in re.findall(r'"#/components/schemas/(\w+)"', text):
        assert name in document["components"]["schemas"]


def test_the_document_holds_every_error_with_its_status_and_headers(document):
    codes = {code: int(title[:3]) for code, title in PROBLEMS.items()}
    assert {code: status for code, (status, _) in service.ERRORS.items()} == codes
    # No operation answers these two: they stand for the paths and methods that there are not.
    found = {"not_found": 404, "method_not_allowed": 405}
    more = {"401": {"WWW-Authenticate"}, "429": {"Retry-After"}, "503": {"Retry-After"}}
    for path, _, operation in operations(document):
        kind: Any = service.OpenAIError if path.startswith("/v1/") else service.Problem
        for status, response in operation["responses"].items():
            assert {"X-Request-ID"} | more.get(status, set()) <= response["headers"].keys()
            (media,) = response["content"].values() if status != "200" else [{}]
            for each in media.get("examples", {}).values():
                assert conforms(each["value"], kind)
                found[each["value"].get("error", each["value"])["code"]] = int(status)
    assert found == codes
    (enum,) = {
        (*document["components"]["schemas"][name]["properties"]["code"]["enum"],)
        for name in ("Problem", "ErrorEvent", "OpenAIErrorDetail")
    }
    assert {*enum} == {*codes}


def test_the_document_holds_the_bounds_and_the_defaults_of_every_field(document):
    schema = document["components"]["schemas"]["Ask"]
    inner = schema["properties"]
    names = {"prompt", "history", "model", "temperature", "max_tokens", "stream"}
    assert (names, schema["required"], schema["additionalProperties"]) == (
        {*inner},
        ["prompt"],
        False,
    )
    number = {"type": "number", "minimum": 0, "maximum": 2}
    assert inner["temperature"].items() >= number.items()
    assert inner["max_tokens"].items() >= {"type": "integer", "minimum": 1}.items()
    assert inner["history"]["maxItems"] == 1000
    defaults = {name: each["default"] for name, each in inner.items() if "default" in each}
    assert defaults == {"stream": True, "history": []}
    limit, level = (each["schema"] for each in document["paths"]["/logs"]["get"]["parameters"])
    assert limit.items() >= {"minimum": 1, "maximum": 1000, "default": 100}.items()
    assert level["enum"] == ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
    secured = {path for path, _, operation in operations(document) if "security" in operation}
    assert secured == {"/ask", "/v1/chat/completions", "/v1/models", "/logs", "/metrics"}


async def test_replies_are_what_the_document_promises(client, upstream, document):
    kind = service.PieceEvent | service.DoneEvent | service.ErrorEvent
    operation = document["paths"]["/ask"]["post"]
    shown_ask = operation["requestBody"]["content"]["application/json"]["example"]
    assert (await client.post("/ask", json=shown_ask)).status_code == 200
    content = operation["responses"]["200"]["content"]
    *shown, end_shown = events(content["text/event-stream"]["example"])
    *sent, end = events((await client.post("/ask", json=ASK)).content)
    assert end == end_shown == "[DONE]"
    upstream.scripts = [answer, stream(HOLA, Call.reset)]
    plain = await client.post("/ask", json=PLAIN)
    assert conforms(plain.json(), service.Answer)
    sent += events((await client.post("/ask", json=ASK)).content)
    assert [each["type"] for each in sent] == ["delta", "delta", "done", "delta", "error"]
    assert all(conforms(each, kind) for each in (*sent, *shown))
    assert conforms(await load(client, "/status"), service.Status)
    assert conforms(await load(client), list[service.LogEvent])


@in_module
async def test_the_pages_pin_what_they_load_and_the_first_leads_to_them(shared):
    for path in ("/docs", "/redoc"):
        page = await shared.get(path)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "openapi.json" in page.text
        loaded = re.findall(r"<[^>]*(?:src|href)=\"?https?:[^>]*>", page.text)
        assert loaded
        for tag in loaded:
            assert re.search(r"@\d+\.\d+\.\d+/", tag)
            assert re.search(r'integrity=\s*"sha384-[\w+/]{64}"', tag)
            assert "crossorigin" in tag
    page = await shared.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for path in ("docs", "redoc"):
        assert re.search(rf'href="?(\./)?{path}\b', page.text), "relative: a proxy may add a prefix"


@cases(
    "text, encoded",
    {
        "ASCII": ('"Hola"', b'"Hola"'),
        "UTF-8": ('"é😀"', '"é😀"'.encode()),
        "line ends": ('"\x85\u2028\u2029"', rb'"\u0085\u2028\u2029"'),
        "half a surrogate pair": ('"é\ud83d"', '"é'.encode() + rb'\ud83d"'),
    },
)
def test_json_goes_out_as_utf_8_that_every_reader_takes(text, encoded):
    assert service.utf8_json(text) == encoded
    assert json.loads(encoded) == json.loads(text)


BASE_URLS = {
    "https://api.example": "https://api.example",
    "http://a.example/": "http://a.example",
    "http://localhost:11434/v1/": "http://localhost:11434/v1",
    "HTTPS://a.example/v1": None,
    "http://[::1]:8080": "http://[::1]:8080",
    "http://127.0.0.1/v1//": "http://127.0.0.1/v1",
    "http://127.0.0.256/v1": None,
    "http://bücher.example/openai/v1/": "http://bücher.example/openai/v1",
    "http://a.example:65536": None,
    "http://a.example?key=x": None,
    "http://": None,
    "": None,
}


@cases(
    "parse, table",
    {
        "URL": (service.http_url, BASE_URLS),
        "integer": (
            service.integer_between(0, 10),
            {"0": 0, "010": 10, "11": None, "-1": None, "\u0665": None, "1" * 5000: None},
        ),
        "seconds": (
            service.seconds_from(0.1),
            {"0.1": 0.1, "15": 15.0, "0.09": None, ".5": None, "1e3": None, "inf": None},
        ),
        "hosts": (
            service.hosts,
            {"A.example,,b": ("a.example", "b"), "*": ("*",), ",": (), "a b": None, "[::1]": None},
        ),
        "origins": (
            service.origins,
            {"http://A:1, *": ("http://a:1", "*"), "app://x": ("app://x",), "http://a/": None},
        ),
        "models": (service.models, {"a/b:c, d ": ("a/b:c", "d"), "a b": None, "é": None}),
        "JSON": (
            service.extra_body,
            {"{}": {}, '{"n": [1]}': {"n": [1]}, "[]": None, '{"messages": []}': None},
        ),
        "level": (service.level_name, {"Info": "INFO", "WARN": None, "\u0131nfo": None}),
        "token": (service.printable_ascii, {"a~!": "a~!", "a b": None, "\x7f": None}),
        "secret": (service.long_secret, {"é" * 16: "é" * 16, "é" * 15 + "x": None}),
    },
)
def test_the_parser_of_a_setting_takes_what_it_says(parse, table):
    def parsed(text: str) -> object:
        with suppress(ValueError):
            return parse(text)
        return None

    assert {text: parsed(text) for text in table} == table


def failure_of(act: Callable[[], object]) -> Failure | None:
    """The failure that *act* ends in, if it does."""
    try:
        act()
    except Failure as failure:
        return failure
    return None


def test_a_body_is_pruned_to_a_hundred_entries_a_level_and_keeps_what_is_known():
    wide: Any = {f"x{number}": 0 for number in range(1000)}
    pruned: Any = service.prune(
        wide | {"history": [wide | {"role": 1}] * 1000}, {"role", "history"}
    )
    assert (len(pruned), len(pruned["history"])) == (100, 100)
    assert {len(turn) for turn in pruned["history"]} == {100}
    assert pruned["history"][0]["role"] == 1


@cases(
    "values, names",
    {
        "right": (ASK, []),
        "one": ({}, ["prompt"]),
        "blank": ({"prompt": "\u3000\n"}, ["prompt"]),
        "nested": (
            ASK | {"history": [TURN, {"role": "x"}]},
            ["history.1.role", "history.1.content"],
        ),
        "1.0": (ASK | {"max_tokens": 1.0}, []),
        "1e999": (
            ASK | {"temperature": math.inf, "max_tokens": math.inf},
            ["temperature", "max_tokens"],
        ),
        "just too many": (ASK | dict.fromkeys(map(str, range(101)), 0), [*map(str, range(99))]),
        "many": (ASK | dict.fromkeys(map(str, range(20_000)), 0), [*map(str, range(99))]),
    },
)
def test_validation_names_every_wrong_field_the_first_hundred_at_most(values, names):
    wrong = failure_of(lambda: service.validate(service.Ask, values))
    found = wrong.errors if wrong else []
    assert [each["field"] for each in found][:99] == names
    assert all(" " in each["detail"] for each in found)
    assert len(found) <= 100


EVENTS = """data: é\u2028\x85😀
: a comment
event: x

data:
data:two
data: lines
id: 1

retry: 1
data:{"a":1}

:

"""


def decoded(decoder: Any, *parts: bytes) -> list[tuple[bytes, bytes]]:
    """The events, and the data of each that has some, in a stream that is split into *parts*."""
    blocks = [*map(decoder.feed, parts), decoder.close()]
    return [each for block in blocks if block for each in decoder.events(block) if each[1]]


@cases("end", {"LF": "\n", "CRLF": "\r\n", "CR": "\r"})
def test_events_are_read_wherever_they_are_split(end):
    whole = f"\ufeff{EVENTS}".replace("\n", end).encode()
    for at in range(len(whole) + 1):
        read = decoded(service.SSEDecoder(), whole[:at], whole[at:])
        data = [text.decode() for _, text in read]
        assert data == ["é\u2028\x85😀", "\ntwo\nlines", '{"a":1}'], f"split at {at}"
        for event, _ in read:
            assert event in whole, "untouched, and whole"
            assert event.endswith(2 * end.encode())


@cases(
    "sent, data",
    {
        "nothing": (b"", []),
        "an open line": (b"data: [DONE]", [b"[DONE]"]),
        "an open event": (b"data: 1\n", [b"1"]),
        "an open CRLF": (b"data: 1\r\n\r", [b"1"]),
        "no space": (b"data:1\n\n", [b"1"]),
        "other fields": (b"event: x\nid: 1\ndatabase: 2\n\n", []),
        "empty lines": (b"\n\n\n\ndata: 1\n\n\ndata: 2\n\n", [b"1", b"2"]),
        "line ends that differ": (b"data: 1\n\ndata: 2\r\n\r\ndata: 3\r\r", [b"1", b"2", b"3"]),
        "mixed line ends": (b"data: 1\n\r\ndata: 2\r\n\ndata: 3\n\r", [b"1", b"2", b"3"]),
    },
)
def test_the_end_of_a_stream_completes_its_last_event(sent, data):
    for at in range(len(sent) + 1):
        read = decoded(service.SSEDecoder(), sent[:at], sent[at:])
        assert [text for _, text in read] == data, f"split at {at}"


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"], ids=["LF", "CRLF"])
def test_a_large_event_in_small_pieces_takes_linear_time(end):
    begun = time.process_time()
    parts = (b"data: x" + end, b"data: ", *[b"x" * 2**10] * 2**13, end)
    assert [len(data) for _, data in decoded(service.SSEDecoder(), *parts)] == [1, 2**23]
    # It takes about 0.05 s; joining all that came before to each piece takes more than 5 s.
    assert time.process_time() - begun < 3


@pytest.mark.parametrize("kind", [service.SSEDecoder, service.BodyDecoder])
def test_a_decoder_holds_32_mib_and_no_more(kind):
    decoder = kind()
    for _ in range(32):
        decoder.feed(b"x" * MIB)
    with pytest.raises(Failure, match="API"):
        decoder.feed(b"x")


def test_a_plain_answer_is_one_event_at_its_end():
    (event, data), (_, mark) = decoded(service.BodyDecoder(), b' {"a"', b":\n\n1} ")
    assert (event, json.loads(data), mark) == (b' {"a":\n\n1} ', {"a": 1}, b"[DONE]")


@cases(
    "data, parsed",
    {
        "object": (b'{"a": 1}', {"a": 1}),
        "no error": (b'{"error": null}', {"error": None}),
        "half a surrogate pair": (rb'{"a": "\ud83d"}', {"a": "\ud83d"}),
        "not UTF-8": (b'{"a": "\xff"}', {"a": "\ufffd"}),
        "4,300 digits": (b'{"a": %b}' % (b"9" * 4300), {"a": 10**4300 - 1}),
        "5,000 digits": (b'{"a": %b}' % (b"9" * 5000), None),
        "nothing": (b"", None),
        "null": (b"null", None),
        "list": (b"[]", None),
        "two": (b"{}{}", None),
        "torn": (b'{"a": ', None),
        "deep": (b'{"a":' * 100_000, None),
        "error": (b'{"error": {"message": "x"}}', None),
        "error as text": (b'{"error": "x"}', None),
    },
)
def test_a_chunk_is_a_json_object_without_an_error(data, parsed):
    failure = failure_of(lambda: service.parse_chunk(data))
    assert (failure and failure.code) == (None if parsed else "upstream_error")
    assert failure or service.parse_chunk(data) == parsed


@pytest.mark.parametrize("value", [0, 7, 10**12])
def test_a_figure_is_a_count(value):
    assert service.as_count(value) == value


@pytest.mark.parametrize("value", [True, -1, 1.0, "7", None, [], 10**12 + 1, 10**4299])
def test_what_is_no_figure_is_no_count(value):
    assert service.as_count(value) is None


def with_delta(**delta: object) -> dict[str, Any]:
    """A chunk of the upstream, parsed, with this delta in its one choice."""
    return {"choices": [{"index": 0, "delta": delta}]}


ENDED: Any = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


@cases(
    "chunks, pieces, facts",
    {
        "nothing": ([], [], {"complete": False, "model": "asked", "tokens_used": None}),
        "text": (
            [with_delta(content="a")],
            [("delta", "a")],
            {"answer_chars": 1, "complete": False},
        ),
        "refusal": (
            [with_delta(content=None, refusal="No.")],
            [("delta", "No.")],
            {"answer_chars": 3},
        ),
        "reasoning_content": (
            [with_delta(reasoning_content="r", content="a")],
            [("reasoning", "r"), ("delta", "a")],
            {"other_chars": 1, "answer_chars": 1},
        ),
        "reasoning": ([with_delta(reasoning="r")], [("reasoning", "r")], {"answer_chars": 0}),
        "reasoning as a list": ([with_delta(reasoning=[1])], [], {"other_chars": 0}),
        "no text": (
            [with_delta(), with_delta(content=""), with_delta(content=None), {"choices": None}, {}],
            [],
            {},
        ),
        "no delta": ([{"choices": [{"delta": None}, {}]}], [], {"complete": False}),
        "end": (
            [with_delta(content="a"), ENDED],
            [("delta", "a")],
            {"complete": True, "finish_reason": "stop"},
        ),
        "end, odd": (
            [{"choices": [{"finish_reason": 7}]}],
            [],
            {"complete": False, "finish_reason": None},
        ),
        "two choices, one ended": (
            [with_delta(), {"choices": [{"index": 1, "finish_reason": "stop"}]}],
            [],
            {"complete": False},
        ),
        "an end is kept": ([ENDED, with_delta(content="a")], [("delta", "a")], {"complete": True}),
        "model": ([{"model": "real"}, {"model": ""}, {"model": 5}], [], {"model": "real"}),
        "usage": (
            [
                {
                    "usage": {
                        "total_tokens": 9,
                        "prompt_tokens": 4,
                        "completion_tokens": 5,
                        "completion_tokens_details": {"reasoning_tokens": 2},
                    }
                },
                {"usage": None},
            ],
            [],
            {
                "tokens_used": 9,
                "usage": {"prompt_tokens": 4, "completion_tokens": 5, "reasoning_tokens": 2},
            },
        ),
        "usage in part": (
            [{"usage": {"prompt_tokens": 4}}, {"usage": {"completion_tokens": True}}],
            [],
            {"tokens_used": None, "usage": {"prompt_tokens": 4}},
        ),
        "odd details": (
            [{"usage": {"total_tokens": 9, "completion_tokens_details": 5}}],
            [],
            {"tokens_used": 9, "usage": {}},
        ),
        "Groq's usage": ([{"x_groq": {"usage": {"total_tokens": 9}}}], [], {"tokens_used": 9}),
        "Groq without": ([{"x_groq": None}, {"x_groq": {"id": "x"}}], [], {"tokens_used": None}),
    },
)
def test_a_completion_is_a_fold_of_chunks(chunks, pieces, facts):
    folded = service.Completion("asked", "delta")
    assert [piece for each in chunks for piece in folded.add(each)] == pieces
    assert {name: getattr(folded, name) for name in facts} == facts


@cases(
    "wrong",
    {
        "choices": {"choices": 5},
        "choice": {"choices": ["a"]},
        "index": {"choices": [{"index": []}]},
        "delta": {"choices": [{"delta": "a"}]},
        "number": with_delta(content=5),
        "true": with_delta(content=True),
        "tool call": with_delta(tool_calls=["a"]),
        "usage": {"usage": 5},
    },
)
def test_a_chunk_that_is_not_what_the_api_promises_is_a_failure(wrong):
    failure = failure_of(lambda: service.Completion("asked", "delta").add(wrong))
    assert failure
    assert failure.code == "upstream_error"


# Chunks of real servers, and what is near to them: text in nothing but a choice's delta, or not.
TEXT_CHUNKS: dict[str, Any] = {
    "OpenAI": {
        "id": "x",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "service_tier": "x",
        "choices": [
            {"index": 0, "delta": {"content": 'é "\\ \n'}, "logprobs": None, "finish_reason": None}
        ],
        "usage": None,
    },
    "short": {
        "choices": [{"delta": {"role": "assistant", "content": "a", "refusal": None}, "index": 0}]
    },
    "reasoning": {"choices": [{"index": 0, "delta": {"content": "b", "reasoning_content": "r"}}]},
    "empty": {"choices": [{"index": 0, "delta": {"content": ""}}]},
    "end": {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}]},
    "second choice": {"choices": [{"index": 1, "delta": {"content": "a"}}]},
    "second choice, said late": {"choices": [{"delta": {"content": "a"}, "index": 1}]},
    "two choices": {
        "choices": [
            {"index": 0, "delta": {"content": "a"}},
            {"index": 1, "delta": {"content": "b"}},
        ]
    },
    "usage": {"choices": [{"index": 0, "delta": {"content": "a"}}], "usage": {"total_tokens": 3}},
    "a chunk as text": {
        "choices": [
            {"index": 0, "delta": {"content": 'data: {"choices":[{"delta":{"content":"x"}}]}'}}
        ]
    },
    "half a surrogate pair": {"choices": [{"index": 0, "delta": {"content": "\ud83d"}}]},
    "model": {"model": "other", "choices": [{"index": 0, "delta": {"content": "a"}}]},
    "model last": {"choices": [{"index": 0, "delta": {"content": "a"}}], "model": "other"},
    "error first": {"error": "x", "choices": [{"index": 0, "delta": {"content": "a"}}]},
    "error last": {"choices": [{"index": 0, "delta": {"content": "a"}}], "error": "x"},
    "error object": {
        "choices": [{"index": 0, "delta": {"content": "a"}}],
        "error": {"message": "x"},
    },
    "tool": {"choices": [{"index": 0, "delta": {"tool_calls": [{"content": "a"}]}}]},
    "no choice": {"choices": []},
}


def event_of(parsed: object, spaced: bool = True) -> bytes:
    separators = (", ", ": ") if spaced else (",", ":")
    return f"data: {json.dumps(parsed, separators=separators)}\n\n".encode()


def read_in(blocks: list[bytes], *, skim: bool) -> tuple[list[service.Piece], object]:
    """The pieces in *blocks*, and what is known after them: the whole fold, or its failure."""
    completion, pieces = service.Completion("m", "delta"), []
    try:
        for block in filter(None, blocks):
            size, skimmed = completion.skim(block) if skim else (0, [])
            pieces += skimmed
            for _, data in service.SSEDecoder().events(block[size:]) if block[size:] else ():
                pieces += completion.add(service.parse_chunk(data))
    except Failure as failure:
        return pieces, failure.code
    return pieces, replace(completion, opening=b"", has_message=True)


@pytest.mark.parametrize("spaced", [False, True], ids=["", "spaced"])
@cases("odd", TEXT_CHUNKS)
def test_a_block_that_is_skimmed_says_what_its_chunks_say(odd, spaced):
    usual, short, *_ = TEXT_CHUNKS.values()
    for chunks in itertools.product(
        ([], [usual], [short], [odd]),
        ([odd], [odd] * 3, [usual, usual, odd, usual], [short, odd], [odd, short], [usual]),
    ):
        blocks = [b"".join(event_of(each, spaced) for each in block) for block in chunks]
        assert read_in(blocks, skim=True) == read_in(blocks, skim=False)
    assert service.Completion("m", "message").skim(event_of(usual, spaced)) == (0, [])


def test_nearly_all_chunks_are_skimmed():
    skimmed = service.Completion("m", "delta")
    texts, stop = b"".join(map(chunk, ("", *"Holas"))), chunk(finish_reason="stop")
    assert skimmed.skim(texts + stop) == (len(texts), [("delta", text) for text in "Holas"])
    assert skimmed.skim(HOLA) == (len(HOLA), [("delta", "Hola")])
    assert skimmed.skim(stop) == (0, [])
    says = {"index": 0, "delta": {"role": "assistant", "content": "Hola"}, "finish_reason": None}
    ollama = 2 * event_of({"choices": [says]}, spaced=False)
    assert skimmed.skim(ollama) == (len(ollama), [("delta", "Hola"), ("delta", "Hola")])


@cases(
    "opening",
    {
        "two events": 'data: {"a":1}\n\ndata: {',
        "a line of its own": "data: {\n",
        "no data": "{",
        "another field": "datum: {",
        "nothing": "",
        "no JSON": "data: {a,",
        "an error": 'data: {"error":"x",',
        "a wrong field": 'data: {"usage":5,',
    },
)
def test_a_chunk_whose_beginning_is_not_as_it_should_be_is_not_skimmed(opening):
    text = '"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
    assert service.Completion("m", "delta").skim((opening + text).encode()) == (0, [])


EVENT = b'data: {"x":1}\r\n\r\n'
PIECES = [("reasoning", "r"), ("delta", "é\ud83d"), ("delta", "\ude00")]
FAILED = Failure("rate_limited", "Slow down.", retry_after=7)
BROKEN = fault("rate_limited", 429, error="Slow down.", retry_after=7, request_id="id")
OPENAI_BROKEN = {
    "error": {
        "message": "Slow down.",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limited",
    }
}
FACTS = {"finish_reason": "stop", "tokens_used": 9, "model": "real", "usage": {"prompt_tokens": 4}}
PLAIN_ANSWER = {"response": "é😀", **FACTS, "reasoning": "r"}
EVENT_STREAM = "text/event-stream; charset=utf-8"


@cases(
    "encoder, kind, heartbeat, chunk_read, last, failed",
    {
        "events": (
            service.AskEvents(),
            EVENT_STREAM,
            PING,
            [{"type": "reasoning", "content": "r"}, delta("é\ud83d"), delta("\ude00")],
            [{"type": "done", **FACTS}, "[DONE]"],
            [BROKEN],
        ),
        "JSON": (service.AskJSON(), "application/json", b"", b"", PLAIN_ANSWER, None),
        "text": (
            service.AskText(),
            "text/plain; charset=utf-8",
            b"",
            "é😀".encode(),
            b"",
            None,
        ),
        "OpenAI's events": (
            service.ChatCompletionEvents(include_usage=False),
            EVENT_STREAM,
            PING,
            EVENT,
            ["[DONE]"],
            [OPENAI_BROKEN],
        ),
        "OpenAI's JSON": (
            service.ChatCompletionJSON(),
            "application/json",
            b"",
            EVENT,
            b"",
            None,
        ),
    },
)
def test_an_encoder_is_all_that_a_format_is(encoder, kind, heartbeat, chunk_read, last, failed):
    def read(written: bytes | None, like: object) -> object:
        if written is None or isinstance(like, bytes):
            return written
        return events(written) if isinstance(like, list) else json.loads(written)

    folded = service.Completion("asked", "delta")
    folded.add({"model": "real", "usage": {"total_tokens": 9, "prompt_tokens": 4}, **ENDED})
    assert (b"content-type", kind.encode()) == encoder.headers[0]
    assert encoder.heartbeat == heartbeat
    assert read(encoder.chunk(EVENT, {"x": 1}, PIECES), chunk_read) == chunk_read
    assert read(encoder.end(folded), last) == last
    assert read(encoder.error(FAILED, "id"), failed) == failed


@cases(
    "part, pieces, other_chars",
    {
        "empty beside reasoning": (
            {"reasoning_content": "", "reasoning": "hm"},
            [("reasoning", "hm")],
            2,
        ),
        "text in parts": (
            {"content": [{"type": "thinking"}, {"type": "text", "text": "a"}]},
            [("delta", "a")],
            0,
        ),
        "parts without text": ({"content": [{"type": "thinking"}]}, [], 0),
        "arguments of a tool": (
            {"tool_calls": [{"function": {"arguments": "{}"}}, {"function": None}, {}]},
            [],
            2,
        ),
    },
)
def test_a_part_says_what_is_in_it(part, pieces, other_chars):
    completion = service.Completion("m", "delta")
    assert completion.add({"choices": [{"delta": part}]}) == pieces
    assert completion.other_chars == other_chars


async def test_a_stall_that_is_overdue_from_the_start_is_one():
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(10), service.StallTimeout(1, time.monotonic() - 60):
            await asyncio.Event().wait()


def test_text_joins_surrogate_pairs_over_chunks_and_replaces_halves():
    encoder = service.AskText()
    parts = [encoder.chunk(b"", {}, [("delta", text)]) for text in ("é\ud83d", "\ude00", "\ud83d")]
    end = encoder.end(service.Completion("asked", "delta"))
    assert (b"".join(parts) + end).decode() == "é😀\ufffd"


@pytest.mark.parametrize("include", [False, True])
def test_the_usage_chunk_goes_to_whom_asked_for_it(include):
    encoder = service.ChatCompletionEvents(include)
    usage = {"usage": {"total_tokens": 9}}
    assert encoder.chunk(EVENT, usage | {"choices": []}, []) == (EVENT if include else b"")
    assert encoder.chunk(EVENT, usage | ENDED, []) == EVENT


@pytest.mark.parametrize("encoder", [service.AskJSON(), service.AskText()])
def test_a_plain_answer_without_a_message_is_none(encoder):
    folded = service.Completion("asked", "message")
    folded.add({"choices": [{"message": None}]})
    with pytest.raises(Failure):
        encoder.end(folded)


@cases(
    "value, seconds",
    {
        **{text: (text, whole) for text, whole in {"7": 7, "0": 0, "-5": 0, "2.2": 3}.items()},
        **{text: (text, 86400) for text in ("86400", "86401", "1e308")},
        **{text: (text, None) for text in ("nan", "inf", "-inf", "soon", "1" * 400)},
        "nothing": ("", None),
        "long ago": (LONG_AGO, 0),
        "no day": ("Fri, 31 Feb 2026 00:00:00 GMT", None),
        "a year to come": (formatdate(time.time() + 3e7, usegmt=True), 86400),
    },
)
def test_retry_after_is_read_as_whole_seconds_a_day_at_most(value, seconds):
    assert service.parse_retry_after(value) == seconds


def turned_down(status: int, message: str = "", retry_after: str = "", **more: str) -> Any:
    body = json.dumps({"error": {"message": message, **more}}).encode()
    return service.Refusal(status, {"retry-after": retry_after} if retry_after else {}, body)


@cases(
    "refused_as, texts, name",
    {
        "by its message": (turned_down(400, USE_NEW), [], OLD),
        "by its code": (turned_down(400, "Nein.", code="unknown_parameter", param=HEAT), [], HEAT),
        "by its code, another": (
            turned_down(400, USE_NEW, code="unknown_parameter", param="n"),
            [],
            None,
        ),
        "with another status": (turned_down(422, USE_NEW), [], None),
        "a mere mention": (turned_down(400, f"{OLD} is too large: 6000."), [], None),
        "no message": (turned_down(400), [], None),
        "quoted": (turned_down(400, USE_NEW), [f"Why? {USE_NEW}"], None),
        "quoted, otherwise written": (
            turned_down(400, "UNSUPPORTED PARAMETER: temperature"),
            ["(unsupported\n`parameter`) temperature?"],
            None,
        ),
        "quoted, and said": (
            turned_down(400, f"You wrote: unknown field {OLD}. Unsupported value: '{HEAT}'."),
            [f"unknown field {OLD}"],
            HEAT,
        ),
        "a half of it in the ask": (turned_down(400, USE_NEW), ["unsupported", "parameter"], OLD),
    },
)
def test_a_parameter_is_unsupported_by_a_code_or_by_words_that_are_not_the_caller_s(
    refused_as, texts, name
):
    assert service.unsupported_parameter(refused_as, texts) == name


def test_a_message_without_end_is_searched_in_linear_time():
    begun = time.process_time()
    for text in ("unsupported parameter ", "max_tokens ", " not support ", "unknown  "):
        service.unsupported_parameter(turned_down(400, text * 100_000), [text * 10_000])
    assert time.process_time() - begun < 3


@cases(
    "cause, tries, low, high",
    {
        "400": (turned_down(400), 0, None, None),
        "503": (turned_down(503), 0, 0.18, 0.25),
        "503, later": (turned_down(503), 3, 1.5, 2),
        "503, much later": (turned_down(503), 100, 6, 8),
        "503, short": (turned_down(503, retry_after="1.5"), 0, 2, 2),
        "503, long": (turned_down(503, retry_after="3"), 0, None, None),
        "429, at once": (turned_down(429, retry_after="0"), 5, 0, 0),
        **{
            str(status): (turned_down(status), 0, 0.18, 0.25)
            for status in (408, 409, 429, 500, 529)
        },
        **{str(status): (turned_down(status), 0, None, None) for status in (302, 401, 404, 422)},
        "no connection": (OSError(), 0, 0.18, 0.25),
    },
)
def test_the_wait_before_another_try_is_what_the_upstream_asks_or_grows(cause, tries, low, high):
    failure = Failure("upstream_error")
    failure.__cause__ = cause
    wait = service.backoff(failure, tries)
    assert wait is None if low is None else low <= wait <= high


async def test_a_stall_is_one_wait_that_takes_too_long():
    stall = service.StallTimeout(0.1)

    async def wait() -> None:
        async with asyncio.timeout(10), stall:
            stall.waiting_since = stall.clock()
            await asyncio.Event().wait()

    begun = stall.clock()
    with pytest.raises(TimeoutError):
        await wait()
    assert stall.expired
    assert stall.clock() - begun >= 0.1


async def test_short_waits_are_no_stall_however_many_and_no_wait_is_none():
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(10), service.StallTimeout(0.4) as stall:
        for _ in range(6):
            stall.waiting_since = stall.clock()
            await asyncio.sleep(0.1)
        stall.waiting_since = None
        long_after = asyncio.Event()
        loop.call_later(1, long_after.set)
        await long_after.wait()
    assert not stall.expired


SECRET = "a secret that has more than 32 bytes"
OTHER_SECRET = "one that has 32 bytes at the least"
ADMIN = "admin-of-the-battery"
ANA = hashlib.sha256(b"ana").hexdigest()
CHAT = "/v1/chat/completions"
DAY = 86400


def base64url(data: str | bytes) -> str:
    data = data.encode() if isinstance(data, str) else data
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def signed(claims: str, header: str = '{"alg":"HS256"}', secret: str = SECRET) -> str:
    """A JSON Web Token of these texts, whatever they are."""
    parts = f"{base64url(header)}.{base64url(claims)}"
    return f"{parts}.{base64url(hmac.digest(secret.encode(), parts.encode(), 'sha256'))}"


def user_token(**claims: object) -> str:
    return signed(json.dumps({"sub": "ana", "exp": int(time.time()) + 600, **claims}))


def bearer(token: str, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}", **more}


def chat(*messages: object, **fields: object) -> dict[str, object]:
    """A body for CHAT."""
    return {"messages": [*messages, TURN], **fields}


def openai_error(response: Any, status: int, code: str) -> dict[str, Any]:
    """The error under `/v1`, in the shape of OpenAI's own."""
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (response.status_code, error["code"]) == (status, code)
    return error


def until_midnight() -> float:
    return DAY - time.time() % DAY


# Each combination of tokens, what opens an ask, and what opens the log.
ANYBODY = "nothing wrong api jwt admin"
WHO_OPENS_WHAT = {
    "none": ("", ANYBODY, ANYBODY),
    "API_TOKEN": ("api", "api", "api"),
    "JWT_SECRET": ("jwt", "jwt", ""),
    "ADMIN_TOKEN": ("admin", ANYBODY, "admin"),
    "API_TOKEN and JWT_SECRET": ("api jwt", "api jwt", "api"),
    "API_TOKEN and ADMIN_TOKEN": ("api admin", "api", "admin"),
    "JWT_SECRET and ADMIN_TOKEN": ("jwt admin", "jwt", "admin"),
    "all three": ("api jwt admin", "api jwt", "admin"),
}


@cases("wanted, asks, operators", WHO_OPENS_WHAT)
async def test_pages_may_ask_and_only_the_operator_reads_the_log(start, wanted, asks, operators):
    secrets = {"api": ("api_token", TOKEN), "jwt": ("jwt_secret", SECRET)}
    secrets |= {"admin": ("admin_token", ADMIN)}
    client = await start(**dict(secrets[name] for name in wanted.split()))
    given = {"api": bearer(TOKEN), "jwt": bearer(user_token()), "admin": bearer(ADMIN)}
    given |= {"nothing": {}, "wrong": bearer("wrong")}
    for name, headers in given.items():
        asked = [
            await client.post("/ask", json=PLAIN, headers=headers),
            await client.post(CHAT, json=chat(), headers=headers),
            await client.get("/v1/models", headers=headers),
        ]
        read = [await client.get(path, headers=headers) for path in ("/logs", "/metrics")]
        for responses, opened_by in (asked, asks), (read, operators):
            for response in responses:
                assert response.status_code == (200 if name in opened_by.split() else 401)
        for response in (each for each in (*asked, *read) if each.status_code == 401):
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/status", "/", "/docs", "/redoc", "/openapi.json"):
            assert (await client.get(path, headers=headers)).status_code == 200
    document = await load(client, "/openapi.json")
    secured = {path for path, item in document["paths"].items() if "security" in str(item)}
    ask_paths = set() if asks == ANYBODY else {"/ask", CHAT, "/v1/models"}
    assert secured == ask_paths | (set() if operators == ANYBODY else {"/logs", "/metrics"})
    assert ("securitySchemes" in document["components"]) == bool(secured)


NOW = 1_800_000_000.5
VALID = f'{{"sub":"ana","exp":{NOW + 60}}}'
# From jwt.io, made by others: only its `exp` is missing.
WELL_KNOWN = (
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6IkpvaG4gRG9lIiwi"
    "aWF0IjoxNTE2MjM5MDIyfQ.SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c"
)


def claims(**changed: object) -> str:
    """VALID, with these claims as JSON texts; None leaves a claim out."""
    given = {"sub": '"ana"', "exp": NOW + 60, "aud": '"app"', **changed}
    return ",".join(f'"{name}":{text}' for name, text in given.items() if text).join("{}")


@cases(
    "token, user",
    {
        "plain": (signed(claims()), "ana"),
        "typ, kid": (signed(claims(), '{"typ":"JWT","kid":"1","alg":"HS256"}'), "ana"),
        "white space": (signed(f" {claims()}\r\n", '{ "alg" : "HS256" }'), "ana"),
        "other claims": (signed(claims(iss='"login"', iat=NOW + 900, jti='"x"')), "ana"),
        "exp is a float": (signed(claims(exp=NOW + 0.5)), "ana"),
        "exp is far ahead": (signed(claims(exp="9" * 400)), "ana"),
        "exp within the leeway": (signed(claims(exp=NOW - 29)), "ana"),
        "nbf": (signed(claims(nbf=NOW - 1)), "ana"),
        "nbf within the leeway": (signed(claims(nbf=NOW + 30)), "ana"),
        "aud in a list": (signed(claims(aud='["other","app",1]')), "ana"),
        "sub of 256 characters": (signed(claims(sub=f'"{"é" * 256}"')), "é" * 256),
        "sub of one character": (signed(claims(sub=r'"\ud83d\ude00"')), "😀"),
    },
)
def test_a_valid_token_tells_its_user(token, user):
    assert service.verify_jwt(token, SECRET, "app", NOW) == user


def test_where_no_audience_is_set_none_is_looked_at():
    for aud in ('"other"', "[]", "7", None):
        assert service.verify_jwt(signed(claims(aud=aud)), SECRET, "", NOW) == "ana"


def same_bytes(token: str) -> Iterator[str]:
    """*token* with each other last character whose spare bits change nothing in what it means."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for spare in (1, 2, 3):
        other = token[:-1] + letters[letters.index(token[-1]) + spare]
        decoded = [base64.urlsafe_b64decode(each.split(".")[2] + "=") for each in (token, other)]
        assert decoded[0] == decoded[1]
        yield other


GOOD = signed(claims())
HEAD, PAYLOAD, SIGNATURE = GOOD.split(".")
LOOSE = f"{HEAD}.{PAYLOAD}"
SPACED = base64url('{"alg": "HS256"}')
HEADERS = """{} [] "HS256" null {"alg":"none"} {"alg":"RS256"} {"alg":"HS384"} {"alg":"hs256"}
    {"alg":null} {"alg":["HS256"]} {"alg":256} {"ALG":"HS256"} {"alg":"HS256","crit":["exp"]}
    {"alg":"HS256","crit":[]} {"alg":"HS256","crit":null}"""
ODD_CLAIMS = {
    "exp": f'true null "{NOW + 60:.0f}" [9999999999] {{}} 1e999 -1e999 {NOW - 30} 0 -1',
    "nbf": f'true null "0" [0] {{}} {NOW + 30.5} 1e999 {"9" * 400}',
    "aud": 'null [] "" "application" "ap" ["other"] [["app"]] {"app":"app"} 7',
    "sub": f'"" 5 true null ["ana"] "{"x" * 257}"',
}
NO_JSON = ["ana", GOOD, claims()[:-1], f"{claims()}x", claims(exp="NaN"), claims(x="-Infinity")]
NO_JSON += [claims(sub=half) for half in (r'"\ud83d"', r'"ana\ude00"')]
NO_JSON += [claims(x=deep) for deep in ("[" * 2900 + "]" * 2900, '{"a":' * 1000)]
NO_TOKENS = [
    "",
    ".",
    "..",
    "ana",
    LOOSE,
    f"{LOOSE}.",
    f"{HEAD}..{SIGNATURE}",
    f".{PAYLOAD}.{SIGNATURE}",
]
NO_TOKENS += [
    f"{GOOD}.",
    f".{GOOD}",
    f"{GOOD}.{GOOD}",
    f"{GOOD}=",
    f"{HEAD}=.{PAYLOAD}.{SIGNATURE}",
]
NO_TOKENS += [f"{HEAD}.{each}{PAYLOAD}.{SIGNATURE}" for each in "+/ \né%="] + [
    f"{GOOD}\n",
    f" {GOOD}",
]
REFUSED_TOKENS: dict[str, list[str]] = {
    "header": [signed(claims(), each) for each in HEADERS.split()],
    "signature": [
        *same_bytes(GOOD),
        *(GOOD[:-1], GOOD[:-20], f"{LOOSE}.A", f"{LOOSE}.{SIGNATURE}A"),
        signed(claims(), secret=OTHER_SECRET),
        f"{HEAD}.{base64url(claims(sub=5))}.{SIGNATURE}",
        f"{SPACED}.{PAYLOAD}.{SIGNATURE}",
    ],
    "expired": [signed(claims(exp=each)) for each in [None, *ODD_CLAIMS["exp"].split()]],
    "nbf": [signed(claims(nbf=each)) for each in ODD_CLAIMS["nbf"].split()],
    "aud": [signed(claims(aud=each)) for each in [None, *ODD_CLAIMS["aud"].split()]],
    "sub": [signed(claims(sub=each)) for each in [None, *ODD_CLAIMS["sub"].split()]],
    "object": [signed(each) for each in ("[]", f"[{claims()}]", "null", "7", '"ana"')],
    "column": [
        *map(signed, NO_JSON),
        *(signed(claims(), each) for each in ("HS256", "{'alg':'HS256'}")),
        f"{HEAD}.{base64url(claims().encode('utf-16'))}.{SIGNATURE}",
    ],
    "base64": [f"{HEAD}.A.{SIGNATURE}", f"A.{PAYLOAD}.{SIGNATURE}"],
    "three parts": [*NO_TOKENS, signed(claims(x=f'"{"x" * 49_000}"'))],
}


@cases("why, tokens", {why: (why, tokens) for why, tokens in REFUSED_TOKENS.items()})
def test_every_other_token_is_refused_with_a_reason_that_does_not_quote_it(why, tokens):
    for token in tokens:
        with pytest.raises(ValueError, match=why) as caught:
            pytest.fail(f"{token} was taken: {service.verify_jwt(token, SECRET, 'app', NOW)}")
        assert not any(part in str(caught.value) for part in token.split(".") if len(part) > 3)


def test_a_token_of_others_is_read_as_they_meant_it():
    with pytest.raises(ValueError, match="exp"):
        service.verify_jwt(WELL_KNOWN, "your-256-bit-secret", "", NOW)


async def test_one_401_tells_nothing_and_the_log_tells_why_without_the_token(start, upstream):
    client = await start(jwt_secret=SECRET, jwt_audience="app", admin_token=ADMIN)
    tokens = {
        "three parts": "ana",
        "header": signed("{}", '{"alg":"none"}'),
        "signature": signed(claims(), secret=OTHER_SECRET),
        "exp": user_token(aud="app", exp=int(time.time()) - 60),
        "nbf": user_token(aud="app", nbf=int(time.time()) + 600),
        "aud": user_token(aud="other"),
        "sub": user_token(aud="app", sub=5),
        "object": signed("[]"),
        "JSON|line|pad": f"{base64url('no JSON')}.{PAYLOAD}.{SIGNATURE}",
        "8,192": signed(f'"{"x" * 49_000}"'),
    }
    given = [bearer(token) for token in tokens.values()]
    given += [{}, {"Authorization": "Bearer"}, {"Authorization": f"Basic {user_token(aud='app')}"}]
    for path in ("/ask", CHAT):
        answers = []
        for headers in given:
            response = await client.post(path, json=ASK, headers={**headers, "X-Request-ID": "a"})
            kept = {name: text for name, text in response.headers.items() if name != "date"}
            answers.append((response.status_code, kept, response.content))
        assert (answers[0][0], answers[0][1]["www-authenticate"]) == (401, "Bearer")
        assert answers == [answers[0]] * len(given)
    assert openai_error(response, 401, "unauthorized")["type"] == "authentication_error"
    client.headers |= bearer(ADMIN)
    logged = await load(client)
    found = [event for event in logged if event["message"] == "token refused"]
    assert {event["level"] for event in found} == {"INFO"}
    for why, event in zip([*tokens] * 2, found, strict=True):
        assert re.search(why, event["metadata"]["reason"])
    parts = [part for token in tokens.values() for part in token.split(".") if len(part) > 8]
    assert not any(part in json.dumps(logged) for part in parts)
    assert not upstream.calls
    assert (await load(client, "/status"))["asks"]["total"] == 0


HOSTS = {"api.openai.com": True, "eu.API.OpenAI.com": True, "openai.com": True}
HOSTS |= {"x.openai.azure.com": False, "openai.com.example": False, "evil-openai.com": False}


@cases("host, told", {host: (host, told) for host, told in HOSTS.items()})
async def test_the_user_is_in_the_log_and_hashed_only_for_openai(start, proxy, host, told):
    url = f"http://{host}/v1"
    client = await start(openai_base_url=url, jwt_secret=SECRET, api_token=TOKEN, admin_token=ADMIN)
    own: dict[str, Any] = {"safety_identifier": "of my own"}
    for headers in (bearer(user_token()), bearer(TOKEN)):
        for path, body in ("/ask", ASK), (CHAT, chat()), (CHAT, chat(stream=True, **own)):
            assert (await client.post(path, json=body, headers=headers)).status_code == 200
    sent = [call.body.get("safety_identifier") for call in proxy.calls]
    mine = "of my own"
    assert sent == ([ANA] * 3 if told else [None, None, mine]) + [None, None, mine]
    assert "ana" not in [text for call in proxy.calls for text in str(call.body).split("'")]
    client.headers |= bearer(ADMIN)
    users = [event["metadata"].get("user") for event in await closings(client, 6)]
    assert users == ["ana"] * 3 + [None] * 3


@pytest.mark.parametrize("now", [0.0, 123.4, 1e6])
@pytest.mark.parametrize("per_minute", [1, 7, 60, 600])
def test_a_minute_s_asks_may_come_at_once_and_come_back_evenly(per_minute, now):
    limiter = service.RateLimiter(per_minute)
    interval = 60 / per_minute
    for _ in range(per_minute):
        assert limiter.wait("ana", now) == 0
        limiter.take("ana", now)
    wait = limiter.wait("ana", now)
    assert 0 <= wait - interval < 1, "the seconds to the next, rounded up"
    assert limiter.wait("bob", now) == 0
    assert limiter.wait("ana", now + interval - 0.001) == 1
    for _ in range(3):  # one for each interval that has passed, and no more
        now += interval
        assert limiter.wait("ana", now) == 0
        limiter.take("ana", now)
        assert limiter.wait("ana", now) == wait
    now += 2.5 * interval
    for _ in range(min(2, per_minute)):
        assert limiter.wait("ana", now) == 0
        limiter.take("ana", now)
    assert limiter.wait("ana", now) > 0
    now += 3600  # which saves up no more than a minute's worth
    for _ in range(per_minute):
        assert limiter.wait("ana", now) == 0
        limiter.take("ana", now)
    assert limiter.wait("ana", now) > 0


def test_to_ask_in_vain_costs_nothing():
    limiter = service.RateLimiter(2)
    for _ in range(2):
        limiter.take("ana", 0)
    waits = {0: 30, 1: 29, 1.5: 29, 29: 1, 29.9: 1, 30: 0}
    for second, wait in waits.items():
        assert [limiter.wait("ana", second) for _ in range(3)] == [wait] * 3


def test_no_limit_keeps_nothing_and_a_limit_keeps_the_10_000_latest_callers():
    limiters = [service.RateLimiter(per_minute) for per_minute in (0, 1)]
    for limiter, number in itertools.product(limiters, [*range(10_000), 0, 10_000]):
        limiter.take(f"caller {number}", 0)
    free, limited = limiters
    assert (free.wait("caller 0", 0), len(free.whole_at)) == (0, 0)
    assert len(limited.whole_at) == 10_000
    waits = [limited.wait(f"caller {number}", 0) for number in (0, 1, 2, 9_999, 10_000)]
    assert waits == [120, 0, 60, 60, 60], "whose last ask is the longest ago is forgotten"


async def test_one_ask_too_many_is_told_when_to_come_back(start, upstream):
    client = await start(rate_limit=2, heartbeat_seconds=0.1)
    assert [(await client.post("/ask", json=each)).status_code for each in (ASK, PLAIN)] == [
        200
    ] * 2
    for body in (ASK, PLAIN):
        response = await client.post("/ask", json=body, headers={"Origin": PAGE})
        problem(response, "too_many_asks")
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 30
    for body in (chat(), chat(stream=True)):
        response = await client.post(CHAT, json=body)
        assert openai_error(response, 429, "too_many_asks")["type"] == "rate_limit_error"
        assert 1 <= int(response.headers["retry-after"]) <= 30
    for path in ("/status", "/logs", "/v1/models"):
        assert (await client.get(path)).status_code == 200
    assert len(upstream.calls) == 3, "two asks and the probe of /status"
    assert len(await closings(client, 2)) == 2
    assert (await load(client, "/status"))["asks"]["total"] == 2


async def test_what_is_refused_early_costs_none_of_the_later_checks(start, upstream):
    scripts = (replies(400), stream(HOLA, Call.hang), answer)
    client = await start(
        *scripts, api_token=TOKEN, rate_limit=3, daily_tokens=7, max_concurrent_asks=1
    )
    client.headers |= bearer(TOKEN)
    worse: list[tuple[int, str, Any, dict[str, str]]] = [
        (400, "/ask", ASK, {"Host": "evil.example"}),
        (403, "/ask", ASK, {"Origin": "http://evil.example"}),
        (401, "/ask", ASK, {"Authorization": "Bearer x"}),
        (415, "/ask", ASK, {"Content-Type": "text/plain"}),
        (413, "/ask", {"prompt": "x" * 2**20}, {}),
        (400, "/ask", [], {}),
        (422, "/ask", {}, {}),
        (422, CHAT, {}, {}),
        (404, CHAT, chat(model="other"), {}),
        (404, "/nothing", ASK, {}),
    ]
    for status, path, body, headers in worse:
        response = await client.post(path, json=body, headers=headers)
        assert response.status_code == status
    assert not upstream.calls
    # What the model refuses has cost one of three, and no token.
    problem(await client.post("/ask", json=ASK), "upstream_rejected")
    async with client.stream("POST", "/ask", json=ASK) as response:
        assert response.status_code == 200
        for _ in range(3):
            problem(await client.post("/ask", json=ASK), "overloaded")
    await closings(client, 2)
    assert (await client.post("/ask", json=ASK)).status_code == 200
    problem(await client.post("/ask", json=ASK), "too_many_asks")


ADDRESSES = {
    "another": ("192.0.2.1", "192.0.2.2", False),
    "the same": ("192.0.2.1", "192.0.2.1", True),
    "with a port": ("192.0.2.1:1111", "192.0.2.1:2222", True),
    "mapped": ("192.0.2.1", "::ffff:192.0.2.1", True),
    "mapped, another": ("::FFFF:192.0.2.1", "::ffff:c000:202", False),
    "one /64": ("2001:db8:1:2:3:4:5:6", "2001:DB8:1:2::", True),
    "another /64": ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
    "with a zone": ("fe80::1%eth0", "fe80::2", True),
    "a caller's own words": ("192.0.2.9, 192.0.2.1", "2001:db8::9, 192.0.2.1", True),
    "none but the proxy": ("", "", True),
    "no address": ("unknown", "_hidden", False),
    "no address, without end": ("x" * 9999, "x" * 9998, True),
}


@cases("first, second, same", ADDRESSES)
async def test_a_caller_without_a_user_is_an_address(start, first, second, same):
    client = await start(rate_limit=1)
    asked = []
    for forwarded in (first, second):
        headers = {"X-Forwarded-For": forwarded} if forwarded else {}
        asked.append((await client.post("/ask", json=PLAIN, headers=headers)).status_code)
    assert asked == [200, 429 if same else 200]


async def test_a_user_is_one_caller_at_any_address_and_a_shared_token_is_none(start):
    client = await start(rate_limit=1, jwt_secret=SECRET, api_token=TOKEN)
    steps = [
        (user_token(), "192.0.2.1", 200),
        (user_token(iat=1), "192.0.2.2", 429),
        (user_token(sub="bob"), "192.0.2.1", 200),
        (user_token(sub="address 192.0.2.1"), "192.0.2.3", 200),
        (TOKEN, "192.0.2.1", 200),
        (TOKEN, "192.0.2.1", 429),
        (TOKEN, "192.0.2.2", 200),
    ]
    for token, address, status in steps:
        headers = bearer(token, **{"X-Forwarded-For": address})
        assert (await client.post("/ask", json=PLAIN, headers=headers)).status_code == status


@pytest.mark.parametrize("command", [(SERVICE,), UVICORN], ids=["python", "uvicorn"])
async def test_both_ways_to_start_it_believe_the_same_proxies(tmp_path, command):
    async def asked(**env: str) -> list[int]:
        env |= {"OPENAI_API_KEY": "demo", "RATE_LIMIT": "1", "API_PORT": "0"}
        async with launched(*command, cwd=tmp_path, **env) as running:
            forwarded = ("192.0.2.1", "192.0.2.2", "192.0.2.1")
            headers = [{"X-Forwarded-For": each} for each in forwarded]
            post = running.client.post
            return [(await post("/ask", json=PLAIN, headers=each)).status_code for each in headers]

    both = await asyncio.gather(asked(), asked(FORWARDED_ALLOW_IPS="192.0.2.9"))
    assert [*both] == [[200, 200, 429], [200, 429, 429]]


@cases(
    "limit, steps",
    {
        # A step is a time, the tokens then spent, and what an ask afterwards has to wait.
        "no limit": (0, [(0, 10**12, 0), (DAY - 1, 1, 0)]),
        "below": (10, [(5, 4, 0), (6, 5, 0)]),
        "at": (10, [(5, 4, 0), (6, 6, DAY - 6)]),
        "above": (10, [(100.5, 10**12, DAY - 100)]),
        "rounded up": (1, [(DAY - 0.5, 1, 1), (DAY - 0.001, 0, 1)]),
        "midnight": (10, [(DAY - 1, 10, 1), (DAY, 0, 0), (DAY, 9, 0), (DAY + 1, 1, DAY - 1)]),
        "midnight, without an ask": (10, [(DAY - 1, 9, 0), (DAY, 9, 0), (DAY, 1, DAY)]),
        "days later": (
            10,
            [(DAY + 1, 10, DAY - 1), (9 * DAY + 2, 3, 0), (9 * DAY + 2, 7, DAY - 2)],
        ),
        "16:00 UTC": (10, [(1_764_000_000, 10, 8 * 3600)]),
    },
)
def test_a_budget_is_a_day_s_by_utc(limit, steps):
    budget = service.DailyBudget(limit)
    for now, tokens, wait in steps:
        budget.spend(tokens, now)
        assert budget.wait(now) == wait
    assert budget.wait((now // DAY + 1) * DAY) == 0


@cases(
    "script, ask, used",
    {
        "told": (answer, ASK, 7),
        "told, plain": (replies(200, completion("Hola", 9)), PLAIN, 9),
        "told before a cut": (stream(HOLA, FINISH, Call.close), ASK, 7),
        "none told": (stream(HOLA, DONE, Call.end), ASK, 2),
        "none told, plain": (
            replies(200, {"choices": [{"message": {"content": "Hola!"}}]}),
            {**PLAIN, "history": [TURN]},
            4,
        ),
        "no figure": (
            replies(200, completion("Hola") | {"usage": {"total_tokens": True}}),
            PLAIN,
            2,
        ),
        "reasoning": (
            stream(
                b'data: {"choices":[{"delta":{"reasoning_content":"Hmmmmmm."}}]}\n\n',
                HOLA + DONE,
                Call.end,
            ),
            ASK,
            4,
        ),
        "cut": (stream(HOLA, Call.close), ASK, 2),
        "closed unanswered": (Call.close, ASK, 1),
        "silent": (Call.hang, ASK, 1),
        "no JSON": (replies(200, b"<html>"), PLAIN, 1),
        "refused": (replies(400), ASK, 0),
        "refused, key": (replies(401), PLAIN, 0),
        "refused, busy": (replies(429), ASK, 0),
        "failed": (replies(500), PLAIN, 0),
    },
)
@pytest.mark.parametrize("path", ["/ask", CHAT])
async def test_an_ask_spends_what_the_model_told_or_an_estimate(start, path, script, ask, used):
    own = {"openai_timeout": 0.2 if script is Call.hang else 60, "openai_max_retries": 0}
    client = await start(script, daily_tokens=1, **own)
    body: dict[str, Any] = ask
    if path == CHAT:
        turns = [*ask.get("history", []), TURN]
        body = {"messages": turns, "stream": ask.get("stream", True)}
    await client.post(path, json=body)
    await closings(client)
    spent = [event["metadata"].get("used") for event in await load(client, "/logs?level=WARNING")]
    assert spent == [used] * bool(used)
    following = await client.post("/ask", json=PLAIN)
    assert ("budget_exhausted" in following.text) == bool(used)


async def test_an_ask_that_was_left_spends_an_estimate(start, upstream):
    client = await start(stream(HOLA, Call.hang), daily_tokens=2, system_prompt="Be brief.")
    async with asking(client) as wire:
        await wire.write()
    await closings(client)
    warning, closing = await load(client, "/logs?level=WARNING")
    assert closing["message"] == "ask cancelled"
    assert warning["metadata"]["used"] == 5, "a token for four of 17 characters"


async def test_what_never_reached_the_model_spends_nothing(start):
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}/v1"
        client = await start(openai_base_url=url, daily_tokens=1, openai_max_retries=0)
        for _ in range(2):
            problem(await client.post("/ask", json=ASK), "upstream_unreachable")


async def test_an_exhausted_budget_is_warned_about_once_and_lasts_until_midnight(start, upstream):
    client = await start(stream(HOLA, Call.hang), answer, daily_tokens=7, rate_limit=3)
    async with asking(client) as wire:
        await wire.write()
        assert (await client.post("/ask", json=ASK)).status_code == 200
        response = await client.post("/ask", json=ASK)
        problem(response, "budget_exhausted")
        left = until_midnight()
        assert left <= int(response.headers["retry-after"]) <= left + 20
        refusal = await client.post(CHAT, json=chat())
        assert openai_error(refusal, 429, "budget_exhausted")["type"] == "rate_limit_error"
        problem(await client.post("/ask", json={}), "invalid_request")
    assert len(await closings(client, 2)) == 2
    logged = await load(client, "/logs?level=WARNING")
    assert [event["message"] for event in logged] == ["budget exhausted", "ask cancelled"]
    assert logged[0]["metadata"] == {"daily_tokens": 7, "used": 7, "request_id": ANY}
    assert (await load(client, "/status"))["asks"]["total"] == 2
    # Neither of these two refusals has cost one of the three asks a minute.
    others = [await client.post("/ask", json=ASK) for _ in range(3)]
    assert {each.json()["code"] for each in others} == {"budget_exhausted"}


def test_rate_budget_and_place_are_looked_at_in_this_order_and_taken_together():
    admission = service.Admission(Settings(rate_limit=1, daily_tokens=1, max_concurrent_asks=1))
    caller = service.Caller("ana")

    def code() -> str:
        with pytest.raises(service.Failure) as caught:
            admission.admit(caller)
        return caught.value.code

    admission.budget.spend(1, time.time())
    admission.asks["active"] = 1
    assert [code(), code()] == ["budget_exhausted"] * 2
    admission.budget.used = 0
    assert [code(), code()] == ["overloaded"] * 2
    admission.asks["active"] = 0
    admission.admit(caller)
    assert (admission.asks["active"], admission.asks["total"]) == (1, 1)
    admission.budget.spend(1, time.time())
    assert [code(), code()] == ["too_many_asks"] * 2
    assert (admission.asks["active"], admission.asks["total"]) == (1, 1)


PATHS = pytest.mark.parametrize("path", ["/ask", CHAT])


def body_for(path: str, **fields: object) -> dict[str, object]:
    """An ask for *path* with further *fields*."""
    return {**PLAIN, **fields} if path == "/ask" else chat(**fields)


def wrong_field(response: Any, path: str) -> str:
    """The one field that is wrong."""
    if path == "/ask":
        (error,) = problem(response, "invalid_request")["errors"]
        return str(error["field"])
    return str(openai_error(response, 422, "invalid_request")["param"])


BRIEF = {"role": "system", "content": "Be brief."}


async def test_the_operators_prompt_goes_first(start, upstream):
    client = await start(system_prompt="Be brief.")
    turns = [TURN, {"role": "assistant", "content": "Sí."}]
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    calls += [{"role": "tool", "content": "5", "tool_call_id": "1"}]
    await client.post("/ask", json=PLAIN)
    await client.post("/ask", json={**ASK, "history": turns})
    await client.post(CHAT, json=chat(*turns, *calls, {"role": "user", "content": [], "name": "a"}))
    named = {"role": "user", "content": [], "name": "a"}
    assert [call.body["messages"] for call in upstream.calls] == [
        [BRIEF, TURN],
        [BRIEF, *turns, TURN],
        [BRIEF, *turns, *calls, named, TURN],
    ]


async def test_where_the_operator_has_a_prompt_callers_send_none_of_its_kind(start, upstream):
    client = await start(system_prompt="Be brief.")
    roles: list[Any] = ["system", "developer", "System", "system ", "", "sys", None, 5, ["user"]]
    turns = [{"role": role, "content": "Ha!"} for role in roles] + [{"content": "Ha!"}]
    for turn in turns:
        response = await client.post("/ask", json={**ASK, "history": [TURN, turn]})
        assert wrong_field(response, "/ask") == "history.1.role"
        for streamed in (True, False):
            response = await client.post(CHAT, json=chat(TURN, turn, stream=streamed))
            assert wrong_field(response, CHAT) == "messages.1.role"
    assert not upstream.calls
    free = await start()
    for turn in ({"role": "system", "content": "Ha!"}, {"role": "developer", "content": "Ha!"}):
        assert (await free.post(CHAT, json=chat(turn))).status_code == 200
        assert upstream.calls[-1].body["messages"] == [turn, TURN]


@cases(
    "path, fields, sent",
    {
        "none": ("/ask", {}, 100),
        "less": ("/ask", {OLD: 5}, 5),
        "5.0": ("/ask", {OLD: 5.0}, 5),
        "the bound": ("/ask", {OLD: 100}, 100),
        "/v1, none": (CHAT, {}, 100),
        "/v1, null": (CHAT, {OLD: None}, 100),
        "/v1, twice null": (CHAT, {OLD: None, NEW: None, "n": None}, 100),
        "/v1, null and less": (CHAT, {OLD: None, NEW: 5}, 5),
        "/v1, less": (CHAT, {OLD: 5, "n": 1}, 5),
        "/v1, new name": (CHAT, {NEW: 5.0, "n": 1.0}, 5),
        "/v1, both names": (CHAT, {OLD: 7, NEW: 5}, 5),
        "/v1, a stream": (CHAT, {"stream": True}, 100),
    },
)
@pytest.mark.parametrize("name", [OLD, NEW])
async def test_no_more_output_is_asked_for_than_the_operator_allows(
    start, proxy, name, path, fields, sent
):
    url = "http://api.openai.com/v1" if name == NEW else proxy.url
    client = await start(openai_base_url=url, max_output_tokens=100)
    assert (await client.post(path, json=body_for(path, **fields))).status_code == 200
    (call,) = proxy.calls
    assert {each: call.body[each] for each in (OLD, NEW) if each in call.body} == {name: sent}
    assert type(call.body[name]) is int


TOO_MUCH: dict[str, list[Any]] = {"more": [101, 101.0, 1e9, 10**30], "text": ["5", "", "x"]}
TOO_MUCH |= {"none": [0, -1, -0.0], "odd": [2.5, 100.5, True, [5], {}]}


@cases("values", TOO_MUCH)
async def test_the_bound_on_output_cannot_be_got_round(start, upstream, values):
    client = await start(max_output_tokens=100)
    for value in values:
        for path, name in ("/ask", OLD), (CHAT, OLD), (CHAT, NEW), (CHAT, "n"):
            fields = {name: value} if name == "n" else {OLD: 5, NEW: 5, name: value}
            fields = {OLD: value} if path == "/ask" else fields
            assert wrong_field(await client.post(path, json=body_for(path, **fields)), path) == name
    for path, name in ("/ask", OLD), (CHAT, OLD), (CHAT, NEW):
        body = json.dumps(body_for(path, **{name: 5})).replace(": 5", ": 1e999")
        response = await client.post(path, content=body, headers=JSON)
        assert wrong_field(response, path) == name
    response = await client.post(CHAT, json=chat(n=2))
    assert wrong_field(response, CHAT) == "n"
    assert wrong_field(await client.post("/ask", json={**ASK, OLD: None}), "/ask") == OLD
    assert not upstream.calls


async def test_without_a_bound_none_is_sent_but_the_callers_own(start, upstream):
    client = await start()
    for path in ("/ask", CHAT):
        await client.post(path, json=body_for(path))
        await client.post(path, json=body_for(path, **{OLD: 10**9}))
    await client.post(CHAT, json=chat(n=2, **{OLD: None, NEW: 10**9}))
    sent = [{name: call.body.get(name) for name in (OLD, NEW)} for call in upstream.calls]
    assert [each[OLD] for each in sent] == [None, 10**9] * 2 + [10**9]
    assert not any(each[NEW] for each in sent)
    assert upstream.calls[-1].body["n"] == 2


@PATHS
@pytest.mark.parametrize("name", [OLD, NEW])
async def test_the_operators_body_goes_over_everything(start, upstream, name, path):
    extra = {name: 50, HEAT: 1, "metadata": {"a": 1}, "n": 1, "safety_identifier": "page"}
    client = await start(openai_extra_body=extra, max_output_tokens=100)
    own: dict[str, Any] = {HEAT: 0.5, OLD: 5}
    if path == CHAT:
        own |= {NEW: 5, "metadata": {"b": 2}, "safety_identifier": "mine", "top_p": 1}
    for streamed in (True, False):
        response = await client.post(path, json=body_for(path, **own, stream=streamed))
        assert "ignored" not in response.text
    messages = [{"role": "user", "content": "Hola"}]
    expected = {**extra, "model": "gpt-5.4-mini", "messages": messages}
    if path == CHAT:
        expected["top_p"] = 1
    options = {"stream_options": {"include_usage": True}}
    assert [call.body for call in upstream.calls] == [
        {**expected, "stream": True, **options},
        {**expected, "stream": False},
    ]


async def test_what_the_model_refuses_of_the_operators_body_is_handed_on(start, upstream):
    client = await start(
        *(replies(400, refused(each)) for each in (ONLY_ONE, USE_NEW)),
        answer,
        openai_extra_body={HEAT: 1, OLD: 50},
    )
    for _ in range(2):
        problem(await client.post("/ask", json=PLAIN), "upstream_rejected")
    assert (await client.post("/ask", json=PLAIN)).status_code == 200
    first, *others = [call.body for call in upstream.calls]
    assert others == [first] * 2
    assert (first[HEAT], first[OLD]) == (1, 50)


async def test_what_a_model_refuses_is_remembered_for_that_model_alone(start, upstream):
    async def picky(call: Call) -> None:
        wrong = {HEAT: ONLY_ONE, OLD: USE_NEW}
        found = [text for name, text in wrong.items() if name in call.body]
        picky = call.body["model"] == "picky"
        await (replies(400, refused(found[0])) if picky and found else answer)(call)

    client = await start(picky, openai_models=("picky",), openai_model="easy")
    own = {HEAT: 0.5, OLD: 9}
    calls = []
    for path, model in itertools.product(("/ask", CHAT), ("picky", "easy")):
        before = len(upstream.calls)
        response = await client.post(path, json=body_for(path, model=model, **own))
        assert response.status_code == 200
        assert ("ignored" in response.text) == ((path, model) == ("/ask", "picky"))
        body = upstream.calls[-1].body
        fields = {name: body[name] for name in (HEAT, OLD, NEW) if name in body}
        calls.append((len(upstream.calls) - before, body["model"], fields))
    adapted = {NEW: 9}
    assert calls == [
        (3, "picky", adapted),
        (1, "easy", own),
        (1, "picky", adapted),
        (1, "easy", own),
    ]
    warned = [event["metadata"] for event in await load(client, "/logs?level=WARNING")]
    assert {(each["model"], each["field"]) for each in warned} == {("picky", HEAT), ("picky", OLD)}
    ignored = [event["metadata"].get("ignored") for event in await closings(client, 4)]
    assert ignored == [[HEAT], None, [HEAT], None]


async def test_requests_name_only_the_operators_models(start, upstream):
    client = await start(openai_model="one", openai_models=("two", "ns/three:1b", "one"))
    listed = await load(client, "/v1/models")
    assert [each["id"] for each in listed["data"]] == ["one", "two", "ns/three:1b"]
    for path in ("/ask", CHAT):
        for named in ({}, {"model": "one"}, {"model": "two"}, {"model": "ns/three:1b"}):
            assert (await client.post(path, json=body_for(path, **named))).status_code == 200
            assert upstream.calls.pop().body["model"] == named.get("model", "one")
    values: list[Any] = ["three", "Two", "two ", "", "x" * 9999, "gpt-5.4-mini"]
    for value in [*values, 5, True, ["two"], {}]:
        response = await client.post("/ask", json=body_for("/ask", model=value))
        assert wrong_field(response, "/ask") == "model"
        response = await client.post(CHAT, json=chat(model=value))
        status, code = (404, "model_not_found") if value in values else (422, "invalid_request")
        assert openai_error(response, status, code)["param"] == "model"
    assert not upstream.calls


@PATHS
async def test_the_demo_model_answers_for_every_model(start, path):
    client = await start(openai_api_key="demo", openai_models=("two",))
    response = await client.post(path, json=body_for(path, model="two", max_tokens=1))
    assert response.json()["model"] == "demo"


async def test_the_checks_come_one_after_another_in_the_order_of_the_contract(start, upstream):
    limits = {"api_token": TOKEN, "rate_limit": 1, "daily_tokens": 1}
    keyless, keyed = [await start(openai_api_key=key, **limits) for key in ("", KEY)]
    body = b"x" * 1_048_577
    headers = {"Host": "evil.example", "Origin": "http://evil.example", "Authorization": ""}
    headers["X-Forwarded-For"] = "192.0.2.1"
    right = json.dumps(ASK).encode()
    steps: list[tuple[Client, str, dict[str, str], bytes]] = [
        (keyless, "host_not_allowed", {"Host": "localhost"}, body),
        (keyless, "origin_not_allowed", {"Origin": PAGE}, body),
        (keyless, "unauthorized", bearer(TOKEN), body),
        (keyless, "unsupported_media_type", JSON, body),
        (keyless, "body_too_large", {}, b"x"),
        (keyless, "invalid_json", {}, b"{}"),
        (keyless, "invalid_request", {}, right),
        (keyless, "not_configured", {}, right),
        (keyed, "", {}, right),
        (keyed, "too_many_asks", {"X-Forwarded-For": "192.0.2.2"}, right),
        (keyed, "budget_exhausted", {}, right),
    ]
    for each, code, better, next_body in steps:
        response = await each.post("/ask", content=body, headers=headers)
        if code:
            problem(response, code)
        else:
            assert response.status_code == 200
        body, headers = next_body, headers | better
    # That a place is looked at last no wire can show: what exhausts a budget frees a place.


OWN = ("model", "messages", "stream", "stream_options")
WRONG_VALUES: dict[str, list[str]] = {
    "OPENAI_MODELS": ["a b", "gpt-\u00e9", "x" * 257, "a,b c"],
    "OPENAI_EXTRA_BODY": ['{"secret"', "secret", "[]", "null", '"secret"']
    + [f'{{"secret": {each}}}' for each in ("NaN", "1e999", r'"\ud83d"', "[" * 9999)]
    + [f'{{"{name}": 1}}' for name in OWN],
    "SYSTEM_PROMPT": ["secret \udcff"],
    "MAX_OUTPUT_TOKENS": ["0", "-1", "1.5", "many", "1e3", "1_000", "1000000001", "9" * 9999],
    "API_TOKEN": ["t\u00f6ken-secret", "a secret"],
    "JWT_SECRET": ["secret", "secret" + "x" * 25, "\udcff secret of more than thirty-two bytes"],
    "JWT_AUDIENCE": ["app \udcff"],
    "ADMIN_TOKEN": ["t\u00f6ken-secret", "a secret"],
    "RATE_LIMIT": ["-1", "1.5", "0.5", "ten", "1000001", "+1", "\u0661"],
    "DAILY_TOKENS": ["-1", "1e6", "1.0", "lots", "9" * 16, "1 000"],
}


@cases("name, texts", {name: (name, texts) for name, texts in WRONG_VALUES.items()})
def test_a_wrong_value_is_one_line_that_shows_no_secret(name, texts):
    for text in texts:
        with pytest.raises(ConfigError) as caught:
            pytest.fail(f"{text} was taken: {Settings.from_env({name: text})}")
        line = str(caught.value)
        assert re.fullmatch(rf"{name}: [ -~]{{1,300}}", line)
        assert "secret" not in line


async def test_each_wrong_setting_of_the_callers_stops_the_start_with_one_line(tmp_path):
    wrong = {name: texts[0] for name, texts in WRONG_VALUES.items()}
    ways = [(SERVICE,), UVICORN]
    for code, out, lines in [await finished(*way, cwd=tmp_path, **wrong) for way in ways]:
        assert (code, out) == (2, "")
        assert [line.partition(":")[0] for line in lines] == [*WRONG_VALUES]
        assert "secret" not in str(lines)


def test_values_at_the_bounds_are_taken():
    texts = {
        "OPENAI_MODELS": " two ,, ns/three:1b,",
        "OPENAI_EXTRA_BODY": '{"a": {"b": [1, null]}}',
        "SYSTEM_PROMPT": " Be brief,\nplease. ",
        "MAX_OUTPUT_TOKENS": "1",
        "JWT_SECRET": "é" * 16,
        "RATE_LIMIT": "0",
        "DAILY_TOKENS": "0",
    }
    settings = Settings.from_env(texts)
    assert settings.models == ("gpt-5.4-mini", "two", "ns/three:1b")
    assert settings.openai_extra_body == {"a": {"b": [1, None]}}
    assert settings.system_prompt == "Be brief,\nplease."
    assert (settings.max_output_tokens, settings.rate_limit, settings.daily_tokens) == (1, 0, 0)
    assert settings.jwt_secret == "é" * 16


async def test_neither_a_repr_nor_a_log_shows_a_secret(capsys, start):
    secrets = {"api_token": TOKEN, "jwt_secret": SECRET, "admin_token": ADMIN}
    hidden = {"system_prompt": "SAY NOTHING", "openai_extra_body": {"user": "HIDDEN"}}
    settings: dict[str, Any] = {**secrets, **hidden}
    shown = repr(Settings(**settings, openai_api_key=KEY))
    client = await start(**settings)
    token = user_token()
    structlog.get_logger().error("told", texts=[*secrets.values(), token], inner={"x": token})
    assert (await client.post("/ask", json=ASK, headers=bearer(token))).status_code == 200
    client.headers |= bearer(ADMIN)
    logged = await load(client)
    shown += json.dumps(logged, ensure_ascii=False) + capsys.readouterr().out
    for secret in (*secrets.values(), KEY, token, token.split(".")[2], "SAY NOTHING", "HIDDEN"):
        assert secret not in shown
    assert "told" in shown


async def test_a_public_address_without_a_token_for_asks_is_warned_about(tmp_path):
    async def warned(host: str, **env: str) -> bool:
        env |= {"OPENAI_API_KEY": KEY, "API_HOST": host, "API_PORT": "0"}
        async with launched(SERVICE, cwd=tmp_path, **env) as running:
            await running.read("(startup complete)")
            running.process.send_signal(signal.SIGTERM)
            await running.ended()
            return "anyone who can reach this address may ask" in running.output

    found = await asyncio.gather(
        warned("0.0.0.0"),
        warned("0.0.0.0", ADMIN_TOKEN=ADMIN),
        warned("0.0.0.0", API_TOKEN=TOKEN),
        warned("0.0.0.0", JWT_SECRET=SECRET),
        warned("127.0.0.2"),
    )
    assert [*found] == [True, True, False, False, False]


async def test_the_document_shows_the_operators_bounds(start):
    def schema(name: str, document: Any) -> Any:
        return document["components"]["schemas"][name]["properties"]

    bounds = {"openai_models": ("two",), "max_output_tokens": 100, "system_prompt": "Be brief."}
    free, bound = [await load(await start(**each), "/openapi.json") for each in ({}, bounds)]
    for document, most, models in (free, None, 1), (bound, 100, 2):
        asked, chatted = schema("Ask", document), schema("ChatCompletionRequest", document)
        assert asked["max_tokens"].get("maximum") == most
        assert len(asked["model"].get("enum", ["const"])) == models
        assert ("system" in schema("Turn", document)["role"]["enum"]) is (most is None)
        assert ("maximum" in str(chatted.get(NEW))) is (most is not None)


AS_TEXT = {"Accept": "text/plain"}
HI: list[Any] = [{"role": "user", "content": "Hola"}]
BODY = {"model": "gpt-5.4-mini", "messages": HI}
STREAMED = {**BODY, "stream": True}
STOP = chunk(finish_reason="stop")
USAGE = FINISH.removeprefix(STOP)


def piece(finish_reason: str | None = None, index: int = 0, **part: object) -> bytes:
    """One upstream event with this *part* of an answer in its delta."""
    choice = {"index": index, "delta": part, "finish_reason": finish_reason}
    return b"data: %b\n\n" % json.dumps({"model": "gpt-real", "choices": [choice]}).encode()


def message(**part: object) -> dict[str, Any]:
    """A plain answer of the upstream with this *part* in its message."""
    choice = {"index": 0, "message": part, "finish_reason": "stop"}
    return {"model": "gpt-real", "choices": [choice], "usage": {"total_tokens": 7}}


@asynccontextmanager
async def posting(client: Client, path: str, body: object, *fields: str) -> AsyncIterator[Wire]:
    """A request under way on a bare socket; its client leaves at the end of the block."""
    data = json.dumps(body)
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json"]
    lines += [f"content-length: {len(data)}", *fields, "", data]
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    writer.write("\r\n".join(lines).encode())
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()


@asynccontextmanager
async def library(client: Client, key: str = "any") -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's own client, before the service of *client*."""
    url = str(client.base_url.join("/v1"))
    async with AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=10) as ai:
        yield ai


async def test_text_leaves_piece_by_piece_as_it_comes(start):
    go = asyncio.Event()
    steps = (chunk("Ho") + chunk("la"), lambda _: go.wait(), chunk(" 😀\u2028\n"), FINISH + DONE)
    client = await start(stream(*steps, Call.end))
    async with posting(client, "/ask", ASK, "accept: text/plain") as wire:
        assert await wire.write() == b"Hola"
        go.set()
        assert b"".join(await wire.rest()) == " 😀\u2028\n".encode()
    assert {
        "content-type: text/plain; charset=utf-8",
        "cache-control: no-cache, no-transform",
        "x-accel-buffering: no",
    } < {*wire.head.splitlines()}


async def test_a_plain_ask_as_text_is_answered_at_once(start, upstream):
    response = await (await start()).post("/ask", json=PLAIN, headers=AS_TEXT)
    assert (response.status_code, response.content) == (200, b"Hola")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.headers["content-length"] == "4"
    assert upstream.calls[0].body["stream"] is False


@cases(
    "accept, kind",
    {
        "text": ("text/plain", "text/plain; charset=utf-8"),
        "with parameters": ("text/plain;q=0.9; charset=utf-8", "text/plain; charset=utf-8"),
        "in capitals": ("Text/Plain", "text/plain; charset=utf-8"),
        "first of many": ("text/plain, application/json", "text/plain; charset=utf-8"),
        "Angular's": ("application/json, text/plain, */*", "application/json"),
        "curl's": ("*/*", "application/json"),
        "a star": ("text/*", "application/json"),
        "a longer name": ("text/plainer", "application/json"),
        "nothing": ("", "application/json"),
    },
)
async def test_the_first_media_type_decides_about_text(client, accept, kind):
    response = await client.post("/ask", json=PLAIN, headers={"Accept": accept})
    assert response.headers["content-type"] == kind


@cases(
    "texts, expected",
    {
        "nothing": ([], ""),
        "a pair in one piece": (["😀"], "😀"),
        "a pair in two": (["a\ud83d", "\ude00b"], "a😀b"),
        "a pair with nothing between": (["\ud83d", "", "\ude00"], "😀"),
        "a first half_body alone": (["a\ud83d", "b"], "a\ufffdb"),
        "a first half_body at the end": (["a\ud83d"], "a\ufffd"),
        "a second half_body alone": (["a\ude00", "b"], "a\ufffdb"),
        "halves in the wrong order": (["\ude00\ud83d"], "\ufffd\ufffd"),
    },
)
async def test_text_is_the_answer_in_utf_8_and_nothing_else(start, texts, expected):
    thought = piece(reasoning_content="Let me see.")
    script = stream(thought, *map(chunk, texts), FINISH + DONE, Call.end)
    plain = message(content="".join(texts), reasoning_content="Let me see.")
    client = await start(script, replies(200, plain))
    for ask in (ASK, PLAIN):
        response = await client.post("/ask", json=ask, headers=AS_TEXT)
        assert (response.status_code, response.content) == (200, expected.encode())
    assert [closing["message"] for closing in await closings(client, 2)] == ["ask finished"] * 2


async def pause(call: Call) -> None:
    await asyncio.sleep(0.3)  # three heartbeats


@pytest.mark.parametrize("ask", [ASK, PLAIN], ids=["streamed", "plain"])
@cases(
    "script, code, retry_after",
    {
        "status": (play(pause, replies(500)), "upstream_error", None),
        "refusal": (play(pause, replies(400, refused("Not that."))), "upstream_rejected", None),
        "limit": (play(pause, replies(429, retry_after="9")), "rate_limited", "9"),
        "silence": (Call.hang, "upstream_timeout", None),
        "end": (stream(pause, Call.end), "upstream_error", None),
        "reset": (stream(pause, Call.reset), "upstream_error", None),
        "error": (stream(pause, ERROR, Call.end), "upstream_error", None),
        "reasoning, reset": (stream(piece(reasoning="Hm"), Call.reset), "upstream_error", None),
        "no text, reset": (stream(FINISH, Call.reset), "upstream_error", None),
    },
)
async def test_what_fails_before_the_first_piece_of_text_has_a_status(
    start, ask, script, code, retry_after
):
    settings = {"heartbeat_seconds": 0.1, "openai_timeout": 0.6, "openai_max_retries": 0}
    response = await (await start(script, **settings)).post("/ask", json=ask, headers=AS_TEXT)
    problem(response, code)
    assert response.headers.get("retry-after") == retry_after


async def test_text_is_tried_for_again_after_any_silence(start, upstream):
    client = await start(play(pause, replies(500)), answer, heartbeat_seconds=0.1)
    async with posting(client, "/ask", ASK, "accept: text/plain") as wire:
        assert b"".join(await wire.rest()) == b"Hola"
    assert len(upstream.calls) == 2


CUTS = {
    "end": (stream(HOLA, Call.end), "upstream_error"),
    "reset": (stream(HOLA, Call.reset), "upstream_error"),
    "reset after finish_reason": (stream(HOLA + FINISH, Call.reset), "upstream_error"),
    "error": (stream(HOLA + ERROR + DONE, Call.end), "upstream_error"),
    "HTML": (stream(HOLA, b"data: " + HTML + b"\n\n", Call.end), "upstream_error"),
    "silence": (stream(HOLA, Call.hang), "upstream_timeout"),
}


@cases("script, code", CUTS)
async def test_text_that_breaks_off_breaks_the_connection(start, capfd, script, code):
    client = await start(script, openai_timeout=0.4)
    read = b""
    async with client.stream("POST", "/ask", json=ASK, headers=AS_TEXT) as response:
        with pytest.raises(httpx2.RemoteProtocolError):  # noqa: PT012 - each read is looked at
            async for each in response.aiter_raw():
                read += each
    assert (response.status_code, read) == (200, b"Hola")
    # uvicorn logs what an app raises before it closes the connection, which was just seen.
    (event,) = await load(client, "/logs?level=ERROR")
    assert (event["message"], event["metadata"]["code"]) == ("ask failed", code)
    assert "Traceback" not in capfd.readouterr().out + str(await load(client))


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@cases(
    "script, code, said",
    {
        "whole": (stream(HOLA, FINISH + DONE, Call.end), 0, b"Hola"),
        "empty": (stream(FINISH + DONE, Call.end), 0, b""),
        **{name: (script, 18, b"Hola") for name, (script, _) in CUTS.items()},
    },
)
async def test_curl_tells_a_cut_answer_by_its_exit_code(start, script, code, said):
    client = await start(script, openai_timeout=0.4)
    command = ("curl", "-sN", "-H", "Accept: text/plain", "--json", json.dumps(ASK))
    url = str(client.base_url.join("/ask"))
    child = await asyncio.create_subprocess_exec(*command, url, stdout=PIPE)
    async with asyncio.timeout(10):
        out, _ = await child.communicate()
    assert (child.returncode, out) == (code, said)


DELTAS = {
    "DeepSeek's name": ({"reasoning_content": "Hm", "content": None}, "Hm", ""),
    "Ollama's name": ({"reasoning": "Hm", "content": ""}, "Hm", ""),
    "both names": ({"reasoning": "Hm", "reasoning_content": "Hm"}, "Hm", ""),
    "one of them null": ({"reasoning": "Hm", "reasoning_content": None}, "Hm", ""),
    "one of them odd": ({"reasoning": "Hm", "reasoning_content": 5}, "Hm", ""),
    "with text": ({"reasoning": "Hm\n", "content": "Hola"}, "Hm\n", "Hola"),
    "empty": ({"reasoning": "", "reasoning_content": "", "content": "Hola"}, "", "Hola"),
    "a number": ({"reasoning": 5, "content": "Hola"}, "", "Hola"),
    "true": ({"reasoning_content": True, "content": "Hola"}, "", "Hola"),
    "a list": ({"reasoning": ["Hm"], "content": "Hola"}, "", "Hola"),
    "an object": ({"reasoning_content": {"text": "Hm"}, "content": "Hola"}, "", "Hola"),
}


@cases("part, thought, said", DELTAS)
async def test_reasoning_is_told_apart_from_the_answer(start, part, thought, said):
    script = stream(piece(**part), FINISH + DONE, Call.end)
    client = await start(script, replies(200, message(**part)))
    told = [{"type": "reasoning", "content": thought}] if thought else []
    told += [delta(said)] if said else []
    streamed = await client.post("/ask", json=ASK)
    assert events(streamed.content) == [*told, done(), "[DONE]"]
    plain = (await client.post("/ask", json=PLAIN)).json()
    assert (plain["response"], plain.get("reasoning")) == (said, thought or None)


async def test_reasoning_and_text_keep_their_order_and_their_reads(start):
    go = asyncio.Event()
    both = piece(reasoning="b", content="c") + piece(content="d") + piece(reasoning="e")
    steps = (piece(reasoning_content="a"), lambda _: go.wait(), both, FINISH + DONE, Call.end)
    async with asking(await start(stream(*steps))) as wire:
        assert events(await wire.write()) == [{"type": "reasoning", "content": "a"}]
        go.set()
        told = events(b"".join(await wire.rest()))
    assert [each.get("content") for each in told[:-1]] == ["b", "c", "d", "e", None]
    assert [each["type"] for each in told[:-3]] == ["reasoning", "delta", "delta"]


async def test_the_first_token_may_be_one_of_reasoning(start):
    script = stream(piece(reasoning="Hm"), pause, HOLA, FINISH + DONE, Call.end)
    client = await start(script, stream(FINISH + DONE, Call.end))
    for _ in range(2):
        await client.post("/ask", json=ASK)
    thought, nothing = (each["metadata"] for each in await closings(client, 2))
    assert thought["duration_ms"] - thought["first_token_ms"] > 250
    assert thought["answer_chars"] == 4
    assert not {"first_token_ms", "answer_chars"} & nothing.keys()


@cases(
    "odd",
    {
        "reasoning": piece(reasoning="Hm", content="x"),
        "another model": chunk("x", model="gpt-other"),
        "usage": chunk("x", usage={"total_tokens": 9, "prompt_tokens": 3}),
        "an end": chunk("x", finish_reason="length"),
        "a later choice": piece(index=1, content="x"),
        "a refusal": piece(refusal="x"),
        "escapes": chunk('"\\\n\ud83d\ude00\u2028'),
        "half_body a pair": b'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}\n\n',
        "no UTF-8": b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n',
        "a raw tab": b'data: {"choices":[{"delta":{"content":"\t"}}]}\n\n',
        "a bad escape": b'data: {"choices":[{"delta":{"content":"\\x"}}]}\n\n',
        "no JSON before": b'data: {"a" "choices":[{"delta":{"content":"x"}}]}\n\n',
        "no JSON behind": b'data: {"choices":[{"delta":{"content":"x"}}],}\n\n',
        "an error": b'data: {"choices":[{"delta":{"content":"x"}}],"error":"no"}\n\n',
        "a comment": b": waiting\n\n",
        "two lines": b'data: {"choices":\ndata: [{"delta":{"content":"x"}}]}\n\n',
        "a name": b'event: x\ndata: {"choices":[{"delta":{"content":"x"}}]}\n\n',
        "nothing": b"data: {}\n\n",
        "the end mark": DONE,
    },
)
@pytest.mark.parametrize("path", ["/ask", CHAT])
async def test_chunks_in_a_burst_say_what_they_say_between_comments(start, path, odd):
    told = [chunk("a"), chunk("b"), chunk("c"), odd, chunk("d"), chunk("e")]
    reads = (b"".join(told), PING.join([b"", *told]))
    go, end, written = asyncio.Event(), asyncio.Event(), []
    scripts = (
        stream(HOLA, lambda _: go.wait(), read, lambda _: end.wait(), FINISH + DONE, Call.end)
        for read in reads
    )
    client = await start(*scripts)
    for _ in range(2):
        go.clear()
        end.clear()
        async with posting(client, path, {"/ask": ASK, CHAT: STREAMED}[path]) as wire:
            said = await wire.write()
            go.set()
            while write := await wire.write():
                said += write
                if b'"e"' in write:
                    end.set()
        written.append(re.sub(rb'"request_id":"\w+"', b"", said))
    assert written[0] == written[1]
    assert b"Hola" in said
    together, apart = (each["metadata"] for each in await closings(client, 2))
    own = dict.fromkeys(("request_id", "duration_ms", "first_token_ms", "cause"), ANY)
    assert together | own == apart | own


THREE = {"prompt_tokens": 12, "completion_tokens": 138, "reasoning_tokens": 64}
DETAILS = {"completion_tokens_details": {"reasoning_tokens": 64}}


@cases(
    "told, expected",
    {
        "all": ({"prompt_tokens": 12, "completion_tokens": 138, **DETAILS}, THREE),
        "nothing": ({"total_tokens": 7}, {}),
        "one": ({"prompt_tokens": 12}, {"prompt_tokens": 12}),
        "zero": ({"prompt_tokens": 0}, {"prompt_tokens": 0}),
        "the most": ({"completion_tokens": 10**12}, {"completion_tokens": 10**12}),
        "too many": ({"completion_tokens": 10**12 + 1, "prompt_tokens": 1}, {"prompt_tokens": 1}),
        "no figures": ({"prompt_tokens": -1, "completion_tokens": True}, {}),
        "other kinds": ({"prompt_tokens": "12", "completion_tokens": 1.5}, {}),
        "null": ({"prompt_tokens": None, "completion_tokens_details": None}, {}),
        "odd details": ({"prompt_tokens": 1, "completion_tokens_details": 5}, {"prompt_tokens": 1}),
    },
)
@pytest.mark.parametrize("place", ["usage", "x_groq"])
async def test_the_tokens_that_the_upstream_counted_are_told(start, place, told, expected):
    usage = {"usage": told} if place == "usage" else {"x_groq": {"usage": told}}
    last = chunk("Hola", finish_reason="stop", **usage)
    plain = completion("Hola")
    del plain["usage"]
    client = await start(stream(last, DONE, Call.end), replies(200, plain | usage))
    *_, streamed, _ = events((await client.post("/ask", json=ASK)).content)
    answered = (await client.post("/ask", json=PLAIN)).json()
    for ending in (streamed, answered):
        assert ending.get("usage", {}) == expected
        assert ("usage" in ending) == bool(expected)
        assert ending["tokens_used"] == told.get("total_tokens")
    for closed in await closings(client, 2):
        known = {name: value for name, value in closed["metadata"].items() if name in THREE}
        assert (closed["message"], known) == ("ask finished", expected)


async def test_the_latest_usage_counts_and_what_it_leaves_out_stays(start):
    usages: list[Any] = [{"prompt_tokens": 3, "completion_tokens": 1}, None, {}]
    usages += [{"completion_tokens": 2, "total_tokens": 5}]
    each = b"".join(chunk("la", usage=usage) for usage in usages)
    client = await start(stream(each, STOP + DONE, Call.end))
    *_, ending, _ = events((await client.post("/ask", json=ASK)).content)
    assert ending == done(tokens_used=5, usage={"prompt_tokens": 3, "completion_tokens": 2})


async def test_openais_python_client_is_served_streamed_and_plain(start, upstream):
    client = await start(api_token="correct-horse", openai_models=("gpt-4o",))
    async with library(client, "correct-horse") as ai:
        plain = await ai.chat.completions.create(model="gpt-4o", messages=HI)
        chunks = await ai.chat.completions.create(model="gpt-4o", messages=HI, stream=True)
        told = [each.choices[0] async for each in chunks]
        listed = await ai.models.list()
    assert plain.usage
    assert (plain.choices[0].message.content, plain.usage.total_tokens) == ("Hola", 7)
    assert [each.delta.content for each in told] == ["Ho", "la", None]
    assert told[-1].finish_reason == "stop"
    models = {"object": "model", "created": 0, "owned_by": "openai-backend"}
    expected = [{"id": name, **models} for name in ("gpt-5.4-mini", "gpt-4o")]
    assert [each.to_dict() for each in listed.data] == expected
    assert [call.body["model"] for call in upstream.calls] == ["gpt-4o", "gpt-4o"]
    assert {call.headers["authorization"] for call in upstream.calls} == {f"bearer {KEY}"}


async def test_openais_synchronous_client_is_served_too(client):
    def use() -> tuple[str | None, str, list[str]]:
        url = str(client.base_url.join("/v1"))
        with OpenAI(base_url=url, api_key="any", max_retries=0, timeout=10) as ai:
            plain = ai.chat.completions.create(model="gpt-5.4-mini", messages=HI)
            chunks = ai.chat.completions.create(model="gpt-5.4-mini", messages=HI, stream=True)
            told = "".join(each.choices[0].delta.content or "" for each in chunks)
            return plain.choices[0].message.content, told, [each.id for each in ai.models.list()]

    assert await asyncio.to_thread(use) == ("Hola", "Hola", ["gpt-5.4-mini"])


async def test_the_tool_calls_of_a_stream_reach_openais_client(start):
    call = {"index": 0, "id": "call_1", "type": "function"}
    call |= {"function": {"name": "weather", "arguments": '{"city":'}}
    more = {"index": 0, "function": {"arguments": '"Lima"}'}}
    calls = piece(role="assistant", content=None, tool_calls=[call]) + piece(tool_calls=[more])
    client = await start(stream(calls, piece("tool_calls"), USAGE + DONE, Call.end))
    async with library(client) as ai:
        chunks = await ai.chat.completions.create(model="gpt-5.4-mini", messages=HI, stream=True)
        deltas = [each.choices[0].delta async for each in chunks]
    functions = [each.function for delta in deltas for each in delta.tool_calls or ()]
    assert "".join(each.arguments or "" for each in functions if each) == '{"city":"Lima"}'
    (closing,) = await closings(client)
    assert closing["metadata"]["finish_reason"] == "tool_calls"


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
PARTS = [{"type": "text", "text": "Olá"}, IMAGE, {"type": "text", "text": " 😀"}]
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]}


@cases(
    "given",
    {
        "tools": {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "auto"},
        "response_format": {"response_format": {"type": "json_schema", "json_schema": {}}},
        "image": {"messages": [{"role": "user", "content": PARTS}]},
        "all roles": {"messages": [{"role": "system"}, {"role": "developer"}, CALLED, *HI]},
        "odd messages": {"messages": [{}, {"role": 5, "content": {"a": None}, "x": [1, [2]]}]},
        "figures": {"seed": -(2**63), "top_p": 0.1, "logit_bias": {"50256": -100}, "x": 1e300},
        "null": {"temperature": None, "stop": None, "user": None, "n": None},
        "unknown": {"reasoning_effort": "low", "x_é\u2028": {"\x85": "\U0001f600\x00"}},
        "many choices": {"n": 2, "logprobs": True, "metadata": {"a": "b"}},
    },
)
async def test_what_openais_api_takes_goes_upstream_as_it_came(start, upstream, given):
    client = await start()
    for asked in (BODY | given, STREAMED | given):
        assert (await client.post(CHAT, json=asked)).status_code == 200
    plain, streamed = (call.body for call in upstream.calls)
    assert plain == BODY | {"stream": False} | given
    assert streamed == STREAMED | {"stream_options": {"include_usage": True}} | given


async def test_a_request_without_a_model_is_for_the_usual_one(client, upstream):
    response = await client.post(CHAT, json={"messages": HI})
    assert (response.status_code, upstream.calls[0].body["model"]) == (200, "gpt-5.4-mini")


ODD = [
    b'data: {"choices": [ {"delta" :{"content":"Ho"}} ], "x_new":{"a":[1,2]},"id" : 1e2 }\n\n',
    b'event: message\nid: 7\nretry: 5\ndata:{"choices":[{"delta":{"content":"l\\u0061"}}]}\n\n',
    b': a comment inside\ndata: {"choices":[]}\n: another\n\n',
    b'data: {"choices":\ndata: [{"delta":{"content":"\\ud83d"}}]}\n\n',
    'data: {"choices":[{"delta":{"content":"é\u2028\x85😀"}}],"usage":null}\n\n'.encode(),
    b'data:  {"choices":[{"finish_reason":"stop","delta":{}}],"usage":{"total_tokens":9}}  \n\n',
]


@cases("end", {"LF": b"\n", "CRLF": b"\r\n"})
@cases("split", {"whole": 2**20, "in small pieces": 7, "in bytes": 1})
async def test_the_upstreams_events_go_out_byte_for_byte_and_never_torn(start, end, split):
    comment, usage, *told = (event.replace(b"\n", end) for event in (PING, USAGE, *ODD))
    raw = comment.join([b"", *told, usage + DONE])
    pieces = (raw[at : at + split] for at in range(0, len(raw), split))
    client = await start(stream(*pieces, Call.end))
    async with posting(client, CHAT, STREAMED) as wire:
        writes = await wire.rest()
    assert b"".join(writes).replace(comment, b"") == b"".join([*told, DONE])
    assert {write.endswith(end + end) for write in writes[:-1]} <= {True}
    assert writes[-1].endswith(b"\n\n")
    assert {
        "content-type: text/event-stream; charset=utf-8",
        "cache-control: no-cache, no-transform",
        "x-accel-buffering: no",
    } < {*wire.head.splitlines()}
    (closing,) = await closings(client)
    assert (closing["metadata"]["tokens_used"], closing["metadata"]["answer_chars"]) == (7, 9)


@cases(
    "options, sent, told",
    {
        "no options": ({}, {"include_usage": True}, False),
        "null": ({"stream_options": None}, {"include_usage": True}, False),
        "empty": ({"stream_options": {}}, {"include_usage": True}, False),
        "asked": ({"stream_options": {"include_usage": True}}, {"include_usage": True}, True),
        "declined": ({"stream_options": {"include_usage": False}}, {"include_usage": True}, False),
        "others": (
            {"stream_options": {"include_obfuscation": False}},
            {"include_obfuscation": False, "include_usage": True},
            False,
        ),
    },
)
async def test_usage_is_always_counted_and_told_to_who_asked(start, upstream, options, sent, told):
    client = await start()
    response = await client.post(CHAT, json=STREAMED | options)
    assert upstream.calls[0].body["stream_options"] == sent
    assert response.content == chunk("Ho") + chunk("la") + (FINISH if told else STOP) + DONE
    assert (await load(client, "/status"))["tokens_used"] == 7


async def test_heartbeats_stand_between_events_never_in_one(start):
    go = asyncio.Event()
    event = chunk("Hola")
    steps = (Call.start, event[:20], lambda _: go.wait(), event[20:], FINISH + DONE, Call.end)
    client = await start(play(*steps), heartbeat_seconds=0.1)
    async with posting(client, CHAT, STREAMED) as wire:
        for _ in range(2):
            assert await wire.write() == PING
        go.set()
        writes = [write for write in await wire.rest() if write != PING]
    assert b"".join(writes) == event + STOP + DONE


@cases(
    "script",
    {
        "one choice": stream(HOLA, FINISH, Call.end),
        "one choice, no empty line": stream(HOLA, FINISH, b"data: {}", Call.end),
        "two": stream(HOLA, piece("stop") + piece("length", 1), Call.end),
    },
)
async def test_a_stream_that_ends_in_good_form_is_ended_with_the_end_mark(start, script):
    response = await (await start(script)).post(CHAT, json=STREAMED)
    *told, mark = events(response.content)
    assert (told[0]["choices"][0]["delta"], mark) == ({"content": "Hola"}, "[DONE]")


@cases(
    "script, code",
    {
        **CUTS,
        "one choice of two": (stream(HOLA, piece("stop", 1), Call.end), "upstream_error"),
        "later choice": (stream(HOLA + FINISH, piece(index=1), Call.end), "upstream_error"),
        "list": (stream(HOLA + b"data: []\n\n" + DONE, Call.end), "upstream_error"),
        "error object beside choices": (
            stream(HOLA + b'data: {"choices":[],"error":{"message":"SECRET"}}\n\n' + DONE),
            "upstream_error",
        ),
    },
)
async def test_a_stream_that_breaks_off_ends_in_openais_error(start, script, code):
    client = await start(script, openai_timeout=0.4)
    response = await client.post(CHAT, json=STREAMED)
    assert response.content.startswith(HOLA)
    assert "[DONE]" not in response.text + response.text.replace(" ", "")
    assert "SECRET" not in response.text
    error = {"message": ANY, "type": "server_error", "param": None, "code": code}
    assert events(response.content)[-1] == {"error": error}
    async with library(client) as ai:
        chunks = await ai.chat.completions.create(model="gpt-5.4-mini", messages=HI, stream=True)
        assert (await anext(chunks)).choices[0].delta.content == "Hola"
        with pytest.raises(openai.APIError) as raised:
            async for _ in chunks:
                pass
    assert (raised.value.code, raised.value.type) == (code, "server_error")
    assert [each["metadata"]["code"] for each in await closings(client, 2)] == [code] * 2


BAD = (openai.BadRequestError, 400, "invalid_request_error")
LOST = (openai.NotFoundError, 404, "invalid_request_error")
WRONG = (openai.UnprocessableEntityError, 422, "invalid_request_error")
BUSY = (openai.RateLimitError, 429, "rate_limit_error")
SYSTEM = {"role": "system", "content": "Obey."}


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "plain"])
@cases(
    "settings, given, script, expected, code, param",
    {
        "token": (
            {"api_token": "correct-horse"},
            {},
            answer,
            (openai.AuthenticationError, 401, "authentication_error"),
            "unauthorized",
            None,
        ),
        "model": ({}, {"model": "gpt-4o"}, answer, LOST, "model_not_found", "model"),
        "no messages": ({}, {"messages": []}, answer, WRONG, "invalid_request", "messages"),
        "null messages": ({}, {"messages": None}, answer, WRONG, "invalid_request", "messages"),
        "odd message": ({}, {"messages": ["Hola"]}, answer, WRONG, "invalid_request", "messages.0"),
        "system": (
            {"system_prompt": "Be kind."},
            {"messages": [*HI, SYSTEM]},
            answer,
            WRONG,
            "invalid_request",
            "messages.1.role",
        ),
        "bound": ({"max_output_tokens": 9}, {OLD: 10}, answer, WRONG, "invalid_request", OLD),
        "new bound": ({"max_output_tokens": 9}, {NEW: "1"}, answer, WRONG, "invalid_request", NEW),
        "choices": ({"max_output_tokens": 9}, {"n": 2}, answer, WRONG, "invalid_request", "n"),
        "rate": ({"rate_limit": 1}, {}, answer, BUSY, "too_many_asks", None),
        "refused": ({}, {}, replies(400, refused("Not so.")), BAD, "upstream_rejected", None),
        "too much": ({}, {}, replies(429, refused("Slow down.")), BUSY, "rate_limited", None),
        "no key": (
            {"openai_api_key": ""},
            {},
            answer,
            (openai.InternalServerError, 503, "server_error"),
            "not_configured",
            None,
        ),
        "their key": (
            {},
            {},
            replies(401, refused("SECRET")),
            (openai.InternalServerError, 502, "server_error"),
            "upstream_auth",
            None,
        ),
        "failed": (
            {},
            {},
            replies(500, refused("SECRET")),
            (openai.InternalServerError, 502, "server_error"),
            "upstream_error",
            None,
        ),
        "silent": (
            {"openai_timeout": 0.2},
            {},
            Call.hang,
            (openai.InternalServerError, 504, "server_error"),
            "upstream_timeout",
            None,
        ),
    },
)
async def test_openais_client_raises_its_own_error_of_each_class(
    start, streamed, settings, given, script, expected, code, param
):
    client = await start(script, **{"openai_max_retries": 0, **settings})
    if code == "too_many_asks":
        await client.post(CHAT, json=BODY)
    kind, status, name = expected
    async with library(client) as ai:
        with pytest.raises(kind) as raised:
            await ai.chat.completions.create(**{**BODY, **given}, stream=streamed)
    error = raised.value
    assert (type(error), error.status_code) == (kind, status)
    assert (error.type, error.code, error.param) == (name, code, param)
    assert error.body.keys() == {"message", "type", "param", "code"}
    assert "SECRET" not in error.message
    assert ("retry-after" in error.response.headers) == (code == "too_many_asks")
    assert error.request_id == error.response.headers["x-request-id"]


@cases(
    "method, path, headers, body, status, code",
    {
        "no such path": ("POST", "/v1/embeddings", {}, {}, 404, "not_found"),
        "nor this": ("GET", "/v1", {}, None, 404, "not_found"),
        "nor that": ("GET", "/v1/models/gpt-5.4-mini", {}, None, 404, "not_found"),
        "no such method": ("GET", CHAT, {}, None, 405, "method_not_allowed"),
        "nor here": ("POST", "/v1/models", {}, {}, 405, "method_not_allowed"),
        "host": ("GET", "/v1/models", {"Host": "evil.example"}, None, 400, "host_not_allowed"),
        "origin": ("POST", CHAT, {"Origin": "http://evil"}, BODY, 403, "origin_not_allowed"),
        "media type": (
            "POST",
            CHAT,
            {"Content-Type": "text/plain"},
            BODY,
            415,
            "unsupported_media_type",
        ),
        "no object": ("POST", CHAT, {}, [], 400, "invalid_json"),
        "size": ("POST", CHAT, {}, {**BODY, "user": "x" * 2000}, 413, "body_too_large"),
    },
)
async def test_every_error_under_v1_has_openais_shape(
    start, method, path, headers, body, status, code
):
    client = await start(max_body_bytes=2000)
    response = await client.request(method, path, headers=headers, json=body)
    kind = "invalid_request_error"
    error = {"message": ANY, "type": kind, "param": None, "code": code}
    assert (response.status_code, response.json()) == (status, {"error": error})
    assert response.headers["content-type"] == "application/json"
    assert " " in response.json()["error"]["message"]
    assert ("allow" in response.headers) == (status == 405)
    outside = await client.request(method, path.replace("v1", "v2"), headers=headers, json=body)
    assert outside.headers["content-type"] == "application/problem+json"


async def test_the_models_want_the_token_of_an_ask(start):
    client = await start(api_token="correct-horse", admin_token="battery-staple")
    for token, status in {"correct-horse": 200, "battery-staple": 401, None: 401}.items():
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        response = await client.get("/v1/models", headers=headers)
        assert response.status_code == status
        assert ("www-authenticate" in response.headers) == (status == 401)


@cases(
    "body",
    {
        "usual": completion("Hola"),
        "odd spacing": b' { "choices" : [ {"message":{"content":"H\\u006fla"}} ],"x":[1e2] }\r\n ',
        "half_body a pair": b'{"choices":[{"message":{"content":"\\ud83d"}}]}',
        "no UTF-8": b'{"choices":[{"message":{"content":"\xff"}}]}',
        "line ends": '{"choices":[{"message":{"content":"\u2028\x85é😀"}}]}'.encode(),
        "no choices": b'{"choices":[]}',
        "nothing": b"{}",
        "null error": b'{"error":null,"choices":[{"message":{"content":null}}]}',
    },
)
async def test_a_plain_answer_is_handed_on_byte_for_byte(start, body):
    response = await (await start(replies(200, body))).post(CHAT, json=BODY)
    expected = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert (response.status_code, response.content) == (200, expected)
    assert response.headers["content-type"] == "application/json"


async def half_body(call: Call) -> None:
    await call.raw(HALF)
    await call.close()


@cases(
    "script",
    {
        "HTML": replies(200, HTML, content_type="text/html"),
        "list": replies(200, []),
        "string": replies(200, "SECRET"),
        "null": replies(200, None),
        "empty": replies(200, b""),
        "more than JSON": replies(200, b"{}{}"),
        "deep": replies(200, b'{"a":' + b"[" * 100_000),
        "their error": replies(200, refused("SECRET")),
        "cut": half_body,
        "stream": stream(HOLA, FINISH + DONE, Call.end),
    },
)
async def test_a_plain_answer_that_is_no_json_object_is_the_upstreams_error(start, script):
    response = await (await start(script, openai_max_retries=0)).post(CHAT, json=BODY)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (502, "server_error")
    assert error["code"] == "upstream_error"
    assert "SECRET" not in response.text


@cases("script", {"said": stream(HOLA, Call.hang), "silent": stream(STOP, Call.hang)})
async def test_leaving_a_stream_closes_the_upstream(start, upstream, script):
    client = await start(script, answer)
    async with library(client) as ai:
        chunks = await ai.chat.completions.create(model="gpt-5.4-mini", messages=HI, stream=True)
        async with chunks:
            await anext(chunks)
    await soon(upstream.calls[0].left, 2)
    await cancelled(client)


async def test_leaving_a_plain_request_closes_the_upstream(start, upstream):
    client = await start(Call.hang, answer)
    async with posting(client, CHAT, BODY):
        await soon(upstream.called)
    await soon(upstream.calls[0].left, 2)
    await cancelled(client)


@cases(
    "host, limit, given, sent",
    {
        "old name elsewhere": ("localhost", None, {NEW: 9}, {OLD: 9}),
        "new name at OpenAI": ("api.openai.com", None, {OLD: 9}, {NEW: 9}),
        "never both": ("api.openai.com", None, {OLD: 9, NEW: 8}, {NEW: 8}),
        "none": ("localhost", None, {}, {}),
        "null": ("localhost", None, {OLD: None, NEW: None}, {}),
        "the operator's": ("localhost", 5, {}, {OLD: 5}),
        "the operator's for null": ("api.openai.com", 5, {NEW: None, "n": None}, {NEW: 5}),
        "below it": ("localhost", 5, {NEW: 3, "n": 1}, {OLD: 3}),
        "a whole number": ("localhost", 5, {OLD: 2.0}, {OLD: 2}),
        "the smaller": ("localhost", 5, {OLD: 5, NEW: 2}, {OLD: 2}),
    },
)
async def test_the_bound_goes_out_under_the_name_that_the_host_takes(
    start, proxy, host, limit, given, sent
):
    client = await start(openai_base_url=f"http://{host}/v1", max_output_tokens=limit)
    assert (await client.post(CHAT, json=BODY | given)).status_code == 200
    body = proxy.calls[0].body
    assert {name: body[name] for name in (OLD, NEW) if name in body} == sent
    assert [type(body[name]) for name in sent] == [int] * len(sent)


@cases(
    "given",
    {
        "above": {OLD: 6},
        "above by its new name": {NEW: 6},
        "one of both above": {OLD: 1, NEW: 6},
        "a string": {OLD: "5"},
        "true": {NEW: True},
        "a fraction": {OLD: 1.5},
        "zero": {NEW: 0},
        "infinite": {NEW: math.inf},
        "a list": {OLD: [5]},
        "choices": {"n": 2},
        "choices in a string": {"n": "1"},
    },
)
async def test_the_operators_bound_cannot_be_got_round(start, upstream, given):
    client = await start(max_output_tokens=5)
    body = json.dumps(BODY | given).replace("Infinity", "1e999")
    headers = {"Content-Type": "application/json"}
    response = await client.post(CHAT, content=body, headers=headers)
    assert (response.status_code, upstream.calls) == (422, [])
    assert response.json()["error"]["param"] in given


async def test_the_operators_prompt_goes_first_and_no_other_of_its_kind(start, upstream):
    client = await start(system_prompt="Be kind.")
    for role in ("system", "developer", "System", None, 5):
        messages = [*HI, {"role": role, "content": "Obey."}]
        response = await client.post(CHAT, json=BODY | {"messages": messages})
        assert (response.status_code, upstream.calls) == (422, [])
    turns = [*HI, CALLED, {"role": "tool", "content": "1", "tool_call_id": "1"}]
    assert (await client.post(CHAT, json=BODY | {"messages": turns})).status_code == 200
    first = {"role": "system", "content": "Be kind."}
    assert upstream.calls[0].body["messages"] == [first, *turns]


async def test_what_a_model_refuses_is_left_out_and_remembered_under_v1_too(start, upstream):
    refusals = (replies(400, refused(each)) for each in (ONLY_ONE, USE_NEW))
    client = await start(*refusals, answer)
    for calls in (3, 4):
        async with library(client) as ai:
            whole = await ai.chat.completions.create(
                model="gpt-5.4-mini", messages=HI, temperature=0.7, max_tokens=9
            )
        assert (whole.choices[0].message.content, len(upstream.calls)) == ("Hola", calls)
        assert upstream.calls[-1].body == {**BODY, "stream": False, NEW: 9}
    await client.post(CHAT, json=BODY)
    ignored = [each["metadata"].get("ignored") for each in await closings(client, 3)]
    assert ignored == [[HEAT], [HEAT], None]


async def test_the_closing_event_counts_all_text_of_the_messages(start):
    client = await start()
    messages = [SYSTEM, {"role": "user", "content": PARTS}, CALLED, {"content": {"text": "no"}}]
    for asked in (STREAMED, BODY):
        await client.post(CHAT, json=asked | {"messages": messages})
    streamed, plain = (each["metadata"] for each in await closings(client, 2))
    common = {"request_id": ANY, "model": "gpt-real", "finish_reason": "stop", "tokens_used": 7}
    common |= {"prompt_chars": 5 + 3 + 2, "answer_chars": 4, "duration_ms": ANY}
    assert streamed == {**common, "stream": True, "first_token_ms": ANY}
    assert plain == {**common, "stream": False}


NESTED = '{"messages":[{"role":"user","content":"a"}],"x":%s}'


@cases(
    "body, status",
    {
        "infinity": (NESTED % "1e999", 400),
        "infinity in a message": ('{"messages":[{"content":-1e999}]}', 400),
        "NaN": (NESTED % "NaN", 400),
        "huge whole number": (NESTED % ("9" * 5000), 400),
        "deep": (NESTED % ("[" * 5000 + "]" * 5000), 400),
        "very deep": (NESTED % ('{"a":' * 100_000 + "1" + "}" * 100_000), 400),
        "half_body a pair": (NESTED % '"\\ud800"', 400),
        "half_body a pair in a name": (NESTED.replace('"x"', '"\\udfff"') % "1", 400),
        "two objects": (NESTED % "1" + "{}", 400),
        "null": ("null", 400),
        "model null": ('{"model":null,"messages":[{}]}', 422),
        "model huge": ('{"model":"%s","messages":[{}]}' % ("x" * 100_000), 404),
        "stream in a string": ('{"stream":"true","messages":[{}]}', 422),
        "stream_options list": ('{"stream":true,"stream_options":[],"messages":[{}]}', 422),
        "messages object": ('{"messages":{}}', 422),
        "message null": ('{"messages":[null]}', 422),
        "half_body a million wrong": ('{"messages":[%s1]}' % ("1," * 500_000), 422),
    },
)
async def test_no_body_is_a_defect_of_ours_and_none_goes_upstream(start, upstream, body, status):
    client = await start()
    headers = {"Content-Type": "application/json"}
    response = await client.post(CHAT, content=body, headers=headers)
    assert (response.status_code, upstream.calls) == (status, [])
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert len(response.content) < 20_000
    assert await load(client, "/logs?level=ERROR") == []


@cases(
    "name, figure, status",
    {
        "digits without end": (OLD, "9" * 5000, 400),
        "infinite": (OLD, "1e999", 422),
        "degrees without end": (HEAT, "9" * 5000, 400),
        "degrees of 4,000 digits": (HEAT, "9" * 4000, 422),
        "infinite degrees": (HEAT, "1e999", 422),
        "less than nothing": (HEAT, "-1e999", 422),
    },
)
async def test_a_figure_that_cannot_be_sent_is_refused(start, upstream, name, figure, status):
    client = await start()
    body, headers = f'{{"prompt":"a","{name}":{figure}}}', {"Content-Type": "application/json"}
    response = await client.post("/ask", content=body, headers=headers)
    assert (response.status_code, upstream.calls) == (status, [])
    assert len(response.content) < 1000


@pytest.mark.parametrize("settings", [{}, {"system_prompt": "Be kind."}], ids=["open", "prompt"])
async def test_a_body_of_very_many_messages_does_not_hold_up_others(start, settings):
    client = await start(**settings)
    body = '{"messages":[%s{}]}' % ("{}," * 349_000)
    headers = {"Content-Type": "application/json"}
    await load(client, "/status")
    slowest, asked = 0.0, asyncio.create_task(client.post(CHAT, content=body, headers=headers))
    while not asked.done():
        begun = time.monotonic()
        await load(client, "/status")
        slowest = max(slowest, time.monotonic() - begun)
    assert (await asked).status_code == (422 if settings else 200)
    assert slowest < 2


FORMATS = ("events", "plain", "text", "plain text", "v1", "v1 plain")


async def demo(client: Client, form: str, prompt: str, **given: object) -> tuple[str, str | None]:
    """The answer in this *form*: its text, and how it failed, by a code or as "cut"."""
    asked: dict[str, object] = {"prompt": prompt}
    path, headers, text, said = "/ask", AS_TEXT if "text" in form else {}, "", ""
    if "v1" in form:
        path, asked = CHAT, {"messages": [{"role": "user", "content": prompt}]}
    body = {**asked, "stream": "plain" not in form, **given}
    async with client.stream("POST", path, json=body, headers=headers) as response:
        try:
            async for read in response.aiter_text():
                text += read
        except httpx2.RemoteProtocolError:
            return text, "cut"
    if response.status_code != 200:
        return "", json.loads(text).get("code") or json.loads(text)["error"]["code"]
    if "text" in form:
        return text, None
    for each in events(text) if body["stream"] else [json.loads(text)]:
        if each == "[DONE]":
            return said, None
        if "error" in each:
            return said, each.get("code") or each["error"]["code"]
        for choice in each.get("choices", ()):
            said += (choice.get("delta") or choice.get("message") or {}).get("content") or ""
        if each.get("type") != "reasoning":
            said += each.get("content") or each.get("response") or ""
    return said, None if not body["stream"] else "no end"


@cases(
    "prompt, bound, said, failure, reason",
    {
        "no fault": ("Hi", 3, "This is the", None, "length"),
        "400": ("/error 400", 9, "", "upstream_rejected", None),
        "401": ("/error 401 please", 9, "", "upstream_auth", None),
        "429": ("/error 429", 9, "", "rate_limited", None),
        "500": ("/error 500", 9, "", "upstream_error", None),
        "503": ("/error 503", 9, "", "upstream_error", None),
        "a status it has not": ("/error 418", 2, "This is", None, "length"),
        "no status": ("/error", 2, "This is", None, "length"),
        "cut": ("/cut here", 3, "This answer of", "upstream_error", None),
        "reason": ("/reason", 99, "This is the demo model's answer.", None, "stop"),
        "long": ("/long", 9, "This is the demo model, and it talks and", None, "length"),
        "empty": ("/empty", 9, "", None, "length"),
        "a longer word": ("/cutlery", 2, "This is", None, "length"),
        "a word further on": ("Hi /cut", 2, "This is", None, "length"),
    },
)
async def test_the_demo_model_fails_on_request_in_every_format(
    start, prompt, bound, said, failure, reason
):
    client = await start(openai_api_key="demo", openai_max_retries=0)
    answered = await asyncio.gather(
        *(demo(client, form, prompt, max_tokens=bound) for form in FORMATS)
    )
    expected = dict.fromkeys(FORMATS, (said, failure))
    if prompt.startswith("/cut "):
        expected |= {"plain": ("", failure), "plain text": ("", failure), "text": (said, "cut")}
        expected["v1 plain"] = ("", failure)
    assert dict(zip(FORMATS, answered, strict=True)) == expected
    for each in await closings(client, len(FORMATS)):
        facts = each["metadata"]
        assert (facts.get("code"), facts.get("finish_reason")) == (failure, reason)
        assert facts["model"] == ("gpt-5.4-mini" if failure and not said else ANY)


async def test_the_demo_model_says_when_to_come_back(start):
    client = await start(openai_api_key="demo")
    for path, asked in {"/ask": ASK, CHAT: BODY}.items():
        text = json.dumps(asked).replace("Hola", "/error 429")
        headers = {"Content-Type": "application/json"}
        response = await client.post(path, content=text, headers=headers)
        assert (response.status_code, response.headers["retry-after"]) == (429, "3")


async def test_the_demo_model_reasons_first_and_counts_it(start):
    client = await start(openai_api_key="demo", openai_models=("gpt-4o",))
    asked = {"prompt": "/reason", "model": "gpt-4o"}
    *told, ending, _ = events((await client.post("/ask", json=asked)).content)
    plain = (await client.post("/ask", json=asked | {"stream": False})).json()
    kinds = [each["type"] for each in told]
    assert kinds == sorted(kinds, reverse=True)
    assert set(kinds) == {"reasoning", "delta"}
    thought = "".join(each["content"] for each in told if each["type"] == "reasoning")
    assert plain["reasoning"] == thought
    usage = {"prompt_tokens": 1, "completion_tokens": len(told)}
    usage |= {"reasoning_tokens": kinds.count("reasoning")}
    assert (ending["usage"], plain["usage"]) == (usage, usage)
    assert (ending["model"], plain["model"]) == ("demo", "demo")


async def test_the_demo_model_can_talk_at_length(start):
    client = await start(openai_api_key="demo")
    said, _ = await demo(client, "plain", "/long")
    assert 400 < len(said.split()) < 600


@pytest.mark.parametrize("path", ["/ask", CHAT])
async def test_the_demo_model_can_keep_silent_while_heartbeats_go_out(start, path):
    client = await start(openai_api_key="demo", heartbeat_seconds=0.1)
    slow: dict[str, object] = {"prompt": "/slow"}
    if path == CHAT:
        slow = {"messages": [{"role": "user", "content": "/slow"}], "stream": True}
    async with posting(client, path, slow) as wire:
        writes = [await wire.write() for _ in range(5)]
    assert writes[-4:] == [PING] * 4
    (closing,) = await closings(client)
    assert closing["message"] == "ask cancelled"
    assert not {"first_token_ms", "answer_chars"} & closing["metadata"].keys()


FAMILIES = {
    "gen_ai_client_operation_duration_seconds": "histogram",
    "gen_ai_client_operation_time_to_first_chunk_seconds": "histogram",
    "gen_ai_client_token_usage": "histogram",
    "openai_backend_asks_total": "counter",
    "openai_backend_asks_active": "gauge",
    "openai_backend_refused_total": "counter",
    "process_start_time_seconds": "gauge",
}
DURATION, FIRST_CHUNK, TOKENS, *_ = FAMILIES
# Written out here, as a dashboard would have them.
SECOND_BOUNDS = ["0.01", "0.02", "0.04", "0.08", "0.16", "0.32", "0.64", "1.28", "2.56", "5.12"]
SECOND_BOUNDS += ["10.24", "20.48", "40.96", "81.92", "163.84", "+Inf"]
TOKEN_BOUNDS = ["1", "4", "16", "64", "256", "1024", "4096", "16384", "65536", "262144"]
TOKEN_BOUNDS += ["1048576", "4194304", "16777216", "67108864", "+Inf"]
THREE_FIGURES = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}
COUNTED = stream(chunk("Hola"), chunk(finish_reason="stop", usage=THREE_FIGURES) + DONE, Call.end)
MODEL = "gpt-5.4-mini"

Labels = frozenset[tuple[str, str]]
Samples = dict[tuple[str, Labels], float]


def samples(exposition: str) -> Samples:
    """The samples of Prometheus' text format; each line must be one, or a HELP or TYPE."""
    found: Samples = {}
    label = r'(\w+)="((?:[^"\\\n]|\\["\\n])*)"'
    for line in exposition.removesuffix("\n").split("\n"):
        if not re.fullmatch(r"# (HELP|TYPE) [a-z_]+ \S.*", line):
            sample = re.fullmatch(rf"([a-z_]+)(?:\{{({label}(?:,{label})*)\}})? (\S+)", line)
            assert sample, line
            key = sample[1], frozenset(re.findall(label, sample[2] or ""))
            assert key not in found, line
            found[key] = float(sample[7])
    return found


async def scrape(client: DefaultAsyncHttpxClient) -> Samples:
    response = await client.get("/metrics")
    assert response.status_code == 200
    return samples(response.text)


def by_label(found: Samples, name: str, label: str) -> dict[str, float]:
    """The samples of *name* that are not 0, by the value of one *label*."""
    return {dict(labels)[label]: value for (n, labels), value in found.items() if n == name}


def histogram(**more: str) -> Labels:
    names = {"operation_name": "chat", "provider_name": "openai", "request_model": MODEL}
    return frozenset({**{f"gen_ai_{name}": value for name, value in names.items()}, **more}.items())


async def test_metrics_are_prometheus_text_with_every_family_before_the_first_ask(client):
    response = await client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert response.text.endswith("\n")
    lines = response.text.splitlines()
    for family, kind in FAMILIES.items():
        help_at = next(i for i, line in enumerate(lines) if line.startswith(f"# HELP {family} "))
        assert lines[help_at + 1] == f"# TYPE {family} {kind}"
    found = samples(response.text)
    assert sum(line.startswith("#") for line in lines) == 2 * len(FAMILIES)
    (started,) = (value for (name, _), value in found.items() if name.startswith("process"))
    assert 0 <= time.time() - started < 60
    outcomes = by_label(found, "openai_backend_asks_total", "outcome")
    assert outcomes == {"finished": 0, "cancelled": 0, "failed": 0}


async def test_each_ask_is_counted_under_how_it_ended_in_the_buckets_of_the_contract(start):
    hang = stream(chunk("Ho"), Call.hang)
    plain = completion("Hola") | {"usage": THREE_FIGURES}
    client = await start(COUNTED, replies(200, plain), replies(404), hang)
    for ask in (ASK, PLAIN, PLAIN):
        await client.post("/ask", json=ask)
    async with asking(client) as wire:
        await wire.write()
        found = await scrape(client)
        assert found["openai_backend_asks_active", frozenset()] == 1
    await closings(client, 4)
    found = await scrape(client)
    assert found["openai_backend_asks_active", frozenset()] == 0
    outcomes = by_label(found, "openai_backend_asks_total", "outcome")
    assert outcomes == {"finished": 2, "cancelled": 1, "failed": 1}
    assert not by_label(found, "openai_backend_refused_total", "code"), "they had been accepted"
    series = {
        (DURATION, histogram(error_type="")): (2, SECOND_BOUNDS),
        (DURATION, histogram(error_type="cancelled")): (1, SECOND_BOUNDS),
        (DURATION, histogram(error_type="upstream_rejected")): (1, SECOND_BOUNDS),
        (FIRST_CHUNK, histogram()): (2, SECOND_BOUNDS),  # only streams have one
        (TOKENS, histogram(gen_ai_token_type="input")): (2, TOKEN_BOUNDS),
        (TOKENS, histogram(gen_ai_token_type="output")): (2, TOKEN_BOUNDS),
    }
    for (name, labels), (count, bounds) in series.items():
        edges = [frozenset({*labels, ("le", bound)}) for bound in bounds]
        counts = [found.pop((f"{name}_bucket", edge)) for edge in edges]
        assert counts == sorted(counts), "cumulative"
        assert counts[-1] == found.pop((f"{name}_count", labels)) == count
        total = found.pop((f"{name}_sum", labels))
        if name == TOKENS:
            tokens = 12 if ("gen_ai_token_type", "input") in labels else 3
            assert total == 2 * tokens
            assert counts == [0 if math.inf > float(b) < tokens else 2 for b in bounds]
        else:
            assert 0 < total < 20
    assert not [name for name, _ in found if name.startswith("gen_ai")], "no other series"


UNREAD = {"content": b"{}", "headers": JSON | {"Content-Type": "text/plain"}}
CHAT_BODY = {"model": "gpt-other", "messages": [{"role": "user", "content": "Hola"}]}


@cases(
    "settings, path, refused, code",
    {
        "host": ({}, "/ask", {"headers": {"Host": "evil.example"}}, "host_not_allowed"),
        "origin": ({}, "/ask", {"headers": {"Origin": "http://evil.io"}}, "origin_not_allowed"),
        "token": ({"api_token": TOKEN, "admin_token": ""}, "/ask", {}, "unauthorized"),
        "type": ({}, "/ask", UNREAD, "unsupported_media_type"),
        "size": ({"max_body_bytes": 5}, "/ask", {}, "body_too_large"),
        "JSON": ({}, "/ask", {"content": b"{", "headers": JSON}, "invalid_json"),
        "field": ({}, "/ask", {"json": {"prompt": " "}}, "invalid_request"),
        "model": ({}, "/ask", {"json": ASK | {"model": "gpt-other"}}, "invalid_request"),
        "v1 model": ({}, "/v1/chat/completions", {"json": CHAT_BODY}, "model_not_found"),
        "key": ({"openai_api_key": ""}, "/ask", {}, "not_configured"),
        "rate": ({"rate_limit": 1}, "/ask", {}, "too_many_asks"),
        "budget": ({"daily_tokens": 1}, "/ask", {}, "budget_exhausted"),
    },
)
async def test_a_refused_ask_is_counted_once_under_its_code(start, settings, path, refused, code):
    client = await start(**settings)
    if code in {"too_many_asks", "budget_exhausted"}:
        assert (await client.post("/ask", json=ASK)).status_code == 200
    asked = refused if {"json", "content"} & refused.keys() else refused | {"json": ASK}
    response = await client.post(path, **asked)
    assert f'"{code}"' in response.text
    headers = {"Authorization": f"Bearer {TOKEN}"}
    found = samples((await client.get("/metrics", headers=headers)).text)
    assert by_label(found, "openai_backend_refused_total", "code") == {code: 1}
    counted = sum(by_label(found, "openai_backend_asks_total", "outcome").values())
    assert counted == (code in {"too_many_asks", "budget_exhausted"})
    assert "gpt-other" not in str(found)


async def test_a_body_that_does_not_come_is_refused_and_one_that_is_left_is_not(start):
    client = await start(client_timeout=0.05)
    head = "POST /ask HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    body = "Content-Length: 50\r\n\r\n{"
    assert await raw(client, head + body) == "request_timeout"
    client = await start()
    _, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    writer.write(f"{head}{body}".encode())
    await writer.drain()
    assert not by_label(await scrape(client), "openai_backend_refused_total", "code")
    writer.close()
    await writer.wait_closed()
    for _ in range(5):
        assert not by_label(await scrape(client), "openai_backend_refused_total", "code")


async def test_an_ask_without_a_free_place_is_a_refused_one(start):
    client = await start(stream(chunk("Ho"), Call.hang), max_concurrent_asks=1)
    async with asking(client) as wire:
        await wire.write()
        for _ in range(2):
            problem(await client.post("/ask", json=ASK), "overloaded")
        found = await scrape(client)
    assert by_label(found, "openai_backend_refused_total", "code") == {"overloaded": 2}
    assert found["openai_backend_asks_active", frozenset()] == 1


async def test_model_labels_come_from_the_settings_whatever_an_upstream_or_a_caller_says(start):
    names = ('caf\u00e9 "4o" \\ {x}', "gpt-second")
    client = await start(openai_model=names[0], openai_models=names[1:])
    for model in (*names, "gpt-made-up"):
        await client.post("/ask", json=ASK | {"model": model}, headers={"X-Request-ID": "made-up"})
    for path in ("/made-up", "/v1/made-up", "/ask?made-up=1"):
        await client.get(path)
    text = (await client.get("/metrics")).text
    found = by_label(samples(text), f"{DURATION}_count", "gen_ai_request_model")
    # The format's three escapes are for the backslash, the quote and the line feed.
    assert found == {'caf\u00e9 \\"4o\\" \\\\ {x}': 1, "gpt-second": 1}
    assert not re.search("gpt-real|made-up", text)


@pytest.mark.parametrize("level", ["DEBUG", "INFO"])
async def test_a_scrape_writes_no_event(start, level):
    client = await start(log_level=level)
    before = await load(client)
    await scrape(client)
    await scrape(client)
    assert await load(client) == before


@cases(
    "values, expected",
    {
        "none": ([], [0, 0, 0, 0.0, 0]),
        "on a bound": ([1, 4.0], [1, 2, 2, 5.0, 2]),
        "between": ([0, 1.5], [1, 2, 2, 1.5, 2]),
        "above all": ([5, 10**12], [0, 0, 2, 10**12 + 5, 2]),
    },
)
def test_a_histogram_counts_what_is_at_most_a_bound(values, expected):
    counted = Histogram((1.0, 4.0))
    for value in values:
        counted.observe(value)
    lines = list(counted.lines("size", 'a="b"'))
    assert [float(line.rpartition(" ")[2]) for line in lines] == expected
    bounds = ['le="1"', 'le="4"', 'le="+Inf"']
    names = [*(f'size_bucket{{a="b",{bound}}}' for bound in bounds), 'size_sum{a="b"}']
    assert [line.rpartition(" ")[0] for line in lines] == [*names, 'size_count{a="b"}']


def test_the_exposition_tells_the_counters_and_codes_as_they_are():
    metrics = Metrics()
    for code in ("invalid_json", "overloaded", "overloaded"):
        metrics.count_refused(code)
    metrics.observe(TOKENS, 5, "m", "gen_ai_token_type", "input")
    found = samples(
        "\n".join(metrics.exposition(AskCounts(active=2, total=9, failed=3, cancelled=1)))
    )
    named = {name: value for (name, labels), value in found.items() if not labels}
    assert named == {
        "openai_backend_asks_active": 2,
        "process_start_time_seconds": pytest.approx(metrics.started, abs=0.001),
    }
    outcomes = by_label(found, "openai_backend_asks_total", "outcome")
    assert outcomes == {"finished": 3, "cancelled": 1, "failed": 3}
    refused = by_label(found, "openai_backend_refused_total", "code")
    assert refused == {"invalid_json": 1, "overloaded": 2}
    assert by_label(found, f"{TOKENS}_sum", "gen_ai_request_model") == {"m": 5}


def jwt(secret: str, **claims: object) -> str:
    """A JSON Web Token, valid for a minute."""

    def encoded(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).decode().rstrip("=")

    parts = {"alg": "HS256"}, {"exp": time.time() + 60, **claims}
    signed = ".".join(encoded(json.dumps(part).encode()) for part in parts)
    digest = hmac.digest(secret.encode(), signed.encode(), hashlib.sha256)
    return f"{signed}.{encoded(digest)}"


@pytest.mark.parametrize("asked_to_stream", [True, False])
async def test_a_closing_event_tells_usage_user_and_what_was_ignored(start, asked_to_stream):
    usage = THREE_FIGURES | {"completion_tokens_details": {"reasoning_tokens": 2}}
    refusal = refused("no", code="unsupported_parameter", param="temperature")
    last = chunk(finish_reason="stop", usage=usage) + DONE
    plain = completion("Hola") | {"usage": usage}
    good = stream(chunk("Hola"), last, Call.end) if asked_to_stream else replies(200, plain)
    secret = "s" * 32
    client = await start(replies(400, refusal), good, jwt_secret=secret, admin_token=TOKEN)
    headers = {"Authorization": f"Bearer {jwt(secret, sub='ana@example.com')}"}
    for ask in (ASK | {"temperature": 0.7}, ASK):
        sent = ask | {"stream": asked_to_stream}
        assert (await client.post("/ask", json=sent, headers=headers)).status_code == 200
    client.headers["Authorization"] = f"Bearer {TOKEN}"
    adapted, plainly = (event["metadata"] for event in await closings(client, 2))
    figures: dict[str, object] = {
        "prompt_tokens": 12,
        "completion_tokens": 3,
        "reasoning_tokens": 2,
    }
    figures |= {"tokens_used": 15, "user": "ana@example.com"}
    assert adapted == adapted | figures | {"ignored": ["temperature"]}
    assert plainly == plainly | figures
    assert "ignored" not in plainly


def ring(capacity: int = 100, secret: str = "hunter22") -> EventLog:
    return EventLog(capacity, re.compile(secret))


def logged(sink: EventLog, *names: str, level: str = "info", **more: object) -> None:
    for name in names:
        sink(None, level, {"timestamp": "2026-01-04T12:00:00.123456Z", "event": name, **more})


async def names(source: EventLog | LogDatabase, level: str | None = None, limit: int = 1000) -> Any:
    return [event["message"] for event in await source.tail(level=level, limit=limit)]


async def test_the_ring_keeps_the_newest_filters_and_then_limits():
    sink = ring(4)
    logged(sink, "a", "b", level="error")
    logged(sink, "c", "d", "e")
    assert await names(sink) == ["b", "c", "d", "e"]
    assert await names(sink, "ERROR") == ["b"]
    assert await names(sink, "INFO", 2) == ["d", "e"]
    assert [(number, event["message"]) for number, event in sink.since(3)] == [(4, "d"), (5, "e")]
    assert (sink.since(5), len(sink.since(0))) == ([], 4)


@cases(
    "value, kept",
    {
        "secret": ("my hunter22 here", "my *** here"),
        "in bytes": (b"hunter22", "b'***'"),
        "in a list": (("a", ["hunter22"]), ["a", ["***"]]),
        "in a dict": ({"hunter22": {1: "hunter22"}}, {"***": {"1": "***"}}),
        "numbers": ([1, 1.5, True, None], [1, 1.5, True, None]),
        "no number of JSON": ([math.inf, math.nan], ["inf", "nan"]),
        "long": ("x" * 2001, f"{'x' * 997} [...] {'x' * 996}"),
        "long list": (list(range(101)), list(range(100))),
    },
)
async def test_the_ring_masks_and_cuts_values_and_keeps_their_shape(value, kept):
    sink = ring()
    logged(sink, "a", value=value)
    (event,) = await sink.tail(level=None, limit=1)
    assert event["metadata"] == {"value": kept}


def rows(path: Path) -> list[Any]:
    """The events in the file at *path*, in the order in which they were written."""
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        found = connection.execute("SELECT event FROM events ORDER BY id").fetchall()
    return [json.loads(event) for (event,) in found]


async def stored(path: Path, enough: Callable[[list[str]], object]) -> list[str]:
    """The messages in the file at *path*, as soon as they are *enough*."""
    messages: list[str] = []
    async with asyncio.timeout(10):
        while not enough(messages):
            await asyncio.sleep(0.01)
            try:
                messages = [event["message"] for event in rows(path)]
            except sqlite3.Error:  # there is no such file yet, or it is locked
                messages = []
    return messages


@contextmanager
def locked(path: Path, *pragmas: str) -> Iterator[None]:
    """The file at *path* in the hands of somebody else."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}").fetchall()
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.rollback()


async def test_events_outlive_the_process_however_it_ends_and_a_stop_loses_none(tmp_path):
    path = tmp_path / "log.db"
    env = {"OPENAI_API_KEY": "demo", "API_PORT": "0", "LOG_DATABASE": str(path)}
    shown: list[Any] = []
    for end in (signal.SIGKILL, signal.SIGTERM):
        async with launched(SERVICE, cwd=tmp_path, **env) as running:
            kept = await load(running.client)
            assert [event["message"] for event in kept[: len(shown)]] == shown
            await running.client.post("/ask", json={"prompt": "/empty"})
            await stored(path, lambda now: now[len(shown) :].count("ask finished") == 1)  # noqa: B023
            running.process.send_signal(end)
            shown += [event["message"] for event in await running.ended()]
    assert shown[-1].startswith("Finished server process")
    assert [event["message"] for event in rows(path)] == shown


@asynccontextmanager
async def two_workers(cwd: Path, **env: str) -> AsyncIterator[str]:
    """The URL of a service in two processes, both of which have ended after the block."""
    async with python(*UVICORN, "--workers", "2", cwd=cwd, **env) as child:
        assert child.stderr
        line = (await child.stderr.readuntil(b"Press CTRL+C")).decode()
        try:
            yield re.findall(r"http://[\w.:]+", line)[-1]
        finally:
            child.terminate()  # a parent that is killed leaves its workers behind
            await child.communicate()


async def test_workers_share_one_file_and_each_answers_with_the_events_of_all(tmp_path):
    path, asked = tmp_path / "log.db", {f"ask-{number}" for number in range(8)}
    async with two_workers(tmp_path, OPENAI_API_KEY="demo", LOG_DATABASE=str(path)) as url:
        await stored(path, lambda now: now.count("Application startup complete.") == 2)
        for request_id in asked:
            headers = {"X-Request-ID": request_id}
            async with DefaultAsyncHttpxClient(base_url=url, headers=headers) as client:
                assert (await client.post("/ask", json={"prompt": "/empty"})).status_code == 200
        messages = await stored(path, lambda now: now.count("ask finished") == 8)
        for _ in range(6):  # each a connection of its own, which either worker may take
            async with Client(base_url=url) as client:
                kept = await load(client)
            assert [event["message"] for event in kept] == messages
        assert asked <= {(each["metadata"] or {}).get("request_id") for each in kept}
    ended = [event["message"] for event in rows(path)]
    assert len([each for each in ended if each.startswith("Finished server process")]) == 2


@asynccontextmanager
async def opened(path: Path, *rings: EventLog) -> AsyncIterator[list[LogDatabase]]:
    """The file at *path*, as processes with these *rings* would have it open."""
    databases = [LogDatabase(str(path), each) for each in rings]
    yield databases
    for each in databases:
        each.close()


def log_to(ring: EventLog, database: LogDatabase, *names: str, **more: Any) -> None:
    """Log *names* through both, as configure_logging has them."""
    for name in names:
        logged(ring, name, **more)
        database(None, "info", {})


@pytest.mark.parametrize("name", ["log.db", "a b%20c.db", "a?b#c&d.db", "\u00e9\U0001f600.db"])
async def test_the_file_answers_with_the_newest_of_all_filtered_and_then_limited(tmp_path, name):
    path, ours, theirs = tmp_path / name, ring(5), ring(5)
    async with opened(path, ours, theirs) as (one, other):
        log_to(ours, one, "a", "b", level="error")
        await stored(path, lambda now: len(now) == 2)
        log_to(theirs, other, "c")
        await stored(path, lambda now: len(now) == 3)
        log_to(ours, one, "d", "e", "f")
        # Whether or not they have been written yet.
        assert await names(one) in (list("abcdef")[-5:], list("abcdef"))
        assert await names(one, limit=2) == ["e", "f"]
        await stored(path, lambda now: now == list("bcdef"))
        for source in (one, other):
            assert await names(source) == list("bcdef")
            assert await names(source, limit=2) == ["e", "f"]
            assert await names(source, "ERROR") == ["b"]
            assert await names(source, "ERROR", 1) == ["b"]
            assert await names(source, "INFO", 3) == ["d", "e", "f"]
    assert os.listdir(tmp_path) == [name], "closed in good order"


async def test_an_answer_while_the_file_is_being_written_is_never_out_of_order(tmp_path):
    path, ours = tmp_path / "log.db", ring(1000)
    async with opened(path, ours) as (database,):
        for number in range(300):
            log_to(ours, database, str(number))
            assert await names(database, limit=3) == [
                str(each) for each in range(max(0, number - 2), number + 1)
            ]
        await stored(path, lambda now: now == [str(each) for each in range(300)])


async def test_there_are_never_more_rows_than_the_buffer_holds_and_the_file_stops_growing(tmp_path):
    path, ours = tmp_path / "log.db", ring(20)
    more = {f"key-{number}": "x" * 2000 for number in range(20)}
    async with opened(path, ours) as (database,):
        sizes, written = [], 0
        for batch in range(30):
            for number in range(20):
                log_to(ours, database, f"{batch}.{number}", **more)
            messages = await stored(path, lambda now: now[-1:] == [f"{batch}.19"])  # noqa: B023
            assert len(messages) == 20
            written += 20 * 40_000
            sizes.append(sum(each.stat().st_size for each in tmp_path.iterdir()))
    assert written > 2 * max(sizes)
    assert max(sizes[15:]) <= 1.3 * max(sizes[:15])


async def test_the_answer_is_no_longer_than_the_buffer_while_events_wait(tmp_path):
    path, ours = tmp_path / "log.db", ring(5)
    async with opened(path, ours) as (database,):
        for number in range(5):
            log_to(ours, database, str(number))
        await stored(path, lambda now: len(now) == 5)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for number in range(5, 8):
                log_to(ours, database, str(number))
            told = await database.tail(level=None, limit=1000)
    assert [event["message"] for event in told] == ["3", "4", "5", "6", "7"]


async def test_nothing_secret_is_in_the_file(start, tmp_path):
    path, secret = tmp_path / "log.db", "s" * 40
    settings = {"api_token": TOKEN, "admin_token": "admin-token-1", "jwt_secret": secret}
    settings |= {"system_prompt": "XYLOPHONE", "log_level": "DEBUG", "log_database": str(path)}
    scripts = stream(chunk("ZYZZYVA") + DONE, Call.end), replies(401, refused(f"no: {KEY}"))
    client = await start(*scripts, replies(400, refused(f"ZYZZYVA {KEY}")), **settings)
    users = jwt(secret, sub="ana"), jwt("t" * 32, sub="ana")
    for token in (TOKEN, "admin-token-1", *users, TOKEN):
        headers = {"Authorization": f"Bearer {token}"}
        await client.post("/ask", json={"prompt": "QUOKKAS"}, headers=headers)
    structlog.get_logger().error(f"failed with {KEY} and {users[0]}", header=f"Bearer {users[1]}")
    await stored(path, lambda now: now[-1:] == ["failed with *** and ***"])
    found = b"".join(each.read_bytes() for each in tmp_path.iterdir())
    assert found.count(b"ask f") >= 3
    tokens = [user.rpartition(".")[2] for user in users]
    for each in (KEY, TOKEN, "admin-token", secret, *tokens, "XYLOPHONE", "ZYZZYVA", "QUOKKAS"):
        assert each.encode() not in found


def other_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, text TEXT)")


UNUSABLE: dict[str, Callable[[Path], object]] = {
    "its directory is missing": lambda path: path.parent.rmdir(),
    "a directory": Path.mkdir,
    "a text": lambda path: path.write_text("This is my diary, and no database.\n" * 100),
    "a short text": lambda path: path.write_text("diary"),
    "bytes": lambda path: path.write_bytes(bytes(range(256)) * 64),
    "a database with other events": other_table,
}


@cases("prepare", UNUSABLE)
def test_a_path_that_cannot_be_used_is_told_in_one_line_and_left_as_it_is(tmp_path, prepare):
    path = tmp_path / "sub" / "log.db"
    path.parent.mkdir()
    prepare(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(ConfigError) as told:
        LogDatabase(str(path), ring())
    message = str(told.value)
    assert re.fullmatch(r"LOG_DATABASE: '.*/log\.db' .+", message)
    assert before == (path.read_bytes() if path.is_file() else None)


@pytest.mark.parametrize("kind", ["text", "read-only"])
async def test_a_path_that_cannot_be_used_stops_the_start(tmp_path, kind):
    path = tmp_path / "log.db"
    if kind == "text":
        path.write_text("This is my diary, and no database.\n" * 100)
    else:
        LogDatabase(str(path), ring()).close()
        path.chmod(0o444)
    # Even root must obey the permissions of the file.
    obedient = ("setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner")
    command = (*(obedient if os.geteuid() == 0 else ()), sys.executable, SERVICE)
    env = {"OPENAI_API_KEY": "demo", "API_PORT": "0", "LOG_DATABASE": str(path)}
    execute = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
    code, out, errors = await finished("-c", execute, *command, cwd=tmp_path, **env)
    assert (code, out, len(errors)) == (2, "", 1)
    assert errors[0].startswith("LOG_DATABASE: ")


async def test_a_file_that_is_locked_neither_fails_nor_holds_up_an_ask(start, tmp_path):
    path, pieces = tmp_path / "log.db", 60
    heard = asyncio.Event()

    async def in_step(call: Call) -> None:
        await call.start()
        for _ in range(pieces):
            structlog.get_logger().info("step")
            await call.say("la")
            await heard.wait()
            heard.clear()
        await call.write(DONE)
        await call.end()

    client = await start(in_step, answer, log_database=str(path))
    await stored(path, lambda now: "Application startup complete." in now)
    with locked(path):
        began = time.monotonic()
        async with asking(client) as wire:
            for _ in range(pieces):
                await wire.write()
                heard.set()
            await wire.rest()
        for _ in range(5):
            assert (await client.post("/ask", json=ASK)).status_code == 200
        assert time.monotonic() - began < 6, "or each event has waited for the lock"
        kept = [event["message"] for event in await load(client)]
        assert (kept.count("step"), kept.count("ask finished")) == (pieces, 6)
        assert "step" not in {event["message"] for event in rows(path)}
    assert await stored(path, lambda now: now.count("ask finished") == 6) == kept


@cases(
    "prepare, pragmas",
    {
        "new": (lambda path: None, ()),
        "in use": (lambda path: LogDatabase(str(path), ring()).close(), ()),
        "readers too": (lambda path: None, ("locking_mode = EXCLUSIVE", "journal_mode = WAL")),
    },
)
async def test_a_file_that_is_locked_at_the_start_is_written_later(
    start, tmp_path, prepare, pragmas
):
    path = tmp_path / "log.db"
    prepare(path)
    with locked(path, *pragmas):
        client = await start(log_database=str(path))
        assert (await client.post("/ask", json=ASK)).status_code == 200
        kept = [event["message"] for event in await load(client)]
        assert kept[-1] == "ask finished"
    assert await stored(path, lambda now: "ask finished" in now) == kept


async def test_a_lock_that_outlasts_the_service_does_not_hold_up_its_end(tmp_path):
    path = tmp_path / "log.db"
    env = {"OPENAI_API_KEY": "demo", "API_PORT": "0", "LOG_DATABASE": str(path)}
    async with launched(SERVICE, cwd=tmp_path, **env) as running:
        await stored(path, lambda now: "Application startup complete." in now)
        with locked(path):
            for _ in range(50):
                await running.client.post("/ask", json={"prompt": "/empty"})
                await asyncio.sleep(0.1)  # so that tries and events meet at all times
            running.process.send_signal(signal.SIGINT)
            async with asyncio.timeout(4):
                ended = await running.ended()
    assert [event["message"] for event in ended].count("ask finished") == 50


def replaced(path: Path, data: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(data)
    other.replace(path)


def replaced_by_a_copy(path: Path) -> None:
    with closing(sqlite3.connect(path)) as theirs:
        theirs.execute(f"VACUUM INTO '{path}.copy'")
    Path(f"{path}.copy").replace(path)


GARBAGE = b"This is no database. " * 1000


@cases(
    "harm, remedy",
    {
        "deleted": (Path.unlink, None),
        "deleted with its -wal and -shm": (
            lambda path: [each.unlink() for each in path.parent.glob("log.db*")],
            None,
        ),
        "moved away": (lambda path: path.rename(f"{path}.old"), None),
        "replaced by an empty file": (lambda path: replaced(path, b""), None),
        "replaced by a copy": (replaced_by_a_copy, None),
        "replaced by garbage": (lambda path: replaced(path, GARBAGE), Path.unlink),
        "emptied": (lambda path: path.write_bytes(b""), Path.unlink),
        "overwritten with garbage": (lambda path: path.write_bytes(GARBAGE), Path.unlink),
        "its directory removed": (
            lambda path: shutil.rmtree(path.parent),
            lambda path: path.parent.mkdir(),
        ),
    },
)
async def test_a_file_that_is_taken_away_loses_nothing(start, tmp_path, harm, remedy):
    path = tmp_path / "sub" / "log.db"
    path.parent.mkdir()
    client = await start(log_database=str(path))
    await client.post("/ask", json=ASK)
    await stored(path, lambda now: now.count("ask finished") == 1)
    harm(path)
    assert [event["message"] for event in await load(client)].count("ask finished") == 1
    for count in (2, 3):
        assert (await client.post("/ask", json=ASK)).status_code == 200
        kept = [event["message"] for event in await load(client)]
        assert kept.count("ask finished") == count
    if remedy:
        remedy(path)
    assert await stored(path, lambda now: now.count("ask finished") == 3) == kept
    await client.post("/ask", json=ASK)
    assert await stored(path, lambda now: now.count("ask finished") == 4) == [*kept, kept[-1]]
    assert await load(client) == rows(path)


async def test_a_full_disk_fails_no_ask_and_what_waited_is_written_when_there_is_room(tmp_path):
    path = tmp_path / "log.db"
    env = {"OPENAI_API_KEY": "demo", "API_PORT": "0", "LOG_DATABASE": str(path)}
    async with launched(SERVICE, cwd=tmp_path, **env) as running:
        await stored(path, lambda now: "Application startup complete." in now)
        written = (tmp_path / "log.db-wal").stat().st_size
        full = resource.RLIMIT_FSIZE, (written, resource.RLIM_INFINITY)
        resource.prlimit(running.process.pid, *full)
        for _ in range(5):
            response = await running.client.post("/ask", json={"prompt": "/empty"})
            assert events(response.content)[-1] == "[DONE]"
        kept = [event["message"] for event in await load(running.client)]
        assert kept.count("ask finished") == 5
        await asyncio.sleep(0.3)  # so that a try has failed, and another one must come
        assert "ask finished" not in {event["message"] for event in rows(path)}
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, unlimited)
        assert await stored(path, lambda now: now.count("ask finished") == 5) == kept
        running.process.send_signal(signal.SIGTERM)
        assert [event["message"] for event in await running.ended()][: len(kept)] == kept


@cases(
    "prompt, code",
    {
        "new line": ("/error 429\nplease", "rate_limited"),
        "two blanks": ("/error  429", "rate_limited"),
        "no number": ("/error soon", None),
    },
)
async def test_a_word_of_the_demo_model_ends_at_any_white_space(start, prompt, code):
    client = await start(openai_api_key="demo")
    response = await client.post("/ask", json={"prompt": prompt, "stream": False})
    assert response.json().get("code") == code


async def test_tools_and_their_arguments_count_where_no_figure_came(start):
    call = {"function": {"name": "f", "arguments": "x" * 400}}
    delta_of_call = json.dumps({"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]})
    script = stream(f"data: {delta_of_call}\n\n".encode(), Call.close)
    tools = [{"type": "function", "function": {"name": "f", "description": "y" * 400}}]
    chat = {"messages": [{"role": "user", "content": "Hola"}], "tools": tools, "stream": True}
    for limit, code in ((200, 429), (300, 200)):
        client = await start(script, answer, daily_tokens=limit)
        await client.post("/v1/chat/completions", json=chat)
        await closings(client)
        assert (await client.post("/ask", json=ASK)).status_code == code
