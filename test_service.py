"""The promises of the service, over real sockets.

Every test speaks to a real uvicorn over a real socket; behind it stands a real AsyncOpenAI, and
behind that an upstream whose bytes the test writes one by one. What is pure has a table at the end.
"""

import asyncio
import gzip
import http.client
import json
import logging
import math
import os
import re
import resource
import signal
import socket
import struct
import sys
import time
import tomllib
import zlib
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from dataclasses import FrozenInstanceError, dataclass, field, fields
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import ANY

import httpx2
import pytest
import pytest_asyncio
import structlog
import uvicorn
from dotenv import dotenv_values
from openai import DefaultAsyncHttpxClient
from pydantic import TypeAdapter
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import service
from service import ConfigError, Failure, Settings

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
    return f"data: {json.dumps({'model': 'gpt-real', 'choices': choices, **more})}\n\n".encode()


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


async def test_the_upstream_gets_no_header_that_it_has_no_use_for(start, upstream, monkeypatch):
    for name in ("ORG_ID", "PROJECT_ID", "CUSTOM_HEADERS"):
        monkeypatch.delenv(f"OPENAI_{name}", raising=False)
    client = await start()
    await client.post("/ask", json=ASK)
    await client.post("/ask", json=PLAIN)
    await client.get("/status")
    useful = {"host", "authorization", "accept", "accept-encoding", "user-agent"}
    body = {"content-type", "content-length"}
    sent = [{*call.headers} for call in upstream.calls]
    assert sent == [useful | body, useful | body, useful]
    assert {call.headers["accept-encoding"] for call in upstream.calls} == {"identity"}


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
        "event in lines": (ASK, endless(b"", b"data: x\n" * 2**17)),
        "gzip, plain answer": (PLAIN, endless(*bomb(), coding="gzip")),
        "gzip, error": (PLAIN, endless(*bomb(), 400, "gzip")),
        "gzip, event": (ASK, endless(*bomb(), coding="gzip")),
    }
    env = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": upstream.url, "API_PORT": "0"}
    async with launched(SERVICE, cwd=tmp_path, OPENAI_MAX_RETRIES="0", **env) as running:
        before = running.peak()
        for name, (ask, script) in tried.items():
            upstream.scripts = [script]
            problem(await running.client.post("/ask", json=ask), "upstream_error")
            assert running.peak() - before < 150, name


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


@in_module
async def test_the_checks_come_in_the_order_of_the_contract(shared):
    body = b"x" * 1_048_577
    headers = {"Host": "evil.example", "Origin": "http://evil.example", "Authorization": ""}
    steps: list[tuple[str, dict[str, str], bytes]] = [
        ("host_not_allowed", {"Host": "localhost"}, body),
        ("origin_not_allowed", {"Origin": PAGE}, body),
        ("unauthorized", {"Authorization": f"Bearer {TOKEN}"}, body),
        ("unsupported_media_type", JSON, body),
        ("body_too_large", {}, b"x"),
        ("invalid_json", {}, b"{}"),
        ("invalid_request", {}, json.dumps(ASK).encode()),
        ("not_configured", {}, b""),
    ]
    for code, better, next_body in steps:
        problem(await shared.post("/ask", content=body, headers=headers), code)
        body, headers = next_body, headers | better


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


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
async def test_under_uvicorns_command_it_is_refused_and_no_body_is_a_request(tmp_path, late):
    request = b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = post("", *H2C).replace(b"Length: 0", b"Length: %d" % len(request))
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
            {"reasoning_chars": 1, "answer_chars": 1},
        ),
        "reasoning": ([with_delta(reasoning="r")], [("reasoning", "r")], {"answer_chars": 0}),
        "reasoning as a list": ([with_delta(reasoning=[1])], [], {"reasoning_chars": 0}),
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
        "parts": with_delta(content=[{"type": "text", "text": "a"}]),
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


@pytest.mark.parametrize("spaced", [False, True], ids=["", "spaced"])
@cases("odd", TEXT_CHUNKS)
def test_a_block_that_is_skimmed_says_what_its_chunks_say(odd, spaced):
    usual, short, *_ = TEXT_CHUNKS.values()
    mixed: Any = (
        (usual, [usual, odd]),
        (short, [short, odd]),
        (odd, [usual]),
        (odd, [short]),
        (odd, []),
    )
    for first, chunks in (*mixed, (odd, [odd] * 3)):
        block = b"".join(event_of(each, spaced) for each in chunks)
        skimmed, folded = service.Completion("m", "delta"), service.Completion("m", "delta")
        for each in (skimmed, folded):
            each.add(first)
            each.learn_opening(event_of(first, spaced))
        pieces = skimmed.skim(block)
        if pieces is not None and "error" not in first:
            parsed = [service.parse_chunk(json.dumps(each).encode()) for each in chunks]
            assert pieces == [piece for each in parsed for piece in folded.add(each)]
            assert vars(skimmed) == vars(folded)
    for part in ("delta", "message"):
        assert service.Completion("m", part).skim(event_of(usual, spaced)) is None, "none has begun"


def test_most_blocks_are_skimmed():
    folded = service.Completion("m", "delta")
    folded.add(with_delta(content="first"))
    folded.learn_opening(HOLA)
    pieces = folded.skim(b"".join(chunk(text) for text in "Holas"))
    assert pieces == [("delta", text) for text in "Holas"]


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
    assert (encoder.headers["Content-Type"], encoder.heartbeat) == (kind, heartbeat)
    assert read(encoder.chunk(EVENT, {"x": 1}, PIECES), chunk_read) == chunk_read
    assert read(encoder.end(folded), last) == last
    assert read(encoder.error(FAILED, "id"), failed) == failed


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
    assert stall.timeout.expired()
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
    assert not stall.timeout.expired()
