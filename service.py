"""A small back end between browser apps and any OpenAI-compatible API.

    POST /ask                  -> middleware -> endpoint -> Exchange -> the model's API
    POST /v1/chat/completions     400, 403      401, 408,   429, 502, 503, 504; from the
                                                413, 415,   first byte on, an error in the
                                                422         stream
    GET /, /status, /logs, /metrics, /v1/models, /openapi.json, /docs, /redoc

Run it with `python service.py` or `uvicorn service:app`; .env.example lists every setting.
"""

import signal

if __name__ == "__main__":
    # The imports below take most of a second; Ctrl-C then ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import asyncio
import base64
import bisect
import codecs
import email.utils
import errno
import gc
import hashlib
import hmac
import itertools
import json
import logging
import math
import os
import random
import re
import secrets
import socket
import sqlite3
import string
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field, fields
from functools import cache, cached_property, lru_cache, partial
from http import HTTPStatus
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from types import TracebackType
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    NotRequired,
    Protocol,
    TypeVar,
    cast,
    get_args,
    get_type_hints,
)
from urllib.parse import urlsplit

import httpx2
import structlog
import uvicorn
from dotenv import dotenv_values
from openai import AsyncOpenAI, AsyncStream, DefaultAioHttpClient
from pydantic import (
    MISSING,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, get_contextvars
from structlog.types import EventDict, FilteringBoundLogger, WrappedLogger
from typing_extensions import TypedDict
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

VERSION = "1.0.0"
JSON, PROBLEM, SSE = "application/json", "application/problem+json", "text/event-stream"
# The lookbehinds stand after the first letters: before them they would take three times as long.
KEY_SHAPED = (
    r"sk-(?<![A-Za-z0-9]sk-)[\w*.-]+"
    r"|[Bb](?<!\w[Bb])(?i:earer)\s+[^\s\"',]+"
    r"|eyJ(?<!\weyJ)[\w-]+\.[\w-]+\.[\w-]*"
)
MAX_UPSTREAM_BYTES = 32 * 2**20

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
LEVELS: tuple[Level, ...] = get_args(Level)
JsonObject = dict[str, JsonValue]
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

log: FilteringBoundLogger = structlog.get_logger()
to_ascii_json = json.JSONEncoder().encode
to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def utf8_json(text: str) -> bytes:
    r"""UTF-8 of JSON; `\u` escapes for what UTF-8 lacks and for what readers take for line ends.

    The former are half surrogate pairs, the latter U+0085, U+2028 and U+2029.
    """
    if not text.isascii():
        text = re.sub("[\x85\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)
    return text.encode("utf-8", "backslashreplace")


@lru_cache
def parse_ip(host: str) -> IPv4Address | IPv6Address | None:
    """The address that *host* is, IPv4 also where it comes mapped into IPv6."""
    with suppress(ValueError):
        address = ip_address(host)
        return (address.version == 6 and address.ipv4_mapped) or address
    return None


def is_loopback(host: str) -> bool:
    address = parse_ip(host)
    return host == "localhost" or (address is not None and address.is_loopback)


class ConfigError(Exception):
    """Settings that cannot be used, a line for each."""


def matching(accepted: str, pattern: str, convert: Callable[[str], T]) -> Callable[[str], T]:
    """A parser of what matches *pattern* and converts; its ValueError says what is *accepted*."""

    def parse(text: str) -> T:
        with suppress(ValueError):
            if re.fullmatch(pattern, text, re.ASCII):
                return convert(text)
        raise ValueError(accepted)

    return parse


def integer_between(low: int, high: int) -> Callable[[str], int]:
    def within(text: str) -> int:
        if not low <= int(text) <= high:
            raise ValueError
        return int(text)

    return matching(f"a whole number from {low} to {high}", "[0-9]{1,15}", within)


def seconds_from(low: float) -> Callable[[str], float]:
    def within(text: str) -> float:
        if float(text) < low:
            raise ValueError
        return float(text)

    accepted = f"a number of seconds from {low:g} to 999999"
    return matching(accepted, r"[0-9]{1,6}(\.[0-9]{1,6})?", within)


def comma_separated(accepted: str, pattern: str) -> Callable[[str], tuple[str, ...]]:
    """A parser of items that each match *pattern*; empty ones do not count."""

    def parse(text: str) -> tuple[str, ...]:
        items = tuple(item.strip() for item in text.split(",") if item.strip())
        if not all(re.fullmatch(pattern, item, re.ASCII) for item in items):
            raise ValueError(accepted)
        return items

    return parse


def lower_case(parse: Callable[[str], T]) -> Callable[[str], T]:
    return lambda text: parse(text.lower())


def http_url(text: str) -> str:
    """A base URL, without the slash at its end."""
    pattern = r"https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:\d{1,5})?(/[^\s?#]*)?"
    with suppress(ValueError, httpx2.InvalidURL):
        parts = urlsplit(text)
        like_an_address = re.fullmatch("[0-9.]+", parts.hostname or "")
        plausible = re.fullmatch(pattern, text) and text.isprintable() and parts.port != 0
        if plausible and not (like_an_address and not parse_ip(like_an_address[0])):
            httpx2.URL(text)  # refuses what cannot be asked: too long, no name in the DNS' alphabet
            return text.rstrip("/")
    raise ValueError("an http:// or https:// URL")


def model_name(text: str) -> str:
    if not text.isprintable() or len(text) > 256:
        raise ValueError("the name of a model")
    return text


def utf8_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise ValueError("text in UTF-8") from exc
    return text


def long_secret(text: str) -> str:
    if len(utf8_text(text).encode()) < 32:
        raise ValueError("at least 32 bytes")
    return text


def extra_body(text: str) -> JsonObject:
    """The JSON object in *text*, without what is the service's own business."""
    own = {"model", "messages", "stream", "stream_options"}
    with suppress(ValueError):
        value = from_json(text, allow_inf_nan=False)
        to_json(value).encode()  # refuses 1e999, which is read as infinity
        if isinstance(value, dict) and own.isdisjoint(value):
            return value
    raise ValueError(f"a JSON object without {', '.join(sorted(own))}")


level_name = matching(
    f"one of {', '.join(LEVELS)}",
    f"(?i:{'|'.join(LEVELS)})",
    lambda text: cast(Level, text.upper()),
)
printable_ascii = matching("made of visible ASCII characters only", "[!-~]+", str)
address = matching("a host name or an IP address", r"[\w.:%-]{1,253}", str)
hosts = lower_case(comma_separated("host names separated by commas, or *", r"[\w.-]{1,253}|\*"))
origins = lower_case(
    comma_separated(
        "origins such as https://app.example.com separated by commas, or *",
        r"[a-z][a-z0-9+.-]*://[^\s,/@?#*]+|\*",
    )
)
models = comma_separated("names of models separated by commas", r"[!-~]{1,256}")


@dataclass(frozen=True)
class Settings:
    """What the environment says; each field is the variable of the same name in capitals.

    Beside the type of each stands its parser, whose ValueError says what it accepts.
    """

    openai_api_key: Annotated[str, printable_ascii] = field(default="", repr=False)
    openai_model: Annotated[str, model_name] = "gpt-5.4-mini"
    openai_models: Annotated[tuple[str, ...], models] = ()
    openai_base_url: Annotated[str, http_url] = field(
        default="https://api.openai.com/v1", repr=False
    )
    openai_timeout: Annotated[float, seconds_from(0.001)] = 120.0
    openai_max_retries: Annotated[int, integer_between(0, 100)] = 2
    openai_extra_body: Annotated[JsonObject | None, extra_body] = field(default=None, repr=False)
    system_prompt: Annotated[str, utf8_text] = field(default="", repr=False)
    max_output_tokens: Annotated[int | None, integer_between(1, 1_000_000_000)] = None
    api_host: Annotated[str, address] = "127.0.0.1"
    api_port: Annotated[int, integer_between(0, 65535)] = 8000
    max_concurrent_asks: Annotated[int, integer_between(1, 1_000_000)] = 1000
    max_body_bytes: Annotated[int, integer_between(1, 1_000_000_000)] = 1_048_576
    heartbeat_seconds: Annotated[float, seconds_from(0.1)] = 15.0
    client_timeout: Annotated[float, seconds_from(0.001)] = 60.0
    cors_origins: Annotated[tuple[str, ...], origins] = (
        "http://localhost:4200",
        "http://localhost:4201",
    )
    allowed_hosts: Annotated[tuple[str, ...], hosts] = ()
    api_token: Annotated[str, printable_ascii] = field(default="", repr=False)
    jwt_secret: Annotated[str, long_secret] = field(default="", repr=False)
    jwt_audience: Annotated[str, utf8_text] = ""
    admin_token: Annotated[str, printable_ascii] = field(default="", repr=False)
    rate_limit: Annotated[int, integer_between(0, 1_000_000)] = 0
    daily_tokens: Annotated[int, integer_between(0, 10**15 - 1)] = 0
    log_level: Annotated[Level, level_name] = "INFO"
    log_buffer_size: Annotated[int, integer_between(1, 100_000)] = 1000
    log_database: Annotated[str, utf8_text] = ""

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Settings":
        """Settings from the variables in *env*; raises ConfigError, a line for every wrong one."""
        values, wrong = {}, []
        annotated = get_type_hints(cls, include_extras=True)
        for each in fields(cls):
            name = each.name.upper()
            text = env.get(name, "").strip()
            if not text and (name != "CORS_ORIGINS" or name not in env):
                continue
            try:
                values[each.name] = annotated[each.name].__metadata__[0](text)
            except ValueError as exc:
                shown = re.sub(KEY_SHAPED, "***", ascii(text[:100])) if each.repr else "its value"
                wrong.append(f"{name}: {shown} is not {exc}")
        if wrong:
            raise ConfigError("\n".join(wrong))
        return cls(**values)

    @property
    def demo(self) -> bool:
        return self.openai_api_key == "demo"

    @property
    def models(self) -> tuple[str, ...]:
        """The models that a request may name, each once."""
        return tuple(dict.fromkeys((self.openai_model, *self.openai_models)))

    @cached_property
    def secret(self) -> re.Pattern[str]:
        """What must never be shown. A value so short that it may be any word cannot be hidden."""
        own = (self.openai_api_key, self.api_token, self.admin_token, self.jwt_secret)
        known = (value for value in own if len(value) >= 8)
        return re.compile("|".join([*map(re.escape, known), KEY_SHAPED]))


def environment() -> dict[str, str]:
    """The `.env` of the working directory under the real environment; empty is not set."""
    try:
        file = dotenv_values(".env", encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f".env cannot be read: {exc}") from exc
    variables = itertools.chain(file.items(), os.environ.items())
    return {
        name: value
        for name, value in variables
        if value is not None and (value.strip() or name == "CORS_ORIGINS")
    }


class LogEvent(TypedDict):
    """`metadata` holds all other keys of the event."""

    timestamp: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    level: Level
    message: str
    metadata: JsonObject | None


class EventLog:
    """The newest log events, in memory, as a structlog processor that lets them pass.

    It masks what is *secret* and cuts values to 2,000 characters.
    """

    def __init__(self, capacity: int, secret: re.Pattern[str]) -> None:
        self.capacity = capacity
        self._events: deque[tuple[int, LogEvent]] = deque(maxlen=capacity)
        self._numbers = itertools.count(1)
        self._secret = secret

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        values = {key: self._redacted(value) for key, value in event.items()}
        entry = {
            "timestamp": values.pop("timestamp"),
            "level": method.upper(),
            "message": values.pop("event"),
        }
        event_kept = cast(LogEvent, {**entry, "metadata": values or None})
        self._events.append((next(self._numbers), event_kept))
        return {**entry, **values}

    def _redacted(self, value: object) -> JsonValue:
        if isinstance(value, int | None) or (isinstance(value, float) and math.isfinite(value)):
            return value
        if isinstance(value, list | tuple):
            return [self._redacted(item) for item in value[:100]]
        if isinstance(value, dict):
            pairs = itertools.islice(value.items(), 100)
            return {str(self._redacted(str(key))): self._redacted(item) for key, item in pairs}
        text = self._secret.sub("***", value if isinstance(value, str) else repr(value))
        # Head and tail, because a traceback says most in its last line.
        return text if len(text) <= 2000 else f"{text[:997]} [...] {text[-996:]}"

    def since(self, number: int) -> list[tuple[int, LogEvent]]:
        """The events kept that came after the one of this *number*, oldest first."""
        newest_first = reversed(list(self._events))  # a copy: other threads read here too
        return list(itertools.takewhile(lambda each: each[0] > number, newest_first))[::-1]

    async def tail(self, *, level: str | None, limit: int) -> list[LogEvent]:
        """The newest *limit* events, of one level where one is given, oldest first."""
        newest_first = (event for _, event in reversed(list(self._events)))
        wanted = (event for event in newest_first if level in (None, event["level"]))
        return list(itertools.islice(wanted, limit))[::-1]


class LogDatabase:
    """The newest events of all processes that share a SQLite file, in the place of *ring*.

    One thread writes and another reads, so that no lock and no full disk holds up an ask. What
    cannot be written stays in the ring and is tried again; where nothing can be read, the ring
    answers.
    """

    # The last statement fails where the file is read-only, as BEGIN IMMEDIATE does not.
    OPENING = """CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY AUTOINCREMENT,
        run TEXT NOT NULL, number INTEGER NOT NULL, level TEXT NOT NULL, event TEXT NOT NULL,
        UNIQUE (run, number));
        SELECT id, run, number, level, event FROM events WHERE false;
        PRAGMA journal_mode = WAL;
        PRAGMA synchronous = NORMAL;
        DELETE FROM events WHERE false"""
    NEWEST = "SELECT coalesce(max(number), 0) FROM events WHERE run = ?"
    BATCH_SECONDS, RETRY_SECONDS, LOOK_SECONDS, READ_SECONDS = 0.05, 0.5, 5, 2

    def __init__(self, path: str, ring: EventLog) -> None:
        """Opens the file at *path*; raises ConfigError where that is not to be had."""
        self._path, self._ring = path, ring
        self._run = secrets.token_hex(8)
        self._connection: sqlite3.Connection | None = None
        # Which file is open, and the number of the newest event that is in it.
        self._inode, self._written = 0, 0
        self._waiting, self._closing = threading.Event(), threading.Event()
        self._storing = threading.Lock()
        self._reader = ThreadPoolExecutor(1)
        try:
            self._connection = self._open()
        except (sqlite3.Error, OSError, ValueError) as exc:
            if not self._is_lock(exc):
                raise ConfigError(f"LOG_DATABASE: {path!a} cannot be used: {exc}") from exc
        threading.Thread(target=self._write, daemon=True).start()

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        self._waiting.set()
        if self._closing.is_set():
            self._flush()
        return event

    async def tail(self, *, level: str | None, limit: int) -> list[LogEvent]:
        """As the ring's, of all processes; those of this one that wait to be written come last."""
        loop = asyncio.get_running_loop()
        with suppress(sqlite3.Error, OSError, ValueError, TimeoutError):
            async with asyncio.timeout(self.READ_SECONDS):
                return await loop.run_in_executor(self._reader, self._read, level, limit)
        return await self._ring.tail(level=level, limit=limit)

    def close(self) -> None:
        """From here on each event is written at once: SIGTERM ends the process at any moment."""
        self._closing.set()
        self._waiting.set()
        self._flush()

    def _write(self) -> None:
        # After a pause, so that many events make one transaction.
        while not self._closing.wait(self.BATCH_SECONDS):
            self._waiting.clear()
            if self._flush():
                self._waiting.wait(self.LOOK_SECONDS)
            else:
                self._closing.wait(self.RETRY_SECONDS)

    def _flush(self) -> bool:
        """Whether all that waited is in the file now."""
        with self._storing:
            try:
                self._store()
            except (sqlite3.Error, OSError) as exc:
                if not self._is_lock(exc):
                    self._disconnect()
                return False
            if self._closing.is_set():
                self._disconnect()  # the last one leaves no -wal behind
            return True

    def _store(self) -> None:
        if self._connection is None or self._inode != os.stat(self._path).st_ino:
            # First the old one: it deletes the -wal, by its name, when it is closed.
            self._disconnect()
            self._connection = self._open()
        if not (waiting := self._ring.since(self._written)):
            return
        rows = [
            (self._run, number, each["level"], utf8_json(to_json(each)).decode())
            for number, each in waiting
        ]
        with self._connection as transaction:
            transaction.executemany(
                "INSERT OR IGNORE INTO events (run, number, level, event) VALUES (?, ?, ?, ?)",
                rows,
            )
            transaction.execute(
                "DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?",
                (self._ring.capacity,),
            )
        self._written = waiting[-1][0]

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=0.2, check_same_thread=False)
        try:
            connection.executescript(self.OPENING)
            (self._written,) = connection.execute(self.NEWEST, (self._run,)).fetchone()
            self._inode = os.stat(self._path).st_ino
        except (sqlite3.Error, OSError):
            connection.close()
            raise
        return connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @staticmethod
    def _is_lock(exc: Exception) -> bool:
        locks = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_PROTOCOL}
        return getattr(exc, "sqlite_errorcode", 0) & 0xFF in locks

    def _read(self, level: str | None, limit: int) -> list[LogEvent]:
        if self._inode != os.stat(self._path).st_ino:
            raise FileNotFoundError(self._path)
        written = self._written
        # A connection of its own each time: the writer's may be waiting for a lock.
        uri = f"{Path(self._path).absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=0.2)) as connection:
            connection.execute("BEGIN")  # both from one moment
            (newest,) = connection.execute(self.NEWEST, (self._run,)).fetchone()
            rows = connection.execute(
                "SELECT event FROM events WHERE ? IN (level, '') ORDER BY id DESC LIMIT ?",
                (level or "", limit),
            ).fetchall()
        events: list[LogEvent] = [json.loads(event) for (event,) in reversed(rows)]
        waiting = (event for _, event in self._ring.since(max(written, newest)))
        events += (each for each in waiting if level in (None, each["level"]))
        return events[-min(limit, self._ring.capacity) :]


class StdoutLogger:
    """Standard output, as structlog wants it; when that is gone, the ring still has the event."""

    def msg(self, line: str) -> None:
        if sys.stdout is not None:  # as under `>&-`
            with suppress(OSError, ValueError):
                # In one write, unlike print: processes may share the output.
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()

    debug = info = warning = error = critical = msg


class ConnectionCut(Exception):
    """Ends a response that was begun and cannot be completed: uvicorn closes its connection."""


class StructlogHandler(logging.Handler):
    """Puts through structlog what others log."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message, level = record.getMessage(), min(50, record.levelno // 10 * 10)
        except Exception:
            self.handleError(record)  # the standard handlers' way with arguments that do not fit
            return
        cut = record.exc_info and isinstance(record.exc_info[1], ConnectionCut)
        # A second Ctrl-C cuts what is under way, and uvicorn logs a traceback for each piece of it.
        if cut or (
            record.name == "uvicorn.error" and "CancelledError" in f"{record.exc_info}{message}"
        ):
            return
        log.log(level, message.strip(), exc_info=record.exc_info)


def escape_controls(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Escapes for control characters, which a terminal would obey, and for half surrogate pairs."""
    for key, value in event.items():
        text = repr(value) if isinstance(value, list | dict) else value
        if isinstance(text, str):
            # A traceback keeps its lines.
            unsafe = r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]" + (
                "" if key == "exception" else r"|\n"
            )
            event[key] = re.sub(unsafe, lambda found: ascii(found[0])[1:-1], text)
    return event


def render_json(logger: WrappedLogger, method: str, event: EventDict) -> str:
    return to_ascii_json(event)  # a fifth of the cost of structlog's JSONRenderer


def configure_logging(level: str, *sinks: Callable[[Any, str, EventDict], EventDict]) -> None:
    """Send what anyone in this process logs through *sinks* to standard output."""
    styles = structlog.dev.ConsoleRenderer.get_default_level_styles()
    console = structlog.dev.ConsoleRenderer(
        event_key="message",
        level_styles={name.upper(): style for name, style in styles.items()},
        exception_formatter=structlog.dev.plain_traceback,
    )
    terminal = sys.stdout is not None and sys.stdout.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.TimeStamper("%Y-%m-%dT%H:%M:%S.%fZ"),
            structlog.processors.format_exc_info,
            *sinks,
            *([escape_controls, console] if terminal else [render_json]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=StdoutLogger,
    )
    logging.basicConfig(handlers=[StructlogHandler()], level=level, force=True)
    for name in ("openai", "httpx2", "httpcore2", "aiohttp"):
        # Below WARNING they log whole requests, prompts included.
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.root.level))
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        server = logging.getLogger(name)
        server.handlers.clear()
        server.setLevel(level)
        # Without any handler uvicorn skips its access log; `ask finished` says more.
        server.propagate = name != "uvicorn.access"


Code = Literal[
    "invalid_json",
    "host_not_allowed",
    "upgrade_not_supported",
    "upstream_rejected",
    "unauthorized",
    "origin_not_allowed",
    "not_found",
    "model_not_found",
    "method_not_allowed",
    "request_timeout",
    "body_too_large",
    "unsupported_media_type",
    "invalid_request",
    "rate_limited",
    "too_many_asks",
    "budget_exhausted",
    "internal_error",
    "upstream_auth",
    "upstream_unreachable",
    "upstream_error",
    "not_configured",
    "overloaded",
    "upstream_timeout",
]
ERRORS: dict[Code, tuple[int, str]] = {
    "invalid_json": (400, "The body must be one JSON object in UTF-8."),
    "host_not_allowed": (400, "This Host is not served here; ALLOWED_HOSTS can name further ones."),
    "upgrade_not_supported": (
        400,
        "Only HTTP/1.1 is spoken here: send no Upgrade header (Java: "
        "HttpClient.newBuilder().version(HTTP_1_1); curl: --http1.1).",
    ),
    "upstream_rejected": (400, "The model's API refused this request."),
    "unauthorized": (401, "A valid token is needed: `Authorization: Bearer <token>`."),
    "origin_not_allowed": (403, "This origin may not call; CORS_ORIGINS names those that may."),
    "not_found": (404, "There is nothing at this path."),
    "model_not_found": (
        404,
        "This model may not be named here; GET /v1/models lists those that may.",
    ),
    "method_not_allowed": (405, "This path does not take this method; see the Allow header."),
    "request_timeout": (408, "The body did not arrive within CLIENT_TIMEOUT."),
    "body_too_large": (413, "The body is larger than MAX_BODY_BYTES."),
    "unsupported_media_type": (415, "The body must be sent as application/json."),
    "invalid_request": (422, "The request has wrong fields; `errors` names each."),
    "rate_limited": (429, "The model's API has had too many requests; try again later."),
    "too_many_asks": (429, "You have used up your RATE_LIMIT; Retry-After says when to ask again."),
    "budget_exhausted": (429, "The DAILY_TOKENS of all callers are used up until midnight UTC."),
    "internal_error": (500, "The service failed; its log says why, under this request_id."),
    "upstream_auth": (502, "The model's API did not accept the service's key."),
    "upstream_unreachable": (502, "The model's API cannot be reached."),
    "upstream_error": (502, "The model's API failed or broke off its answer."),
    "not_configured": (503, "The service has no OPENAI_API_KEY."),
    "overloaded": (503, "MAX_CONCURRENT_ASKS asks are under way; try again shortly."),
    "upstream_timeout": (504, "The model's API was silent for longer than OPENAI_TIMEOUT."),
}
# Codes that the document lists by themselves: an ask never gets them, or only with a token or
# under /v1, or every operation does.
NOT_LISTED_FOR_ASKS = {
    "not_found",
    "method_not_allowed",
    "unauthorized",
    "host_not_allowed",
    "internal_error",
    "model_not_found",
}
# The names of RFC 9110; Python before 3.13 has older ones.
TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}


class FieldError(TypedDict):
    """A wrong field of the request; nested ones as `history.0.role`."""

    field: str
    detail: str


class Problem(TypedDict):
    """Why a request failed (RFC 9457)."""

    title: str
    status: int
    detail: str
    code: Code
    request_id: str
    errors: NotRequired[Annotated[list[FieldError], Field(max_length=100)]]


class ErrorEvent(TypedDict):
    """The end of an answer that broke off."""

    type: Literal["error"]
    error: str
    code: Code
    status: int
    request_id: str
    retry_after: NotRequired[Annotated[int, Field(ge=0, le=86400)]]


class OpenAIErrorDetail(TypedDict):
    message: str
    type: Literal[
        "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
    ]
    param: str | None
    code: Code


class OpenAIError(TypedDict):
    """Why a request under `/v1` failed, in the shape that OpenAI's libraries read."""

    error: OpenAIErrorDetail


class Failure(HTTPException):
    """One of ERRORS: a status before the first byte of an answer, an event after it."""

    def __init__(
        self,
        code: Code,
        detail: str = "",
        *,
        headers: Mapping[str, str] | None = None,
        retry_after: int | None = None,
        errors: Collection[FieldError] = (),
    ) -> None:
        status, sentence = ERRORS[code]
        waiting = {} if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, detail or sentence, {**(headers or {}), **waiting})
        self.code: Code = code
        self.retry_after = retry_after
        self.errors = list(errors)
        # It ended an ask that was accepted, which is counted there.
        self.counted = False

    def problem(self, request_id: str) -> Problem:
        status = self.status_code
        problem = Problem(
            title=TITLES.get(status) or HTTPStatus(status).phrase,
            status=status,
            detail=self.detail,
            code=self.code,
            request_id=request_id,
        )
        if self.errors:
            problem["errors"] = self.errors
        return problem

    def error_event(self, request_id: str) -> ErrorEvent:
        event = ErrorEvent(
            type="error",
            error=self.detail,
            code=self.code,
            status=self.status_code,
            request_id=request_id,
        )
        if self.status_code == 429 and self.retry_after is not None:
            event["retry_after"] = self.retry_after
        return event

    def openai_error(self) -> OpenAIError:
        status = self.status_code
        kind: Any = {401: "authentication_error", 429: "rate_limit_error"}.get(status)
        kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
        message, param = self.detail, None
        if self.errors:
            param = self.errors[0]["field"]
            if self.code == "invalid_request":
                message = "; ".join(f"{each['field']}: {each['detail']}" for each in self.errors)
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}


def json_response(
    value: object,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    media_type: str = JSON,
) -> Response:
    return Response(utf8_json(to_json(value)), status, headers, media_type)


ASK_PATHS = frozenset({"/ask", "/v1/chat/completions"})


def route_path(scope: Scope) -> str:
    """The path of the request, without the prefix that `--root-path` names."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


async def error_response(request: Request[Any], exc: Exception) -> Response:
    """The answer to what failed before it began; what is no Failure is the router's, or a defect.

    Problem JSON, but under `/v1` what OpenAI's libraries read.
    """
    if isinstance(exc, Failure):
        failure = exc
    elif isinstance(exc, HTTPException):
        code: Code = "method_not_allowed" if exc.status_code == 405 else "not_found"
        failure = Failure(code, headers=exc.headers)
    else:
        failure = Failure("internal_error")
    path = route_path(request.scope)
    answered = not isinstance(exc, ClientDisconnect | ConnectionCut)
    if path in ASK_PATHS and answered and not failure.counted:
        request.scope["state"]["metrics"].count_refused(failure.code)
    if path == "/v1" or path.startswith("/v1/"):
        return json_response(failure.openai_error(), failure.status_code, failure.headers)
    problem = failure.problem(get_contextvars()["request_id"])
    return json_response(problem, failure.status_code, failure.headers, PROBLEM)


class RequestIDMiddleware:
    """Gives each request its id: on the response, in errors, and in every event logged for it.

    It is the outermost, so it also keeps the server's own `send`, for ClientStream.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", request_id) or re.search(
            KEY_SHAPED, request_id
        ):
            request_id = secrets.token_hex(16)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = (b"x-request-id", request_id.encode())
                message["headers"] = [*message["headers"], own]
            await send(message)

        # Never unbound: the context ends with uvicorn's task, which first logs what is raised here.
        bind_contextvars(request_id=request_id)
        # Middleware changes heads alone, and each would make a chunk that passes it 2 % dearer.
        scope["server_send"] = send
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            del scope["server_send"]  # which has the scope, in a circle


class OriginWarning:
    """Logs an origin that was refused, at most one a second: a flood would fill the log."""

    def __init__(self) -> None:
        self.last = -math.inf

    def __call__(self, origin: str) -> None:
        if time.monotonic() >= self.last + 1:
            self.last = time.monotonic()
            log.warning("origin not allowed", origin=origin, remedy="add it to CORS_ORIGINS")


class LoggingCORSMiddleware(CORSMiddleware):
    """CORS that logs the origins it refuses, of which a browser tells its developer nothing."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...], warn: OriginWarning) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-ID"],
        )
        self.warn = warn

    def preflight_response(self, request_headers: Headers) -> Response:
        if not self.is_allowed_origin(request_headers["origin"]):
            self.warn(request_headers["origin"])
        return super().preflight_response(request_headers)


class HostOriginMiddleware:
    """Refuses names that DNS rebinding would carry, and what pages of other origins post."""

    def __init__(self, app: ASGIApp, settings: Settings, warn: OriginWarning) -> None:
        self.app = app
        self.hosts = frozenset(settings.allowed_hosts)
        self.origins = frozenset(settings.cors_origins)
        self.warn = warn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        failure = self.refusal(scope) if scope["type"] == "http" else None
        app = await error_response(Request(scope), failure) if failure else self.app
        await app(scope, receive, send)

    def refusal(self, scope: Scope) -> Failure | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        if has_body and "upgrade" in headers:
            # uvicorn's parser has lost the body, and would take a late one for the next request.
            return Failure("upgrade_not_supported", headers={"Connection": "close"})
        if not self.allows_host(host, scope["server"]):
            return Failure("host_not_allowed")
        if scope["method"] == "POST" and origin and not self.allows_origin(origin, host):
            self.warn(origin)
            return Failure("origin_not_allowed")
        return None

    def allows_host(self, host: str, server: tuple[str, int | None] | None) -> bool:
        local = server is not None and is_loopback(server[0])
        if "*" in self.hosts or not (self.hosts or local):
            return True
        # A name has 253 characters at most (RFC 1035); urlsplit would keep longer ones in a cache.
        if len(host) > 260:
            return False
        with suppress(ValueError):
            name = urlsplit(f"//{host}").hostname or ""
            return name == "localhost" or name in self.hosts or parse_ip(name) is not None
        return False

    def allows_origin(self, origin: str, host: str) -> bool:
        # A page of the service itself: no scheme, since a proxy may have taken the TLS off.
        own = bool(host) and origin.partition("://")[2] == host
        return own or not self.origins.isdisjoint({origin, "*"})


def integral(value: object) -> object:
    """1.0 as 1: to JSON Schema it is an integer (section 6.1.1)."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def whole_number(low: int, high: int | None = None) -> Any:
    # The bounds first: behind a validator they would be lost to the schema.
    return Annotated[int, Field(ge=low, le=high), BeforeValidator(integral)]


class Turn(BaseModel):
    """One earlier turn of the conversation."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class Ask(BaseModel):
    """What is left out is not sent to the model, whose own default then holds."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str = Field(pattern=r"\S", description="What the user says now; not blank.")
    history: list[Turn] = Field([], max_length=1000, description="Earlier turns, oldest first.")
    model: str | MISSING = Field(MISSING, description="Left out: OPENAI_MODEL.")
    temperature: Annotated[float, Field(ge=0, le=2)] | MISSING = MISSING
    max_tokens: Annotated[int, Field(ge=1), BeforeValidator(integral)] | MISSING = Field(
        MISSING, description="Upper bound on what the model may write."
    )
    stream: bool = Field(True, description="A stream, or the whole answer at once.")


class ChatCompletionRequest(BaseModel):
    """OpenAI's own request; further fields (tools, images, ...) go upstream as they come."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | MISSING = Field(MISSING, description="Left out: OPENAI_MODEL.")
    messages: Annotated[list[dict[str, Any]], Field(min_length=1), FailFast()]
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None


class LogsQuery(BaseModel):
    model_config = ConfigDict(strict=True)

    limit: int = Field(100, ge=1, le=1000, description="At most so many events, the newest.")
    level: Level | MISSING = Field(
        MISSING, description="Only events of exactly this level, in any case."
    )


def ask_model(settings: Settings) -> type[Ask]:
    """Ask within the bounds that the operator has set."""
    literal: Any = Literal
    narrowed: dict[str, Any] = {
        "model": (literal[settings.models] | MISSING, Ask.model_fields["model"])
    }
    if settings.system_prompt:
        roles: Any = Literal["user", "assistant"]
        turn: Any = create_model("Turn", __base__=Turn, role=(roles, ...))
        narrowed["history"] = (cast(Any, list)[turn], Ask.model_fields["history"])
    if limit := settings.max_output_tokens:
        bounded = whole_number(1, limit)
        narrowed["max_tokens"] = (bounded | MISSING, Ask.model_fields["max_tokens"])
    return create_model("Ask", __base__=Ask, **narrowed)


class CallersMessage(TypedDict):
    """A message of the kinds that a caller may send where the operator has a SYSTEM_PROMPT."""

    __pydantic_config__ = ConfigDict(strict=True, extra="allow")  # type: ignore[misc]

    role: Literal["user", "assistant", "tool", "function"]


def chat_model(settings: Settings) -> type[ChatCompletionRequest]:
    """ChatCompletionRequest within the bounds that the operator has set."""
    narrowed: dict[str, Any] = {}
    if settings.system_prompt:
        messages = Annotated[list[CallersMessage], Field(min_length=1), FailFast()]
        narrowed["messages"] = (messages, ...)
    if limit := settings.max_output_tokens:
        bounded = whole_number(1, limit)
        narrowed["max_tokens"] = narrowed["max_completion_tokens"] = (bounded | None, None)
        # llama.cpp's own name, which wins over the other two there.
        narrowed["n_predict"] = (bounded | MISSING, MISSING)
        narrowed["n"] = (whole_number(1, 1) | None, None)
    return create_model("ChatCompletionRequest", __base__=ChatCompletionRequest, **narrowed)


def prune(value: JsonValue, known: Collection[str]) -> JsonValue:
    """*value* with 100 entries a level at most, the *known* ones kept."""
    if isinstance(value, list):
        return [prune(item, known) for item in value[:100]]
    if isinstance(value, dict):
        kept = sorted(value, key=lambda name: name not in known)[:100]
        return {name: prune(value[name], known) for name in kept}
    return value


def validate(model: type[M], values: JsonObject) -> M:
    """*values* as a *model*; raises a Failure that names every wrong field, the first 100."""
    try:
        return model.model_validate(values)
    except ValidationError as exc:
        if exc.error_count() > 11_000:
            # So many are listed in 0.1 s; all that 1 MiB can hold would take seconds and 900 MiB.
            known = model.model_fields.keys() | Turn.model_fields.keys()
            return validate(model, cast(JsonObject, prune(values, known)))
        errors: list[FieldError] = []
        for error in exc.errors(include_url=False, include_input=False)[:100]:
            # The one pattern there is means this, and its own message would quote it.
            blank = error["type"] == "string_pattern_mismatch"
            detail = "Input should not be blank" if blank else error["msg"]
            errors.append({"field": ".".join(map(str, error["loc"])), "detail": detail})
        raise Failure("invalid_request", errors=errors) from exc


class StallTimeout:
    """An asyncio.timeout for waiting: TimeoutError where one wait takes over *limit* seconds.

    Whoever waits sets `waiting_since` before and None after. To re-arm asyncio.timeout for each
    read and write would cost 5 % of a chunk, so a timer looks only when the limit may be over.
    """

    __slots__ = (
        "cancelling",
        "clock",
        "expired",
        "limit",
        "loop",
        "task",
        "timer",
        "waiting_since",
    )

    def __init__(self, limit: float, waiting_since: float | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.clock = self.loop.time
        self.limit = limit
        self.waiting_since = waiting_since
        self.expired = False

    async def __aenter__(self) -> "StallTimeout":
        self.task = cast("asyncio.Task[object]", asyncio.current_task(self.loop))
        self.cancelling = self.task.cancelling()
        self.arm(self.clock())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.timer.cancel()
        # As asyncio.timeout has it: a cancellation that is not only ours goes on as it came.
        only_ours = self.expired and self.task.uncancel() <= self.cancelling
        if only_ours and exc_type is asyncio.CancelledError:
            raise TimeoutError from exc

    def arm(self, now: float) -> None:
        since = now if self.waiting_since is None else self.waiting_since
        self.timer = self.loop.call_at(since + self.limit, self.look)

    def look(self) -> None:
        now = self.clock()
        if self.waiting_since is not None and self.waiting_since + self.limit <= now:
            self.expire()
        else:
            self.arm(now)

    def expire(self) -> None:
        """End the wait, as at its limit, where it has not ended."""
        if not (self.expired or self.timer.cancelled()):
            self.expired = True
            self.task.cancel()


async def discard_body(receive: Receive) -> None:
    """Read on for a moment: many clients look for the answer only once they have sent it all."""
    with suppress(TimeoutError):
        async with asyncio.timeout(1):
            more = True
            while more:
                async with asyncio.timeout(0.1):
                    more = (await receive()).get("more_body", False)


async def read_json(request: Request[Any], settings: Settings) -> JsonObject:
    """The JSON object in the body; raises 400, 408, 413 or 415."""
    media_type = request.headers.get("content-type", "").partition(";")[0]
    if media_type.strip().lower() != JSON:
        raise Failure("unsupported_media_type")
    too_large = int(request.headers.get("content-length", 0)) > settings.max_body_bytes
    body = bytearray()
    try:
        async with StallTimeout(settings.client_timeout, asyncio.get_running_loop().time()):
            more = not too_large
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body += message.get("body", b"")
                too_large = len(body) > settings.max_body_bytes
                more = message.get("more_body", False) and not too_large
    except TimeoutError as exc:
        raise Failure("request_timeout", headers={"Connection": "close"}) from exc
    if too_large:
        if "expect" not in request.headers:  # a client that asked first has sent nothing yet
            await discard_body(request.receive)
        raise Failure("body_too_large")
    try:
        value = from_json(bytes(body), allow_inf_nan=False)
    except ValueError as exc:
        raise Failure("invalid_json", f"The body is not JSON in UTF-8: {exc}") from exc
    if not isinstance(value, dict):
        raise Failure("invalid_json")
    return value


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: *user* is the `sub` of a JSON Web Token, *key* what RATE_LIMIT counts by."""

    key: str
    user: str | None = None


def bearer_token(request: Request[Any]) -> str:
    """The token of the Authorization header, empty where there is none."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def equal(given: str, secret: str) -> bool:
    """Whether both are the same, in a time that does not tell how much of them is."""
    return secrets.compare_digest(given.encode(), secret.encode())


def verify_jwt(token: str, secret: str, audience: str, now: float) -> str:
    """The `sub` of a valid token (RFC 7519), at *now* in Unix seconds; else ValueError says why.

    Only HS256 (RFC 7515), whatever the header may ask for; 30 s of leeway for the clocks.
    """
    if len(token) > 8192 or not re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+", token, re.ASCII):
        raise ValueError("not three parts of base64url, 8,192 characters at most")
    signed, _, signature = token.rpartition(".")
    header, claims = (
        from_json(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)), allow_inf_nan=False)
        for part in signed.split(".")
    )
    if not isinstance(header, dict) or header.get("alg") != "HS256" or "crit" in header:
        raise ValueError("its header does not ask for plain HS256")
    digest = hmac.digest(secret.encode(), signed.encode(), "sha256")
    # Compared as text: the last character has bits to spare, and only one form is right.
    if not equal(signature, base64.urlsafe_b64encode(digest).decode().rstrip("=")):
        raise ValueError("its signature is wrong")
    if not isinstance(claims, dict):
        raise ValueError("its claims are no object")

    def is_number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    expires: Any = claims.get("exp")
    begins: Any = claims.get("nbf", now)
    if not is_number(expires) or not now < expires + 30 < math.inf:
        raise ValueError("it has expired, or has no exp")
    if not is_number(begins) or not begins - 30 <= now:
        raise ValueError("its nbf is ahead")
    accepted = claims.get("aud")
    if audience and audience not in (accepted if isinstance(accepted, list) else [accepted]):
        raise ValueError("its aud is not JWT_AUDIENCE")
    subject = claims.get("sub")
    if not isinstance(subject, str) or not 1 <= len(subject) <= 256:
        raise ValueError("its sub is not a string of 1 to 256 characters")
    return subject


@lru_cache
def address_key(host: str) -> str:
    """What RATE_LIMIT counts by for a client's address; of IPv6 a subscriber has a whole /64."""
    ip = parse_ip(host)
    return str(ip_network((ip, 64), strict=False) if isinstance(ip, IPv6Address) else ip or host)


def identify(request: Request["AppState"]) -> Caller:
    """The caller of an ask; raises 401 where a token is wanted and there is no valid one."""
    settings, token = request.state["settings"], bearer_token(request)
    anyone = Caller(address_key(request.client.host[:64] if request.client else ""))
    if not settings.api_token and not settings.jwt_secret:
        return anyone
    if settings.api_token and equal(token, settings.api_token):
        return anyone
    if settings.jwt_secret:
        try:
            user = verify_jwt(token, settings.jwt_secret, settings.jwt_audience, time.time())
            return Caller(f"user {user}", user)
        except ValueError as exc:
            if token:  # a flood of asks without one would fill the log
                log.info("token refused", reason=str(exc))
    raise Failure("unauthorized", headers={"WWW-Authenticate": "Bearer"})


def require_operator(request: Request["AppState"]) -> None:
    """Raises 401 unless the request may read the log: pages must not, with the token they carry."""
    settings = request.state["settings"]
    wanted = settings.admin_token or settings.api_token
    open_to_all = not wanted and not settings.jwt_secret
    if not open_to_all and not (wanted and equal(bearer_token(request), wanted)):
        raise Failure("unauthorized", headers={"WWW-Authenticate": "Bearer"})


class RateLimiter:
    """RATE_LIMIT: a minute's worth of asks at once, and then evenly (GCRA, ITU-T I.371).

    One number is kept for each of the 10,000 latest callers: the time at which it has its whole
    minute's worth again.
    """

    def __init__(self, per_minute: int) -> None:
        self.interval = 60 / per_minute if per_minute else 0.0
        self.whole_at: OrderedDict[str, float] = OrderedDict()

    def wait(self, caller: str, now: float) -> int:
        """Seconds, rounded up, until the next ask may come; 0 where it may now."""
        used = self.whole_at.get(caller, now) - now
        return max(0, math.ceil(round(used + self.interval - 60, 6)))

    def take(self, caller: str, now: float) -> None:
        if self.interval:
            self.whole_at[caller] = max(self.whole_at.pop(caller, now), now) + self.interval
            if len(self.whole_at) > 10_000:
                self.whole_at.popitem(last=False)


class DailyBudget:
    """DAILY_TOKENS of all callers together, by the day in UTC; times are Unix seconds."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.day, self.used = 0, 0

    def wait(self, now: float) -> int:
        """Seconds until midnight where the budget is exhausted, else 0."""
        spent = self.limit and self.day == now // 86400 and self.used >= self.limit
        return math.ceil(86400 - now % 86400) if spent else 0

    def spend(self, tokens: int, now: float) -> None:
        day = int(now // 86400)
        if day != self.day:
            self.day, self.used = day, 0
        before, self.used = self.used, self.used + tokens
        if before < self.limit <= self.used:
            log.warning("budget exhausted", daily_tokens=self.limit, used=self.used)


class AskCounts(TypedDict):
    """The asks accepted since the start."""

    active: int
    total: int
    failed: int
    cancelled: int


Outcome = Literal["finished", "cancelled", "failed"]


class Admission:
    """What an ask must pass last: a caller's rate, the budget of all, and a free place."""

    def __init__(self, settings: Settings) -> None:
        self.places = settings.max_concurrent_asks
        self.limiter = RateLimiter(settings.rate_limit)
        self.budget = DailyBudget(settings.daily_tokens)
        self.asks = AskCounts(active=0, total=0, failed=0, cancelled=0)

    def admit(self, caller: Caller) -> None:
        """Takes a place and one of the caller's asks, or raises a Failure and takes neither."""
        now = time.monotonic()
        if wait := self.limiter.wait(caller.key, now):
            raise Failure("too_many_asks", retry_after=wait)
        if wait := self.budget.wait(time.time()):
            raise Failure("budget_exhausted", retry_after=wait)
        if self.asks["active"] >= self.places:
            raise Failure("overloaded", retry_after=1)
        self.limiter.take(caller.key, now)
        self.asks["active"] += 1
        self.asks["total"] += 1

    def leave(self, outcome: Outcome, tokens: int) -> None:
        self.asks["active"] -= 1
        self.asks["failed"] += outcome == "failed"
        self.asks["cancelled"] += outcome == "cancelled"
        self.budget.spend(tokens, time.time())


class Histogram:
    """How many values were at most as large as each of *bounds*, as Prometheus counts them."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        for bound, count in zip(
            (*self.bounds, math.inf), itertools.accumulate(self.counts), strict=True
        ):
            edge = "+Inf" if bound == math.inf else f"{bound:.15g}"
            yield f'{name}_bucket{{{labels},le="{edge}"}} {count}'
        yield f"{name}_sum{{{labels}}} {self.sum:.15g}"
        yield f"{name}_count{{{labels}}} {sum(self.counts)}"


class Metrics:
    """What GET /metrics shows, under the names of OpenTelemetry's generative AI conventions."""

    SECONDS = tuple(0.01 * 2**power for power in range(15))
    TOKENS = tuple(float(4**power) for power in range(14))
    COMMON = 'gen_ai_operation_name="chat",gen_ai_provider_name="openai"'
    HISTOGRAMS: Mapping[str, tuple[str, tuple[float, ...]]] = {
        "gen_ai_client_operation_duration_seconds": ("Duration of an ask.", SECONDS),
        "gen_ai_client_operation_time_to_first_chunk_seconds": (
            "Time to the first piece of a streamed answer.",
            SECONDS,
        ),
        "gen_ai_client_token_usage": ("Tokens of an ask.", TOKENS),
    }

    def __init__(self) -> None:
        self.started = time.time()
        self.histograms: dict[str, dict[tuple[str, str, str], Histogram]]
        self.histograms = {name: {} for name in self.HISTOGRAMS}
        self.refused: dict[Code, int] = {}
        self.tokens_used = 0

    def observe(
        self, name: str, value: float, model: str, label: str = "", given: str = ""
    ) -> None:
        """Count *value* for *model*, and under *label* as it is *given*."""
        key = (model, label, given)
        if key not in self.histograms[name]:
            self.histograms[name][key] = Histogram(self.HISTOGRAMS[name][1])
        self.histograms[name][key].observe(value)

    def count_refused(self, code: Code) -> None:
        self.refused[code] = self.refused.get(code, 0) + 1

    def exposition(self, asks: AskCounts) -> Iterator[str]:
        """The lines of Prometheus' text format 0.0.4."""

        def family(name: str, kind: str, meaning: str) -> Iterator[str]:
            yield from (f"# HELP {name} {meaning}", f"# TYPE {name} {kind}")

        for name, (meaning, _) in self.HISTOGRAMS.items():
            yield from family(name, "histogram", meaning)
            for (model, label, given), histogram in self.histograms[name].items():
                labels = f"{self.COMMON},gen_ai_request_model={to_json(model)}"
                labels += f',{label}="{given}"' if label else ""
                yield from histogram.lines(name, labels)
        finished = asks["total"] - asks["active"] - asks["failed"] - asks["cancelled"]
        yield from family("openai_backend_asks_total", "counter", "Asks that ended.")
        yield f'openai_backend_asks_total{{outcome="finished"}} {finished}'
        yield f'openai_backend_asks_total{{outcome="cancelled"}} {asks["cancelled"]}'
        yield f'openai_backend_asks_total{{outcome="failed"}} {asks["failed"]}'
        yield from family("openai_backend_asks_active", "gauge", "Asks under way.")
        yield f"openai_backend_asks_active {asks['active']}"
        yield from family("openai_backend_refused_total", "counter", "Asks not accepted.")
        for code, count in self.refused.items():
            yield f'openai_backend_refused_total{{code="{code}"}} {count}'
        yield from family("process_start_time_seconds", "gauge", "Start, in Unix seconds.")
        yield f"process_start_time_seconds {self.started:.3f}"


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """An ask, in whatever format it came, as it goes to the model."""

    caller: Caller
    model: str
    messages: list[JsonObject]
    stream: bool
    # Under the name that the host and the model take; None is no bound.
    token_limit: JsonValue
    # All other fields, `temperature` among them.
    parameters: JsonObject
    prompt_chars: int


def texts_of(messages: Iterable[JsonObject]) -> Iterator[str]:
    """All text in chat *messages*, that of their parts included."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else [{"text": content}]:
            text = part.get("text") if isinstance(part, dict) else None
            if isinstance(text, str):
                yield text


# A chunk of the upstream, as it was parsed; only Completion trusts what is in it.
Chunk = dict[str, Any]
# A piece of the answer: what it is, and its text.
Piece = tuple[Literal["reasoning", "delta"], str]
# An event of the upstream: its bytes, end included, and the data in it.
Event = tuple[bytes, bytes]


class SSEDecoder:
    """Whole Server-Sent Events out of bytes that are split anywhere (WHATWG HTML, section 9.2)."""

    # A CR that ends a read may be half of a CRLF, so it waits for what comes next.
    LINE_END = rb"(?:\n|\r\n|\r(?=[^\n]))"
    EVENT_END = re.compile(LINE_END + LINE_END)
    # In whole events there is nothing to wait for.
    EVENT_ENDED = re.compile(rb"(?:\n|\r\n|\r(?!\n)){2}")

    def __init__(self) -> None:
        self.rest = bytearray()
        self.has_cr = False

    def feed(self, read: bytes) -> bytes:
        """The events that *read* completes; raises a Failure for one that is too large."""
        self.has_cr = self.has_cr or b"\r" in read
        if not self.rest and read.endswith(b"\n\n"):
            return read  # whole events, as they usually come
        searched = max(0, len(self.rest) - 3)
        self.rest += read
        end = 0
        if self.has_cr:
            for found in self.EVENT_END.finditer(self.rest, searched):
                end = found.end()
        else:
            end = self.rest.rfind(b"\n\n", searched) + 2
        if end < 2:
            if len(self.rest) > MAX_UPSTREAM_BYTES:
                raise Failure("upstream_error")
            return b""
        block = bytes(memoryview(self.rest)[:end])
        del self.rest[:end]
        return block

    def close(self) -> bytes:
        """An event that was left open at the end counts too."""
        return self.feed(b"\n\n")

    def events(self, block: bytes) -> Iterator[Event]:
        """Each event in *block*, and its `data:` lines, joined."""
        start = 0
        if not self.has_cr:
            for event in block[:-2].split(b"\n\n"):
                yield event + b"\n\n", self.data(event)
            return
        for end in self.EVENT_ENDED.finditer(block):
            yield block[start : end.end()], self.data(block[start : end.start()])
            start = end.end()

    def data(self, event: bytes) -> bytes:
        if event.startswith(b"data: ") and not self.has_cr and b"\n" not in event:
            return event[6:].strip()
        lines = re.split(rb"\r\n|\n|\r", event.removeprefix(b"\xef\xbb\xbf"))
        return b"\n".join(line[5:].strip() for line in lines if line.startswith(b"data:"))


class BodyDecoder:
    """A plain answer as one event; its proper end is the end mark."""

    def __init__(self) -> None:
        self.body = bytearray()

    def feed(self, read: bytes) -> bytes:
        self.body += read
        if len(self.body) > MAX_UPSTREAM_BYTES:
            raise Failure("upstream_error")
        return b""

    def close(self) -> bytes:
        return bytes(self.body)

    def events(self, block: bytes) -> Iterator[Event]:
        yield block, block + b" "  # never the end mark itself, nor nothing: it has to be JSON
        yield b"", b"[DONE]"


def parse_chunk(data: bytes) -> Chunk:
    """The JSON object in *data*; raises a Failure for all else, the upstream's error included."""
    try:
        chunk = from_json(data)
    except ValueError:
        try:
            # Slower, but it bears half surrogate pairs, and bytes that are no UTF-8 are replaced.
            chunk = json.loads(data.decode("utf-8-sig", "replace"))
        except (ValueError, RecursionError) as exc:
            raise Failure("upstream_error") from exc
    if not isinstance(chunk, dict) or chunk.get("error"):
        raise Failure("upstream_error")
    return chunk


Count = Annotated[int, Field(ge=0, le=10**12)]


class Usage(TypedDict, total=False):
    """The tokens that the upstream counted, each where it told it."""

    prompt_tokens: Count
    completion_tokens: Count
    reasoning_tokens: Count


def as_count(value: object) -> int | None:
    """*value* where it is a figure that can be one: from 0 to 10^12."""
    return value if type(value) is int and 0 <= value <= 10**12 else None


# A chunk whose one choice goes on with text alone: its choices up to that text, and what follows.
TEXT_OPENING = re.compile(
    rb'"choices":\[\{(?:"[a-z_]+":(?:null|0),)*+"delta":\{(?:"role":"assistant",)?"content":"'
)
TEXT_REST = re.compile(
    rb'([^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+)"(?:,"[a-z_]+":null)*+\}'
    rb'(?:,"[a-z_]+":(?:null|0))*+\}\]'
    rb'(?:,(?!"(?:error|model)")"[a-z_]+":(?:null|\d++|"[^"\\\x00-\x1f]*+"))*+\}\n\n'
)


@dataclass(slots=True)
class Completion:
    """What the upstream has said so far: a fold of its chunks, or of its one plain answer."""

    model: str
    part: Literal["delta", "message"]
    finish_reason: str | None = None
    tokens_used: int | None = None
    usage: Usage = field(default_factory=Usage)
    answer_chars: int = 0
    # Of reasoning and of the arguments of tool calls.
    other_chars: int = 0
    # [DONE] was read.
    done: bool = False
    # The choices begun, by index, and whether each has its finish_reason.
    choices: dict[int, bool] = field(default_factory=dict)
    has_message: bool = False
    # How the event of a chunk that brings text begins, up to that text.
    opening: bytes = b""
    # The model refuses `temperature`, so it was left out.
    ignored: bool = False

    @property
    def complete(self) -> bool:
        """Whether the answer may end here; Ollama ends with [DONE] alone."""
        return self.done or (bool(self.choices) and all(self.choices.values()))

    @property
    def has_answer(self) -> bool:
        """A plain answer has to have a message; a stream may end without a piece."""
        return self.has_message or self.part == "delta"

    def skim(self, block: bytes) -> tuple[int, list[Piece]]:
        """How much of *block*, from its start, is chunks that bring text alone, and their pieces.

        Nearly all chunks are such, and this costs a third of what parsing them does.
        """
        pieces: list[Piece] = []
        known = self.opening and block.startswith(self.opening)
        if self.part != "delta" or not (known or self.learn(block)):
            return 0, pieces
        opening, end = self.opening, 0
        while block.startswith(opening, end) and (
            found := TEXT_REST.match(block, end + len(opening))
        ):
            try:
                text: str = from_json(b'"%s"' % found[1])
            except ValueError:
                break
            if text:
                self.answer_chars += len(text)
                pieces.append(("delta", text))
            end = found.end()
        if end:
            self.choices.setdefault(0, False)
        return end, pieces

    def learn(self, block: bytes) -> bool:
        """Whether *block* begins with text as the API promises; then what is before it is added."""
        found = TEXT_OPENING.match(block, block.find(b'"choices":'))
        opening = block[: found.end()] if found else b""
        if not opening.startswith(b"data: ") or opening.splitlines() != [opening]:
            return False
        try:
            self.add(parse_chunk(opening[6:] + b'"}}]}') | {"choices": []})
        except Failure:
            return False
        self.opening = opening
        return True

    def add(self, chunk: Chunk) -> list[Piece]:
        """The pieces that *chunk* adds; raises a Failure where it is not as the API promises."""
        pieces: list[Piece] = []
        try:
            if usage := chunk.get("usage") or (chunk.get("x_groq") or {}).get("usage"):
                self.count(usage)
            if isinstance(model := chunk.get("model"), str) and model:
                self.model = model
            for choice in chunk.get("choices") or ():
                index, reason = choice.get("index", 0), choice.get("finish_reason")
                if isinstance(reason, str) and reason:
                    self.finish_reason = reason
                    self.choices[index] = True
                elif index not in self.choices:
                    self.choices[index] = False
                if part := choice.get(self.part):
                    self.has_message = True
                    self.add_part(part, pieces)
        except (TypeError, AttributeError) as exc:
            raise Failure("upstream_error") from exc
        return pieces

    def add_part(self, part: Mapping[str, Any], pieces: list[Piece]) -> None:
        """Add to *pieces* what a choice's delta or message says."""
        thoughts = (part.get("reasoning_content"), part.get("reasoning"))
        if reasoning := next((each for each in thoughts if each and isinstance(each, str)), ""):
            self.other_chars += len(reasoning)
            pieces.append(("reasoning", reasoning))
        text = part.get("content") or part.get("refusal")
        if isinstance(text, list):
            text = "".join(texts_of([{"content": text}]))
        if text:
            pieces.append(("delta", text + ""))
            self.answer_chars += len(text)
        for call in part.get("tool_calls") or ():
            arguments = (call.get("function") or {}).get("arguments")
            self.other_chars += len(arguments) if isinstance(arguments, str) else 0

    def count(self, usage: Mapping[str, Any]) -> None:
        """Take over the figures in *usage* that can be figures."""
        if (total := as_count(usage.get("total_tokens"))) is not None:
            self.tokens_used = total
        details = usage.get("completion_tokens_details")
        counts = {
            "prompt_tokens": usage.get("prompt_tokens"),
            "completion_tokens": usage.get("completion_tokens"),
            "reasoning_tokens": isinstance(details, dict) and details.get("reasoning_tokens"),
        }
        known = {name: value for name, value in counts.items() if as_count(value) is not None}
        self.usage = cast(Usage, {**self.usage, **known})


class Refusal(Exception):
    """An answer of the upstream that is no 200: its status and what its error says."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status
        self.retry_after = parse_retry_after(headers.get("retry-after", ""))
        error = parse_error(body)
        self.code, self.param = error.get("code"), error.get("param")
        message = error.get("message")
        # Some wrap a proxy's page of HTML in JSON.
        html = not isinstance(message, str) or message.lstrip().startswith("<")
        self.message = "" if html else str(message)


def parse_error(body: bytes) -> dict[str, Any]:
    """The error object in the *body* of a refusal, in whose shape servers differ."""
    try:
        error: Any = from_json(body)
    except ValueError:
        return {}
    if isinstance(error, list) and error:
        error = error[0]
    while isinstance(error, dict):
        inner = error.get("error") or error.get("message") or error.get("detail")
        if not isinstance(inner, dict):
            return {**error, "message": inner}
        error = inner
    return {"message": error}


def parse_retry_after(value: str) -> int | None:
    """Whole seconds of a Retry-After header, or to its date (RFC 9110, 10.2.3); a day at most."""
    with suppress(ValueError, OverflowError):
        try:
            delay = float(value)
        except ValueError:
            delay = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        return math.ceil(min(max(0, delay), 86400)) if math.isfinite(delay) else None
    return None


def from_refusal(refusal: Refusal, secret: re.Pattern[str]) -> Failure:
    """The upstream's status as ours; its message only where it is about the client's request."""
    message = secret.sub("***", refusal.message)[:2000]
    match refusal.status:
        case 400 | 404 | 413 | 422:
            return Failure("upstream_rejected", message)
        case 401 | 403:
            return Failure("upstream_auth")
        case 429:
            return Failure("rate_limited", message, retry_after=refusal.retry_after)
        case 503 | 529:
            return Failure("upstream_error", retry_after=refusal.retry_after)
        case _:
            return Failure("upstream_error")


def root_cause(error: BaseException) -> BaseException:
    return root_cause(error.__cause__) if error.__cause__ else error


def from_connection_error(error: Exception) -> Failure:
    """The failure of a request without an answer: there was no connection, or it was closed."""
    root = root_cause(error)
    closed = not isinstance(root, OSError) or root.errno in {errno.ECONNRESET, errno.EPIPE}
    return Failure("upstream_error" if closed else "upstream_unreachable")


def log_cause(failure: Failure) -> str | None:
    """What stands behind *failure*, for the log: a status or a class; texts may quote a prompt."""
    root = root_cause(failure)
    if isinstance(root, Refusal):
        return str(root)
    return None if root is failure else type(root).__name__


def backoff(failure: Failure, tries: int) -> float | None:
    """Seconds to wait before another try, after so many *tries*; None where none would help."""
    refusal = failure.__cause__
    if isinstance(refusal, Refusal):
        if refusal.status < 500 and refusal.status not in {408, 409, 429}:
            return None
        if refusal.retry_after is not None:
            return refusal.retry_after if refusal.retry_after <= 2 else None
    return random.uniform(0.75, 1) * min(8.0, math.ldexp(0.25, tries))


OTHER_NAME = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
PARAMETER = r"(max_tokens|max_completion_tokens|temperature)\b"
UNSUPPORTED = re.compile(
    r"(?:unsupported|unknown|unrecognized)\s(?:request\s)?(?:parameter|param|argument|field|value)"
    rf"(?:s|\(s\))?(?:\ssupplied)?\W+{PARAMETER}"
    rf"|\b{PARAMETER}\W?\s(?:parameter\s)?"
    r"(?:is\s(?:(?:not\s|un)supported|deprecated)|does\snot\ssupport)"
    rf"|(?:\snot|n't)\ssupport\s(?:the\s)?(?:parameters?)?\W*{PARAMETER}"
    r"(?!\W?\s(?:values?|above|over|below)\b)",
    re.IGNORECASE,
)


def unsupported_parameter(refusal: Refusal, texts: Iterable[str]) -> str | None:
    """The parameter that a 400 calls unsupported, by its code or its message: proxies change codes.

    Others have these words too: "'max_tokens' and 'max_completion_tokens' at the same time is not
    supported"; "this model supports at most 4096". Words that stand in the *texts* of the ask may
    be a quotation.
    """
    if refusal.status != 400:
        return None
    codes = {"unsupported_parameter", "unsupported_value", "unknown_parameter"}
    if refusal.code in codes and isinstance(refusal.param, str):
        return refusal.param if re.fullmatch(PARAMETER, refusal.param) else None
    found = list(UNSUPPORTED.finditer(refusal.message[:10_000]))
    words = " ".join(re.findall(r"\w+", " ".join(texts).lower())) if found else ""
    for match in found:
        if " ".join(re.findall(r"\w+", match[0].lower())) not in words:
            return str(next(filter(None, match.groups())))
    return None


async def raise_refusal(response: httpx2.Response) -> None:
    """A hook of the HTTP client: what is no 200 is read here, no more of it than may be."""
    if response.status_code == 200:
        return
    body = bytearray()
    try:
        with suppress(httpx2.DecodingError):
            async for read in response.aiter_bytes():
                body += read
                if len(body) > MAX_UPSTREAM_BYTES:
                    raise Failure("upstream_error")
    except (Failure, httpx2.RequestError):  # too large, or broken off
        # The status is known all the same, and says whether another try may help.
        refusal = Refusal(response.status_code, response.headers, b"")
        raise Failure("upstream_error") from refusal
    raise Refusal(response.status_code, response.headers, bytes(body))


def request_headers(client: AsyncOpenAI) -> httpx2.Headers:
    """The headers of an ask: AsyncOpenAI's, without those that only tell of this machine."""
    headers = httpx2.Headers({"Authorization": f"Bearer {client.api_key}"})
    for name, value in client.default_headers.items():
        if isinstance(value, str) and not name.startswith("X-Stainless"):
            headers[name] = value
    return headers


class Upstream:
    """The model's API, and what this process has learned about it.

    *http_client* carries the asks, *client* the probe, and says which headers both have.
    """

    def __init__(
        self, client: AsyncOpenAI, http_client: httpx2.AsyncClient, settings: Settings
    ) -> None:
        self.client = client
        self.http_client = http_client
        self.settings = settings
        # The URL as it was set: AsyncOpenAI's own is another host where that has no path.
        self.models_url = f"{settings.openai_base_url}/models"
        self.completions_url = httpx2.URL(f"{settings.openai_base_url}/chat/completions")
        self.headers = request_headers(client)
        host = urlsplit(settings.openai_base_url).hostname or ""
        self.is_openai = bool(re.search(r"(^|\.)openai\.com$", host))
        # Everywhere else the older name is the safer one: Ollama silently ignores the newer.
        azure = re.search(r"(^|\.)azure\.com$", host)
        self.token_name = "max_completion_tokens" if self.is_openai or azure else "max_tokens"
        self.token_names: dict[str, str] = {}
        self.without_temperature: set[str] = set()
        self.probing = asyncio.Lock()
        self.probed = -math.inf
        self.reachable = False

    def body(self, request: ChatRequest) -> JsonObject:
        """The chat completion request, in the fields that the model takes."""
        settings = self.settings
        system: JsonObject = {"role": "system", "content": settings.system_prompt}
        messages = [system, *request.messages] if settings.system_prompt else request.messages
        body: JsonObject = {"model": request.model, "messages": cast(JsonValue, messages)}
        body |= {"stream": request.stream, **request.parameters}
        if request.stream:
            asked = body.get("stream_options")
            own: JsonObject = {"include_usage": True}
            body["stream_options"] = {**asked, **own} if isinstance(asked, dict) else own
        if request.token_limit is not None:
            body[self.token_names.get(request.model, self.token_name)] = request.token_limit
        if request.model in self.without_temperature:
            body.pop("temperature", None)
        if self.is_openai and request.caller.user is not None:
            hashed = hashlib.sha256(request.caller.user.encode()).hexdigest()
            body["safety_identifier"] = hashed
        extra = settings.openai_extra_body or {}
        if not extra.keys().isdisjoint(OTHER_NAME):
            body = {name: value for name, value in body.items() if name not in OTHER_NAME}
        return body | extra

    def remember_unsupported(self, model: str, parameter: str) -> None:
        """Leave *parameter* out of the requests to come, or send it by its other name."""
        if parameter == "temperature":
            self.without_temperature.add(model)
        else:
            self.token_names[model] = OTHER_NAME[parameter]
        instead = OTHER_NAME.get(parameter)
        log.warning("model refuses a field", model=model, field=parameter, instead=instead)

    @asynccontextmanager
    async def stream(
        self, request: ChatRequest, may_retry: Callable[[], bool]
    ) -> AsyncIterator[tuple[bool, AsyncIterator[bytes]]]:
        """Whether `temperature` was left out, and the answer's reads; closed with the block.

        All that fails is a Failure; *may_retry* says whether the client is still untouched.
        """
        stall = StallTimeout(self.settings.openai_timeout)
        ended = False
        try:
            async with stall:
                left_out, response = await self._open(request, may_retry, stall)
                try:
                    reads = self._reads(response, stall)
                    yield left_out, reads
                    ended = True
                    # Only a response read to its end leaves a connection that is used again.
                    async with asyncio.timeout(0.2):
                        async for _ in reads:
                            pass
                finally:
                    await response.aclose()
        except (TimeoutError, Failure) as exc:
            if ended:
                return
            if isinstance(exc, TimeoutError) and stall.expired:
                raise Failure("upstream_timeout") from exc
            raise

    async def _open(
        self, request: ChatRequest, may_retry: Callable[[], bool], stall: StallTimeout
    ) -> tuple[bool, httpx2.Response]:
        """Whether `temperature` was left out, and the upstream's 200, after as many tries as it
        takes and the settings allow.
        """
        tries, adapted = 0, set[str]()
        stall.waiting_since = silent_since = stall.clock()
        while True:
            body = self.body(request)
            try:
                left_out = "temperature" in request.parameters.keys() - body.keys()
                return left_out, await self._post(body)
            except Failure as failure:
                name = None
                if isinstance(failure.__cause__, Refusal):
                    stall.waiting_since = silent_since = stall.clock()
                    name = unsupported_parameter(failure.__cause__, texts_of(request.messages))
                extra = self.settings.openai_extra_body or {}
                if name in body.keys() - extra.keys() and OTHER_NAME.get(name) not in adapted:
                    self.remember_unsupported(request.model, name)
                    adapted.add(name)
                    delay: float | None = 0
                else:
                    delay = backoff(failure, tries)
                    tries += 1
                if delay is None or tries > self.settings.openai_max_retries or not may_retry():
                    raise
                if stall.clock() + delay >= silent_since + stall.limit:
                    raise
                await asyncio.sleep(delay)
                if not may_retry():  # a heartbeat went out meanwhile
                    raise

    async def _post(self, body: JsonObject) -> httpx2.Response:
        # Not by AsyncOpenAI's own request, a third of a short ask, nor as `content`, for which
        # httpx2 makes the headers twice, 6 %; aiohttp adds Host and Content-Length by itself.
        stream = httpx2.ByteStream(utf8_json(to_json(body)))
        request = httpx2.Request("POST", self.completions_url, headers=self.headers, stream=stream)
        request.read()  # else aiohttp would send it in chunks
        return await self._answered(self.http_client.send(request, stream=True))

    async def _answered(self, call: Awaitable[object]) -> httpx2.Response:
        """The head of a 200; all else is a Failure."""
        try:
            return cast(httpx2.Response, await call)
        except Failure:
            raise
        except Refusal as refusal:
            raise from_refusal(refusal, self.settings.secret) from refusal
        except Exception as exc:  # where the bytes are no HTTP, aiohttp's own come through
            raise from_connection_error(exc) from exc

    async def _reads(self, response: httpx2.Response, stall: StallTimeout) -> AsyncIterator[bytes]:
        """The bytes of an answer as they come; raises a Failure where it breaks off."""
        # The stream itself, where nothing is to be decoded: aiter_bytes is three more layers.
        encoded = "content-encoding" in response.headers
        reads = response.aiter_bytes() if encoded else cast(AsyncIterator[bytes], response.stream)
        stall.waiting_since = stall.clock()
        try:
            async for read in reads:
                stall.waiting_since = None
                yield read
                stall.waiting_since = stall.clock()
        except Failure:
            raise
        except Exception as exc:  # httpx2's, and aiohttp's own, which it lets through
            raise Failure("upstream_error") from exc
        stall.waiting_since = None

    async def connected(self) -> bool:
        """Whether the upstream answers and accepts the key: asked at most every 30 s, for 5 s."""
        async with self.probing:
            if time.monotonic() > self.probed + 30:
                self.reachable = await self._probe()
                self.probed = time.monotonic()
        return self.reachable

    async def _probe(self) -> bool:
        call = self.client.get(
            self.models_url,
            options={"max_retries": 0},
            cast_to=httpx2.Response,
            stream=True,
            stream_cls=AsyncStream[object],
        )
        try:
            async with asyncio.timeout(5):
                await (await self._answered(call)).aclose()
                return True
        except TimeoutError:
            return False
        except Failure as failure:
            refusal = failure.__cause__
            return isinstance(refusal, Refusal) and refusal.status in {404, 405, 429}


class Ending(TypedDict):
    """What is known of an answer at its end."""

    finish_reason: str | None
    tokens_used: Count | None
    model: str
    usage: NotRequired[Usage]
    ignored: NotRequired[list[Literal["temperature"]]]


class Answer(Ending):
    """The answer, with `stream: false`."""

    response: str
    reasoning: NotRequired[str]


class PieceEvent(TypedDict):
    """The next piece of the answer, or of the reasoning that the model does apart from it."""

    type: Literal["delta", "reasoning"]
    content: Annotated[str, Field(min_length=1)]


class DoneEvent(Ending):
    """A complete end; `[DONE]` follows."""

    type: Literal["done"]


def ending(completion: Completion) -> Ending:
    end = Ending(
        finish_reason=completion.finish_reason,
        tokens_used=completion.tokens_used,
        model=completion.model,
    )
    if completion.usage:
        end["usage"] = completion.usage
    if completion.ignored:
        end["ignored"] = ["temperature"]
    return end


def sse_event(data: object) -> bytes:
    """One Server-Sent Event; JSON escapes line breaks, so one `data:` line always suffices."""
    return utf8_json(f"data: {to_json(data)}\n\n")


END_MARK = b"data: [DONE]\n\n"
# Headers as ASGI has them, made once.
RawHeaders = tuple[tuple[bytes, bytes], ...]
UNBUFFERED: RawHeaders = (
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
)
STREAM_HEADERS = ((b"content-type", f"{SSE}; charset=utf-8".encode()), *UNBUFFERED)
TEXT_HEADERS = ((b"content-type", b"text/plain; charset=utf-8"), *UNBUFFERED)
JSON_HEADERS = ((b"content-type", JSON.encode()),)


class Encoder(Protocol):
    """How an answer looks in one format: the seam for another.

    `chunk` gets an event of the upstream, as it came and as it was parsed, and the pieces in it.
    """

    @property
    def headers(self) -> RawHeaders: ...

    @property
    def heartbeat(self) -> bytes:
        """What fills a long silence; empty where the format has nothing that readers skip."""

    def chunk(self, event: bytes, chunk: Chunk, pieces: Iterable[Piece]) -> bytes: ...

    def end(self, completion: Completion) -> bytes: ...

    def error(self, failure: Failure, request_id: str) -> bytes | None:
        """The end of an answer that broke off; None where only a cut connection can say so."""


class AskEvents:
    """The events of a streamed /ask."""

    headers, heartbeat = STREAM_HEADERS, b": ping\n\n"

    def chunk(self, event: bytes, chunk: Chunk, pieces: Iterable[Piece]) -> bytes:
        # A tenth of the cost of sse_event, and this runs for every token.
        return utf8_json(
            "".join(
                [
                    f'data: {{"type":"{kind}","content":{to_json(text)}}}\n\n'
                    for kind, text in pieces
                ]
            )
        )

    def end(self, completion: Completion) -> bytes:
        return sse_event({"type": "done", **ending(completion)}) + END_MARK

    def error(self, failure: Failure, request_id: str) -> bytes:
        return sse_event(failure.error_event(request_id))


class AskJSON:
    """The one JSON object of a plain /ask."""

    headers, heartbeat = JSON_HEADERS, b""

    def __init__(self) -> None:
        self.text = {"delta": "", "reasoning": ""}

    def chunk(self, event: bytes, chunk: Chunk, pieces: Iterable[Piece]) -> bytes:
        for kind, text in pieces:
            self.text[kind] += text
        return b""

    def end(self, completion: Completion) -> bytes:
        if not completion.has_answer:
            raise Failure("upstream_error")
        answer = cast(Answer, {"response": self.text["delta"], **ending(completion)})
        if self.text["reasoning"]:
            answer["reasoning"] = self.text["reasoning"]
        return utf8_json(to_json(answer))

    def error(self, failure: Failure, request_id: str) -> None:
        return None


class AskText:
    """The answer itself, piece by piece; only a cut connection can say that it broke off."""

    headers, heartbeat = TEXT_HEADERS, b""

    def __init__(self) -> None:
        # By way of UTF-16, which joins a surrogate pair that came in two pieces.
        self.joined = codecs.getincrementaldecoder("utf-16-le")("replace")

    def chunk(self, event: bytes, chunk: Chunk, pieces: Iterable[Piece]) -> bytes:
        text = "".join(text for kind, text in pieces if kind == "delta")
        return self.joined.decode(text.encode("utf-16-le", "surrogatepass")).encode()

    def end(self, completion: Completion) -> bytes:
        if not completion.has_answer:
            raise Failure("upstream_error")
        return self.joined.decode(b"", final=True).encode()

    def error(self, failure: Failure, request_id: str) -> None:
        return None


class ChatCompletionEvents:
    """The upstream's own events; its usage chunk only where the client has asked for it."""

    headers, heartbeat = STREAM_HEADERS, b": ping\n\n"

    def __init__(self, include_usage: bool) -> None:
        self.include_usage = include_usage

    def chunk(self, event: bytes, chunk: Chunk, pieces: Iterable[Piece]) -> bytes:
        usage_only = chunk.get("usage") and not chunk.get("choices")
        return b"" if usage_only and not self.include_usage else event

    def end(self, completion: Completion) -> bytes:
        return END_MARK

    def error(self, failure: Failure, request_id: str) -> bytes:
        return sse_event(failure.openai_error())


class ChatCompletionJSON:
    """The upstream's own plain answer, byte for byte."""

    headers, heartbeat = JSON_HEADERS, b""

    def chunk(self, event: bytes, chunk: Chunk, pieces: Iterable[Piece]) -> bytes:
        return event

    def end(self, completion: Completion) -> bytes:
        return b""

    def error(self, failure: Failure, request_id: str) -> None:
        return None


class ClientStream:
    """The response to one client: whole writes, one at a time, and nothing after its end.

    Its head goes by way of the middleware, which add headers; all else goes straight to the server.
    """

    def __init__(self, send_head: Send, send_body: Send, headers: RawHeaders) -> None:
        self.send_head, self.send_body = send_head, send_body
        self.headers = headers
        self.started = self.complete = False
        self.clock = asyncio.get_running_loop().time
        self.last_write = self.clock()
        # Set while a write is under way, which a client that does not read holds up.
        self.writing_since: float | None = None
        self.lock = asyncio.Lock()

    async def write(self, data: bytes, *, last: bool = False) -> None:
        await self.lock.acquire()
        try:  # `async with` would make a chunk 2 % dearer
            if self.complete:
                return
            self.writing_since = self.clock()
            if not self.started:
                self.started = True
                length = ((b"content-length", b"%d" % len(data)),) if last else ()
                headers = (*self.headers, *length)
                head = {"type": "http.response.start", "status": 200, "headers": headers}
                await self.send_head(head)
            body = {"type": "http.response.body", "body": data, "more_body": not last}
            await self.send_body(body)
            self.complete = last
            self.writing_since = None
            self.last_write = self.clock()
        finally:
            self.lock.release()


class AppState(TypedDict):
    """What an endpoint finds in `request.state`."""

    settings: Settings
    events: EventLog | LogDatabase
    upstream: Upstream
    admission: Admission
    metrics: Metrics
    ask_model: type[Ask]
    chat_model: type[ChatCompletionRequest]
    started: float


OUTCOME_LEVELS: Mapping[Outcome, int] = {
    "finished": logging.INFO,
    "cancelled": logging.WARNING,
    "failed": logging.ERROR,
}


class Exchange:
    """One ask: it owns its place, its upstream, its client's stream and its closing event."""

    def __init__(self, request: ChatRequest, encoder: Encoder, state: AppState) -> None:
        self.request = request
        self.encoder = encoder
        self.state = state
        self.clock = time.monotonic
        self.started_at = self.clock()
        self.first_piece_at: float | None = None
        self.completion = Completion(request.model, "delta" if request.stream else "message")
        # Encoded, but not written yet.
        self.pending = b""
        self.failure: Failure | None = None
        self.settled = False
        # What attend_client waits in.
        self.watch: StallTimeout
        self.decoder = SSEDecoder() if request.stream else BodyDecoder()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.state["admission"].admit(self.request.caller)
        self.client = ClientStream(send, scope["server_send"], self.encoder.headers)
        try:
            async with asyncio.TaskGroup() as tasks:
                # Not in this task, where each read would pass through all middleware.
                pump = tasks.create_task(self.pump())
                await self.attend_client(receive, pump)
        except* ClientDisconnect:
            pass
        finally:
            self.settle()
        if self.failure and not self.client.started:
            self.failure.counted = True
            raise self.failure
        if self.client.started and not self.client.complete:
            raise ConnectionCut

    async def attend_client(self, receive: Receive, pump: "asyncio.Task[None]") -> None:
        """End the ask when its client leaves or stops reading; send heartbeats in silence."""
        client, patience = self.client, self.state["settings"].client_timeout
        interval = self.state["settings"].heartbeat_seconds if self.encoder.heartbeat else math.inf
        while not (client.complete or pump.done()):
            now, held_up_since = client.clock(), client.writing_since
            if held_up_since is None:
                due = client.last_write + interval
            else:
                due = held_up_since + patience
            if now < due:
                # No longer than `patience`: a write may come to be held up meanwhile.
                with suppress(TimeoutError):
                    async with StallTimeout(min(due - now, patience), now) as self.watch:
                        while (await receive())["type"] != "http.disconnect":
                            pass
                        if not client.complete:
                            raise ClientDisconnect
            elif held_up_since is None:
                try:
                    async with StallTimeout(patience, now) as self.watch:
                        await client.write(self.encoder.heartbeat)
                except TimeoutError as exc:
                    raise ClientDisconnect from exc
            else:
                raise ClientDisconnect

    async def pump(self) -> None:
        """Relay the answer, or report what came instead; then nobody need attend the client."""
        try:
            await self.relay()
        except Exception as exc:
            await self.report(exc)
        self.watch.expire()

    async def relay(self) -> None:
        """The model's answer in the client's format; what arrives together leaves together."""
        upstream = self.state["upstream"]
        async with upstream.stream(self.request, lambda: not self.client.started) as (
            left_out,
            reads,
        ):
            self.completion.ignored = left_out
            async for read in reads:
                self.encode(self.decoder.feed(read))
                if self.completion.done:
                    break
                if self.pending:
                    await self.write_pending()
            else:
                self.encode(self.decoder.close())
                if not self.completion.complete:
                    raise Failure("upstream_error")
            self.pending += self.encoder.end(self.completion)
            await self.write_pending(last=True)
            # Now, since the client may ask again before the connections here are put in order.
            self.settle()

    def encode(self, block: bytes) -> None:
        """Add to `pending` what the upstream's events in *block* say, up to its end mark."""
        skimmed, pieces = self.completion.skim(block)
        if skimmed:
            self.append(block[:skimmed], {}, pieces)
        rest = block[skimmed:]
        for event, data in self.decoder.events(rest) if rest else ():
            if data == b"[DONE]":
                self.completion.done = True
                break
            if data:
                chunk = parse_chunk(data)
                self.append(event, chunk, self.completion.add(chunk))

    def append(self, event: bytes, chunk: Chunk, pieces: Iterable[Piece]) -> None:
        if pieces and self.first_piece_at is None and self.request.stream:
            self.first_piece_at = self.clock()
        self.pending += self.encoder.chunk(event, chunk, pieces)

    async def write_pending(self, *, last: bool = False) -> None:
        data, self.pending = self.pending, b""
        await self.client.write(data, last=last)

    async def report(self, exc: Exception) -> None:
        """Make *exc* the failure of this ask, and tell the client of it if its answer has begun."""
        self.failure = exc if isinstance(exc, Failure) else Failure("internal_error")
        if self.failure is not exc:
            self.failure.__cause__ = exc
        if self.client.started or self.pending:
            final_event = self.encoder.error(self.failure, get_contextvars()["request_id"])
            self.pending += final_event or b""
            await self.write_pending(last=final_event is not None)

    def settle(self) -> None:
        """Give the place back, count and log, as every accepted ask does exactly once."""
        if self.settled:
            return
        self.settled = True
        outcome: Outcome = "cancelled"
        if self.failure or self.client.complete:
            outcome = "failed" if self.failure else "finished"
        self.state["admission"].leave(outcome, self.tokens_spent())
        completion, failure = self.completion, self.failure
        self.count(failure.code if failure else "cancelled" if outcome == "cancelled" else "")
        event: dict[str, object] = {
            "stream": self.request.stream,
            "model": completion.model,
            "finish_reason": completion.finish_reason,
            "tokens_used": completion.tokens_used,
            **completion.usage,
            "prompt_chars": self.request.prompt_chars,
            "answer_chars": completion.answer_chars or None,
            "first_token_ms": self.first_piece_at and self.milliseconds(self.first_piece_at),
            "duration_ms": self.milliseconds(self.clock()),
            "user": self.request.caller.user,
            "ignored": ["temperature"] if completion.ignored else None,
        }
        if failure:
            event |= {"code": failure.code, "status": failure.status_code}
            event |= {"cause": log_cause(failure)}
            event["exc_info"] = failure.__cause__ if failure.code == "internal_error" else None
        known = {name: value for name, value in event.items() if value is not None}
        log.log(OUTCOME_LEVELS[outcome], f"ask {outcome}", **known)

    def tokens_spent(self) -> int:
        """The tokens for DAILY_TOKENS: the upstream's figure, or an estimate where it told none."""
        completion, failure = self.completion, self.failure
        if completion.tokens_used is not None:
            return completion.tokens_used
        unreached = failure and failure.code == "upstream_unreachable"
        if unreached or (failure and isinstance(failure.__cause__, Refusal)):
            return 0
        sent = sum(map(len, texts_of(self.request.messages)))
        sent += len(self.state["settings"].system_prompt)
        for name in ("tools", "response_format"):
            if value := self.request.parameters.get(name):
                sent += len(to_json(value))
        return math.ceil((sent + completion.answer_chars + completion.other_chars) / 4)

    def count(self, error_type: str) -> None:
        metrics = self.state["metrics"]
        metrics.tokens_used += self.completion.tokens_used or 0
        observe = partial(metrics.observe, model=self.request.model)
        seconds = self.clock() - self.started_at
        observe(
            "gen_ai_client_operation_duration_seconds",
            seconds,
            label="error_type",
            given=error_type,
        )
        if self.first_piece_at is not None:
            seconds = self.first_piece_at - self.started_at
            observe("gen_ai_client_operation_time_to_first_chunk_seconds", seconds)
        for kind, name in (("input", "prompt_tokens"), ("output", "completion_tokens")):
            if (tokens := self.completion.usage.get(name)) is not None:
                observe(
                    "gen_ai_client_token_usage",
                    cast(int, tokens),
                    label="gen_ai_token_type",
                    given=kind,
                )

    def milliseconds(self, instant: float) -> float:
        return round((instant - self.started_at) * 1000, 1)


def require_key(settings: Settings) -> None:
    if not settings.openai_api_key:
        raise Failure("not_configured")


async def ask(request: Request[AppState]) -> Exchange:
    """POST /ask: as events, as one JSON object, or as text."""
    state, caller = request.state, identify(request)
    settings = state["settings"]
    body = validate(state["ask_model"], await read_json(request, settings))
    require_key(settings)
    question: JsonObject = {"role": "user", "content": body.prompt}
    parameters: JsonObject = {}
    if body.temperature is not MISSING:
        parameters["temperature"] = body.temperature
    chat = ChatRequest(
        caller=caller,
        model=settings.openai_model if body.model is MISSING else body.model,
        messages=[*(turn.model_dump() for turn in body.history), question],
        stream=body.stream,
        token_limit=settings.max_output_tokens if body.max_tokens is MISSING else body.max_tokens,
        parameters=parameters,
        prompt_chars=len(body.prompt),
    )
    accepted = request.headers.get("accept", "").partition(",")[0].partition(";")[0]
    if accepted.strip().lower() == "text/plain":
        return Exchange(chat, AskText(), state)
    return Exchange(chat, AskEvents() if body.stream else AskJSON(), state)


async def chat_completions(request: Request[AppState]) -> Exchange:
    """POST /v1/chat/completions: OpenAI's own API, for its own libraries."""
    state, caller = request.state, identify(request)
    settings = state["settings"]
    values = await read_json(request, settings)
    body = validate(state["chat_model"], values)
    model = settings.openai_model if body.model is MISSING else body.model
    if model not in settings.models:
        wrong = FieldError(field="model", detail="This model may not be named here")
        raise Failure("model_not_found", errors=[wrong])
    try:
        to_json(values)
    except ValueError as exc:  # 1e999 was read as infinity
        raise Failure("invalid_json", f"The body is not JSON: {exc}") from exc
    require_key(settings)
    limits = [limit for name in OTHER_NAME if (limit := getattr(body, name, None)) is not None]
    if all(isinstance(limit, int) for limit in limits):
        limits.sort()
    own = {"model", "messages", "stream", *OTHER_NAME}
    messages = cast(list[JsonObject], values["messages"])
    chat = ChatRequest(
        caller=caller,
        model=model,
        messages=messages,
        stream=bool(body.stream),
        token_limit=limits[0] if limits else settings.max_output_tokens,
        parameters={name: value for name, value in values.items() if name not in own},
        prompt_chars=sum(map(len, texts_of(messages))),
    )
    if not chat.stream:
        return Exchange(chat, ChatCompletionJSON(), state)
    include_usage = bool((body.stream_options or {}).get("include_usage"))
    return Exchange(chat, ChatCompletionEvents(include_usage), state)


@dataclass(frozen=True)
class AskEndpoint:
    """*read* as an ASGI app: around a function Starlette puts a layer, 2 KiB of a silent stream."""

    read: Callable[[Request[AppState]], Awaitable[Exchange]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = await self.read(Request(scope, receive))
        await exchange(scope, receive, send)


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    """The models that a request may name."""

    object: Literal["list"]
    data: list[Model]


async def list_models(request: Request[AppState]) -> Response:
    """GET /v1/models."""
    identify(request)
    models = [
        Model(id=name, object="model", created=0, owned_by="openai-backend")
        for name in request.state["settings"].models
    ]
    return json_response(ModelList(object="list", data=models))


class Status(TypedDict):
    """Whether it all works."""

    status: Literal["running"]
    version: str
    openai_connected: bool
    model: str
    uptime_seconds: float
    asks: AskCounts
    tokens_used: int


async def status(request: Request[AppState]) -> Response:
    state = request.state
    settings = state["settings"]
    keyed = settings.openai_api_key not in {"", "demo"}
    return json_response(
        Status(
            status="running",
            version=VERSION,
            openai_connected=keyed and await state["upstream"].connected(),
            model="demo" if settings.demo else settings.openai_model,
            uptime_seconds=round(time.monotonic() - state["started"], 1),
            asks=state["admission"].asks,
            tokens_used=state["metrics"].tokens_used,
        )
    )


async def logs(request: Request[AppState]) -> Response:
    require_operator(request)
    given: JsonObject = {}
    if (limit := request.query_params.get("limit")) is not None:
        given["limit"] = int(limit) if re.fullmatch("[0-9]{1,9}", limit) else limit
    if (level := request.query_params.get("level")) is not None:
        given["level"] = level.upper()
    query = validate(LogsQuery, given)
    level = None if query.level is MISSING else query.level
    return json_response(await request.state["events"].tail(level=level, limit=query.limit))


async def metrics(request: Request[AppState]) -> Response:
    require_operator(request)
    lines = request.state["metrics"].exposition(request.state["admission"].asks)
    media_type = "text/plain; version=0.0.4; charset=utf-8"
    return Response("".join(f"{line}\n" for line in lines), media_type=media_type)


@dataclass(frozen=True)
class DemoAnswer:
    """How the demo model answers; *delay* is the seconds before the first word."""

    text: str
    reasoning: str = ""
    delay: float = 0
    finish_reason: str = "stop"
    cut: bool = False


DEMO_ERRORS = {400, 401, 429, 500, 503}
# A prompt that begins with one of these words, so that a front end meets every branch.
DEMO_ANSWERS: Mapping[str, DemoAnswer] = {
    "/cut": DemoAnswer("This answer of the demo model breaks off", cut=True),
    "/slow": DemoAnswer("This answer of the demo model took 20 seconds to begin.", delay=20),
    "/reason": DemoAnswer(
        "This is the demo model's answer.",
        reasoning="The demo model thinks aloud before it speaks.",
    ),
    "/long": DemoAnswer(" ".join(["This is the demo model, and it talks and talks."] * 50)),
    "/empty": DemoAnswer("", finish_reason="length"),
}


class DemoTransport(httpx2.AsyncBaseTransport):
    """The demo model, in the place of a network: all else on an ask's way is the real thing."""

    PACE = 0.04

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        body: JsonObject = json.loads(request.content)
        messages = cast(list[JsonObject], body["messages"])
        prompt = "".join(texts_of(messages[-1:]))
        command, argument, *_ = [*prompt.split(None, 2), "", ""]
        code = int(argument) if re.fullmatch("(?a:[0-9]{3})", argument) else 0
        if command == "/error" and code in DEMO_ERRORS:
            headers = {"Retry-After": "3"} if code == 429 else {}
            error = {"message": f"The demo model was asked for a {code}.", "type": "demo"}
            return httpx2.Response(code, headers=headers, json={"error": error}, request=request)
        usual = DemoAnswer(f"This is the demo model, not OpenAI. You said: “{prompt}”")
        answer = DEMO_ANSWERS.get(command, usual)
        words = [("reasoning_content", word) for word in re.findall(r"\s*\S+", answer.reasoning)]
        words += [("content", word) for word in re.findall(r"\s*\S+", answer.text)]
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        reason = answer.finish_reason
        if isinstance(limit, int) and limit < len(words):
            words, reason = words[:limit], "length"
        reasoned = sum(kind == "reasoning_content" for kind, _ in words)
        asked = sum(len(text.split()) for text in texts_of(messages))
        usage = {
            "prompt_tokens": asked,
            "completion_tokens": len(words),
            "total_tokens": asked + len(words),
        } | ({"completion_tokens_details": {"reasoning_tokens": reasoned}} if reasoned else {})
        answered = self.stream if body.get("stream") else self.plain
        return httpx2.Response(200, content=answered(answer, words, reason, usage), request=request)

    async def stream(
        self, answer: DemoAnswer, words: list[tuple[str, str]], reason: str, usage: object
    ) -> AsyncIterator[bytes]:
        head: JsonObject = {"id": "chatcmpl-demo", "object": "chat.completion.chunk"}
        head |= {"model": "demo", "created": int(time.time())}

        def chunk(delta: object, finish_reason: str | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
            return sse_event({**head, "choices": [choice]})

        yield chunk({"role": "assistant", "content": ""})
        await asyncio.sleep(answer.delay)
        for kind, word in words:
            yield chunk({kind: word})
            await asyncio.sleep(self.PACE)
        if not answer.cut:
            yield chunk({}, reason)
            yield sse_event({**head, "choices": [], "usage": usage}) + END_MARK

    async def plain(
        self, answer: DemoAnswer, words: list[tuple[str, str]], reason: str, usage: object
    ) -> AsyncIterator[bytes]:
        await asyncio.sleep(answer.delay)
        texts = {"content": "", "reasoning_content": ""}
        for kind, word in words:
            texts[kind] += word
        message = {"role": "assistant"} | {
            kind: text for kind, text in texts.items() if text or kind == "content"
        }
        choice = {"index": 0, "message": message, "finish_reason": reason}
        head: JsonObject = {"id": "chatcmpl-demo", "object": "chat.completion"}
        head |= {"model": "demo", "created": int(time.time())}
        whole = utf8_json(to_json({**head, "choices": [choice], "usage": usage}))
        yield whole[:100] if answer.cut else whole


def ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


class UntitledSchema(GenerateJsonSchema):
    """Schemas without a title for each field, which says its name once more."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schemas(settings: Settings) -> dict[str, Any]:
    """What goes over the wire: requests as they are validated, the rest as it is typed."""
    received = (ask_model(settings), chat_model(settings))
    sent = (Answer, PieceEvent, DoneEvent, ErrorEvent, Problem, OpenAIError, Status, LogEvent)
    types: tuple[type[Any], ...] = (*received, *sent, ModelList)
    _, document = TypeAdapter.json_schemas(
        [(each.__name__, "validation", TypeAdapter(each)) for each in types],
        ref_template=ref("{model}")["$ref"],
        schema_generator=UntitledSchema,
    )
    definitions: dict[str, Any] = document["$defs"]
    return definitions


def operation(
    name: str,
    summary: str,
    content: object,
    codes: Iterable[Code] = (),
    *,
    secured: bool = False,
    error: str = "Problem",
    **more: object,
) -> dict[str, Any]:
    """An operation that answers with *content*, or with an *error* of one of the *codes*."""
    text = {"schema": {"type": "string"}}
    extra = {"401": "WWW-Authenticate"} | dict.fromkeys(("429", "502", "503"), "Retry-After")
    responses: dict[str, Any] = {"200": {"description": "OK", "content": content}}
    denied: tuple[Code, ...] = ("unauthorized",) if secured else ()
    for code in ("host_not_allowed", *denied, *codes, "internal_error"):
        failure = Failure(code)
        problem = failure.problem("7f0c2a")
        kind, example = (PROBLEM, problem) if error == "Problem" else (JSON, failure.openai_error())
        problems = {kind: {"schema": ref(error), "examples": {}}}
        response = {"description": problem["title"], "content": problems}
        response = responses.setdefault(str(failure.status_code), response)
        response["content"][kind]["examples"][code] = {"value": example}
    for status_code, response in responses.items():
        names = filter(None, ("X-Request-ID", extra.get(status_code)))
        response["headers"] = dict.fromkeys(names, text)
    security: dict[str, Any] = {"security": [{"bearer": []}]} if secured else {}
    return {"operationId": name, "summary": summary, "responses": responses, **security, **more}


def event_stream(events: object, example: bytes) -> dict[str, Any]:
    """The content of a stream, an event as OpenAPI 3.2 models it in its itemSchema."""
    data = {"anyOf": [{"contentMediaType": JSON, "contentSchema": events}, {"const": "[DONE]"}]}
    properties = {"data": {"type": "string", **data}}
    schema = {"type": "object", "properties": properties, "required": ["data"]}
    return {SSE: {"schema": schema, "example": example.decode()}}


def json_content(schema: object, **more: object) -> dict[str, Any]:
    return {JSON: {"schema": schema, **more}}


def ask_operations(secured: bool) -> dict[str, Any]:
    """POST /ask and POST /v1/chat/completions; JSON first, since generated clients take that."""
    codes = [code for code in ERRORS if code not in NOT_LISTED_FOR_ASKS]
    pieces: list[Piece] = [("reasoning", "The user greets"), ("delta", "Hola")]
    end = {"type": "done", "finish_reason": "stop", "tokens_used": 9, "model": "gpt-5.4-mini"}
    streamed = AskEvents().chunk(b"", {}, pieces) + sse_event(end) + END_MARK
    events = {"oneOf": [ref("PieceEvent"), ref("DoneEvent"), ref("ErrorEvent")]}
    answers = json_content(ref("Answer")) | event_stream(events, streamed)
    answers["text/plain"] = {"schema": {"type": "string"}}
    example = {"prompt": "Say hello in three languages.", "temperature": 0.7, "max_tokens": 1000}
    asked = {"required": True, "content": json_content(ref("Ask"), example=example)}
    choice = {"index": 0, "delta": {"content": "Hola"}}
    chunk = sse_event({"object": "chat.completion.chunk", "choices": [choice]})
    whole: dict[str, object] = {"type": "object"}
    chat_answers = json_content(whole) | event_stream(whole, chunk + END_MARK)
    chat = {"messages": [{"role": "user", "content": "Hola"}]}
    content = json_content(ref("ChatCompletionRequest"), example=chat)
    chat_asked = {"required": True, "content": content}
    return {
        "/ask": operation("ask", "Ask", answers, codes, secured=secured, requestBody=asked),
        "/v1/chat/completions": operation(
            "createChatCompletion",
            "Ask, as with OpenAI's own API",
            chat_answers,
            [*codes, "model_not_found"],
            secured=secured,
            error="OpenAIError",
            requestBody=chat_asked,
        ),
    }


def read_operations(asks_secured: bool, logs_secured: bool) -> dict[str, Any]:
    """What is read with GET."""
    query = LogsQuery.model_json_schema()["properties"].items()
    parameters = [{"name": name, "in": "query", "schema": each} for name, each in query]
    events = json_content({"type": "array", "items": ref("LogEvent")})
    models = json_content(ref("ModelList"))
    text = {"schema": {"type": "string"}}
    html, plain = {"text/html": text}, {"text/plain": text}
    of_logs = partial(operation, secured=logs_secured)
    of_asks = partial(operation, secured=asks_secured, error="OpenAIError")
    return {
        "/": operation("page", "A page to ask from", html),
        "/status": operation("status", "Whether it all works", json_content(ref("Status"))),
        "/logs": of_logs(
            "logs", "Newest events", events, ["invalid_request"], parameters=parameters
        ),
        "/metrics": of_logs("metrics", "Metrics, for Prometheus", plain),
        "/v1/models": of_asks("listModels", "The models that a request may name", models),
        "/openapi.json": operation("document", "This document", json_content({"type": "object"})),
        "/docs": operation("swaggerUI", "This document in Swagger UI", html),
        "/redoc": operation("redoc", "This document in ReDoc", html),
    }


def openapi(settings: Settings) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the service."""
    asks_secured = bool(settings.api_token or settings.jwt_secret)
    logs_secured = asks_secured or bool(settings.admin_token)
    posts = {path: {"post": each} for path, each in ask_operations(asks_secured).items()}
    reads = read_operations(asks_secured, logs_secured).items()
    components: dict[str, Any] = {"schemas": schemas(settings)}
    if logs_secured:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "OpenAI back end", "version": VERSION},
        "servers": [{"url": "."}],
        "paths": posts | {path: {"get": each} for path, each in reads},
        "components": components,
    }


CDN = "https://cdn.jsdelivr.net/npm"


def docs_page(package: str, script: str, integrity: str, start: str, head: str = "") -> Response:
    """A page around a *script* of the CDN; *integrity* is that of the npm package's own file."""
    return HTMLResponse(f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>OpenAI back end</title>{head}</head>
<body><div id="ui"></div><script src="{CDN}/{package}/{script}" integrity="sha384-{integrity}"
crossorigin="anonymous"
onerror="document.body.textContent = 'The CDN cannot be reached; see openapi.json.'"></script>
<script>{start}</script></body></html>""")


SWAGGER_UI = partial(
    docs_page,
    "swagger-ui-dist@5.35.0",
    "swagger-ui-bundle.js",
    "gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9",
    "window.SwaggerUIBundle?.({url: 'openapi.json', dom_id: '#ui'})",
    f"""<link rel="stylesheet" href="{CDN}/swagger-ui-dist@5.35.0/swagger-ui.css"
integrity="sha384-WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I"
crossorigin="anonymous">""",
)
REDOC = partial(
    docs_page,
    "redoc@2.5.4",
    "bundles/redoc.standalone.js",
    "w447zOpYfw/1Tv/5AK9NfHTlQIqE3RVR6KY62jCyy9zNDgO64cMwGGP1Fj0zJVf5",
    "window.Redoc?.init('openapi.json', {}, document.getElementById('ui'))",
)
PAGE_STYLE = """
:root { color-scheme: light dark; --mono: 0.8125rem/1.7 ui-monospace, Menlo, Consolas, monospace;
  --paper: light-dark(#faf9f6, #15171a); --field: light-dark(#fff, #1e2125);
  --ink: light-dark(#1b1e22, #e8e6e1); --quiet: light-dark(#5c6067, #a1a6ad);
  --line: light-dark(#e0ddd5, #33383e); --edge: light-dark(#85888c, #747a82);
  --accent: light-dark(#0d5c75, #7ac6dc); --warn: light-dark(#8a5800, #e0b155);
  --bad: light-dark(#b3261e, #ff9488); }
* { box-sizing: border-box; margin: 0; color: inherit; font: inherit; }
[hidden], #chart:not([hidden]) + p, #log:empty { display: none !important; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
body { max-width: 74rem; margin: auto; padding: clamp(1.25rem, 4vw, 3rem); overflow-wrap: anywhere;
  background: var(--paper); color: var(--ink); font: 1rem/1.6 system-ui, sans-serif; }
header, nav, #buttons { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0.5rem 1.5rem; }
main { display: grid; grid-template-columns: minmax(0, 1fr); gap: 3rem 4.5rem; margin-top: 2.5rem; }
h1, h2, b { font-weight: 650; }
h1 { font-size: 1.25rem; letter-spacing: -0.015em; }
h2 { display: flex; justify-content: space-between; margin-bottom: 0.75rem; }
a { color: var(--accent); text-underline-offset: 0.2em; } nav { margin-left: auto; }
nav, dl, small, summary, select, label[id], p:not(#answer, li p) { font-size: 0.875rem; }
dt, small, summary, table, label[id], p:not(#answer, li p), li span { color: var(--quiet); }
#health::before { content: "●  "; color: var(--accent); }
#health.bad::before { content: "▲  "; color: inherit; }
#health.bad, #state.bad { color: var(--bad); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(5.75rem, 1fr));
  align-items: end; gap: 0.5rem 1rem; font-variant-numeric: tabular-nums; }
dt { font-size: 0.75rem; } dt::first-letter { text-transform: uppercase; }
header dl { flex-basis: 100%; min-height: 4.25rem; margin-top: 0.75rem; padding: 0.75rem 0;
  border-block: 1px solid var(--line); }
textarea, input, select, button { padding: 0.5rem 1.25rem; background: var(--field);
  border: 1px solid var(--edge); border-radius: 0.5rem; }
textarea, input { display: block; width: 100%; padding: 0.75rem 1rem; }
textarea { min-height: 6.5rem; max-height: 60vh; resize: vertical; field-sizing: content; }
::placeholder { color: var(--quiet); opacity: 1; }
input { max-width: 30rem; margin-top: 0.25rem; font: var(--mono); -webkit-text-security: disc; }
label[id] { display: block; margin: 1rem 0; }
select { padding: 0.25rem 0.5rem; font-weight: 400; }
#hints { margin-top: 0.75rem; line-height: 2; }
#hints button { padding: 0 0.5rem; color: var(--accent); font: var(--mono); }
#buttons { gap: 0.75rem; margin: 1rem 0; }
#buttons button { color: var(--ink); font-size: 1rem; font-weight: 500; }
#buttons #ask { background: var(--accent); border-color: var(--accent); color: var(--paper); }
#buttons [aria-disabled="true"] { opacity: 0.5; }
#reasoning { margin-top: 0.75rem; padding-left: 1rem; border-left: 2px solid var(--line); }
#answer, #thoughts { max-width: 68ch; white-space: pre-wrap; }
#answer { margin: 0.75rem 0 1.25rem; font-size: 1.0625rem; }
[aria-busy="true"] #answer::after { content: "▍"; animation: pulse 1s infinite; }
@keyframes pulse { 50% { opacity: 0.2; } }
@media (prefers-reduced-motion: reduce) { #answer::after { animation: none !important; } }
#chart span, td, th { white-space: nowrap; }
table { width: 100%; margin-top: 0.75rem; border-collapse: collapse; font: var(--mono); }
th, td { padding: 0 0 0 0.75rem; text-align: right; }
:is(th, td):first-child { padding: 0 1rem 0 0; text-align: left; }
:is(th, td):nth-child(2) { width: 100%; padding: 0; text-align: left; }
#axis { display: flex; justify-content: space-between; }
td:nth-child(2) { border-right: 1px solid var(--line); color: var(--accent);
  background: linear-gradient(90deg, var(--line) 1px, transparent 1px) 0 / 50%; }
td + td :is(i, b) { display: inline-block; height: 0.7rem; vertical-align: middle;
  background: currentColor; }
td + td i { height: 2px; }
.WARNING b, .cancelled :is(i, b) { color: var(--warn); }
:is(.ERROR, .CRITICAL) b, .failed :is(i, b) { color: var(--bad); }
#log { max-height: 34rem; padding: 0; overflow: auto; list-style: none; font: var(--mono);
  border-block: 1px solid var(--line); }
li { display: grid; grid-template-columns: 4.5rem 1fr; gap: 0 1rem; padding: 0.125rem 0; }
li p { grid-column: 1 / -1; white-space: pre-wrap; }
@media (min-width: 60rem) {
  main { grid-template-columns: minmax(0, 7fr) minmax(0, 5fr); }
  section:last-child { grid-column: 1 / -1; }
  li { grid-template-columns: 4.5rem 5rem minmax(0, 1fr); }
  li p { grid-column: 3; }
}
"""
PAGE_SCRIPT = """
const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((it) => [it.id, it]));
const LOST = "The service cannot be reached.";
const CUT = "The answer broke off on its way; this is not all of it.";
const LOCKED = "The log wants the operator's token: ADMIN_TOKEN, else API_TOKEN, where one is set.";
const MARKS = { "ask finished": "✓", "ask cancelled": "■", "ask failed": "✕" };
// The tab's own storage, which a browser may refuse; the path tells services of one host apart.
const store = (() => { try { return sessionStorage; } catch { return {}; } })();
const slot = (field) => `${location.pathname} ${field.id}`;
const token = (field, other) => store[slot(field)] || store[slot(other)] || "";
const seconds = (ms) => `${(ms / 1000).toFixed(2)} s`;
const clock = (timestamp) => new Date(timestamp).toLocaleTimeString("en-GB");
let stopper = null; // of the ask under way
let refused = null; // the token that did not open the log
let shown = ""; // of the log: a selection in it outlives a refresh that brings nothing new

function make(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children); // a string becomes text, never HTML
  return made;
}

function say(element, text, bad = false) {
  element.className = bad ? "bad" : "";
  if (element.textContent !== text) element.textContent = text; // else it is read out again
}

/** Shows what is known of *figures*, under the names that the API gives them. */
function showFigures(list, figures) {
  const known = Object.entries(figures).filter(([, value]) => value != null);
  list.replaceChildren(...known.map(([name, value]) => make("div", "",
    make("dt", "", name.replaceAll("_", " ")), make("dd", "", value.toLocaleString("en")))));
}

async function call(path, secret, options = { signal: AbortSignal.timeout(10000) }) {
  const headers = { "Content-Type": "application/json" };
  if (secret) headers.Authorization = `Bearer ${secret}`;
  const response = await fetch(path, { cache: "no-store", headers, ...options });
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({})); // it may be a proxy's page
  const sentence = problem.detail ?? `The service answered with the status ${response.status}.`;
  const retry_after = response.headers.get("Retry-After");
  throw Object.assign(new Error(sentence), { retry_after, ...problem });
}

/** The `done` event of a stream, whose pieces go to *show*; throws where it ends otherwise. */
async function follow(response, show) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (rest + part.value).split(String.fromCharCode(10));
    rest = lines.pop();
    for (const line of lines.filter((each) => each.startsWith("data: {"))) {
      const event = JSON.parse(line.slice(6));
      if (event.type === "done") return event;
      if (event.type === "error") throw Object.assign(new Error(event.error), event);
      show(event);
    }
  }
  throw new Error(CUT);
}

async function ask() {
  if (stopper) return;
  stopper = new AbortController();
  const began = performance.now();
  const since = () => seconds(performance.now() - began);
  const body = JSON.stringify({ prompt: page.prompt.value, stream: true });
  const options = { method: "POST", body, signal: stopper.signal };
  let first, end;
  const show = ({ type, content }) => {
    first ??= since();
    say(page.state, "Answering…");
    (type === "reasoning" ? page.thoughts : page.answer).append(content);
    page.reasoning.hidden = !page.thoughts.firstChild;
  };
  for (const each of [page.thoughts, page.answer, page.cost]) each.replaceChildren();
  page.reasoning.hidden = true;
  say(page.state, "Waiting for the first piece…");
  setBusy(true);
  try {
    end = await follow(await call("ask", token(page.askToken, page.logToken), options), show);
    say(page.state, end.finish_reason === "length" ? "Ended early." : "Finished.");
  } catch (failure) {
    end = failure;
    const known = { AbortError: "Stopped.", TypeError: first ? CUT : LOST }[end.name];
    const fields = (end.errors ?? []).map(({ field, detail }) => `${field}: ${detail}.`);
    say(page.state, [known ?? end.message, ...fields].join(" "), end.name !== "AbortError");
  }
  setBusy(false);
  stopper = null;
  page.askWants.hidden = end.code !== "unauthorized";
  if (end.code === "unauthorized") page.askToken.focus();
  const { type, title, detail, error, errors, usage, ...told } = end;
  showFigures(page.cost, { first_piece: first, in_all: since(), ...told, ...usage });
}

function setBusy(busy) {
  page.form.ariaBusy = page.ask.ariaDisabled = busy; // `disabled` would lose the focus
  page.stop.ariaDisabled = !busy;
}

async function showStatus() {
  try {
    const { model, version, tokens_used, ...status } = await (await call("status")).json();
    const { total: asks, ...counts } = status.asks;
    const [demo, connected] = [model === "demo", status.openai_connected];
    const state = connected ? "Connected" : "No connection to the model, or its key is not valid";
    say(page.health, demo ? "Demo model, not OpenAI" : state, !demo && !connected);
    page.hints.hidden = !demo;
    const up_for = `${Math.floor(status.uptime_seconds / 60).toLocaleString("en")} min`;
    showFigures(page.status, { model, asks, ...counts, tokens_used, version, up_for });
  } catch {
    say(page.health, `${LOST} Trying again…`, true);
  }
}

async function showLog() {
  const [level, secret] = [page.level.value, token(page.logToken, page.askToken)];
  if (secret === refused) return;
  const read = async (query) => (await call(`logs?${query}`, secret)).json();
  try {
    const newest = await read("limit=300");
    const events = level ? await read(`limit=100&level=${level}`) : newest.slice(-100);
    refused = null;
    page.logWants.hidden = true;
    say(page.note, events.length ? "" : "No such events.");
    showEvents(events, newest.filter(({ message }) => message in MARKS).slice(-24));
  } catch (failure) {
    if (failure.code !== "unauthorized") return say(page.note, "Trying to read it again…");
    refused = secret;
    page.logWants.hidden = false;
    say(page.note, LOCKED);
    showEvents([], []);
  }
}

function showEvents(events, asks) {
  const text = JSON.stringify([events, asks]);
  if (text === shown) return;
  shown = text;
  const scale = Math.ceil(Math.max(1, ...asks.map((each) => each.metadata.duration_ms)) / 1000);
  page.chart.hidden = !asks.length;
  page.axis.replaceChildren(...[0, scale / 2, scale].map((at) => make("span", "", `${at} s`)));
  page.bars.replaceChildren(...asks.map((each) => bar(each, scale * 10)).reverse());
  page.log.replaceChildren(...events.map(logLine).reverse());
}

function logLine({ timestamp, level, message, metadata }) {
  const text = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const facts = Object.entries(metadata ?? {}).map(([key, value]) => `${key}=${text(value)}`);
  const words = make("p", "", message, "  ", make("span", "", facts.join("  ")));
  const line = make("li", level, make("time", "", clock(timestamp)), make("b", "", level), words);
  line.title = timestamp;
  return line;
}

function bar({ timestamp, message, metadata }, percent) {
  const { duration_ms: end, first_token_ms: first = end, code, model, tokens_used } = metadata;
  const [mark, wait, rest] = [make("b", "", MARKS[message]), make("i", ""), make("b", "")];
  [mark.role, mark.ariaLabel] = ["img", message];
  wait.style.width = `${first / percent}%`;
  rest.style.width = `${(end - first) / percent}%`;
  const figures = ["first_token_ms" in metadata ? seconds(first) : "—", seconds(end)];
  const cells = [[mark, " ", clock(timestamp)], [wait, rest], ...figures.map((each) => [each])];
  const row = make("tr", message, ...cells.map((cell) => make("td", "", ...cell)));
  const tokens = tokens_used != null && `${tokens_used} tokens`;
  row.title = [message, code, model, tokens].filter(Boolean).join(", ");
  return row;
}

async function watch(show) {
  if (!document.hidden) await show();
  setTimeout(watch, 2000, show);
}

for (const field of [page.askToken, page.logToken]) {
  field.value = store[slot(field)] ?? "";
  field.onchange = () => { if (field.reportValidity()) store[slot(field)] = field.value.trim(); };
}
for (const each of page.hints.children) {
  each.onclick = () => { page.prompt.value = each.textContent; page.prompt.focus(); };
}
page.form.onsubmit = (event) => { event.preventDefault(); ask(); };
page.stop.onclick = () => stopper?.abort();
page.level.onchange = showLog;
document.onkeydown = ({ key, ctrlKey, metaKey, target }) => {
  if (key === "Escape") stopper?.abort();
  if (key === "Enter" && (ctrlKey || metaKey) && target === page.prompt) page.form.requestSubmit();
};
watch(showStatus);
watch(showLog);
"""
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>OpenAI back end</title><link rel="icon" href="data:,"><style>$style</style>
<header><h1>OpenAI back end</h1><p id="health" role="status">Looking for the service…</p>
<nav aria-label="Documentation"><a href="docs">Swagger UI</a><a href="redoc">ReDoc</a></nav>
<dl id="status" aria-label="Status"></dl></header>
<main>
<form id="form"><h2><label for="prompt">Ask the model</label></h2>
<textarea id="prompt" required placeholder="Say hello in three languages."></textarea>
<p id="hints" hidden>It can vary or fail: <button type="button">/reason</button>
<button type="button">/long</button> <button type="button">/slow</button>
<button type="button">/empty</button> <button type="button">/cut</button>
<button type="button">/error 429</button></p>
<label id="askWants" hidden>A token for asks, kept in this tab only
<input id="askToken" autocomplete="off" spellcheck="false" pattern=" *[!-~]* *"></label>
<p id="buttons"><button id="ask">Ask</button>
<button id="stop" type="button" aria-disabled="true">Stop</button>
<small>Ctrl or ⌘ Enter asks, Esc stops</small></p>
<p id="state" role="status"></p>
<details id="reasoning" open hidden><summary>Reasoning</summary><p id="thoughts"></p></details>
<p id="answer"></p>
<dl id="cost" aria-label="Time and cost"></dl></form>
<section><h2>Last asks</h2>
<div id="chart" hidden><p>A line to the first piece, then a bar to the end;
<span>✓ finished</span>, <span>■ cancelled</span>, <span>✕ failed</span></p>
<table aria-label="Last asks, newest first">
<tr><th>Ended<th><div id="axis"></div><th>First<th>In all<tbody id="bars"></table></div>
<p>Each ask that the log tells of is drawn here.</p></section>
<section><h2><label for="level">Log</label><select id="level"><option value="">All levels
<option>DEBUG<option>INFO<option>WARNING<option>ERROR<option>CRITICAL</select></h2>
<p id="note" role="status"></p>
<label id="logWants" hidden>The operator's token, kept in this tab only
<input id="logToken" autocomplete="off" spellcheck="false" pattern=" *[!-~]* *"></label>
<ol id="log" tabindex="0" aria-label="Newest events first"></ol></section>
</main>
<script>$script</script>
"""


def page() -> Response:
    """GET /: the page, whose policy lets nothing in but its own style and script."""

    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {hashed(PAGE_SCRIPT)}; style-src {hashed(PAGE_STYLE)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    document = string.Template(PAGE).substitute(style=PAGE_STYLE, script=PAGE_SCRIPT)
    return HTMLResponse(document, headers={"Content-Security-Policy": policy})


def create_http_client(settings: Settings) -> httpx2.AsyncClient:
    """The HTTP client of AsyncOpenAI: over aiohttp, or on the demo model."""
    if settings.demo:
        http_client = httpx2.AsyncClient(transport=DemoTransport())
    else:
        limits = httpx2.Limits(
            max_connections=settings.max_concurrent_asks + 100,
            max_keepalive_connections=settings.max_concurrent_asks,
            keepalive_expiry=60,
        )
        no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
        http_client = DefaultAioHttpClient(
            # StallTimeout sees to that; here it would take a timer for each read, 5 % of a chunk.
            timeout=None,
            limits=limits,
            follow_redirects=False,
            cookies=no_cookies,
        )

    async def forget_cookies(response: httpx2.Response) -> None:
        # aiohttp has a jar of its own, which nothing public reaches.
        for transport in (http_client._transport, *http_client._mounts.values()):
            if session := getattr(transport, "client", None):
                session.cookie_jar.clear()

    http_client.event_hooks = {"response": [forget_cookies, raise_refusal]}
    return http_client


def raise_file_limit(asks: int) -> None:
    """Allow the files of so many *asks*: each takes two, and 1,024 is the usual limit."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * asks + 200
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= wanted:
        return
    limit = wanted if hard == unlimited else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    except (OSError, ValueError):
        limit = soft
    if limit < wanted:
        log.warning("too few files may be open", limit=limit, wanted=wanted, remedy="ulimit -n")


@asynccontextmanager
async def lifespan(settings: Settings, events: EventLog | LogDatabase) -> AsyncIterator[AppState]:
    """What the requests share, from start to stop."""
    # With Python's own, a body of many small lists would hold all others up for 0.4 s, not 0.1.
    gc.set_threshold(50_000, 20, 20)
    raise_file_limit(settings.max_concurrent_asks)
    if settings.demo:
        log.warning("the demo model answers, not OpenAI", remedy="set OPENAI_API_KEY")
    async with create_http_client(settings) as http_client:
        client = AsyncOpenAI(
            # Without a key no ask gets as far as this; the client insists on one.
            api_key=settings.openai_api_key or "none",
            base_url=settings.openai_base_url,
            http_client=http_client,
            default_headers={
                "Accept-Encoding": "identity",
                "User-Agent": f"openai-backend/{VERSION}",
            },
        )
        admission = Admission(settings)
        yield AppState(
            settings=settings,
            events=events,
            upstream=Upstream(client, http_client, settings),
            admission=admission,
            metrics=Metrics(),
            ask_model=ask_model(settings),
            chat_model=chat_model(settings),
            started=time.monotonic(),
        )
        # uvicorn has just cut what was left, and would be gone before it is closed and logged.
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                while admission.asks["active"]:  # noqa: ASYNC110 - nothing else waits for this
                    await asyncio.sleep(0.01)
    if isinstance(events, LogDatabase):
        events.close()


def create_app(settings: Settings) -> ASGIApp:
    """The service, ready to be served; takes over the logging of the process.

    Raises ConfigError where LOG_DATABASE cannot be used.
    """
    ring = EventLog(settings.log_buffer_size, settings.secret)
    database = LogDatabase(settings.log_database, ring) if settings.log_database else None
    configure_logging(settings.log_level, ring, *([database] if database else []))
    warn = OriginWarning()
    app = Starlette(
        routes=[
            Route("/ask", AskEndpoint(ask), methods=["POST"]),
            Route("/v1/chat/completions", AskEndpoint(chat_completions), methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/status", status),
            Route("/logs", logs),
            Route("/metrics", metrics),
            Route("/openapi.json", json_response(openapi(settings)), methods=["GET"]),
            Route("/docs", SWAGGER_UI(), methods=["GET"]),
            Route("/redoc", REDOC(), methods=["GET"]),
            Route("/", page(), methods=["GET"]),
        ],
        middleware=[Middleware(HostOriginMiddleware, settings=settings, warn=warn)],
        # A client that leaves during its request is no defect; nobody reads the answer then.
        exception_handlers=dict.fromkeys(
            (HTTPException, ClientDisconnect, Exception), error_response
        ),
        lifespan=lambda app: lifespan(settings, database or ring),
    )
    app.router.redirect_slashes = False
    # Around Starlette, whose handler for a 500 would stand outside of CORS as its middleware.
    return RequestIDMiddleware(LoggingCORSMiddleware(app, settings.cors_origins, warn))


class HTTPProtocol(HttpToolsProtocol):
    """Reads a request that wants another protocol as HTTP/1.1 (RFC 9110, section 7.8).

    httptools would lose its body (uvicorn#2722); Java's HttpClient and `curl --http2` send such.
    """

    UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*(?=\r\n)", re.IGNORECASE)
    in_body = False

    def data_received(self, data: bytes) -> None:
        if not self.in_body:
            head, end, body = data.partition(b"\r\n\r\n")
            data = self.UPGRADE.sub(b"", head + end) + body
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self.in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self.in_body = False
        super().on_message_complete()


def exit_with(message: object, code: int) -> NoReturn:
    if sys.stderr is not None:
        print(message, file=sys.stderr)
    sys.exit(code)


def configured_app() -> tuple[Settings, ASGIApp]:
    """The app of the environment; a wrong one ends the process, with a line for each mistake."""
    try:
        settings = Settings.from_env(environment())
        return settings, create_app(settings)
    except ConfigError as exc:
        exit_with(exc, 2)


def main() -> None:
    settings, app = configured_app()
    host, port = settings.api_host, settings.api_port
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
        # uvloop does this by itself, asyncio would hold small writes back for 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except (OSError, UnicodeError) as exc:
        exit_with(f"cannot listen on API_HOST={host} API_PORT={port}: {exc}", 1)
    name = f"[{host}]" if ":" in host else host
    log.info("listening", url=f"http://{name}:{listener.getsockname()[1]}")
    if not (is_loopback(host) or settings.api_token or settings.jwt_secret):
        log.warning("anyone who can reach this address may ask", remedy="set API_TOKEN")
    config = uvicorn.Config(
        app,
        http=HTTPProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=30,
    )

    async def serve() -> None:
        # Only now: an earlier interrupt ends the process without a word, but one that cuts asks
        # must let that be logged.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        await uvicorn.Server(config).serve(sockets=[listener])

    runner = asyncio.Runner(loop_factory=config.get_loop_factory())
    with suppress(KeyboardInterrupt), runner:
        runner.run(serve())


@cache
def default_app() -> ASGIApp:
    return configured_app()[1]


def __getattr__(name: str) -> ASGIApp:
    """`uvicorn service:app` finds its app here (PEP 562), so that an import starts nothing."""
    if name == "app":
        return default_app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    main()
