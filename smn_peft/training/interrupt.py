# SPDX-License-Identifier: Apache-2.0
"""`StopRequest`: Ctrl-C, SIGTERM and SIGUSR1 end a run between two steps, a second one after a while at once."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

from ..data.loading import STOP_SIGNALS

__all__ = ["StopRequest"]

_SAME_REQUEST = 1.0  # seconds


class StopRequest:
    """While entered, a first SIGINT, SIGTERM or SIGUSR1 only sets `requested`; a later one does what it always does.

    Within a second, others are taken for the same request: a launcher passes on what the terminal has sent to all.
    Outside the main thread, where Python allows no handlers, it never is requested.
    """

    def __init__(self) -> None:
        """Nothing is requested yet."""
        self.requested = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        """Take over the signals."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        while self._before:
            signal.signal(*self._before.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > _SAME_REQUEST:
            self.__exit__()
            signal.raise_signal(number)
