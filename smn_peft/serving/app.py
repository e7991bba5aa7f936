# SPDX-License-Identifier: Apache-2.0
"""The routes: which path asks what of the `Service`, and how errors are answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .auth import check_key
from .errors import ServingError, explained
from .metrics import CONTENT_TYPE
from .page import content_policy, page
from .requests import read_adding, read_question
from .service import Service

__all__ = ["build_app"]

T = TypeVar("T")
_ALWAYS = ("/metrics", "/healthz")


def build_app(service: Service, *, api_key: str | None = None) -> FastAPI:
    """The application.

    Args:
        service: What answers; it is closed when the application ends.
        api_key: What writing takes; None: nothing can be written.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    # FastAPI's own documentation pages load scripts from elsewhere.
    app = FastAPI(title="smn_peft", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(_Watched, service=service)
    for kind in (ServingError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _error)
    html = page()
    policy = {"Content-Security-Policy": content_policy(html), "Referrer-Policy": "no-referrer"}

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(html, headers=policy)

    @app.get("/healthz")
    async def health() -> Response:
        """200 while requests are taken, 503 once the server is about to stop."""
        state = "draining" if service.draining else "ok"
        return JSONResponse({"status": state, "tasks": len(service.bank)}, 503 if service.draining else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    @app.post("/v1/predict")
    async def predict(request: Request) -> Response:
        """The likeliest classes of an image: fields `image`, `task` (may be repeated), `top`, `logits`."""

        async def answer() -> dict[str, Any]:
            return await service.predict(await read_question(request, service.limits))

        with service.place():
            return JSONResponse(await _in_time(answer(), service))

    @app.post("/v1/embed")
    async def embed(request: Request) -> Response:
        """The features of an image: fields `image`, `task` (may be repeated; "__base__" is the base)."""

        async def answer() -> dict[str, Any]:
            return await service.embed(await read_question(request, service.limits))

        with service.place():
            return JSONResponse(await _in_time(answer(), service))

    @app.get("/v1/tasks")
    async def tasks(
        q: str = "", offset: int = Query(0, ge=0), limit: int = Query(100, ge=0, le=10_000)
    ) -> dict[str, Any]:
        """Names of tasks that contain `q`."""
        return await _in_time(service.tasks(q, offset, limit), service)

    @app.get("/v1/tasks/{name:path}")
    async def task(name: str) -> dict[str, Any]:
        """Density, classes and size of a task."""
        return await _in_time(service.task(name), service)

    @app.post("/v1/tasks", status_code=201)
    async def add(request: Request) -> dict[str, Any]:
        """Add a task: fields `name` and `folder`, `hub_id`, or the files `config` and `weights`."""
        check_key(request, api_key)
        return await service.add(await _in_time(read_adding(request, service.limits), service))

    @app.delete("/v1/tasks/{name:path}")
    async def remove(request: Request, name: str) -> dict[str, Any]:
        """Remove a task."""
        check_key(request, api_key)
        return await service.remove(name)

    return app


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
    found = explained(error)
    return JSONResponse(found.body, found.status, found.headers)


class _Watched:
    """Counts requests, refuses them while draining, and turns what no handler knows into JSON."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

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
            if self.service.draining and scope["path"] not in _ALWAYS:
                fix = "Ask another server, or this one after its restart."
                raise ServingError(503, "The server is stopping.", fix, {"Connection": "close", "Retry-After": "5"})
            await self.app(scope, receive, observed)
        except Exception as error:
            if status:
                raise
            found = explained(error)
            await JSONResponse(found.body, found.status, found.headers)(scope, receive, observed)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.service.metrics.request(scope["method"], route, status, time.perf_counter() - started)
