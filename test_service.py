"""The promises of the service, over real sockets: a real uvicorn, a real AsyncOpenAI, and behind
them an upstream whose bytes the test writes one by one."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from openai import DefaultAsyncHttpxClient
from starlette.types import ASGIApp

import service
from service import Settings

KEY = "sk-test-0123456789"
Start = Callable[..., Awaitable[DefaultAsyncHttpxClient]]


@dataclass
class Call:
    """One request that the upstream got, and the connection to answer it on."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self, status: int = 200, **headers: str) -> None:
        """The head of a chunked answer, an event stream unless *headers* say otherwise."""
        fields = {"content-type": "text/event-stream", "transfer-encoding": "chunked"}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        await self.raw(f"HTTP/1.1 {status} Scripted\r\n{lines}\r\n".encode())

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
        await self.raw(b"0\r\n\r\n")

    async def reply(self, status: int, body: object, **headers: str) -> None:
        """A whole answer, JSON unless *body* is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"content-type": "application/json", "content-length": str(len(data))}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        await self.raw(f"HTTP/1.1 {status} Scripted\r\n{lines}\r\n".encode() + data)

    def abort(self) -> None:
        self.writer.transport.abort()

    async def hang(self) -> None:
        """Say nothing more until the service closes the connection, then set `left`."""
        with suppress(ConnectionError):
            await self.reader.read(1)
        self.left.set()


Script = Callable[[Call], Awaitable[None]]


def chunk(text: str | None = None, **more: Any) -> bytes:
    """One upstream event; *more* goes beside `choices`, `finish_reason` into the choice."""
    reason = more.pop("finish_reason", None)
    delta = {} if text is None else {"content": text}
    choices = [{"index": 0, "delta": delta, "finish_reason": reason}]
    return f"data: {json.dumps({'model': 'gpt-real', 'choices': choices, **more})}\n\n".encode()


def completion(text: str, total_tokens: int = 7) -> dict[str, Any]:
    """A plain answer of the upstream."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"model": "gpt-real", "choices": [choice], "usage": {"total_tokens": total_tokens}}


def refused(message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error body as OpenAI writes it."""
    return {"error": {"message": message, "code": code, "param": param, "type": "x"}}


FINISH = chunk(finish_reason="stop") + b'data: {"choices":[],"usage":{"total_tokens":7}}\n\n'
DONE = b"data: [DONE]\n\n"


async def answer(call: Call) -> None:
    """What the upstream does when a test says nothing else: it answers "Hola"."""
    if call.path == "/v1/models":
        await call.reply(200, {"data": []})
    elif call.body["stream"]:
        await call.start()
        await call.say("Ho", "la")
        await call.write(FINISH + DONE)
        await call.end()
    else:
        await call.reply(200, completion("Hola"))


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


@asynccontextmanager
async def serve(app: ASGIApp) -> AsyncIterator[str]:
    """Run *app* under a real server on a free loopback port; yields its base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    async with asyncio.timeout(10):
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event
            await asyncio.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await running


@pytest.fixture
async def start(upstream: FakeUpstream) -> AsyncIterator[Start]:
    """Start a service before the fake upstream, with other settings where a test wants them."""
    async with AsyncExitStack() as owned:

        async def start(**settings: Any) -> DefaultAsyncHttpxClient:
            known = {"openai_api_key": KEY, "openai_base_url": upstream.url}
            app = service.create_app(Settings(**{**known, **settings}))
            url = await owned.enter_async_context(serve(app))
            client = DefaultAsyncHttpxClient(base_url=url, timeout=20)
            return await owned.enter_async_context(client)

        yield start


@pytest.fixture
async def client(start: Start) -> DefaultAsyncHttpxClient:
    return await start()


def events(stream: bytes | str) -> list[Any]:
    """The data of each event of *stream*; `[DONE]` as it stands, all else as JSON."""
    text = stream if isinstance(stream, str) else stream.decode()
    assert text.endswith("\n\n"), "an event is closed by an empty line"
    lines = [line for line in text.split("\n\n") if line and line != ": ping"]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


async def closings(client: DefaultAsyncHttpxClient, count: int = 1) -> list[Any]:
    """The closing events in the log, oldest first, as soon as there are *count* of them."""
    async with asyncio.timeout(5):
        while True:
            logged = (await client.get("/logs?limit=1000")).json()
            closed = [event for event in logged if event["message"].startswith("ask ")]
            if len(closed) >= count:
                return closed


async def test_a_stream_ends_with_done_and_the_end_mark(client):
    response = await client.post("/ask", json={"prompt": "Hola"})
    done = {"type": "done", "finish_reason": "stop", "tokens_used": 7, "model": "gpt-real"}
    pieces = [{"type": "delta", "content": "Ho"}, {"type": "delta", "content": "la"}]
    assert events(response.content) == [*pieces, done, "[DONE]"]


async def test_a_plain_answer_is_one_json_object(client):
    response = await client.post("/ask", json={"prompt": "Hola", "stream": False})
    assert response.json() == {
        "response": "Hola",
        "tokens_used": 7,
        "finish_reason": "stop",
        "model": "gpt-real",
    }


async def test_a_client_that_leaves_before_the_upstream_answers_closes_the_upstream(
    client, upstream
):
    upstream.scripts = [Call.hang]
    asking = asyncio.create_task(client.post("/ask", json={"prompt": "Hola"}))
    await upstream.called.wait()
    asking.cancel()
    async with asyncio.timeout(5):
        await upstream.calls[0].left.wait()
    (closing,) = await closings(client)
    assert (closing["level"], closing["message"]) == ("WARNING", "ask cancelled")
