"""A small back end between browser apps and any OpenAI-compatible API.

    POST /ask                  -> middleware -> endpoint -> Exchange -> the model's API
    POST /v1/chat/completions     400, 403,     401, 408,   429, 502, 503, 504; from the
    POST /v1/responses            500           413, 415,   first byte on, an error in the
                                                422         stream
    GET /, /status, /logs, /metrics, /v1/models, /openapi.json, /docs, /redoc

Run it with `python service.py` or `uvicorn service:app`; .env.example lists every setting.

The file reads from top to bottom, each room using only those above it: Settings; the log;
errors; callers; requests; the upstream's answer; formats, which is how it looks to the client;
Upstream; Metrics; Exchange, which is one answer from its acceptance to its closing event;
endpoints; middleware; then, for a second reading, LogDatabase, the demo model, OpenAPI and the
page; last the lifespan, create_app and main.
"""

import asyncio
import base64
import bisect
import codecs
import email.utils
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
import ssl
import string
import sys
import time
import zlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from http import HTTPStatus
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypeVar, cast, get_args
from urllib.parse import urlsplit

import httpx2
import structlog
import uvicorn
from dotenv.parser import parse_stream
from openai import AsyncOpenAI, DefaultAioHttpClient
from openai.types import Model
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from pydantic import (
    MISSING,
    AfterValidator,
    AnyUrl,
    BaseModel,
    BeforeValidator,
    FailFast,
    Field,
    HttpUrl,
    JsonValue,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticCustomError, from_json
from pydantic_core import to_json as encode_json
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, get_contextvars
from structlog.types import EventDict, FilteringBoundLogger, WrappedLogger
from typing_extensions import TypedDict
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

VERSION = "1.0.0"
JSON, PROBLEM, SSE = "application/json", "application/problem+json", "text/event-stream"


def at_start(word: str) -> str:
    """*word* where no letter or digit precedes it, but that of a line end's repr or of a `%20`."""
    return rf"{word}(?:(?<![A-Za-z0-9]{word})|(?<=\\[nrt]{word})|(?<=%20{word}))"


# A key of OpenAI's, a bearer token, a JSON Web Token (base64url of `{"`). None of the three ever
# matches only to fail at its end, so that a long text takes time in proportion to its length.
KEY_SHAPED = (
    rf"{at_start('sk-')}[\w*.-]+|{at_start('[Bb]')}(?i:earer)\s++[^\s\"',]+"
    rf"|{at_start('eyJ')}[\w-]{{7,}}[\w.-]*"
)
MAX_UPSTREAM_BYTES = 32 * 2**20
MAX_HEAD_BYTES = 64 * 2**10

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
JsonObject = dict[str, JsonValue]
M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

log: FilteringBoundLogger = structlog.get_logger()
to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
# At these many readers split lines: Python's splitlines, httpx's and requests' iter_lines.
ODD_LINE_ENDS = re.compile("[\x85\u2028\u2029]")


def utf8_json(text: str) -> bytes:
    r"""JSON in UTF-8, with `\u` escapes for half surrogate pairs and for ODD_LINE_ENDS."""
    if not text.isascii():
        text = ODD_LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
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


def split(value: object) -> object:
    """The items of a string that are separated by commas; empty ones do not count."""
    if not isinstance(value, str):
        return value
    return tuple(item.strip() for item in value.split(",") if item.strip())


def number(pattern: str, value: object) -> object:
    """Only text that matches *pattern*: int() and float() take `1_0`, `+5` and `1e3` too."""
    if isinstance(value, str) and not re.fullmatch(pattern, value):
        raise PydanticCustomError("digits", "Input should be a number in plain digits")
    return value


def http_port(value: str) -> int | None:
    """The port of a URL; raises ValueError for one that pydantic or httpx2 refuses."""
    host = urlsplit(value).hostname or ""
    if value != value.strip() or (re.fullmatch("[0-9.]+", host) and not parse_ip(host)):
        raise ValueError  # pydantic strips the one, and takes the other, such as 10.0.0.010
    return HttpUrl(value).port


def base_url(value: str) -> str:
    """A base URL: no password, no query; a slash at its end is dropped."""
    plain = re.fullmatch(r"(?ai)https?://[\w.:\[\]-]+(/[^\s?#]*)?", value) and value.isprintable()
    if not plain or not http_port(value):
        raise ValueError
    return value.rstrip("/")


def browser_origin(value: str) -> str:
    """An origin as browsers send it: lower case, no default port, its host in ASCII (RFC 6454)."""
    if value == "*":
        return value
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s,/\\@?#*]+", value):
        raise ValueError
    return str(AnyUrl(value.lower())).removesuffix("/")


# The fields of a request to the model that are the service's own business.
OWN_FIELDS = {"model", "messages", "stream", "stream_options"}


def extra_body(value: object) -> object:
    if isinstance(value, str):
        value = from_json(value, allow_inf_nan=False)
        to_json(value)  # refuses 1e999, which is read as infinity
        if not isinstance(value, dict) or not OWN_FIELDS.isdisjoint(value):
            raise ValueError
    return value


def accepted(default: Any, what: str, *, hidden: bool = False, **bounds: Any) -> Any:
    """A field that accepts *what*; a hidden one is or may hold a secret."""
    return Field(default, description=what, repr=not hidden, **bounds)


def whole(default: int | None, low: int, high: int) -> Any:
    return accepted(default, f"a whole number from {low} to {high}", ge=low, le=high)


def seconds(default: float, low: float) -> Any:
    what = f"a number of seconds from {low:g} to 999999"
    return accepted(default, what, ge=low, le=999_999, allow_inf_nan=False)


def secret() -> Any:
    what = "made of visible ASCII characters only"
    return accepted("", what, hidden=True, pattern="^[!-~]*$")


Items = Annotated[tuple[T, ...], BeforeValidator(split)]
Whole = Annotated[int, BeforeValidator(partial(number, "[0-9]{1,15}"))]
Seconds = Annotated[float, BeforeValidator(partial(number, r"[0-9]{1,6}(\.[0-9]{1,6})?"))]
LevelName = Annotated[Level, BeforeValidator(lambda text: text.upper() if text.isascii() else text)]
Text = Annotated[str, AfterValidator(lambda text: text.encode().decode())]  # no half surrogates
DefaultModel = Annotated[str, Field(pattern=r"^\P{C}+$", max_length=256)]
ModelName = Annotated[str, Field(pattern="^[!-~]{1,256}$")]
BaseURL = Annotated[str, AfterValidator(base_url)]
ExtraBody = Annotated[JsonObject | None, BeforeValidator(extra_body)]
Address = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:%-]{1,253}$")]
Origin = Annotated[str, AfterValidator(browser_origin)]
Host = Annotated[str, Field(pattern=r"^([A-Za-z0-9_.-]{1,253}|\*)$"), AfterValidator(str.lower)]


class Settings(BaseModel, frozen=True, alias_generator=str.upper, validate_by_name=True):
    """What the environment says; each field is the variable of the same name in capitals."""

    openai_api_key: str = secret()
    openai_model: DefaultModel = accepted("gpt-5.4-mini", "the name of a model")
    openai_models: Items[ModelName] = accepted((), "names of models separated by commas")
    openai_base_url: BaseURL = accepted(
        "https://api.openai.com/v1", "an http:// or https:// URL without a password"
    )
    openai_timeout: Seconds = seconds(120, 0.001)
    openai_max_retries: Whole = whole(2, 0, 100)
    openai_extra_body: ExtraBody = accepted(
        None, f"a JSON object without {', '.join(sorted(OWN_FIELDS))}", hidden=True
    )
    system_prompt: Text = accepted("", "text in UTF-8", hidden=True)
    max_output_tokens: Whole | None = whole(None, 1, 1_000_000_000)
    api_host: Address = accepted("127.0.0.1", "a host name or an IP address")
    api_port: Whole = whole(8000, 0, 65535)
    max_concurrent_asks: Whole = whole(1000, 1, 1_000_000)
    max_body_bytes: Whole = whole(1_048_576, 1, 1_000_000_000)
    heartbeat_seconds: Seconds = seconds(15, 0.1)
    client_timeout: Seconds = seconds(60, 0.001)
    cors_origins: Items[Origin] = accepted(
        ("http://localhost:4200", "http://localhost:4201"),
        "origins such as https://app.example.com separated by commas, or *",
    )
    allowed_hosts: Items[Host] = accepted((), "host names separated by commas, or *")
    api_token: str = secret()
    jwt_secret: bytes = accepted(b"", "at least 32 bytes in UTF-8", hidden=True, min_length=32)
    jwt_audience: Text = accepted("", "text in UTF-8")
    admin_token: str = secret()
    rate_limit: Whole = whole(0, 0, 1_000_000)
    daily_tokens: Whole = whole(0, 0, 10**15 - 1)
    log_level: LevelName = accepted("INFO", f"one of {', '.join(get_args(Level))}")
    log_buffer_size: Whole = whole(1000, 1, 100_000)
    log_database: Text = accepted("", "a path in UTF-8")

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Settings":
        """Settings from the variables in *env*; raises ConfigError, a line for every wrong one."""
        # White space alone is not nothing, as a token least of all.
        given = {name: value.strip() or value for name, value in set_ones(env).items()}
        wrong = list(library_complaints(env))
        try:
            settings = cls.model_validate(given, by_name=False)
        except ValidationError as exc:
            names = dict.fromkeys(str(error["loc"][0]) for error in exc.errors(include_url=False))
            wrong = [*(cls.complaint(name, given[name]) for name in names), *wrong]
        if wrong:
            raise ConfigError("\n".join(wrong))
        return settings

    @classmethod
    def complaint(cls, name: str, value: str) -> str:
        known = cls.model_fields[name.lower()]
        if name == "OPENAI_BASE_URL":  # whatever may be a password, or a key in a query
            value = re.sub(r"(?s)(?<=//).*@|^(?!\w+://).*@", "***@", value).partition("?")[0]
        shown = re.sub(KEY_SHAPED, "***", ascii(value[:100])) if known.repr else "its value"
        return f"{name}: {shown} is not {known.description}"

    @property
    def demo(self) -> bool:
        return self.openai_api_key.lower() == "demo"

    @property
    def models(self) -> tuple[str, ...]:
        """The models that a request may name, each once."""
        return tuple(dict.fromkeys((self.openai_model, *self.openai_models)))

    @property
    def wants_token(self) -> bool:
        return bool(self.api_token or self.jwt_secret)

    @property
    def token_field(self) -> str:
        """Where the model takes max_tokens: Ollama, for one, silently ignores the newer name."""
        newer = self.api_domain in {"openai.com", "azure.com"}
        return "max_completion_tokens" if newer else "max_tokens"

    @property
    def api_domain(self) -> str:
        return ".".join((urlsplit(self.openai_base_url).hostname or "").split(".")[-2:])


def library_complaints(env: Mapping[str, str]) -> Iterator[str]:
    """A line for each variable of the libraries' that would end in a traceback, or fail asks."""
    proxies = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    for name in filter(env.get, (*proxies, *map(str.lower, proxies))):
        with suppress(ValueError):
            if http_port(env[name] if "://" in env[name] else f"http://{env[name]}"):
                continue
        yield f"{name}: its value is not the http:// or https:// URL of a proxy"
    for name in filter(env.get, ("SSL_CERT_FILE", "SSLKEYLOGFILE")):
        try:
            ssl.create_default_context(cafile=env.get("SSL_CERT_FILE") or None)
        except (OSError, ValueError) as exc:
            yield f"{name}: {env[name]!a} cannot be used: {exc}"
    patterns = {"WEB_CONCURRENCY": "[0-9]+", "OPENAI_ORG_ID": "[!-~]+"}
    patterns |= {"OPENAI_PROJECT_ID": "[!-~]+", "OPENAI_CUSTOM_HEADERS": "[ -~\n]+"}
    for name, pattern in patterns.items():
        if (value := env.get(name)) and not re.fullmatch(pattern, value):
            yield f"{name}: its value does not match {pattern!a}"


def read_env_file() -> dict[str, str]:
    """The variables in `.env`, as they are written; raises ConfigError for what is no variable.

    Not by dotenv_values, which passes over a line that it cannot parse, and expands `${x}`.
    """
    try:
        with open(".env", encoding="utf-8-sig") as file:
            bindings = list(parse_stream(file))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f".env cannot be read: {exc}") from exc
    variables, wrong = dict[str, str](), []
    for key, value, (text, line), error in bindings:
        if key and value is not None and not error:
            variables[key] = value
        elif key or error:  # a name alone is no assignment, though python-dotenv takes it
            empty_lines = text.count("\n", 0, len(text) - len(text.lstrip()))  # above it
            wrong.append(f".env: line {line + empty_lines} cannot be parsed")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return variables


def set_ones(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that count as set: of the empty ones CORS_ORIGINS alone, which means none."""
    return {name: value for name, value in env.items() if value or name == "CORS_ORIGINS"}


def environment() -> dict[str, str]:
    """The `.env` of the working directory under the real environment."""
    return read_env_file() | set_ones(os.environ)


class LogEvent(TypedDict):
    """`metadata` holds all other keys of the event."""

    timestamp: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    level: Level
    message: str
    metadata: JsonObject | None


class Throttle:
    """Of what strangers cause, lets one event a second and kind pass; tells how many it drops."""

    def __init__(self) -> None:
        # By kind: when one passed last, and how many were left out since.
        self.seen: dict[str, tuple[float, int]] = {}

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        kind = event.pop("stranger", None)
        if kind is None:
            return event
        now = time.monotonic()
        last, suppressed = self.seen.get(kind, (-math.inf, 0))
        if now < last + 1:
            self.seen[kind] = last, suppressed + 1
            raise structlog.DropEvent
        self.seen[kind] = now, 0
        return {**event, "suppressed": suppressed} if suppressed else event


class Mask:
    """Masks secrets and cuts values to 2,000 characters."""

    def __init__(self, settings: Settings) -> None:
        own = [settings.openai_api_key, settings.api_token]
        own += [settings.admin_token, settings.jwt_secret.decode()]
        # A value so short that it may be any word cannot be hidden.
        known = [re.escape(each) for each in sorted(own, key=len, reverse=True) if len(each) >= 8]
        self.pattern = re.compile("|".join([*known, KEY_SHAPED]))

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        timestamp, message = event.pop("timestamp"), event.pop("event")
        event = {"timestamp": timestamp, "level": method.upper(), "message": message, **event}
        return {key: self.value(value) for key, value in event.items()}

    def text(self, text: str) -> str:
        masked = self.pattern.sub("***", text)
        # Head and tail, because a traceback says most in its last line.
        return masked if len(masked) <= 2000 else f"{masked[:997]} [...] {masked[-996:]}"

    def value(self, value: object) -> JsonValue:
        """*value* as JSON can have it, with 100 entries a level at most."""
        if isinstance(value, int | None) or (isinstance(value, float) and math.isfinite(value)):
            return value
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value[:100]]
        if isinstance(value, dict):
            pairs = itertools.islice(value.items(), 100)
            return {self.text(str(key)): self.value(item) for key, item in pairs}
        return self.text(value if isinstance(value, str) else repr(value))


def as_log_event(event: EventDict) -> LogEvent:
    rest = {**event}
    timestamp, level, message = map(rest.pop, ("timestamp", "level", "message"))
    return {"timestamp": timestamp, "level": level, "message": message, "metadata": rest or None}


class EventLog:
    """The newest log events: a structlog processor that keeps each in a bounded deque."""

    def __init__(self, capacity: int) -> None:
        self.events: deque[LogEvent] = deque(maxlen=capacity)

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        self.events.append(as_log_event(event))
        return event

    async def tail(self, *, level: str | None, limit: int) -> list[LogEvent]:
        """The newest *limit* events, of one level where one is given, oldest first."""
        newest_first = reversed(list(self.events))  # a copy: other threads may log meanwhile
        wanted = (event for event in newest_first if level in (None, event["level"]))
        return list(itertools.islice(wanted, limit))[::-1]


class StdoutLogger:
    """Standard output; when that is gone, the ring still has the event."""

    def msg(self, line: str) -> None:
        if sys.stdout is not None:  # as under `>&-`
            with suppress(OSError, ValueError):
                # In one write, unlike print: processes may share the output.
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()

    debug = info = warning = error = critical = msg


class StructlogHandler(logging.Handler):
    """Puts through structlog what the libraries log."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message, level = record.getMessage(), min(50, record.levelno // 10 * 10)
        except Exception:
            self.handleError(record)  # as the standard handlers, where arguments do not fit
            return
        server = record.name == "uvicorn.error"
        # Answers cut short by a stop or by us: `ask cancelled` or `ask failed` has said so.
        text = f"{message} {record.exc_info}"
        if server and ("CancelledError" in text or "without completing response" in text):
            return
        # uvicorn's warnings are about bytes that anyone can send.
        stranger = "uvicorn" if server and level == logging.WARNING else None
        log.log(level, message.strip(), exc_info=record.exc_info, stranger=stranger)


def escape_controls(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Escapes for control characters, which a terminal would obey, and for half surrogate pairs."""
    for key, value in event.items():
        if isinstance(value, str):  # the renderer shows the repr of all else
            line_end = "" if key == "exception" else r"|\n"  # a traceback keeps its lines
            unsafe = r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]" + line_end
            event[key] = re.sub(unsafe, lambda found: ascii(found[0])[1:-1], value)
    return event


def renderers() -> list[Callable[[Any, str, EventDict], EventDict | str]]:
    """Coloured lines for a terminal, JSON for anyone else."""
    if sys.stdout is None or not sys.stdout.isatty():
        return [lambda _, __, event: json.dumps(event)]  # five times as fast as JSONRenderer
    styles = structlog.dev.ConsoleRenderer.get_default_level_styles()
    console = structlog.dev.ConsoleRenderer(
        event_key="message",
        level_styles={name.upper(): style for name, style in styles.items()},
        exception_formatter=structlog.dev.plain_traceback,
    )
    return [escape_controls, console]


def configure_logging(level: str, *sinks: Callable[[Any, str, EventDict], EventDict]) -> None:
    """Send what anyone in this process logs through *sinks* to standard output."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            Throttle(),
            structlog.processors.TimeStamper("%Y-%m-%dT%H:%M:%S.%fZ"),
            structlog.processors.format_exc_info,
            *sinks,
            *renderers(),
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


# The status and the sentence of each. What a visitor of an app can meet speaks to that person.
ERRORS: dict[str, tuple[int, str]] = {
    "invalid_json": (400, "The body must be one JSON object in UTF-8."),
    "host_not_allowed": (400, "This Host is not served here; ALLOWED_HOSTS can name further ones."),
    "upgrade_not_supported": (
        400,
        "Only HTTP/1.1 is spoken here: send no Upgrade header (Java: "
        "HttpClient.newBuilder().version(HTTP_1_1); curl: --http1.1).",
    ),
    "upstream_rejected": (400, "The model's API refused this request."),
    "unauthorized": (401, "You need to sign in to ask, or to sign in again."),
    "origin_not_allowed": (403, "This origin may not call; CORS_ORIGINS names those that may."),
    "not_found": (404, "There is nothing at this path."),
    "model_not_found": (404, "This model may not be named here; see GET /v1/models."),
    "method_not_allowed": (405, "This path does not take this method; see the Allow header."),
    "request_timeout": (408, "The body did not arrive within CLIENT_TIMEOUT."),
    "body_too_large": (413, "The body is larger than MAX_BODY_BYTES."),
    "unsupported_media_type": (415, "The body must be sent as application/json."),
    "invalid_request": (422, "Something in this question is missing or cannot be used."),
    "rate_limited": (429, "The model has had too many questions; try again later."),
    "too_many_asks": (429, "Too many questions at once; try again in {} s."),
    "budget_exhausted": (429, "No more questions can be answered today; try again tomorrow."),
    "internal_error": (500, "The service failed; its log says why, under this request_id."),
    "upstream_auth": (502, "The model is not available: its provider refused this service."),
    "upstream_unreachable": (502, "The model cannot be reached right now; try again later."),
    "upstream_error": (502, "The model failed or broke off its answer; try again."),
    "not_configured": (503, "No model has been set up here yet."),
    "overloaded": (503, "Too many questions are being answered right now; try again shortly."),
    "upstream_timeout": (504, "The model took too long to answer; try again."),
}
Code = Annotated[str, Field(json_schema_extra={"enum": [*ERRORS]})]
TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}  # RFC 9110's, as of Python 3.13


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
    """`code`, `type` and `param` are the model provider's own where it refused the request."""

    message: str
    type: str
    param: str | None
    code: str
    innererror: NotRequired[JsonObject]


class OpenAIErrorBody(TypedDict):
    """Why a request under `/v1` failed, in the shape that OpenAI's libraries read."""

    error: OpenAIErrorDetail


@dataclass(frozen=True)
class UpstreamError:
    """What the model's API says of a failure; *status* is its answer's, or told by the error."""

    status: int | None
    message: str = ""
    code: str | None = None
    param: str | None = None
    type: str | None = None
    innererror: JsonObject | None = None
    retry_after: int | None = None
    in_answer: bool = False  # it came in a 200


def integral(value: object) -> object:
    """1.0 as 1: to JSON Schema it is an integer (section 6.1.1)."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def parse_retry_after(value: str) -> int | None:
    """Whole seconds of a Retry-After header, or to its date (RFC 9110, 10.2.3); a day at most."""
    with suppress(ValueError, OverflowError):  # 1e400 is infinity
        date = None if value[:1].isdigit() else email.utils.parsedate_to_datetime(value)
        delay = date.timestamp() - time.time() if date else float(value)
        return min(max(0, math.ceil(delay)), 86400)
    return None


def parse_json(data: bytes | str) -> Any:
    """JSON as upstreams write it, with half surrogate pairs and bad UTF-8; else ValueError."""
    with suppress(ValueError):
        return from_json(data)
    text = data.decode("utf-8-sig", "replace") if isinstance(data, bytes) else data
    try:
        return json.loads(text)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc


def error_message(error: Any, depth: int = 0) -> str:
    """The sentence in *error*: the body of a refusal, or a part of it, in whatever form."""
    if depth > 8 or not isinstance(error, str | list | dict):
        return ""
    deeper = partial(error_message, depth=depth + 1)
    if isinstance(error, list):
        return "; ".join(filter(None, map(deeper, error[:10])))
    if isinstance(error, str):
        with suppress(ValueError):  # some quote another server's JSON, some a proxy's page
            if error.lstrip()[:1] in {"{", "["}:
                return deeper(parse_json(error))
        page = r"\A[\ufeff\s]*<|<(?:!doctype|html|head|body)\b"
        return "" if re.search(page, error, re.IGNORECASE) else error.strip()
    raw, base, where = map(error.get, ("metadata", "base_resp", "loc"))
    parts = [
        isinstance(raw, dict) and raw.get("raw"),  # OpenRouter's
        *(each for name in ("error", "errors") if isinstance(each := error.get(name), dict | list)),
        *map(error.get, ("message", "error_message", "detail", "msg", "error", "errors")),
        isinstance(base, dict) and base.get("status_msg"),  # MiniMax's
    ]
    message = next(filter(None, map(deeper, parts)), "")
    # FastAPI's
    return f"{'.'.join(map(str, where))}: {message}" if isinstance(where, list) else message


def read_error(value: Any, status: int | None = None, retry_after: str = "") -> UpstreamError:
    """What the body of a refusal with *status*, or an error in a 200, says.

    What stands deeper in it, in `error` for instance, is the nearer.
    """
    in_answer, error = status is None, value
    fields: dict[str, Any] = {}
    while isinstance(error, dict | list) and error:
        if isinstance(error, list):
            error = error[0]
            continue
        told = map(error.get, ("code", "status", "status_code", "statusCode"))
        codes = (int(n) for n in map(str, map(integral, told)) if re.fullmatch("[45][0-9]{2}", n))
        status = status or next(codes, None)
        fields |= error
        inner_parts = map(error.get, ("error", "errors", "detail", "message"))
        error = next((each for each in inner_parts if isinstance(each, dict | list)), None)
    kinds = {"code": str, "param": str, "type": str, "innererror": dict}
    more = {n: fields[n] for n, kind in kinds.items() if isinstance(fields.get(n), kind)}
    more["retry_after"] = parse_retry_after(retry_after)
    return UpstreamError(status, error_message(value), in_answer=in_answer, **more)


ABOUT_THE_REQUEST = {"upstream_rejected", "rate_limited"}


@dataclass(eq=False)
class Failure(HTTPException):
    """One of ERRORS: a status before the first byte of an answer, an event after it.

    For the log: *upstream* is what the model's API said, *cause* the class of what else failed.
    """

    code: Code
    detail: str = ""
    headers: Mapping[str, str] | None = None
    retry_after: int | None = None
    errors: list[FieldError] = field(default_factory=list)
    upstream: UpstreamError | None = None
    cause: str | None = None

    def __post_init__(self) -> None:
        status, sentence = ERRORS[self.code]
        waiting = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        detail = self.detail or sentence.format(self.retry_after)
        super().__init__(status, detail, {**(self.headers or {}), **waiting})
        self.title = TITLES.get(status) or HTTPStatus(status).phrase

    def mask(self, mask: Mask) -> None:
        """Mask what the model's API said: it may quote a key."""
        if self.upstream:
            shown: dict[str, Any] = {k: mask.value(v) for k, v in vars(self.upstream).items()}
            self.upstream, self.detail = UpstreamError(**shown), mask.text(self.detail)

    def problem(self, request_id: str) -> Problem:
        problem = Problem(
            title=self.title,
            status=self.status_code,
            detail=self.detail,
            code=self.code,
            request_id=request_id,
        )
        return {**problem, "errors": self.errors} if self.errors else problem

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

    @property
    def theirs(self) -> UpstreamError:
        """What the model's API said of this very request, which programs branch on."""
        return (self.code in ABOUT_THE_REQUEST and self.upstream) or UpstreamError(None)

    def openai_error(self) -> OpenAIErrorBody:
        theirs, fields = self.theirs, self.errors if self.code == "invalid_request" else []
        wrong = "; ".join(f"{each['field']}: {each['detail']}" for each in fields)
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        usual = "server_error" if self.status_code >= 500 else "invalid_request_error"
        error = OpenAIErrorDetail(
            message=wrong or self.detail,
            type=theirs.type or kinds.get(self.status_code, usual),
            param=self.errors[0]["field"] if self.errors else theirs.param,
            code=theirs.code or self.code,
        )
        if theirs.innererror:
            error["innererror"] = theirs.innererror
        return {"error": error}


# The upstream's status as a code of ours; every other one is an upstream_error.
UPSTREAM_CODES: dict[int | None, Code] = {
    **dict.fromkeys((400, 402, 404, 413, 422), "upstream_rejected"),
    **dict.fromkeys((401, 403), "upstream_auth"),
    429: "rate_limited",
}


def from_upstream(error: UpstreamError) -> Failure:
    """*error* as ours; its message only where it is about the client's own request."""
    code = UPSTREAM_CODES.get(error.status, "upstream_error")
    told = error.message if code in ABOUT_THE_REQUEST else ""
    waits = error.retry_after if error.status in {429, 503, 529} else None
    return Failure(code, told, retry_after=waits, upstream=error)


def json_response(value: object, status: int = 200, media_type: str = JSON) -> Response:
    return Response(utf8_json(to_json(value)), status, media_type=media_type)


V1_PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/models")
ASK_PATHS = frozenset({"/ask", *V1_PATHS[:2]})


def route_path(scope: Scope) -> str:
    """The path of the request, without the prefix that `--root-path` names."""
    return cast(str, scope["path"]).removeprefix(scope.get("root_path", ""))


def failure_response(scope: Scope, failure: Failure) -> Response:
    """Problem JSON, but under `/v1` what OpenAI's libraries read."""
    if f"{route_path(scope)}/".startswith("/v1/"):
        theirs = failure.theirs.status
        status = theirs if theirs in {404, 413, 422} else failure.status_code
        response = json_response(failure.openai_error(), status)
    else:
        problem = failure.problem(get_contextvars()["request_id"])
        response = json_response(problem, failure.status_code, PROBLEM)
    response.headers.update(failure.headers or {})
    return response


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: *user* is the `sub` of a JSON Web Token, *key* what RATE_LIMIT counts by."""

    key: str
    user: str | None = None
    # Nobody who showed a valid token.
    stranger: bool = True


def bearer_token(request: Request[Any]) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def is_secret(given: str, secret: str) -> bool:
    """Whether *given* is *secret*, if there is one; the time it takes does not tell how nearly."""
    return bool(secret) and secrets.compare_digest(given.encode(), secret.encode())


def verify_jwt(token: str, secret: bytes, audience: str, now: float) -> str:
    """The `sub` of a token valid at *now* (RFC 7519), HS256 alone; else ValueError says why."""
    if len(token) > 8192 or not re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+", token, re.ASCII):
        raise ValueError("not three parts of base64url, 8,192 characters at most")
    signed, _, signature = token.rpartition(".")
    parts = (base64.urlsafe_b64decode(part + "==") for part in signed.split("."))
    header, claims = (from_json(part, allow_inf_nan=False) for part in parts)
    if not isinstance(header, dict) or header.get("alg") != "HS256" or "crit" in header:
        raise ValueError("its header does not ask for plain HS256")
    digest = hmac.digest(secret, signed.encode(), "sha256")
    # Compared as text: the last character has bits to spare, and only one form is right.
    if not is_secret(signature, base64.urlsafe_b64encode(digest).decode().rstrip("=")):
        raise ValueError("its signature is wrong")
    if not isinstance(claims, dict):
        raise ValueError("its claims are no object")
    return valid_subject(claims, audience, now)


def valid_subject(claims: dict[str, Any], audience: str, now: float) -> str:
    """The `sub` of *claims* that hold at *now*, give or take 30 s; else ValueError."""
    expires: Any = claims.get("exp")
    begins: Any = claims.get("nbf", now)
    accepted, subject = claims.get("aud"), claims.get("sub")
    holds = {  # not isinstance, to which a bool is a number
        "exp": type(expires) in (int, float) and now - 30 < expires < math.inf,
        "nbf": type(begins) in (int, float) and begins <= now + 30,
        "aud": not audience or audience in (accepted if isinstance(accepted, list) else [accepted]),
        "sub": isinstance(subject, str) and 1 <= len(subject) <= 256,
    }
    if wrong := [name for name, right in holds.items() if not right]:
        raise ValueError(f"wrong or missing: {', '.join(wrong)}")
    return cast(str, subject)


@lru_cache
def address_key(host: str) -> str:
    """What RATE_LIMIT counts by for a client's address; of IPv6 a subscriber has a whole /64."""
    ip = parse_ip(host)
    return str(ip_network((ip, 64), strict=False) if isinstance(ip, IPv6Address) else ip or host)


def identify(request: Request["AppState"]) -> Caller:
    """The caller, also in the scope; raises 401 where a token is wanted and none is valid."""
    settings, token = request.state["settings"], bearer_token(request)
    caller = Caller(address_key(request.client.host[:64] if request.client else ""))
    if is_secret(token, settings.api_token):
        caller = Caller(caller.key, stranger=False)
    elif settings.wants_token:
        user = signed_in_user(settings, token)
        caller = Caller(f"user {user}", user, stranger=False)
    # Where Starlette's own authentication keeps it: the log tells strangers apart.
    request.scope["user"] = caller
    return caller


def signed_in_user(settings: Settings, token: str) -> str:
    if settings.jwt_secret:
        try:
            return verify_jwt(token, settings.jwt_secret, settings.jwt_audience, time.time())
        except ValueError as exc:
            log.info("token refused", reason=str(exc), stranger="token")
    raise Failure("unauthorized", headers={"WWW-Authenticate": "Bearer"})


def require_operator(request: Request["AppState"]) -> None:
    """Raises 401 unless the request may read the log: pages must not, with the token they carry."""
    settings = request.state["settings"]
    wanted = settings.admin_token or settings.api_token
    closed = wanted or settings.jwt_secret
    if closed and not is_secret(bearer_token(request), wanted):
        raise Failure("unauthorized", headers={"WWW-Authenticate": "Bearer"})


class RateLimiter:
    """RATE_LIMIT: a minute's worth of asks at once, and then evenly (GCRA, ITU-T I.371).

    It keeps when each of the 10,000 latest callers has its whole minute's worth again.
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
    """DAILY_TOKENS of all callers together, by the day in UTC.

    *reserved* are the estimates of what is under way. LogDatabase shares *used* with other
    processes: it takes what is *unshared*, and learns what all have used.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.day = self.used = self.unshared = self.reserved = 0
        self.warned = 0  # the day on which one of the processes has

    def turn_page(self) -> None:
        today = int(time.time() // 86400)
        if today != self.day:
            self.day, self.used, self.unshared = today, 0, 0

    def wait(self) -> int:
        """Seconds until midnight where the budget is exhausted, else 0."""
        self.turn_page()
        exhausted = self.limit and self.used + self.reserved >= self.limit
        return math.ceil(86400 - time.time() % 86400) if exhausted else 0

    def spend(self, tokens: int) -> None:
        self.turn_page()
        self.unshared += tokens
        self.used += tokens
        self.warn(self.used - tokens)

    def learn(self, used: int, tokens: int) -> None:
        """All processes have *used* so many today, *tokens* of them this one just now."""
        self.used = used + self.unshared
        self.warn(used - tokens)

    def warn(self, before: int) -> None:
        """Log it where the budget is exhausted now, and was not *before*: then another has."""
        if 0 < self.limit <= self.used and self.warned != self.day:
            self.warned = self.day
            if before < self.limit:
                log.warning("budget exhausted", daily_tokens=self.limit, used=self.used)


class AskCounts(TypedDict):
    """The asks accepted since the start."""

    active: int
    total: int
    failed: int
    cancelled: int


Outcome = Literal["finished", "cancelled", "failed"]


class Admission:
    """What an ask must pass last: a key, a caller's rate, the budget of all, and a free place."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.limiter = RateLimiter(settings.rate_limit)
        self.budget = DailyBudget(settings.daily_tokens)
        self.asks = AskCounts(active=0, total=0, failed=0, cancelled=0)

    def admit(self, caller: Caller, estimate: int) -> None:
        """Takes a place, one of the caller's asks and *estimate* tokens, or raises a Failure."""
        if not self.settings.openai_api_key:
            raise Failure("not_configured")
        now = time.monotonic()
        if wait := self.limiter.wait(caller.key, now):
            raise Failure("too_many_asks", retry_after=wait)
        if wait := self.budget.wait():
            raise Failure("budget_exhausted", retry_after=wait)
        if self.asks["active"] >= self.settings.max_concurrent_asks:
            raise Failure("overloaded", retry_after=1)
        self.limiter.take(caller.key, now)
        self.budget.reserved += estimate
        self.asks["active"] += 1
        self.asks["total"] += 1

    def leave(self, outcome: Outcome, estimate: int, tokens: int) -> None:
        """Gives back what *admit* took, and spends *tokens*."""
        self.asks["active"] -= 1
        if outcome != "finished":
            self.asks[outcome] += 1
        self.budget.reserved -= estimate
        self.budget.spend(tokens)


class Turn(BaseModel, strict=True, extra="forbid"):
    """One earlier turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Ask(BaseModel, strict=True, extra="forbid"):
    """What is left out is not sent to the model, whose own default then holds."""

    prompt: str = Field(pattern=r"\S", description="What the user says now; not blank.")
    history: Annotated[list[Turn], FailFast()] = Field(
        [], max_length=1000, description="Earlier turns, oldest first."
    )
    model: str | MISSING = Field(MISSING, description="Left out: OPENAI_MODEL.")
    temperature: Annotated[float, Field(ge=0, le=2)] | MISSING = MISSING
    # The bound first: behind a validator it would be lost to the schema.
    max_tokens: Annotated[int, Field(ge=1), BeforeValidator(integral)] | MISSING = Field(
        MISSING, description="Upper bound on what the model may write."
    )
    stream: bool | MISSING = Field(
        MISSING,
        description="Left out, it is false where Accept is application/json alone.",
        json_schema_extra={"default": True},
    )


class ChatCompletionRequest(BaseModel, strict=True, extra="allow"):
    """OpenAI's own request; further fields (tools, images, ...) go upstream as they come."""

    model: str | MISSING = Field(MISSING, description="Left out: OPENAI_MODEL.")
    messages: list[Any] = Field(min_length=1, json_schema_extra={"items": {"type": "object"}})
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None


class ResponsesRequest(BaseModel, strict=True, extra="allow"):
    """OpenAI's own request; further fields (tools, text, ...) go upstream as they come."""

    model: str | MISSING = Field(MISSING, description="Left out: OPENAI_MODEL.")
    input: Annotated[str, Field(min_length=1)] | Annotated[list[Any], Field(min_length=1)]
    stream: bool | None = None
    background: Literal[False] | None = None


class LogsQuery(BaseModel):
    limit: Whole = Field(100, ge=1, le=1000, description="At most so many events, the newest.")
    level: LevelName | MISSING = Field(MISSING, description="Exactly this one, in any case.")


class RequestModels(NamedTuple):
    """The requests within the bounds that the operator has set."""

    ask: type[Ask]
    chat: type[ChatCompletionRequest]
    newer: type[ResponsesRequest]


def request_models(settings: Settings) -> RequestModels:
    literal: Any = Literal  # of which mypy wants the values written out
    known = Ask.model_fields
    ask: dict[str, Any] = {"model": (literal[settings.models] | MISSING, known["model"])}
    chat: dict[str, Any] = {}
    newer: dict[str, Any] = {}
    if settings.system_prompt:
        roles: Any = Literal["user", "assistant"]
        turn: Any = create_model("Turn", __base__=Turn, role=(roles, ...))
        ask["history"] = (Annotated[list[turn], FailFast()], known["history"])
        # A stored template may hold a message of the operator's kind as well.
        newer["instructions"] = newer["prompt"] = (None, None)
    if limit := settings.max_output_tokens:
        bound: Any = Annotated[int, Field(ge=1, le=limit), BeforeValidator(integral)]
        one: Any = Annotated[int, Field(ge=1, le=1), BeforeValidator(integral)]
        ask["max_tokens"] = (bound | MISSING, known["max_tokens"])
        # The last is llama.cpp's own name, which wins there, in the newer API as well.
        names = ("max_tokens", "max_completion_tokens", "n_predict")
        chat = dict.fromkeys(names, (bound | None, None)) | {"n": (one | None, None)}
        newer |= chat | {"max_output_tokens": (bound | None, None)}
    return RequestModels(
        create_model("Ask", __base__=Ask, **ask),
        create_model("ChatCompletionRequest", __base__=ChatCompletionRequest, **chat),
        create_model("ResponsesRequest", __base__=ResponsesRequest, **newer),
    )


def bounded(value: Any, model: type[BaseModel]) -> Any:
    """*value* with its first 100 unknown fields alone: each of 100,000 would be an error."""
    known = model.model_fields.keys()
    if not isinstance(value, dict) or len(value) <= 100 + len(known):
        return value
    unknown = itertools.islice((name for name in value if name not in known), 100)
    return {name: value[name] for name in (*(value.keys() & known), *unknown)}


def validate(model: type[M], values: JsonObject) -> M:
    """*values* as a *model*; else a Failure names the first 100 wrong fields, of turns of one."""
    few = bounded(values, model)
    if isinstance(turns := few.get("history"), list):
        few = {**few, "history": [bounded(turn, Turn) for turn in turns[:1001]]}
    try:
        return model.model_validate(few)
    except ValidationError as exc:
        errors: dict[str, FieldError] = {}
        found = exc.errors(include_url=False, include_input=False, include_context=False)
        for error in found[:100]:
            # The one pattern there is means this, and its own message would quote it.
            blank = error["type"] == "string_pattern_mismatch"
            detail = "Input should not be blank" if blank else error["msg"]
            # Only turns have fields below; elsewhere the branches of a union are named there.
            where = error["loc"] if error["loc"][0] == "history" else error["loc"][:1]
            name = ".".join(map(str, where))
            errors.setdefault(name, FieldError(field=name, detail=detail))
        raise Failure("invalid_request", errors=[*errors.values()]) from exc


def wrong_field(name: str, detail: str, code: Code = "invalid_request") -> Failure:
    return Failure(code, errors=[FieldError(field=name, detail=detail)])


# OpenAI's names in a request, and those of a message or an input item.
OPENAI_NAMES = {*CompletionCreateParamsBase.__annotations__, "stream", "n_predict"}
OPENAI_NAMES |= {*ResponseCreateParamsBase.__annotations__, "role", "content", "type", "name"}
OPENAI_NAMES |= {"refusal", "audio", "tool_calls", "tool_call_id", "function_call", "id", "status"}
OPENAI_NAMES |= {"summary", "call_id", "arguments", "output"}


def check_names(values: JsonObject, where: str = "") -> None:
    """Raises a Failure for names that some upstreams, in Go for one, would read as OpenAI's."""
    wrong = [
        FieldError(field=where + name, detail=f"Write it as {name.casefold()!r}")
        for name in values
        if name not in OPENAI_NAMES and name.casefold() in OPENAI_NAMES
    ]
    if wrong:
        raise Failure("invalid_request", errors=wrong[:100])


def check_messages(name: str, messages: list[Any], settings: Settings) -> None:
    """Raises a Failure for a message that is none, or that only the operator may write."""
    callers = ("user", "assistant", "tool", "function", *[None] * (name == "input"))
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise wrong_field(f"{name}.{index}", "Input should be an object")
        if not OPENAI_NAMES.issuperset(message):  # tens of thousands fit into a body
            check_names(message, f"{name}.{index}.")
        if settings.system_prompt and message.get("role") not in callers:
            raise wrong_field(f"{name}.{index}.role", "The operator has set a SYSTEM_PROMPT")


async def discard_body(receive: Receive) -> None:
    """Read on for a moment: many clients look for the answer only once they have sent it all."""
    with suppress(TimeoutError):
        async with asyncio.timeout(1):
            while (await asyncio.wait_for(receive(), 0.1)).get("more_body"):
                pass


# Goes on to the next list or object that is not empty; those in a string do not count, even in one
# that never ends.
NEXT_NODE = re.compile(rb'(?s)(?:[^"\[{]++|"(?:[^"\\]++|\\.)*+"?|\[\]|\{\})*+(?:[\[{]|\Z)')


def parse_body(body: bytes | bytearray, most: int) -> JsonObject:
    """The JSON object in *body*; raises 400, also for more than *most* lists and objects in it.

    RFC 8259 (section 9) lets a parser have such bounds: 1 MiB can cost 0.2 s and 60 MiB.
    """
    nodes = body.count(b"[") + body.count(b"{")
    if nodes > most and any(itertools.islice(NEXT_NODE.finditer(body), most, None)):
        raise Failure("invalid_json", "The body holds too many lists and objects.")
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as exc:
        raise Failure("invalid_json", f"The body is not JSON in UTF-8: {exc}") from exc
    if not isinstance(value, dict):
        raise Failure("invalid_json")
    return value


async def read_body(
    request: Request[Any], settings: Settings, read: Callable[[JsonObject], T]
) -> T:
    """What *read* makes of the JSON object in the body; raises 400, 408, 413 or 415."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
        raise Failure("unsupported_media_type")
    too_large = int(request.headers.get("content-length", 0)) > settings.max_body_bytes
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(settings.client_timeout):
            while more and not too_large:  # Starlette's stream() costs 4 us
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body += message.get("body", b"")
                too_large = len(body) > settings.max_body_bytes
                more = message.get("more_body", False)
    except TimeoutError as exc:
        raise Failure("request_timeout", headers={"Connection": "close"}) from exc
    if too_large:
        if "expect" not in request.headers:  # a client that asked first has sent nothing yet
            await discard_body(request.receive)
        raise Failure("body_too_large")
    most = max(10_000, settings.max_body_bytes // 20)
    if len(body) <= 65536:
        return read(parse_body(body, most))
    # In a thread, so that others go on; one at a time, since each may take 30 MiB.
    async with request.state["large_body"]:
        if await request.is_disconnected():
            raise ClientDisconnect
        return await asyncio.to_thread(lambda: read(parse_body(body, most)))


def texts_of(messages: Iterable[Any]) -> Iterator[str]:
    """All text in chat *messages* or input items, that of their parts included."""
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            texts = (part.get("text") for part in content if isinstance(part, dict))
            yield from (text for text in texts if isinstance(text, str))


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """A request to the model: *body* as it goes to *path* where the model refuses nothing of it."""

    caller: Caller
    path: str  # chat/completions or responses
    model: str
    stream: bool
    body: JsonObject
    prompt_chars: int


# Where a client sends both, the first of these wins.
OTHER_NAME = {"max_completion_tokens": "max_tokens", "max_tokens": "max_completion_tokens"}


def model_request(
    path: str, body: JsonObject, prompt_chars: int, caller: Caller, settings: Settings
) -> ModelRequest:
    """*body* with what the operator adds: OPENAI_EXTRA_BODY, and for OpenAI who the user is."""
    model, stream = cast(str, body["model"]), bool(body.get("stream"))
    extra = settings.openai_extra_body or {}
    if caller.user is not None and settings.api_domain == "openai.com":
        body["safety_identifier"] = hashlib.sha256(caller.user.encode()).hexdigest()
    if not extra.keys().isdisjoint(OTHER_NAME):
        body = {name: value for name, value in body.items() if name not in OTHER_NAME}
    return ModelRequest(caller, path, model, stream, body | extra, prompt_chars)


def chat_request(
    body: JsonObject, token_limit: JsonValue, prompt_chars: int, caller: Caller, settings: Settings
) -> ModelRequest:
    """A chat completion, whose *body* has all but the *token_limit* and what the operator adds."""
    if settings.system_prompt:
        first: JsonObject = {"role": "system", "content": settings.system_prompt}
        body["messages"] = [first, *cast(list[JsonValue], body["messages"])]
    if body["stream"]:
        options = cast(JsonObject, body.get("stream_options") or {})
        body["stream_options"] = {**options, "include_usage": True}
    if token_limit is not None:
        body[settings.token_field] = token_limit
    return model_request("chat/completions", body, prompt_chars, caller, settings)


def allowed_model(name: str | MISSING, settings: Settings) -> str:
    if name is MISSING:
        return settings.openai_model
    if name not in settings.models:
        raise wrong_field("model", "This model may not be named here", "model_not_found")
    return name


def read_ask(ask: Ask, caller: Caller, settings: Settings, *, stream: bool) -> ModelRequest:
    model = allowed_model(ask.model, settings)
    question: JsonObject = {"role": "user", "content": ask.prompt}
    messages: JsonValue = [*(turn.model_dump() for turn in ask.history), question]
    body: JsonObject = {"model": model, "messages": messages, "stream": stream}
    if ask.temperature is not MISSING:
        body["temperature"] = ask.temperature
    limit = settings.max_output_tokens if ask.max_tokens is MISSING else ask.max_tokens
    return chat_request(body, limit, len(ask.prompt), caller, settings)


def read_chat(
    model: type[ChatCompletionRequest], caller: Caller, settings: Settings, values: JsonObject
) -> tuple[ModelRequest, bool]:
    """The request, and whether the client asks for the usage of a stream."""
    check_names(values)
    asked = validate(model, values)
    check_messages("messages", asked.messages, settings)
    body: JsonObject = {**values, "model": allowed_model(asked.model, settings)}
    body["stream"] = bool(asked.stream)
    limits: list[Any] = [integral(body.pop(each, None)) for each in OTHER_NAME]
    limit = next((each for each in limits if each is not None), settings.max_output_tokens)
    chars = sum(map(len, texts_of(asked.messages)))
    usage = bool((asked.stream_options or {}).get("include_usage"))
    return chat_request(body, limit, chars, caller, settings), usage


def read_responses(
    model: type[ResponsesRequest], caller: Caller, settings: Settings, values: JsonObject
) -> ModelRequest:
    check_names(values)
    asked = validate(model, values)
    items = [{"content": asked.input}] if isinstance(asked.input, str) else asked.input
    check_messages("input", items, settings)
    body: JsonObject = {**values, "model": allowed_model(asked.model, settings)}
    if settings.system_prompt:
        body["instructions"] = settings.system_prompt
    if bound := values.get("max_output_tokens") or settings.max_output_tokens:
        body["max_output_tokens"] = bound
    chars = sum(map(len, texts_of(items)))
    return model_request("responses", body, chars, caller, settings)


class Event(NamedTuple):
    """A Server-Sent Event of the upstream: its bytes, end included, its name and its data.

    llama.cpp tells an error in a field of that name; that is an event named `error` here.
    """

    raw: bytes
    name: bytes
    data: bytes


class SSEDecoder:
    """Whole Server-Sent Events out of bytes that are split anywhere (WHATWG HTML, section 9.2)."""

    EVENT_END = re.compile(rb"(?:\n|\r\n|\r(?!\n)){2}")

    def __init__(self) -> None:
        self.rest = bytearray()
        self.has_cr = False

    def feed(self, read: bytes) -> bytes:
        """The whole events that *read* completes; raises a Failure for one that is too large."""
        self.has_cr = self.has_cr or b"\r" in read
        if not self.rest and read.endswith(b"\n\n"):
            return read  # whole events, as they usually come
        searched = max(0, len(self.rest) - 3)
        self.rest += read
        end = 0
        if self.has_cr:
            # A CR that ends a read may be half of a CRLF, so it waits for what comes next.
            known = len(self.rest) - self.rest.endswith(b"\r")
            for found in self.EVENT_END.finditer(self.rest, searched, known):
                end = found.end()
        else:
            end = self.rest.rfind(b"\n\n", searched) + 2
        if end < 2:
            if len(self.rest) > MAX_UPSTREAM_BYTES:
                raise Failure("upstream_error", cause="an event without end")
            return b""
        block = bytes(memoryview(self.rest)[:end])
        del self.rest[:end]
        return block

    @property
    def torn(self) -> bool:
        """Whether a part of an event is here that is more than a comment."""
        return bool(self.rest) and not self.rest.lstrip().startswith(b":")

    def close(self) -> bytes:
        """An event that was left open at the end counts too."""
        return self.feed(b"\n\n") if self.rest else b""

    def parts(self, block: bytes) -> list[bytes]:
        """*block* cut between events, some 2,000 bytes a part; whole where a CR was seen."""
        parts, start = [], 0
        while not self.has_cr and (end := block.find(b"\n\n", start + 2000) + 2) > 1:
            parts.append(block[start:end])
            start = end
        return [*parts, block[start:]] if start < len(block) else parts

    def events(self, block: bytes) -> Iterator[Event]:
        """Each event in *block*."""
        if not self.has_cr:
            for lines in block[:-2].split(b"\n\n"):
                yield self.event(lines, lines + b"\n\n")
            return
        start = 0
        for end in self.EVENT_END.finditer(block):
            yield self.event(block[start : end.start()], block[start : end.end()])
            start = end.end()

    def event(self, lines: bytes, raw: bytes) -> Event:
        if lines.startswith(b"data: ") and not self.has_cr and b"\n" not in lines:
            return Event(raw, b"", lines[6:].strip())
        name, data = b"", list[bytes]()
        fields = re.split(rb"\r\n|\n|\r", lines.removeprefix(b"\xef\xbb\xbf"))
        for place, line in enumerate(fields):
            key, _, value = line.partition(b":")
            if line.lstrip()[:1] in {b"{", b"[", b"<"}:  # no stream, but a JSON body or a page
                return Event(raw, b"error", b"\n".join(fields[place:]))
            if key == b"data":
                data.append(value.strip())
            elif key == b"event":
                name = value.strip().lower()
            elif key == b"error":
                name, data = b"error", [value.strip()]
        return Event(raw, name, b"\n".join(data))


class BodyDecoder(SSEDecoder):
    """A plain answer as one event."""

    def feed(self, read: bytes) -> bytes:
        self.rest += read
        if len(self.rest) > MAX_UPSTREAM_BYTES:
            raise Failure("upstream_error", cause="a body without end")
        return b""

    def close(self) -> bytes:
        return bytes(self.rest)

    def parts(self, block: bytes) -> list[bytes]:
        return [block]

    def events(self, block: bytes) -> Iterator[Event]:
        yield Event(block, b"", block)


# An object of the upstream, as it was parsed; only the folds trust what is in it.
Chunk = dict[str, Any]
# A piece of the answer: what it is, and its text.
Piece = tuple[Literal["reasoning", "delta"], str]


ERROR_NAMES = ("error", "errors", "error_message", "error_msg")
# These only where there is no part of an answer, the messages only with a code.
CODES = {"code", "status", "status_code", "statusCode", "success"}
SUSPECT = {*ERROR_NAMES, "x_groq", "base_resp", "detail", "message", "msg"}


def error_in(chunk: Chunk) -> object:
    """What tells of an error in an object of a 200, None where nothing does."""
    if chunk.get("object") == "error" or chunk.get("type") == "error":
        return chunk
    if SUSPECT.isdisjoint(chunk):
        return None  # as nearly always
    groq, base = chunk.get("x_groq"), chunk.get("base_resp")
    if isinstance(groq, dict) and groq.get("error"):
        return groq
    named = any(map(chunk.get, ERROR_NAMES)) or chunk.get("error") == {}
    failed = isinstance(base, dict) and base.get("status_code")
    coded = not CODES.isdisjoint(chunk) and (chunk.get("message") or chunk.get("msg"))
    alone = not chunk.get("choices") and (chunk.get("detail") or coded)
    return chunk if named or failed or alone else None


DONE = b"[DONE]"


def chunks_in(event: Event) -> list[Chunk]:
    """The objects in *event*, one, or one in each line of its data; none in `null` and `[DONE]`.

    Raises a Failure for an error of the upstream, and for what is no JSON.
    """
    if event.name == b"error":
        error: object = event.data.decode("utf-8", "replace")
        with suppress(ValueError):
            error = parse_json(event.data)
        raise from_upstream(read_error(error))
    data = event.data
    if data.endswith(DONE):
        data = data[: -len(DONE)].strip()
    if not data:
        return []
    try:
        try:
            values = [parse_json(data)]
        except ValueError:
            values = [parse_json(line) for line in data.splitlines()]
    except ValueError as exc:
        raise Failure("upstream_error", cause="no JSON") from exc
    items = (item for value in values for item in (value if isinstance(value, list) else [value]))
    return [item for item in items if isinstance(item, dict)]


Count = Annotated[int, Field(ge=0, le=10**12)]


class Usage(TypedDict, total=False):
    """The tokens that the upstream counted, each where it told it."""

    prompt_tokens: Count
    completion_tokens: Count
    reasoning_tokens: Count


def as_count(value: object) -> int | None:
    """*value* where it is a figure that can be one: a whole number from 0 to 10^12."""
    value = integral(value)
    return value if type(value) is int and 0 <= value <= 10**12 else None


def text_of(value: object) -> str:
    """The text that *value* is, or that its parts are; raises a Failure for what is none."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)  # Cloudflare's tokens that look like a number are one
    if isinstance(value, list):
        return "".join(texts_of([{"content": value}]))
    raise Failure("upstream_error", cause="a text that is none")


@dataclass(slots=True)
class Fold:
    """What the upstream has said so far, whatever the API: a fold of its events, or of its body."""

    model: str
    stream: bool
    # `temperature` was asked for, and left out because the model refuses it.
    ignored: bool
    finish_reason: str | None = None
    tokens_used: int | None = None
    usage: dict[str, int] = field(default_factory=dict)
    # Some of it has come, of whatever kind; its own end has, and nothing behind that is read.
    received: bool = False
    done: bool = False
    # A piece of text, reasoning or a tool call has come.
    has_piece: bool = False
    # The model itself failed, and the answer, which is whole, says so.
    failure: Failure | None = None
    # Of an answer that is taken apart: its text, and all else that costs tokens.
    answer_chars: int = 0
    other_chars: int = 0
    # The choices begun, by index, and whether each has its finish_reason; not of a response.
    choices: dict[int, bool] = field(default_factory=dict)
    # How many chunks have gone on with a choice.
    progress: int = 0
    # Of one that passes untouched.
    events: int = 0
    bytes: int = 0

    @property
    def finished(self) -> bool:
        """Whether each choice begun has its finish_reason; Ollama ends with [DONE] alone."""
        return bool(self.choices) and all(self.choices.values())

    def add(self, event: Event) -> list[Chunk]:
        """The objects in *event*; raises a Failure where it is an error, or ends nothing."""
        chunks = chunks_in(event)
        for chunk in chunks:
            self.add_chunk(chunk)
        end_mark = event.data.endswith(DONE)
        if end_mark and not self.choices:
            raise Failure("upstream_error", cause="an end without an answer")
        if not self.stream and (not chunks or event.data.lstrip().startswith(b"[")):
            raise Failure("upstream_error", cause="no JSON object")
        self.done = self.done or end_mark or not self.stream
        return chunks

    def add_chunk(self, chunk: Chunk) -> None:
        raise NotImplementedError

    def count(self, usage: object) -> None:
        """Take over the figures in *usage* that can be figures, by either API's names."""
        if not isinstance(usage, dict):
            return
        details = usage.get("completion_tokens_details") or usage.get("output_tokens_details")
        told = {
            "prompt_tokens": usage.get("prompt_tokens", usage.get("input_tokens")),
            "completion_tokens": usage.get("completion_tokens", usage.get("output_tokens")),
            "reasoning_tokens": isinstance(details, dict) and details.get("reasoning_tokens"),
        }
        known = {name: n for name, value in told.items() if (n := as_count(value)) is not None}
        self.usage |= known
        total = as_count(usage.get("total_tokens"))
        if total is None and {"prompt_tokens", "completion_tokens"} <= self.usage.keys():
            total = self.usage["prompt_tokens"] + self.usage["completion_tokens"]
        self.tokens_used = self.tokens_used if total is None else total

    def received_tokens(self) -> int:
        """An estimate: a token for every 4 characters, or what passed untouched by its size."""
        beyond = max(0, self.bytes - 300 * self.events)
        return math.ceil((self.answer_chars + self.other_chars + beyond) / 4) + self.events


@dataclass(slots=True)
class ChatFold(Fold):
    """A fold of chat completion chunks, or of the one plain completion."""

    def goes_on(self, block: bytes) -> int:
        """How many events *block* has, where none needs a look; 0 where one may.

        So it is where each is one line of data that names one choice, which goes on: no second one
        or list of chunks, no end, no error, no usage. Where a text holds such names, or a choice a
        list of objects, the events are looked at for nothing.
        """
        events, odd = divmod(block.count(b"\n"), 2)
        goes_on = (
            0 in self.choices
            and not odd
            and block.count(b'"choices":[{"index":0,') == events
            and b'},{"' not in block
            and b'"error' not in block
            and (
                # As OpenAI writes it, in one look instead of two.
                block.count(b'"finish_reason":null}],"usage":null') == events
                or (b'"finish_reason":"' not in block and b'"usage":{' not in block)
            )
        )
        if not goes_on:
            return 0
        self.progress += events
        return events

    def add_chunk(self, chunk: Chunk) -> None:
        if (error := error_in(chunk)) and not (chunk.get("choices") and not self.stream):
            raise from_upstream(read_error(error))
        groq, model = chunk.get("x_groq"), chunk.get("model")
        if usage := chunk.get("usage") or (isinstance(groq, dict) and groq.get("usage")):
            self.count(usage)
        if model and isinstance(model, str):
            self.model = model
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                if choice.get("error") or choice.get("finish_reason") == "error":
                    raise from_upstream(read_error(chunk if chunk.get("error") else choice))
                self.progress += 1
                self.add_choice(choice)

    def add_choice(self, choice: Chunk) -> None:
        index, reason = choice.get("index"), choice.get("finish_reason")
        index = index if isinstance(index, int) else 0
        if isinstance(reason, str) and reason:
            self.finish_reason = reason
            self.choices[index] = True
        else:
            self.choices.setdefault(index, False)
        if usage := choice.get("usage"):
            self.count(usage)
        part = choice.get("delta" if self.stream else "message")
        if isinstance(part, dict):
            said = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls")
            self.has_piece = self.has_piece or any(map(part.get, said)) or part.get("content") == 0

    def pieces(self, chunks: list[Chunk]) -> list[Piece]:
        """The pieces of the answer in *chunks*; raises a Failure where they are not as promised."""
        key = "delta" if self.stream else "message"
        try:
            parts = [each.get(key) or {} for chunk in chunks for each in chunk.get("choices") or ()]
            if not (self.stream or any(parts)):
                raise Failure("upstream_error", cause="no message")
            return [piece for part in parts for piece in self.pieces_of(part)]
        except (TypeError, AttributeError) as exc:
            raise Failure("upstream_error", cause="an odd chunk") from exc

    def pieces_of(self, part: Chunk) -> Iterator[Piece]:
        thoughts = (part.get("reasoning_content"), part.get("reasoning"))
        if reasoning := next((each for each in thoughts if each and isinstance(each, str)), ""):
            self.other_chars += len(reasoning)
            yield "reasoning", reasoning
        if text := text_of(part.get("content")) + text_of(part.get("refusal")):
            self.answer_chars += len(text)
            yield "delta", text
        if calls := part.get("tool_calls"):  # of tools that OPENAI_EXTRA_BODY names
            self.other_chars += len(to_json(calls))


@dataclass(slots=True)
class ResponsesFold(Fold):
    """A fold of the events of the Responses API, or of the one plain response."""

    # The newest sequence_number read, and the events behind it that needed no look.
    number: int = -1
    unread: bytes = b""

    def goes_on(self, block: bytes) -> int:
        """As ChatFold's: here an event has two lines, and those of type `delta` need no look."""
        events, odd = divmod(block.count(b"\n"), 3)
        deltas = block.count(b'.delta\ndata: {"type":"response.')
        if self.number < 0 or odd or deltas != events or b'"error' in block:
            return 0
        if b'"sequence_number"' in block:
            self.unread = block
        return events

    @property
    def next_number(self) -> int:
        for event in reversed(self.unread[:-2].split(b"\n\n")):
            with suppress(ValueError, KeyError, TypeError):
                number = parse_json(event.partition(b"data: ")[2])["sequence_number"]
                return max(self.number, as_count(number) or 0) + 1
        return self.number + 1

    def add(self, event: Event) -> list[Chunk]:
        return [] if event.data == DONE else Fold.add(self, event)  # here it ends nothing

    def add_chunk(self, chunk: Chunk) -> None:
        if self.stream:
            self.add_event(chunk)
        elif chunk.get("object") != "response" and error_in(chunk):
            raise from_upstream(read_error(chunk))
        else:
            self.add_response(chunk)

    def add_event(self, chunk: Chunk) -> None:
        kind, response = chunk.get("type"), chunk.get("response")
        if kind == "error" or not isinstance(kind, str):
            if error_in(chunk):
                raise from_upstream(read_error(chunk))
            return
        if (number := as_count(chunk.get("sequence_number"))) is not None:
            self.number, self.unread = number, b""
        self.has_piece = self.has_piece or kind.endswith(".delta")
        if kind in {"response.completed", "response.incomplete", "response.failed"}:
            self.done, state = True, kind.removeprefix("response.")
            response = {"status": state, **(response if isinstance(response, dict) else {})}
        if isinstance(response, dict):
            self.add_response(response)

    def add_response(self, response: Chunk) -> None:
        self.count(response.get("usage"))
        if isinstance(model := response.get("model"), str) and model:
            self.model = model
        details, state = response.get("incomplete_details"), response.get("status")
        reason = details.get("reason") if isinstance(details, dict) else None
        if state == "failed":
            self.failure = Failure("upstream_error", upstream=read_error(response.get("error")))
        elif state in {"completed", "incomplete"}:
            self.finish_reason = reason if isinstance(reason, str) else "stop"


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


def ending(fold: Fold) -> Ending:
    end = Ending(finish_reason=fold.finish_reason, tokens_used=fold.tokens_used, model=fold.model)
    if fold.usage:
        end["usage"] = cast(Usage, fold.usage)
    if fold.ignored:
        end["ignored"] = ["temperature"]
    return end


def sse_event(data: object) -> bytes:
    """One Server-Sent Event; JSON escapes line breaks, so one `data:` line always suffices."""
    return utf8_json(f"data: {to_json(data)}\n\n")


END_MARK = b"data: [DONE]\n\n"
# Headers as ASGI has them, made once.
RawHeaders = tuple[tuple[bytes, bytes], ...]
UNBUFFERED = ((b"cache-control", b"no-cache, no-transform"), (b"x-accel-buffering", b"no"))
STREAM_HEADERS = ((b"content-type", f"{SSE}; charset=utf-8".encode()), *UNBUFFERED)
TEXT_HEADERS = ((b"content-type", b"text/plain; charset=utf-8"),)


class Format:
    """How an answer looks to the client; as it stands, the upstream's own plain answer."""

    headers: RawHeaders = ((b"content-type", JSON.encode()),)
    # What fills a long silence; empty where the format has nothing that readers skip.
    heartbeat = b""

    def event(self, event: Event, chunks: list[Chunk], fold: Any) -> bytes:
        """What an event of the upstream, with the *chunks* in it, becomes."""
        fold.events += 1
        fold.bytes += len(event.raw)
        return event.raw

    def skim(self, block: bytes, fold: Any) -> bytes | None:
        """What a *block* of events becomes; None where each of them has to be read for that."""
        return None

    def end(self, fold: Fold) -> bytes:
        return b""

    def error(self, failure: Failure, request_id: str, fold: Any) -> bytes | None:
        """The end of an answer that broke off; None where only a cut connection can say so."""
        return None


# A chunk whose one choice goes on with text alone, as nearly all do; the text is in the group. JSON
# is written here without its whitespace, as nearly all upstreams write it.
NAMED = (
    rb'(?:"(?:id|model|created|service_tier|system_fingerprint|provider|obfuscation)":'
    rb'(?:"[^"]*+"|\d++|null)|"object":"chat\.completion\.chunk"|"usage":null)'
)
TEXT_CHUNK = re.compile(
    rb"(?:\A|(?<=\n\n))data: \{(?:" + NAMED + rb',)*+"choices":\[\{'
    rb'(?:"index":0,|"(?:finish_reason|logprobs)":null,)*+"delta":\{(?:"role":"assistant",)?+'
    rb'"content":(?!"")("[^"\\\x00-\x1f]*+(?:\\["\\bfnrtu][^"\\\x00-\x1f]*+)*+")(?:,"(?!c)[a-z_]+":null)*+\}'
    rb'(?:,"index":0|,"[a-z_]+":null)*+\}\](?:,' + NAMED + rb")*+\}\n\n"
)


class AskEvents(Format):
    """The events of a streamed /ask."""

    headers, heartbeat = STREAM_HEADERS, b": ping\n\n"

    def event(self, event: Event, chunks: list[Chunk], fold: ChatFold) -> bytes:
        pieces = fold.pieces(chunks)
        data = [f'data: {{"type":"{kind}","content":{to_json(text)}}}\n\n' for kind, text in pieces]
        return utf8_json("".join(data))

    def skim(self, block: bytes, fold: ChatFold) -> bytes | None:
        texts: list[bytes] = TEXT_CHUNK.findall(block) if 0 in fold.choices else []
        joined = b",".join(texts)
        if not texts or block.count(b"\n") != 2 * len(texts):
            return None
        chars = len(joined) - 3 * len(texts) + 1  # less the quotation marks and the commas
        if b"\\" in joined or not joined.isascii():
            try:
                text = "".join(from_json(b"[%s]" % joined))
            except ValueError:
                return None
            if b"\\u" in joined or ODD_LINE_ENDS.search(text):
                return None
            chars = len(text)
        fold.answer_chars += chars
        fold.progress += len(texts)
        return b"".join([b'data: {"type":"delta","content":%s}\n\n' % each for each in texts])

    def end(self, fold: Fold) -> bytes:
        return sse_event({"type": "done", **ending(fold)}) + END_MARK

    def error(self, failure: Failure, request_id: str, fold: Fold) -> bytes:
        return sse_event(failure.error_event(request_id))


class AskJSON(Format):
    """The one JSON object of a plain /ask."""

    def __init__(self) -> None:
        self.text = {"delta": "", "reasoning": ""}

    def event(self, event: Event, chunks: list[Chunk], fold: ChatFold) -> bytes:
        for kind, text in fold.pieces(chunks):
            self.text[kind] += text
        return b""

    def end(self, fold: Fold) -> bytes:
        answer = cast(Answer, {"response": self.text["delta"], **ending(fold)})
        if self.text["reasoning"]:
            answer["reasoning"] = self.text["reasoning"]
        return utf8_json(to_json(answer))


class AskText(Format):
    """The answer itself, piece by piece; only a cut connection can say that it broke off."""

    def __init__(self, stream: bool) -> None:
        self.headers = (*TEXT_HEADERS, *UNBUFFERED) if stream else TEXT_HEADERS
        # By way of UTF-16, which joins a surrogate pair that came in two pieces.
        self.joined = codecs.getincrementaldecoder("utf-16-le")("replace")

    def event(self, event: Event, chunks: list[Chunk], fold: ChatFold) -> bytes:
        text = "".join(text for kind, text in fold.pieces(chunks) if kind == "delta")
        return self.joined.decode(text.encode("utf-16-le", "surrogatepass")).encode()

    def end(self, fold: Fold) -> bytes:
        return self.joined.decode(b"", final=True).encode()


class PassedEvents(Format):
    """The upstream's own events, byte for byte, of whichever API."""

    headers, heartbeat = STREAM_HEADERS, b": ping\n\n"

    def event(self, event: Event, chunks: list[Chunk], fold: Fold) -> bytes:
        if event.data in (b"", DONE):
            return b""  # a comment, what many readers take for an event without data, an end mark
        if event.raw.startswith(b"id:") or b"\nid:" in event.raw:
            # With an empty line behind it, openai-python takes it for an event, and fails.
            self.heartbeat = b": ping\n"
        return super().event(event, chunks, fold)

    def skim(self, block: bytes, fold: Any) -> bytes | None:
        events = fold.goes_on(block)
        fold.events += events
        fold.bytes += len(block) if events else 0
        return block if events else None


class ChatCompletionEvents(PassedEvents):
    """Chat completion chunks; the usage chunk only where the client has asked for it."""

    def __init__(self, include_usage: bool) -> None:
        self.include_usage = include_usage

    def event(self, event: Event, chunks: list[Chunk], fold: Fold) -> bytes:
        usage_only = [bool(each.get("usage") and not each.get("choices")) for each in chunks]
        if not self.include_usage and chunks and all(usage_only):
            return b""
        if event.data.endswith(DONE):  # which `end` adds
            return b"".join(map(sse_event, chunks))
        return super().event(event, chunks, fold)

    def end(self, fold: Fold) -> bytes:
        return END_MARK

    def error(self, failure: Failure, request_id: str, fold: Fold) -> bytes:
        return sse_event(failure.openai_error())


class ResponsesEvents(PassedEvents):
    """The events of the Responses API."""

    heartbeat = b": ping\n"

    def error(self, failure: Failure, request_id: str, fold: ResponsesFold) -> bytes:
        # OpenAI's own flat form and the nested one in one: half of the clients overlook either.
        error = failure.openai_error()["error"]
        flat = {"type": "error", "code": error["code"], "message": error["message"]}
        numbered = {"param": error["param"], "sequence_number": fold.next_number}
        return b"event: error\n" + sse_event({**flat, **numbered, "error": error})


# Words of a refusal of a field itself, and words that are about its value instead.
NOT_TAKEN = re.compile(
    r"unsupported|unknown|unrecogni[sz]ed|unexpected|incompatible|forbidden|deprecated|removed"
    r"|disallowed|replaced by|instead of|rather than|\bfixed at\b|not a valid (?:param|arg|field)"
    r"|(?:not|n't|no longer) (?:be )?(?:\w+ )?(?:support|permitted|allowed|accepted|available"
    r"|recogni[sz]ed|compatible|possible|configurable|customi[sz]|apply|used|set|specified)"
    r"|\bonly (?:\w+ )?(?:supports?|accepts?|takes?|set|supported)\b"
    r"|\bonly\b.{0,80}\b(?:allowed|supported|accepted|permitted|set)\b"
    r"|(?:must|should|can only|has to) be (?:set to )?(?:1(?:\.0)?(?![\d.])|omitted|unset|left out)"
    r"|invalid (?:param|argument|field|property)|\bis invalid for\b"
    r"|cannot be (?:used|set|specified|customi[sz]ed|changed)",
    re.IGNORECASE,
)
OUT_OF_RANGE = re.compile(
    r"(?:less|greater|more|fewer|larger|smaller|higher|lower) than|\bat (?:most|least)\b"
    r"|\bbetween\b|\brange\b|\btoo (?:large|high|low|small|big|many|long)\b|\b(?:max|min)imum\b"
    r"|exceed|\b(?:above|below|over|under|up to)\b|[<>≤≥]|at the same time|\bpositive\b"
    r"|\bor (?:less|more|fewer)\b|\bvalues? of\b(?! 1\b)|(?:should|must) be (?:an?|in)\b"
    r"|\d\s*(?:to|-|\u2013|,|and)\s*\d|\[[\d.]+,|\blimit\b.{0,12}\d",
    re.IGNORECASE,
)
ADAPTABLE = ("max_completion_tokens", "max_tokens", "temperature", "stream_options")


def refused_field(error: UpstreamError, sent: set[str]) -> str | None:
    """The field, one of those *sent*, that a refusal says the model does not take.

    By its code, param, loc or message, since proxies change codes and servers have words of their
    own. What a caller wrote and the upstream quotes may be taken for such a refusal: that costs a
    call, and teaches nothing, since the next one does not help.
    """
    where = error.param or ""
    told = f"{error.code or ''} {where}: {error.message[:10_000]}"
    names = [name for name in ([where] if where in ADAPTABLE else ADAPTABLE) if name in sent]
    if error.status not in {400, 422} or not names or OUT_OF_RANGE.search(told):
        return None
    field = re.compile(rf"(?<!\w)(?:{'|'.join(names)})(?!\w)")
    # A sentence that names the field and refuses it, or else two, of which the second refuses it;
    # a full stop in a number ends none.
    sentences = re.split(r"[.;!]\s|\n", told)
    for text in (*sentences, *map(" ".join, itertools.pairwise(sentences))):
        named, refused = field.search(text), NOT_TAKEN.search(text)
        if named and refused and (text in sentences or named.start() < refused.start()):
            return named[0]
    return None


IMAGE = re.compile(rb'"data:image/(?<!\\"data:image/)[^"\\]*+"')


def output_bound(body: JsonObject) -> int:
    """The most tokens that the model may write; 0 where it has no bound."""
    names = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    bounds = [integral(body.get(name)) for name in names]
    return max((each for each in bounds if isinstance(each, int) and each > 0), default=0)


def estimated_tokens(content: bytes) -> int:
    """A token for every 4 bytes of a request's body, 1,000 for an image instead of its bytes."""
    inline = IMAGE.findall(content)
    images = max(len(inline), content.count(b'"image_url":'))
    return (len(content) - sum(map(len, inline))) // 4 + 1000 * images


class ModelClient(AsyncOpenAI):
    """AsyncOpenAI with one method more, which posts a body that is already encoded.

    The library's own `post` takes 450 us, most of what a short answer costs; this takes 41.
    """

    def __init__(self, http_client: httpx2.AsyncClient, settings: Settings) -> None:
        agent = f"openai-backend/{VERSION}"
        super().__init__(
            api_key=settings.openai_api_key or "none",  # without a key no ask gets as far as this
            base_url=settings.openai_base_url,
            http_client=http_client,
            timeout=None,  # Exchange sees to it; a timer for each read is dear
            max_retries=0,
            default_headers={"Accept-Encoding": "identity", "User-Agent": agent},
        )
        self.http_client = http_client
        own = {**self.default_headers, **self.auth_headers}
        # Some are objects that say "left out"; X-Stainless tells of this machine.
        self.own_headers = httpx2.Headers(
            {k: v for k, v in own.items() if isinstance(v, str) and not k.startswith("X-Stainless")}
        )
        self.urls = {path: self.base_url.join(path) for path in ("chat/completions", "responses")}

    async def send(self, path: str, content: bytes) -> httpx2.Response:
        """The head of the answer to a POST of *content*; its body is still to be read."""
        # As a stream: for `content` httpx2 makes the headers twice.
        stream = httpx2.ByteStream(content)
        request = httpx2.Request("POST", self.urls[path], headers=self.own_headers, stream=stream)
        request.read()  # else aiohttp would send it in chunks
        return await self.http_client.send(request, stream=True)


async def raise_refusal(response: httpx2.Response) -> None:
    """A hook of the HTTP client: what is no 200 is read here, no more of it than may be."""
    if response.status_code == 200:
        return
    status, patience = response.status_code, response.headers.get("retry-after", "")
    decoder = BodyDecoder()
    try:
        async for read in response.aiter_bytes():
            decoder.feed(read)
    except httpx2.DecodingError:
        pass  # what it says is lost, its status is known
    except (httpx2.RequestError, Failure) as exc:
        error = read_error(None, status, patience)
        raise Failure("upstream_error", upstream=error, cause="a refusal without end") from exc
    body = decoder.close()
    value: Any = body.decode("utf-8", "replace").strip()[:2000] if len(body) < 10_000 else ""
    with suppress(ValueError):
        value = parse_json(body)
    raise from_upstream(read_error(value, status, patience))


class Upstream:
    """The model's API, and what this process has learned about its models."""

    def __init__(self, client: ModelClient, settings: Settings) -> None:
        self.client = client
        self.settings = settings
        # The fields that each model was seen to refuse.
        self.refused: dict[str, frozenset[str]] = {}
        self.probing = asyncio.Lock()
        self.probed, self.reachable = -math.inf, False

    def remember(self, model: str, refused: frozenset[str]) -> None:
        """Leave fields out of the requests to come, or send them by their other name."""
        known = self.refused.get(model, frozenset())
        for name in refused - known:
            instead = OTHER_NAME.get(name)
            log.warning("model refuses a field", model=model, field=name, instead=instead)
        self.refused[model] = known.difference(map(OTHER_NAME.get, refused)) | refused

    async def connected(self) -> bool:
        """Whether the upstream answers and accepts the key: asked at most every 30 s, for 5 s."""
        async with self.probing:
            if time.monotonic() > self.probed + 30:
                self.reachable, self.probed = await self.probe(), time.monotonic()
        return self.reachable

    async def probe(self) -> bool:
        try:
            async with asyncio.timeout(5):
                async with self.client.models.with_streaming_response.list():
                    return True
        except Failure as failure:
            return failure.upstream is not None and failure.upstream.status in {404, 405, 429}
        except Exception:  # a time-out, the library's errors, and aiohttp's own where it is no HTTP
            return False


NO_RESPONSES_API = "The model's API knows no /responses; ask /v1/chat/completions here."


NOTHING: frozenset[str] = frozenset()  # one for all: an empty set takes 216 bytes


class Tries:
    """The calls to the model for one request: how many failed, and what had to be left out."""

    def __init__(self, upstream: Upstream, request: ModelRequest) -> None:
        """Raises a Failure where the body cannot be JSON: 1e999 was read as infinity."""
        self.upstream, self.request = upstream, request
        # How many calls failed, and how many followed one that did.
        self.failed = self.again = 0
        # What the operator has set in OPENAI_EXTRA_BODY goes out whatever the model says.
        self.fixed = (upstream.settings.openai_extra_body or {}).keys()
        known = upstream.refused.get(request.model)
        self.refused = known & self.adaptable(request.body) if known else NOTHING
        # The fields that were adapted, and, by the message of a refusal, the one that it led to.
        # Where the same message comes again, that one was no help, and the next takes its place.
        self.adapted = NOTHING
        self.helpful: dict[str, str] = {}
        self.encode()
        # In tokens: an estimate of what it sends, and the most that it may cost.
        self.estimate = estimated_tokens(self.content)
        self.cost = self.estimate + output_bound(self.body)

    def adaptable(self, body: JsonObject) -> set[str]:
        """The fields in *body* that may be left out, or renamed, where the model refuses them."""
        names = ADAPTABLE if self.request.path == "chat/completions" else ("temperature",)
        return body.keys() & set(names) - self.fixed

    def encode(self) -> None:
        """The body without what is refused, max_tokens under its other name."""
        self.body = {**self.request.body} if self.refused else self.request.body
        for name in self.refused & self.body.keys():
            value, other = self.body.pop(name), OTHER_NAME.get(name)
            if other:
                self.body[other] = value
        self.content = encode_json(self.body, inf_nan_mode="constants")
        if b"Infinity" in self.content:  # the word may stand in a text
            try:
                to_json(self.body)
            except ValueError as exc:
                raise Failure("invalid_json", f"The body is not JSON: {exc}") from exc

    async def send(self) -> httpx2.Response:
        """The head of a 200; all else is a Failure."""
        path = self.request.path
        try:
            return await self.upstream.client.send(path, self.content)
        except Failure as failure:
            error = failure.upstream or UpstreamError(None)
            unknown = error.status == 405 or (error.status == 404 and not error.code)
            if path == "chat/completions" or not unknown:
                raise
            told, cause = UpstreamError(400, NO_RESPONSES_API), f"HTTP {error.status}"
            raise Failure("upstream_rejected", told.message, upstream=told, cause=cause) from None
        except Exception as exc:  # httpx2's, and aiohttp's own, which it lets through
            # For no connection and a closed one the aiohttp transport has one class.
            no_way = isinstance(exc, httpx2.ConnectError) or "Cannot connect to host" in str(exc)
            code = "upstream_unreachable" if no_way else "upstream_error"
            raise Failure(code, cause=type(exc).__name__) from exc

    def adapt(self, error: UpstreamError) -> bool:
        """Leaves out or renames the field that the model refused; False where there is none."""
        name = refused_field(error, self.adaptable(self.body))
        if name is None or OTHER_NAME.get(name) in self.adapted:
            return False
        self.adapted = self.adapted | {name}
        self.helpful[error.message] = name
        self.refused = self.refused - {OTHER_NAME.get(name)} | {name}
        self.encode()
        return True

    def delay(self, failure: Failure) -> float | None:
        """Seconds to wait before the next try; None where none would help, or none is left."""
        error = failure.upstream or UpstreamError(None)
        if self.adapt(error):
            return 0
        self.failed += 1
        final = (error.status or 500) < 500 and error.status not in {408, 409, 429}
        if final or self.failed > self.upstream.settings.openai_max_retries:
            return None
        if error.retry_after is not None:
            return error.retry_after if error.retry_after <= 2 else None
        return random.uniform(0.75, 1) * min(8.0, math.ldexp(0.25, self.failed - 1))

    def release(self) -> None:
        """Let go of the body, which goes out no more: it may be large beside a long answer."""
        self.content = b""
        self.body.clear()
        self.request.body.clear()


class Histogram:
    """How many values were at most as large as each of *bounds*, as Prometheus counts them."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.sum = bounds, 0.0
        self.counts = [0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        edges = [*(f"{bound:.15g}" for bound in self.bounds), "+Inf"]
        for edge, count in zip(edges, itertools.accumulate(self.counts), strict=True):
            yield f'{name}_bucket{{{labels},le="{edge}"}} {count}'
        yield f"{name}_sum{{{labels}}} {self.sum:.15g}"
        yield f"{name}_count{{{labels}}} {sum(self.counts)}"


SECONDS = tuple(0.01 * 2**power for power in range(15))
TOKENS = tuple(float(4**power) for power in range(14))
DURATION = "gen_ai_client_operation_duration_seconds"
FIRST_CHUNK = "gen_ai_client_operation_time_to_first_chunk_seconds"
TOKEN_USAGE = "gen_ai_client_token_usage"
# What each means, and its buckets; the names are OpenTelemetry's for generative AI.
HISTOGRAMS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    DURATION: ("Duration of an ask.", SECONDS),
    FIRST_CHUNK: ("Time to the first piece of a streamed answer.", SECONDS),
    TOKEN_USAGE: ("Tokens of an ask.", TOKENS),
}


def family(name: str, kind: str, meaning: str, samples: Mapping[str, object]) -> Iterator[str]:
    """A metric as Prometheus reads it; *samples* are by their labels."""
    yield from (f"# HELP {name} {meaning}", f"# TYPE {name} {kind}")
    yield from (f"{name}{labels} {value}" for labels, value in samples.items())


class Metrics:
    """What GET /metrics shows."""

    def __init__(self) -> None:
        self.started = time.time()
        # By name, and then by model and one more label as it is written.
        self.observed = {
            name: defaultdict[tuple[str, str], Histogram](partial(Histogram, bounds))
            for name, (_, bounds) in HISTOGRAMS.items()
        }
        self.refused: dict[Code, int] = {}
        self.tokens_used = 0

    def observe(self, name: str, value: float, model: str, label: str = "") -> None:
        self.observed[name][model, label].observe(value)

    def exposition(self, asks: AskCounts) -> Iterator[str]:
        """The lines of Prometheus' text format 0.0.4."""
        common = 'gen_ai_operation_name="chat",gen_ai_provider_name="openai",gen_ai_request_model='
        for name, (meaning, _) in HISTOGRAMS.items():
            yield from family(name, "histogram", meaning, {})
            for (model, label), histogram in self.observed[name].items():
                yield from histogram.lines(name, f"{common}{to_json(model)}{label and ','}{label}")
        finished = asks["total"] - asks["active"] - asks["failed"] - asks["cancelled"]
        ended = {"finished": finished, "cancelled": asks["cancelled"], "failed": asks["failed"]}
        outcomes = {f'{{outcome="{outcome}"}}': count for outcome, count in ended.items()}
        refused = {f'{{code="{code}"}}': count for code, count in self.refused.items()}
        active, started = {"": asks["active"]}, {"": f"{self.started:.3f}"}
        yield from family("openai_backend_asks_total", "counter", "Asks that ended.", outcomes)
        yield from family("openai_backend_asks_active", "gauge", "Asks under way.", active)
        yield from family("openai_backend_refused_total", "counter", "Asks not accepted.", refused)
        yield from family("process_start_time_seconds", "gauge", "Start, in Unix seconds.", started)


class AppState(TypedDict):
    """What an endpoint finds in `request.state`."""

    settings: Settings
    mask: Mask
    events: "EventLog | LogDatabase"
    upstream: Upstream
    admission: Admission
    metrics: Metrics
    models: RequestModels
    large_body: asyncio.Lock
    started: float


clock = time.monotonic
# How long an upstream may leave its connection open behind the last finish_reason, for the usage.
END_SECONDS = 2


async def gunzipped(reads: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """*reads* of gzip, all members of it; httpx2 reads the first alone."""
    inflate, most = zlib.decompressobj(31), 2**16
    async for data in reads:
        piece = b""
        while data or len(piece) == most:
            if inflate.eof:
                inflate = zlib.decompressobj(31)
            yield (piece := inflate.decompress(data, most))
            data = inflate.unconsumed_tail or inflate.unused_data


def read_upstream(response: httpx2.Response) -> AsyncIterator[bytes]:
    """The bytes of an answer as they come."""
    # The stream itself, where nothing is to be decoded: aiter_bytes is three more layers.
    stream = cast(httpx2.AsyncByteStream, response.stream)
    coding = response.headers.get("content-encoding", "").lower()
    if "gzip" in coding:
        return gunzipped(aiter(stream))
    return response.aiter_bytes() if coding else aiter(stream)


def end_now(timeout: asyncio.Timeout) -> None:
    with suppress(RuntimeError):  # it is over already
        timeout.reschedule(0)


class Exchange(StreamingResponse):
    """One answer: it owns its place, its upstream and its closing event.

    Its states, and what may happen in each:

    - It asks the model, once or in several tries. Nothing has been sent: what fails is a status.
      After a heartbeat, which sends the 200, it is an event, and there are no further tries.
    - It streams. What fails is an event (or a cut connection), behind what was translated before.
    - Its end was sent: it is finished, whatever the client or the upstream does now.

    A task of its own runs `stream_response`; the request's listens for the client's leaving, and
    looks in where something may be due. A client that leaves, in whatever state, ends the other
    task, and so does one that holds up a write for CLIENT_TIMEOUT, be it a heartbeat or an error.
    An upstream that falls silent while a write is held up is not looked at before that is over.
    """

    def __init__(self, request: ModelRequest, form: Format, state: AppState) -> None:
        super().__init__(self.answer())
        # Fewer than 30 names in all: beyond that each instance has a table of its own, 1.5 KiB.
        self.request, self.format, self.state = request, form, state
        self.tries = Tries(state["upstream"], request)
        self.upstream: httpx2.Response | None = None
        self.begin_try()
        # In the client's format, but not written yet.
        self.pending = b""
        self.failure: Failure | None = None
        # Of the response: its head was sent (by a heartbeat perhaps), the upstream's answer has
        # begun, all of it was sent; and then the closing event was logged.
        self.started = self.opened = self.complete = self.settled = False
        self.started_at = self.last_write = self.silent_since = clock()
        self.first_seconds: float | None = None  # from there to the first piece
        # Set while a write is under way, which a client that does not read holds up.
        self.writing_since = math.inf

    def begin_try(self) -> None:
        fold = ChatFold if self.request.path == "chat/completions" else ResponsesFold
        told = (self.request.model, self.request.stream, "temperature" in self.tries.refused)
        self.fold: ChatFold | ResponsesFold = fold(*told)
        self.decoder = SSEDecoder() if self.request.stream else BodyDecoder()
        self.progress = 0  # the fold's, when `end_due` was set

    async def answer(self) -> AsyncGenerator[bytes]:
        """The model's answer in the client's format; what comes with its end is left `pending`."""
        await self.open()
        while not self.fold.done:
            if data := self.pending:
                self.pending = b""
                yield data
            await self.read_on()

    async def open(self) -> None:
        """Ask until an answer has begun: until then a failure may be mended by another try."""
        while not (self.pending or self.fold.done):
            try:
                if self.upstream is None:
                    self.upstream = await self.tries.send()
                    self.reads = read_upstream(self.upstream)
                await self.read_on()
            except Failure as failure:
                await self.try_again(failure)
        if helpful := self.tries.helpful:  # the model answers: spare others the refusal
            self.state["upstream"].remember(self.request.model, frozenset(helpful.values()))
        self.tries.release()
        self.opened = True

    async def try_again(self, failure: Failure) -> None:
        """Wait for the next try, or raise *failure*."""
        error = failure.upstream
        if error:  # an answer ends the upstream's silence, a lost connection does not
            self.silent_since = clock()
        if error and error.in_answer and error.status and self.upstream:
            patience = parse_retry_after(self.upstream.headers.get("retry-after", ""))
            failure = from_upstream(replace(error, retry_after=patience))
        broken = self.fold.received and not (error and error.status)
        final = self.started or self.pending or broken
        delay = None if final else self.tries.delay(failure)
        deadline = self.silent_since + self.state["settings"].openai_timeout
        if delay is None or clock() + delay >= deadline:
            raise failure
        await self.close_upstream()
        await asyncio.sleep(delay)
        if self.started:  # a heartbeat went out meanwhile
            raise failure
        self.tries.again += 1
        self.begin_try()

    async def read_on(self) -> None:
        """Translate what the upstream says next; raises a Failure where that is no part or end."""
        self.silent_since = clock()
        try:
            read = await (self.read_end() if self.fold.finished else anext(self.reads, None))
        except Exception as exc:  # httpx2's, and aiohttp's own, which it lets through
            raise Failure("upstream_error", cause=type(exc).__name__) from exc
        if read is not None:
            self.fold.received = True
            self.translate(self.decoder.feed(read))
            return
        self.translate(self.decoder.close(), at_end=True)
        if not (self.fold.done or self.fold.finished):
            raise Failure("upstream_error", cause="an answer without an end")
        self.fold.done = True

    async def read_end(self) -> bytes | None:
        """What comes behind the last finish_reason; None, as at an end, after END_SECONDS."""
        if self.decoder.torn:  # half an event is here: there is more to come
            return await anext(self.reads, None)
        if self.progress != self.fold.progress:
            self.progress, self.end_due = self.fold.progress, clock() + END_SECONDS
        self.silent_since = math.inf  # such a silence is no failure
        with suppress(TimeoutError):
            async with asyncio.timeout(self.end_due - clock()):
                return await anext(self.reads, None)
        return None

    def translate(self, block: bytes, *, at_end: bool = False) -> None:
        """Add to `pending` what the events in *block* say; *at_end* the last may be cut off."""
        if not block:
            return
        in_haste = not (self.decoder.has_cr or at_end)
        told = self.format.skim(block, self.fold) if in_haste else None
        if told is not None:
            self.pending += told
            self.fold.has_piece = True
        elif len(parts := self.decoder.parts(block)) > 1:
            for part in parts:  # most of which want no look
                if not self.fold.done:
                    self.translate(part)
        else:
            for event in self.decoder.events(block):
                self.pending += self.format.event(event, self.fold.add(event), self.fold)
                if self.fold.done:
                    break
        if self.first_seconds is None and self.fold.has_piece and self.request.stream:
            self.first_seconds = clock() - self.started_at

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer until that is done, or the client has left or reads no more."""
        self.state["admission"].admit(self.request.caller, self.tries.cost)
        # Middleware changes heads alone, so all else goes straight to the server.
        self.send_head, self.send_body = send, scope["send_body"]
        answering = asyncio.create_task(self.stream_response(send))
        # One that has sent nothing ends without the server's knowledge.
        answering.add_done_callback(lambda _: end_now(self.waiting))
        try:
            await self.attend(receive, answering)
        finally:
            self.settle()
            if not answering.done():
                answering.cancel()
                await asyncio.wait([answering])
            await self.close_upstream()
            # Generator and time-out lead back here: only the garbage collector would free this.
            await cast(AsyncGenerator[bytes], self.body_iterator).aclose()
            self.timeout = asyncio.timeout(None)
        if self.failure and not self.started:
            await failure_response(scope, self.failure)(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        """As Starlette's, but the head waits for the first bytes: what fails before is a status."""
        try:
            pieces = cast(AsyncGenerator[bytes], self.body_iterator)
            async with asyncio.timeout(None) as self.timeout, aclosing(pieces):
                async for data in pieces:
                    await self.write(data)
            end: bytes | None = self.format.end(self.fold)
            if failed := self.fold.failure:
                self.fail(failed)
        except ClientDisconnect:
            return
        except Exception as exc:
            end = self.fail(exc)
            if not (self.started or self.pending):
                return
        with suppress(ClientDisconnect):
            await self.write(self.pending + (end or b""), last=end is not None)
            # Now, since the client may ask again before the connections here are put in order.
            self.settle()

    def fail(self, exc: Exception) -> bytes | None:
        """Make *exc* the failure of this answer; its end in the client's format, if it has one."""
        if isinstance(exc, TimeoutError):
            failure = Failure("upstream_timeout")
        elif not isinstance(exc, Failure):
            failure = Failure("internal_error")
            log.error("internal error", exc_info=exc)
        elif exc.upstream and exc.upstream.in_answer and (self.pending or self.opened):
            failure = Failure("upstream_error", upstream=replace(exc.upstream, status=None))
        else:
            failure = exc
        failure.mask(self.state["mask"])
        tried_again = self.tries.again and failure.status_code in {429, 502, 503, 504}
        if tried_again or failure.code == "upstream_auth":
            # OpenAI's libraries would multiply the tries, or repeat what no try can mend.
            failure.headers = {**(failure.headers or {}), "x-should-retry": "false"}
        # Without the frames that it has passed: they keep all this until it is found garbage.
        failure.__traceback__ = failure.__cause__ = failure.__context__ = None
        self.failure = failure
        return self.format.error(failure, get_contextvars()["request_id"], self.fold)

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Send *data* in one piece; raises ClientDisconnect where the client has gone."""
        now = clock()
        self.writing_since = min(self.writing_since, now)  # a heartbeat may be held up already
        try:
            if not self.started:
                self.started = True
                whole = last and not self.request.stream
                length = [(b"content-length", b"%d" % len(data))] if whole else []
                headers = [*self.format.headers, *length]
                head = {"type": "http.response.start", "status": 200, "headers": headers}
                await self.send_head(head)
            body = {"type": "http.response.body", "body": data, "more_body": not last}
            await self.send_body(body)
        except (OSError, RuntimeError) as exc:  # uvloop's, of a transport that is closed
            raise ClientDisconnect from exc
        self.complete = last
        self.writing_since = math.inf
        self.last_write = now

    async def attend(self, receive: Receive, answering: "asyncio.Task[None]") -> None:
        """Listen for the client until it is answered; look in where something may be due.

        That costs less than a timer for each read and write. It is a heartbeat, the end of the
        upstream's silence, or that of a client which reads no more.
        """
        settings = self.state["settings"]
        patience, silence = settings.client_timeout, settings.openai_timeout
        while not answering.done():
            now, writing = clock(), self.writing_since < math.inf
            held_up = self.writing_since + patience
            silent = math.inf if writing else self.silent_since + silence
            # No heartbeat behind a failure, which in the same turn of the loop would become a 200.
            quiet = writing or self.failure or self.complete or not self.format.heartbeat
            beat = math.inf if quiet else self.last_write + settings.heartbeat_seconds
            if now >= held_up:
                return
            if now >= silent:
                # Its error follows, and no heartbeat, which would make a 200 of the status.
                self.silent_since, self.last_write = math.inf, now
                end_now(self.timeout)
            elif now >= beat:
                with suppress(ClientDisconnect, TimeoutError):
                    async with asyncio.timeout(patience):
                        await self.write(self.format.heartbeat)
            else:
                # No longer than the last two: a write, or a silence, may begin meanwhile.
                seconds = min(held_up - now, silent - now, beat - now, patience, silence)
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds) as self.waiting:
                        await self.listen_for_disconnect(receive)
                        return

    async def close_upstream(self) -> None:
        response, self.upstream = self.upstream, None
        if response is None:
            return
        if self.complete:
            # Only a response read to its end leaves a connection that is used again.
            with suppress(Exception):  # whatever it says now
                async with asyncio.timeout(0.2):
                    while await anext(self.reads, None) is not None:
                        pass
        await response.aclose()

    def settle(self) -> None:
        """Give the place back, count and log, as every accepted ask does exactly once."""
        if self.settled:
            return
        self.settled = True
        outcome: Outcome = "finished" if self.complete else "cancelled"
        if self.failure:
            outcome = "failed"
        self.state["admission"].leave(outcome, self.tries.cost, self.tokens_spent())
        self.count(self.failure.code if self.failure else "" if self.complete else outcome)
        levels = {"finished": log.info, "cancelled": log.warning, "failed": log.error}
        levels[outcome](f"ask {outcome}", **self.closing_facts())

    def closing_facts(self) -> dict[str, object]:
        fold, failure = self.fold, self.failure
        facts: dict[str, object] = {
            "stream": self.request.stream,
            **ending(fold),
            **fold.usage,
            "prompt_chars": self.request.prompt_chars,
            "answer_chars": fold.answer_chars or None,
            "first_token_ms": self.first_seconds and round(self.first_seconds * 1000, 1),
            "duration_ms": round((clock() - self.started_at) * 1000, 1),
            "user": self.request.caller.user,
            "usage": None,
        }
        if failure:
            facts |= {"code": failure.code, "status": failure.status_code, "cause": failure.cause}
            # Of a refusal the status alone, since its message may quote the prompt.
            if (error := failure.upstream) and error.in_answer:
                facts["upstream_message"] = error.message or None
            elif error:
                facts["cause"] = failure.cause or f"HTTP {error.status}"
        return {name: value for name, value in facts.items() if value is not None}

    def tokens_spent(self) -> int:
        """The tokens for DAILY_TOKENS: the upstream's figure, or an estimate where it told none."""
        told, failure = self.fold.tokens_used, self.failure
        # A zero beside a text is what some tell at first, and others always.
        final = self.complete and not failure
        if final and (told or (told == 0 and not self.fold.has_piece)):
            return told
        refused = failure and failure.upstream and failure.upstream.status
        if refused or (failure and failure.code == "upstream_unreachable"):
            return 0
        return max(told or 0, self.tries.estimate + self.fold.received_tokens())

    def count(self, error_type: str) -> None:
        metrics, model = self.state["metrics"], self.request.model
        metrics.tokens_used += self.fold.tokens_used or 0
        metrics.observe(DURATION, clock() - self.started_at, model, f'error_type="{error_type}"')
        if self.first_seconds is not None:
            metrics.observe(FIRST_CHUNK, self.first_seconds, model)
        for kind, name in (("input", "prompt_tokens"), ("output", "completion_tokens")):
            if (tokens := self.fold.usage.get(name)) is not None:
                metrics.observe(TOKEN_USAGE, tokens, model, f'gen_ai_token_type="{kind}"')


async def ask(request: Request[AppState]) -> Response:
    """POST /ask: as events, as one JSON object, or as text."""
    state, caller = request.state, identify(request)
    settings = state["settings"]
    body = await read_body(request, settings, partial(validate, state["models"].ask))
    types = request.headers.get("accept", "").lower().split(",")
    accepted = [each.partition(";")[0].strip() for each in types]
    stream = accepted != [JSON] if body.stream is MISSING else body.stream
    as_text = accepted[0] == "text/plain"
    if as_text and request.scope["http_version"] == "1.0":
        stream = False  # its text ends where the connection does, so a cut one would look complete
    form = AskText(stream) if as_text else AskEvents() if stream else AskJSON()
    return Exchange(read_ask(body, caller, settings, stream=stream), form, state)


async def chat_completions(request: Request[AppState]) -> Response:
    """POST /v1/chat/completions: OpenAI's own API, for its own libraries."""
    state, caller = request.state, identify(request)
    read = partial(read_chat, state["models"].chat, caller, state["settings"])
    asked, usage = await read_body(request, state["settings"], read)
    return Exchange(asked, ChatCompletionEvents(usage) if asked.stream else Format(), state)


async def responses(request: Request[AppState]) -> Response:
    """POST /v1/responses: OpenAI's newer API, which its newest clients prefer."""
    state, caller = request.state, identify(request)
    read = partial(read_responses, state["models"].newer, caller, state["settings"])
    asked = await read_body(request, state["settings"], read)
    return Exchange(asked, ResponsesEvents() if asked.stream else Format(), state)


async def models(request: Request[AppState]) -> Response:
    """GET /v1/models, and GET /v1/models/{id}."""
    identify(request)
    known = {
        name: {"id": name, "object": "model", "created": 0, "owned_by": "openai-backend"}
        for name in request.state["settings"].models
    }
    if "id" not in request.path_params:
        return json_response({"object": "list", "data": [*known.values()]})
    if model := known.get(request.path_params["id"]):
        return json_response(model)
    raise wrong_field("model", "No such model", "model_not_found")


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
    state, settings = request.state, request.state["settings"]
    keyed = bool(settings.openai_api_key) and not settings.demo
    answer = Status(
        status="running",
        version=VERSION,
        openai_connected=keyed and await state["upstream"].connected(),
        model="demo" if settings.demo else settings.openai_model,
        uptime_seconds=round(time.monotonic() - state["started"], 1),
        asks=state["admission"].asks,
        tokens_used=state["metrics"].tokens_used,
    )
    return json_response(answer)


async def logs(request: Request[AppState]) -> Response:
    """GET /logs: the newest events, of all levels or of one."""
    require_operator(request)
    query = validate(LogsQuery, {**request.query_params})
    wanted = None if query.level is MISSING else query.level
    return json_response(await request.state["events"].tail(level=wanted, limit=query.limit))


async def metrics(request: Request[AppState]) -> Response:
    require_operator(request)
    lines = request.state["metrics"].exposition(request.state["admission"].asks)
    text = "".join(f"{line}\n" for line in lines)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def as_failure(exc: Exception) -> Failure:
    """*exc* as one of ERRORS: the router's own, or a defect."""
    if isinstance(exc, Failure):
        return exc
    if not isinstance(exc, HTTPException):
        return Failure("internal_error")
    if exc.status_code == 405:
        return Failure("method_not_allowed", headers=exc.headers)
    known = f"OpenAI's API is at {', '.join(V1_PATHS)}."
    return Failure("not_found", f"There is nothing at this path; {known}")


async def error_response(request: Request[Any], exc: Exception) -> Response:
    """The answer to a request that was not accepted; for an ask it is counted and logged."""
    scope, path = request.scope, route_path(request.scope)
    failure = as_failure(exc)
    if path in ASK_PATHS and not isinstance(exc, ClientDisconnect):
        refused = scope["state"]["metrics"].refused
        refused[failure.code] = refused.get(failure.code, 0) + 1
        stranger = failure.code if "user" not in scope or scope["user"].stranger else None
        told = {"code": failure.code, "status": failure.status_code, "stranger": stranger}
        fields = {"fields": [each["field"] for each in failure.errors]} if failure.errors else {}
        log.info("ask refused", **told, **fields)
    return failure_response(scope, failure)


# The headers of all responses.
ALWAYS = ((b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY"))


class RequestMiddleware:
    """Gives each request its id: on the response, in errors, and in every event logged for it.

    It also adds the headers that all responses have. It is the outermost, so it keeps the server's
    own `send` for Exchange, whose body passes no middleware.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        good = re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) and not re.search(KEY_SHAPED, given)
        request_id = given if good else secrets.token_hex(16)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"x-request-id", request_id.encode()), *ALWAYS]
                if b"cache-control" not in {name for name, _ in headers}:
                    headers.append((b"cache-control", b"no-store"))
                message = {**message, "headers": headers}
            try:
                await send(message)
            except (OSError, RuntimeError) as exc:  # uvloop's, of a transport that is closed
                raise ClientDisconnect from exc

        # Never unbound: the context ends with uvicorn's task, which first logs what is raised here.
        bind_contextvars(request_id=request_id)
        scope["send_body"] = send
        try:
            with suppress(ClientDisconnect):  # which is no defect; nobody reads the answer then
                await self.app(scope, receive, send_with_headers)
        finally:
            del scope["send_body"]  # which has the scope, in a circle


class GateMiddleware(CORSMiddleware):
    """CORS, and behind it, so that its errors have CORS headers too, the checks of Host and Origin.

    They refuse names that DNS rebinding would carry, and what pages of other origins post.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        super().__init__(
            self.check,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            # The last is for OpenAI's library in a browser.
            expose_headers=["Retry-After", "X-Request-ID", "X-Should-Retry"],
            allow_private_network=True,
        )
        self.checked_app, self.hosts = app, frozenset(settings.allowed_hosts)

    async def check(self, scope: Scope, receive: Receive, send: Send) -> None:
        failure = self.refusal(scope) if scope["type"] == "http" else None
        app = await error_response(Request(scope), failure) if failure else self.checked_app
        await app(scope, receive, send)

    def refusal(self, scope: Scope) -> Failure | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", "").lower(), headers.get("origin", "")
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        if has_body and "upgrade" in headers:
            # uvicorn's parser loses the body (uvicorn#2722), or takes it for the next request.
            return Failure("upgrade_not_supported", headers={"Connection": "close"})
        if host and not self.allows_host(host, scope["server"]):
            return Failure("host_not_allowed")
        # A page of the service itself: no scheme, since a proxy may have taken the TLS off.
        own = host and origin.partition("://")[2] == host
        if scope["method"] != "POST" or not origin or own or self.is_allowed_origin(origin):
            return None
        self.warn(origin)
        return Failure("origin_not_allowed")

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

    def preflight_response(self, request_headers: Headers) -> Response:
        if not self.is_allowed_origin(request_headers["origin"]):
            self.warn(request_headers["origin"])
        return super().preflight_response(request_headers)

    def warn(self, origin: str) -> None:
        """Tell the developer, whose browser does not."""
        remedy = "add it to CORS_ORIGINS"
        log.warning("origin not allowed", origin=origin, remedy=remedy, stranger="origin")


# What is raised where the log database cannot be used; TimeoutError is an OSError.
UNUSABLE = (sqlite3.Error, OSError, ValueError)


class LogDatabase:
    """The newest events, and the day's tokens, of all processes that share a SQLite file.

    While it serves, one thread alone touches the file, so that no lock and no full disk holds up an
    ask: what cannot be written waits and is tried again; where nothing can be read *ring* answers.
    """

    SCHEMA: Mapping[str, str] = {
        "events": "CREATE TABLE events (id INTEGER PRIMARY KEY AUTOINCREMENT, "
        "level TEXT NOT NULL, event TEXT NOT NULL)",
        "tokens": "CREATE TABLE tokens (day INTEGER PRIMARY KEY, used INTEGER NOT NULL)",
    }
    WRITE_SECONDS, READ_SECONDS = 0.25, 2

    def __init__(self, path: str, ring: EventLog) -> None:
        """Opens the file at *path*; raises ConfigError where it cannot be used."""
        self.path, self.ring = path, ring
        self.waiting: deque[LogEvent] = deque(maxlen=ring.events.maxlen)
        self.connection: sqlite3.Connection | None = None
        self.thread = ThreadPoolExecutor(1)
        self.stopping = self.closed = False
        try:
            self.open()
        except UNUSABLE as exc:
            locked = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_PROTOCOL}
            if getattr(exc, "sqlite_errorcode", 0) & 0xFF not in locked:
                raise ConfigError(f"LOG_DATABASE: {path!a} cannot be used: {exc}") from exc

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        self.waiting.append(as_log_event(event))
        if self.closed:  # what the server says behind the lifespan: SIGTERM may end it at once
            with suppress(*UNUSABLE):
                self.write()
            self.disconnect()
        return event

    def open(self) -> sqlite3.Connection:
        if self.connection is None:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            connection = sqlite3.connect(self.path, timeout=0.2, check_same_thread=False)
            try:
                self.prepare(connection)
            except UNUSABLE:
                connection.close()
                raise
            self.connection = connection
        return self.connection

    def prepare(self, connection: sqlite3.Connection) -> None:
        """Raises sqlite3.Error or ValueError where the file is no log of this service."""
        with connection:  # which leaves the file as it was where anything fails
            connection.execute("BEGIN IMMEDIATE")
            found = dict(connection.execute("SELECT name, sql FROM sqlite_schema WHERE sql > ''"))
            for name, sql in self.SCHEMA.items():
                if name not in found:
                    connection.execute(sql)
                elif found[name] != sql:
                    raise ValueError(f"its table {name} has another schema; name a new file")
            # Fails where the file is read-only, as BEGIN IMMEDIATE does not.
            connection.execute("DELETE FROM events WHERE false")
        connection.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL")
        for path in (self.path, f"{self.path}-wal", f"{self.path}-shm"):
            with suppress(FileNotFoundError):
                os.chmod(path, 0o600)  # they hold the names of users

    def disconnect(self) -> None:
        if self.connection is not None:
            self.connection.close()  # the last one leaves no -wal behind
            self.connection = None

    def write(self) -> None:
        """Raises one of UNUSABLE where what waits cannot be written."""
        events = list(self.waiting)
        if not events:
            return
        rows = [(each["level"], utf8_json(to_json(each)).decode()) for each in events]
        with self.open() as transaction:
            transaction.executemany("INSERT INTO events (level, event) VALUES (?, ?)", rows)
            too_old = "DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?"
            transaction.execute(too_old, (self.waiting.maxlen,))
        for event in events:
            # The deque itself may have dropped some meanwhile, to make room.
            if self.waiting and self.waiting[0] is event:
                self.waiting.popleft()

    def read(self, level: str | None, limit: int) -> list[LogEvent]:
        with suppress(*UNUSABLE):
            self.write()
        newest = "SELECT event FROM events WHERE ? IN (level, '') ORDER BY id DESC LIMIT ?"
        rows = self.open().execute(newest, (level or "", limit))
        written: list[LogEvent] = [json.loads(event) for (event,) in rows][::-1]
        waiting = [each for each in list(self.waiting) if level in (None, each["level"])]
        return [*written, *waiting][-limit:]

    async def tail(self, *, level: str | None, limit: int) -> list[LogEvent]:
        """As the ring's, of all processes; those of this one that wait to be written come last."""
        loop = asyncio.get_running_loop()
        with suppress(*UNUSABLE):
            async with asyncio.timeout(self.READ_SECONDS):
                return await loop.run_in_executor(self.thread, self.read, level, limit)
        return await self.ring.tail(level=level, limit=limit)

    def add_tokens(self, day: int, tokens: int) -> int:
        """The tokens that all processes have used on *day*, with *tokens* more of this one."""
        add = (
            "INSERT INTO tokens VALUES (?, ?) "
            "ON CONFLICT (day) DO UPDATE SET used = used + excluded.used RETURNING used"
        )
        with self.open() as transaction:
            return int(transaction.execute(add, (day, tokens)).fetchone()[0])

    async def share(self, budget: DailyBudget) -> None:
        """Write what waits, and make *budget* that of all processes."""
        loop = asyncio.get_running_loop()
        with suppress(*UNUSABLE):
            await loop.run_in_executor(self.thread, self.write)
            budget.turn_page()
            day, tokens = budget.day, budget.unshared
            if not (budget.limit or tokens):
                return
            used = await loop.run_in_executor(self.thread, self.add_tokens, day, tokens)
            if day == budget.day:  # else midnight has come meanwhile
                budget.unshared -= tokens
                budget.learn(used, tokens)

    @asynccontextmanager
    async def keep(self, budget: DailyBudget) -> AsyncIterator[None]:
        """Meanwhile what is logged and spent goes into the file every WRITE_SECONDS."""

        async def keep_sharing() -> None:
            while not self.stopping:
                await asyncio.sleep(self.WRITE_SECONDS)
                await self.share(budget)

        await self.share(budget)  # what was used before a restart
        keeper = asyncio.create_task(keep_sharing())
        try:
            yield
        finally:
            self.stopping = True
            await keeper  # to cancel it might count tokens twice, or never
            await self.share(budget)
            self.thread.shutdown()
            self.disconnect()
            self.closed = True


def words(text: str) -> list[str]:
    """Each with the white space before it; the demo model counts one as a token."""
    return re.findall(r"\s*\S+", text)


@dataclass(frozen=True)
class DemoAnswer:
    """How the demo model answers; *delay* is the seconds before the first word."""

    text: str
    reasoning: str = ""
    delay: float = 0
    finish_reason: str = "stop"
    cut: bool = False

    def up_to(self, limit: int) -> "DemoAnswer":
        """Its first *limit* words, reasoning included; 0 is no limit."""
        thoughts, said = words(self.reasoning), words(self.text)
        if not 0 < limit < len(thoughts) + len(said):
            return self
        text = "".join(said[: max(0, limit - len(thoughts))])
        return replace(self, text=text, reasoning="".join(thoughts[:limit]), finish_reason="length")

    def usage(self, asked: int, read: str, written: str) -> JsonObject:
        """The usage, by the API's own words for tokens *read* and *written*."""
        thoughts = len(words(self.reasoning))
        answered = thoughts + len(words(self.text))
        return {
            f"{read}_tokens": asked,
            f"{written}_tokens": answered,
            "total_tokens": asked + answered,
            f"{written}_tokens_details": {"reasoning_tokens": thoughts},
        }


# A prompt that begins with one of these words, so that a front end meets every branch.
DEMO_ANSWERS: Mapping[str, DemoAnswer] = {
    "/cut": DemoAnswer("This answer of the demo model breaks off", cut=True),
    "/slow": DemoAnswer("This answer of the demo model took 20 seconds to begin.", delay=20),
    "/reason": DemoAnswer(
        "This is the demo model's answer.", "The demo model thinks aloud before it speaks."
    ),
    "/long": DemoAnswer(" ".join(["This is the demo model, and it talks and talks."] * 50)),
    "/empty": DemoAnswer("", finish_reason="length"),
}


class DemoTransport(httpx2.AsyncBaseTransport):
    """The demo model, in the place of a network: all else on an ask's way is the real thing."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        said = body.get("messages") or body.get("input")
        turns = said if isinstance(said, list) else [{"content": said}]
        prompt = "".join(texts_of(turns[-1:]))
        first, second, *_ = [*prompt[:100].split(), "", ""]
        if first == "/error" and second in {"400", "401", "429", "500", "503"}:
            headers = {"Retry-After": "3"} if second == "429" else {}
            error = {"message": f"The demo model was asked for a {second}.", "type": "demo"}
            return httpx2.Response(int(second), headers=headers, json={"error": error})
        quoted = prompt if len(prompt) <= 2000 else f"{prompt[:2000]} [...]"
        usual = DemoAnswer(f"This is the demo model, not OpenAI. You said: “{quoted}”")
        answer = DEMO_ANSWERS.get(first, usual).up_to(output_bound(body))
        asked = sum(len(text.split()) for text in texts_of(turns))
        newer = request.url.path.endswith("/responses")
        events, plain = (demo_responses if newer else demo_chat)(answer, asked)
        if body.get("stream"):
            return httpx2.Response(200, content=self.paced(events, answer.delay))
        await asyncio.sleep(answer.delay)
        content = utf8_json(to_json(plain))
        return httpx2.Response(200, content=content[:100] if answer.cut else content)

    async def paced(self, events: list[bytes], delay: float) -> AsyncIterator[bytes]:
        """*events* at a pace a person can watch, with *delay* behind the first."""
        for index, event in enumerate(events):
            yield event
            await asyncio.sleep(0.04 if index else delay)


def demo_chat(answer: DemoAnswer, asked: int) -> tuple[list[bytes], Chunk]:
    """The *answer* as a stream of chat completion chunks, and as one plain completion."""
    head = {"id": "chatcmpl-demo", "model": "demo", "created": int(time.time())}
    usage = answer.usage(asked, "prompt", "completion")

    def chunk(delta: JsonObject, reason: str | None = None) -> Chunk:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return {**head, "object": "chat.completion.chunk", "choices": [choice]}

    chunks = [chunk({"role": "assistant", "content": ""})]
    chunks += [chunk({"reasoning_content": word}) for word in words(answer.reasoning)]
    chunks += [chunk({"content": word}) for word in words(answer.text)]
    ends = [chunk({}, answer.finish_reason), chunk({}) | {"choices": [], "usage": usage}]
    events = [*map(sse_event, chunks)]
    if not answer.cut:
        events += [*map(sse_event, ends), END_MARK]
    thoughts = answer.reasoning or None
    message = {"role": "assistant", "content": answer.text, "reasoning_content": thoughts}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
    return events, {**head, "object": "chat.completion", "choices": [choice], "usage": usage}


def demo_responses(answer: DemoAnswer, asked: int) -> tuple[list[bytes], Chunk]:
    """The *answer* as a stream of the Responses API, and as one plain response."""
    state = "completed" if answer.finish_reason == "stop" else "incomplete"
    begun: Chunk = {"id": "resp_demo", "object": "response", "model": "demo", "output": []}
    begun |= {"created_at": int(time.time()), "status": "in_progress", "tools": [], "error": None}
    begun |= {"parallel_tool_calls": True, "tool_choice": "auto", "incomplete_details": None}
    said = {"type": "output_text", "annotations": [], "text": answer.text}
    message = {"type": "message", "role": "assistant", "status": state, "content": [said]}
    output: list[Chunk] = [{"id": "msg_demo", **message}]
    if answer.reasoning:
        thought = {"type": "summary_text", "text": answer.reasoning}
        output.insert(0, {"id": "rs_demo", "type": "reasoning", "summary": [thought]})
    whole = begun | {"status": state, "output": output}
    whole["usage"] = answer.usage(asked, "input", "output")
    if state == "incomplete":
        whole["incomplete_details"] = {"reason": "max_output_tokens"}
    events: list[Chunk] = [{"type": "response.created", "response": begun}]
    for index, item in enumerate(output):
        events += item_events(index, item)
    events.append({"type": f"response.{state}", "response": whole})
    if answer.cut:
        del events[-4:]  # the ends of the text, of its part, of its item and of the response
    numbered = (event | {"sequence_number": number} for number, event in enumerate(events))
    return [f"event: {each['type']}\n".encode() + sse_event(each) for each in numbered], whole


def item_events(index: int, item: Chunk) -> list[Chunk]:
    """The events of one *item* of the output, which has one part."""
    parts, section, name = "content", "content_part", "output_text"
    if item["type"] == "reasoning":
        parts, section, name = "summary", "reasoning_summary_part", "reasoning_summary_text"
    (part,) = item[parts]
    place = {"output_index": index}
    where = {**place, "item_id": item["id"], f"{parts}_index": 0}
    return [
        {"type": "response.output_item.added", **place, "item": item | {parts: []}},
        {"type": f"response.{section}.added", **where, "part": part | {"text": ""}},
        *(
            {"type": f"response.{name}.delta", **where, "delta": word}
            for word in words(part["text"])
        ),
        {"type": f"response.{name}.done", **where, "text": part["text"]},
        {"type": f"response.{section}.done", **where, "part": part},
        {"type": "response.output_item.done", **place, "item": item},
    ]


def ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


class UntitledSchema(GenerateJsonSchema):
    """Schemas without a title for each field: generators of clients would name types after them."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schemas(settings: Settings) -> dict[str, Any]:
    """What goes over the wire: requests as they are validated, the rest as it is typed."""
    sent = (Answer, PieceEvent, DoneEvent, ErrorEvent, Problem, OpenAIErrorBody, Status, LogEvent)
    types: tuple[type[Any], ...] = (*request_models(settings), *sent, Model)
    _, document = TypeAdapter.json_schemas(
        [(each.__name__, "validation", TypeAdapter(each)) for each in types],
        ref_template=ref("{model}")["$ref"],
        schema_generator=UntitledSchema,
    )
    return cast(dict[str, Any], document["$defs"])


TEXT, OBJECT = {"schema": {"type": "string"}}, {"schema": {"type": "object"}}
# No ask is answered with these, or only under /v1, or only where it wants a token.
OTHER_CODES = {"not_found", "method_not_allowed", "model_not_found", "unauthorized"}


def operation(
    name: str, summary: str, content: object, codes: Iterable[Code] = (), secured: bool = False
) -> dict[str, Any]:
    """An operation that answers with *content*, or with the error of one of *codes*."""
    answers: dict[str, Any] = {"200": {"description": "OK", "content": content}}
    v1 = name in {"createChatCompletion", "createResponse", "listModels", "retrieveModel"}
    kind, schema = (JSON, "OpenAIErrorBody") if v1 else (PROBLEM, "Problem")
    possible = {"host_not_allowed", *codes, *["unauthorized"] * secured, "internal_error"}
    for failure in (Failure(code, retry_after=12) for code in ERRORS if code in possible):
        content = {kind: {"schema": ref(schema), "examples": {}}}
        new = {"description": failure.title, "content": content}
        answer = answers.setdefault(str(failure.status_code), new)
        shown = failure.openai_error() if v1 else failure.problem("7f0c2a")
        answer["content"][kind]["examples"][failure.code] = {"value": shown}
    extra = {"401": "WWW-Authenticate"} | dict.fromkeys(("429", "502", "503"), "Retry-After")
    for status_code, answer in answers.items():
        names = filter(None, ("X-Request-ID", extra.get(status_code)))
        answer["headers"] = dict.fromkeys(names, TEXT)
    security: dict[str, Any] = {"security": [{"bearer": []}]} if secured else {}
    return {"operationId": name, "summary": summary, "responses": answers, **security}


def event_stream(data: object, example: bytes) -> dict[str, Any]:
    """The schema of one event; OpenAPI 3.1 has none for a stream (3.2: itemSchema)."""
    kinds: list[object] = [{"contentMediaType": JSON, "contentSchema": data}]
    kinds += [{"const": "[DONE]"}] * example.endswith(END_MARK)
    line = {"type": "string", "anyOf": kinds}
    event = {"type": "object", "properties": {"data": line}, "required": ["data"]}
    return {"schema": event, "example": example.decode()}


def post_operations(secured: bool) -> dict[str, Any]:
    """What asks the model; JSON first, since generated clients take that."""

    def post(name: str, api: str, body: str, example: object, content: object) -> dict[str, Any]:
        codes = ERRORS.keys() - OTHER_CODES | ({"model_not_found"} if api else set())
        asked = {"required": True, "content": {JSON: {"schema": ref(body), "example": example}}}
        found = operation(name, f"Ask{api}", content, codes, secured)
        return {"post": found | {"requestBody": asked}}

    usual = {"prompt": "Say hello in three languages.", "temperature": 0.7, "max_tokens": 1000}
    pieces = [
        {"type": "reasoning", "content": "The user greets"},
        {"type": "delta", "content": "Hola"},
        {"type": "done", "finish_reason": "stop", "tokens_used": 9, "model": "gpt-5.4-mini"},
    ]
    event = {"oneOf": [ref("PieceEvent"), ref("DoneEvent"), ref("ErrorEvent")]}
    stream = event_stream(event, b"".join(map(sse_event, pieces)) + END_MARK)
    answer = {JSON: {"schema": ref("Answer")}, SSE: stream, "text/plain": TEXT}
    chat = {"messages": [{"role": "user", "content": "Hola"}]}
    chunk = b'data: {"choices":[{"index":0,"delta":{"content":"Hola"}}]}\n\n' + END_MARK
    delta = b"event: response.output_text.delta\n"
    delta += b'data: {"type":"response.output_text.delta","delta":"Hola"}\n\n'
    older = "createChatCompletion", ", as with OpenAI's own API", "ChatCompletionRequest"
    newer = "createResponse", ", as with OpenAI's newer API", "ResponsesRequest"
    chunks, events = (event_stream({"type": "object"}, each) for each in (chunk, delta))
    return {
        "/ask": post("ask", "", "Ask", usual, answer),
        "/v1/chat/completions": post(*older, chat, {JSON: OBJECT, SSE: chunks}),
        "/v1/responses": post(*newer, {"input": "Hola"}, {JSON: OBJECT, SSE: events}),
    }


def get_operations(asks: bool, logs: bool) -> dict[str, Any]:
    """What is read; *asks* and *logs* say whether those want a token."""
    query = LogsQuery.model_json_schema()["properties"].items()
    of_logs = [{"name": name, "in": "query", "schema": each} for name, each in query]
    of_model = [{"name": "id", "in": "path", "required": True, **TEXT}]
    html, text, document = {"text/html": TEXT}, {"text/plain": TEXT}, {JSON: OBJECT}
    state, one = ({JSON: {"schema": ref(each)}} for each in ("Status", "Model"))
    events = {JSON: {"schema": {"type": "array", "items": ref("LogEvent")}}}
    fields = {"object": {"const": "list"}, "data": {"type": "array", "items": ref("Model")}}
    known = {JSON: {"schema": {"type": "object", "properties": fields, "required": [*fields]}}}
    found = {
        "/": operation("page", "A page to ask from", html),
        "/status": operation("status", "Whether it all works", state),
        "/logs": operation("logs", "Newest events", events, ["invalid_request"], logs),
        "/metrics": operation("metrics", "For Prometheus", text, secured=logs),
        "/v1/models": operation("listModels", "What may be named", known, secured=asks),
        "/v1/models/{id}": operation("retrieveModel", "One", one, ["model_not_found"], asks),
        "/openapi.json": operation("document", "This document", document),
        "/docs": operation("swaggerUI", "This document in Swagger UI", html),
        "/redoc": operation("redoc", "This document in ReDoc", html),
    }
    found["/logs"]["parameters"], found["/v1/models/{id}"]["parameters"] = of_logs, of_model
    return {path: {"get": each} for path, each in found.items()}


def openapi(settings: Settings) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the service."""
    asks, logs = settings.wants_token, settings.wants_token or bool(settings.admin_token)
    bearer = {"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "OpenAI back end", "version": VERSION},
        "servers": [{"url": "."}],
        "paths": post_operations(asks) | get_operations(asks, logs),
        "components": {"schemas": schemas(settings)} | (bearer if logs else {}),
    }


CDN = "https://cdn.jsdelivr.net/npm"
SWAGGER, REDOC = f"{CDN}/swagger-ui-dist@5.35.0/swagger-ui", f"{CDN}/redoc@2.5.4"


def docs_page(script: str, integrity: str, start: str, head: str = "") -> Response:
    """A page around a *script* of the CDN; *integrity* is that of the npm package's own file."""
    return HTMLResponse(f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>OpenAI back end</title>{head}</head>
<body><div id="ui"></div><script src="{script}" integrity="sha384-{integrity}"
crossorigin="anonymous"
onerror="document.body.textContent = 'The CDN cannot be reached; see openapi.json.'"></script>
<script>{start}</script></body></html>""")


SWAGGER_UI = docs_page(
    f"{SWAGGER}-bundle.js",
    "gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9",
    "window.SwaggerUIBundle?.({url: 'openapi.json', dom_id: '#ui'})",
    f"""<link rel="stylesheet" href="{SWAGGER}.css" crossorigin="anonymous"
integrity="sha384-WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I">""",
)
REDOC_UI = docs_page(
    f"{REDOC}/bundles/redoc.standalone.js",
    "w447zOpYfw/1Tv/5AK9NfHTlQIqE3RVR6KY62jCyy9zNDgO64cMwGGP1Fj0zJVf5",
    "window.Redoc?.init('openapi.json', {}, document.getElementById('ui'))",
)
PAGE_STYLE = r"""
:root { color-scheme: light dark; --paper: light-dark(#fcfbf9, #121417);
  --field: light-dark(#fff, #191c20); --tint: light-dark(#f2f1ed, #1e2226);
  --line: light-dark(#e4e1da, #2c3136); --edge: light-dark(#85888c, #747a82);
  --ink: light-dark(#1b1e22, #e8e6e1); --quiet: light-dark(#5c6067, #a1a6ad);
  --accent: light-dark(#0d5c75, #7ac6dc); --warn: light-dark(#8a5800, #e0b155);
  --bad: light-dark(#b3261e, #ff9488); scrollbar-gutter: stable; }
* { box-sizing: border-box; margin: 0; color: inherit; font: inherit; }
body { max-width: 84rem; margin: auto; padding: 0 clamp(1rem, 4vw, 3rem) 2rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.6 system-ui, sans-serif; overflow-wrap: anywhere; }
.sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
main, #turns, aside { display: grid; grid-template-columns: minmax(0, 1fr); gap: 2.5rem; }
header, .head, .row { display: flex; flex-wrap: wrap; align-items: center; gap: 0.25rem 0.5rem; }
header { margin-bottom: 2rem; padding: 1.25rem 0; border-bottom: 1px solid var(--line); }
h1, h2, h4, b { font-weight: 620; }
h1, h2 { flex: 1 0 auto; font-size: 1.0625rem; }
nav a { margin-left: 0.75rem; color: var(--accent); }
.head { min-height: 2.25rem; margin-bottom: 0.5rem; }
nav, aside p, #health, #intro, #hints, .quiet, small, summary, label, #state, details p,
  #chart > i { color: var(--quiet); font-size: 0.875rem; }
#health { flex-basis: 100%; } #intro { min-height: 3.2em; }
#health::before { content: "● "; color: var(--accent); }
p.bad, p.bad::before { color: var(--bad) !important; }
section:has(article) #intro, section:not(:has(article)) #anew, form:not([aria-busy]) #stop,
  select:empty, details:has(p:empty), .failed .answer:empty { display: none; }
input, select, button { padding: 0.25rem 0.75rem; border: 1px solid var(--edge);
  border-radius: 0.5rem; background: var(--field); color: var(--ink); font-size: 0.875rem; }
:is(.head, footer, p) button { padding: 0.125rem 0.5rem; border-color: var(--line); }
button:hover, [aria-pressed="true"] { border-color: currentColor; color: var(--accent); }
::placeholder { color: var(--quiet); opacity: 1; }
#form { position: sticky; bottom: 0; z-index: 1; padding: 1rem 0 0; background: var(--paper); }
#form > .row { min-height: 1.75rem; justify-content: space-between; }
#box { padding: 0.5rem 0.5rem 0.5rem 1rem; border: 1px solid var(--edge); border-radius: 0.875rem;
  background: var(--field); }
#box:focus-within { border-color: var(--accent); box-shadow: 0 0 0 1px var(--accent); }
#prompt { width: 100%; min-height: 4rem; max-height: 40vh; padding: 0.5rem 0; border: 0; outline: 0;
  background: none; resize: none; field-sizing: content; vertical-align: top; }
label input, #word { display: block; width: 8rem; }
#options, summary { min-height: 1.5rem; margin-right: auto; }
#ask { background: var(--accent); color: var(--paper); forced-color-adjust: none; }
#ask[aria-disabled] { opacity: 0.5; }
#hints { line-height: 2.25; visibility: hidden; }
.active footer { visibility: hidden; }
article:last-child { min-height: calc(100dvh - 20rem); }
article > * + *, :is(.answer, .failure) > * + * { margin-top: 0.75rem; }
h3 { width: fit-content; padding: 0.5rem 1rem; border-radius: 0.75rem; background: var(--tint); }
h3, h4, article p, li { white-space: pre-wrap; }
.answer { max-width: 44rem; min-height: 1.6em; }
.answer :is(ol, ul) { padding-left: 1.75rem; }
.active .answer:empty::after, .active p:last-child::after { content: "▍"; color: var(--accent); }
.finished .answer:empty::after { content: "The model sent no text."; color: var(--quiet); }
code, pre, #log, #hints button { font: 0.8125rem/1.65 ui-monospace, Menlo, Consolas, monospace; }
code, pre { border-radius: 0.3rem; background: var(--tint); }
pre { max-height: 28rem; padding: 0.75rem 1rem; overflow: auto; }
article details p { display: flex; flex-direction: column-reverse; max-height: 9rem;
  padding-left: 1rem; border-left: 2px solid var(--line); overflow: auto; }
.failure { padding: 0.75rem 1rem; border-left: 3px solid var(--bad); background: var(--tint); }
form.row input { width: 16rem; max-width: 100%; -webkit-text-security: disc; }
#chart { position: relative; height: 9rem; }
#chart > i { display: block; height: 2.5rem; border-top: 1px solid var(--line); }
#bars { position: absolute; inset: 0 0 0 2.75rem; display: flex; justify-content: end; }
#bars li { position: relative; flex: 0 0 calc(100% / 24); text-align: center; }
#bars :is(div, i, b) { position: absolute; inset: auto 0 0; font-size: 0.8125rem; }
#bars div { inset: 0 2px 1.5rem; }
ol[id] { padding: 0; list-style: none; }
#bars i, .row i { border-radius: 2px; background: currentColor; forced-color-adjust: none; }
#bars .wait, .row .wait { background: color-mix(in srgb, currentColor 35%, var(--paper)); }
.row i { display: inline-block; width: 0.75rem; height: 0.75rem; margin-right: 0.375rem; }
#bars li, .row i { color: var(--accent); }
#bars :is(.cancelled, .refused), .WARNING b { color: var(--warn); }
#bars .failed, :is(.ERROR, .CRITICAL) b { color: var(--bad); }
#log { height: clamp(12rem, 100dvh - 32rem, 24rem); overflow: auto; }
#log :is(p, summary, small) { font: inherit; }
#log summary { display: flex; gap: 0.75rem; color: var(--ink); white-space: nowrap; }
#log span { overflow: hidden; text-overflow: ellipsis; }
@media (max-width: 44rem) { #form small, #turns:not(:empty) ~ #hints { display: none; }
  #turns:not(:empty) { min-height: 100svh; } }
@media (min-width: 68rem) {
  main { grid-template-columns: minmax(0, 1fr) 26rem; gap: 5rem; }
  aside { position: sticky; top: 2rem; align-self: start; }
}
"""
PAGE_SCRIPT = r"""
const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((it) => [it.id, it]));
const NEWLINE = String.fromCharCode(10);
const MARKS = { active: "…", finished: "✓", cancelled: "■", failed: "✕", refused: "○" };
const SAID = { active: "Answering…", finished: "Done.", cancelled: "Stopped.", failed: "Failed." };
const TOLD = { // what a failure is told as; every other code has the service's own sentence
  not_configured: "There is no key for the model yet. Write `OPENAI_API_KEY=sk-…` into `.env` " +
    "(or `OPENAI_API_KEY=demo`, to try it without one), and start the service again.",
  unauthorized: "This service wants a valid token. It is kept in this tab only.",
  body_too_large: "This conversation is too long to send. Begin a new one.",
  upstream_auth: "The model's provider did not accept the service's key: check `OPENAI_API_KEY`.",
  unreachable: "The service cannot be reached. Is it still running?",
  broken: "The answer broke off. What you see is not all of it.",
};
const store = (() => { try { return sessionStorage; } catch { return {}; } })(); // of this tab
const token = (use) => store[use] || store.ask || store.log || "";
const seconds = (ms) => (ms == null ? "" : `${(ms / 1000).toFixed(2)} s`);
const tokens = (number) => (number == null ? "" : `${number.toLocaleString("en")} tokens`);
const clock = (time) => new Date(time).toLocaleTimeString("en-GB");
const joined = (...facts) => facts.filter(Boolean).join(" · ");
const facts = (it) => joined(it.code, it.model, seconds(it.duration_ms), tokens(it.tokens_used));
const asks = new Map(); // by request id: the turns of this page, and what the log tells of others
let keyless = false; // as the log tells of the last start
let stopper = null; // of the ask under way
let locked = null; // the token that opened no log
/** An element, `tag.class`; what of its *children* is a string becomes text, never HTML. */
function make(kind, children = [], properties = {}) {
  const [tag, className = ""] = kind.split(".");
  const made = Object.assign(document.createElement(tag), { className }, properties);
  made.append(...[children].flat());
  return made;
}
const button = (name, onclick) => make("button", name, { type: "button", onclick });
const copier = (name, text) => button(name, ({ target }) => copy(text(), target));
function say(element, text, bad = false) {
  if (element.said === text) return; // else it is read out again
  element.replaceChildren(...inline(text));
  element.said = text;
  element.classList.toggle("bad", bad);
}
/** Makes *nodes* the children of *parent* without touching any that stays as it is. */
function sync(parent, nodes) {
  const at = (place) => parent.children[place];
  const kept = nodes.map((node, place) => (at(place)?.isEqualNode(node) ? at(place) : node));
  [...parent.children].filter((old) => !kept.includes(old)).forEach((old) => old.remove());
  kept.forEach((node, place) => node.parentNode || parent.insertBefore(node, at(place) ?? null));
}

// A small part of Markdown: each line is of the first of these kinds that it looks like.
const KINDS = { pre: /^ *```/, h4: /^#+ /, ul: /^ *[-*+] /, ol: /^ *[0-9]+[.)] /, p: /(?=[^ ])/ };
const kindOf = (line) => Object.keys(KINDS).find((kind) => KINDS[kind].test(line));
const inline = (text) => text.split(/`([^`]+)`|[*][*](.+?)[*][*]/).map((part = "", at) => (
  at % 3 === 0 || !part ? part : at % 3 === 1 ? make("code", part) : make("b", inline(part))));
function blocks([first, ...rest]) {
  if (first === undefined) return [];
  const [kind, fenced] = [kindOf(first), kindOf(first) === "pre"];
  const end = rest.findIndex((line) => fenced === (kindOf(line) === kind));
  const own = [first, ...rest.splice(0, end < 0 ? rest.length : end)]; // which leaves the others
  const bare = (line) => inline(line.replace(KINDS[kind], ""));
  const item = (line) => make("li", bare(line), { value: parseInt(line) || 1 });
  const inside = fenced ? make("code", own.slice(1).join(NEWLINE))
    : /ul|ol/.test(kind) ? own.map(item) : bare(own.join(NEWLINE));
  const made = kind ? [make(kind, inside, fenced ? { tabIndex: 0 } : {})] : [];
  return [...made, ...blocks(fenced ? rest.slice(1) : rest)];
}
const headers = (secret, more) => ({ "Content-Type": "application/json", ...more,
  ...(secret && { Authorization: `Bearer ${secret}` }) });
async function call(path, options) {
  const response = await fetch(path, { signal: AbortSignal.timeout(10000), ...options });
  if (response.ok) return response;
  const problem = await response.json().catch(() => null); // a proxy's page
  throw Object.assign(new Error(problem?.detail), problem, { status: response.status,
    retry_after: response.headers.get("Retry-After") });
}
const read = async (path, use) => (await call(path, { headers: headers(token(use)) })).json();
async function follow(response, take) {
  let rest = "";
  const write = (text) => {
    const lines = (rest + text).split(NEWLINE);
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) take(JSON.parse(line.slice(6)));
  };
  await response.body.pipeThrough(new TextDecoderStream()).pipeTo(new WritableStream({ write }));
}
async function ask(prompt) {
  if (stopper) return;
  if (matchMedia("(hover: hover)").matches) page.prompt.focus(); // a phone's keys hide the answer
  if (!prompt.trim()) return say(page.state, "Write a question first.", true);
  const [turn, began] = [addTurn(prompt), performance.now()];
  const tick = () => { turn.duration_ms = performance.now() - began; show(turn); };
  const ticking = setInterval(tick, 50);
  stopper = new AbortController();
  page.ask.ariaDisabled = page.form.ariaBusy = "true"; // `disabled` would lose the focus
  if (page.prompt.value === prompt) page.prompt.value = "";
  try {
    const response = await call("ask", { method: "POST", body: JSON.stringify(turn.body),
      headers: headers(token("ask"), { "X-Request-ID": turn.id }), signal: stopper.signal });
    await follow(response, (event) => {
      if (event.type === "error") throw Object.assign(new Error(event.error), event);
      if (event.type === "done") return Object.assign(turn, event);
      turn.first_token_ms ??= performance.now() - began;
      turn[event.type] += event.content;
    });
    if (turn.type !== "done") throw new TypeError("The stream ended without its end.");
    turn.state = "finished";
  } catch (failure) {
    turn.state = failure.name === "AbortError" ? "cancelled" : "failed";
    if (turn.state === "failed") showFailure(turn, failure);
  }
  clearInterval(ticking);
  stopper = page.ask.ariaDisabled = page.form.ariaBusy = null;
  tick();
}
function addTurn(prompt) {
  // What is no number goes along as it is, and the service says what is wrong with it.
  const typed = ({ value }) => (value && Number(value) >= 0 ? Number(value) : value || undefined);
  const said = [...asks.values()].filter((it) => it.delta && it.element.isConnected);
  const history = said.slice(-500).flatMap(({ body, delta }) => (
    [{ role: "user", content: body.prompt }, { role: "assistant", content: delta }]));
  const body = { model: page.model.value || undefined, temperature: typed(page.temperature),
    max_tokens: typed(page.max_tokens), ...(history.length && { history }), prompt };
  const turn = { id: `page-${Math.random().toString(36).slice(2)}`, timestamp: Date.now(), body,
    delta: "", reasoning: "", state: "active", answer: make("div.answer"), cost: make("p.quiet"),
    thoughts: make("p", [], { tabIndex: 0 }) };
  const take = [copier("Copy", () => turn.delta), make("span.quiet", "Copy as"),
    ...Object.entries(SNIPPETS).map(([name, of]) => copier(name, () => of(body)))];
  const aside = make("details", [make("summary", "Reasoning"), turn.thoughts], { open: true });
  turn.foot = make("footer", [turn.cost, make("p.row", take)]);
  turn.element = make("article", [make("h3", prompt), aside, turn.answer, turn.foot]);
  page.turns.append(turn.element);
  asks.set(turn.id, turn);
  return turn;
}
/** Shows what *turn* has so far, and keeps its end in sight where it was. */
function show(turn) {
  const { first_token_ms: first, duration_ms: end, state, usage, ignored } = turn;
  const rate = (usage?.completion_tokens / (end - first)) * 1000;
  turn.cost.textContent = joined(first && `${seconds(first)} to the first piece`,
    `${seconds(end)} in all`, tokens(turn.tokens_used), rate && `${rate.toFixed()} tokens/s`,
    state === "cancelled" ? "stopped" : turn.finish_reason, ignored && `without ${ignored}`);
  turn.element.className = state;
  turn.thoughts.textContent = turn.reasoning;
  sync(turn.answer, blocks(turn.delta.split(NEWLINE)));
  drawBars();
  const waiting = state === "active" && !first && "Waiting for the first piece…";
  say(page.state, waiting || SAID[state], state === "failed");
  const below = page.turns.getBoundingClientRect().bottom + page.form.offsetHeight - innerHeight;
  if (below > 0 && (end < 100 || below < 100)) scrollBy({ top: below, behavior: "instant" });
}
function showFailure(turn, failure) {
  const { code = "unreachable", status, request_id: id, retry_after: wait, errors = [] } = failure;
  let sentence = TOLD[turn.delta ? "broken" : code] ?? failure.message;
  if (wait > 0 && wait < 3600 && !sentence.includes(wait)) sentence += ` Ask again in ${wait} s.`;
  const told = [sentence, ...errors.map(({ field, detail }) => "`" + field + "`: " + detail)];
  const again = () => { turn.element.remove(); ask(turn.body.prompt); };
  const next = code === "unauthorized" ? tokenForm("ask", again) : button("Ask again", again);
  const technical = [make("code", joined(code, status, id)), id ? copier("Copy id", () => id) : ""];
  const parts = [...told.map((each) => make("p", inline(each))), next, make("p.row", technical)];
  turn.foot.before(make("div.failure", parts, { role: "alert" }));
  next.querySelector("input")?.focus();
}
function tokenForm(use, then) {
  const text = make("input", [], { autocomplete: "off", required: true, pattern: " *[!-~]+ *" });
  const onsubmit = () => { store[use] = text.value.trim(); showModels().then(then); return false; };
  return make("form.row", [make("label", ["Token", text]), make("button", "Go on")], { onsubmit });
}

// What was asked, for others to run. A token stays here.
const json = (value) => JSON.stringify(value, null, 2);
const address = (path) => JSON.stringify(new URL(path, document.baseURI));
const sent = () => headers(token("ask") && "YOUR_TOKEN", { Accept: "text/plain" });
const SNIPPETS = {
  curl: (body) => `curl -N ${address("ask")} ${Object.entries(sent()).map(([name, value]) => (
    `-H '${name}: ${value}' `)).join("")}-d '${json(body).replaceAll("'", `'"'"'`)}'`,
  Python: ({ prompt, history = [], ...rest }) => `from openai import OpenAI

client = OpenAI(base_url=${address("v1")}, api_key="${token("ask") ? "YOUR_TOKEN" : "none"}")
request = ${json({ ...rest, messages: [...history, { role: "user", content: prompt }] })}
for chunk in client.chat.completions.create(stream=True, **request):
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)`,
  fetch: (body) => `const headers = ${json(sent())};
const body = JSON.stringify(${json(body)});
const response = await fetch(${address("ask")}, { method: "POST", headers, body });
if (!response.ok) throw new Error((await response.json()).detail);
const show = new WritableStream({ write: (piece) => console.log(piece) });
await response.body.pipeThrough(new TextDecoderStream()).pipeTo(show);`,
};
function copy(text, from) {
  document.oncopy = ({ clipboardData: to }) => { to.setData("text/plain", text); return false; };
  const copied = document.execCommand("copy"); // navigator.clipboard wants https
  document.oncopy = null;
  say(page.state, copied ? "Copied." : "This browser lets no page copy.", !copied);
  if (copied) from.animate({ opacity: [0, 1] }, 600);
}
async function showStatus() {
  const { model, openai_connected } = await read("status").catch(() => ({}));
  const [demo, fine] = [model === "demo", model === "demo" || openai_connected];
  const state = fine ? "connected" : keyless ? "no key yet" : "not connected";
  say(page.health, demo ? "Demo model, offline" : model ? joined(model, state)
    : "Service not reachable, trying again…", !fine);
  page.hints.style.visibility = demo ? "visible" : "hidden";
  if (state === "no key yet") say(page.intro, TOLD.not_configured);
}
async function showModels() {
  const { data = [] } = await read("v1/models", "ask").catch(() => ({}));
  page.model.replaceChildren(...data.map(({ id }) => make("option", id)));
}
async function showLog() {
  if (token("log") === locked) return;
  try {
    const events = await read("logs?limit=500", "log");
    page.wanted.replaceChildren();
    locked = null;
    events.forEach(noteAsk);
    drawBars();
    if (page.pause.ariaPressed === "true") return;
    const [level, word] = [`"level":"${page.level.value}`, page.word.value.trim().toLowerCase()];
    const found = events.map((event) => JSON.stringify(event)).filter((text) => (
      text.includes(level) && text.toLowerCase().includes(word))).slice(-100).reverse();
    const shown = new Map([...page.log.children].map((line) => [line.text, line]));
    sync(page.log, found.map((text) => shown.get(text) ?? logLine(text)));
    say(page.note, found.length ? "" : "No such events.");
  } catch (failure) {
    if (failure.code !== "unauthorized") return;
    locked = token("log");
    say(page.note, "The log wants the operator's token: `ADMIN_TOKEN`, or else `API_TOKEN`.");
    page.wanted.replaceChildren(tokenForm("log", showLog));
  }
}
function logLine(text) {
  const { timestamp, level, message, metadata } = JSON.parse(text);
  const about = make("span", [`${message} `, make("small", facts(metadata ?? {}))]);
  const summary = make("summary", [make("time", clock(timestamp)), make("b", level), about]);
  const rest = make("p", json({ timestamp, message, ...metadata }));
  return make(`li.${level}`, make("details", [summary, rest]), { text });
}
function noteAsk({ timestamp, message, metadata }) {
  if (/^(listening|no OPENAI_API_KEY)/.test(message)) keyless = message !== "listening";
  const [state, id] = [message.replace("ask ", ""), metadata?.request_id];
  if (MARKS[state]) asks.set(id, Object.assign(asks.get(id) ?? {}, metadata, { state, timestamp }));
}
const drawBars = () => sync(page.bars, [...asks.values()].slice(-24).map(bar));
function bar(it) {
  const { state, timestamp, first_token_ms: first, duration_ms: end = 0 } = it;
  // Each third of the height is ten times the time, so that a slow one leaves the others be.
  const tall = (ms) => ({ style: `height: ${Math.max(2, Math.log10(ms / 100) * 33.3)}%` });
  const title = joined(clock(timestamp), state, first && `${seconds(first)} to begin`, facts(it));
  const parts = make("div", [make("i", [], tall(end)), make("i.wait", [], tall(first ?? end))]);
  return make(`li.${state}`, [make("span.sr", title), make("b", MARKS[state]), parts], { title });
}
async function poll() {
  if (!document.hidden) { await showLog(); await showStatus(); }
  setTimeout(poll, 2000);
}
page.hints.onclick = ({ target }) => target.type === "button" && ask(target.textContent);
page.form.onsubmit = () => { ask(page.prompt.value); return false; };
page.stop.onclick = () => stopper?.abort();
page.anew.onclick = () => { stopper?.abort(); page.turns.replaceChildren(); page.prompt.focus(); };
page.level.onchange = page.word.oninput = showLog;
page.pause.onclick = ({ target }) => { target.ariaPressed = target.ariaPressed !== "true"; };
document.onkeydown = ({ key, ctrlKey, metaKey, target }) => {
  if (key === "Escape") stopper?.abort();
  if (key === "Enter" && (ctrlKey || metaKey) && page.form.contains(target)) ask(page.prompt.value);
};
showModels();
poll();
"""
PAGE = r"""
<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>OpenAI back end</title><link rel="icon" href="data:,"><style>$style</style>
<header><h1>OpenAI back end</h1>
<nav aria-label="Documentation"><a href="docs">Swagger UI</a><a href="redoc">ReDoc</a></nav>
<p id="health" role="status">Looking for the service…</p></header><main>
<section aria-labelledby="title"><div class="head"><h2 id="title">Ask the model</h2>
<button id="anew" type="button">New conversation</button></div>
<p id="intro">Ask something, then take the request with you as curl, Python or fetch.</p>
<div id="turns"></div><form id="form"><div id="box">
<label class="sr" for="prompt">Your question</label>
<textarea id="prompt" rows="2" placeholder="Say hello in three languages."></textarea>
<div class="row"><details id="options"><summary>Options</summary><div class="row">
<label>temperature <input id="temperature" inputmode="decimal" placeholder="0 to 2"></label>
<label>max_tokens <input id="max_tokens" inputmode="numeric" placeholder="no bound"></label></div>
</details><select id="model" aria-label="Model"></select>
<button id="stop" type="button">Stop</button><button id="ask">Ask</button></div></div>
<div class="row"><p id="state" role="status"></p><small>Ctrl/⌘ Enter asks, Esc stops</small></div>
</form><p id="hints">The demo model can do this too: <button type="button">/reason</button>
<button type="button">/long</button> <button type="button">/slow</button>
<button type="button">/empty</button> <button type="button">/cut</button>
<button type="button">/error 429</button></p></section>
<aside><section aria-labelledby="asks"><div class="head"><h2 id="asks">Last asks</h2></div>
<div id="chart"><i>100 s</i><i>10 s</i><i>1 s</i><ol id="bars" aria-labelledby="asks"></ol></div>
<p class="row"><span><i class="wait"></i>to the first piece</span><span><i></i>to the end</span>
<span>✓ finished</span><span>■ stopped</span><span>✕ failed</span><span>○ refused</span></p>
</section><section aria-labelledby="events"><div class="head"><h2 id="events">Log</h2>
<input id="word" type="search" aria-label="Only events with this word" placeholder="Filter">
<select id="level" aria-label="Level"><option value="">All levels
<option>DEBUG<option>INFO<option>WARNING<option>ERROR<option>CRITICAL</select>
<button id="pause" type="button" aria-pressed="false">Pause</button></div>
<p id="note" role="status"></p><div id="wanted"></div>
<ol id="log" tabindex="0" aria-label="Log, newest first"></ol></section></aside></main>
<script>$script</script>
"""


def page() -> Response:
    """GET /: the page, whose policy lets nothing in but its own style and script."""
    digests = (hashlib.sha256(each.encode()).digest() for each in (PAGE_STYLE, PAGE_SCRIPT))
    style, script = (base64.b64encode(each).decode() for each in digests)
    policy = (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    document = string.Template(PAGE).substitute(style=PAGE_STYLE, script=PAGE_SCRIPT)
    return HTMLResponse(document, headers={"Content-Security-Policy": policy})


def create_http_client(settings: Settings) -> httpx2.AsyncClient:
    """What carries AsyncOpenAI's requests: aiohttp, or the demo model."""
    hooks = {"response": [raise_refusal]}
    if settings.demo:
        return httpx2.AsyncClient(transport=DemoTransport(), event_hooks=hooks)
    most = settings.max_concurrent_asks
    return DefaultAioHttpClient(
        timeout=None,
        limits=httpx2.Limits(
            max_connections=most + 100, max_keepalive_connections=most, keepalive_expiry=60
        ),
        follow_redirects=False,
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        event_hooks=hooks,
    )


def raise_file_limit(asks: int) -> None:
    """Allow the files of so many *asks*: each takes two, and 1,024 is the usual limit."""
    with suppress(ImportError, OSError, ValueError):
        import resource  # Windows has none, and no such limit

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted, endless = 2 * asks + 200, resource.RLIM_INFINITY  # which is -1 here and there
        if hard != endless:
            wanted = min(wanted, hard)
        if soft != endless and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def log_start(settings: Settings) -> None:
    """Say what an operator may not know: that no model answers, or only the demo model."""
    if settings.demo:
        log.warning("the demo model answers, not OpenAI", remedy="set OPENAI_API_KEY")
    elif not settings.openai_api_key:
        path = Path(".env").absolute()
        found = f"{path} {'was read' if path.exists() else 'was looked for, and is not there'}"
        log.warning("no OPENAI_API_KEY: asks will get 503", env_file=found, remedy="set it there")


@asynccontextmanager
async def lifespan(
    settings: Settings, mask: Mask, ring: EventLog, database: LogDatabase | None
) -> AsyncIterator[AppState]:
    """What the requests share, from start to stop."""
    # With Python's own, a body of many small lists would hold all others up for 0.13 s, not 0.02.
    gc.set_threshold(50_000, 20, 20)
    raise_file_limit(settings.max_concurrent_asks)
    log_start(settings)
    admission = Admission(settings)
    async with (
        database.keep(admission.budget) if database else nullcontext(),
        ModelClient(create_http_client(settings), settings) as client,
    ):
        yield AppState(
            settings=settings,
            mask=mask,
            events=database or ring,
            upstream=Upstream(client, settings),
            admission=admission,
            metrics=Metrics(),
            models=request_models(settings),
            large_body=asyncio.Lock(),
            started=time.monotonic(),
        )
        # uvicorn has just cut what was left, and would be gone before it is closed and logged.
        deadline = time.monotonic() + 1
        while admission.asks["active"] and time.monotonic() < deadline:  # noqa: ASYNC110 - it alone
            await asyncio.sleep(0.01)


def create_app(settings: Settings) -> ASGIApp:
    """The service, ready to be served; takes over the logging of the process.

    Raises ConfigError where LOG_DATABASE cannot be used.
    """
    mask, ring = Mask(settings), EventLog(settings.log_buffer_size)
    database = LogDatabase(settings.log_database, ring) if settings.log_database else None
    configure_logging(settings.log_level, mask, ring, *([database] if database else []))
    # It takes 15 ms, so not before somebody asks for it, and then in Starlette's thread.
    document = cache(lambda: json_response(openapi(settings)))
    app = Starlette(
        routes=[
            Route("/ask", ask, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/responses", responses, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{id:path}", models),
            Route("/status", status),
            Route("/logs", logs),
            Route("/metrics", metrics),
            Route("/openapi.json", lambda request: document()),
            Route("/docs", SWAGGER_UI, methods=["GET"]),
            Route("/redoc", REDOC_UI, methods=["GET"]),
            Route("/", page(), methods=["GET"]),
        ],
        exception_handlers={HTTPException: error_response, Exception: error_response},
        lifespan=lambda app: lifespan(settings, mask, ring, database),
    )
    app.router.redirect_slashes = False
    # Around Starlette, whose handler for a 500 would stand outside of its own middleware.
    return RequestMiddleware(GateMiddleware(app, settings))


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's own, with a bound on heads and trailers, and some oddities put right."""

    # Beside the dict: with these it would be over the 30 names whose table instances can share.
    __slots__ = ("cycles", "head_bytes", "unparsed")

    def connection_made(self, transport: Any) -> None:
        # Bytes since the parser made progress, and those of the headers or trailers it has read.
        self.unparsed = self.head_bytes = 0
        # The request that is answered, and those behind it, of which uvicorn knows the last.
        self.cycles: list[RequestResponseCycle] = []
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if not (self.cycle or self.unparsed) and b" HTTP/1.0\r\n" in data[:MAX_HEAD_BYTES]:
            # uvicorn's other protocol takes over: this one sends chunks to a client of HTTP/1.0.
            self.connections.discard(self)
            protocol = H11Protocol(self.config, self.server_state, self.app_state)
            protocol.connection_made(self.transport)
            self.transport.set_protocol(protocol)
            protocol.data_received(data)
        else:
            self.unparsed += len(data)
            super().data_received(data)
            if self.unparsed > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")

    def send_400_response(self, msg: str) -> None:
        if self.cycle is None or self.cycle.response_complete:
            super().send_400_response(msg)
        else:  # in the middle of an answer
            self.transport.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.head_bytes += len(name) + len(value) + 3  # a colon and the line end
        if self.head_bytes > MAX_HEAD_BYTES:
            raise ValueError  # the parser's own error then, which is a 400
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self.unparsed = self.head_bytes = 0
        super().on_headers_complete()
        while self.cycles and self.cycles[0].response_complete:
            self.cycles.pop(0)
        self.cycles.append(self.cycle)
        if len(self.cycles) <= 8:  # else nothing tells that the client has left
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        self.unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.unparsed = self.head_bytes = 0
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        for cycle in self.cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)


@cache
def configured_app() -> tuple[Settings, ASGIApp]:
    """The app of the environment; a wrong one ends the process, with a line for each mistake."""
    try:
        settings = Settings.from_env(environment())
        return settings, create_app(settings)
    except ConfigError as exc:
        print(exc, file=sys.stderr)
        sys.exit(2)


def main() -> None:
    settings, app = configured_app()
    host, port = settings.api_host, settings.api_port
    family, name = (socket.AF_INET6, f"[{host}]") if ":" in host else (socket.AF_INET, host)
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as exc:
        sys.exit(f"cannot listen on API_HOST={host} API_PORT={port}: {exc}")
    # uvloop does this by itself, asyncio would hold small writes back for 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    log.info("listening", url=f"http://{name}:{listener.getsockname()[1]}")
    if not (is_loopback(host) or settings.wants_token):
        log.warning("anyone who can reach this address may ask", remedy="set API_TOKEN")
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        log_config=None,
        timeout_graceful_shutdown=30,
        timeout_keep_alive=75,
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])


def __getattr__(name: str) -> ASGIApp:
    """`uvicorn service:app` finds its app here (PEP 562), so that an import starts nothing."""
    if name == "app":
        return configured_app()[1]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    main()
