# SPDX-License-Identifier: Apache-2.0
"""`StopRequest`: Ctrl-C and SIGTERM end a run between two steps, a second one at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["StopRequest"]


class StopRequest:
    """While entered, a first SIGINT or SIGTERM only sets `requested`; the second does what it always does.

    Outside the main thread, where Python allows no handlers, it never is requested.
    """

    def __init__(self) -> None:
        """Nothing is requested yet."""
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        """Take over the signals."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        while self._before:
            signal.signal(*self._before.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self.__exit__()
            signal.raise_signal(number)
        self.requested = True
