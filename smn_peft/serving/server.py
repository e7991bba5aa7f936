# SPDX-License-Identifier: Apache-2.0
"""The process: a uvicorn server that on SIGTERM finishes what it has, answers 503 to the rest, and ends."""

from __future__ import annotations

from types import FrameType

import uvicorn

from .app import build_app
from .service import Service

__all__ = ["serve"]


class _Draining(uvicorn.Server):
    """Between the signal and the end it still answers, so that clients learn why they are turned away."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end at the second."""
        if self._service.draining:
            super().handle_exit(sig, frame)
        self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """End once nothing is left to answer."""
        if self._service.draining and self._service.room.taken == 0:
            self.should_exit = True
        return await super().on_tick(counter)


def serve(service: Service, *, host: str = "127.0.0.1", port: int = 8000, api_key: str | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        service: What answers; it is closed at the end.
        host: Address to listen at.
        port: Port; 0 takes a free one, which the log names.
        api_key: What writing takes; None: nothing can be written.

    Raises:
        SystemExit: If the address is taken.
    """
    config = uvicorn.Config(
        build_app(service, api_key=api_key),
        host=host,
        port=port,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(service.limits.timeout) + 1,
    )
    _Draining(config, service).run()
