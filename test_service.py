"""The promises of the service, over real sockets.

Every test speaks to a real uvicorn over a real socket; behind it stands the real HTTP client, and
behind that an upstream whose bytes the test writes one by one. What only a process of its own can
show (its start, its stop, its output, its memory) is marked `processes`; without these tests
(`pytest -m "not processes"`) a run takes about half a minute. What mostly waits is `overlapping`:
the first of these tests takes the time of all, and each fails for itself.

The helpers stand first, a speaker at a time: the upstream, the service, its clients, what they
say, and processes. The tests follow the order of the contract.
"""

import asyncio
import base64
import gc
import gzip
import hashlib
import hmac
import http.client
import inspect
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
import ssl
import struct
import sys
import time
import tomllib
import zlib
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from typing import Any, NoReturn, cast
from unittest.mock import ANY

import httpx2
import openai
import pytest
import structlog
import uvicorn
from dotenv import dotenv_values
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import service
from service import ConfigError, Settings

HERE = Path(__file__).parent
SERVICE = str(HERE / "service.py")
UVICORN = ("-m", "uvicorn", "service:app", "--port", "0")
KEY = "sk-test-0123456789"
TOKEN = "correct-horse-battery"
ADMIN = "admin-of-the-battery"
SECRET = "a secret that has more than 32 bytes"
PAGE = "http://localhost:4200"  # a browser app that may call by default
MODEL = "gpt-5.4-mini"
JSON = {"Content-Type": "application/json"}
AS_TEXT = {"Accept": "text/plain"}
TURN = {"role": "user", "content": "Hola"}
TURNS: list[Any] = [TURN]
ASK = {"prompt": "Hola"}
PLAIN = {"prompt": "Hola", "stream": False}
FULL = {"prompt": "Hola", "temperature": 0.7, "max_tokens": 9}
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": MODEL, "messages": TURNS}
STREAMED = {**BODY, "stream": True}
OLD, NEW, HEAT = "max_tokens", "max_completion_tokens", "temperature"
MIB = 2**20
PING = b": ping\n\n"
NOTHING_YET = {"active": 0, "total": 0, "failed": 0, "cancelled": 0}
STREAM_HEADERS = {
    "content-type: text/event-stream; charset=utf-8",
    "cache-control: no-cache, no-transform",
    "x-accel-buffering: no",
}
CLOSINGS = {"ask finished", "ask cancelled", "ask failed"}
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
PATHS = pytest.mark.parametrize("path", ["/ask", CHAT])


def cases(names: str, table: dict[str, Any]) -> pytest.MarkDecorator:
    """A parametrize whose cases have names."""
    return pytest.mark.parametrize(names, table.values(), ids=table.keys())


# The upstream.


@dataclass
class Call:
    """One request that the upstream got, and the connection to answer it on.

    A test says in a *script* what the upstream does with a call. A script is a function of the
    call; each method here that takes nothing else is one, such as `Call.hang`. Longer ones are put
    together:

        play(a, b, ...)        the steps one after the other: a script, or bytes for one HTTP chunk
        stream(a, b, ...)      the same after the head of a 200 with an event stream
        says(a, b, ...)        the same, with the end mark and the proper end behind it
        replies(400, body)     a whole answer
        waits(event)           a step that waits for an event of the test

    `start(script, script, ...)` and `upstream.script(...)` make the upstream play one script for
    each call, and the last one for all further calls. So
    `stream(chunk("Ho"), Call.reset)` is an answer that is lost after two letters, and
    `start(replies(503), answer)` an upstream that works at the second try.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    left: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False

    @property
    def prompt(self) -> str:
        """What the caller said last."""
        match self.body:
            case {"messages": [*_, {"content": str(text)}]} | {"input": str(text)}:
                return text
        return ""

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


def piece(finish_reason: object = None, index: int = 0, **part: object) -> bytes:
    """One upstream event with this *part* of an answer in its delta."""
    return chunk(None, finish_reason=finish_reason, index=index, delta=part)


def chunk(text: str | None = None, /, **more: Any) -> bytes:
    """One upstream event; *more* goes beside `choices`, what belongs to the choice into it."""
    choice = {"index": 0, "delta": {} if text is None else {"content": text}}
    choice |= {"finish_reason": None}
    choice |= {name: more.pop(name) for name in ("index", "delta", "finish_reason") & more.keys()}
    return event({"model": "gpt-real", "choices": [choice], **more})


def event(data: object) -> bytes:
    """One upstream event of this JSON, compact, as OpenAI writes it."""
    return b"data: %b\n\n" % json.dumps(data, separators=(",", ":")).encode()


def message(**part: object) -> dict[str, Any]:
    """A plain answer of the upstream with this *part* in its message."""
    choice = {"index": 0, "message": part, "finish_reason": "stop"}
    return {"model": "gpt-real", "choices": [choice], "usage": {"total_tokens": 7}}


def completion(text: str, **more: object) -> dict[str, Any]:
    """A plain answer of the upstream that says *text*; *more* goes beside `choices`."""
    return message(role="assistant", content=text) | more


def refused(message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error body as OpenAI writes it."""
    return {"error": {"message": message, "code": code, "param": param, "type": "x"}}


HOLA = chunk("Hola")
STOP = chunk(finish_reason="stop")
USAGE = b'data: {"choices":[],"usage":{"total_tokens":7}}\n\n'
FINISH = STOP + USAGE
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error":{"message":"SECRET","code":500}}\n\n'
HALF = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
HTML = b"<html><h1>SECRET</h1></html>"


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


def says(*steps: bytes | Script) -> Script:
    """A whole stream of *steps*, with its end mark and its proper end."""
    return stream(*steps, DONE, Call.end)


def replies(status: int, body: object = b"", **headers: str) -> Script:
    return lambda call: call.reply(status, body, **headers)


def waits(go: asyncio.Event | asyncio.Barrier) -> Script:
    """A step that waits until the test says *go*."""
    return lambda _: go.wait()


async def pause(call: Call) -> None:
    await asyncio.sleep(0.3)  # three heartbeats, where they are as frequent as can be


async def cut(call: Call) -> None:
    await call.raw(HALF)
    await call.close()


async def half(call: Call) -> None:
    await call.raw(HALF)
    await call.hang()


async def garbage(call: Call) -> None:
    await call.raw(b"\x00\xffSECRET that is no HTTP\r\n\r\n")
    await call.close()


async def unsized(call: Call) -> None:
    """A stream without a length: it ends where the connection does."""
    await call.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
    await call.raw(chunk("Hola") + FINISH)
    await call.close()


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
                async with asyncio.timeout(0.3):
                    await call.say(self.piece)
        self.blocked.set()
        await self.then(call)


def zipped(data: object) -> bytes:
    return gzip.compress(json.dumps(data).encode())


@dataclass
class Upstream:
    """An OpenAI-compatible server that plays scripts, one a call, and the last one for ever."""

    url: str = ""
    scripts: list[Script] = field(default_factory=lambda: [answer])
    calls: list[Call] = field(default_factory=list)
    called: asyncio.Event = field(default_factory=asyncio.Event)
    parts: "dict[str, Upstream]" = field(default_factory=dict)

    def script(self, *scripts: Script) -> None:
        """What the upstream does with the calls from now on."""
        self.scripts = [*scripts]

    def part(self, prompt: str) -> "Upstream":
        """What has calls and scripts of its own: all that is asked with this *prompt*."""
        return self.parts.setdefault(prompt, Upstream(self.url))

    @property
    def bodies(self) -> list[Any]:
        """What it was asked so far."""
        return [call.body for call in self.calls]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = head[0].split(" ")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                data = await reader.readexactly(int(headers.get("content-length", 0)))
                body = json.loads(data) if data else None
                call = Call(method, path, headers, body, reader, writer)
                part = self.parts.get(call.prompt, self)
                part.calls.append(call)
                part.called.set()
                script = part.scripts[0] if len(part.scripts) == 1 else part.scripts.pop(0)
                await script(call)
                call.over = True
        writer.close()


@asynccontextmanager
async def listening() -> AsyncIterator[Upstream]:
    """An upstream at a free port."""
    fake = Upstream()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield fake
    finally:
        server.close()


@asynccontextmanager
async def fresh(fake: Upstream) -> AsyncIterator[Upstream]:
    """The upstream, which has heard nothing yet and answers "Hola"."""
    fake.calls, fake.called, fake.parts = [], asyncio.Event(), {}
    fake.script(answer)
    try:
        yield fake
    finally:
        fake.script(answer)
        calls = (call for part in (fake, *fake.parts.values()) for call in part.calls)
        for call in calls:
            if not call.over:
                call.abort()


@pytest.fixture(scope="session")
async def heard() -> AsyncIterator[Upstream]:
    """The upstream of all tests that stand alone."""
    async with listening() as fake:
        yield fake


@pytest.fixture
async def upstream(heard: Upstream) -> AsyncIterator[Upstream]:
    async with fresh(heard) as fake:
        yield fake


@pytest.fixture
def proxy(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> Upstream:
    """The upstream, reached at the address of any host but 127.0.0.1."""
    monkeypatch.setenv("HTTP_PROXY", upstream.url.removesuffix("/v1"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return upstream


# The service.


@pytest.fixture(scope="session", autouse=True)
def _few_certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One certificate to trust: to read all of them is half the time of a start."""
    (first, *_) = ssl.create_default_context().get_ca_certs(binary_form=True) or (b"",)
    path = tmp_path_factory.mktemp("certificates") / "one.pem"
    path.write_text(ssl.DER_cert_to_PEM_cert(first))
    with pytest.MonkeyPatch.context() as patch:
        if first:
            patch.setenv("SSL_CERT_FILE", str(path))
        yield


@asynccontextmanager
async def serve(app: ASGIApp) -> AsyncIterator[str]:
    """Run *app* under a real server on a free loopback port; yields its base URL."""
    config = uvicorn.Config(app, port=0, log_config=None)
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
    """A client that waits at most 30 seconds for a whole answer.

    That of a *row* (see `at_once`) has it as its request ID, and as its prompt instead of "Hola".
    """

    def __init__(self, base_url: str, row: str = "", log: "Client | None" = None) -> None:
        headers = {"X-Request-ID": row} if row else {}
        super().__init__(base_url=base_url, timeout=30, verify=False, headers=headers)
        self.row, self.log = row, log or self

    def own(self, body: object) -> Any:
        """*body* with the prompt of the row, if this is the client of one."""
        if not self.row:
            return body
        return json.loads(json.dumps(body).replace('"Hola"', f'"{self.row}"'))

    def build_request(self, *args: Any, **kwargs: Any) -> Any:
        return super().build_request(*args, **kwargs | {"json": self.own(kwargs.get("json"))})

    async def request(self, *args: Any, **kwargs: Any) -> Any:
        async with asyncio.timeout(30):
            return await super().request(*args, **kwargs)


Start = Callable[..., Awaitable[Client]]


@asynccontextmanager
async def client_of(upstream: Upstream, **settings: Any) -> AsyncIterator[Client]:
    """A client of a service before *upstream*, with the usual settings but for these."""
    usual = {"openai_api_key": KEY, "openai_base_url": upstream.url}
    app = service.create_app(Settings(**{**usual, **settings}))
    async with serve(app) as url, Client(url) as client:
        yield client


creating = asyncio.Lock()  # since it takes the event loop, one service at a time


@asynccontextmanager
async def starter(upstream: Upstream) -> AsyncIterator[Start]:
    async with AsyncExitStack() as owned:

        async def started(*scripts: Script, **settings: Any) -> Client:
            upstream.script(*scripts or upstream.scripts)
            async with creating:
                return await owned.enter_async_context(client_of(upstream, **settings))

        yield started


@pytest.fixture
async def start(upstream: Upstream) -> AsyncIterator[Start]:
    """Start a service before an upstream that plays *scripts*, with other *settings* if need be."""
    async with starter(upstream) as started:
        yield started


@pytest.fixture(scope="session")
async def kept() -> AsyncIterator[tuple[AsyncExitStack, dict[str, Client]]]:
    """The services that tests share, by their settings."""
    async with AsyncExitStack() as owned:
        yield owned, {}


@pytest.fixture
async def shared(
    upstream: Upstream, kept: tuple[AsyncExitStack, dict[str, Client]]
) -> AsyncIterator[Start]:
    """As `start`, but for tests that look at no log, no count and nothing that is remembered.

    They share the services of one configuration (and whoever starts last has the log).
    """
    owned, clients = kept
    used = []

    async def started(*scripts: Script, **settings: Any) -> Client:
        upstream.script(*scripts or upstream.scripts)
        name = repr(settings)
        if name not in clients:
            service_of = client_of(upstream, **settings)
            clients[name] = await owned.enter_async_context(service_of)
        used.append(clients[name])
        return clients[name]

    yield started
    upstream.script(answer)
    for client in used:
        # What was left behind must not end, and be logged, during the next test.
        async with asyncio.timeout(30):
            while (await load(client, "/status"))["asks"]["active"]:
                pass


@pytest.fixture
async def client(shared: Start) -> Client:
    """A client of the service with the usual settings, which tests share."""
    return await shared()


@pytest.fixture(scope="session")
async def guarded() -> AsyncIterator[Client]:
    """A client of a service without a key: a page that may call, with the token."""
    app = service.create_app(Settings(api_token=TOKEN))
    async with serve(app) as url, Client(url) as client:
        client.headers |= {"Origin": PAGE, **bearer(TOKEN)}
        yield client


# What takes long, at the same time.

Test = Callable[..., Awaitable[None]]
OVERLAPPING: dict[str, Any] = {}
row_places, row_numbers = asyncio.Semaphore(16), itertools.count()


@asynccontextmanager
async def apart() -> AsyncIterator[dict[str, Any]]:
    """The fixtures of a test, or a row, that starts services beside others."""
    async with listening() as own, fresh(own) as upstream, starter(upstream) as start:
        yield {"upstream": upstream, "start": start, "shared": start}


def at_once(names: str, table: dict[str, Any], **settings: Any) -> Callable[[Test], Test]:
    """As `cases`, but one test checks all rows, some at a time; an error names its row.

    Each has an *upstream* of its own. Either it starts services before that, and looks at no log;
    or it has a *client* of the one service that all rows ask, with the row as its prompt and its
    request ID: by the one the upstream knows which scripts to play, by the other `closings` which
    events it is about.
    """
    columns = names.split(", ")

    def tested(check: Test) -> Any:
        wanted = {*inspect.signature(check).parameters}
        others = wanted - {"client", "start", "shared", "upstream", *columns}

        async def test(one: Client | None = None, **fixtures: Any) -> None:
            if "client" in wanted:
                one = one or await fixtures["start"](**settings)

            async def failure(name: str, row: Any) -> BaseException | None:
                given = fixtures | dict(zip(columns, row if columns[1:] else (row,), strict=True))
                try:
                    async with row_places, AsyncExitStack() as owned:
                        if one:
                            client = Client(str(one.base_url), f"row-{next(row_numbers)}", one.log)
                            given["client"] = await owned.enter_async_context(client)
                            given["upstream"] = fixtures["upstream"].part(client.row)
                        else:
                            given |= await owned.enter_async_context(apart())
                        await check(**{each: given[each] for each in wanted})
                except (Exception, pytest.fail.Exception) as exc:
                    exc.add_note(f"in the row {name!r}")
                    return exc
                return None

            found = await asyncio.gather(*(failure(*row) for row in table.items()))
            failed = [each for each in found if each]
            if failed:
                raise failed[0] if len(failed) == 1 else BaseExceptionGroup("rows", failed)

        made: Any = test
        made.__name__ = check.__name__
        made.settings = settings if "client" in wanted else None
        fixtures = others | ({"start", "upstream"} if "client" in wanted else set())
        by_name = inspect.Parameter.KEYWORD_ONLY
        made.__signature__ = inspect.Signature([inspect.Parameter(x, by_name) for x in fixtures])
        return made

    return tested


def crossed(names: Iterable[str], table: dict[str, Any]) -> dict[str, Any]:
    """Each row of *table* with each of *names*, which is its first column then."""
    both = itertools.product(names, table.items())
    return {f"{x}, {y}": (x, *(row if isinstance(row, tuple) else (row,))) for x, (y, row) in both}


def overlapping(test: Test) -> Test:
    """A test that mostly waits: all of these run at the same time, and each reports for itself.

    It has an upstream of its own, and looks at no log but for the `closings` of rows.
    """
    OVERLAPPING[test.__name__] = test

    async def report(overlapped: dict[str, asyncio.Task[None]]) -> None:
        await overlapped[test.__name__]

    return report


def processes(test: Test) -> Any:
    """A test that starts processes."""
    return pytest.mark.processes(overlapping(test))


@pytest.fixture(scope="session")
async def overlapped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, asyncio.Task[None]]:
    """The tests that were chosen among those that overlap; all have ended."""
    chosen = {item.name for item in request.session.items}
    # Those that take longest stand at the end of the file.
    tests = {name: test for name, test in reversed(OVERLAPPING.items()) if name in chosen}
    settings: dict[str, Any] = {x: getattr(test, "settings", None) for x, test in tests.items()}
    places = asyncio.Semaphore(4)

    async def run(test: Test) -> None:
        wanted = inspect.signature(test).parameters
        async with AsyncExitStack() as owned:
            given = await owned.enter_async_context(apart())
            if "tmp_path" in wanted:  # it starts processes
                await owned.enter_async_context(places)
                given["tmp_path"] = tmp_path_factory.mktemp("overlapping")
            await test(**{each: given[each] for each in wanted})

    alone = [name for name in tests if settings[name] is None]
    tasks = {name: asyncio.create_task(run(tests[name])) for name in alone}
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    # All services of a process write one log, that of the last.
    async with apart() as given:
        clients = {x: await given["start"](**settings[x]) for x in tests if x not in tasks}
        for name, client in clients.items():
            client.log = [*clients.values()][-1]
            test = tests[name](one=client, upstream=given["upstream"])
            tasks[name] = asyncio.create_task(test)
        await asyncio.gather(*tasks.values(), return_exceptions=True)
    return tasks


def inside(app: ASGIApp) -> Starlette:
    """The application in whatever middleware stands around it."""
    waiting: list[Any] = [app]
    seen = set()
    for each in waiting:
        if isinstance(each, Starlette):
            return each
        if id(each) not in seen:
            seen.add(id(each))
            waiting += gc.get_referents(each)
    raise AssertionError(app)


# Its clients.


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


async def code_of(client: Client, data: str | bytes) -> str:
    """The code of the problem that answers *data*, which need not be a whole request."""
    async with connection(client) as (reader, writer), asyncio.timeout(30):
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
        async with asyncio.timeout(30):
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
async def asking(
    client: Client, body: object = ASK, *headers: str, path: str = "/ask"
) -> AsyncIterator[Wire]:
    """An ask under way on a bare socket; its client leaves at the end of the block."""
    async with connection(client) as (reader, writer):
        named = f"X-Request-ID: {client.row or 'ask-1'}"
        writer.write(post(json.dumps(client.own(body)), named, *headers, path=path))
        yield Wire(reader, writer)


@asynccontextmanager
async def library(client: Client, key: str = "any") -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's own client, before the service of *client*."""
    url = str(client.base_url.join("/v1"))
    row = {"X-Request-ID": client.row} if client.row else {}
    usual: dict[str, Any] = {"max_retries": 0, "timeout": 30, "default_headers": row}
    async with AsyncOpenAI(base_url=url, api_key=key, **usual) as ai:
        yield ai


def chat(*messages: object, **fields: object) -> dict[str, object]:
    """A body for CHAT, whose last message is TURN."""
    return {"messages": [*messages, TURN], **fields}


def body_for(path: str, **fields: object) -> dict[str, object]:
    """A plain ask for *path*, /ask or CHAT, with further *fields*."""
    return {**PLAIN, **fields} if path == "/ask" else chat(**fields)


def base64url(data: str | bytes) -> str:
    data = data.encode() if isinstance(data, str) else data
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def signed(claims: str, header: str = '{"alg":"HS256"}', secret: str = SECRET) -> str:
    """A JSON Web Token of these texts, whatever they are."""
    parts = f"{base64url(header)}.{base64url(claims)}"
    return f"{parts}.{base64url(hmac.digest(secret.encode(), parts.encode(), 'sha256'))}"


def user_token(secret: str = SECRET, **claims: object) -> str:
    """A JSON Web Token of "ana", valid for ten minutes, with these further or other claims."""
    given = {"sub": "ana", "exp": int(time.time()) + 600, **claims}
    return signed(json.dumps(given), secret=secret)


def bearer(token: str, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}", **more}


# What they say.


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


def problem(response: Any, code: str) -> dict[str, Any]:
    """The body of *response*, which is the problem JSON of *code*, readable for a browser."""
    body: dict[str, Any] = response.json()
    assert (body["code"], f"{body['status']} {body['title']}") == (code, PROBLEMS[code])
    more = {"errors"} if code == "invalid_request" else set()
    assert body.keys() == {"title", "status", "detail", "code", "request_id"} | more
    assert body["status"] == response.status_code
    assert response.headers["content-type"] == "application/problem+json"
    assert body["request_id"] == response.headers["x-request-id"]
    assert " " in body["detail"] or code in {"upstream_rejected", "rate_limited"}, (
        "a sentence for a person"
    )
    if response.request.headers.get("origin") == PAGE:
        assert response.headers["access-control-allow-origin"] == PAGE
        exposed = response.headers["access-control-expose-headers"].lower()
        known = {"retry-after", "x-request-id", "x-should-retry"}
        assert known == set(re.split(", *", exposed))
    return body


def openai_error(response: Any, status: int, code: str) -> dict[str, Any]:
    """The error under `/v1`, in the shape of OpenAI's own."""
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (response.status_code, error["code"]) == (status, code)
    return error


def wrong_field(response: Any, path: str) -> str:
    """The one field that is wrong."""
    if path == "/ask":
        (error,) = problem(response, "invalid_request")["errors"]
        return str(error["field"])
    return str(openai_error(response, 422, "invalid_request")["param"])


async def load(client: Client, path: str = "/logs?limit=1000") -> Any:
    """What a GET of *path* answers."""
    response = await client.get(path)
    assert response.status_code == 200
    return response.json()


async def closings(client: Client, count: int = 1) -> list[Any]:
    """The closing events of *client* in the log, oldest first, as soon as there are *count*."""
    async with asyncio.timeout(30):
        while True:
            closed = [each for each in await load(client.log) if each["message"] in CLOSINGS]
            if client.row:
                closed = [x for x in closed if x["metadata"]["request_id"] == client.row]
            if len(closed) >= count:
                return closed


async def idle(client: Client) -> None:
    """Returns as soon as no ask is under way, and asks the upstream nothing."""
    async with asyncio.timeout(30):
        while "\nopenai_backend_asks_active 0\n" not in (await client.get("/metrics")).text:
            pass


async def cancelled(client: Client) -> None:
    """The one ask there was is over and counted as cancelled."""
    (closing,) = await closings(client)
    assert (closing["level"], closing["message"]) == ("WARNING", "ask cancelled")
    counts = (await load(client, "/status"))["asks"]
    assert counts == {"active": 0, "total": 1, "failed": 0, "cancelled": 1}


async def soon(event: asyncio.Event, limit: float = 10) -> None:
    async with asyncio.timeout(limit):
        await event.wait()


async def refusing_url() -> str:
    """A base URL at which nobody listens."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unheard.getsockname()[1]}/v1"


def conforms(value: Any, schema: Any, document: Any) -> bool:
    """Whether *value* is what *schema* says, without a key more, as far as *document* goes."""

    match schema:
        case {"$ref": str(ref)}:
            named = document["components"]["schemas"][ref.rpartition("/")[2]]
            return conforms(value, named, document)
        case {"anyOf": options} | {"oneOf": options}:
            return any(conforms(value, option, document) for option in options)
        case {"const": only}:
            return bool(value == only)
        case {"enum": values} if value not in values:
            return False
        case {"type": "object"} if isinstance(value, dict) and "properties" in schema:
            known, required = schema["properties"], {*schema.get("required", ())}
            more = value.keys() - known.keys()
            inner = [conforms(value[name], known[name], document) for name in value.keys() - more]
            return required <= value.keys() and not more and all(inner)
        case {"type": "object"}:
            return isinstance(value, dict)
        case {"type": "array"}:
            items = schema.get("items", {})
            return isinstance(value, list) and all(conforms(x, items, document) for x in value)
        case {"type": "boolean"}:
            return isinstance(value, bool)
        case {"type": "number" | "integer" as kind}:
            kinds = int if kind == "integer" else (int, float)
            return isinstance(value, kinds) and not isinstance(value, bool)
        case {"type": "string"}:
            return isinstance(value, str)
        case {"type": "null"}:
            return value is None
    return True


# Processes.

starting = asyncio.Semaphore(2)  # so many interpreters may start at once


@asynccontextmanager
async def python(*args: str, cwd: Path, **env: str) -> AsyncIterator[Process]:
    """A process with nothing in its environment but *env*, for 60 seconds at most."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE), **env}
    run = asyncio.create_subprocess_exec
    child = await run(sys.executable, *args, cwd=cwd, env=env, stdout=PIPE, stderr=PIPE)
    try:
        async with asyncio.timeout(60):
            yield child
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()


async def finished(*args: str, cwd: Path, **env: str) -> tuple[int | None, str, list[str]]:
    """The exit code, the output and the error lines of a process that ends by itself."""
    async with starting, python(*args, cwd=cwd, **env) as child:
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
    """A process that serves, as soon as its log says where; *args* default to the service.

    The demo model answers on a free port, unless *env* says otherwise.
    """
    env = {"OPENAI_API_KEY": "demo", "API_PORT": "0", **env}
    async with AsyncExitStack() as owned:
        async with starting:
            child = await owned.enter_async_context(python(*args or (SERVICE,), cwd=cwd, **env))
            client = await owned.enter_async_context(Client(""))
            running = Running(child, client)
            client.base_url = "http://127.0.0.1:" + await running.read(r"http://[\w.]+:(\d+)")
        yield running


def before(upstream: Upstream) -> dict[str, str]:
    """The environment of a process that asks *upstream*."""
    return {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": upstream.url}


# 1. Configuration.


def example() -> dict[str, str]:
    """The settings of .env.example, in its order."""
    return {name: text or "" for name, text in dotenv_values(HERE / ".env.example").items()}


def test_the_env_example_lists_every_setting_with_its_default_and_a_line_of_meaning():
    assert list(example()) == [name.upper() for name in vars(Settings())]
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
    "JWT_SECRET": ("s" * 32, b"s" * 32),
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


OWN = ("model", "messages", "stream", "stream_options")
LONG = "x" * 70_000
# What no variable may say, and what its complaint says is accepted.
WRONG: dict[str, tuple[str, list[str]]] = {
    "OPENAI_API_KEY": ("", ["sk-secret\u00a0key"]),
    "OPENAI_MODEL": ("name of a model", ["gpt\x1b[31m", "x" * 257]),
    "OPENAI_MODELS": ("names of models", ["a b", "gpt,caf\u00e9", "gpt\x1b", "x" * 257]),
    "OPENAI_BASE_URL": (
        "http",
        [
            *("ftp://a.example", "a.example:80", "http://", "http://a:b", "http://[/v1"),
            *("http://a.example:99999/v1", "http://a.example:0", "http://999.1.1.1/v1"),
            *("http://192.168.1.010:11434/v1", "http://1.2", "http://."),
            *("http://é..x/v1", "http://a.example/?x=1", "http://u:p@a.example"),
            *("http://a\x7f.example", "http://a/\x85x", "http://a/\x01", "http://a/\nv1"),
            f"http://a.example/{LONG}",
        ],
    ),
    "OPENAI_EXTRA_BODY": (
        "JSON object",
        [
            *("{", '{"secret"', "[]", "null", '"secret"', '{"x":1e999}', '{"x":NaN}'),
            *(f'{{"secret": {each}}}' for each in (r'"\ud83d"', "[" * 9999)),
            *(f'{{"{name}": 1}}' for name in OWN),
        ],
    ),
    "SYSTEM_PROMPT": ("UTF-8", ["secret \udcff", "\ud83d"]),
    "MAX_OUTPUT_TOKENS": ("1", ["0", "-1", "1.5", "many", "1e3", "1_000", "9" * 9999]),
    "OPENAI_TIMEOUT": ("number", ["abc", "nan", "inf", "0", "0.0", "-1"]),
    "OPENAI_MAX_RETRIES": ("0", ["-1", "1.5", "two", "\u0665", "sk-secret-in-the-wrong-line"]),
    "API_HOST": ("address", ["http://localhost", "a.example/b", "é..x"]),
    "API_PORT": ("65535", ["abc", "1_0", "70000", "-1", "+5", "80.0"]),
    "MAX_CONCURRENT_ASKS": ("1", ["0", "many"]),
    "MAX_BODY_BYTES": ("1", ["0", "1MB"]),
    "HEARTBEAT_SECONDS": ("0.1", ["nan", "inf", "0", "0.09", "-1", "soon"]),
    "CLIENT_TIMEOUT": ("number", ["nan", "inf", "0", "-1", "soon"]),
    "CORS_ORIGINS": ("://", ["app.example", "https://app.example/", "null", "https://*.a.example"]),
    "ALLOWED_HOSTS": ("host names", ["http://app.example", "app.example:80", "a/b"]),
    "API_TOKEN": ("visible ASCII", ["t\u00f6ken-secret", "a secret"]),
    "JWT_SECRET": (
        "(32 bytes|UTF-8)",
        ["secret", "é" * 15 + "x", "\udcff secret of more than 32 bytes"],
    ),
    "JWT_AUDIENCE": ("UTF-8", ["app \udcff"]),
    "ADMIN_TOKEN": ("visible ASCII", ["t\u00f6ken-secret", "a secret"]),
    "RATE_LIMIT": ("0", ["-1", "1.5", "ten", "+1", "\u0661"]),
    "DAILY_TOKENS": ("0", ["-1", "1e6", "1.0", "lots", "1 000"]),
    "LOG_LEVEL": ("DEBUG, INFO, WARNING, ERROR", ["loud", "10", "NOTSET", "WARN", "\u0131nfo"]),
    "LOG_BUFFER_SIZE": ("1 to 100000", ["0", "100001"]),
    "LOG_DATABASE": ("UTF-8", ["\ud83d"]),
}


@cases("name, accepted, texts", {name: (name, *each) for name, each in WRONG.items()})
def test_a_wrong_value_is_one_line_that_says_what_is_accepted_and_no_secret(name, accepted, texts):
    for text in texts:
        with pytest.raises(ConfigError) as caught:
            pytest.fail(f"{text[:99]!r} was taken: {Settings.from_env({name: text})}")
        line = str(caught.value)
        assert re.fullmatch(rf"{name}\b[ -~]*{accepted}[ -~]*", line)
        assert len(line) < 500
        assert "secret" not in line


async def test_settings_are_frozen_and_neither_they_nor_a_log_show_a_secret(capsys, start):
    secrets = {"api_token": TOKEN, "jwt_secret": SECRET, "admin_token": ADMIN}
    hidden = {"system_prompt": "SAY NOTHING", "openai_extra_body": {"user": "HIDDEN"}}
    settings = Settings(**secrets, **hidden, openai_api_key=KEY)  # type: ignore[arg-type]
    with pytest.raises((AttributeError, ValueError)):
        setattr(settings, "api_port", 1)  # noqa: B010 - mypy knows that it is frozen
    client = await start(**secrets, **hidden)
    token = user_token()
    structlog.get_logger().error("told", texts=[*secrets.values(), token], inner={"x": token})
    assert (await client.post("/ask", json=ASK, headers=bearer(token))).status_code == 200
    client.headers |= bearer(ADMIN)
    logged = await load(client)
    shown = repr(settings) + json.dumps(logged, ensure_ascii=False) + capsys.readouterr().out
    for secret in (*secrets.values(), KEY, token, token.split(".")[2], "SAY NOTHING", "HIDDEN"):
        assert secret not in shown
    assert "told" in shown


@processes
async def test_what_cannot_be_used_stops_the_start_with_a_line_each(tmp_path):
    (tmp_path / ".env").write_bytes(b"OPENAI_MODEL=caf\xe9")
    inner = tmp_path / "inner"  # to which the file above it means nothing
    inner.mkdir()
    wrong = {name: texts[0] for name, (_, texts) in WRONG.items() if name != "LOG_DATABASE"}
    many = "a" + " , ," * 5000
    slow = {
        "ALLOWED_HOSTS": f"{many}!",
        "CORS_ORIGINS": f"http://{many},a",
        "OPENAI_MODELS": f"{many}é",
        "OPENAI_BASE_URL": f"http://a.example/\x1b[2J{LONG}",
        "OPENAI_MODEL": LONG,
    }
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ends = await asyncio.gather(
            finished(SERVICE, cwd=inner, **wrong),
            finished(*UVICORN, cwd=inner, **wrong),
            finished(SERVICE, cwd=inner, **slow),
            finished(SERVICE, cwd=tmp_path),
            finished(SERVICE, cwd=inner, API_PORT=port),
        )
    named = (list(wrong), list(wrong), list(slow), [".env"], [port])
    *codes, taken_code = (code for code, *_ in ends)
    assert codes == [2] * 4
    assert taken_code not in {0, None}
    for (_, out, err), names in zip(ends, named, strict=True):
        assert (out, len(err)) == ("", len(names))
        assert all(any(re.search(rf"(^|=|\W){name}\b", line) for line in err) for name in names)
        assert all(len(line) < 1000 for line in err)
        assert not re.search("secret|\x1b", "".join(err))


@processes
async def test_importing_the_service_starts_nothing_and_its_app_is_one_app(tmp_path):
    program = """if True:
        import logging, os, sys
        seen = []
        acts = {"socket.bind", "socket.connect", "socket.getaddrinfo"}
        sys.addaudithook(lambda event, args: event in acts and seen.append(event))
        import service, structlog
        print(seen, logging.root.handlers, structlog.is_configured())
        os.environ |= {"API_PORT": "0", "OPENAI_API_KEY": "demo", "LOG_LEVEL": "CRITICAL"}
        print(service.app is service.app)"""
    found = await finished("-c", program, cwd=tmp_path, API_PORT="abc")
    assert found == (0, "[] [] False\nTrue\n", [])


@processes
async def test_an_env_file_fills_in_what_the_environment_does_not_set(tmp_path):
    lines = ["OPENAI_API_KEY=demo", f"API_TOKEN={TOKEN}", "API_PORT=wrong"]
    lines += ["ALLOWED_HOSTS=file.example", f"CORS_ORIGINS={PAGE}"]
    (tmp_path / ".env").write_text("\n".join(lines))
    real = {"API_TOKEN": "", "ALLOWED_HOSTS": "real.example", "CORS_ORIGINS": ""}
    async with launched(cwd=tmp_path, OPENAI_API_KEY="", **real) as running:
        client = running.client
        mine = await client.get("/status", headers={"Host": "real.example", "Origin": PAGE})
        assert (mine.status_code, "access-control-allow-origin" in mine.headers) == (200, False)
        wrong = await client.get("/status", headers={"Host": "file.example"})
        problem(wrong, "host_not_allowed")
        problem(await client.post("/ask", json=PLAIN), "unauthorized")
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        assert (await client.post("/ask", json=PLAIN)).json()["model"] == "demo"


def test_both_lists_of_dependencies_are_the_same():
    project = tomllib.loads((HERE / "pyproject.toml").read_text())
    assert project["project"]["dependencies"] == project["dependency-groups"]["run"]


# 2. POST /ask: what may be asked.


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
async def test_a_wrong_field_is_named(guarded, name, values):
    for value in values:
        asked = ASK | {name.partition(".")[0]: value}
        (error,) = problem(await guarded.post("/ask", json=asked), "invalid_request")["errors"]
        assert error == {"field": name, "detail": ANY}
        assert error["detail"]


async def test_all_wrong_fields_are_named_at_once(guarded):
    asked = {"history": [{"role": "x", "content": 1}], "temperature": "0.7", "top_p": 1}
    wrong = problem(await guarded.post("/ask", json=asked), "invalid_request")["errors"]
    names = ["history.0.content", "history.0.role", "prompt", "temperature", "top_p"]
    assert sorted(error["field"] for error in wrong) == names


async def test_the_bounds_themselves_are_taken(client):
    bounds: list[Any] = [{"temperature": 0, "max_tokens": 1}, {"temperature": 2, "history": []}]
    for bound in (*bounds, {"history": [TURN] * 1000}):
        assert (await client.post("/ask", json=ASK | bound)).status_code == 200


async def test_of_very_many_wrong_fields_a_hundred_are_named(guarded):
    wrong = ASK | dict.fromkeys(map(str, range(20_000)), 0)
    errors = problem(await guarded.post("/ask", json=wrong), "invalid_request")["errors"]
    assert [error["field"] for error in errors][:99] == [*map(str, range(99))]
    assert len(errors) <= 100


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
async def test_a_body_that_is_no_json_object_is_refused(guarded, bodies):
    for body in bodies:
        problem(await guarded.post("/ask", content=body, headers=JSON), "invalid_json")


async def test_a_body_is_refused_as_soon_as_it_is_over_the_bound(guarded):
    head = f"POST /ask HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += "Content-Type: application/json\r\n"
    size, chunked = 1_048_576, "Transfer-Encoding: chunked\r\n\r\n"
    for rest, code in [
        (f"Content-Length: {size + 1}\r\n\r\n", "body_too_large"),
        (f"{chunked}{size + 1:x}\r\n{'':{size + 1}}", "body_too_large"),
        (f"Content-Length: {size}\r\n\r\n{json.dumps(ASK):{size}}", "not_configured"),
        (f"{chunked}{size:x}\r\n{json.dumps(ASK):{size}}\r\n0\r\n\r\n", "not_configured"),
    ]:
        assert await code_of(guarded, head + rest) == code


async def test_only_a_body_that_is_announced_as_json_is_read(guarded):
    for kind in ("application/json;charset=utf-8", "Application/JSON", "application/json ; x=y"):
        response = await guarded.post("/ask", content=b"{}", headers={"Content-Type": kind})
        problem(response, "invalid_request")
    for kind in ("", "text/plain", "text/plain;application/json", "application/jsonp"):
        response = await guarded.post("/ask", content=b"{}", headers={"Content-Type": kind})
        problem(response, "unsupported_media_type")
    problem(await guarded.post("/ask", content=b"{}"), "unsupported_media_type")


async def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_no_trace(start):
    client = await start()
    async with connection(client) as (reader, writer):
        writer.write(post(json.dumps(ASK), "Expect: 100-continue")[:-1])
        async with asyncio.timeout(30):
            assert b"100 Continue" in await reader.readline()
        before = await load(client)
    assert [(await load(client, "/status"))["asks"] for _ in range(5)] == [NOTHING_YET] * 5
    assert await load(client) == before


@overlapping
@at_once("body", {"nothing": 0, "all but its last byte": -1}, client_timeout=0.3)
async def test_a_body_that_never_comes_is_a_408_and_the_end_of_the_connection(client, body):
    whole = post(json.dumps(ASK))
    async with connection(client) as (reader, writer), asyncio.timeout(30):
        writer.write(whole[: body or whole.index(b"{")])
        said = await reader.read()
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nconnection: close\r\n" in said.lower()
    assert b'"code":"request_timeout"' in said
    assert (await load(client, "/status"))["asks"] == NOTHING_YET


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
async def test_a_client_that_sends_all_before_it_reads_sees_the_413(client, chunked):
    def send() -> tuple[int, Any]:
        body: Any = iter([b"x" * MIB] * 8) if chunked else b"x" * MIB * 8
        sender = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=30)
        with closing(sender):
            # As urllib does it: the service closes the connection, which loses what is unread.
            sender.request("POST", "/ask", body, JSON | {"Connection": "close"})
            response = sender.getresponse()
            return response.status, json.loads(response.read())["code"]

    assert await asyncio.to_thread(send) == (413, "body_too_large")


# What goes upstream.


async def test_only_what_was_asked_goes_upstream(client, upstream):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Yes."}]
    last = {"role": "user", "content": "Hola"}
    await client.post("/ask", json=ASK)
    await client.post("/ask", json={**ASK, "history": turns, "temperature": 0, "max_tokens": 9})
    await client.post("/ask", json={**PLAIN, "temperature": 0.7})
    usual = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}}
    assert [call.body for call in upstream.calls] == [
        {**usual, "messages": [last]},
        {**usual, "messages": [*turns, last], "temperature": 0, "max_tokens": 9},
        {"model": MODEL, "stream": False, "messages": [last], "temperature": 0.7},
    ]
    assert {call.path for call in upstream.calls} == {"/v1/chat/completions"}
    assert {call.headers["authorization"] for call in upstream.calls} == {f"bearer {KEY}"}


BRIEF = {"role": "system", "content": "Be brief."}


async def test_the_operators_prompt_goes_first(shared, upstream):
    client = await shared(system_prompt="Be brief.")
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


async def test_where_the_operator_has_a_prompt_callers_send_none_of_its_kind(shared, upstream):
    client = await shared(system_prompt="Be brief.")
    roles: list[Any] = ["system", "developer", "System", "system ", "", "sys", None, 5, ["user"]]
    turns = [{"role": role, "content": "Ha!"} for role in roles] + [{"content": "Ha!"}]
    for turn in turns:
        response = await client.post("/ask", json={**ASK, "history": [TURN, turn]})
        assert wrong_field(response, "/ask") == "history.1.role"
        for streamed in (True, False):
            response = await client.post(CHAT, json=chat(TURN, turn, stream=streamed))
            assert wrong_field(response, CHAT) == "messages.1.role"
    assert not upstream.calls
    free = await shared()
    for turn in ({"role": "system", "content": "Ha!"}, {"role": "developer", "content": "Ha!"}):
        assert (await free.post(CHAT, json=chat(turn))).status_code == 200
        assert upstream.bodies[-1]["messages"] == [turn, TURN]


async def test_requests_name_only_the_operators_models(start, upstream):
    client = await start(openai_model="one", openai_models=("two", "ns/three:1b", "one"))
    listed = await load(client, "/v1/models")
    assert [each["id"] for each in listed["data"]] == ["one", "two", "ns/three:1b"]
    for path in ("/ask", CHAT):
        for named in ({}, {"model": "one"}, {"model": "two"}, {"model": "ns/three:1b"}):
            assert (await client.post(path, json=body_for(path, **named))).status_code == 200
            assert upstream.calls.pop().body["model"] == named.get("model", "one")
    values: list[Any] = ["three", "Two", "two ", "", "x" * 9999, MODEL]
    for value in [*values, 5, True, ["two"], {}]:
        response = await client.post("/ask", json=body_for("/ask", model=value))
        assert wrong_field(response, "/ask") == "model"
        response = await client.post(CHAT, json=chat(model=value))
        status, code = (404, "model_not_found") if value in values else (422, "invalid_request")
        assert openai_error(response, status, code)["param"] == "model"
    assert not upstream.calls


BOUNDS: dict[str, list[tuple[dict[str, Any], int]]] = {
    "/ask": [({}, 100), ({OLD: 5}, 5), ({OLD: 5.0}, 5), ({OLD: 100}, 100)],
    CHAT: [
        *(({}, 100), ({OLD: None}, 100), ({OLD: None, NEW: None, "n": None}, 100)),
        *(({OLD: None, NEW: 5}, 5), ({OLD: 5, "n": 1}, 5), ({NEW: 5.0, "n": 1.0}, 5)),
        *(({OLD: 7, NEW: 5}, 5), ({"stream": True}, 100)),
    ],
}


@PATHS
@pytest.mark.parametrize("name", [OLD, NEW])
async def test_no_more_output_is_asked_for_than_the_operator_allows(start, proxy, name, path):
    url = "http://api.openai.com/v1" if name == NEW else proxy.url
    client = await start(openai_base_url=url, max_output_tokens=100)
    for fields, sent in BOUNDS[path]:
        assert (await client.post(path, json=body_for(path, **fields))).status_code == 200
        body = proxy.bodies[-1]
        assert {each: body[each] for each in (OLD, NEW) if each in body} == {name: sent}
        assert type(body[name]) is int


TOO_MUCH: dict[str, list[Any]] = {"more": [101, 101.0, 1e9, 10**30], "text": ["5", "", "x"]}
TOO_MUCH |= {"none": [0, -1, -0.0], "odd": [2.5, 100.5, True, [5], {}]}


@cases("values", TOO_MUCH)
async def test_the_bound_on_output_cannot_be_got_round(shared, upstream, values):
    client = await shared(max_output_tokens=100)
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


@PATHS
@pytest.mark.parametrize("name", [OLD, NEW])
async def test_the_operators_body_goes_over_everything(shared, upstream, name, path):
    extra = {name: 50, HEAT: 1, "metadata": {"a": 1}, "n": 1, "safety_identifier": "page"}
    client = await shared(openai_extra_body=extra, max_output_tokens=100)
    own: dict[str, Any] = {HEAT: 0.5, OLD: 5}
    if path == CHAT:
        own |= {NEW: 5, "metadata": {"b": 2}, "safety_identifier": "mine", "top_p": 1}
    for streamed in (True, False):
        response = await client.post(path, json=body_for(path, **own, stream=streamed))
        assert "ignored" not in response.text
    messages = [{"role": "user", "content": "Hola"}]
    expected = {**extra, "model": MODEL, "messages": messages}
    if path == CHAT:
        expected["top_p"] = 1
    options = {"stream_options": {"include_usage": True}}
    assert [call.body for call in upstream.calls] == [
        {**expected, "stream": True, **options},
        {**expected, "stream": False},
    ]


@cases(
    "host, path, lower",
    {
        "no path": ("api.example", "", "/chat/completions"),
        "slash": ("api.example", "/", "/chat/completions"),
        "port": ("api.example:8080", "", "/chat/completions"),
        "port, slash": ("api.example:8080", "/", "/chat/completions"),
        "path": ("api.example", "/api/v1", "/api/v1/chat/completions"),
        "port, path, slash": ("[2001:db8::1]:81", "/v1/", CHAT),
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


# What the client gets: a plain answer and a stream.


async def test_what_arrives_together_leaves_together_while_the_upstream_is_still_talking(shared):
    go = asyncio.Event()
    client = await shared(says(chunk("Ho") + chunk("la"), waits(go), FINISH))
    async with asking(client) as wire:
        assert events(await wire.write()) == [delta("Ho"), delta("la")]
        go.set()
        assert [events(write) for write in await wire.rest()] == [[done(), "[DONE]"]]
    assert {*wire.head.splitlines()} >= STREAM_HEADERS | {"x-request-id: ask-1"}


SUM = {"prompt_tokens": 12, "completion_tokens": 15}
SUMMED = {"usage": SUM, "tokens_used": 27}
SAID = {"finish_reason": "stop", "delta": {"content": "Hola"}, "message": {"content": "Hola"}}


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
        "sum": ("stop", {"usage": SUM | {"total_tokens": None}}, SUMMED),
        "Groq's sum": ("stop", {"usage": None, "x_groq": {"usage": SUM}}, SUMMED),
        "half a sum": (
            "stop",
            {"usage": {"prompt_tokens": 12}},
            {"usage": {"prompt_tokens": 12}, "tokens_used": None},
        ),
        "12.0": ("stop", {"usage": {"total_tokens": 12.0}}, {"tokens_used": 12}),
        "in the choice": ("stop", {"choices": [SAID | {"usage": SUM}]}, SUMMED),
        "nonsense": (7, {"usage": {"total_tokens": math.nan}, "model": 5}, {"finish_reason": None}),
    },
)
async def test_what_the_upstream_tells_of_its_answer_is_told(shared, reason, more, facts):
    said = {"finish_reason": reason, "delta": {"content": "Hola"}, "message": {"content": "Hola"}}
    last = {"choices": [said], **more}
    client = await shared(says(event(last)), replies(200, last))
    expected = {"finish_reason": "stop", "tokens_used": None, "model": MODEL, **facts}
    response = await client.post("/ask", json=ASK)
    assert events(response.content) == [delta("Hola"), {"type": "done", **expected}, "[DONE]"]
    response = await client.post("/ask", json=PLAIN)
    assert response.json() == {"response": "Hola", **expected}
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers["content-length"]) == len(response.content)


THREE = {"prompt_tokens": 12, "completion_tokens": 138, "reasoning_tokens": 64}
DETAILS = {"completion_tokens_details": {"reasoning_tokens": 64}}
ALL_TOLD = {"prompt_tokens": 12, "completion_tokens": 138, **DETAILS}


def no_figures(figure: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """A usage whose figures all are *figure*, which is none, and what is told of it."""
    usage = dict.fromkeys(("total_tokens", "prompt_tokens", "completion_tokens"), figure)
    return {**usage, "completion_tokens_details": {"reasoning_tokens": figure}}, {}


FIGURES = {
    "all": (ALL_TOLD | {"total_tokens": 150}, THREE),
    "nothing": ({"total_tokens": 7}, {}),
    "one": ({"prompt_tokens": 12}, {"prompt_tokens": 12}),
    "zero": ({"prompt_tokens": 0}, {"prompt_tokens": 0}),
    "the most": ({"completion_tokens": 10**12}, {"completion_tokens": 10**12}),
    "too many": ({"completion_tokens": 10**12 + 1, "prompt_tokens": 1}, {"prompt_tokens": 1}),
    "no figures": ({"prompt_tokens": -1, "completion_tokens": True}, {}),
    "null": ({"prompt_tokens": None, "completion_tokens_details": None}, {}),
    "odd details": ({"prompt_tokens": 1, "completion_tokens_details": 5}, {"prompt_tokens": 1}),
    **{f"all {x!s:.20}": no_figures(x) for x in (10**4299, 10**12 + 1, True, -1, 1.5)},
}


async def test_the_tokens_that_the_upstream_counted_are_told(start, upstream):
    client, spent = await start(), 0
    table = crossed(["usage", "x_groq"], FIGURES)
    for number, (name, (place, told, expected)) in enumerate(table.items(), 1):
        usage = {"usage": told} if place == "usage" else {"x_groq": {"usage": told}}
        last = chunk("Hola", finish_reason="stop", **usage)
        plain = completion("Hola")
        del plain["usage"]
        upstream.script(says(last), replies(200, plain | usage))
        *_, streamed, _ = events((await client.post("/ask", json=ASK)).content)
        answered = (await client.post("/ask", json=PLAIN)).json()
        total = told.get("total_tokens") if expected or len(told) == 1 else None
        for ending in (streamed, answered):
            assert ending.get("usage", {}) == expected, name
            assert ("usage" in ending) == bool(expected), name
            assert ending["tokens_used"] == total, name
        closed = (await closings(client, 2 * number))[-2:]
        for each in closed:
            known = {name: value for name, value in each["metadata"].items() if name in THREE}
            assert (each["message"], known) == ("ask finished", expected), name
        spent += 2 * (total or 0)
        assert (await load(client, "/status"))["tokens_used"] == spent, name


async def test_text_goes_out_as_it_reads_but_for_half_a_surrogate_pair_and_odd_line_ends(shared):
    text = "é😀\x85\u2028\u2029\ud83d"
    streams = stream(chunk(text), chunk("\ude00"), FINISH + DONE, Call.end)
    client = await shared(streams, replies(200, completion(text)))
    streamed = await client.post("/ask", json=ASK)
    assert events(streamed.content)[:2] == [delta(text), delta("\ude00")]
    plain = await client.post("/ask", json=PLAIN)
    assert plain.json()["response"] == text
    for response in (streamed, plain):
        assert 'é😀\\u0085\\u2028\\u2029\\ud83d"'.encode() in response.content


@overlapping
async def test_pings_fill_the_silence_before_the_head_and_between_deltas(shared):
    go = [asyncio.Event() for _ in range(3)]
    head, first, second = (lambda _, each=each: each.wait() for each in go)
    rest = stream(first, chunk("Ho"), second, chunk("la"), FINISH + DONE, Call.end)
    written = b""
    async with asking(await shared(play(head, rest), heartbeat_seconds=0.1)) as wire:
        for each in go:
            while (write := await wire.write()) != PING:
                written += write
            each.set()
        written += b"".join(await wire.rest())
    assert events(written) == [delta("Ho"), delta("la"), done(), "[DONE]"]


@overlapping
@at_once(
    "script, expected",
    {
        "500": (replies(500), fault("upstream_error", 502)),
        "429": (replies(429, retry_after="1.5"), fault("rate_limited", 429, retry_after=2)),
        "400": (replies(400, refused("No.")), fault("upstream_rejected", 400, error="No.")),
        "close": (Call.close, fault("upstream_error", 502)),
    },
    heartbeat_seconds=0.1,
)
async def test_what_fails_after_a_ping_is_an_event(client, upstream, script, expected):
    go = asyncio.Event()
    upstream.script(play(waits(go), script))
    async with asking(client) as wire:
        assert await wire.write() == PING
        go.set()
        assert events(b"".join(await wire.rest())) == [expected]
    assert len(upstream.calls) == 1
    (closing,) = await closings(client)
    assert (closing["message"], closing["metadata"]["code"]) == ("ask failed", expected["code"])


@overlapping
async def test_what_failed_before_a_ping_is_not_tried_again_after_it(shared, upstream):
    # Between two tries pass 0.19 s at least: time for a ping, if that is sent between them.
    client = await shared(replies(503), answer, heartbeat_seconds=0.1)
    response = await client.post("/ask", json=ASK)
    assert (PING in response.content, len(upstream.calls)) in {(True, 1), (False, 2)}


@overlapping
async def test_a_plain_ask_has_a_status_however_late_it_fails(shared):
    async def late(call: Call) -> None:
        await asyncio.sleep(0.1)  # Ten heartbeats, of which a plain answer has none.
        await call.reply(404, refused("No such model."))

    response = await (await shared(late, heartbeat_seconds=0.1)).post("/ask", json=PLAIN)
    problem(response, "upstream_rejected")


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
async def test_reasoning_is_told_apart_from_the_answer(shared, part, thought, said):
    script = stream(piece(**part), FINISH + DONE, Call.end)
    client = await shared(script, replies(200, message(**part)))
    told = [{"type": "reasoning", "content": thought}] if thought else []
    told += [delta(said)] if said else []
    streamed = await client.post("/ask", json=ASK)
    assert events(streamed.content) == [*told, done(), "[DONE]"]
    plain = (await client.post("/ask", json=PLAIN)).json()
    assert (plain["response"], plain.get("reasoning")) == (said, thought or None)


async def test_reasoning_and_text_keep_their_order_and_their_reads(shared):
    go = asyncio.Event()
    both = piece(reasoning="b", content="c") + piece(content="d") + piece(reasoning="e")
    steps = (piece(reasoning_content="a"), waits(go), both, FINISH + DONE, Call.end)
    async with asking(await shared(stream(*steps))) as wire:
        assert events(await wire.write()) == [{"type": "reasoning", "content": "a"}]
        go.set()
        told = events(b"".join(await wire.rest()))
    assert [each.get("content") for each in told[:-1]] == ["b", "c", "d", "e", None]
    assert [each["type"] for each in told[:-3]] == ["reasoning", "delta", "delta"]


@overlapping
@at_once("steps", {"thought": (piece(reasoning="Hm"), pause, HOLA), "nothing": ()})
async def test_the_first_token_may_be_one_of_reasoning(client, upstream, steps):
    upstream.script(says(*steps, FINISH))
    await client.post("/ask", json=ASK)
    (closing,) = await closings(client)
    facts = closing["metadata"]
    if steps:
        assert facts["duration_ms"] - facts["first_token_ms"] > 250
        assert facts["answer_chars"] == 4
    else:
        assert not {"first_token_ms", "answer_chars"} & facts.keys()


# As text.


async def test_text_leaves_piece_by_piece_as_it_comes(shared):
    go = asyncio.Event()
    steps = (chunk("Ho") + chunk("la"), waits(go), chunk(" 😀\u2028\n"), FINISH + DONE)
    client = await shared(stream(*steps, Call.end))
    async with asking(client, ASK, "accept: text/plain") as wire:
        assert await wire.write() == b"Hola"
        go.set()
        assert b"".join(await wire.rest()) == " 😀\u2028\n".encode()
    assert {
        "content-type: text/plain; charset=utf-8",
        "cache-control: no-cache, no-transform",
        "x-accel-buffering: no",
    } < {*wire.head.splitlines()}


async def test_a_plain_ask_as_text_is_answered_at_once(shared, upstream):
    response = await (await shared()).post("/ask", json=PLAIN, headers=AS_TEXT)
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


@at_once(
    "texts, expected",
    {
        "nothing": ([], ""),
        "a pair in one piece": (["😀"], "😀"),
        "a pair in two": (["a\ud83d", "\ude00b"], "a😀b"),
        "a pair with nothing between": (["\ud83d", "", "\ude00"], "😀"),
        "a first half alone": (["a\ud83d", "b"], "a\ufffdb"),
        "a first half at the end": (["a\ud83d"], "a\ufffd"),
        "a second half alone": (["a\ude00", "b"], "a\ufffdb"),
        "halves in the wrong order": (["\ude00\ud83d"], "\ufffd\ufffd"),
    },
)
async def test_text_is_the_answer_in_utf_8_and_nothing_else(client, upstream, texts, expected):
    thought = piece(reasoning_content="Let me see.")
    script = stream(thought, *map(chunk, texts), FINISH + DONE, Call.end)
    plain = message(content="".join(texts), reasoning_content="Let me see.")
    upstream.script(script, replies(200, plain))
    for ask in (ASK, PLAIN):
        response = await client.post("/ask", json=ask, headers=AS_TEXT)
        assert (response.status_code, response.content) == (200, expected.encode())
    assert [closing["message"] for closing in await closings(client, 2)] == ["ask finished"] * 2


@overlapping
@at_once(
    "script, code, retry_after",
    {
        "status": (play(pause, replies(500)), "upstream_error", None),
        "refusal": (play(pause, replies(400, refused("Not that."))), "upstream_rejected", None),
        "limit": (play(pause, replies(429, retry_after="9")), "rate_limited", "9"),
        "silence": (Call.hang, "upstream_timeout", None),
        "end": (stream(pause, Call.end), "upstream_error", None),
        "error": (stream(pause, ERROR, Call.end), "upstream_error", None),
        "reasoning, reset": (stream(piece(reasoning="Hm"), Call.reset), "upstream_error", None),
        "no text, reset": (stream(FINISH, Call.reset), "upstream_error", None),
    },
    **{"heartbeat_seconds": 0.1, "openai_timeout": 1.5, "openai_max_retries": 0},
)
async def test_what_fails_before_the_first_piece_of_text_has_a_status(
    client, upstream, script, code, retry_after
):
    upstream.script(script)
    asks = (client.post("/ask", json=ask, headers=AS_TEXT) for ask in (ASK, PLAIN))
    for response in await asyncio.gather(*asks):
        problem(response, code)
        assert response.headers.get("retry-after") == retry_after


@overlapping
async def test_text_is_tried_for_again_after_any_silence(shared, upstream):
    client = await shared(play(pause, replies(500)), answer, heartbeat_seconds=0.1)
    async with asking(client, ASK, "accept: text/plain") as wire:
        assert b"".join(await wire.rest()) == b"Hola"
    assert len(upstream.calls) == 2


CUTS = {
    "end": (stream(HOLA, Call.end), "upstream_error"),
    "reset": (stream(HOLA, Call.reset), "upstream_error"),
    "reset after finish_reason": (stream(HOLA + FINISH, Call.reset), "upstream_error"),
    "error": (stream(HOLA + ERROR + DONE, Call.end), "upstream_error"),
    "HTML": (stream(HOLA, b"data: " + HTML + b"\n\n", Call.end), "upstream_error"),
    "silence": (stream(HOLA, Call.hang), "upstream_timeout"),
    "finish_reason error": (stream(HOLA, piece("error") + DONE, Call.end), "upstream_error"),
}


@at_once("script, code", CUTS, openai_timeout=0.6)
async def test_text_that_breaks_off_breaks_the_connection(client, upstream, capfd, script, code):
    upstream.script(script)
    read = b""
    async with client.stream("POST", "/ask", json=ASK, headers=AS_TEXT) as response:
        with pytest.raises(httpx2.RemoteProtocolError):  # noqa: PT012 - each read is looked at
            async for each in response.aiter_raw():
                read += each
    assert (response.status_code, read) == (200, b"Hola")
    # uvicorn logs what an app raises before it closes the connection, which was just seen.
    (event,) = await closings(client)
    told = (event["level"], event["message"], event["metadata"]["code"])
    assert told == ("ERROR", "ask failed", code)
    assert "Traceback" not in capfd.readouterr().out + str(await load(client))


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@processes
@at_once(
    "script, code, said",
    {
        "whole": (stream(HOLA, FINISH + DONE, Call.end), 0, b"Hola"),
        "empty": (stream(FINISH + DONE, Call.end), 0, b""),
        **{name: (script, 18, b"Hola") for name, (script, _) in CUTS.items()},
    },
    openai_timeout=1,
)
async def test_curl_tells_a_cut_answer_by_its_exit_code(client, upstream, script, code, said):
    upstream.script(script)
    command = ("curl", "-sN", "-H", "Accept: text/plain", "--json", json.dumps(client.own(ASK)))
    url = str(client.base_url.join("/ask"))
    child = await asyncio.create_subprocess_exec(*command, url, stdout=PIPE)
    async with asyncio.timeout(30):
        out, _ = await child.communicate()
    assert (child.returncode, out) == (code, said)


# The forms in which upstreams answer.


@cases("end", {"LF": "\n", "CRLF": "\r\n", "CR": "\r"})
async def test_a_stream_in_single_bytes_arrives_to_the_letter(shared, end):
    text = 'Olá, señor 😀\u2028 "\\"\r\n\tend\n\n'
    lines = []
    for letter in text:
        data = json.dumps({"choices": [{"delta": {"content": letter}}]}, ensure_ascii=False)
        lines += ["id: 1", f"data:{data[:12]}", ": in the middle", f"data: {data[12:]}", ""]
    sent = end.join(["\ufeffdata: {}", "", *lines, *(FINISH + DONE).decode().split("\n")]).encode()
    client = await shared(stream(*(sent[i : i + 1] for i in range(len(sent))), Call.end))
    async with asking(client) as wire:
        writes = [events(write) for write in await wire.rest()]
    *said, last, mark = [event for write in writes for event in write]
    assert said == [delta(letter) for letter in text]
    assert [last, mark] == writes[-1][-2:] == [done(), "[DONE]"]


@cases(
    "sent",
    {
        "no space": b"data:A\n\ndata:B\n\n",
        "line ends that differ": b"data: A\n\ndata: B\r\n\r\ndata: C\r\r",
        "mixed line ends": b"data: A\n\r\ndata: B\r\n\ndata: C\n\r",
        "empty lines": b"\n\n\n\ndata: A\n\n\ndata: B\n\n",
        "other fields": b"event: x\nid: 1\ndatabase: 2\n\ndata: A\nretry: 1\n\n",
        "comments": b":\n\n: A\ndata: B\n: C\n\n",
        "an open event": b"data: A\n\ndata: B\n",
        "an open line": b"data: A\n\ndata: B",
        "an open CRLF": b"data: A\r\n\r",
        "a byte order mark": b"\xef\xbb\xbfdata: A\n\n",
    },
)
@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_events_are_read_in_every_form_that_they_may_have(shared, sent, size):
    ended = {name: chunk(name, finish_reason="stop")[6:-2].decode() for name in "ABC"}
    whole = re.sub("(?<=data:)( ?)([ABC])", lambda m: m[1] + ended[m[2]], sent.decode()).encode()
    pieces = (whole[at : at + size] for at in range(0, len(whole), size))
    client = await shared(stream(*pieces, Call.end))
    told = re.findall(rb"(?<=data:) ?([ABC])", sent)
    *deltas, end, _ = events((await client.post("/ask", json=ASK)).content)
    assert (deltas, end["type"]) == ([delta(each.decode()) for each in told], "done")


async def test_a_large_event_in_small_pieces_takes_linear_time_and_arrives_in_one_write(shared):
    text = "é" * 2**18 + "x" * 2**21  # an escape of six bytes for each é
    data = chunk(text)
    pieces = (data[at : at + 2**10] for at in range(0, len(data), 2**10))
    begun = time.process_time()
    async with asking(await shared(says(*pieces, FINISH))) as wire:
        assert events(await wire.write())[0] == delta(text)
    # It takes about 0.5 s, upstream and client included; joining each time would take 10.
    assert time.process_time() - begun < 5


EMPTY: list[object] = [{}, {"choices": []}, {"choices": None}, {"choices": [{}]}]
EMPTY += [
    {"choices": [{"delta": nothing}]}
    for nothing in (None, {}, {"role": "assistant"}, {"content": ""}, {"content": None})
]


@cases(
    "odd, told",
    {
        "no text": (b"".join(map(event, EMPTY)), []),
        "a refusal": (piece(content=None, refusal="No."), [delta("No.")]),
        "text in parts": (
            piece(content=[{"type": "thinking"}, {"type": "text", "text": "a"}]),
            [delta("a")],
        ),
        "an empty name beside reasoning": (
            piece(reasoning_content="", reasoning="hm"),
            [{"type": "reasoning", "content": "hm"}],
        ),
        "no UTF-8": (chunk("?").replace(b"?", b"\xff"), [delta("\ufffd")]),
        "no error": (
            chunk("a", error=None, errors=[], error_message="", detail=None),
            [delta("a")],
        ),
        "success": (chunk("a", base_resp={"status_code": 0, "status_msg": "ok"}), [delta("a")]),
        "words beside text": (chunk("a", code=200, message="ok", detail="fine"), [delta("a")]),
        "null": (b"data: null\n\n", []),
        "two chunks": (chunk("a")[:-1] + chunk("b"), [delta("a"), delta("b")]),
    },
)
async def test_a_chunk_says_what_is_in_it(shared, odd, told):
    client = await shared(says(HOLA + odd, FINISH))
    response = await client.post("/ask", json=ASK)
    assert events(response.content) == [delta("Hola"), *told, done(), "[DONE]"]


@pytest.mark.parametrize("number", [6, 0, -1, 0.5])
async def test_a_number_for_a_text_is_that_number(shared, number):
    streamed, plain = piece(content=number), message(content=number)
    client = await shared(says(HOLA, streamed, FINISH))
    response = await client.post("/ask", json=ASK)
    assert events(response.content) == [delta("Hola"), delta(str(number)), done(), "[DONE]"]
    assert (await client.post("/ask", json=ASK, headers=AS_TEXT)).text == f"Hola{number}"
    passed = await client.post(CHAT, json=STREAMED)
    assert passed.content == HOLA + streamed + STOP + DONE
    client = await shared(replies(200, plain))
    assert (await client.post("/ask", json=PLAIN)).json()["response"] == str(number)
    assert (await client.post(CHAT, json=BODY)).json() == plain


ODD_CHUNKS = {
    "reasoning": piece(reasoning="Hm", content="x"),
    "another model": chunk("x", model="gpt-other"),
    "usage": chunk("x", usage={"total_tokens": 9, "prompt_tokens": 3}),
    "an end": chunk("x", finish_reason="length"),
    "a later choice": piece(index=1, content="x"),
    "a refusal": piece(refusal="x"),
    "escapes": chunk('"\\\n\ud83d\ude00\u2028'),
    "half a pair": b'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}\n\n',
    "no UTF-8": b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n',
    "an error": b'data: {"choices":[{"delta":{"content":"x"}}],"error":"no"}\n\n',
    "a comment": b": waiting\n\n",
    "two lines": b'data: {"choices":\ndata: [{"delta":{"content":"x"}}]}\n\n',
    "a name": b'event: x\ndata: {"choices":[{"delta":{"content":"x"}}]}\n\n',
    "the end mark": DONE,
}


@at_once("path, odd", crossed(["/ask", CHAT], ODD_CHUNKS))
async def test_chunks_in_a_burst_say_what_they_say_between_comments(client, upstream, path, odd):
    told = [chunk("a"), chunk("b"), chunk("c"), odd, chunk("d"), chunk("e")]
    reads = (b"".join(told), PING.join([b"", *told]))
    go, end, written = asyncio.Event(), asyncio.Event(), []
    scripts = (stream(HOLA, waits(go), read, waits(end), FINISH + DONE, Call.end) for read in reads)
    upstream.script(*scripts)
    for _ in range(2):
        go.clear()
        end.clear()
        async with asking(client, {"/ask": ASK, CHAT: STREAMED}[path], path=path) as wire:
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
async def test_an_end_of_the_upstream_is_an_end(shared, script):
    response = await (await shared(script)).post("/ask", json=ASK)
    text, last, mark = events(response.content)
    assert (text, last["type"], mark) == (delta("Hola"), "done", "[DONE]")


@at_once(
    "script",
    {
        "close": stream(HOLA, Call.end),
        "cut": stream(HOLA, Call.close),
        "reset": stream(HOLA, Call.reset),
        "finish_reason, cut": stream(HOLA + FINISH, Call.close),
        "finish_reason, reset": stream(HOLA + FINISH, Call.reset),
        "finish_reason error": says(HOLA, piece("error")),
        "one choice of two": stream(HOLA + STOP, piece(index=1), Call.end),
        "error": says(HOLA + ERROR),
        "HTML": says(HOLA + b"data: " + HTML + b"\n\n"),
        "more than JSON": says(HOLA + b'data: {"choices":[]}{}\n\n'),
        "depth": says(HOLA + b"data: " + b"[" * 100_000 + b"\n\n"),
        "choices": says(HOLA + event({"choices": 5})),
        "delta": says(HOLA + event({"choices": [{"delta": "a"}]})),
    },
)
async def test_anything_else_is_an_error_and_never_looks_complete(client, upstream, script):
    upstream.script(script)
    response = await client.post("/ask", json=ASK)
    expected = fault("upstream_error", 502, request_id=client.row)
    assert events(response.content) == [delta("Hola"), expected]
    assert "SECRET" not in response.text
    (closing,) = await closings(client)
    assert (closing["level"], closing["message"]) == ("ERROR", "ask failed")


FAILED = {"choices": [{"finish_reason": "error", "message": TURN}]}


@cases(
    "ask, script",
    {
        "close": (ASK, Call.close),
        "reset": (ASK, Call.reset),
        "no HTTP": (ASK, garbage),
        "empty stream": (ASK, stream(Call.end)),
        "cut stream": (ASK, stream(Call.reset)),
        "error": (ASK, stream(ERROR, DONE, Call.end)),
        "comments": (ASK, says(PING * 3)),
        "the end mark alone": (ASK, says()),
        "no choice": (ASK, says(event({"choices": []}) + USAGE)),
        "finish_reason error": (ASK, says(piece("error"))),
        "HTML for a stream": (ASK, replies(200, HTML, content_type="text/html")),
        "HTML": (PLAIN, replies(200, HTML, content_type="text/html")),
        "more than JSON": (PLAIN, replies(200, json.dumps(completion("Hola")).encode() + HTML)),
        "error object": (PLAIN, replies(200, refused("SECRET"))),
        "plain finish_reason error": (PLAIN, replies(200, FAILED)),
        "no choices": (PLAIN, replies(200, {"choices": []})),
        "no message": (PLAIN, replies(200, {"choices": [{"message": None}]})),
        "list": (PLAIN, replies(200, [])),
        "nothing": (PLAIN, replies(200, b"")),
        "cut": (PLAIN, cut),
        "plain close": (PLAIN, Call.close),
    },
)
async def test_an_answer_that_is_none_has_a_status(shared, ask, script):
    response = await (await shared(script, openai_max_retries=0)).post("/ask", json=ask)
    problem(response, "upstream_error")
    assert "SECRET" not in response.text


@overlapping
async def test_an_upstream_that_compresses_all_the_same_is_read(shared):
    go = asyncio.Event()
    packer = zlib.compressobj(wbits=31)
    first = packer.compress(HOLA) + packer.flush(zlib.Z_SYNC_FLUSH)
    last = packer.compress(FINISH + DONE) + packer.flush()
    script = play(
        lambda call: call.start(content_encoding="gzip"), first, waits(go), last, Call.end
    )
    client = await shared(
        script,
        replies(200, zipped(completion("Hola")), content_encoding="gzip"),
        replies(400, zipped(refused("Too long.")), content_encoding="gzip"),
        replies(400, b"no gzip", content_encoding="gzip"),
        replies(200, b"no gzip", content_encoding="gzip"),
    )
    async with asking(client) as wire:
        assert events(await wire.write()) == [delta("Hola")], "while the upstream is still talking"
        go.set()
        assert events(b"".join(await wire.rest())) == [done(), "[DONE]"]
    assert (await client.post("/ask", json=PLAIN)).json()["response"] == "Hola"
    body = problem(await client.post("/ask", json=PLAIN), "upstream_rejected")
    assert body["detail"] == "Too long."
    problem(await client.post("/ask", json=PLAIN), "upstream_rejected")
    problem(await client.post("/ask", json=PLAIN), "upstream_error")


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


@processes
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
    async with launched(cwd=tmp_path, **before(upstream)) as running:
        at_first = running.peak()
        for name, (ask, script) in tried.items():
            upstream.script(script)
            problem(await running.client.post("/ask", json=ask), "upstream_error")
            assert running.peak() - at_first < 150, name
    assert len(upstream.calls) == len(tried), "none is worth another try"


# What a model does not take.


HOSTS_AND_NAMES = {"api.openai.com": NEW, "EU.API.OpenAI.com": NEW, "x.openai.azure.com": NEW}
HOSTS_AND_NAMES |= {"x.services.ai.azure.com": NEW, "evil-openai.com": OLD}
HOSTS_AND_NAMES |= {"openai.com.example": OLD, "localhost:11434": OLD}


@pytest.mark.parametrize(("host", "name"), HOSTS_AND_NAMES.items())
async def test_the_host_decides_how_the_token_limit_is_called(start, proxy, host, name):
    client = await start(openai_base_url=f"http://{host}/v1")
    await client.post("/ask", json=FULL)
    await client.post(CHAT, json=BODY | {OLD: 9, NEW: 9})
    for body in proxy.bodies:
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


async def test_a_model_that_refuses_both_token_fields_is_not_asked_for_ever(start, upstream):
    refusals = (USE_NEW, UNSUPPORTED.format(NEW))
    client = await start(*(replies(400, refused(each)) for each in refusals))
    response = await client.post("/ask", json=FULL)
    problem(response, "upstream_rejected")
    assert len(upstream.calls) == 2


@pytest.mark.parametrize(
    ("param", "code", "message"),
    [
        (OLD, None, f"{OLD} is too large: 6000. This model supports at most 4096 tokens."),
        (None, None, f"'{OLD}' or '{NEW}' is too large: 64000."),  # vLLM
        (OLD, "InvalidParameter", f"The parameter `{OLD}` specified is not valid: too large"),
        (HEAT, "decimal_above_max_value", f"Invalid '{HEAT}': decimal above maximum value."),
        ("tools", "unsupported_parameter", UNSUPPORTED.format("tools")),
    ],
)
async def test_a_mere_mention_is_handed_on(start, upstream, param, code, message):
    client = await start(replies(400, refused(message, code, param)), answer)
    response = await client.post("/ask", json=FULL)
    problem(response, "upstream_rejected")
    assert response.json()["detail"] == message
    response = await client.post("/ask", json=FULL)
    assert events(response.content)[-2] == done()
    assert upstream.bodies[0] == upstream.bodies[1]


async def test_the_refusal_of_a_field_that_was_not_sent_is_handed_on(start, upstream):
    client = await start(replies(400, refused(ONLY_ONE, "unsupported_value", HEAT)))
    problem(await client.post("/ask", json=ASK), "upstream_rejected")
    assert len(upstream.calls) == 1


async def test_an_upstream_that_quotes_the_caller_teaches_nothing(start, upstream):
    async def censor(call: Call) -> None:
        said = call.body["messages"][-1]["content"]
        quoted = refused(f"Refused by policy. You wrote: {said}")
        await (replies(400, quoted) if "not supported" in said else answer)(call)

    client = await start(censor)
    for _ in range(2):
        asked = FULL | {"prompt": UNSUPPORTED.format(HEAT)}
        problem(await client.post("/ask", json=asked), "upstream_rejected")
        assert events((await client.post("/ask", json=FULL)).content)[-2] == done()
        assert upstream.bodies[-1][HEAT] == 0.7


async def test_an_upstream_that_quotes_a_field_under_v1_teaches_nothing(start, upstream):
    own = {"reasoning_effort": f"unsupported parameter: {OLD}"}
    quoting = [replies(400, refused(f"Invalid: {own}"))] * 2
    client = await start(*quoting, answer, max_output_tokens=9)
    assert (await client.post(CHAT, json=BODY | own)).status_code == 400
    assert [OLD in body for body in upstream.bodies] == [True, False], "tried, as it cannot know"
    assert (await client.post("/ask", json=PLAIN)).status_code == 200
    assert (upstream.bodies[-1][OLD], await load(client, "/logs?level=WARNING")) == (9, [])


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


async def test_a_refusal_without_end_is_searched_in_linear_time(start):
    texts = ("unsupported parameter ", "max_tokens ", " not support ", "unknown  ")
    client = await start(*(replies(400, refused(text * 50_000)) for text in texts for _ in "12"))
    begun = time.process_time()
    for text in texts:
        asked = FULL | {"prompt": text * 10_000}
        problem(await client.post("/ask", json=asked), "upstream_rejected")
    assert time.process_time() - begun < 5


# Refusals of the upstream, further tries and its silence.


BECOMES = {
    **dict.fromkeys((400, 402, 404, 413, 422), ("upstream_rejected", 1)),
    **dict.fromkeys((401, 403), ("upstream_auth", 1)),
    429: ("rate_limited", 2),
    **dict.fromkeys((408, 409, 500, 503, 529), ("upstream_error", 2)),
    **dict.fromkeys((302, 307, 418), ("upstream_error", 1)),
}


@overlapping
@at_once(
    "theirs, code, calls",
    {str(status): (status, *becomes) for status, becomes in BECOMES.items()},
    openai_max_retries=1,
)
async def test_a_status_of_the_upstream_becomes_ours(client, upstream, theirs, code, calls):
    upstream.script(replies(theirs, refused("SECRET"), location=f"{upstream.url}/models"))
    for each in await asyncio.gather(*(client.post("/ask", json=ask) for ask in (ASK, PLAIN))):
        status = problem(each, code)["status"]
        assert ("SECRET" in each.text) is (status != 502)
    assert len(upstream.calls) == 2 * calls
    for event in await closings(client, 2):
        assert event["message"] == "ask failed"
        assert (event["metadata"]["status"], event["metadata"]["code"]) == (status, code)


@overlapping
async def test_an_upstream_without_a_port_is_unreachable(shared):
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}/v1"
        client = await shared(openai_base_url=url, openai_max_retries=1)
        problem(await client.post("/ask", json=ASK), "upstream_unreachable")


OPENROUTER = {"message": "Provider", "metadata": {"raw": json.dumps(refused("Too long: é"))}}


@cases(
    "body",
    {
        "OpenAI": {"error": {"message": "Too long: é"}},
        "Ollama": {"error": "Too long: é"},
        "Mistral": {"object": "error", "message": "Too long: é"},
        "FastAPI": {"detail": "Too long: é"},
        "FastAPI's list": {"detail": [{"loc": ["body", "n"], "msg": "Too long: é"}]},
        "a list": {"errors": [{"message": "Too long: é"}]},
        "beside": {"error": "Bad Request", "message": "Too long: é"},
        "OpenRouter": {"error": OPENROUTER},
        "plain text": "Too long: é".encode(),
        "Google": [{"error": {"message": "Too long: é"}}],
        "beside a code": {"message": "Too long: é", "detail": {"error": "too_long"}},
        "beside a trace": {"message": "Too long: é", "metadata": {"detail": "req-123"}},
        "beside a success": {"message": "Too long: é", "base_resp": {"status_msg": "success"}},
        "strings": {"errors": "Too long: é"},
    },
)
async def test_the_upstreams_own_message_is_handed_on(shared, body):
    client = await shared(replies(400, body))
    told = (await client.post("/ask", json=ASK)).json()["detail"]
    assert told == ("body.n: " if "loc" in str(body) else "") + "Too long: é"
    under_v1 = (await client.post(CHAT, json=BODY)).json()
    assert under_v1["error"]["message"] == told


@pytest.mark.parametrize("status", [400, 429])
@pytest.mark.parametrize("kind", ["text/html", "application/json"])
@cases(
    "body",
    {
        "bare": HTML,
        "in JSON": refused(HTML.decode()),
        "byte order mark": b"\xef\xbb\xbf" + HTML,
        "in a list": {"detail": [{"loc": ["body"], "msg": HTML.decode()}]},
        "in metadata": {"error": {"message": "No.", "metadata": {"raw": HTML.decode()}}},
        "behind words": refused(f"Bad gateway: {HTML.decode()}"),
    },
)
async def test_a_page_of_html_is_never_handed_on(shared, status, kind, body):
    client = await shared(replies(status, body, content_type=kind), openai_max_retries=0)
    response = await client.post("/ask", json=ASK)
    assert (response.status_code, "<" in response.text) == (status, False)


async def test_a_key_in_the_upstreams_message_is_masked(shared):
    keys = ("sk-test/a+b=0123456789", "sk-other-0123456789", "Bearer abc.def")
    script = replies(400, refused(f"risk-free: {', '.join(keys)}, HTTPBearer Bearer abc.def"))
    response = await (await shared(script, openai_api_key=keys[0])).post("/ask", json=ASK)
    assert response.json()["detail"] == "risk-free: ***, ***, ***, HTTPBearer ***"


LONG_AGO = formatdate(0, usegmt=True)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("7", "7"), ("2.2", "3"), ("86401", "86400"), ("1e308", "86400"), (LONG_AGO, "0")]
    + [(formatdate(time.time() + 3e7, usegmt=True), "86400")]
    + [(each, None) for each in ("nan", "inf", "soon", "1" * 400, "", None)],
)
async def test_retry_after_is_handed_on_in_whole_seconds(shared, theirs, ours):
    header = {} if theirs is None else {"retry_after": theirs}
    client = await shared(replies(429, refused("Slow down."), **header), openai_max_retries=0)
    response = await client.post("/ask", json=ASK)
    assert (response.status_code, response.json()["detail"]) == (429, "Slow down.")
    assert response.headers.get("retry-after") == ours


async def test_a_long_retry_after_is_told_at_once_a_date_in_seconds(shared, upstream):
    later = formatdate(time.time() + 30, usegmt=True)
    response = await (await shared(replies(429, retry_after=later))).post("/ask", json=ASK)
    assert 25 <= int(response.headers["retry-after"]) <= 30
    assert len(upstream.calls) == 1


@pytest.mark.parametrize(("status", "told"), [(503, "7"), (529, "7"), (500, None)])
async def test_a_busy_upstream_s_patience_is_handed_on_and_not_tried(
    shared, upstream, status, told
):
    client = await shared(replies(status, retry_after="7"))
    response = await client.post("/ask", json=ASK)
    problem(response, "upstream_error")
    assert (response.headers.get("retry-after"), len(upstream.calls)) == (told, 1)


@overlapping
@at_once(
    "fails, patience",
    {
        "429": (replies(429, retry_after="1"), 0.99),
        "503": (replies(503, retry_after="0"), 0),
        "500": (replies(500), 0),
        "close": (Call.close, 0),
    },
    openai_max_retries=1,
)
async def test_another_try_may_help_after_the_time_that_was_asked_for(
    client, upstream, fails, patience
):
    upstream.script(fails, answer)
    begun = time.monotonic()
    assert (await client.post("/ask", json=ASK)).status_code == 200
    assert time.monotonic() - begun >= patience
    assert len(upstream.calls) == 2
    (closing,) = await closings(client)
    assert closing["message"] == "ask finished"


@overlapping
async def test_there_are_as_many_further_tries_as_allowed(shared, upstream):
    for retries, calls in ((0, 1), (2, 1 + 3)):
        client = await shared(replies(503), openai_max_retries=retries)
        problem(await client.post("/ask", json=ASK), "upstream_error")
        assert len(upstream.calls) == calls


@overlapping
@at_once("status, calls", {"400": (400, 1), "503": (503, 3)})
async def test_a_refusal_that_breaks_off_is_an_error_and_tried_again_by_its_status(
    client, upstream, status, calls
):
    async def broken(call: Call) -> None:
        await call.start(status)
        await call.write(b'{"error":{"mess')
        await call.close()

    upstream.script(broken)
    problem(await client.post("/ask", json=PLAIN), "upstream_error")
    assert len(upstream.calls) == calls


@overlapping
@at_once(
    "ask, script",
    {
        "stream": (ASK, Call.hang),
        "stream, after its head": (ASK, stream(Call.hang)),
        "plain": (PLAIN, Call.hang),
        "plain, half said": (PLAIN, half),
    },
    openai_timeout=0.2,
    openai_max_retries=9,
)
async def test_silence_from_the_start_is_a_504(client, upstream, ask, script):
    upstream.script(script)
    begun = time.monotonic()
    problem(await client.post("/ask", json=ask), "upstream_timeout")
    assert 0.2 <= time.monotonic() - begun < 3
    await soon(upstream.calls[0].left, 5)
    assert len(upstream.calls) == 1


@overlapping
async def test_tries_that_hear_nothing_share_one_timeout(shared):
    async def hang_up(call: Call) -> None:
        await asyncio.sleep(0.2)  # Each try is shorter than the time-out, all of them are not.
        await call.close()

    client = await shared(hang_up, openai_timeout=0.4, openai_max_retries=4)
    begun = time.monotonic()
    assert (await client.post("/ask", json=ASK)).status_code in {502, 504}
    assert time.monotonic() - begun < 3


@overlapping
async def test_a_time_out_that_is_due_with_a_heartbeat_is_a_504(shared):
    client = await shared(Call.hang, openai_timeout=0.5, heartbeat_seconds=0.5)
    asked = [client.post("/ask", json=ASK) for _ in range(10)]
    for response in await asyncio.gather(*asked):
        problem(response, "upstream_timeout")


@overlapping
async def test_silence_after_the_first_byte_is_an_event(shared, upstream):
    for script, heartbeat, said in (
        (stream(chunk("Ho"), Call.hang), 15, [delta("Ho")]),
        (Call.hang, 0.1, []),
    ):
        client = await shared(script, openai_timeout=0.8, heartbeat_seconds=heartbeat)
        response = await client.post("/ask", json=ASK)
        assert events(response.content) == [*said, fault("upstream_timeout", 504)]
        await soon(upstream.calls[-1].left, 5)


@overlapping
async def test_an_upstream_that_keeps_talking_is_not_timed_out_nor_are_pings_kept_back(shared):
    async def drip(call: Call) -> None:
        for piece in (b": thinking\n\n", b"data: ", b'{"choices":[]}', b"\n\n") * 3:
            await asyncio.sleep(0.2)  # A fifth of the time-out, and twice as long in all.
            await call.write(piece)

    script = stream(drip, HOLA, FINISH + DONE, Call.end)
    client = await shared(script, openai_timeout=1, heartbeat_seconds=0.1)
    response = await client.post("/ask", json=ASK)
    assert response.text.startswith(": ping\n\n")
    assert events(response.content) == [delta("Hola"), done(), "[DONE]"]


# Clients that leave, or do not read.


@cases(
    "path, ask, script, said",
    {
        "before its head": ("/ask", ASK, Call.hang, False),
        "after its head": ("/ask", ASK, stream(Call.hang), False),
        "after a delta": ("/ask", ASK, stream(HOLA, Call.hang), True),
        "while it talks": ("/ask", ASK, Call.talk, True),
        "plain": ("/ask", PLAIN, Call.hang, False),
        "plain, half said": ("/ask", PLAIN, half, False),
        "/v1, after a chunk": (CHAT, STREAMED, stream(HOLA, Call.hang), True),
        "/v1, plain": (CHAT, BODY, Call.hang, False),
    },
)
async def test_a_client_that_leaves_closes_the_upstream(start, upstream, path, ask, script, said):
    client = await start(script, answer)
    async with asking(client, ask, path=path) as wire:
        await soon(upstream.called)
        if said:
            await wire.write()
    await soon(upstream.calls[0].left)
    await cancelled(client)


async def test_a_client_that_leaves_unread_text_closes_the_upstream(start, upstream):
    flood = Flood(then=Call.hang)
    client = await start(flood, answer)
    async with asking(client):
        await soon(flood.blocked, 10)
    await soon(upstream.calls[0].left, 5)
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
    await soon(upstream.calls[0].left, 5)


async def test_a_client_that_does_not_read_holds_up_the_upstream_and_the_clocks(shared):
    flood = Flood(then=play(FINISH + DONE, Call.end))
    client = await shared(flood, openai_timeout=0.4, heartbeat_seconds=0.1)
    async with asking(client) as wire:
        await soon(flood.blocked, 10)
        assert flood.pieces < 128, "32 MB under way is more than the buffers of sockets hold"
        spent = time.process_time()
        await asyncio.sleep(0.3)  # Three heartbeats, and more than OPENAI_TIMEOUT in all.
        assert time.process_time() - spent < 0.2
        written = b"".join(await wire.rest())
    assert written.count(PING) < 9
    assert events(written) == [*[delta(Flood.piece)] * flood.pieces, done(), "[DONE]"]


async def test_a_client_that_reads_nothing_gives_its_place_back(start, upstream):
    async def pour(call: Call) -> None:
        await call.start()
        with suppress(ConnectionError):
            while True:
                await call.say(Flood.piece)
        call.left.set()

    client = await start(pour, answer, client_timeout=0.3, max_concurrent_asks=1)
    async with asking(client):
        await soon(upstream.called)
        await soon(upstream.calls[0].left, 10)
        await cancelled(client)
        assert (await client.post("/ask", json=ASK)).status_code == 200


# 3. GET /status.


async def test_the_status_counts_the_asks_and_their_tokens(start, upstream):
    client = await start()

    async def refuse(call: Call) -> None:
        await call.reply(400, refused("no"))

    about = {"status": "running", "version": "1.0.0", "openai_connected": True, "tokens_used": 0}
    about |= {"model": MODEL, "uptime_seconds": ANY, "asks": NOTHING_YET}
    assert await load(client, "/status") == about
    upstream.script(answer, answer, refuse, Call.hang)
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


CONNECTED: dict[Any, bool] = {200: True, 404: True, 405: True, 401: False, 403: False, 500: False}
CONNECTED |= {"closed": False, "was not there": False}


@overlapping
@at_once("did, connected", {str(did): (did, connected) for did, connected in CONNECTED.items()})
async def test_the_models_list_tells_of_a_connection(start, upstream, did, connected):
    async def listing(call: Call) -> None:
        assert (call.method, call.path) == ("GET", "/v1/models")
        assert call.headers["authorization"] == f"bearer {KEY}"
        await call.reply(did, {"data": []}) if did != "closed" else call.abort()

    upstream.script(listing)
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


@processes  # since it takes so long
async def test_calls_share_a_probe_that_hangs_for_six_seconds_at_most(upstream, tmp_path):
    upstream.script(Call.hang)
    async with launched(cwd=tmp_path, **before(upstream)) as running:
        begun = time.monotonic()
        states = await asyncio.gather(*(load(running.client, "/status") for _ in range(3)))
        states.append(await load(running.client, "/status"))
        assert time.monotonic() - begun < 9, "six, and some for a slow machine"
    assert [each["openai_connected"] for each in states] == [False] * 4
    assert len(upstream.calls) == 1


# 4. GET /logs.


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


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("limit", ["0", "1001", "-1", "abc", "1_0", "+5", "1.0", " 5", "", "9" * 5000, "\u0665"]),
        ("level", ["LOUD", "", "INFO,ERROR", "20", "NOTSET", " INFO"]),
    ],
)
async def test_a_limit_or_a_level_that_is_none_is_refused(guarded, name, values):
    for value in values:
        response = await guarded.get("/logs", params={name: value})
        (error,) = problem(response, "invalid_request")["errors"]
        assert error["field"] == name


@pytest.mark.parametrize("level", ["DEBUG", "INFO"])
async def test_polling_writes_no_event(start, level):
    client = await start(log_level=level)
    at_first = await load(client)
    assert "startup complete" in str(at_first), "uvicorn's events go the same way"
    for path in ("/status", "/logs", "/metrics", "/status"):
        assert (await client.get(path)).status_code == 200
    assert await load(client) == at_first


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


async def test_values_keep_their_shape_in_the_log(start):
    client = await start()
    shapes: dict[str, Any] = {
        "list": ["a", [f"{KEY}"], 1, 1.5, True, None],
        "object": {KEY: {"1": KEY}},
    }
    structlog.get_logger().error("shapes", **shapes)
    (event,) = await load(client, "/logs?level=ERROR")
    masked = {"list": ["a", ["***"], 1, 1.5, True, None], "object": {"***": {"1": "***"}}}
    assert event["metadata"] == masked


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
        assert 0 <= times[0] <= times[1] < 30_000
    common = {"prompt_chars": 4, "duration_ms": ANY, "stream": True, "model": "gpt-real"}
    whole = {**common, "answer_chars": 4, "tokens_used": 7, "finish_reason": "stop"}
    rejected = {"model": MODEL, "code": "upstream_rejected", "status": 400}
    broken = {"first_token_ms": ANY, "answer_chars": 2, "code": "upstream_error", "status": 502}
    assert [(event["level"], event["message"], event["metadata"]) for event in closed] == [
        ("INFO", "ask finished", {**whole, "request_id": "a", "first_token_ms": ANY}),
        ("INFO", "ask finished", {**whole, "request_id": "b", "stream": False}),
        ("ERROR", "ask failed", {**common, "request_id": "c", **rejected}),
        ("ERROR", "ask failed", {**common, "request_id": "d", **broken}),
    ]


async def test_prompts_answers_and_keys_reach_no_log(capfd, start):
    scripts = [
        says(chunk("SECRET"), FINISH),
        *(replies(status, refused(f"No: {KEY}")) for status in (400, 401, 429, 500)),
        replies(200, completion("SECRET") | {"choices": []}),
        stream(chunk("SECRET") + b"data: SECRET\n\n", Call.end),
        stream(event(refused(KEY)), Call.end),
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


@processes
async def test_standard_output_shows_what_logs_shows_and_no_prompt_at_any_level(tmp_path):
    env = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    async with launched(cwd=tmp_path, LOG_LEVEL="DEBUG", **env) as running:
        for streamed in (True, False):
            asked = {"prompt": "xylophone", "history": [TURN | {"content": "zyzzyva"}]}
            response = await running.client.post("/ask", json=asked | {"stream": streamed})
            assert "xylophone" in response.text, "the demo model needs no proxy"
        kept = await load(running.client)
        running.process.send_signal(signal.SIGINT)
        shown = await running.ended()
        assert running.process.returncode in {0, -signal.SIGINT}
    for line in shown:
        rest = line.keys() - {"timestamp", "level", "message"}
        line["metadata"] = {key: line.pop(key) for key in rest} or None
    assert shown[: len(kept)] == kept
    assert [event["message"] for event in kept].count("ask finished") == 2
    assert not re.search("xylophone|zyzzyva", running.output)


TERMINAL = "import pty, sys; pty.spawn([sys.executable, sys.argv[1]])"


@processes
async def test_control_characters_never_reach_a_terminal_raw_and_the_log_has_them(
    upstream, tmp_path
):
    nasty = "\x1b]0;title\x07\x1b[2J\x9b2J\x7f\x08\r\n\x00"
    upstream.script(says(chunk("Hola", finish_reason=nasty, model=f"gpt{nasty}")))
    async with launched("-c", TERMINAL, SERVICE, cwd=tmp_path, **before(upstream)) as running:
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


@processes
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


# The log database.


def rows(path: Path) -> list[Any]:
    """The events in the file at *path*, in the order in which they were written."""
    found = []
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        for (table,) in tables.fetchall():
            for row in connection.execute(f'SELECT * FROM "{table}" ORDER BY rowid'):
                found += [json.loads(each) for each in row if str(each).startswith('{"')]
    return found


async def stored(path: Path, enough: Callable[[list[str]], object]) -> list[str]:
    """The messages in the file at *path*, as soon as they are *enough*."""
    messages: list[str] = []
    async with asyncio.timeout(30):
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


@processes
async def test_events_outlive_the_process_however_it_ends_and_a_stop_loses_none(tmp_path):
    path = tmp_path / "log.db"
    env = {"LOG_DATABASE": str(path)}
    shown: list[Any] = []
    for end in (signal.SIGKILL, signal.SIGTERM):
        async with launched(cwd=tmp_path, **env) as running:
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


@processes
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


@pytest.mark.parametrize("name", ["log.db", "a b%20c.db", "a?b#c&d.db", "\u00e9\U0001f600.db"])
async def test_the_file_answers_with_the_newest_filtered_and_then_limited(upstream, tmp_path, name):
    path, log = tmp_path / name, structlog.get_logger()
    async with client_of(upstream, log_buffer_size=50, log_database=str(path)):
        log.error("a")
        log.error("b")
    async with client_of(upstream, log_buffer_size=5, log_database=str(path)) as client:
        for each in "cdef":
            log.info(each)
        # Whether or not they have been written yet.
        for _ in range(2):
            told = [
                [each["message"] for each in await load(client, f"/logs?{query}")]
                for query in ("limit=2", "level=INFO&limit=3")
            ]
            assert told == [["e", "f"], ["d", "e", "f"]]
            await stored(path, lambda now: now[-1:] == ["f"])
    async with client_of(upstream, log_database=str(path)) as client:
        kept = [event["message"] for event in await load(client)]
    assert kept[:1] != ["a"], "no more than the buffer"
    assert [each for each in kept if len(each) == 1][-3:] == ["d", "e", "f"]


async def test_an_answer_while_the_file_is_being_written_is_never_out_of_order(start, tmp_path):
    path = tmp_path / "log.db"
    client = await start(log_database=str(path))
    for number in range(100):
        structlog.get_logger().info(str(number))
        told = [event["message"] for event in await load(client, "/logs?limit=3")]
        assert told[-min(3, number + 1) :] == [
            str(each) for each in range(max(0, number - 2), number + 1)
        ]
    await stored(path, lambda now: now[-100:] == [str(each) for each in range(100)])


async def test_there_are_never_more_rows_than_the_buffer_holds_and_the_file_stops_growing(
    start, tmp_path
):
    path = tmp_path / "log.db"
    more = {f"key-{number}": "x" * 2000 for number in range(20)}
    client = await start(log_database=str(path), log_buffer_size=20)
    sizes = []
    for batch in range(20):
        for number in range(20):
            structlog.get_logger().info(f"{batch}.{number}", **more)
        await load(client, "/logs?limit=1")  # or a quarter of a second would pass for each batch
        messages = await stored(path, lambda now: now[-1:] == [f"{batch}.19"])  # noqa: B023
        assert len(messages) == 20
        sizes.append(sum(each.stat().st_size for each in tmp_path.iterdir()))
    assert 2 * max(sizes) < 20 * 20 * 40_000, "so much was written"
    assert max(sizes[10:]) <= 1.3 * max(sizes[:10])


def other_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, text TEXT)")


UNUSABLE: dict[str, Callable[[Path], object]] = {
    "its directory is missing": lambda path: path.parent.rmdir(),
    "a directory": Path.mkdir,
    "a text": lambda path: path.write_text("This is my diary, and no database.\n" * 100),
    "a database with other events": other_table,
}


@processes
async def test_a_path_that_cannot_be_used_stops_the_start_and_is_left_as_it_is(tmp_path):
    paths = [tmp_path / str(number) / "log.db" for number in range(len(UNUSABLE))]
    for path, prepare in zip(paths, UNUSABLE.values(), strict=True):
        path.parent.mkdir()
        prepare(path)
    contents = [path.read_bytes() if path.is_file() else None for path in paths]
    read_only = tmp_path / "read-only.db"
    with closing(sqlite3.connect(read_only)) as connection:
        connection.execute("PRAGMA user_version = 0")
    read_only.touch()
    read_only.chmod(0o444)
    # Even root must obey the permissions of the file.
    obedient = ("setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner")
    command = (*(obedient if os.geteuid() == 0 else ()), sys.executable, SERVICE)
    execute = ("-c", "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])")
    env = {"OPENAI_API_KEY": "demo", "API_PORT": "0"}
    ends = await asyncio.gather(
        finished(*execute, *command, cwd=tmp_path, LOG_DATABASE=str(read_only), **env),
        *(finished(SERVICE, cwd=tmp_path, LOG_DATABASE=str(path), **env) for path in paths),
    )
    for (code, out, errors), path in zip(ends, [read_only, *paths], strict=True):
        assert (code, out, len(errors)) == (2, "", 1), path
        assert re.fullmatch(r"LOG_DATABASE: .*\.db' .+", errors[0])
    assert contents == [path.read_bytes() if path.is_file() else None for path in paths]


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
        assert time.monotonic() - began < 20, "or each event has waited for the lock"
        kept = [event["message"] for event in await load(client)]
        assert (kept.count("step"), kept.count("ask finished")) == (pieces, 6)
        assert "step" not in {event["message"] for event in rows(path)}
    assert await stored(path, lambda now: now.count("ask finished") == 6) == kept


async def test_a_file_that_is_locked_at_the_start_is_written_later(start, tmp_path):
    path = tmp_path / "log.db"
    with locked(path):
        client = await start(log_database=str(path))
        assert (await client.post("/ask", json=ASK)).status_code == 200
        kept = [event["message"] for event in await load(client)]
        assert kept[-1] == "ask finished"
    written = await stored(path, lambda now: "ask finished" in now)
    assert written[-len(kept) :] == kept


@processes
async def test_a_lock_that_outlasts_the_service_does_not_hold_up_its_end(tmp_path):
    path = tmp_path / "log.db"
    async with launched(cwd=tmp_path, LOG_DATABASE=str(path)) as running:
        await stored(path, lambda now: "Application startup complete." in now)
        with locked(path):
            for _ in range(10):
                await running.client.post("/ask", json={"prompt": "/empty"})
                await asyncio.sleep(0.05)  # so that tries and events meet at several times
            running.process.send_signal(signal.SIGINT)
            async with asyncio.timeout(20):
                ended = await running.ended()
    assert [event["message"] for event in ended].count("ask finished") == 10


@processes
async def test_a_full_disk_fails_no_ask_and_what_waited_is_written_when_there_is_room(tmp_path):
    path = tmp_path / "log.db"
    env = {"LOG_DATABASE": str(path)}
    async with launched(cwd=tmp_path, **env) as running:
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


# 5. Errors.


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
async def test_no_such_path_is_404_and_no_such_method_405(guarded, methods, path, allowed):
    for method in methods.split():
        response = await guarded.request(method, path)
        problem(response, "method_not_allowed" if allowed else "not_found")
        assert not allowed or allowed in response.headers["allow"].split(", ")


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


def wrong_bodies(size: int = MIB) -> dict[str, str]:
    """Bodies of a MiB at most that hold as much that is wrong as they can."""
    names = ",".join(f'"{number:x}":0' for number in range(109_000))
    return {
        "turns": f'{{"prompt":"p","history":[{",".join(["{}"] * 349_000)}]}}',
        "fields": f'{{"prompt":"p",{names}}}',
        "fields of a turn": f'{{"prompt":"p","history":[{{"role":"user","content":"p",{names}}}]}}',
        "fields of turns": f'{{"history":[{",".join([f"{{{names[:886]}}}"] * 1000)}]}}',
    }


@processes
async def test_a_body_that_is_all_wrong_and_a_host_without_end_hold_up_nobody_and_cost_little(
    tmp_path,
):
    async with launched(cwd=tmp_path) as running, asyncio.TaskGroup() as tasks:
        at_first = running.peak()
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
            assert longest < 5, name
        for number in range(20):
            sent = f"GET /status HTTP/1.1\r\nHost: {number}.{'x' * 4 * MIB}\r\n\r\n"
            async with connection(running.client) as (reader, writer), asyncio.timeout(30):
                writer.write(sent.encode())
                # It may be refused, and closed, before all of it is sent.
                with suppress(ConnectionError):
                    assert re.match(rb"HTTP/1.1 4\d\d |$", await reader.readline())
        assert running.peak() - at_first < 150


@pytest.mark.parametrize("settings", [{}, {"system_prompt": "Be kind."}], ids=["open", "prompt"])
async def test_a_body_of_very_many_messages_does_not_hold_up_others(shared, settings):
    client = await shared(**settings)
    body = '{"messages":[%s{}]}' % ("{}," * 349_000)
    await load(client, "/status")
    slowest, asked = 0.0, asyncio.create_task(client.post(CHAT, content=body, headers=JSON))
    while not asked.done():
        begun = time.monotonic()
        await load(client, "/status")
        slowest = max(slowest, time.monotonic() - begun)
    assert (await asked).status_code == (422 if settings else 200)
    assert slowest < 5


H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")


async def test_a_wish_for_another_protocol_is_refused_with_its_remedy_and_no_body_is_a_request(
    client,
):
    request = b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for method, host, late in itertools.product(
        (b"POST", b"PUT", b"GET"), ("localhost", "evil.example"), (False, True)
    ):
        head = post("", *H2C, host=host).replace(b"Length: 0", b"Length: %d" % len(request))
        head = head.replace(b"POST", method)
        async with connection(client) as (reader, writer), asyncio.timeout(30):
            writer.write(head if late else head + request)
            said = await reader.readuntil(b"}")
            writer.write(request)
            with suppress(ConnectionError):
                said += await reader.read()
        assert len(re.findall(rb"HTTP/1.1 [0-9]{3} ", said)) == 1
        assert b'"code":"upgrade_not_supported"' in said
        assert b"\r\nconnection: close\r\n" in said.lower()
        assert b"HTTP_1_1" in said, "the remedy for Java"


@processes
async def test_the_service_refuses_an_upgrade_or_serves_it_as_http_1(tmp_path):
    async with launched(cwd=tmp_path) as running:
        for late in (False, True):
            head, _, body = post(json.dumps(PLAIN), *H2C).partition(b"{")
            async with connection(running.client) as (reader, writer), asyncio.timeout(30):
                writer.write(head if late else head + b"{" + body)
                if late:
                    await load(running.client, "/status")  # so the head has been read
                    writer.write(b"{" + body)
                wire = Wire(reader, writer)
                said = json.loads(await wire.write())
            assert said.get("model") == "demo" or said["code"] == "upgrade_not_supported"
            assert wire.head.startswith("http/1.1 200 " if "model" in said else "http/1.1 400 ")


# 6. Requests and headers.


async def test_a_request_id_is_taken_or_made_on_every_response(guarded):
    made = set()
    for given in ("", "x" * 65, "a b", "a/b", b"caf\xe9", "sk-abcdefgh", "x.sk-abcdefgh"):
        response = await guarded.get("/status", headers={"X-Request-ID": given})
        assert re.fullmatch("[A-Za-z0-9._-]{8,64}", response.headers["x-request-id"])
        made.add(response.headers["x-request-id"])
    assert len(made - {"sk-abcdefgh", "x.sk-abcdefgh"}) == 7
    for given in ("a", "x" * 64):
        response = await guarded.get("/status", headers={"X-Request-ID": given})
        assert response.headers["x-request-id"] == given
    headers = {"X-Request-ID": "A-z_0.9", "Access-Control-Request-Method": "POST"}
    for path in ("/", "/ask", "/status", "/logs", "/openapi.json", "/docs", "/redoc", "/nothing"):
        for way in ("GET", "OPTIONS"):
            response = await guarded.request(way, path, headers=headers, follow_redirects=False)
            assert response.headers.get_list("x-request-id") == ["A-z_0.9"]


async def test_a_preflight_is_granted_for_what_pages_may_do_without_credentials(guarded):
    names = "content-type, authorization, x-stainless-lang, user-agent, x-of-its-own"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": names}
    for path, method in ("/ask", "POST"), ("/logs", "GET"):
        headers = asked | {"Access-Control-Request-Method": method}
        granted = (await guarded.options(path, headers=headers)).headers
        assert granted["access-control-allow-origin"] == PAGE
        assert method in granted["access-control-allow-methods"]
        assert all(name in granted["access-control-allow-headers"] for name in names.split(", "))
        assert "access-control-allow-credentials" not in granted
    for worse in {"Origin": "http://evil.example"}, {"Access-Control-Request-Method": "PUT"}:
        assert (await guarded.options("/ask", headers=asked | worse)).status_code == 400


# 7. Who may call.


@pytest.mark.parametrize(
    ("origins", "code"),
    [
        (f"{PAGE} http://localhost:9999 https://localhost:9999", "invalid_request"),
        ("http://localhost:9998 http://evil.example null", "origin_not_allowed"),
        (f"{PAGE}.evil.example https://localhost:4200 http://localhost", "origin_not_allowed"),
    ],
)
async def test_pages_may_post_from_allowed_origins_and_the_service_s_own(guarded, origins, code):
    for origin in origins.split():
        headers = {"Host": "localhost:9999", "Origin": origin}
        problem(await guarded.post("/ask", json={}, headers=headers), code)
        read = await guarded.get("/status", headers=headers)
        shown = origin if origin == PAGE else None
        assert (read.status_code, read.headers.get("access-control-allow-origin")) == (200, shown)


@pytest.mark.parametrize("way", ["POST", "OPTIONS"])
async def test_a_foreign_origin_is_warned_about_by_name_and_at_its_preflight_too(start, way):
    client = await start()
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


async def test_a_flood_of_foreign_origins_is_warned_about_once_a_second(start):
    client = await start()
    begun = time.monotonic()
    for number in range(40):
        headers = {"Origin": f"http://{number}.example"}
        problem(await client.post("/ask", json=ASK, headers=headers), "origin_not_allowed")
        preflight = headers | {"Access-Control-Request-Method": "POST"}
        assert (await client.options("/ask", headers=preflight)).status_code == 400
    passed = time.monotonic() - begun
    assert 1 <= len(await load(client, "/logs?level=WARNING")) <= 1 + passed


async def test_a_star_lets_every_origin_in(shared):
    client = await shared(openai_api_key="", cors_origins=("*",))
    for origin in ("http://evil.example", "null"):
        response = await client.post("/ask", json=ASK, headers={"Origin": origin})
        problem(response, "not_configured")
        assert response.headers["access-control-allow-origin"] in {"*", origin}


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


async def test_a_request_without_a_host_is_answered(guarded):
    async with connection(guarded) as (reader, writer), asyncio.timeout(30):
        writer.write(b"GET /status HTTP/1.0\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"200"


async def test_asks_and_logs_want_the_token_and_the_status_does_not(guarded):
    for scheme in ("Bearer", "bearer", "BEARER "):
        headers: Any = {"Authorization": f"{scheme} {TOKEN}"}
        problem(await guarded.post("/ask", json=ASK, headers=headers), "not_configured")
        assert (await guarded.get("/logs", headers=headers)).status_code == 200
    nearly = f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, b"Bearer \xe9"
    for wrong in ("", "Bearer", "Bearer x", *nearly):
        headers = {"Authorization": wrong}
        asked = await guarded.post("/ask", json=ASK, headers=headers)
        for response in asked, await guarded.get("/logs", headers=headers):
            problem(response, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
        assert (await guarded.get("/status", headers=headers)).status_code == 200


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


@overlapping
@at_once("wanted, asks, operators", WHO_OPENS_WHAT)
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
    for path in document["paths"]:
        of_asks = asks != ANYBODY and re.match("/ask|/v1/", path)
        of_operators = operators != ANYBODY and path in {"/logs", "/metrics"}
        assert (path in secured) == bool(of_asks or of_operators)
    assert ("securitySchemes" in document["components"]) == bool(secured)


NOW = int(time.time())  # when the tests began, so an hour is long enough for them


def claims(**changed: object) -> str:
    """Those of a valid token, with these as JSON texts; None leaves a claim out."""
    given = {"sub": '"ana"', "exp": NOW + 3600, "aud": '"app"', **changed}
    return ",".join(f'"{name}":{text}' for name, text in given.items() if text).join("{}")


async def test_a_valid_token_tells_its_user(start):
    client = await start(jwt_secret=SECRET, jwt_audience="app", admin_token=ADMIN)
    now = time.time()
    valid = [
        claims(),
        f" {claims()}\r\n",
        claims(iss='"login"', iat=NOW + 900, jti='"x"'),
        claims(exp=NOW + 3600.5),
        claims(exp="9" * 400),
        claims(exp=now - 5),
        claims(nbf=NOW - 1),
        claims(nbf=now + 29),
        claims(aud='["other","app",1]'),
        claims(sub=f'"{"é" * 256}"'),
        claims(sub=r'"\ud83d\ude00"'),
    ]
    tokens = [signed(each) for each in valid]
    heads = '{"typ":"JWT","kid":"1","alg":"HS256"}', ' { "alg" : "HS256" } '
    tokens += [signed(claims(), header) for header in heads]
    for token in tokens:
        assert (await client.post("/ask", json=PLAIN, headers=bearer(token))).status_code == 200
    client.headers |= bearer(ADMIN)
    users = [event["metadata"]["user"] for event in await closings(client, len(tokens))]
    assert users == ["ana"] * 9 + ["é" * 256, "😀", "ana", "ana"]


async def test_where_no_audience_is_set_none_is_looked_at(shared):
    client = await shared(jwt_secret=SECRET)
    for aud in ('"other"', "[]", "7", None):
        headers = bearer(signed(claims(aud=aud)))
        assert (await client.get("/v1/models", headers=headers)).status_code == 200


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
    {"alg":"HS256","crit":[]} {"alg":"HS256","crit":null} HS256 {'alg':'HS256'}"""
ODD_CLAIMS = {
    "exp": f'true null "{NOW + 3600}" [9999999999] {{}} 1e999 -1e999 {NOW - 31} 0 -1',
    "nbf": f'true null "0" [0] {{}} {NOW + 3600} 1e999 {"9" * 400}',
    "aud": 'null [] "" "application" "ap" ["other"] [["app"]] {"app":"app"} 7',
    "sub": f'"" 5 true null ["ana"] "{"x" * 257}" "\\ud83d" "ana\\ude00"',
}
NO_JSON = ["ana", GOOD, claims()[:-1], f"{claims()}x", claims(exp="NaN"), claims(x="-Infinity")]
NO_JSON += [claims(x=deep) for deep in ("[" * 2900 + "]" * 2900, '{"a":' * 1000)]
NO_TOKENS = [".", "..", "ana", LOOSE, f"{LOOSE}.", f"{HEAD}..{SIGNATURE}"]
NO_TOKENS += [f".{PAYLOAD}.{SIGNATURE}", f"{GOOD}.", f".{GOOD}", f"{GOOD}.{GOOD}", f"{GOOD}="]
NO_TOKENS += [f"{HEAD}=.{PAYLOAD}.{SIGNATURE}", f"{HEAD}.A.{SIGNATURE}", f"A.{PAYLOAD}.{SIGNATURE}"]
NO_TOKENS += [f"{HEAD}.{each}{PAYLOAD}.{SIGNATURE}" for each in "+/ é%="]
REFUSED_TOKENS: dict[str, list[str]] = {
    "header": [signed(claims(), each) for each in HEADERS.split()],
    "signature": [
        *same_bytes(GOOD),
        *(GOOD[:-1], GOOD[:-20], f"{LOOSE}.A", f"{LOOSE}.{SIGNATURE}A"),
        signed(claims(), secret="one that has 32 bytes at the least"),
        f"{HEAD}.{base64url(claims(sub=5))}.{SIGNATURE}",
        f"{SPACED}.{PAYLOAD}.{SIGNATURE}",
    ],
    **{
        name: [signed(claims(**{name: each})) for each in texts.split()]
        for name, texts in ODD_CLAIMS.items()
    },
    "a claim is missing": [signed(claims(**{name: None})) for name in ("exp", "aud", "sub")],
    "no object": [signed(each) for each in ("[]", f"[{claims()}]", "null", "7", '"ana"')],
    "no JSON": [
        *map(signed, NO_JSON),
        f"{HEAD}.{base64url(claims().encode('utf-16'))}.{SIGNATURE}",
    ],
    "no token": NO_TOKENS,
}


@cases("tokens", REFUSED_TOKENS)
async def test_every_other_token_is_refused(shared, tokens):
    client = await shared(jwt_secret=SECRET, jwt_audience="app")
    for token in tokens:
        headers: Any = {"Authorization": f"Bearer {token}".encode()}
        response = await client.get("/v1/models", headers=headers)
        assert response.status_code == 401, token
    assert (await client.get("/v1/models", headers=bearer(GOOD))).status_code == 200


async def test_one_401_tells_nothing_and_the_log_tells_why_without_the_token(start, upstream):
    client = await start(jwt_secret=SECRET, jwt_audience="app", admin_token=ADMIN)
    expired = user_token(aud="app", exp=int(time.time()) - 60)
    tokens = [expired, "ana", signed("{}", '{"alg":"none"}'), user_token(aud="other"), signed("[]")]
    tokens += [user_token(aud="app", nbf=int(time.time()) + 600), user_token(aud="app", sub=5)]
    given = [bearer(token) for token in tokens]
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
    mine = [each for each in logged if (each["metadata"] or {}).get("request_id") == "a"]
    assert {each["level"] for each in mine} == {"INFO"}
    assert "exp" in str(mine)
    parts = [part for token in tokens for part in token.split(".") if len(part) > 8]
    assert not any(part in json.dumps(logged) for part in parts)
    assert not upstream.calls
    assert (await load(client, "/status"))["asks"]["total"] == 0


ANA = hashlib.sha256(b"ana").hexdigest()
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


# Limits.


@overlapping
async def test_a_minute_s_asks_may_come_at_once_and_come_back_evenly(shared):
    client = await shared(replies(400), rate_limit=60)
    headers = {"X-Forwarded-For": "192.0.2.60"}

    async def ask() -> Any:
        return await client.post("/ask", json=PLAIN, headers=headers)

    begun = time.monotonic()
    asked = 0
    while (response := await ask()).status_code == 400:
        asked += 1
    assert 60 <= asked <= 61 + time.monotonic() - begun
    problem(response, "too_many_asks")
    assert response.headers["retry-after"] == "1"
    await asyncio.sleep(1)
    statuses = [(await ask()).status_code for _ in range(2)]
    assert statuses[0] == 400, "one second, one ask"
    assert statuses[1] == 429 or time.monotonic() - begun > 2, "and to ask in vain costs nothing"


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


@overlapping
@at_once("first, second, same", ADDRESSES)
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


@processes
async def test_both_ways_to_start_it_believe_the_same_proxies(tmp_path):
    async def asked(*command: str, **env: str) -> list[int]:
        async with launched(*command, cwd=tmp_path, RATE_LIMIT="1", **env) as running:
            forwarded = ("192.0.2.1", "198.51.100.7, 192.0.2.2", "192.0.2.1")
            headers = [{"X-Forwarded-For": each} for each in forwarded]
            asks = {"prompt": "/empty"}
            post = running.client.post
            return [(await post("/ask", json=asks, headers=each)).status_code for each in headers]

    usual = await asyncio.gather(asked(SERVICE), asked(*UVICORN))
    assert [*usual] == [[200, 200, 429]] * 2
    other = {"FORWARDED_ALLOW_IPS": "192.0.2.9"}
    assert [*await asyncio.gather(asked(SERVICE, **other), asked(*UVICORN, **other))] == [
        [200, 429, 429]
    ] * 2


async def spent_all(client: Client) -> bool:
    """Whether the day's tokens are spent."""
    return "budget_exhausted" in (await client.post("/ask", json=PLAIN)).text


SPENDS = {
    "told": (answer, ASK, 7),
    "told, plain": (replies(200, completion("Hola", usage={"total_tokens": 9})), PLAIN, 9),
    "refused": (replies(400), ASK, 0),
    "refused, key": (replies(401), PLAIN, 0),
    "refused, busy": (replies(429), ASK, 0),
    "failed": (replies(500), PLAIN, 0),
}


@overlapping
@at_once("path, script, ask, used", crossed(["/ask", CHAT], SPENDS))
async def test_an_ask_spends_what_the_model_told(start, path, script, ask, used):
    for limit in {used or 1, used + 1}:
        client = await start(script, daily_tokens=limit, openai_max_retries=0)
        await client.post(path, json=body_for(path, stream=ask.get("stream", True)))
        await idle(client)
        assert await spent_all(client) == (limit == used > 0)


@overlapping
@at_once(
    "script, ask, received",
    {
        "told before a cut": (stream(HOLA, FINISH, Call.close), ASK, 4),
        "none told": (says(HOLA), ASK, 4),
        "none told, plain": (
            replies(200, {"choices": [{"message": {"content": "Hola!"}}]}),
            PLAIN,
            5,
        ),
        "no figure": (replies(200, completion("Hola", usage={"total_tokens": True})), PLAIN, 4),
        "reasoning": (says(piece(reasoning_content="Hmmmmmm.") + HOLA), ASK, 12),
        "cut": (stream(HOLA, Call.close), ASK, 4),
        "closed unanswered": (Call.close, ASK, 0),
        "silent": (Call.hang, ASK, 0),
        "no JSON": (replies(200, b"<html>"), PLAIN, 0),
    },
)
async def test_an_ask_that_is_told_no_figure_spends_an_estimate(
    start, upstream, script, ask, received
):
    own = {"openai_timeout": 0.3 if script is Call.hang else 60, "openai_max_retries": 0}

    async def spends_all(limit: int) -> bool:
        client = await start(script, daily_tokens=limit, **own)
        await client.post("/ask", json=ask)
        await idle(client)
        return await spent_all(client)

    assert await spends_all(1)
    # A token for every four bytes of what went to the model, and for every four characters.
    estimate = int(upstream.calls[0].headers["content-length"]) / 4 + received / 4
    assert await spends_all(math.floor(estimate - 1))
    assert not await spends_all(math.ceil(estimate + 3))


async def test_an_ask_that_was_left_spends_an_estimate(start, upstream):
    client = await start(stream(HOLA, Call.hang), daily_tokens=2)
    async with asking(client) as wire:
        await wire.write()
    await closings(client)
    assert await spent_all(client)


async def test_what_never_reached_the_model_spends_nothing(start):
    client = await start(openai_base_url=await refusing_url(), daily_tokens=1, openai_max_retries=0)
    for _ in range(2):
        problem(await client.post("/ask", json=ASK), "upstream_unreachable")


async def test_tools_and_their_arguments_count_where_no_figure_came(start):
    call = {"function": {"name": "f", "arguments": "x" * 400}}
    delta_of_call = json.dumps({"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]})
    script = stream(f"data: {delta_of_call}\n\n".encode(), Call.close)
    tools = [{"type": "function", "function": {"name": "f", "description": "y" * 400}}]
    chat = {"messages": [{"role": "user", "content": "Hola"}], "tools": tools, "stream": True}
    for limit, code in ((200, 429), (300, 200)):
        client = await start(script, answer, daily_tokens=limit)
        await client.post(CHAT, json=chat)
        await closings(client)
        assert (await client.post("/ask", json=ASK)).status_code == code


async def test_an_exhausted_budget_is_warned_about_once_and_lasts_until_midnight(start):
    client = await start(daily_tokens=7, rate_limit=3)
    assert (await client.post("/ask", json=ASK)).status_code == 200
    response = await client.post("/ask", json=ASK)
    problem(response, "budget_exhausted")
    left = 86400 - time.time() % 86400
    assert left <= int(response.headers["retry-after"]) <= left + 60
    refusal = await client.post(CHAT, json=chat())
    assert openai_error(refusal, 429, "budget_exhausted")["type"] == "rate_limit_error"
    problem(await client.post("/ask", json={}), "invalid_request")
    (warning,) = await load(client, "/logs?level=WARNING")
    assert "budget" in warning["message"]
    assert (await load(client, "/status"))["asks"]["total"] == 1
    # None of these refusals has cost one of the three asks a minute.
    others = [await client.post("/ask", json=ASK) for _ in range(3)]
    assert {each.json()["code"] for each in others} == {"budget_exhausted"}


async def test_the_model_s_refusal_and_a_full_house_cost_no_more_than_they_should(start):
    client = await start(
        replies(400), stream(HOLA, Call.hang), answer, rate_limit=3, max_concurrent_asks=1
    )
    # What the model refuses has cost one of three, what there is no place for none.
    problem(await client.post("/ask", json=ASK), "upstream_rejected")
    async with asking(client) as wire:
        await wire.write()
        for _ in range(3):
            problem(await client.post("/ask", json=ASK), "overloaded")
    await closings(client, 2)
    assert (await client.post("/ask", json=ASK)).status_code == 200
    problem(await client.post("/ask", json=ASK), "too_many_asks")


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


@processes
async def test_a_public_address_without_a_token_for_asks_is_warned_about(tmp_path):
    async def warned(**env: str) -> bool:
        async with launched(cwd=tmp_path, API_HOST="0.0.0.0", **env) as running:
            await running.read("(startup complete)")
            running.process.send_signal(signal.SIGTERM)
            shown = await running.ended()
            warnings = [each for each in shown if each["level"] == "WARNING"]
            return any("API_TOKEN" in str(each) for each in warnings)

    found = await asyncio.gather(
        warned(ADMIN_TOKEN=ADMIN), warned(API_TOKEN=TOKEN), warned(JWT_SECRET=SECRET)
    )
    assert [*found] == [True, False, False]


# 8. The demo model.


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


async def test_the_demo_model_answers_plainly_and_keeps_to_max_tokens(shared):
    client = await shared(openai_api_key="demo")
    whole = (await client.post("/ask", json=PLAIN)).json()
    short = (await client.post("/ask", json=PLAIN | {"max_tokens": 3, "temperature": 0})).json()
    assert (whole["finish_reason"], short["finish_reason"]) == ("stop", "length")
    assert short["response"].split() == whole["response"].split()[:3]
    assert whole["tokens_used"] > short["tokens_used"] > 3


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


@overlapping
@at_once(
    "prompt, bound, said, failure, reason",
    {
        "no fault": ("Hi", 3, "This is the", None, "length"),
        "400": ("/error 400", 9, "", "upstream_rejected", None),
        "401": ("/error 401 please", 9, "", "upstream_auth", None),
        "429": ("/error 429", 9, "", "rate_limited", None),
        "429, two blanks": ("/error  429", 9, "", "rate_limited", None),
        "429, a line": ("/error 429\nplease", 9, "", "rate_limited", None),
        "no number": ("/error soon", 2, "This is", None, "length"),
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
    openai_api_key="demo",
    openai_max_retries=0,
)
async def test_the_demo_model_fails_on_request_in_every_format(
    client, prompt, bound, said, failure, reason
):
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
        assert facts["model"] == (MODEL if failure and not said else ANY)


async def test_the_demo_model_says_when_to_come_back(shared):
    client = await shared(openai_api_key="demo")
    for path, asked in {"/ask": ASK, CHAT: BODY}.items():
        text = json.dumps(asked).replace("Hola", "/error 429")
        response = await client.post(path, content=text, headers=JSON)
        assert (response.status_code, response.headers["retry-after"]) == (429, "3")


@overlapping
async def test_the_demo_model_reasons_first_and_counts_it(shared):
    client = await shared(openai_api_key="demo", openai_models=("gpt-4o",))
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


@overlapping
@at_once("prompt", {"slow": "/slow"}, openai_api_key="demo", heartbeat_seconds=0.1)
async def test_the_demo_model_can_keep_silent_while_heartbeats_go_out(client, prompt):
    async with asking(client, {"prompt": prompt}) as wire:
        writes = [await wire.write() for _ in range(4)]
    assert writes == [PING] * 4
    (closing,) = await closings(client)
    assert closing["message"] == "ask cancelled"
    assert not {"first_token_ms", "answer_chars"} & closing["metadata"].keys()


# 9. Start and stop.


@processes
async def test_a_stop_takes_nothing_new_and_lets_a_stream_under_way_finish(upstream, tmp_path):
    resume = asyncio.Event()
    upstream.script(says(chunk("Ho"), waits(resume), FINISH))
    async with launched(cwd=tmp_path, **before(upstream)) as running:
        async with asking(running.client) as wire:
            first = await wire.write()
            running.process.send_signal(signal.SIGTERM)
            await running.refuses()
            await running.read("(Waiting for connections)")
            resume.set()
            rest = b"".join(await wire.rest())
        assert events(first + rest)[-1] == "[DONE]"
        assert "ask finished" in str(await running.ended())
        assert "API_TOKEN" not in running.output, "nobody else can ask"


@processes
async def test_a_second_interrupt_cuts_the_streams_and_prints_no_traceback(upstream, tmp_path):
    upstream.script(stream(chunk("Ho"), Call.hang))
    async with launched(cwd=tmp_path, **before(upstream)) as running:
        async with asking(running.client) as wire:
            await wire.write()
            running.process.send_signal(signal.SIGINT)
            await running.refuses()
            running.process.send_signal(signal.SIGINT)
            assert "ask cancelled" in str(await running.ended())
        await soon(upstream.calls[0].left)


@processes
async def test_uvicorn_runs_the_very_same_app_and_what_its_stop_cuts_is_closed_and_logged(
    upstream, tmp_path
):
    upstream.script(answer, stream(chunk("Ho"), Call.hang))
    grace = ("--timeout-graceful-shutdown", "1")
    async with launched(*UVICORN, *grace, cwd=tmp_path, **before(upstream)) as running:
        running.client.headers["Origin"] = PAGE
        response = await running.client.post("/ask", json=ASK)
        assert events(response.content)[-1] == "[DONE]"
        problem(await running.client.post("/ask", json={}), "invalid_request")
        async with asking(running.client) as wire:
            await wire.write()
            running.process.send_signal(signal.SIGTERM)
            await soon(upstream.calls[1].left, 30)
            ended = str(await running.ended())
        assert "ask finished" in ended
        assert "ask cancelled" in ended


@processes
async def test_a_body_that_never_comes_does_not_hold_up_a_stop(tmp_path):
    async with (
        launched(cwd=tmp_path, CLIENT_TIMEOUT="1") as running,
        connection(running.client) as (reader, writer),
    ):
        writer.write(post(json.dumps(ASK), "Expect: 100-continue")[:-1])
        assert b"100 Continue" in await reader.readline()
        running.process.send_signal(signal.SIGTERM)
        assert b'"code":"request_timeout"' in await reader.read()
        await running.ended()


# 10. The documentation.


@pytest.fixture(scope="session")
async def document(guarded: Client) -> Any:
    return await load(guarded, "/openapi.json")


def operations(document: Any) -> Iterator[tuple[str, str, Any]]:
    for path, item in document["paths"].items():
        for way, operation in item.items():
            yield path, way.upper(), operation


def test_the_document_lists_the_routes_and_methods_that_there_are(document):
    routes: list[Any] = list(inside(service.create_app(Settings())).routes)
    named = [(each.path.replace(":path}", "}"), each.methods - {"HEAD"}) for each in routes]
    there = {(path, way) for path, ways in named for way in ways}
    assert {(path, way) for path, way, _ in operations(document)} == there


def test_generators_of_clients_can_read_the_document(document):
    assert document["openapi"].startswith("3.1.")
    names = [operation["operationId"] for *_, operation in operations(document)]
    assert len({*names}) == len(names)
    assert all("://" not in server["url"] for server in document["servers"]), "relative"
    for path in ("/ask", CHAT):
        # They take the first content there is.
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert [*content][:2] == ["application/json", "text/event-stream"]
    text = json.dumps(document)
    for name in re.findall(r'"#/components/schemas/(\w+)"', text):
        assert name in document["components"]["schemas"]


def test_the_document_holds_every_error_with_its_status_and_headers(document):
    codes = {code: int(title[:3]) for code, title in PROBLEMS.items()}
    assert service.ERRORS.keys() == codes.keys()
    # No operation answers these two: they stand for the paths and methods that there are not.
    found = {"not_found": 404, "method_not_allowed": 405}
    more = {"401": {"WWW-Authenticate"}, "429": {"Retry-After"}, "503": {"Retry-After"}}
    for _, _, operation in operations(document):
        for status, response in operation["responses"].items():
            assert {"X-Request-ID"} | more.get(status, set()) <= response["headers"].keys()
            (media,) = response["content"].values() if status != "200" else [{}]
            for each in media.get("examples", {}).values():
                assert conforms(each["value"], media["schema"], document)
                found[each["value"].get("error", each["value"])["code"]] = int(status)
    assert found == codes
    for name in re.findall(r'"code": \{[^{}]*"enum": \[([^\]]*)\]', json.dumps(document)):
        assert {*re.findall(r"\w+", name)} == {*codes}


def test_the_document_holds_the_bounds_and_the_defaults_of_every_field(document):
    body = document["paths"]["/ask"]["post"]["requestBody"]["content"]["application/json"]
    schema = document["components"]["schemas"][body["schema"]["$ref"].rpartition("/")[2]]
    inner = schema["properties"]
    names = {"prompt", "history", "model", "temperature", "max_tokens", "stream"}
    closed = ({*inner}, schema["required"], schema["additionalProperties"])
    assert closed == (names, ["prompt"], False)
    number = {"type": "number", "minimum": 0, "maximum": 2}
    assert inner["temperature"].items() >= number.items()
    assert inner["max_tokens"].items() >= {"type": "integer", "minimum": 1}.items()
    assert inner["history"]["maxItems"] == 1000
    defaults = {name: each["default"] for name, each in inner.items() if "default" in each}
    assert defaults == {"stream": True, "history": []}
    limit, level = (each["schema"] for each in document["paths"]["/logs"]["get"]["parameters"])
    assert limit.items() >= {"minimum": 1, "maximum": 1000, "default": 100}.items()
    assert level["enum"] == ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


async def test_replies_are_what_the_document_promises(start, upstream, document):
    client = await start()

    def schema(path: str, way: str = "get", status: str = "200") -> Any:
        responses = document["paths"][path][way]["responses"]
        return next(iter(responses[status]["content"].values()))["schema"]

    operation = document["paths"]["/ask"]["post"]
    shown_ask = operation["requestBody"]["content"]["application/json"]["example"]
    assert (await client.post("/ask", json=shown_ask)).status_code == 200
    content = operation["responses"]["200"]["content"]
    *shown, end_shown = events(content["text/event-stream"]["example"])
    *sent, end = events((await client.post("/ask", json=ASK)).content)
    assert end == end_shown == "[DONE]"
    upstream.script(answer, stream(HOLA, Call.reset))
    plain = await client.post("/ask", json=PLAIN)
    assert conforms(plain.json(), schema("/ask", "post"), document)
    sent += events((await client.post("/ask", json=ASK)).content)
    assert [each["type"] for each in sent] == ["delta", "delta", "done", "delta", "error"]
    schemas = document["components"]["schemas"].values()
    kinds = [each for each in schemas if "type" in each.get("properties", {})]
    for each in (*sent, *shown):
        assert any(conforms(each, kind, document) for kind in kinds)
    assert conforms(await load(client, "/status"), schema("/status"), document)
    assert conforms(await load(client), schema("/logs"), document)
    wrong = await client.post("/ask", json={})
    assert conforms(wrong.json(), schema("/ask", "post", "422"), document)


async def test_the_pages_pin_what_they_load_and_the_first_leads_to_them(guarded):
    for path in ("/docs", "/redoc"):
        page = await guarded.get(path)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "openapi.json" in page.text
        loaded = re.findall(r"<[^>]*(?:src|href)=\"?https?:[^>]*>", page.text)
        assert loaded
        for tag in loaded:
            assert re.search(r"@\d+\.\d+\.\d+/", tag)
            assert re.search(r'integrity=\s*"sha384-[\w+/]{64}"', tag)
            assert "crossorigin" in tag
    page = await guarded.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for path in ("docs", "redoc"):
        assert re.search(rf'href="?(\./)?{path}\b', page.text), "relative: a proxy may add a prefix"


# 11. For programs that speak OpenAI's API.


async def test_openais_python_client_is_served_streamed_and_plain(shared, upstream):
    client = await shared(api_token="correct-horse", openai_models=("gpt-4o",))
    async with library(client, "correct-horse") as ai:
        plain = await ai.chat.completions.create(model="gpt-4o", messages=TURNS)
        chunks = await ai.chat.completions.create(model="gpt-4o", messages=TURNS, stream=True)
        told = [each.choices[0] async for each in chunks]
        listed = await ai.models.list()
    assert plain.usage
    assert (plain.choices[0].message.content, plain.usage.total_tokens) == ("Hola", 7)
    assert [each.delta.content for each in told] == ["Ho", "la", None]
    assert told[-1].finish_reason == "stop"
    models = {"object": "model", "created": 0, "owned_by": "openai-backend"}
    expected = [{"id": name, **models} for name in (MODEL, "gpt-4o")]
    assert [each.to_dict() for each in listed.data] == expected
    assert [call.body["model"] for call in upstream.calls] == ["gpt-4o", "gpt-4o"]
    assert {call.headers["authorization"] for call in upstream.calls} == {f"bearer {KEY}"}


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
        "all roles": {"messages": [{"role": "system"}, {"role": "developer"}, CALLED, TURN]},
        "odd messages": {"messages": [{}, {"role": 5, "content": {"a": None}, "x": [1, [2]]}]},
        "figures": {"seed": -(2**63), "top_p": 0.1, "logit_bias": {"50256": -100}, "x": 1e300},
        "null": {"temperature": None, "stop": None, "user": None, "n": None},
        "unknown": {"reasoning_effort": "low", "x_é\u2028": {"\x85": "\U0001f600\x00"}},
        "many choices": {"n": 2, "logprobs": True, "metadata": {"a": "b"}},
    },
)
async def test_what_openais_api_takes_goes_upstream_as_it_came(shared, upstream, given):
    client = await shared()
    for asked in (BODY | given, STREAMED | given):
        assert (await client.post(CHAT, json=asked)).status_code == 200
    plain, streamed = (call.body for call in upstream.calls)
    assert plain == BODY | {"stream": False} | given
    assert streamed == STREAMED | {"stream_options": {"include_usage": True}} | given


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
    async with asking(client, STREAMED, path=CHAT) as wire:
        writes = await wire.rest()
    assert b"".join(writes).replace(comment, b"") == b"".join([*told, DONE])
    assert {write.endswith(end + end) for write in writes[:-1]} <= {True}
    assert writes[-1].endswith(b"\n\n")
    assert {*wire.head.splitlines()} >= STREAM_HEADERS
    (closing,) = await closings(client)
    assert closing["metadata"]["tokens_used"] == 7


CUT_OFF = {
    CHAT: b'data: {"choices":[{"index":0,"delta":{"content":"Ho"},"finish_reason":null}]}',
    "/v1/responses": b"event: response.output_text.delta\n"
    b'data: {"type":"response.output_text.delta","sequence_number":1,"delta":"Ho"}',
}


@pytest.mark.parametrize("path", CUT_OFF)
async def test_an_event_that_is_cut_off_at_the_upstreams_end_is_not_handed_on(shared, path):
    whole, rest = CUT_OFF[path] + b"\n\n", CUT_OFF[path][:-4]
    client = await shared(stream(whole, whole + rest, Call.end))
    asked = STREAMED if path == CHAT else {"input": "Hi", "stream": True}
    answer = (await client.post(path, json=asked)).content
    assert answer.startswith(whole + whole)
    assert rest not in answer.removeprefix(whole + whole)
    assert b"upstream_error" in answer


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


@overlapping
async def test_heartbeats_stand_between_events_never_in_one(shared):
    go = asyncio.Event()
    event = chunk("Hola")
    steps = (Call.start, event[:20], waits(go), event[20:], FINISH + DONE, Call.end)
    client = await shared(play(*steps), heartbeat_seconds=0.1)
    async with asking(client, STREAMED, path=CHAT) as wire:
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
async def test_a_stream_that_ends_in_good_form_is_ended_with_the_end_mark(shared, script):
    response = await (await shared(script)).post(CHAT, json=STREAMED)
    *told, mark = events(response.content)
    assert (told[0]["choices"][0]["delta"], mark) == ({"content": "Hola"}, "[DONE]")


@overlapping
@at_once(
    "script, code",
    {
        **CUTS,
        "one choice of two": (stream(HOLA, piece("stop", 1), Call.end), "upstream_error"),
        "later choice": (stream(HOLA + FINISH, piece(index=1), Call.end), "upstream_error"),
        "error object beside choices": (
            stream(HOLA + b'data: {"choices":[],"error":{"message":"SECRET"}}\n\n' + DONE),
            "upstream_error",
        ),
    },
    openai_timeout=1,
)
async def test_a_stream_that_breaks_off_ends_in_openais_error(client, upstream, script, code):
    upstream.script(script)

    async def by_library() -> openai.APIError:
        async with library(client) as ai:
            chunks = await ai.chat.completions.create(**client.own(BODY), stream=True)
            assert (await anext(chunks)).choices[0].delta.content == "Hola"
            with pytest.raises(openai.APIError) as raised:
                async for _ in chunks:
                    pass
        return raised.value

    response, raised = await asyncio.gather(client.post(CHAT, json=STREAMED), by_library())
    assert response.content.startswith(HOLA)
    assert "[DONE]" not in response.text + response.text.replace(" ", "")
    assert "SECRET" not in response.text
    error = {"message": ANY, "type": "server_error", "param": None, "code": code}
    assert events(response.content)[-1] == {"error": error}
    assert (raised.code, raised.type) == (code, "server_error")
    assert [each["metadata"]["code"] for each in await closings(client, 2)] == [code] * 2


SYSTEM = {"role": "system", "content": "Obey."}
CLASSES: dict[int, tuple[type[openai.APIStatusError], str]] = {
    400: (openai.BadRequestError, "invalid_request_error"),
    401: (openai.AuthenticationError, "authentication_error"),
    404: (openai.NotFoundError, "invalid_request_error"),
    422: (openai.UnprocessableEntityError, "invalid_request_error"),
    429: (openai.RateLimitError, "rate_limit_error"),
    **dict.fromkeys((502, 503, 504), (openai.InternalServerError, "server_error")),
}


RAISES: dict[str, tuple[Any, Any, Script, int, str, str | None]] = {
    "token": ({"api_token": TOKEN}, {}, answer, 401, "unauthorized", None),
    "model": ({}, {"model": "gpt-4o"}, answer, 404, "model_not_found", "model"),
    **{
        f"wrong {param}": (settings, given, answer, 422, "invalid_request", param)
        for param, settings, given in (
            ("messages", {}, {"messages": []}),
            ("messages", {}, {"messages": None}),
            ("messages.0", {}, {"messages": ["Hola"]}),
            ("messages.1.role", {"system_prompt": "Hi"}, {"messages": [TURN, SYSTEM]}),
            (OLD, {"max_output_tokens": 9}, {OLD: 10}),
            (NEW, {"max_output_tokens": 9}, {NEW: "1"}),
            ("n", {"max_output_tokens": 9}, {"n": 2}),
        )
    },
    "rate": ({"rate_limit": 1}, {}, answer, 429, "too_many_asks", None),
    "refused": ({}, {}, replies(400, {"error": "Not so."}), 400, "upstream_rejected", None),
    "too much": ({}, {}, replies(429, {"error": "Slow down."}), 429, "rate_limited", None),
    "no key": ({"openai_api_key": ""}, {}, answer, 503, "not_configured", None),
    "their key": ({}, {}, replies(401, refused("SECRET")), 502, "upstream_auth", None),
    "failed": ({}, {}, replies(500, refused("SECRET")), 502, "upstream_error", None),
    "silent": ({"openai_timeout": 0.2}, {}, Call.hang, 504, "upstream_timeout", None),
}


@overlapping
@at_once("settings, given, script, status, code, param", RAISES)
async def test_openais_client_raises_its_own_error_of_each_class(
    shared, settings, given, script, status, code, param
):
    client = await shared(script, **{"openai_max_retries": 0, **settings})
    if code == "too_many_asks":
        await client.post(CHAT, json=BODY)
    kind, name = CLASSES[status]
    async with library(client) as ai:
        for streamed in (True, False):
            with pytest.raises(kind) as raised:
                await ai.chat.completions.create(**{**BODY, **given}, stream=streamed)
            error = raised.value
            assert (type(error), error.status_code) == (kind, status), streamed
            assert (error.type, error.code, error.param) == (name, code, param), streamed
            assert "SECRET" not in error.message
            assert ("retry-after" in error.response.headers) == (code == "too_many_asks")
            assert error.request_id == error.response.headers["x-request-id"]


@cases(
    "method, path, headers, body, status, code",
    {
        "no such path": ("POST", "/v1/embeddings", {}, {}, 404, "not_found"),
        "nor this": ("GET", "/v1", {}, None, 404, "not_found"),
        "no such method": ("GET", CHAT, {}, None, 405, "method_not_allowed"),
        "nor here": ("POST", "/v1/models", {}, {}, 405, "method_not_allowed"),
        "host": ("GET", "/v1/models", {"Host": "evil.example"}, None, 400, "host_not_allowed"),
        "origin": ("POST", CHAT, {"Origin": "http://evil"}, BODY, 403, "origin_not_allowed"),
        "type": ("POST", CHAT, {"Content-Type": "a/b"}, BODY, 415, "unsupported_media_type"),
        "no object": ("POST", CHAT, {}, [], 400, "invalid_json"),
        "size": ("POST", CHAT, {}, {**BODY, "user": "x" * 2000}, 413, "body_too_large"),
    },
)
async def test_every_error_under_v1_has_openais_shape(
    shared, method, path, headers, body, status, code
):
    client = await shared(max_body_bytes=2000)
    response = await client.request(method, path, headers=headers, json=body)
    error = openai_error(response, status, code)
    assert (error["type"], error["param"]) == ("invalid_request_error", None)
    assert response.headers["content-type"] == "application/json"
    assert " " in error["message"]
    assert ("allow" in response.headers) == (status == 405)
    outside = await client.request(method, path.replace("v1", "v2"), headers=headers, json=body)
    assert outside.headers["content-type"] == "application/problem+json"


@cases(
    "body",
    {
        "usual": completion("Hola"),
        "odd spacing": b' { "choices" : [ {"message":{"content":"H\\u006fla"}} ],"x":[1e2] }\r\n ',
        "half a pair": b'{"choices":[{"message":{"content":"\\ud83d"}}]}',
        "no UTF-8": b'{"choices":[{"message":{"content":"\xff"}}]}',
        "line ends": '{"choices":[{"message":{"content":"\u2028\x85é😀"}}]}'.encode(),
        "no choices": b'{"choices":[]}',
        "nothing": b"{}",
        "null error": b'{"error":null,"choices":[{"message":{"content":null}}]}',
    },
)
async def test_a_plain_answer_is_handed_on_byte_for_byte(shared, body):
    response = await (await shared(replies(200, body))).post(CHAT, json=BODY)
    expected = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert (response.status_code, response.content) == (200, expected)
    assert response.headers["content-type"] == "application/json"


@cases(
    "script",
    {
        "HTML": replies(200, HTML, content_type="text/html"),
        "list": replies(200, []),
        "list of one": replies(200, [completion("SECRET")]),
        "string": replies(200, "SECRET"),
        "null": replies(200, None),
        "empty": replies(200, b""),
        "more than JSON": replies(200, b"{}{}"),
        "deep": replies(200, b'{"a":' + b"[" * 100_000),
        "their error": replies(200, refused("SECRET")),
        "finish_reason error": replies(200, FAILED),
        "cut": cut,
        "stream": stream(HOLA, FINISH + DONE, Call.end),
    },
)
async def test_a_plain_answer_that_is_no_json_object_is_the_upstreams_error(shared, script):
    response = await (await shared(script, openai_max_retries=0)).post(CHAT, json=BODY)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (502, "server_error")
    assert error["code"] == "upstream_error"
    assert "SECRET" not in response.text


async def test_the_closing_event_counts_all_text_of_the_messages_and_no_answer(start):
    client = await start()
    messages = [SYSTEM, {"role": "user", "content": PARTS}, CALLED, {"content": {"text": "no"}}]
    for asked in (STREAMED, BODY):
        await client.post(CHAT, json=asked | {"messages": messages})
    streamed, plain = (each["metadata"] for each in await closings(client, 2))
    common = {"request_id": ANY, "model": "gpt-real", "finish_reason": "stop", "tokens_used": 7}
    common |= {"prompt_chars": 5 + 3 + 2, "duration_ms": ANY}
    assert streamed == {**common, "stream": True, "first_token_ms": ANY}
    assert plain == {**common, "stream": False}


NESTED = '{"messages":[{"role":"user","content":"a"}],"x":%s}'


NO_DEFECTS = {
    "infinity": (NESTED % "1e999", 400),
    "NaN": (NESTED % "NaN", 400),
    "deep": (NESTED % ("[" * 5000 + "]" * 5000), 400),
    "half a pair": (NESTED % '"\\ud800"', 400),
    "null": ("null", 400),
    "model null": ('{"model":null,"messages":[{}]}', 422),
    "stream in a string": ('{"stream":"true","messages":[{}]}', 422),
    "stream_options list": ('{"stream":true,"stream_options":[],"messages":[{}]}', 422),
    "messages object": ('{"messages":{}}', 422),
    "message null": ('{"messages":[null]}', 422),
    "half a million wrong": ('{"messages":[%s1]}' % ("1," * 500_000), 422),
}


async def test_no_body_is_a_defect_of_ours_and_none_goes_upstream(start, upstream):
    client = await start()
    for name, (body, status) in NO_DEFECTS.items():
        response = await client.post(CHAT, content=body, headers=JSON)
        assert (name, response.status_code, upstream.calls) == (name, status, [])
        assert response.json()["error"]["type"] == "invalid_request_error", name
        assert len(response.content) < 20_000, name
        assert await load(client, "/logs?level=ERROR") == [], name


# 12. GET /metrics.


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


async def test_metrics_are_prometheus_text_with_every_family_before_the_first_ask(start):
    client = await start()
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
        "v1 model": ({}, CHAT, {"json": CHAT_BODY}, "model_not_found"),
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


# The ways to ask, the streams first.
WAYS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    **{"events": ("/ask", ASK, {}), "text": ("/ask", ASK, AS_TEXT), "v1": (CHAT, STREAMED, {})},
    **{"JSON": ("/ask", PLAIN, {}), "text, plain": ("/ask", PLAIN, AS_TEXT)},
    "v1, plain": (CHAT, BODY, {}),
}
STREAMING = [*WAYS][:3]
STREAMS = pytest.mark.parametrize("way", STREAMING)
OTHERS_KEY = "sk-other-0123456789"
TOLD = f"Overheated: {OTHERS_KEY}"
OPTIONS = "stream_options"


async def got(client: Client, way: str) -> Any:
    """The answer as far as it came; `broken` says whether its connection broke off."""
    path, body, headers = WAYS[way]
    it: Any
    async with asyncio.timeout(30), client.stream("POST", path, json=body, headers=headers) as it:
        it._content, it.broken = b"", True
        with suppress(httpx2.RemoteProtocolError):
            async for each in it.aiter_raw():
                it._content += each
            it.broken = False
    return it


def whole(way: str, response: Any) -> str:
    """The text of *response*, which is complete."""
    assert (response.status_code, response.broken) == (200, False), response.text
    if way.startswith("text"):
        return str(response.text)
    assert way not in STREAMING or response.content.endswith(DONE)
    return "".join(re.findall('"(?:content|response)": ?"([^"]*)"', response.text))


def broke_off(way: str, response: Any) -> bool:
    """Whether *response* says "Hola", and then in its way that it broke off, not why."""
    assert (response.status_code, "Overheated" in response.text) == (200, False)
    if way == "text":
        return bool((response.text, response.broken) == ("Hola", True))
    said, error = events(response.content)
    return "Hola" in str(said) and "'code': 'upstream_error'" in str(error)


def fails(error: Any, **head: str) -> Script:
    """A 200 that is nothing but *error*, streamed or plain as it was asked for."""
    streamed = play(lambda call: call.start(200, **head), event(error), DONE, Call.end)
    return lambda call: (streamed if call.body["stream"] else replies(200, error, **head))(call)


UPSTREAM_ERRORS = {
    "error": event({"error": {"message": TOLD, "code": "busy"}}),
    "a string": event({"error": TOLD}),
    "beside a choice": chunk("x", error={"message": TOLD}),
    "errors": event({"errors": [{"message": TOLD}]}),
    "error_message": event({"choices": None, "error_message": TOLD}),
    "detail": event({"detail": TOLD}),
    "object": event({"object": "error", "message": TOLD}),
    "message and code": event({"code": "busy", "message": TOLD}),
    "msg and code": event({"code": 500, "msg": TOLD}),
    "Groq's": event({"choices": [], "x_groq": {"error": TOLD}}),
    "MiniMax's": event({"choices": None, "base_resp": {"status_code": 1, "status_msg": TOLD}}),
    "llama.cpp's": b'error: {"code":500,"message":"%b"}\n\n' % TOLD.encode(),
    "an event": b'event: error\ndata: {"message":"%b"}\n\n' % TOLD.encode(),
    "an event of text": b"event:error\r\ndata:%b\r\n\r\n" % TOLD.encode(),
    "JSON alone": json.dumps({"error": {"message": TOLD}}, indent=1).encode() + b"\n\n",
}


@at_once("way, error", crossed(STREAMING, UPSTREAM_ERRORS), openai_max_retries=0)
async def test_an_error_in_any_form_ends_the_answer_and_its_message_is_logged(
    client, upstream, way, error
):
    upstream.script(says(HOLA, error), says(error))
    assert broke_off(way, await got(client, way))
    before = await got(client, way)
    assert (before.status_code, "Overheated" in before.text) == (502, False)
    for closed in await closings(client, 2):
        assert (closed["message"], closed["metadata"]["code"]) == ("ask failed", "upstream_error")
        assert closed["metadata"]["upstream_message"].endswith("Overheated: ***")


TOLD_STATUS: dict[str, tuple[Any, str | None, int, str | None, int]] = {
    "400": ({"error": {"message": "Too long", "code": 400}}, None, 400, None, 1),
    "402": ({"message": "No credit", "code": "402"}, None, 400, None, 1),
    "401": ({"error": {"message": TOLD, "code": 401}}, None, 502, None, 1),
    "429, later": ({"error": "Wait", "status": 429}, "7", 429, "7", 1),
    "429, soon": ({"error": "Wait", "status": 429}, "0", 429, "0", 2),
    "429, outside": ({"status": 429, "error": {"message": "Wait"}}, "7", 429, "7", 1),
    "503": ({"object": "error", "message": TOLD, "code": 503}, "0", 502, "0", 2),
    "none": ({"error": {"message": TOLD, "code": 200}}, "7", 502, None, 1),
}


@at_once(
    "way, error, patience, status, waits, calls", crossed(WAYS, TOLD_STATUS), openai_max_retries=1
)
async def test_an_answer_that_is_an_error_counts_by_the_status_it_tells(
    client, upstream, way, error, patience, status, waits, calls
):
    script = fails(error, **({"retry_after": patience} if patience else {}))
    upstream.script(script)
    response, said = await got(client, way), service.error_message(error)
    assert (response.status_code, len(upstream.calls)) == (status, calls)
    assert response.headers.get("retry-after") == waits
    assert (said in response.text) == (status != 502)
    (closed,) = await closings(client)
    assert closed["metadata"]["upstream_message"] == said.replace(OTHERS_KEY, "***")
    upstream.script(script, answer)
    assert (await got(client, way)).status_code == (200 if calls == 2 else status)


async def test_the_message_of_a_refusal_is_in_no_log_and_that_of_an_answer_is_cut(start):
    client = await start(replies(400, refused(TOLD)), says(HOLA + event({"error": "é" * 9000})))
    assert "Overheated: ***" in (await got(client, "events")).text
    assert broke_off("events", await got(client, "events"))
    refusal, broken = (each["metadata"] for each in await closings(client, 2))
    assert ("Overheated" in str(await load(client)), refusal["cause"]) == (False, "HTTP 400")
    assert 1900 <= len(broken["upstream_message"]) <= 2000


@pytest.mark.parametrize("end", [PING * 3, USAGE, piece("error")], ids=["pings", "usage", "error"])
@STREAMS
async def test_an_end_without_an_answer_is_none(shared, way, end):
    response = await got(await shared(says(end), openai_max_retries=0), way)
    assert (response.status_code, '"upstream_error"' in response.text) == (502, True)


def later(step: bytes) -> Script:
    """*step* after more than half of the time that an end is waited for."""
    return play(lambda _: asyncio.sleep(1.1), step)


A, B, C = (piece("stop", content=each) for each in "abc")
LEFT_OPEN: dict[str, Any] = {
    "silence": (stream(HOLA + STOP, pause, USAGE, Call.hang), "Hola", 1.8, {"tokens_used": 7}),
    "comments": (
        stream(HOLA + STOP, pause, USAGE, *cast(Any, [PING, pause] * 9)),
        *("Hola", 1.8, {"tokens_used": 7}),
    ),
    "text": (says(A, later(B), later(C)), "abc", 2.2, {}),
    "a later choice": (
        says(HOLA + STOP, later(piece(index=1)), later(piece("stop", 1)), pause, USAGE),
        *("Hola", 2.2, {"tokens_used": 7}),
    ),
    "no text": (stream(piece("length"), Call.hang), "", 1.8, {"finish_reason": "length"}),
}


@overlapping
@at_once("script, text, least, facts", LEFT_OPEN)
async def test_a_finish_reason_and_two_seconds_in_which_nothing_is_said_are_an_end(
    client, upstream, script, text, least, facts
):
    upstream.script(script)
    begun = time.monotonic()
    answers = await asyncio.gather(*(got(client, way) for way in STREAMING))
    assert [*map(whole, STREAMING, answers)] == [text] * 3
    assert least <= time.monotonic() - begun <= least + 3
    usual = {"finish_reason": "stop", "tokens_used": None}
    for closed in await closings(client, 3):
        assert closed["message"] == "ask finished"
        assert {name: closed["metadata"].get(name) for name in usual} == usual | facts


@overlapping
async def test_a_slow_reader_loses_nothing_of_an_answer_whose_end_is_left_open(shared):
    flood = Flood(play(STOP, Call.hang))
    async with asking(await shared(flood)) as wire:
        await soon(flood.blocked)
        await asyncio.sleep(2.3)  # longer than an end is waited for
        *deltas, last, mark = [each for write in await wire.rest() for each in events(write)]
    assert deltas == [delta(Flood.piece)] * flood.pieces
    assert (last["type"], mark) == ("done", "[DONE]")


@overlapping
@at_once("way, end", crossed(WAYS, {"close": Call.close, "reset": Call.reset, "end": Call.end}))
async def test_the_head_of_a_200_and_nothing_else_is_tried_again(client, upstream, way, end):
    upstream.script(stream(end), answer)
    assert whole(way, await got(client, way)) == "Hola"
    assert len(upstream.calls) == 2


@pytest.mark.parametrize("more", [chunk("!"), USAGE], ids=["text", "usage"])
async def test_several_chunks_in_one_event_are_several_chunks(shared, more):
    client = await shared(says(HOLA[:-1] + more + FINISH))
    for way in STREAMING:
        said = re.findall("Hola|!", (await got(client, way)).text)
        assert said == re.findall("Hola|!", (HOLA + more).decode())


# What a model does not take: wordings that refuse each field, and such as refuse none.
WORDINGS = {
    HEAT: """Model incompatible request argument supplied: temperature | temperature must be 1 |
        invalid temperature: only 1 is allowed for this model | temperature: Extra inputs are not
        permitted | `temperature` may only be set to 1 when thinking is enabled. | Additional
        properties are not allowed ('temperature' was unexpected) | Malformed input request: #:
        extraneous key [temperature] is not permitted | these are not accepted: temperature, n""",
    OLD: """max_tokens is not supported for reasoning models; use max_completion_tokens |
        this model is not compatible with max_tokens""",
    NEW: """body.max_completion_tokens: Extra inputs are not permitted | json: unknown field
        "max_completion_tokens" | unknown field `max_completion_tokens`, expected `max_tokens`""",
    OPTIONS: """Unrecognized request argument supplied: stream_options | The 'stream_options'
        parameter is only allowed when 'stream' is enabled. | Unknown name "stream_options" """,
    None: """max_tokens is too large: 6000. This model supports at most 4096 completion tokens |
        This model's maximum context length is 4096 tokens; you requested max_tokens=9000 |
        max_tokens: 9000 > 8192, which is the maximum allowed number of output tokens for x |
        `max_tokens` must be less than or equal to `8192`, the maximum value for this model |
        Range of max_tokens should be [1, 8192] | max_tokens must be at least 1, got 0. |
        Requests with max_tokens > 4096 must have stream=true | Unsupported parameter: 'tools' |
        'max_tokens' and 'max_completion_tokens' cannot be set at the same time | Unknown model |
        Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 3. |
        Invalid type for 'temperature': expected a decimal, but got a string instead. |
        body.temperature: Input should be less than or equal to 1.5 | max_tokens_to_sample is
        not supported | Only values between 0 and 1 are allowed for temperature |
        This model does not support images. max_tokens was 9, temperature 0.7""",
}
REFUSALS = [(name, " ".join(m.split())) for name, t in WORDINGS.items() for m in t.split("|")]


@pytest.mark.parametrize(("field", "message"), REFUSALS)
def test_a_refusal_names_the_field_that_is_not_taken_in_words_of_its_own(field, message):
    sent = {HEAT, OPTIONS, "messages", field or OLD}
    for status in (400, 422, 401, 404, 429, 500):
        error = service.UpstreamError(status, message)
        assert service.refused_field(error, sent) == (field if status in {400, 422} else None)
        assert service.refused_field(error, {"messages"}) is None
    by_code = service.UpstreamError(400, "Nein.", "unsupported_parameter", field or "tools")
    assert service.refused_field(by_code, sent) == field


@cases(
    "field, refusal",
    {
        "another name": (OLD, replies(422, {"detail": [{"loc": [OLD], "msg": "forbidden"}]})),
        "left out": (HEAT, replies(400, {"error": f"{HEAT}: extra inputs are forbidden"})),
        "in a 200": (HEAT, fails({"error": {"code": 400, "message": UNSUPPORTED.format(HEAT)}})),
        "usage": (OPTIONS, replies(400, refused(f"Unknown parameter: '{OPTIONS}'."))),
    },
)
@STREAMS
async def test_what_helped_is_remembered_and_told(start, upstream, way, field, refusal):
    client = await start(refusal, answer, openai_max_retries=0)
    path, body, headers = WAYS[way]
    for _ in "12":
        response = await client.post(path, json={**body, HEAT: 0.7, OLD: 9}, headers=headers)
        assert response.status_code == 200
    first, *adapted = upstream.bodies
    value = first.pop(field)
    assert adapted == [first | ({NEW: value} if field == OLD else {})] * 2
    for closed in await closings(client, 2):
        assert closed["metadata"].get("ignored") == ([HEAT] if field == HEAT else None)
    (warning,) = await load(client, "/logs?level=WARNING")
    assert warning["metadata"]["field"] == field


def theirs(code: object, param: object = None, kind: object = "t", **more: object) -> Any:
    return {"error": {"message": "No.", "type": kind, "param": param, "code": code, **more}}


THEIR_WORDS = {
    "context": (400, theirs("context_length_exceeded", "messages"), {}),
    "quota": (429, theirs("insufficient_quota", None, "insufficient_quota"), {}),
    **{str(status): (status, theirs("c", "p"), {}) for status in (404, 413, 422)},
    "filter": (400, theirs("content_filter", innererror={"a": {"b": True}}), {}),
    "no texts": (400, theirs(7, [], {}, innererror=1), theirs("upstream_rejected", kind=ANY)),
    "hidden": (400, theirs(OTHERS_KEY, "p" * 5000, innererror={"a": OTHERS_KEY}), ANY),
}


@at_once(
    "way, status, error, told", crossed(["v1", "v1, plain"], THEIR_WORDS), openai_max_retries=0
)
async def test_under_v1_a_refusal_keeps_the_upstreams_own_words(
    client, upstream, way, status, error, told
):
    upstream.script(replies(status, error))
    response = await got(client, way)
    assert (response.status_code, response.json()) == (status, told or error)
    assert (OTHERS_KEY in response.text, len(response.content) < 5000) == (False, True)
    ours = "rate_limited" if status == 429 else "upstream_rejected"
    problem(await client.post("/ask", json=PLAIN), ours)
    assert {each["metadata"]["code"] for each in await closings(client, 2)} == {ours}
    labels = by_label(await scrape(client), f"{DURATION}_count", "error_type").keys()
    assert {ours} <= labels <= {"", "rate_limited", "upstream_rejected"}


@overlapping
@at_once(
    "scripts, calls",
    {
        "503": ((replies(503),), 3),
        "a 200 alone": ((stream(Call.reset),), 3),
        "silence at last": ((replies(503), Call.hang), 2),
        "a cut at last": ((replies(503), stream(b"data: {", Call.reset)), 2),
        "too long to wait": ((replies(503, retry_after="60"),), 1),
    },
    openai_timeout=2.5,
)
async def test_openais_library_does_not_multiply_tries(client, upstream, scripts, calls):
    upstream.script(*scripts)
    async with library(client) as ai:
        again = ai.with_options(max_retries=1 if calls > 1 else 0)
        with pytest.raises(openai.APIStatusError) as raised:
            await again.chat.completions.create(**client.own(BODY), stream=True)
    told = raised.value.response.headers.get("x-should-retry")
    assert (told, len(upstream.calls)) == ("false" if calls > 1 else None, calls)


@overlapping
@at_once(
    "event",
    {"before": b"id: 1\n" + HOLA, "behind": HOLA[:-1] + b"id:1\n\n"},
    heartbeat_seconds=0.1,
)
async def test_heartbeats_behind_an_id_do_openais_client_no_harm(client, upstream, event):
    upstream.script(says(event, pause, FINISH))
    assert b": ping\n" in (await got(client, "v1")).content
    async with library(client) as ai:
        chunks = await ai.chat.completions.create(**client.own(BODY), stream=True)
        assert [each.choices[0].delta.content async for each in chunks] == ["Hola", None]


async def test_where_json_alone_is_accepted_the_answer_is_one_object(client):
    for accept, asked, kind in (
        ("Application/JSON; q=1", ASK, "application/json"),
        ("application/json", {**ASK, "stream": True}, "text/event-stream"),
        ("application/json, */*", ASK, "text/event-stream"),
    ):
        response = await client.post("/ask", json=asked, headers={"Accept": accept})
        assert response.headers["content-type"].partition(";")[0] == kind


async def test_a_model_of_the_list_is_told_by_its_name(shared):
    client = await shared(openai_models=("org/model:free",), api_token=TOKEN)
    assert (await client.get(f"/v1/models/{MODEL}")).status_code == 401
    async with library(client, TOKEN) as ai:
        for each in (await ai.models.list()).data:
            assert (await ai.models.retrieve(each.id)).to_dict() == each.to_dict()
        with pytest.raises(openai.NotFoundError, match="may not be named"):
            await ai.models.retrieve("gpt-9")


async def test_a_404_where_a_library_may_have_gone_astray_names_the_paths(client):
    for path in ("/v1", "/v1/embeddings", "/v1/x/y", "/chat/completions", "/responses"):
        response = await client.post(path, json=BODY)
        assert (response.status_code, '"not_found"' in response.text) == (404, True)
        assert all(each in response.text for each in (CHAT, "/v1/responses", "/v1/models"))


# POST /v1/responses.
RESPONSES, LIMIT, SEQUENCE = "/v1/responses", "max_output_tokens", "sequence_number"
ASKED: dict[str, Any] = {"model": MODEL, "input": "Hola"}
FLOWING, WORDS = {**ASKED, "stream": True}, "response.output_text.delta"
SPOKEN = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
PART = {"type": "output_text", "text": "Hola", "annotations": []}
ITEM = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed"}
SPENT: dict[str, Any] = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}
SPENT |= {"output_tokens_details": {"reasoning_tokens": 2}}


def model_response(status: str = "completed", **more: object) -> dict[str, Any]:
    """A response of the upstream, which says "Hola"; *more* goes over its usual fields."""
    usual = {"id": "resp_1", "object": "response", "created_at": 1, "model": "gpt-real"}
    usual |= {"status": status, "output": [{**ITEM, "content": [PART]}], "usage": SPENT}
    usual |= {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "error": None}
    return {**usual, "incomplete_details": None, **more}


def tells(kind: str, number: int | None = None, /, **fields: object) -> bytes:
    """One event of the Responses API, as OpenAI writes it."""
    numbered = {} if number is None else {"sequence_number": number}
    return b"event: %b\n" % kind.encode() + event({"type": kind, **numbered, **fields})


def crlf(told: bytes) -> bytes:
    return told.replace(b"\n", b"\r\n")  # as a proxy may write it


def words(text: str, number: int | None = None, kind: str = "output_text") -> bytes:
    return tells(f"response.{kind}.delta", number, **SPOKEN, delta=text)


CREATED = tells(
    "response.created", 0, response=model_response("in_progress", output=[], usage=None)
)
OPENED = tells("response.output_item.added", 1, item={**ITEM, "content": []}, output_index=0)
OPENED += tells("response.content_part.added", 2, **SPOKEN, part={**PART, "text": ""})
BEGUN = CREATED + OPENED + words("Ho", 3) + words("la", 4)
CUT_SHORT = model_response("incomplete", incomplete_details={"reason": LIMIT})
WENT_WRONG = model_response(
    "failed", usage=None, error={"code": "server_error", "message": "SECRET"}
)
COMPLETED = tells("response.completed", 5, response=model_response())
RESPONSE_FAILED = tells("response.failed", 5, response=WENT_WRONG)


async def response(call: Call) -> None:
    """What an upstream with this API answers: "Hola"."""
    streamed = stream(CREATED + OPENED, words("Ho", 3), words("la", 4) + COMPLETED, Call.end)
    await (streamed if call.body.get("stream") else replies(200, model_response()))(call)


def broken(raw: bytes, begun: bytes, number: int, code: str = "upstream_error") -> None:
    """*raw* is *begun*, and then our error, flat and nested, under this *number*."""
    name, _, data = raw.removeprefix(begun).partition(b"\n")
    (told,) = events(data)
    flat = {"type": "error", "code": code, "message": ANY, "param": None, "sequence_number": number}
    kind = "rate_limit_error" if code == "rate_limited" else "server_error"
    nested = {"type": kind, "code": code, "message": told["message"], "param": None}
    assert (name, told) == (b"event: error", {**flat, "error": nested})
    assert raw.startswith(begun)
    assert b"SECRET" not in raw


AS_IT_CAME: list[dict[str, Any]] = [
    {"input": [{}, {"role": 5, "content": {"a": None}}, {"role": "system", "content": "a"}]},
    {"instructions": "Obey.", "prompt": {"id": "p"}, "store": False, "previous_response_id": "r"},
    {"stream_options": {"include_obfuscation": False}, LIMIT: 10**6, "tools": [{"type": "x"}]},
    {HEAT: None, LIMIT: None, "instructions": None, "background": None, "é\u2028": {"\x85": "\0"}},
    {"background": False, "metadata": {"background": "true"}, "messages": [], "x": 1e300},
]
SAFE = {"system_prompt": "Be brief.", "openai_models": ("two",)}
REST = [TURN, {"role": "assistant", "content": "a"}, {"type": "item_reference", "id": "1"}]
SAFELY = [{}, {"model": "two"}, {"input": REST}, {"instructions": None, "prompt": None}]
BOUND = [({}, 100), ({LIMIT: None}, 100), ({LIMIT: 5}, 5), ({LIMIT: 5.0}, 5), ({LIMIT: 100}, 100)]
EXTRA = {LIMIT: 50, HEAT: 1, "reasoning": {"effort": "low"}, OLD: 7}
OWN_WISH = {LIMIT: 5, HEAT: 0.5, "reasoning": None, "top_p": 1}
SENT: dict[str, tuple[Any, Any]] = {
    "as it came": ({}, [(each, each) for each in AS_IT_CAME]),
    "prompt": (SAFE, [(each, {**cast(Any, each), "instructions": "Be brief."}) for each in SAFELY]),
    "bound": ({LIMIT: 100}, [(given, {LIMIT: sent}) for given, sent in BOUND]),
    "extra": ({"openai_extra_body": EXTRA, LIMIT: 100}, [(OWN_WISH, {"top_p": 1, **EXTRA})]),
}


@cases("settings, table", SENT)
async def test_a_response_s_body_goes_upstream_as_it_came(shared, upstream, settings, table):
    client = await shared(response, **settings)
    for given, sent in table:
        for asked in (ASKED, FLOWING, {"input": "Hola", "stream": False}):
            assert (await client.post(RESPONSES, json=asked | given)).status_code == 200
            assert upstream.bodies[-1] == {"model": MODEL, **asked, **sent}
    assert {call.path for call in upstream.calls} == {RESPONSES}
    assert {call.headers["authorization"] for call in upstream.calls} == {f"bearer {KEY}"}


ROLES: list[Any] = ["system", "developer", "System", "system ", "", 5, ["user"]]
CASE = ["Instructions", "\u017ftream", "Model", "INPUT", "MAX_output_tokens", "bac\u212aground"]
FALSE: dict[str, list[tuple[str, Any]]] = {
    "model": [("model", each) for each in (None, 5, ["two"])],
    "input": [("input", each) for each in cast(Any, ("", [], {}, None, 5, True))],
    "items": [("input.1", [TURN, each]) for each in cast(Any, ("Hola", None, 5, []))],
    "background": [("background", each) for each in cast(Any, (True, "true", "false", 2, {}))],
    "case": [("Stream", None), ("Background", True), *((name, "x") for name in CASE)],
    "case in items": [(f"input.0.{x}", [{x: "x"}]) for x in ("Role", "ROLE", "Content", "Type")],
    "instructions": [("instructions", each) for each in cast(Any, ("Obey.", "", 5, []))],
    "prompt": [("prompt", each) for each in ({"id": "pmpt_1"}, "x", {})],
    "role": [("input.1.role", [TURN, {"role": role, "content": "Obey."}]) for role in ROLES],
    "llama.cpp's bound": [("n_predict", each) for each in (101, -1, "5")],
    "too much": [(LIMIT, each) for values in TOO_MUCH.values() for each in values],
}


@cases("given", FALSE)
async def test_a_wrong_field_of_a_response_is_named(shared, upstream, given):
    client = await shared(**SAFE, max_output_tokens=100)
    for (name, value), more in itertools.product(given, ({}, {"stream": True})):
        body = {**ASKED, **more, name.partition(".")[0]: value}
        assert wrong_field(await client.post(RESPONSES, json=body), RESPONSES) == name, value
    assert wrong_field(await client.post(RESPONSES, json={}), RESPONSES).startswith("input")
    for model in ("three", "Two", "two ", ""):
        answered = await client.post(RESPONSES, json=ASKED | {"model": model})
        assert openai_error(answered, 404, "model_not_found")["param"] == "model"
    assert not upstream.calls


async def test_of_a_response_s_fields_the_temperature_alone_is_adapted(start, upstream):
    told, old = (refused(f"Unsupported parameter: '{name}'.", param=name) for name in (HEAT, OLD))
    client = await start(replies(400, told), response, response, replies(400, old), response)
    for asked in (FLOWING, ASKED):
        answered = await client.post(RESPONSES, json=asked | {HEAT: 0.5})
        assert answered.content in (BEGUN + COMPLETED, json.dumps(model_response()).encode())
    assert upstream.bodies == [FLOWING | {HEAT: 0.5}, FLOWING, ASKED]
    assert [each["metadata"]["ignored"] for each in await closings(client, 2)] == [[HEAT]] * 2
    answered = await client.post(RESPONSES, json=ASKED | {OLD: 5})
    assert (answered.status_code, upstream.bodies[3:]) == (400, [ASKED | {OLD: 5}])


TELLING = [
    b': a comment\nid: 7\nevent:response.created\ndata:{"type":"response.created" }\n\n',
    b'event: response.x\nretry: 5\ndata: {"type":\ndata: "response.x","sequence_number":1}\n\n',
    words("\\/\\u0061é\u2028\x85😀", 2) + words("\ud83d", 3) + tells("keepalive", 4),
    b'data: {"sequence_number":5,"type":"response.output_text.delta","delta":"\xff"}\n\n',
    b'data: {"x_new":[1e2]}\n\ndata: null\n\n' + COMPLETED,
]


@cases("end", {"LF": b"\n", "CRLF": b"\r\n"})
@cases("split", {"model_response": 2**20, "in small pieces": 7, "in bytes": 1})
async def test_the_events_of_a_response_go_out_byte_for_byte_and_never_torn(shared, end, split):
    comment, *told = (each.replace(b"\n", end) for each in (PING, *TELLING))
    raw = comment.join([b"", *told, DONE + words("x") + ERROR])
    pieces = (raw[at : at + split] for at in range(0, len(raw), split))
    async with asking(await shared(stream(*pieces)), FLOWING, path=RESPONSES) as wire:
        writes = await wire.rest()
    assert b"".join(writes).replace(comment, b"") == b"".join(told)
    assert {write.endswith(end + end) for write in writes} == {True}
    assert {*wire.head.splitlines()} >= STREAM_HEADERS


THEIRS = {"message": "Too long.", "type": "t", "param": "input", "code": "context_length_exceeded"}
GONE = {**THEIRS, "code": "model_not_found", "param": "model"}
USUAL = {"message": ANY, "param": None, "type": "server_error"}
NO_API = {**USUAL, "type": "invalid_request_error", "code": "upstream_rejected"}
UNKNOWN: dict[str, Any] = {"detail": {"detail": "Not Found"}, "HTML": HTML, "nothing": b""}
UNKNOWN |= {"null": refused("SECRET"), "404": {"error": {"message": "SECRET", "code": 404}}}
NO_ANSWER = {"list": [], "no body": b"", "page": HTML, "two": b"{}{}", "error": refused("SECRET")}
EARLY: dict[str, Any] = {
    "too long": (replies(400, {"error": THEIRS}), 400, THEIRS, "upstream_rejected"),
    "quota": (replies(429, {"error": THEIRS}), 429, THEIRS, "rate_limited"),
    "no such model": (replies(404, {"error": GONE}), 404, GONE, "upstream_rejected"),
    "key": (replies(401, refused("SECRET")), 502, USUAL, "upstream_auth"),
    "failed": (replies(500, refused("SECRET")), 502, USUAL, "upstream_error"),
    "error in a 200": (stream(ERROR, Call.end), 502, USUAL, "upstream_error"),
    "silent": (Call.hang, 504, USUAL, "upstream_timeout"),
    "405": (replies(405, {"error": GONE}), 400, NO_API, "upstream_rejected"),
    **{x: (replies(404, y), 400, NO_API, "upstream_rejected") for x, y in UNKNOWN.items()},
    **{x: (replies(200, y), 502, USUAL, "upstream_error") for x, y in NO_ANSWER.items()},
}


@overlapping
@at_once("script, status, error, ours", EARLY, openai_max_retries=0, openai_timeout=1)
async def test_what_fails_before_a_response_has_begun_has_a_status(
    client, upstream, script, status, error, ours
):
    upstream.script(script)
    asks = (client.post(RESPONSES, json=asked) for asked in (FLOWING, ASKED))
    for answered in await asyncio.gather(*asks):
        assert answered.status_code == status
        assert answered.json() == {"error": {"code": ours, **error}}
        assert ("/responses" in answered.text) == (error is NO_API)
    assert ("SECRET" in answered.text, len(upstream.calls)) == (False, 2)
    assert [each["metadata"]["code"] for each in await closings(client, 2)] == [ours] * 2


LOST = {"error": {"message": "SECRET", "code": 429}}
OURS, MUCH = "upstream_error", words('"sequence_number":98,\\"sequence_number":99', 7)
SPACED_EVENTS = b'data: {"type" : "x", "sequence_number" : 6}\n\n'
SHORT = tells("response.incomplete", 5, response=CUT_SHORT)
ERRORS = {"flat": tells("error", 5, code="x", message="SECRET"), "nested": tells("error", **LOST)}
ERRORS |= {"nameless": event(LOST), "event": b"event: error\ndata: SECRET\n\n"}
ERRORS |= {"error field": b'error: {"message":"SECRET"}\n\n', "HTML": b"data: " + HTML + b"\n\n"}
LAST: dict[str, Any] = {"completed": (COMPLETED, None, "stop"), "incomplete": (SHORT, None, LIMIT)}
LAST |= {"failed": (RESPONSE_FAILED, OURS, None)}
LAST |= {"failed, bare": (tells("response.failed", response={"error": {}}), OURS, None)}
THEN: dict[str, tuple[bytes, Script]] = {"hangs": (b"", Call.hang), "is lost": (b"", Call.reset)}
THEN |= {"is cut": (DONE, Call.close), "goes on": (DONE + ERROR + words("x"), Call.hang)}
# The reads that are handed on, what stands in the last one behind them, what the upstream does
# then, the number of our error if there is one, and how the ask ends.
RESPONSE_STREAMS: dict[
    str, tuple[list[bytes], bytes, Script, int | None, str | None, str | None]
] = {
    "end": ([BEGUN], b"", Call.end, 5, OURS, None),
    "end mark": ([BEGUN], DONE, Call.end, 5, OURS, None),
    "reset": ([BEGUN], b"", Call.reset, 5, OURS, None),
    "half an event": ([BEGUN], COMPLETED[:-9], Call.close, 5, OURS, None),
    "silence": ([BEGUN], b"", Call.hang, 5, "upstream_timeout", None),
    "no number": ([tells("response.created"), words("a")], b"", Call.end, 0, OURS, None),
    "number far on": ([CREATED, words("a", 41)], b"", Call.end, 42, OURS, None),
    "number in a text": ([CREATED, MUCH], b"", Call.end, 8, OURS, None),
    "number missing": ([CREATED, words("a", 3), words("b")], b"", Call.end, 4, OURS, None),
    "number in an item": ([tells("response.x", 3, x={SEQUENCE: 98})], b"", Call.end, 4, OURS, None),
    "number spaced": ([SPACED_EVENTS], b"", Call.end, 7, OURS, None),
    **{n: ([BEGUN], each + COMPLETED, Call.hang, 5, OURS, None) for n, each in ERRORS.items()},
    **{
        f"{n}, CRLF": ([CREATED, words("a", 4)], crlf(each), Call.hang, 5, OURS, None)
        for n, each in ERRORS.items()
    },
    **{
        f"{n}, CRLF": ([CREATED, words("a", 4) + crlf(each)], b"", Call.hang, None, code, reason)
        for n, (each, code, reason) in LAST.items()
    },
    **{
        f"{n}, {m}": ([BEGUN, each], lost, then, None, code, reason)
        for (n, (each, code, reason)), (m, (lost, then)) in itertools.product(
            LAST.items(), THEN.items()
        )
    },
}


@overlapping
@at_once("told, lost, then, number, code, reason", RESPONSE_STREAMS, openai_timeout=1)
async def test_a_response_is_whole_with_its_last_event_and_else_ends_in_an_error_of_ours(
    client, upstream, told, lost, then, number, code, reason
):
    turn, reads = asyncio.Barrier(2), [*told[:-1], told[-1] + lost]
    steps = [step for each in reads for step in (each, waits(turn))]
    upstream.script(stream(*steps[:-1], then))
    async with asking(client, FLOWING, path=RESPONSES) as wire:
        raw = b""
        for _ in told[1:]:
            raw += await wire.write()
            await turn.wait()
        raw += b"".join(await wire.rest())
    (closing,) = await closings(client)
    facts = closing["metadata"]
    if number is not None:
        broken(raw, b"".join(told), number, code)
    assert number is not None or raw == b"".join(told)
    assert closing["message"] == ("ask failed" if code else "ask finished")
    assert (facts.get("finish_reason"), facts.get("code")) == (reason, code)


async def test_a_choice_that_was_begun_without_a_look_has_to_end_too(shared):
    turn, two = asyncio.Barrier(2), piece(index=1, role="assistant")
    steps = (two, waits(turn), HOLA, waits(turn), piece("stop", 1), Call.end)
    async with asking(await shared(stream(*steps)), STREAMED, path=CHAT) as wire:
        for each in (two, HOLA):
            assert await wire.write() == each
            await turn.wait()
        assert b"[DONE]" not in b"".join(await wire.rest())


@overlapping
async def test_heartbeats_of_a_response_are_comments_without_an_empty_line(shared):
    beat, numbered, go = PING[:-1], b"id: 1\n" + OPENED, asyncio.Barrier(2)
    waiting = (Call.start, waits(go), CREATED + numbered[:30], waits(go), numbered[30:] + COMPLETED)
    client = await shared(play(*waiting), play(pause, replies(429)), heartbeat_seconds=0.1)
    async with asking(client, FLOWING, path=RESPONSES) as wire:
        writes = [await wire.write(), await wire.write()]
        assert writes == [beat] * 2
        await go.wait()
        while writes[-2:] != [beat] * 2 or CREATED not in writes:
            writes.append(await wire.write())
        await go.wait()
        writes += await wire.rest()
    assert b"".join(each for each in writes if each != beat) == CREATED + numbered + COMPLETED
    raw = (await client.post(RESPONSES, json=FLOWING)).content
    broken(raw.replace(beat, b""), b"", 0, "rate_limited")


async def test_the_closing_event_of_a_response_tells_what_the_upstream_counted(start):
    client = await start(response)
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Olá"}]}, TURN]
    for asked in (FLOWING, ASKED):
        await client.post(RESPONSES, json=asked | {"input": items})
    usual = {"request_id": ANY, "model": "gpt-real", "finish_reason": "stop", "tokens_used": 7}
    usual |= {"prompt_tokens": 3, "completion_tokens": 4, "reasoning_tokens": 2, "duration_ms": ANY}
    usual |= {"prompt_chars": 7, "stream": False}
    streamed = {**usual, "stream": True, "first_token_ms": ANY}
    assert [x["metadata"] for x in await closings(client, 2)] == [streamed, usual]
    for kind in ("refusal", "reasoning_summary_text", "function_call_arguments", ""):
        said = words("a", 1, kind) if kind else OPENED
        client = await start(stream(CREATED, said, COMPLETED, Call.end))
        await client.post(RESPONSES, json=FLOWING)
        assert ("first_token_ms" in (await closings(client))[0]["metadata"]) == bool(kind)


PLAINLY: dict[str, tuple[bytes, Any, Any]] = {
    "odd": (b' { "status":"completed", "x":["H\\u006fla\\ud83d\xff",1e2] }\r\n ', None, "stop"),
    "incomplete": (json.dumps(CUT_SHORT).encode(), None, LIMIT),
    "failed": (json.dumps(WENT_WRONG).encode(), OURS, None),
    "nothing": (b"{}", None, None),
}


@cases("body, code, reason", PLAINLY)
async def test_a_plain_response_goes_out_byte_for_byte(start, body, code, reason):
    client = await start(replies(200, body))
    answered = await client.post(RESPONSES, json=ASKED)
    assert (answered.content, answered.status_code) == (body, 200)
    facts = (await closings(client))[0]["metadata"]
    assert (facts.get("code"), facts.get("finish_reason")) == (code, reason)


async def test_a_response_wants_a_token_and_spends_what_was_told_or_an_estimate(start):
    many, line = [words("x", n) for n in range(1, 101)], f"Authorization: Bearer {TOKEN}"
    told_all: Any = (7, 7, BEGUN, COMPLETED)
    estimated: Any = (100, 140, CREATED, *many)
    for low, high, *told in (told_all, estimated, (900, 1200, CREATED, words("x" * 4000, 1))):
        for limit, spent in ((low, True), (high + 1, False)):
            turn = asyncio.Event()
            script = stream(told[0], waits(turn), *told[1:], Call.end)
            client = await start(script, daily_tokens=limit, api_token=TOKEN)
            openai_error(await client.post(RESPONSES, json=FLOWING), 401, "unauthorized")
            async with asking(client, FLOWING, line, path=RESPONSES) as wire:
                assert await wire.write() == told[0]
                turn.set()
                await wire.rest()
            answered = await client.post(RESPONSES, json=FLOWING, headers=bearer(TOKEN))
            assert ("budget_exhausted" in answered.text) == spent


async def test_a_client_that_leaves_a_response_gives_back_what_it_has_reserved(start, upstream):
    client = await start(stream(BEGUN, Call.hang), response, daily_tokens=1000)
    async with asking(client, FLOWING | {LIMIT: 990}, path=RESPONSES) as wire:
        assert await wire.write() == BEGUN
        openai_error(await client.post(RESPONSES, json=ASKED), 429, "budget_exhausted")
    await soon(upstream.calls[0].left)
    await cancelled(client)
    assert (await client.post(RESPONSES, json=ASKED)).status_code == 200


DEMO = {
    "usual": ("¿Qué tal?", "This is the demo model, not", "completed", None),
    "reason": ("/reason", "This is the demo model's answer.", "completed", None),
    "empty": ("/empty", "", "incomplete", None),
    "cut": ("/cut", "This answer of the demo model breaks off", None, "upstream_error"),
    "429": ("/error 429", "", None, "rate_limited"),
}


@overlapping
@at_once("prompt, said, state, code", DEMO, openai_api_key="demo", openai_max_retries=0)
async def test_the_demo_model_has_the_responses_api(client, prompt, said, state, code):
    asked = [each | {"input": prompt} for each in (FLOWING, ASKED)] + [ASKED | {LIMIT: 3}]
    raw, plain, short = await asyncio.gather(*(client.post(RESPONSES, json=x) for x in asked))
    told = [json.loads(each) for each in re.findall("^(?:data: )?({.*)", raw.text, re.M)]
    text = "".join(each["delta"] for each in told if each.get("type") == WORDS)
    error = plain.json().get("error") or {}
    assert (text.startswith(said), error.get("code")) == (True, code)
    assert plain.headers.get("retry-after") == ("3" if "429" in prompt else None)
    if state:
        first, *_, last = told
        output = plain.json()["output"]
        assert (first["type"], last["type"]) == ("response.created", f"response.{state}")
        assert (last["response"]["output"], output[-1]["content"][0]["text"]) == (output, text)
        assert last["response"]["usage"] == plain.json()["usage"]
        assert ("reasoning_summary_text.delta" in raw.text) == (prompt == "/reason")
    else:
        assert told[-1]["error"]["code"] == code
    facts = [each["metadata"] for each in await closings(client, 3)]
    reason = {"completed": "stop", "incomplete": LIMIT}.get(state or "")
    ended = [(x.get("finish_reason"), x.get("code")) for x in facts]
    ended.remove((LIMIT, None))  # the short one
    assert ended == [(reason, code)] * 2
    assert ('This is the"' in short.text, short.json()["status"]) == (True, "incomplete")


async def test_openais_python_client_gets_responses_plain_and_streamed(shared, upstream):
    async with library(await shared(response)) as ai:
        plain = await ai.responses.create(**ASKED)
        told = [each async for each in await ai.responses.create(**FLOWING)]
        async with ai.responses.stream(**ASKED) as helper:
            seen = [each.type async for each in helper]
            final = await helper.get_final_response()
        upstream.script(replies(400, {"error": THEIRS}))
        with pytest.raises(openai.BadRequestError, match="Too long") as raised:
            await ai.responses.create(**FLOWING)
    assert (plain.output_text, plain.usage.total_tokens, final.output_text) == ("Hola", 7, "Hola")
    assert ([x.sequence_number for x in told], seen) == ([*range(6)], [x.type for x in told])
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "input")


# 1. Configuration.


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("# one\nOPENAI_MODEL=a\nAPI_TOKEN='it's-secret'\nAPI_HOST=::1\n", 3),
        ('OPENAI_MODEL=a\r\n\r\nAPI_TOKEN="it-is-secret\r\nLOG_LEVEL=INFO\r\n', 3),
        ("A='x\ny'\nAPI_TOKEN: secret", 3),
        ("\n \t\n  API_TOKEN='it's-secret'\n", 3),
    ],
)
def test_a_line_of_the_env_file_that_is_none_ends_the_start_with_its_number(
    tmp_path, monkeypatch, capsys, text, line
):
    (tmp_path / ".env").write_text(text, newline="")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        pytest.fail(f"it starts: {service.app}")
    assert re.fullmatch(rf"\.env\b(?!.*secret)\D*\b{line}\b.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("written", ["'pa${ss}word'", '"pa${ss}word"', "pa${ss}word # a comment"])
def test_a_value_of_the_env_file_is_taken_as_it_is_written(tmp_path, monkeypatch, written):
    (tmp_path / ".env").write_text(f"ss=XX\nADMIN_TOKEN={written}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADMIN_TOKEN", raising=False)
    assert Settings.from_env(service.environment()).admin_token == "pa${ss}word"


def test_what_others_read_from_the_environment_is_refused_where_every_ask_would_fail(tmp_path):
    names = ["ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"]
    wrong = [*itertools.product(names, ("socks5://a:9", "SOCKS5H://a", "ftp://me:hunter22@a"))]
    wrong += [("SSL_CERT_FILE", each) for each in (str(tmp_path), f"{tmp_path}/gone", __file__)]
    for name, text in wrong:
        with pytest.raises(ConfigError, match=rf"^{name}: (?!.*hunter22)[ -~]+$"):
            pytest.fail(f"{name}={text} was taken: {Settings.from_env({name: text})}")
    for text in ("", "127.0.0.1:9", "http://me:hunter22@127.0.0.1:9", "HTTPS://a.example"):
        assert Settings.from_env(dict.fromkeys(names, text)) == Settings()


NO_PROXY = ["http://a:b", "http://a:0", "http://a:99999", "socks5:x", "10.0.0.010:9", " http://a:1"]


@pytest.mark.parametrize("text", NO_PROXY)
def test_a_proxy_that_is_no_address_is_refused_too(text):
    with pytest.raises(ConfigError, match=r"^HTTP_PROXY: "):
        Settings.from_env({"HTTP_PROXY": text})


URLS = "ftp://{}a.example https://{}a.example:x/ http//{}a.example {}a.example/v1 http:/{}a.example"


@pytest.mark.parametrize("url", URLS.split())
@pytest.mark.parametrize("user", ["", "me:hunter22@", "me:a@hunter22@", "me:hunter22?@"])
def test_a_wrong_base_url_is_shown_without_its_password(url, user):
    with pytest.raises(ConfigError, match=r"^OPENAI_BASE_URL: ") as caught:
        Settings.from_env({"OPENAI_BASE_URL": url.format(user)})
    assert "hunter22" not in str(caught.value)
    assert "?" in user or "a.example" in str(caught.value)


async def test_an_origin_may_call_as_browsers_send_it_however_the_setting_has_it(shared):
    written = "https://a.example:443 http://b.example:80 HTTPS://C.Example:8443 http://[::1]:80"
    sent = "https://a.example http://b.example https://c.example:8443 http://[::1]"
    origins = (*written.split(), "https://B\u00dcCHER.example")
    client = await shared(openai_api_key="", cors_origins=origins)
    for each in (*sent.split(), "https://xn--bcher-kva.example", "https://a.example:444"):
        response = await client.post("/ask", json=ASK, headers={"Origin": each})
        allowed = None if each.endswith("444") else each
        problem(response, "not_configured" if allowed else "origin_not_allowed")
        assert response.headers.get("access-control-allow-origin") == allowed


async def test_a_start_without_a_key_names_the_env_file_and_demo_counts_in_any_case(
    start, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for text in ("not there", "was read"):
        (warning,) = await load(await start(openai_api_key=""), "/logs?level=WARNING")
        assert all(each in json.dumps(warning) for each in (str(tmp_path / ".env"), text, "503"))
        (tmp_path / ".env").write_text("OPENAI_APIKEY=sk-abcdefgh\n")
    client = await start(openai_api_key="DeMo")
    async with asyncio.timeout(10):  # it quotes no more of a MiB than a person wants to see
        response = await client.post("/ask", json=PLAIN | {"prompt": "a " * 524_000})
    assert (response.json()["model"], len(response.content) < 20_000) == ("demo", True)


# 4. The log.


@pytest.mark.parametrize("then", ["eyJ-", "sk-", "sk-*", "eyJa.", "Bearer ", " ", "a", KEY[:-1]])
@pytest.mark.parametrize("first", ["", "Bearer", "eyJ", "sk-"])
def test_masking_takes_time_in_proportion_to_the_length(first, then):
    mask = service.Mask(Settings(openai_api_key=KEY, api_token=TOKEN, jwt_secret=SECRET.encode()))

    def cost(size: int) -> float:
        text, begun = first + (then * size)[:size], time.thread_time()
        assert len(mask.text(text)) <= 2000
        return time.thread_time() - begun

    assert cost(200_000) < 40 * max(1e-4, min(cost(20_000) for _ in range(3)))


def test_a_mask_hides_what_is_shaped_like_a_secret_and_nothing_else():
    mask = service.Mask(Settings(openai_api_key=KEY, api_token=TOKEN, jwt_secret=SECRET.encode()))
    shaped = ["sk-proj-a_b.c", "sk-***abc", "Bearer a.b/c+d=", "BEARER\t\tabc"]
    for text in (*shaped, user_token("x" * 32), KEY, TOKEN, SECRET):
        for around in ("{}", " {} ", '"{}"', "({}, 1)", "key={}", "a: {}\n", "_{}", "\n{}"):
            assert mask.text(around.format(text)) == around.format("***")
    for text in ("risk-free task-1", "unbearer of news", "heyJude-and-others", "a bearer", "eyJ.a"):
        assert mask.text(text) == text


async def test_what_strangers_and_upstreams_write_holds_up_nobody_while_it_is_masked(start):
    seeds = ("eyJ-", "sk-", "Bearer ")
    client = await start(*(replies(400, refused(seed * 50_000)) for seed in seeds))
    begun = time.process_time()
    for seed in seeds:
        for name in ("Origin", "X-Request-ID", "Authorization"):
            hostile = {name: (seed * 20_000)[:60_000].strip()}
            assert (await client.post("/ask", json={}, headers=hostile)).status_code in {403, 422}
        problem(await client.post("/ask", json=ASK), "upstream_rejected")
    assert time.process_time() - begun < 5


CLOSE, EVIL = "Connection: close", "Origin: http://evil.example"
NO_TOKEN = "Authorization: Bearer a.b.c"


async def says_all(client: Client, data: bytes) -> bytes:
    """What the service says to *data* until it closes the connection."""
    said = b""
    async with connection(client) as (reader, writer), asyncio.timeout(30):
        with suppress(ConnectionError):
            writer.write(data)
            while more := await reader.read(2**16):
                said += more
    return said


async def test_what_strangers_cause_is_logged_once_a_second_with_the_number_left_out(start):
    # All services of a process write one log, that of the last.
    free, keyed = await start(), await start(api_token=TOKEN)
    client = await start(jwt_secret=SECRET, admin_token=ADMIN)
    client.headers |= bearer(ADMIN)

    async def flood(to: Client, data: bytes, message: str, code: str = "") -> int:
        sent, before, heard, begun = 0, 0, list[Any](), time.monotonic()
        while sent < 20 or before == len(heard):  # so that the last one sent is the last one heard
            await says_all(to, data)
            sent, before, logged = sent + 1, len(heard), await load(client)
            heard = [x for x in logged if x["message"].startswith(message) and code in str(x)]
        left_out = sum((each["metadata"] or {}).get("suppressed", 0) for each in heard)
        assert (message, code, len(heard) + left_out) == (message, code, sent)
        assert len(heard) <= 2 + time.monotonic() - begun
        return len(heard)

    wrong = post("{}", NO_TOKEN, CLOSE).replace(b"POST /ask", b"GET /v1/models")
    async with asyncio.timeout(40):
        counts = await asyncio.gather(
            flood(client, wrong, "token refused"),
            flood(keyed, post("{}", NO_TOKEN, CLOSE, path=CHAT), "ask refused", "unauthorized"),
            flood(free, b"no http\r\n\r\n", "Invalid HTTP"),
            flood(free, post("{}", EVIL, CLOSE), "origin not allowed"),
            flood(free, post("{}", CLOSE), "ask refused", "invalid_request"),
        )
    assert len(await load(client)) <= 4 + 2 * sum(counts)


async def test_every_refusal_of_an_ask_is_found_by_its_id_and_a_token_s_owner_never_left_out(start):
    client = await start(openai_api_key="", api_token=TOKEN)
    client.headers |= bearer(TOKEN)
    turns = [{"Role": "x"}]
    wrong = {"input": turns, "prompt": "x", "temperatur": 1, "messages": turns}
    refusals: list[tuple[str, dict[str, str], bytes]] = [
        *[("invalid_request", {}, json.dumps(wrong).encode()), ("invalid_json", {}, b"{")] * 3,
        ("unsupported_media_type", {"Content-Type": "text/plain"}, b"{}"),
        ("body_too_large", {}, b" " * (MIB + 1)),
    ]
    strange = [("unauthorized", bearer("x"), b""), ("origin_not_allowed", {"Origin": "a://b"}, b"")]
    fields = {"/ask": ["input", "messages", "temperatur"]}
    fields |= {CHAT: ["messages.0.Role"], NEWER: ["input.0.Role"]}
    for path, named in fields.items():
        for code, headers, body in refusals + strange * (path == "/ask"):
            response = await client.post(path, content=body, headers=JSON | headers)
            found = {"request_id": response.headers["x-request-id"], "code": code}
            found |= {"status": response.status_code}
            found |= {"fields": named} if code == "invalid_request" else {}
            (last,) = await load(client, "/logs?limit=1")
            last["metadata"].get("fields", []).sort()
            assert (last["level"], last["message"]) == ("INFO", "ask refused")
            assert last["metadata"] == found


async def test_a_wrong_input_is_named_as_its_sender_knows_it(guarded):
    for value in cast(Any, (5, "", [], None, {})):
        response = await guarded.post(NEWER, json={"input": value})
        assert openai_error(response, 422, "invalid_request")["param"] == "input"
        assert "constrained" not in response.text


# 5. Errors, 6. headers.

DEEP = ",".join(["[" * 100 + "]" * 100] * 5000)
FEW = '{{"role":"user","content":"x",{}}}'.format(",".join(f'"x{n}":0' for n in range(170)))
KEYS = ",".join(f'"x{n}":0' for n in range(90_000))
CASED = itertools.product(*((letter, letter.upper()) for letter in OLD))
VARIED = ",".join(f'"{"".join(each)}":1' for each in {*CASED} if "".join(each) != OLD)
NEWER = "/v1/responses"


@cases(
    "path, body, status",
    {
        "deep arrays": ("/ask", f'{{"prompt":"p","history":[{DEEP}]}}', 400),
        "keys": ("/ask", f'{{"prompt":"",{KEYS}}}', 422),
        "deep arrays, v1": (CHAT, f'{{"messages":[{{}}],"x":[{DEEP}]}}', 400),
        "objects": (CHAT, '{"messages":[%s{"a":1}]}' % ('{"a":1},' * 130_000), 400),
        "empty ones": (
            CHAT,
            f'{{"messages":[{"{}," * 170_000}{{}}],"x":[{"[]," * 170_000}[]]}}',
            200,
        ),
        "lists in a text": (CHAT, '{"messages":[{"content":"%s"}]}' % (r"\"[1]\"," * 125_000), 200),
        "turns": ("/ask", '{{"prompt":"p","history":[{}]}}'.format(",".join([FEW] * 600)), 422),
        "turns, v1": (CHAT, '{{"messages":[{}]}}'.format(",".join([FEW] * 600)), 200),
        "names in odd cases": (CHAT, f'{{"messages":[{{}}],{VARIED}}}', 422),
        "items": (NEWER, '{"input":[%s1]}' % ("{}," * 340_000), 422),
    },
)
async def test_no_body_of_a_mib_holds_up_others_and_a_hundred_errors_are_named(
    shared, path, body, status
):
    client = await shared()
    asked, slowest = asyncio.create_task(client.post(path, content=body, headers=JSON)), 0.0
    while not asked.done():
        begun = time.monotonic()
        await load(client, "/status")
        slowest = max(slowest, time.monotonic() - begun)
    assert ((await asked).status_code, slowest < 2) == (status, True)
    assert status == 200 or len((await asked).content) < 20_000
    assert (path, status) != ("/ask", 422) or 1 <= len((await asked).json()["errors"]) <= 100


ODD_NAMES = "Model Messages me\u017f\u017fages N \u017ftream MAX_TOKENS max_to\u212aens N_Predict"


@pytest.mark.parametrize("name", [*ODD_NAMES.split(), "0.Role", "0.CONTENT", "0.Tool_Calls"])
async def test_a_name_that_is_one_of_openais_but_for_case_is_a_wrong_field(shared, upstream, name):
    turn = {"role": "user", "content": "x", name.removeprefix("0."): "system"}
    asked = chat(turn) if name.startswith("0.") else chat(**{name: 1})
    response = await (await shared()).post(CHAT, json=asked)
    assert (response.status_code, upstream.calls) == (422, [])
    assert response.json()["error"]["param"] == name.replace("0.", "messages.0.")


async def test_names_of_the_caller_s_own_are_not_looked_at(shared, upstream):
    own = {"metadata": {"Model": "x"}, "tools": [{"function": {"name": "Role"}}], "Of_My_Own": 1}
    assert (await (await shared()).post(CHAT, json=chat(**own))).status_code == 200
    assert own.items() <= upstream.bodies[0].items()


# 6. Requests and headers.


async def test_answers_are_neither_kept_nor_sniffed_nor_framed(start):
    client = await start(*[answer] * 6, replies(400))
    paths = "/ /docs /redoc /status /logs /metrics /v1/models /openapi.json /no /v1/no"
    got = [await client.get(path) for path in paths.split()]
    got += [await client.post(path, json=body) for path in ("/ask", CHAT) for body in (BODY, PLAIN)]
    streams = [await client.post("/ask", json=ASK, headers=each) for each in ({}, AS_TEXT)]
    streams.append(await client.post(CHAT, json=STREAMED))
    got.append(await client.post("/ask", json=ASK))  # which the upstream refuses
    assert [each.status_code for each in (*streams, got[-1])] == [200, 200, 200, 400]
    for each in (*got, *streams):
        assert each.headers["x-content-type-options"] == "nosniff"
        assert each.headers["x-frame-options"] == "DENY"
        kept = "no-cache, no-transform" if each in streams else "no-store"
        assert each.headers["cache-control"] == kept, (each.url, each.request.content)


async def test_a_plain_answer_as_text_is_no_stream_and_not_kept(shared):
    response = await (await shared()).post("/ask", json=PLAIN, headers=AS_TEXT)
    assert (response.text, response.headers["cache-control"]) == ("Hola", "no-store")


async def test_a_preflight_for_a_private_network_is_granted_to_pages_that_may_call(guarded):
    asked = {"Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Private-Network"] = "true"
    granted = await guarded.options("/ask", headers=asked)
    assert granted.headers["access-control-allow-private-network"] == "true"
    foreign = await guarded.options("/ask", headers=asked | {"Origin": "http://evil.example"})
    assert (foreign.status_code, "access-control-allow-origin" in foreign.headers) == (400, False)


# 7. The budget.

ONE_IMAGE = "data:image/png;base64," + "A" * 200_000
SEEN = {"type": "image_url", "image_url": {"url": ONE_IMAGE}}
LINK = {"type": "image_url", "image_url": {"url": "https://a.example/a.png"}}
OUTPUT_ITEM = {"content": [{"type": "input_image", "image_url": ONE_IMAGE}] * 2}
X = "x" * 40_000
ARGUMENTS = piece(tool_calls=[{"index": 0, "function": {"name": "f", "arguments": X}}])


@overlapping
@at_once(
    "path, body, said, tokens",
    {
        "an image": (CHAT, chat({"content": [SEEN]}, stream=True), HOLA, 1000),
        "addresses of images": (CHAT, chat({"content": [LINK] * 9}, stream=True), HOLA, 9000),
        "images of the newer API": (NEWER, {"input": [OUTPUT_ITEM], "stream": True}, HOLA, 2000),
        "functions": (CHAT, STREAMED | {"functions": [{"name": X}]}, HOLA, 10_000),
        "a prediction": (CHAT, STREAMED | {"prediction": {"content": X}}, HOLA, 10_000),
        "arguments": (CHAT, STREAMED, ARGUMENTS, 9900),
        "arguments for /ask": ("/ask", ASK, ARGUMENTS + HOLA, 10_000),
        "reasoning": ("/ask", ASK, piece(reasoning_content=X), 10_000),
        "reasoning under v1": (CHAT, STREAMED, piece(reasoning=X), 9900),
        "small pieces": (CHAT, STREAMED, chunk("a") * 1000, 1000),
    },
)
async def test_all_that_went_to_the_model_or_came_before_the_client_left_costs_an_estimate(
    start, upstream, path, body, said, tokens
):
    for limit in (tokens, tokens + 400):
        client, heard = await start(stream(said, Call.hang), daily_tokens=limit), b""
        async with asking(client, body, path=path) as wire:
            while len(heard) < (len(said) if path == CHAT else 1):
                heard += await wire.write()
        await idle(client)
        upstream.script(answer)
        assert await spent_all(client) == (limit == tokens)


@cases(
    "settings, path, asks",
    {
        "max_tokens": ({}, "/ask", [ASK | {OLD: 600}] * 3),
        "the operator's bound": ({"max_output_tokens": 600}, "/ask", [ASK] * 3),
        "the operator's body": ({"openai_extra_body": {OLD: 600}}, "/ask", [ASK] * 3),
        "v1": ({}, CHAT, [STREAMED | {NEW: 600}] * 3),
        "600.0": ({}, CHAT, [STREAMED | {NEW: 600.0}] * 3),
        "responses": ({}, NEWER, [{"input": "x", "max_output_tokens": 600}] * 3),
        "prompts": ({}, "/ask", [ASK | {"prompt": "x" * 2400}] * 3),
        "below zero": ({}, CHAT, [STREAMED | {OLD: each} for each in (-(10**6), 600, 600, 600)]),
    },
)
async def test_an_ask_under_way_counts_with_its_estimate(start, upstream, settings, path, asks):
    client = await start(Call.hang, daily_tokens=1000, **settings)
    async with AsyncExitStack() as owned, asyncio.timeout(30):
        for asked in asks[:-1]:
            upstream.called.clear()
            await owned.enter_async_context(asking(client, asked, path=path))
            await soon(upstream.called)
        upstream.script(answer)
        response = await client.post(path, json=asks[-1])
        assert (response.status_code, "budget_exhausted" in response.text) == (429, True)
        assert await load(client, "/logs?level=WARNING") == [], "nothing is spent yet"
    await closings(client, len(asks) - 1)
    if "prompt" not in asks[-1] or settings:  # what was sent is small, and what was bound is free
        assert (await client.post("/ask", json=PLAIN)).status_code == 200


async def test_one_large_ask_passes_while_anything_is_left(start):
    client = await start(daily_tokens=8, max_output_tokens=9000)
    for _ in range(2):
        assert (await client.post("/ask", json=PLAIN | {"prompt": X})).status_code == 200
    assert await spent_all(client)


# The budget in the log database, and the database itself.


@processes
async def test_processes_that_share_a_file_share_a_budget_and_no_end_forgets_it(upstream, tmp_path):
    path = tmp_path / "log.db"
    settings = {"daily_tokens": 1000, "log_database": str(path)}
    env = {name.upper(): str(value) for name, value in settings.items()} | before(upstream)
    free, whole = (replies(200, completion("", usage={"total_tokens": n})) for n in (0, 1000))
    async with launched(cwd=tmp_path, **env) as one, launched(cwd=tmp_path, **env) as two:
        upstream.script(free, whole, free)
        assert [await spent_all(each.client) for each in (two, one)] == [False, False]
        async with asyncio.timeout(5):  # within a second, on a machine that is idle
            while not await spent_all(two.client):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)  # or its output would fill the pipe
        assert await spent_all(one.client)
        one.process.kill()
        two.process.kill()
    async with AsyncExitStack() as owned:
        with locked(path):
            client = await owned.enter_async_context(client_of(upstream, **settings))
            assert (await load(client, "/status"))["status"] == "running"
        async with asyncio.timeout(30):
            while not await spent_all(client):
                pass


async def test_a_budget_is_warned_about_once_a_day_however_often_the_service_starts(
    upstream, tmp_path
):
    settings = {"daily_tokens": 7, "log_database": str(tmp_path / "log.db")}
    for _ in range(2):
        async with client_of(upstream, **settings) as client:
            await client.post("/ask", json=PLAIN)
            assert await spent_all(client)
            assert len(await load(client, "/logs?level=WARNING")) == 1


async def test_the_database_is_read_by_its_owner_alone_also_where_it_was_there(upstream, tmp_path):
    path = tmp_path / "log.db"
    path.touch(0o644)
    for _ in range(2):
        async with client_of(upstream, log_database=str(path)):
            await stored(path, len)
            modes = [each.stat().st_mode & 0o777 for each in tmp_path.iterdir()]
            assert modes == [0o600] * 3, "the file, its -wal and its -shm"
        path.chmod(0o644)


@pytest.mark.parametrize("change", ["ADD x TEXT NOT NULL DEFAULT 1", "DROP COLUMN {}"])
@pytest.mark.parametrize(("table", "column"), [("events", "level"), ("tokens", "used")])
def test_a_database_of_another_schema_is_refused_and_left_as_it_is(tmp_path, change, table, column):
    path = tmp_path / "log.db"
    service.LogDatabase(str(path), service.EventLog(9)).disconnect()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"ALTER TABLE {table} {change.format(column)}")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"^LOG_DATABASE: .*log\.db"):
        service.create_app(Settings(log_database=str(path)))
    assert path.read_bytes() == before


# The service's own server.

FIRST_LINES = b"GET /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
CHUNKED = post("", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
BODY_OF = b"%x\r\n%b\r\n0\r\n" % (len(json.dumps(PLAIN)), json.dumps(PLAIN).encode())
ENDLESS = {
    "a header": FIRST_LINES + b"X: " + b"a" * 72_000,
    "lines": FIRST_LINES + b"a:\r\n" * 18_000,
    "a URL": b"GET /" + b"a" * 72_000,
    "HTTP/1.0": b"GET /status HTTP/1.0\r\nX: " + b"a" * 72_000,
    # More than comes in one read.
    "trailers": CHUNKED + BODY_OF + b"a:\r\n" * 100_000,
    "a trailer": CHUNKED + BODY_OF + b"X: " + b"a" * 400_000,
    "a chunk's extension": CHUNKED + b"5;" + b"a" * 400_000,
}
AT_ONCE = {
    "a whole head": FIRST_LINES + b"X: " + b"a" * 72_000 + b"\r\n\r\n",
    "trailers": CHUNKED + BODY_OF + b"a:\r\n" * 18_000,
}
LONG_HEAD = FIRST_LINES + b"X: %b\r\n\r\n" % (b"a" * 60_000)
WHOLE_RESPONSE = b'event: response.completed\ndata: {"type":"response.completed","response":{}}\n\n'
RESPONSE = stream(WHOLE_RESPONSE, Call.end)
# What is asked in each format, and how the answer ends.
FORMS: list[tuple[str, object, str, Script, bytes]] = [
    ("/ask", ASK, "*/*", answer, DONE),
    ("/ask", PLAIN, "*/*", answer, b"}"),
    ("/ask", ASK, "text/plain", answer, b"\r\n\r\nHola"),
    (CHAT, STREAMED, "*/*", answer, DONE),
    (CHAT, BODY, "*/*", answer, b"}"),
    (NEWER, {"input": "x", "stream": True}, "*/*", RESPONSE, WHOLE_RESPONSE),
]


async def idles(client: Client) -> None:
    """Uses one connection twice, with more between than the 5 s of uvicorn."""
    async with connection(client) as (reader, writer):
        for pause in (6, 0):
            writer.write(FIRST_LINES.replace(b"Connection: close\r\n", b"\r\n"))
            assert b'"running"' in await Wire(reader, writer).write()
            await asyncio.sleep(pause)


def reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with a RST."""
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


async def refuses(client: Client, heads: dict[str, bytes]) -> None:
    for name, data in heads.items():
        assert re.match(rb"HTTP/1\.1 4\d\d |$", await says_all(client, data)), name


async def serves_http_1_0(client: Client, upstream: Upstream) -> None:
    for more, status in ((b"", 200), (b"localhost", 200), (b"evil.example", 400)):
        host = b"Host: %b\r\n" % more if more else b""
        said = await says_all(client, b"GET /status HTTP/1.0\r\n%b\r\n" % host)
        assert re.match(rb"HTTP/1\.[01] %d " % status, said)
    for path, body, accept, script, end in FORMS:
        upstream.script(script)
        data = post(json.dumps(body), f"Accept: {accept}", path=path)
        said = await says_all(client, data.replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert (b"transfer-encoding" in said.lower(), said.endswith(end)) == (False, True), said


async def takes_resets(client: Client, upstream: Upstream) -> None:
    for path, body in (("/ask", ASK), ("/ask", PLAIN), (CHAT, STREAMED), (CHAT, BODY)):
        plain = body in (PLAIN, BODY)
        upstream.script(Call.hang if plain else stream(HOLA, Call.hang))
        upstream.called.clear()
        async with connection(client) as (reader, writer):
            writer.write(2 * post(json.dumps(body), "X-Request-ID: piped", path=path))
            await (soon(upstream.called) if plain else Wire(reader, writer).write())
            reset(writer)
        await soon(upstream.calls[-1].left)
    upstream.script(answer)
    get = FIRST_LINES.replace(b"/status", b"/openapi.json") + b"\r\n"
    asks = (post("{}"), post(json.dumps(PLAIN)), post(json.dumps(STREAMED), path=CHAT))
    for data in (get, *asks) * 8:
        async with connection(client) as (_, writer):
            writer.write(data)
            reset(writer)
    await idle(client)
    piped = [each for each in await closings(client, 4) if "piped" in str(each)]
    assert [each["message"] for each in piped] == ["ask cancelled"] * 4
    assert await load(client, "/logs?level=ERROR") == []


@processes
async def test_the_own_server_bounds_heads_serves_http_1_0_takes_resets_and_keeps_what_is_idle(
    upstream, tmp_path
):
    async with launched(cwd=tmp_path, **before(upstream)) as running:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(idles(running.client))
            tasks.create_task(refuses(running.client, ENDLESS))
            assert b" 200 " in await says_all(running.client, LONG_HEAD)
            await serves_http_1_0(running.client, upstream)
            await takes_resets(running.client, upstream)
        running.process.send_signal(signal.SIGTERM)
        await running.ended()


@processes
async def test_a_head_or_trailers_over_the_bound_are_refused_also_where_they_come_at_once(tmp_path):
    async with launched(cwd=tmp_path) as running:
        await refuses(running.client, AT_ONCE)


# What an attack on this edition found.


@overlapping
async def test_an_end_that_was_waited_for_does_not_end_the_next_try(start):
    error = event({"error": {"code": 503, "message": "Busy."}})
    first = stream(chunk(finish_reason="stop") + error)
    client = await start(first, stream(*[pause] * 8, HOLA, FINISH, DONE, Call.end))
    assert whole("events", await got(client, "events")) == "Hola"


async def test_the_last_event_of_a_response_without_event_lines_is_looked_at(start):
    def data(kind: str, **fields: object) -> bytes:
        return event({"type": f"response.{kind}", **fields})

    begun = data("created", sequence_number=0, response={"status": "in_progress"})
    words_ = [data("output_text.delta", sequence_number=n, delta="x") for n in (1, 2)]
    last = data("completed", sequence_number=3, response={"usage": SPENT})
    go = asyncio.Event()
    client = await start(stream(begun, waits(go), b"".join([*words_, last]), Call.hang))
    async with asking(client, FLOWING, path=RESPONSES) as wire:
        assert await wire.write() == begun
        go.set()
        assert b"".join(await wire.rest()) == b"".join([*words_, last])
    assert (await closings(client))[0]["metadata"]["tokens_used"] == 7


@overlapping
async def test_of_several_choices_in_one_chunk_each_has_to_end(start):
    def both(*choices: dict[str, Any]) -> bytes:
        return event({"choices": list(choices)})

    said = [{"index": n, "delta": {"content": "a"}, "finish_reason": None} for n in (0, 1)]
    ends = [both({"index": n, "delta": {}, "finish_reason": "stop"}) for n in (0, 1)]
    cut = stream(both(*said), pause, both(*said) + ends[0], Call.end)
    client = await start(cut, stream(both(*said), pause, both(*said) + ends[0], ends[1], Call.end))
    broken_off = await client.post(CHAT, json={**STREAMED, "n": 2})
    assert b"upstream_error" in broken_off.content
    assert DONE not in broken_off.content
    assert (await client.post(CHAT, json={**STREAMED, "n": 2})).content.endswith(DONE)


@pytest.mark.parametrize("size", [65_535, 65_536, 131_072])
async def test_a_compressed_body_of_any_size_is_whole(shared, size):
    text = "x" * (size - len(json.dumps(completion(""))))
    client = await shared(replies(200, zipped(completion(text)), content_encoding="gzip"))
    assert (await client.post("/ask", json=PLAIN)).json()["response"] == text


@processes
async def test_many_large_bodies_at_once_cost_little_more_than_one(tmp_path):
    body = f'{{"messages":[{{}}],{KEYS}}}'
    async with launched(cwd=tmp_path) as running:
        at_first = running.peak()
        asked = [running.client.post(CHAT, content=body, headers=JSON) for _ in range(20)]
        assert {each.status_code for each in await asyncio.gather(*asked)} == {200}
        assert running.peak() - at_first < 150


@cases(
    "script, body, read_first",
    {
        "before its body is read": (Call.hang, chat(**{f"x{n}": n for n in range(50_000)}), b""),
        "before a head": (Call.hang, STREAMED, None),
        "in a stream": (stream(HOLA, Call.hang), STREAMED, b"Hola"),
    },
)
async def test_nothing_is_kept_of_an_ask_whose_client_has_left(
    start, upstream, script, body, read_first
):
    client = await start(script)
    gc.collect()
    gc.disable()  # which would free it in the end
    try:
        async with asyncio.timeout(30):
            while len(await closings(client, 0)) < 3:
                upstream.called.clear()
                async with asking(client, body, path=CHAT) as wire:
                    if read_first:
                        await wire.reader.readuntil(read_first)
                    await (wire.writer.drain() if read_first == b"" else upstream.called.wait())
            # It is over a moment before it is gone.
            while any(isinstance(each, service.Exchange) for each in gc.get_objects()):
                await load(client)
    finally:
        gc.enable()


async def test_a_record_whose_arguments_do_not_fit_harms_no_library(start, capsys):
    await start()
    logging.getLogger("some.library").warning("%d things", "many")
    assert "%d things" in capsys.readouterr().err


async def test_a_stray_end_mark_before_the_last_event_of_a_response_is_left_out(shared):
    client = await shared(stream(BEGUN, DONE, COMPLETED, Call.end))
    assert (await client.post(RESPONSES, json=FLOWING)).content == BEGUN + COMPLETED


FEW_FILES = """
import resource, runpy, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@processes
async def test_as_many_asks_as_may_come_get_their_files(tmp_path):
    few = launched("-c", FEW_FILES, SERVICE, cwd=tmp_path, MAX_CONCURRENT_ASKS="500")
    async with few as running:
        await load(running.client, "/status")
        assert resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE)[0] >= 1000


@processes
async def test_bytes_that_are_no_http_are_never_answered_in_the_middle_of_an_answer(tmp_path):
    async with (
        launched(cwd=tmp_path) as running,
        asking(running.client, {"prompt": "/long"}) as wire,
        asyncio.timeout(60),
    ):
        assert events(await wire.write())
        wire.writer.write(b"\x16\x03\x01\r\n\r\n")
        assert b"HTTP/1.1" not in await wire.reader.read()


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"required": ["a"]}}}


async def test_a_small_bound_of_bytes_leaves_room_for_lists_and_objects(shared):
    client = await shared(max_body_bytes=2000)
    asked = chat(tools=[TOOL] * 20, stop=[["a"]] * 20)
    assert (await client.post(CHAT, json=asked)).status_code == 200
