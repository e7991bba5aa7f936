# SPDX-License-Identifier: Apache-2.0
"""The routes: which path asks what of the `Service`, and how errors are answered."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .auth import check_key
from .errors import ServingError, explained
from .hosts import check_origin
from .limits import limited
from .metrics import CONTENT_TYPE
from .page import content_policy, page
from .requests import NAME_LENGTH, Question, read_adding, read_question
from .service import Service

__all__ = ["build_app"]

T = TypeVar("T")
_ALWAYS = ("/metrics", "/healthz")
_GONE = 499  # for a client that went, as nginx counts it


def build_app(service: Service, *, api_key: str | None = None, allowed_hosts: Sequence[str] = ()) -> FastAPI:
    """The application.

    Args:
        service: What answers; it is closed when the application ends.
        api_key: What writing takes; None: nothing can be written.
        allowed_hosts: See [`check_origin`].
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    # FastAPI's own documentation pages load scripts from elsewhere.
    app = FastAPI(title="smn_peft", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(_Watched, service=service, allowed_hosts=allowed_hosts)
    for kind in (ServingError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _error)
    html = page()
    policy = {"Content-Security-Policy": content_policy(html), "Referrer-Policy": "no-referrer"}
    limits = service.limits

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(html, headers=policy)

    @app.get("/healthz")
    async def health() -> Response:
        """200 while requests are taken, 503 once the server is about to stop."""
        state = "draining" if service.draining else "ok"
        return _json({"status": state, "tasks": len(service.bank)}, 503 if service.draining else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    @app.post("/v1/predict")
    async def predict(request: Request) -> Response:
        """The likeliest classes of an image: fields `image`, `task` (may be repeated), `top`, `logits`."""
        return await _asked(request, service.predict)

    @app.post("/v1/embed")
    async def embed(request: Request) -> Response:
        """The features of an image: fields `image`, `task` (may be repeated; "__base__" is the base)."""
        return await _asked(request, service.embed)

    async def _asked(request: Request, answer: Callable[[Question], Awaitable[bytes]]) -> Response:
        with limited(request, limits.body_bytes, limits.pause, service.bodies) as bounded:
            question = await _in_time(read_question(bounded, limits), service)
            # Only now: whoever sends slowly takes nobody's place.
            with service.place(question):
                return Response(await _in_time(answer(question), service), media_type="application/json")

    @app.get("/v1/tasks")
    async def tasks(
        q: str = Query("", max_length=NAME_LENGTH),
        offset: int = Query(0, ge=0),
        limit: int = Query(100, ge=0, le=10_000),
    ) -> Response:
        """Names of tasks that contain `q`."""
        return _json(await _in_time(service.tasks(q, offset, limit), service))

    @app.get("/v1/tasks/{name:path}")
    async def task(name: str = Path(max_length=NAME_LENGTH)) -> Response:
        """Density, classes and size of a task, and how images are prepared for it."""
        return _json(await _in_time(service.task(name), service))

    @app.post("/v1/tasks", status_code=201)
    async def add(request: Request) -> Response:
        """Add a task: fields `name` and `folder`, `hub_id`, or the files `config` and `weights`."""
        check_key(request, api_key)
        with limited(request, limits.adapter_bytes, limits.pause) as bounded:
            adding = await _in_time(read_adding(bounded, limits), service)
        return _json(await service.add(adding), 201)

    @app.delete("/v1/tasks/{name:path}")
    async def remove(request: Request, name: str = Path(max_length=NAME_LENGTH)) -> Response:
        """Remove a task."""
        check_key(request, api_key)
        return _json(await service.remove(name))

    return app


def _json(content: Any, status: int = 200) -> Response:
    # In ASCII, unlike JSONResponse: an adapter's config may hold half a character, which UTF-8 cannot.
    return Response(json.dumps(content), status, media_type="application/json")


async def _in_time(work: Awaitable[T], service: Service) -> T:
    try:
        return await asyncio.wait_for(work, service.limits.timeout)
    except (TimeoutError, asyncio.TimeoutError) as error:
        fix = "Try again, with fewer tasks at a time."
        raise ServingError(504, f"There was no answer within {service.limits.timeout:g} s.", fix) from error


async def _error(_: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        error = ServingError(422, f"{first['loc'][-1]}: {first['msg']}", "Correct the request.")
    elif isinstance(error, HTTPException):
        error = ServingError(
            error.status_code, str(error.detail), "GET /openapi.json lists the routes.", error.headers
        )
    return _refusal(error)


def _refusal(error: BaseException) -> Response:
    found = explained(error)
    response = _json(found.body, found.status)
    response.headers.update(found.headers)
    return response


class _Watched:
    """Counts requests, refuses those of other sites and all while draining, and turns other errors into JSON."""

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
                check_origin(scope["method"], Headers(scope=scope), self.allowed_hosts)
            if self.service.draining and scope["path"] not in _ALWAYS:
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
    return ServingError(503, "The server is stopping.", fix, {"Connection": "close", "Retry-After": "5"})
