# SPDX-License-Identifier: Apache-2.0
"""The routes of the server, who may use them, and how errors are answered; and the process, on uvicorn."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import hmac
import json
import logging
import math
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.resources import files
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

import uvicorn
from fastapi import Depends, FastAPI, Path, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from . import models
from .bank import add_task, is_shared
from .limits import Limits, ServingError, explained, limited
from .models import NAME_LENGTH, Inputs, NewTask, Question
from .service import Service
from .settings import Settings

__all__ = ["build_app", "content_policy", "create_app", "key_from", "make_server", "run_workers"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Asked = TypeVar("Asked", Question, Inputs)
Name = Annotated[str, Path(max_length=NAME_LENGTH)]
_BACKLOG = 128
_SPARE = 16  # connections beyond the limit, which are answered with 503
_NO_START = 3  # exit code of a worker
_GONE = 499  # for a client that went, as nginx counts it
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_KEY_HEADER = APIKeyHeader(name="X-API-Key", auto_error=False)
_BEARER = HTTPBearer(auto_error=False)


def build_app(service: Service, *, api_key: str | None = None, allowed_hosts: Sequence[str] = ()) -> FastAPI:
    """Make the application, which closes the service at its end; for the arguments see `make_server`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Limits]]:
        refreshing = asyncio.create_task(service.refresh())
        yield {"limits": service.limits}
        refreshing.cancel()
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="smn_peft",
        description="Predictions and embeddings of the tasks of a bank of masks.",
        redoc_url=None,
        lifespan=lifespan,
        responses=_errors(403, 500, 503, 504),
    )
    app.add_middleware(_Watched, service=service, allowed_hosts=allowed_hosts)
    app.add_exception_handler(RequestValidationError, _error)
    app.add_exception_handler(HTTPException, _error)
    page = (files(__package__) / "index.html").read_text("utf-8")
    policy = {"Content-Security-Policy": content_policy(page), "Referrer-Policy": "no-referrer"}
    limits = service.limits

    async def check_key(
        header: Annotated[str | None, Security(_KEY_HEADER)],
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
    ) -> None:
        """Let changes pass that bring the key, compared in constant time."""
        if api_key is None:
            fix = "Start it with --api-key-env and the name of an environment variable that holds a key."
            raise ServingError(403, "This server takes no changes.", fix)
        given = header if header is not None else bearer.credentials if bearer else None
        # Starlette reads headers as latin-1, which gives the bytes back that came.
        if given is None or not hmac.compare_digest(given.encode("latin-1"), api_key.encode()):
            what = "No API key was sent." if given is None else "The API key is another."
            fix = "Send the server's in the header Authorization: Bearer …"
            raise ServingError(401, what, fix, {"WWW-Authenticate": "Bearer"})

    async def in_time(work: Awaitable[T]) -> T:
        try:
            return await asyncio.wait_for(work, limits.timeout)
        except asyncio.TimeoutError as error:
            fix = "Try again, with fewer tasks at a time."
            raise ServingError(504, f"There was no answer within {limits.timeout:g} s.", fix) from error

    async def answered(request: Request, kind: type[Asked], answer: Callable[[Asked], Awaitable[bytes]]) -> Response:
        with limited(request, limits.body_bytes, limits.pause, service.bodies) as bounded:
            asked = await in_time(models.read(kind, bounded, limits.body_bytes))
            return Response(await in_time(answer(asked)), media_type="application/json")

    refusals = _errors(400, 404, 408, 413, 415, 422, 429)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers=policy)

    @app.get("/healthz", response_model=models.Health, responses={503: {"model": models.Health}})
    async def health() -> Response:
        """Answer 200 while requests are taken, 503 once the server is about to stop."""
        state = "draining" if service.draining else "ok"
        return _json({"status": state, "tasks": len(service.bank)}, 503 if service.draining else 200)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    @app.post("/v1/predict", response_model=models.Results, responses=refusals, openapi_extra=_body(Question))
    async def predict(request: Request) -> Response:
        """Name the likeliest classes of an image under each task."""
        return await answered(request, Question, service.predictions)

    @app.post("/v1/embeddings", response_model=models.Embeddings, responses=refusals, openapi_extra=_body(Inputs))
    async def embed(request: Request) -> Response:
        """Give the features of images under a task, in OpenAI's form."""
        return await answered(request, Inputs, service.embeddings)

    @app.get("/v1/models", response_model=models.ModelList, responses=_errors(422))
    async def tasks(
        q: Annotated[str, Query(max_length=NAME_LENGTH, description="Text that the names contain.")] = "",
        after: Annotated[str, Query(max_length=NAME_LENGTH, description="Last name of the page before.")] = "",
        limit: Annotated[int, Query(ge=0, le=10_000)] = 100,
        resident: Annotated[bool, Query(description="Only tasks that this process holds decoded.")] = False,
    ) -> Response:
        """List tasks, in OpenAI's form."""
        return _json(await in_time(service.lookups.run(service.tasks, q, after, limit, resident)))

    @app.get("/v1/models/{name:path}", response_model=models.TaskFacts, responses=_errors(404, 422))
    async def task(name: Name) -> Response:
        """Describe a task: density, classes, size, and how images are prepared for it."""
        return _json(await in_time(service.lookups.run(service.task, name)))

    @app.post(
        "/v1/models",
        status_code=201,
        response_model=models.Changed,
        responses=_errors(400, 401, 408, 409, 413, 415, 422),
        openapi_extra=_body(NewTask),
        dependencies=[Depends(check_key)],
    )
    async def add(request: Request) -> Response:
        """Add a task, or reload the one of that name (`replace`): what is under way ends with the old one."""
        with limited(request, limits.adapter_bytes, limits.pause) as bounded:
            new = await in_time(models.read(NewTask, bounded, limits.adapter_bytes))
        return _json(await service.writer.run(add_task, service.bank, new), 201)

    @app.delete(
        "/v1/models/{name:path}",
        response_model=models.Changed,
        responses=_errors(401, 404, 422),
        dependencies=[Depends(check_key)],
    )
    async def remove(name: Name) -> Response:
        """Remove a task."""
        return _json(await service.writer.run(service.remove, name))

    return app


def create_app(settings: Settings | None = None) -> FastAPI:
    """Make the application of `settings`, or of the environment's: a factory for any ASGI server.

    Without settings, what cannot be started ends the process with code 3, at which uvicorn and gunicorn give up
    instead of starting another. ValueError or OSError with settings.
    """
    try:
        used = Settings.from_environment() if settings is None else settings
        key = key_from(used.api_key_env)
        return build_app(Service.open(used), api_key=key, allowed_hosts=used.allowed_hosts)
    except (ImportError, OSError, ValueError) as error:
        if settings is not None:
            raise
        logger.error("the server cannot be started: %s", error)
        raise SystemExit(_NO_START) from error


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": models.Error} for status in statuses}


def _body(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI form of a body that the route reads itself, within its bounds."""
    kinds = ("multipart/form-data", "application/json")
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind in kinds}}}


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # In ASCII, unlike JSONResponse: an adapter's config may hold half a character, which UTF-8 cannot.
    return Response(json.dumps(content), status, headers, media_type="application/json")


async def _error(_: Request, error: Exception) -> Response:
    """Answer what FastAPI and Starlette refuse themselves."""
    if isinstance(error, HTTPException):
        fix = "GET /openapi.json lists the routes."
        return _refusal(ServingError(error.status_code, str(error.detail), fix, error.headers))
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _refusal(ServingError(422, f"{first['loc'][-1]}: {first['msg']}", "Correct the request."))


def _refusal(error: BaseException) -> Response:
    found = explained(error)
    return _json(found.body, found.status, found.headers)


class _Watched:
    """Count requests, refuse those of other sites and all while draining, and answer every error as JSON."""

    def __init__(self, app: ASGIApp, service: Service, allowed_hosts: Sequence[str]) -> None:
        self.app, self.service, self.allowed_hosts = app, service, allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            if scope["path"] != "/healthz":  # load balancers call a server anything
                _check_origin(scope["method"], Headers(scope=scope), self.allowed_hosts)
            if self.service.draining and scope["path"] not in ("/metrics", "/healthz"):
                raise _stopping()
            await self.app(scope, receive, observed)
        except ClientDisconnect:
            status = status or _GONE  # there is nobody to answer
        except (Exception, asyncio.CancelledError) as error:
            if status:
                raise
            if isinstance(error, asyncio.CancelledError):  # uvicorn's, at the end
                error = _stopping()
            await _refusal(error)(scope, receive, observed)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.service.metrics.request(scope["method"], route, status, time.perf_counter() - started)


def _stopping() -> ServingError:
    fix = "Ask another server, or this one after its restart."
    return ServingError(503, "The server is stopping.", fix, {"Connection": "close"})


def _check_origin(method: str, headers: Headers, allowed: Sequence[str]) -> None:
    """Let a request pass that was sent to this server by name, and by no other site's page; 403 for others.

    A page of another site can send a POST to any server that the browser reaches (its Origin tells), and can take on
    a local server's address under its own name (DNS rebinding; the Host tells). "localhost" and IP addresses are
    always names of this server: nobody can make those point elsewhere.
    """
    host = headers.get("host", "").lower()
    name = _host_name(host)
    is_address = ":" in name or name.replace(".", "").isdecimal()
    if name != "localhost" and not is_address and not _among(name, allowed):
        fix = "Use its address, or start it with --allowed-hosts and this name."
        raise ServingError(403, f"The server is not called {host[:100]!r}.", fix)
    origin = headers.get("origin")
    if origin is None or method in _READING:
        return
    netloc = origin.lower().partition("://")[2]
    if netloc != host and not _among(_host_name(netloc), allowed):
        fix = "Send it from the server's own page, or start the server with --allowed-hosts and that site's name."
        raise ServingError(403, f"The request comes from a page of {origin[:100]!r}.", fix)


def _host_name(netloc: str) -> str:
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""


def _among(name: str, allowed: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern.lower().strip("[]")) for pattern in allowed if pattern)


def key_from(variable: str | None) -> str | None:
    """Read the key from an environment variable; ValueError if that is named, and unset or empty."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"The environment variable {variable} holds no API key: set it, or leave --api-key-env out.")
    return key


def content_policy(html: str) -> str:
    """A Content-Security-Policy that lets a page run its own inline script and style, named by hash, and no other."""

    def hashes(tag: str) -> str:
        digests = (hashlib.sha256(text.encode()).digest() for text in re.findall(f"<{tag}>(.*?)</{tag}>", html, re.S))
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _Protocol(H11Protocol):
    """uvicorn's protocol, which ends connections that do nothing, and at once those far beyond their limit.

    uvicorn itself ends only connections that wait for another request; `limited` bounds the time for bodies.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) > self.limit_concurrency + _SPARE:
            transport.abort()
        self._end_if_idle(self.app_state["limits"].idle, None, self.loop.time())

    def _end_if_idle(self, limit: float, request: Any, since: float) -> None:
        """Look ten times within `limit` seconds whether something has moved `since`: an answer, or another request."""
        if self.transport.is_closing():
            return
        if self.cycle is not request or self._is_answering():
            request, since = self.cycle, self.loop.time()
        elif self.loop.time() - since > limit:
            self.transport.abort()
            return
        self.loop.call_later(limit / 10, self._end_if_idle, limit, request, since)

    def _is_answering(self) -> bool:
        """Whether it has a request, and its client reads the answer."""
        return self.cycle is not None and not self.cycle.response_complete and not self.flow.write_paused


class _Server(uvicorn.Server):
    """uvicorn's server, which on a signal first finishes what it has.

    Between the signal and the end it still answers, so that clients learn why they are turned away.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service, self._end, self._last_line = service, math.inf, -math.inf

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, with few words for a lack of descriptors."""
        asyncio.get_running_loop().set_exception_handler(self._log_failure)
        await super().startup(sockets)

    def _log_failure(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log one line a minute for failing accepts, of which asyncio logs thousands a second with traceback."""
        if getattr(context.get("exception"), "errno", None) not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._last_line > 60:
            self._last_line = time.monotonic()
            logger.error("no connection is accepted: the process has no file descriptors left (ulimit -n)")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end at the second."""
        if self._service.draining:
            super().handle_exit(sig, frame)
        else:
            self._end = time.monotonic() + self._service.limits.grace
        self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: end the server after a signal, once it has nothing to finish."""
        now, limits = time.monotonic(), self._service.limits
        if self._service.draining and (self._service.places.held == 0 or now >= self._end):
            self.config.timeout_graceful_shutdown = max(1, math.ceil(min(self._end - now, limits.grace)))
            self.should_exit = True
        return await super().on_tick(counter)


def _bounds(limits: Limits) -> tuple[int, int]:
    """Connections and backlog for the descriptors that there are: as many as the backlog are accepted at a time."""
    try:
        import resource

        free = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir("/dev/fd"))
    except (ImportError, OSError):
        return limits.connections, _BACKLOG
    return min(limits.connections, max(1, free // 2)), min(_BACKLOG, max(1, free // 4))


def make_server(
    service: Service,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allowed_hosts: Sequence[str] = (),
    log_level: str | None = None,
) -> uvicorn.Server:
    """Make a uvicorn server within a service's limits.

    Args:
        service: What answers; it is closed at the end.
        host: Address to listen at.
        port: 0 takes a free port, which the log names.
        api_key: Key that changes need; None: nothing can be changed.
        allowed_hosts: Names of this server beside its address, and of sites whose pages may post to it;
            "*.example.com" for all below, "*" for everything.
        log_level: uvicorn's.
    """
    # A server that listens at a name is called by it.
    app = build_app(service, api_key=api_key, allowed_hosts=(*allowed_hosts, host))
    return _Server(uvicorn.Config(app, **_options(service.limits, host, port), log_level=log_level), service)


def _options(limits: Limits, host: str, port: int) -> dict[str, Any]:
    connections, backlog = _bounds(limits)
    return {
        "host": host,
        "port": port,
        "http": _Protocol,
        "ws": "none",
        "access_log": False,
        "server_header": False,
        "limit_concurrency": connections,
        "backlog": backlog,
        "timeout_keep_alive": math.ceil(limits.idle),
        "timeout_graceful_shutdown": math.ceil(limits.grace),
    }


def run_workers(settings: Settings, workers: int, *, host: str, port: int) -> None:
    """Serve one port with several processes, each with a base of its own, until a signal; uvicorn starts them.

    A process that dies is started anew. What one changes in a bank on disk the others see; ValueError if changes are
    taken and the adapters are held in memory.
    """
    if settings.api_key_env is not None and not is_shared(settings.bank):
        raise ValueError(
            f"{settings.bank} is a folder of adapters, which each worker holds in its own memory, so that a change "
            "would reach one of them: make a bank of it (smn bank build), or leave --api-key-env out."
        )
    key_from(settings.api_key_env)
    with TemporaryDirectory() as counted:  # by all processes, for /metrics
        used = replace(settings, allowed_hosts=(*settings.allowed_hosts, host))
        os.environ.update(used.environment(), PROMETHEUS_MULTIPROC_DIR=counted)
        limits = Limits(grace=settings.grace)
        uvicorn.run(f"{__name__}:create_app", factory=True, workers=workers, **_options(limits, host, port))
        if not os.listdir(counted):
            raise RuntimeError("No worker could be started: the lines above say why.")
