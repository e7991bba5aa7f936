# SPDX-License-Identifier: Apache-2.0
"""`Workers`: threads for what must not run in the event loop, and that nobody waits for when the process ends."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["Workers"]

T = TypeVar("T")


class Workers:
    """A few daemon threads. Python joins a `ThreadPoolExecutor`'s at exit, however long they still decode."""

    def __init__(self, count: int, name: str) -> None:
        """Start so many threads."""
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._queue, self._count = queue.SimpleQueue(), count
        for _ in range(count):
            threading.Thread(target=self._work, name=name, daemon=True).start()

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """What a function returns or raises in one of the threads; cancelled while it waits, it is never called."""
        future: Future[T] = Future()
        self._queue.put((future, function, arguments))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Let the threads end after what was asked of them."""
        for _ in range(self._count):
            self._queue.put(None)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            future, function, arguments = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:
                    future.set_exception(error)
            del job, future, function, arguments  # not held while waiting for the next
