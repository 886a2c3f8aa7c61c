"""A small back end between browser apps and any OpenAI-compatible API.

    POST /ask -> Gate -----> ask -------------------> Answer ----------> relay
                 400, 403    401, 413, 415, 422, 503  429, 502, 504      from the first byte on,
                                                                         an `error` event
    GET /status, GET /logs, GET /openapi.json, GET /docs, GET /redoc

Run it with `python service.py` or `uvicorn service:app`; .env.example lists every setting.
"""

import asyncio
import codecs
import errno
import io
import itertools
import json
import logging
import math
import os
import random
import re
import secrets
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from email.utils import parsedate_to_datetime
from functools import cached_property, lru_cache
from http import HTTPStatus
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Literal, TypedDict, TypeVar, get_args
from urllib.parse import urlsplit

import openai
import structlog
import uvicorn
from dotenv import dotenv_values
from openai import AsyncOpenAI, AsyncStream, DefaultAioHttpClient, RequestOptions, omit
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, get_contextvars
from structlog.types import EventDict, FilteringBoundLogger, WrappedLogger

VERSION = "1.0.0"
JSON, PROBLEM, SSE = "application/json", "application/problem+json", "text/event-stream"
CDN = "https://cdn.jsdelivr.net/npm"
# To look behind before the first letter would take three times as long.
KEY_SHAPED = r"sk-(?<![A-Za-z0-9]sk-)[\w*.-]+|[Bb](?<!\w[Bb])(?i:earer)\s+[^\s\"',]+"

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
Fields = Mapping[str, str] | None
Json = dict[str, Any]
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

log: FilteringBoundLogger = structlog.get_logger()
from_json = json.JSONDecoder().decode
to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def utf8(text: str) -> bytes:
    r"""UTF-8; half a surrogate pair, which it cannot carry, becomes the JSON escape `\udXXX`."""
    return text.encode("utf-8", "backslashreplace")


@lru_cache
def ip(host: str) -> IPv4Address | IPv6Address | None:
    """The address that *host* is, IPv4 also where it comes mapped into IPv6."""
    with suppress(ValueError):
        address = ip_address(host)
        return (address.version == 6 and address.ipv4_mapped) or address
    return None


def is_loopback(host: str) -> bool:
    address = ip(host)
    return host == "localhost" or (address is not None and address.is_loopback)


class ConfigError(Exception):
    """Settings that cannot be used, a line for each."""


def rule(accepted: str, pattern: str, convert: Callable[[str], T]) -> Callable[[str], T]:
    """A parser of what matches *pattern* and converts; its ValueError says what is *accepted*."""

    def parse(text: str) -> T:
        with suppress(ValueError):
            if re.fullmatch(pattern, text, re.ASCII):
                return convert(text)
        raise ValueError(accepted)

    return parse


def whole(low: int, high: int) -> Callable[[str], int]:
    def within(text: str) -> int:
        if not low <= int(text) <= high:
            raise ValueError
        return int(text)

    return rule(f"a whole number from {low} to {high}", "[0-9]{1,15}", within)


def items(text: str) -> tuple[str, ...]:
    return tuple(item.strip().lower() for item in text.split(",") if item.strip())


def parseable(url: str) -> str:
    """*url*; raises ValueError for a port out of range and for what only looks like an address."""
    parts = urlsplit(url)
    if parts.port == 0 or (
        re.fullmatch("[0-9.]+", parts.hostname or "") and not ip(parts.hostname)
    ):
        raise ValueError
    return url


LEVELS = get_args(Level)
level = rule(f"one of {', '.join(LEVELS)}", f"(?i:{'|'.join(LEVELS)})", str.upper)
seconds = rule("a number of seconds above 0", r"(?=.*[1-9])[0-9]{1,6}(\.[0-9]{1,6})?", float)
visible = rule("made of visible ASCII characters only", "[!-~]+", str)
http_url = rule(
    "an http:// or https:// URL",
    r"https?://([\w-]+(\.[\w-]+)*|\[[0-9a-fA-F:.]+\])(:\d{1,5})?(/[^\s?#]*)?",
    parseable,
)
address = rule("a host name or an IP address", r"[\w.:%-]+", str)
hosts = rule("host names separated by commas, or *", r"[\w.-]+(\s*,\s*[\w.-]*)*|\*", items)
origins = rule(
    "origins such as https://app.example.com separated by commas, or *",
    r"(\s*\w[\w+.-]*://[^\s,/@?#*]+\s*(,|$))*|\*",
    items,
)


def setting(default: T, parse: Callable[[str], T], *, shown: bool = True) -> T:
    """A field of Settings; *parse* raises ValueError with what it accepts."""
    made: T = field(default=default, repr=shown, metadata={"parse": parse})
    return made


@dataclass(frozen=True)
class Settings:
    """What the environment says; each field is the variable of the same name in capitals."""

    openai_api_key: str = setting("", visible, shown=False)
    openai_model: str = setting("gpt-5.4-mini", str)
    openai_base_url: str = setting("https://api.openai.com/v1", http_url, shown=False)
    openai_timeout: float = setting(120.0, seconds)
    openai_max_retries: int = setting(2, whole(0, 100))
    api_host: str = setting("127.0.0.1", address)
    api_port: int = setting(8000, whole(0, 65535))
    api_token: str = setting("", visible, shown=False)
    allowed_hosts: tuple[str, ...] = setting((), hosts)
    cors_origins: tuple[str, ...] = setting(
        ("http://localhost:4200", "http://localhost:4201"), origins
    )
    max_concurrent_asks: int = setting(1000, whole(1, 1_000_000))
    max_body_bytes: int = setting(1_048_576, whole(1, 1_000_000_000))
    heartbeat_seconds: float = setting(15.0, seconds)
    log_level: str = setting("INFO", level)
    log_buffer_size: int = setting(1000, whole(1, 100_000))

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Settings":
        """Settings from the variables in *env*; raises ConfigError, a line for every wrong one."""
        values, wrong = {}, []
        for each in fields(cls):
            name = each.name.upper()
            text = env.get(name, "").strip()
            if not text and (name != "CORS_ORIGINS" or name not in env):
                continue
            try:
                values[each.name] = each.metadata["parse"](text)
            except ValueError as exc:
                shown = re.sub(KEY_SHAPED, "***", repr(text)) if each.repr else "its value"
                wrong.append(f"{name}: {shown} is not {exc}")
        if wrong:
            raise ConfigError("\n".join(wrong))
        return cls(**values)

    @property
    def demo(self) -> bool:
        return self.openai_api_key == "demo"

    @cached_property
    def secret(self) -> re.Pattern[str]:
        """What must never be shown. A value so short that it may be any word cannot be hidden."""
        known = (value for value in (self.openai_api_key, self.api_token) if len(value) >= 8)
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


class EventLog:
    """The newest log events, as a structlog processor: what it lets pass, it keeps.

    It masks what is *secret* and cuts values to 2,000 characters.
    """

    def __init__(self, capacity: int, secret: re.Pattern[str]) -> None:
        self._events: deque[Json] = deque(maxlen=capacity)
        self._secret = secret

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        told = {key: self._shown(value) for key, value in event.items()}
        head = {"timestamp": told.pop("timestamp"), "level": method.upper()}
        head["message"] = told.pop("event")
        self._events.append({**head, "metadata": told or None})
        return {**head, **told}

    def _shown(self, value: object) -> object:
        if isinstance(value, int | float | None):
            return value
        text = self._secret.sub("***", value if isinstance(value, str) else repr(value))
        # Head and tail, because a traceback says most in its last line.
        return text if len(text) <= 2000 else f"{text[:997]} [...] {text[-996:]}"

    def tail(self, *, level: str | None, limit: int) -> list[Json]:
        """The newest *limit* events, of one level where one is given, oldest first."""
        wanted = (event for event in reversed(self._events) if level in (None, event["level"]))
        return list(itertools.islice(wanted, limit))[::-1]


class Output:
    """Standard output, as structlog wants it; when that is gone, the ring still has the event."""

    def msg(self, line: str) -> None:
        with suppress(OSError, ValueError):
            # In one write, unlike print: processes may share the output.
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    debug = info = warning = error = critical = msg


class Forward(logging.Handler):
    """Puts through structlog what others log."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message, level = record.getMessage(), min(50, record.levelno // 10 * 10)
        except Exception:
            self.handleError(record)  # the standard handlers' way with arguments that do not fit
            return
        # A second Ctrl-C cuts what is under way, and uvicorn logs a traceback for each piece of it.
        if record.name != "uvicorn.error" or "CancelledError" not in f"{record.exc_info}{message}":
            log.log(level, message.strip(), exc_info=record.exc_info)


def configure_logging(level: str, events: EventLog) -> None:
    """Send what anyone in this process logs through *events* to standard output."""
    styles = structlog.dev.ConsoleRenderer.get_default_level_styles()
    console = structlog.dev.ConsoleRenderer(
        event_key="message",
        level_styles={name.upper(): style for name, style in styles.items()},
        exception_formatter=structlog.dev.plain_traceback,
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.TimeStamper("%Y-%m-%dT%H:%M:%S.%fZ"),
            structlog.processors.format_exc_info,
            events,
            console if sys.stdout.isatty() else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=Output,
    )
    logging.basicConfig(handlers=[Forward()], level=level, force=True)
    for name in ("openai", "httpx2", "httpcore2", "aiohttp"):
        # Below WARNING they log whole requests, prompts included.
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.root.level))
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        server = logging.getLogger(name)
        server.handlers.clear()
        server.setLevel(level)
        # Without any handler uvicorn skips its access log; `ask finished` says more.
        server.propagate = name != "uvicorn.access"


ERRORS = {
    "invalid_json": (400, "The body must be one JSON object in UTF-8."),
    "host_not_allowed": (400, "This Host is not served here; ALLOWED_HOSTS can name further ones."),
    "upstream_rejected": (400, "The model's API refused this request."),
    "unauthorized": (401, "A valid token is needed: `Authorization: Bearer <token>`."),
    "origin_not_allowed": (403, "This origin may not call; CORS_ORIGINS names those that may."),
    "not_found": (404, "There is nothing at this path."),
    "method_not_allowed": (405, "This path does not take this method; see the Allow header."),
    "body_too_large": (413, "The body is larger than MAX_BODY_BYTES."),
    "unsupported_media_type": (415, "The body must be sent as application/json."),
    "invalid_request": (422, "The request has wrong fields; `errors` names each."),
    "rate_limited": (429, "The model's API has had too many requests; try again later."),
    "internal_error": (500, "The service failed; its log says why, under this request_id."),
    "upstream_auth": (502, "The model's API did not accept the service's key."),
    "upstream_unreachable": (502, "The model's API cannot be reached."),
    "upstream_error": (502, "The model's API failed or broke off its answer."),
    "not_configured": (503, "The service has no OPENAI_API_KEY."),
    "overloaded": (503, "MAX_CONCURRENT_ASKS asks are under way; try again shortly."),
    "upstream_timeout": (504, "The model's API was silent for longer than OPENAI_TIMEOUT."),
}
# The names of RFC 9110; Python before 3.13 has older ones.
TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}


class Failure(HTTPException):
    """One of ERRORS: problem JSON before the first byte of an answer, an `error` event after it."""

    def __init__(
        self, code: str, detail: str = "", headers: Fields = None, retry_after: int | None = None
    ) -> None:
        status, sentence = ERRORS[code]
        waiting = {} if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, detail or sentence, {**(headers or {}), **waiting})
        self.code = code
        self.retry_after = retry_after
        self.errors: list[dict[str, str]] = []

    def problem(self, request_id: str) -> Json:
        """The body that RFC 9457 asks for."""
        status = self.status_code
        title = TITLES.get(status) or HTTPStatus(status).phrase
        body: Json = {"title": title, "status": status, "detail": self.detail}
        body |= {"code": self.code, "request_id": request_id}
        return body | ({"errors": self.errors} if self.errors else {})

    def event(self, request_id: str) -> Json:
        body: Json = {"type": "error", "error": self.detail, "code": self.code}
        body |= {"status": self.status_code, "request_id": request_id}
        return body | ({"retry_after": self.retry_after} if self.retry_after is not None else {})


def reply(value: object, status: int = 200, headers: Fields = None, kind: str = JSON) -> Response:
    return Response(utf8(to_json(value)), status, headers, kind)


async def on_error(request: Request | None, exc: Exception) -> Response:
    """Problem JSON; what is no Failure is the router's 404 or 405, or a defect of ours."""
    if isinstance(exc, Failure):
        failure = exc
    elif isinstance(exc, HTTPException):
        code = "method_not_allowed" if exc.status_code == 405 else "not_found"
        failure = Failure(code, headers=exc.headers)
    else:
        failure = Failure("internal_error")
    body = failure.problem(get_contextvars()["request_id"])
    return reply(body, failure.status_code, failure.headers, PROBLEM)


class RequestContext:
    """Gives each request its id: on the response, in errors, and in every event logged for it."""

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
        return await self.app(scope, receive, send_with_id)


def warn_of(origin: str) -> None:
    log.warning("origin not allowed", origin=origin, remedy="add it to CORS_ORIGINS")


class Gate:
    """Refuses names that DNS rebinding would carry, and what pages of other origins post."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.hosts = frozenset(settings.allowed_hosts)
        self.origins = frozenset(settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        failure = self.refusal(scope) if scope["type"] == "http" else None
        app = await on_error(None, failure) if failure else self.app
        await app(scope, receive, send)

    def refusal(self, scope: Scope) -> Failure | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if not self.allows_host(host, scope["server"]):
            return Failure("host_not_allowed")
        if scope["method"] == "POST" and origin and not self.allows_origin(origin, host):
            warn_of(origin)
            return Failure("origin_not_allowed")
        return None

    def allows_host(self, host: str, server: tuple[str, int | None] | None) -> bool:
        local = server is not None and is_loopback(server[0])
        if "*" in self.hosts or not (self.hosts or local):
            return True
        with suppress(ValueError):
            name = urlsplit(f"//{host}").hostname or ""
            return name == "localhost" or name in self.hosts or ip(name) is not None
        return False

    def allows_origin(self, origin: str, host: str) -> bool:
        # A page of the service itself: no scheme, since a proxy may have taken the TLS off.
        return not self.origins.isdisjoint({origin, "*"}) or origin.partition("://")[2] == host


class Cors(CORSMiddleware):
    """Logs the origins that it refuses, of which a browser tells its developer next to nothing."""

    def preflight_response(self, request_headers: Headers) -> Response:
        if not self.is_allowed_origin(request_headers["origin"]):
            warn_of(request_headers["origin"])
        return super().preflight_response(request_headers)


def omitted() -> Any:
    """The default of a field that may be left out but not be null."""


class Turn(BaseModel):
    """One earlier turn of the conversation."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class Ask(BaseModel):
    """What is left out is not sent to the model, whose own default then holds."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str = Field(pattern=r"\S", description="What the user says now; not blank.")
    history: list[Turn] = Field([], description="Earlier turns, oldest first.")
    temperature: float = Field(default_factory=omitted, ge=0, le=2)
    max_tokens: int = Field(
        default_factory=omitted, ge=1, description="Upper bound on what the model may write."
    )
    stream: bool = Field(True, description="Server-Sent Events, or one JSON object.")


class LogsQuery(BaseModel):
    model_config = ConfigDict(strict=True)

    limit: int = Field(100, ge=1, le=1000, description="At most so many events, the newest.")
    level: Level = Field(
        default_factory=omitted, description="Only events of exactly this level, in any case."
    )


def validated(model: type[M], values: Mapping[str, object]) -> M:
    """*values* as a *model*; raises a Failure that names every wrong field."""
    try:
        return model.model_validate(values)
    except ValidationError as exc:
        failure = Failure("invalid_request")
        for error in exc.errors(include_url=False, include_input=False):
            # The one pattern there is means this, and its own message would quote it.
            blank = error["type"] == "string_pattern_mismatch"
            detail = "Input should not be blank" if blank else error["msg"]
            failure.errors.append({"field": ".".join(map(str, error["loc"])), "detail": detail})
        raise failure from exc


def number(text: str) -> float:
    """A number with a point or an exponent; to JSON Schema 1.0 is an integer (section 6.1.1)."""
    value = float(text)
    return int(value) if value.is_integer() else value


async def read_json(request: Request[Any], limit: int) -> dict[str, object]:
    """The JSON object of at most *limit* bytes in the body; raises 400, 413 or 415."""
    media_type = request.headers.get("content-type", "").partition(";")[0]
    if media_type.strip().lower() != JSON:
        raise Failure("unsupported_media_type")
    if int(request.headers.get("content-length", 0)) > limit:
        raise Failure("body_too_large")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise Failure("body_too_large")
    try:
        value = json.loads(body.decode(), parse_float=number)
        # json.loads takes more than JSON has: NaN, Infinity, half surrogate pairs.
        to_json(value).encode()
    except (ValueError, RecursionError) as exc:
        raise Failure("invalid_json", f"The body is not JSON in UTF-8: {exc}") from exc
    if not isinstance(value, dict):
        raise Failure("invalid_json")
    return value


def retry_delay(value: str) -> int | None:
    """Whole seconds of a Retry-After header: seconds, or a date (RFC 9110, section 10.2.3)."""
    with suppress(ValueError, OverflowError):  # NaN is the one, infinity the other
        try:
            delay = float(value)
        except ValueError:
            delay = parsedate_to_datetime(value).timestamp() - time.time()
        return max(0, math.ceil(delay))
    return None


def upstream_message(error: openai.APIStatusError) -> str:
    """The text of the upstream's error, in whose shape servers differ; no JSON is no message."""
    try:
        body = error.response.json()
    except (ValueError, RecursionError):
        return ""
    body = body[0] if isinstance(body, list) and body else body
    while isinstance(body, dict):
        body = body.get("error") or body.get("message") or body.get("detail")
    # Some wrap a proxy's page of HTML in JSON.
    return body if isinstance(body, str) and not body.lstrip().startswith("<") else ""


def refused(error: openai.APIStatusError, secret: re.Pattern[str]) -> Failure:
    """The upstream's status as ours; its message only where it is about the client's request."""
    message = secret.sub("***", upstream_message(error))[:2000]
    match error.status_code:
        case 400 | 404 | 413 | 422:
            return Failure("upstream_rejected", message)
        case 401 | 403:
            return Failure("upstream_auth")
        case 429:
            delay = retry_delay(error.response.headers.get("retry-after", ""))
            return Failure("rate_limited", message, retry_after=delay)
        case _:
            return Failure("upstream_error")


def root_cause(error: BaseException) -> BaseException:
    return root_cause(error.__cause__) if error.__cause__ else error


def broken(error: Exception) -> Failure:
    """The failure of a request without an answer: there was no connection, or it was closed."""
    root = root_cause(error)
    closed = not isinstance(root, OSError) or root.errno in {errno.ECONNRESET, errno.EPIPE}
    return Failure("upstream_error" if closed else "upstream_unreachable")


def cause(failure: Failure) -> str | None:
    """What stands behind *failure*, for the log: a status or a class; texts may quote a prompt."""
    root = root_cause(failure)
    if isinstance(root, openai.APIStatusError):
        return f"HTTP {root.status_code}"
    return None if root is failure else type(root).__name__


def patience(failure: Failure, tries: int) -> float | None:
    """Seconds to wait before another try, after so many *tries*; None where none would help."""
    error = failure.__cause__
    if isinstance(error, openai.APIStatusError):
        if error.status_code < 500 and error.status_code not in {408, 409, 429}:
            return None
        if failure.retry_after is not None:
            return failure.retry_after if failure.retry_after <= 2 else None
    return random.uniform(0.75, 1) * min(8.0, math.ldexp(0.25, tries))


TOKEN_FIELDS = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
FIELD = r"(max_tokens|max_completion_tokens|temperature)\b"
UNSUPPORTED = re.compile(
    r"(?:unsupported|unknown|unrecognized)\s(?:request\s)?(?:parameter|param|argument|field|value)"
    rf"(?:s|\(s\))?(?:\ssupplied)?\W+{FIELD}"
    rf"|\b{FIELD}\W?\s(?:parameter\s)?"
    r"(?:is\s(?:(?:not\s|un)supported|deprecated)|does\snot\ssupport)"
    rf"|(?:\snot|n't)\ssupport\s(?:the\s)?(?:parameters?)?\W*{FIELD}"
    r"(?!\W?\s(?:values?|above|over|below)\b)",
    re.IGNORECASE,
)


def unsupported_field(error: BaseException | None) -> str | None:
    """The field that a 400 calls unsupported, in its code or (proxies change codes) its message.

    Others have these words too: "'max_tokens' and 'max_completion_tokens' at the same time is not
    supported"; "this model supports at most 4096".
    """
    if not isinstance(error, openai.BadRequestError):
        return None
    codes = {"unsupported_parameter", "unsupported_value", "unknown_parameter"}
    if error.code in codes and isinstance(error.param, str):
        return error.param if re.fullmatch(FIELD, error.param) else None
    found = UNSUPPORTED.search(upstream_message(error))
    return next(filter(None, found.groups())) if found else None


# What AsyncOpenAI would tell of itself and this machine, in headers that no upstream needs.
TELEMETRY = "Lang Package-Version OS Arch Runtime Runtime-Version Async Retry-Count"
OPTIONS: RequestOptions = {
    # Silence and further tries are the business of Answer, which knows its client.
    "timeout": None,
    "max_retries": 0,
    # Never sent; AsyncOpenAI would make one for each ask.
    "idempotency_key": "",
    # Answer reads the bytes as they come over the wire.
    "headers": {"Accept-Encoding": "identity"}
    | dict.fromkeys((f"X-Stainless-{name}" for name in TELEMETRY.split()), omit),
}


class Upstream:
    """The model behind *client*, and what this process has learned about it."""

    def __init__(self, client: AsyncOpenAI, model: str, secret: re.Pattern[str]) -> None:
        self.client = client
        self.model = model
        self.secret = secret
        # Absolute, because to merge a path with the base URL takes a tenth of a short ask.
        self.completions = f"{client.base_url}chat/completions"
        # Everywhere else the older name is the safer one: Ollama silently ignores the newer.
        renamed = re.search(r"(^|\.)(openai|azure)\.com$", client.base_url.host)
        self.token_field = "max_completion_tokens" if renamed else "max_tokens"
        self.takes_temperature = True
        self.tokens_used = 0
        self.probing = asyncio.Lock()
        self.probed = -math.inf
        self.reachable = False

    def body(self, ask: Ask) -> dict[str, object]:
        """The chat completion request for *ask*, in the fields that the model takes."""
        turns = [turn.model_dump() for turn in ask.history]
        turns.append({"role": "user", "content": ask.prompt})
        body = {"model": self.model, "messages": turns, "stream": ask.stream}
        if ask.stream:
            body["stream_options"] = {"include_usage": True}
        if "max_tokens" in ask.model_fields_set:
            body[self.token_field] = ask.max_tokens
        if "temperature" in ask.model_fields_set and self.takes_temperature:
            body["temperature"] = ask.temperature
        return body

    def learn(self, refused: str) -> None:
        """Leave the field *refused* out of the requests to come, or send it by its other name."""
        if refused == "temperature":
            self.takes_temperature = False
        else:
            self.token_field = TOKEN_FIELDS[refused]
        instead = TOKEN_FIELDS.get(refused)
        log.warning("model refuses a field", model=self.model, field=refused, instead=instead)

    async def complete(self, body: dict[str, object]) -> AsyncStream[object]:
        """POST /chat/completions, up to the headers of a 200; all else is a Failure."""
        return await self._answered(
            self.client.post(
                self.completions,
                content=utf8(to_json(body)),
                options=OPTIONS,
                cast_to=object,
                stream=True,
                stream_cls=AsyncStream[object],
            )
        )

    async def _answered(self, call: Awaitable[AsyncStream[object]]) -> AsyncStream[object]:
        try:
            return await call
        except openai.APIStatusError as exc:
            raise refused(exc, self.secret) from exc
        except Exception as exc:  # where the bytes are no HTTP, aiohttp's own come through
            raise broken(exc) from exc

    async def connected(self) -> bool:
        """Whether the upstream answers and accepts the key: asked at most every 30 s, for 5 s."""
        async with self.probing:
            if time.monotonic() > self.probed + 30:
                self.reachable = await self._probe()
                self.probed = time.monotonic()
        return self.reachable

    async def _probe(self) -> bool:
        stream = AsyncStream[object]
        call = self.client.get(
            "/models", options=OPTIONS, cast_to=object, stream=True, stream_cls=stream
        )
        try:
            async with asyncio.timeout(5), aclosing((await self._answered(call)).response):
                return True
        except TimeoutError:
            return False
        except Failure as failure:
            error = failure.__cause__
            return isinstance(error, openai.APIStatusError) and error.status_code in {404, 405, 429}


def frame(event: Mapping[str, object]) -> bytes:
    """One Server-Sent Event; JSON escapes line breaks, so one `data:` line always suffices."""
    return utf8(f"data: {to_json(event)}\n\n")


def delta(text: str) -> bytes:
    # A tenth of the cost of `frame`, and this runs for every token.
    return utf8(f'data: {{"type":"delta","content":{to_json(text)}}}\n\n')


class Decoder:
    """The data of Server-Sent Events, from bytes that are split anywhere (WHATWG HTML, 9.2)."""

    def __init__(self) -> None:
        characters = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self.text = io.IncrementalNewlineDecoder(characters, translate=True)
        # Joined only when complete: `tail + read` would take quadratic time for a large event.
        self.line: list[str] = []
        self.data: list[str] = []

    def feed(self, read: bytes) -> Iterable[str]:
        """The data of every event that *read* completes."""
        *lines, rest = self.text.decode(read).split("\n")
        for line in lines:
            if self.line:
                line = "".join((*self.line, line))
                self.line.clear()
            if line.startswith("data:"):
                self.data.append(line[5:].strip())
            elif not line and self.data:
                yield "\n".join(self.data)
                self.data.clear()
        if rest:
            self.line.append(rest)


def said(part: Literal["delta", "message"], data: str, facts: dict[str, object]) -> str:
    """The text in a chunk (`delta`) or a whole answer (`message`); *facts* takes the rest."""
    try:
        chunk = from_json(data)
        if chunk.get("error") or (part == "message" and not chunk["choices"][0][part]):
            raise ValueError("an error in the place of an answer")
        usage = chunk.get("usage") or (chunk.get("x_groq") or {}).get("usage") or {}
        if isinstance(tokens := usage.get("total_tokens"), int):
            facts["tokens_used"] = tokens
        if isinstance(model := chunk.get("model"), str) and model:
            facts["model"] = model
        text = ""
        for choice in chunk.get("choices") or ():
            if isinstance(reason := choice.get("finish_reason"), str) and reason:
                facts["finish_reason"] = reason
            content = choice.get(part) or {}
            text += content.get("content") or content.get("refusal") or ""
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as exc:
        raise Failure("upstream_error") from exc
    return text


@dataclass
class Asks:
    """The asks accepted since the start, counted."""

    active: int = 0
    total: int = 0
    failed: int = 0
    cancelled: int = 0


class State(TypedDict):
    """What an endpoint finds in `request.state`."""

    settings: Settings
    events: EventLog
    upstream: Upstream
    asks: Asks
    started: float


OUTCOMES = {
    "ask finished": logging.INFO,
    "ask cancelled": logging.WARNING,
    "ask failed": logging.ERROR,
}


class Answer(StreamingResponse):
    """One ask; it owns its place, its upstream and its closing event, however it ends.

    A generator alone could not: with the client gone before its first frame, or parked at a `yield`
    in a slow write, its own clean-up would wait for the garbage collector.
    """

    def __init__(self, ask: Ask, state: State) -> None:
        self.parts = self.relay() if ask.stream else self.collect()
        headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
        kind = {"headers": headers, "media_type": SSE} if ask.stream else {"media_type": JSON}
        super().__init__(self.parts, **kind)
        self.ask = ask
        self.settings = state["settings"]
        self.upstream = state["upstream"]
        self.asks = state["asks"]
        self.facts: dict[str, object] = {"finish_reason": None, "tokens_used": None}
        self.facts["model"] = self.upstream.model
        self.answer_chars = 0
        self.clock = asyncio.get_running_loop().time
        self.begun = self.heard = self.sent = self.clock()
        self.first_token: float | None = None
        self.writing = asyncio.Lock()
        self.started = self.complete = self.closed = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.send = send
        self.asks.active += 1
        self.asks.total += 1
        failure: Failure | None = None
        try:
            async with asyncio.TaskGroup() as tasks, aclosing(self.parts):
                # It sees its end itself: `receive` tells of the complete answer (ASGI, HTTP).
                tasks.create_task(self.watch(receive))
                async for part in self.parts:
                    await self.write(part, last=self.complete)
                    self.heard = self.sent
                    if self.complete:
                        self.close("ask finished")
        except* ClientDisconnect:
            pass
        except* Failure as group:
            failure = next(exc for exc in group.exceptions if isinstance(exc, Failure))
        except* Exception as group:
            failure = Failure("internal_error")
            failure.__cause__ = group.exceptions[0]
        finally:
            if not self.closed:
                self.close("ask failed" if failure else "ask cancelled", failure)
        if failure and self.started:
            await self.write(frame(failure.event(get_contextvars()["request_id"])), last=True)
        elif failure:
            raise failure

    async def watch(self, receive: Receive) -> None:
        """End the ask when its client leaves or its upstream falls silent; send heartbeats."""
        silence = self.settings.openai_timeout
        heartbeat = self.settings.heartbeat_seconds if self.ask.stream else math.inf
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(min(self.heard + silence, self.sent + heartbeat)):
                    while (await receive())["type"] != "http.disconnect":
                        pass
                    if self.closed:
                        return
                    raise ClientDisconnect
            now = self.clock()
            if self.writing.locked():
                # The client holds a write up: the silence is not the upstream's.
                self.heard = self.sent = now
            elif now >= self.heard + silence:
                raise Failure("upstream_timeout")
            elif now >= self.sent + heartbeat:
                await self.write(b": ping\n\n")

    async def write(self, part: bytes, *, last: bool = False) -> None:
        async with self.writing:
            if not self.started:
                if last:
                    self.raw_headers.append((b"content-length", b"%d" % len(part)))
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await self.send(start)
                self.started = True
            await self.send({"type": "http.response.body", "body": part, "more_body": not last})
            self.sent = self.clock()

    async def open(self) -> AsyncStream[object]:
        """The upstream's 200; tries again only while the client has been sent nothing."""
        tries, refused = 0, set[str]()
        while True:
            body = self.upstream.body(self.ask)
            try:
                stream = await self.upstream.complete(body)
                break
            except Failure as failure:
                name = unsupported_field(failure.__cause__)
                if name in body and TOKEN_FIELDS.get(name) not in refused:
                    self.upstream.learn(name)
                    refused.add(name)
                    delay: float | None = 0
                else:
                    delay = patience(failure, tries)
                    tries += 1
                if isinstance(failure.__cause__, openai.APIStatusError):
                    self.heard = self.clock()
                if delay is None or tries > self.settings.openai_max_retries or self.started:
                    raise
                if self.clock() + delay >= self.heard + self.settings.openai_timeout:
                    raise
                await asyncio.sleep(delay)
                if self.started:  # by a heartbeat
                    raise
        self.heard = self.clock()
        if "temperature" in self.ask.model_fields_set - body.keys():
            self.facts["ignored"] = ["temperature"]
        return stream

    async def reads(self) -> AsyncGenerator[bytes, None]:
        """The upstream's answer, read by read; raises a Failure where it breaks off."""
        response = (await self.open()).response
        async with aclosing(response):
            try:
                async for read in response.aiter_raw():
                    self.heard = self.clock()
                    yield read
            except Exception as exc:  # httpx2's and aiohttp's own, which the client lets through
                raise Failure("upstream_error") from exc
            yield b"\n\n"  # Ends a last event that was left open; JSON does not mind.

    async def collect(self) -> AsyncGenerator[bytes, None]:
        """The one JSON object of an ask that does not stream."""
        async with aclosing(self.reads()) as reads:
            body = b"".join([read async for read in reads])
        text = said("message", body.decode("utf-8-sig", "replace").strip(), self.facts)
        self.answer_chars = len(text)
        self.complete = True
        yield utf8(to_json({"response": text, **self.facts}))

    async def relay(self) -> AsyncGenerator[bytes, None]:
        """The events of a stream; those of one upstream read leave together."""
        decoder = Decoder()
        async with aclosing(self.reads()) as reads:
            async for read in reads:
                frames, failure = self.translated(decoder.feed(read))
                if frames:
                    yield b"".join(frames)
                if failure:
                    raise failure
                if self.complete:
                    break
            else:
                if self.facts["finish_reason"] is None:
                    raise Failure("upstream_error")
                yield self.done()
            # The connection can be used again only once its answer has been read to the end.
            with suppress(TimeoutError, Failure):
                async with asyncio.timeout(0.2):
                    async for _ in reads:
                        pass

    def translated(self, events: Iterable[str]) -> tuple[list[bytes], Failure | None]:
        """The frames for what the upstream's *events* say, and the failure that ends them."""
        frames: list[bytes] = []
        try:
            for data in events:
                if data == "[DONE]":
                    return [*frames, self.done()], None
                if text := said("delta", data, self.facts):
                    self.answer_chars += len(text)
                    self.first_token = self.first_token or self.clock()
                    frames.append(delta(text))
        except Failure as failure:
            return frames, failure
        return frames, None

    def done(self) -> bytes:
        self.complete = True
        return frame({"type": "done", **self.facts}) + b"data: [DONE]\n\n"

    def close(self, outcome: str, failure: Failure | None = None) -> None:
        """Give the place back and log the *outcome*, as every accepted ask does exactly once."""
        self.closed = True
        self.asks.active -= 1
        self.asks.failed += outcome == "ask failed"
        self.asks.cancelled += outcome == "ask cancelled"
        tokens_used = self.facts["tokens_used"]
        self.upstream.tokens_used += tokens_used if isinstance(tokens_used, int) else 0
        facts = {
            "stream": self.ask.stream,
            **self.facts,
            "prompt_chars": len(self.ask.prompt),
            "answer_chars": self.answer_chars or None,
            "first_token_ms": self.first_token and self.milliseconds(self.first_token),
            "duration_ms": self.milliseconds(self.clock()),
        }
        if failure:
            facts |= {"code": failure.code, "status": failure.status_code, "cause": cause(failure)}
            facts["exc_info"] = failure.__cause__ if failure.code == "internal_error" else None
        known = {name: fact for name, fact in facts.items() if fact is not None}
        log.log(OUTCOMES[outcome], outcome, **known)

    def milliseconds(self, instant: float) -> float:
        return round((instant - self.begun) * 1000, 1)


def authorize(request: Request[State]) -> None:
    """Raises 401 unless the request carries API_TOKEN, where one is set."""
    if token := request.state["settings"].api_token:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = secrets.compare_digest(given.strip().encode(), token.encode())
        if not (right and scheme.lower() == "bearer"):
            raise Failure("unauthorized", headers={"WWW-Authenticate": "Bearer"})


async def ask(request: Request[State]) -> Response:
    authorize(request)
    settings, asks = request.state["settings"], request.state["asks"]
    asked = validated(Ask, await read_json(request, settings.max_body_bytes))
    if not settings.openai_api_key:
        raise Failure("not_configured")
    if asks.active >= settings.max_concurrent_asks:
        raise Failure("overloaded", retry_after=1)
    return Answer(asked, request.state)


async def status(request: Request[State]) -> Response:
    state = request.state
    settings, upstream = state["settings"], state["upstream"]
    keyed = settings.openai_api_key not in {"", "demo"}
    return reply(
        {
            "status": "running",
            "version": VERSION,
            "openai_connected": keyed and await upstream.connected(),
            "model": upstream.model,
            "uptime_seconds": round(time.monotonic() - state["started"], 1),
            "asks": asdict(state["asks"]),
            "tokens_used": upstream.tokens_used,
        }
    )


async def logs(request: Request[State]) -> Response:
    authorize(request)
    given: dict[str, object] = {}
    if (limit := request.query_params.get("limit")) is not None:
        given["limit"] = int(limit) if re.fullmatch("[0-9]{1,9}", limit) else limit
    if (level := request.query_params.get("level")) is not None:
        given["level"] = level.upper()
    query = validated(LogsQuery, given)
    return reply(request.state["events"].tail(level=query.level, limit=query.limit))


async def demo_completion(request: Request) -> Response:
    """The demo model: it says what it is, quotes the prompt, and counts words as tokens."""
    body = await request.json()
    prompt = body["messages"][-1]["content"]
    words = re.findall(r"\s*\S+", f"This is the demo model, not OpenAI. You said: “{prompt}”")
    asked, limit = sum(len(turn["content"].split()) for turn in body["messages"]), len(words)
    words = words[: body.get("max_tokens", limit)]
    reason = "stop" if len(words) == limit else "length"
    usage = {"prompt_tokens": asked, "completion_tokens": len(words)}
    usage["total_tokens"] = asked + len(words)
    if body["stream"]:
        return StreamingResponse(demo_chunks(words, reason, usage), media_type=SSE)
    message = {"role": "assistant", "content": "".join(words)}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return reply({"model": "demo", "choices": [choice], "usage": usage})


async def demo_chunks(words: list[str], reason: str, usage: object) -> AsyncIterator[bytes]:
    for word in words:
        choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
        yield frame({"model": "demo", "choices": [choice]})
        await asyncio.sleep(0.04)
    yield frame({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    yield frame({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"


@asynccontextmanager
async def serve_demo() -> AsyncIterator[str]:
    """Serve the demo model on a free loopback port; yields its base URL."""
    app = Starlette(routes=[Route("/v1/chat/completions", demo_completion, methods=["POST"])])
    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, ws="none")
    config.load()
    # Not Server.serve(), which would take the signals from the server around this one.
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    listener = socket.create_server(("127.0.0.1", 0))
    await server.startup(sockets=[listener])
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        for each in server.servers:
            each.close()


def schema(about: str, *optional: str, **properties: object) -> Json:
    """The JSON Schema of an object; its *properties* are required, but for the *optional* ones."""
    required = [name for name in properties if name not in optional]
    kind = {"type": "object", "description": about}
    return {**kind, "properties": properties, "required": required}


def ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def schemas() -> Json:
    """What goes over the wire: requests as they are validated, the rest as it is written."""
    asked = Ask.model_json_schema(ref_template=ref("{model}")["$ref"])
    text, number = {"type": "string"}, {"type": "integer"}
    date = {"type": "string", "format": "date-time"}
    text_or_null, number_or_null = {"type": ["string", "null"]}, {"type": ["integer", "null"]}
    end: Json = {"finish_reason": text_or_null, "tokens_used": number_or_null, "model": text}
    end["ignored"] = {"type": "array", "items": {"const": "temperature"}}
    failure: Json = {"code": {"enum": list(ERRORS)}, "request_id": text}
    failure["status"] = {"enum": sorted({status for status, _ in ERRORS.values()})}
    error: Json = {"type": {"const": "error"}, "error": text, **failure, "retry_after": number}
    errors = {"type": "array", "items": schema("A wrong field.", field=text, detail=text)}
    piece: Json = {"type": {"const": "delta"}, "content": {"type": "string", "minLength": 1}}
    about: Json = {"status": {"const": "running"}, "version": text, "model": text}
    about |= {"openai_connected": {"type": "boolean"}, "uptime_seconds": {"type": "number"}}
    about["asks"] = schema("Since the start.", **{each.name: number for each in fields(Asks)})
    event: Json = {"timestamp": date, "level": {"enum": LEVELS}, "message": text}
    event["metadata"] = {"type": ["object", "null"]}
    return {
        **asked.pop("$defs"),
        "Ask": asked,
        "Answer": schema("The answer, with `stream: false`.", "ignored", response=text, **end),
        "Delta": schema("The next piece of the answer.", **piece),
        "Done": schema("A complete end.", "ignored", type={"const": "done"}, **end),
        "Error": schema("The end of an answer that broke off.", "retry_after", **error),
        "Problem": schema("RFC 9457.", "errors", title=text, detail=text, errors=errors, **failure),
        "Status": schema("Whether it all works.", **about, tokens_used=number),
        "LogEvent": schema("`metadata` holds all other keys.", **event),
    }


def operation(summary: str, ok: object, *codes: str, success: str = "200", **more: object) -> Json:
    """An operation that answers with the content *ok*, or with one of the error *codes*."""
    text = {"schema": {"type": "string"}}
    extra = {"401": "WWW-Authenticate", "429": "Retry-After", "503": "Retry-After"}
    responses: Json = {success: {"description": "OK", "content": ok}}
    for code in ("host_not_allowed", *codes, "internal_error"):
        failure = Failure(code)
        example = failure.problem("7f0c2a")
        problems = {PROBLEM: {"schema": ref("Problem"), "examples": {}}}
        response = {"description": example["title"], "content": problems}
        response = responses.setdefault(str(failure.status_code), response)
        response["content"][PROBLEM]["examples"][code] = {"value": example}
    for status, response in responses.items():
        names = filter(None, ("X-Request-ID", extra.get(status)))
        response["headers"] = dict.fromkeys(names, text)
    return {"summary": summary, "responses": responses, **more}


def openapi(settings: Settings) -> Json:
    """The OpenAPI 3.1 document of the service."""
    secured: Json = {"security": [{"bearer": []}]} if settings.api_token else {}
    absent = {"not_found", "method_not_allowed", *(["unauthorized"] if not secured else [])}
    codes = [code for code in ERRORS if code not in absent]
    example = {"prompt": "Say hello in three languages.", "temperature": 0.7, "max_tokens": 1000}
    asked = {JSON: {"schema": ref("Ask"), "example": example}}
    events = {"oneOf": [ref("Delta"), ref("Done"), ref("Error")]}
    end = {"type": "done", "finish_reason": "stop", "tokens_used": 9, "model": "gpt-5.4-mini"}
    # An event, as OpenAPI 3.2 models it in its itemSchema, which 3.1 does not have yet.
    data = {"anyOf": [{"contentMediaType": JSON, "contentSchema": events}, {"const": "[DONE]"}]}
    event = {"type": "object", "properties": {"data": {"type": "string", **data}}}
    stream: Json = {"schema": {**event, "required": ["data"]}}
    stream["example"] = (delta("Hola") + frame(end) + b"data: [DONE]\n\n").decode()
    answered = {SSE: stream, JSON: {"schema": ref("Answer")}}
    query = LogsQuery.model_json_schema()["properties"].items()
    parameters = [{"name": name, "in": "query", "schema": each} for name, each in query]
    listed = {JSON: {"schema": {"type": "array", "items": ref("LogEvent")}}}
    html = {"text/html": {"schema": {"type": "string"}}}
    ask = operation("Ask", answered, *codes, requestBody={"required": True, "content": asked})
    denied = {"unauthorized", "invalid_request"}.intersection(codes)
    logs = operation("Newest events", listed, *denied, parameters=parameters)
    document = operation("This document", {JSON: {"schema": {"type": "object"}}})
    paths = {
        "/ask": {"post": ask | secured},
        "/status": {"get": operation("Status", {JSON: {"schema": ref("Status")}})},
        "/logs": {"get": logs | secured},
        "/": {"get": operation("To the documentation", {}, success="307")},
        "/openapi.json": {"get": document},
        "/docs": {"get": operation("This document in Swagger UI", html)},
        "/redoc": {"get": operation("This document in ReDoc", html)},
    }
    bearer = {"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}}
    info = {"title": "OpenAI back end", "version": VERSION}
    components = {"schemas": schemas(), **(bearer if secured else {})}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


def docs_page(package: str, script: str, integrity: str, start: str, head: str = "") -> Response:
    """A page around a *script* of the CDN; *integrity* is that of the npm package's own file."""
    return HTMLResponse(f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>OpenAI back end</title>{head}</head>
<body><div id="ui"></div><script src="{CDN}/{package}/{script}" integrity="sha384-{integrity}"
crossorigin="anonymous"
onerror="document.body.textContent = 'The CDN cannot be reached; see openapi.json.'"></script>
<script>{start}</script></body></html>""")


SWAGGER_UI = docs_page(
    "swagger-ui-dist@5.35.0",
    "swagger-ui-bundle.js",
    "gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9",
    "window.SwaggerUIBundle?.({url: 'openapi.json', dom_id: '#ui'})",
    f"""<link rel="stylesheet" href="{CDN}/swagger-ui-dist@5.35.0/swagger-ui.css"
integrity="sha384-WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I"
crossorigin="anonymous">""",
)
REDOC = docs_page(
    "redoc@2.5.4",
    "bundles/redoc.standalone.js",
    "w447zOpYfw/1Tv/5AK9NfHTlQIqE3RVR6KY62jCyy9zNDgO64cMwGGP1Fj0zJVf5",
    "window.Redoc?.init('openapi.json', {}, document.getElementById('ui'))",
)


def connect(settings: Settings, base_url: str) -> AsyncOpenAI:
    limits = type(openai.DEFAULT_CONNECTION_LIMITS)(
        max_connections=settings.max_concurrent_asks + 100,
        max_keepalive_connections=settings.max_concurrent_asks,
        keepalive_expiry=60,
    )
    http_client = DefaultAioHttpClient(
        limits=limits,
        follow_redirects=False,
        trust_env=not settings.demo,
    )
    # AsyncOpenAI brings its own; every header costs about a hundredth of a short ask.
    http_client.headers.clear()
    # Without a key no ask gets as far as this; the client insists on one.
    key = settings.openai_api_key or "none"
    return AsyncOpenAI(api_key=key, base_url=base_url, http_client=http_client)


def lift_file_limit(asks: int) -> None:
    """Allow the files of so many *asks*: each takes two, and 1,024 is the usual limit."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 2 * asks + 200
        if 0 <= soft < wanted:
            limit = wanted if hard < 0 else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


@asynccontextmanager
async def running(settings: Settings, events: EventLog) -> AsyncIterator[State]:
    """What the requests share, from start to stop."""
    lift_file_limit(settings.max_concurrent_asks)
    async with AsyncExitStack() as owned:
        base_url, model = settings.openai_base_url, settings.openai_model
        if settings.demo:
            log.warning("the demo model answers, not OpenAI", remedy="set OPENAI_API_KEY")
            base_url, model = await owned.enter_async_context(serve_demo()), "demo"
        client = await owned.enter_async_context(connect(settings, base_url))
        upstream, asks = Upstream(client, model, settings.secret), Asks()
        now = time.monotonic()
        yield State(settings=settings, events=events, upstream=upstream, asks=asks, started=now)
        # uvicorn has just cut what was left, and would be gone before it is closed and logged.
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                while asks.active:  # noqa: ASYNC110 - nothing else waits for this
                    await asyncio.sleep(0.01)


def create_app(settings: Settings) -> ASGIApp:
    """The service, ready to be served; takes over the logging of the process."""
    events = EventLog(settings.log_buffer_size, settings.secret)
    configure_logging(settings.log_level, events)
    app = Starlette(
        routes=[
            Route("/ask", ask, methods=["POST"]),
            Route("/status", status),
            Route("/logs", logs),
            Route("/openapi.json", reply(openapi(settings)), methods=["GET"]),
            Route("/docs", SWAGGER_UI, methods=["GET"]),
            Route("/redoc", REDOC, methods=["GET"]),
            Route("/", RedirectResponse("/docs"), methods=["GET"]),
        ],
        middleware=[Middleware(Gate, settings=settings)],
        # A client that leaves during its request is no defect; nobody reads the answer then.
        exception_handlers=dict.fromkeys((HTTPException, ClientDisconnect, Exception), on_error),
        lifespan=lambda app: running(settings, events),
    )
    app.router.redirect_slashes = False
    # Around Starlette, whose handler for a 500 would stand outside of CORS as its middleware.
    cors = Cors(
        app,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["content-type", "authorization", "x-request-id"],
        expose_headers=["Retry-After", "X-Request-ID"],
    )
    return RequestContext(cors)


def settings_or_exit() -> Settings:
    try:
        return Settings.from_env(environment())
    except ConfigError as exc:
        print(exc, file=sys.stderr)
        sys.exit(2)


def main() -> None:
    settings = settings_or_exit()
    host, port = settings.api_host, settings.api_port
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
        # uvloop does this by itself, asyncio would hold small writes back for 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as exc:
        sys.exit(f"cannot listen on API_HOST={host} API_PORT={port}: {exc.strerror}")
    app = create_app(settings)
    name = f"[{host}]" if ":" in host else host
    log.info("listening", url=f"http://{name}:{listener.getsockname()[1]}")
    if not (is_loopback(host) or settings.api_token):
        log.warning("anyone who can reach this address may ask", remedy="set API_TOKEN")
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=30,
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])


def __getattr__(name: str) -> ASGIApp:
    """`uvicorn service:app` finds its app here (PEP 562), so that an import starts nothing."""
    if name == "app":
        return create_app(settings_or_exit())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    main()
