# SPDX-License-Identifier: Apache-2.0
"""The process: a uvicorn server with bounded connections, which on SIGTERM finishes what it has and ends."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import socket
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import build_app
from .limits import Limits
from .service import Service

__all__ = ["make_server"]

logger = logging.getLogger(__name__)

_BACKLOG = 128
_SPARE = 16  # connections beyond the limit, which are answered with 503


class _Protocol(H11Protocol):
    """uvicorn's protocol, which drops connections far beyond their limit at once."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) > self.limit_concurrency + _SPARE:
            transport.abort()


class _Server(uvicorn.Server):
    """uvicorn's server, which ends connections that do nothing, and on a signal first finishes what it has.

    Between the signal and the end it still answers, so that clients learn why they are turned away. uvicorn itself
    ends only connections that wait for another request; `limited` bounds the time for bodies.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service, self._end, self._last_line = service, math.inf, -math.inf
        self._idle: dict[tuple[Any, Any], float] = {}  # (connection, its last request) -> since when

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
        """Ten times a second: end connections in which nothing moves, and after a signal the server."""
        now, limits = time.monotonic(), self._service.limits
        connections: list[Any] = list(self.server_state.connections)
        still = [one for one in connections if not _is_answering(one)]
        self._idle = {(one, one.cycle): self._idle.get((one, one.cycle), now) for one in still}
        for (connection, _), since in self._idle.items():
            if now - since > limits.idle:
                connection.transport.abort()
        if self._service.draining and (self._service.places.held == 0 or now >= self._end):
            self.config.timeout_graceful_shutdown = max(1, math.ceil(min(self._end - now, limits.grace)))
            self.should_exit = True
        return await super().on_tick(counter)


def _is_answering(connection: Any) -> bool:
    """Whether it has a request, and its client reads the answer."""
    cycle = connection.cycle
    return cycle is not None and not cycle.response_complete and not connection.flow.write_paused


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
    limits = service.limits
    connections, backlog = _bounds(limits)
    config = uvicorn.Config(
        # A server that listens at a name is called by it.
        build_app(service, api_key=api_key, allowed_hosts=(*allowed_hosts, host)),
        host=host,
        port=port,
        http=_Protocol,
        ws="none",
        log_level=log_level,
        access_log=False,
        server_header=False,
        limit_concurrency=connections,
        backlog=backlog,
        timeout_keep_alive=math.ceil(limits.idle),
        timeout_graceful_shutdown=math.ceil(limits.grace),
    )
    return _Server(config, service)
