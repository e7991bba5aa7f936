# SPDX-License-Identifier: Apache-2.0
"""What one client may ask of the server: bytes of a body, time, and a place among those that wait."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import Message

from .errors import ServingError

__all__ = ["Limits", "Room", "limited"]


@dataclass(frozen=True)
class Limits:
    """Bounds on requests.

    Attributes:
        queue: Samples that the server holds at a time, waiting or worked on; one more is answered with 429.
        timeout: Seconds that a request may take, reading its body included.
        body_bytes: Size of a request for predictions or embeddings.
        adapter_bytes: Size of a request that brings an adapter.
        pixels: Width times height of an image.
        aspect: Longer side of an image over its shorter one: the shorter is what is resized to the model's input.
        tasks: Tasks of one request.
    """

    queue: int = 256
    timeout: float = 30.0
    body_bytes: int = 10 << 20
    adapter_bytes: int = 256 << 20
    pixels: int = 40_000_000
    aspect: int = 20
    tasks: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} must be above 0; got {value}.")


class Room:
    """Places for samples, counted in the event loop's thread."""

    def __init__(self, places: int, seconds_each: Callable[[], float]) -> None:
        """Offer places.

        Args:
            places: How many.
            seconds_each: What a sample takes at present, for the time after which to try again.
        """
        self.places, self.taken = places, 0
        self._seconds_each = seconds_each

    @contextmanager
    def place(self, count: int) -> Iterator[None]:
        """Hold places while this lasts; 429 if there are not so many."""
        if self.taken + count > self.places:
            wait = max(1, math.ceil(self.taken * self._seconds_each()))
            raise ServingError(
                429,
                f"The queue is full: {self.taken} of {self.places} places are taken.",
                f"Try again in {wait} s, or with fewer tasks at a time.",
                {"Retry-After": str(wait)},
            )
        self.taken += count
        try:
            yield
        finally:
            self.taken -= count


def limited(request: Request, limit: int) -> Request:
    """The same request; reading more than `limit` bytes of its body raises 413, whether it said its length or not."""
    too_large = ServingError(413, f"The request is larger than {limit} bytes.", "Send a smaller one.")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    return Request(request.scope, _counting(request.receive, limit, too_large))


def _counting(
    receive: Callable[[], Awaitable[Message]], limit: int, too_large: ServingError
) -> Callable[[], Awaitable[Message]]:
    read = 0

    async def counting() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > limit:
            raise too_large
        return message

    return counting
