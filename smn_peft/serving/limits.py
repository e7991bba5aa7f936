# SPDX-License-Identifier: Apache-2.0
"""What one client may ask of the server: bytes of a body, time, and a place among those that wait."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import Message

from .errors import ServingError

__all__ = ["Bodies", "Limits", "Room", "limited"]


@dataclass(frozen=True)
class Limits:
    """Bounds on requests.

    Attributes:
        queue: Samples that the server holds at a time, waiting or worked on; one more is answered with 429.
        timeout: Seconds that a request may take: to read its body, and again to answer it.
        pause: Seconds without a byte of a body after which it is given up.
        idle: Seconds that a connection may take for a request's header, or wait for its next request.
        grace: Seconds after SIGTERM in which what is under way is finished; then it is dropped.
        connections: Held at a time; a request on one more is answered with 503. At most half of what the process's
            limit on open files leaves.
        body_bytes: Size of a request for predictions or embeddings.
        bodies_bytes: Size of all their bodies together.
        adapter_bytes: Size of a request that brings an adapter.
        pixels: Width times height of an image.
        aspect: Longer side of an image over its shorter one: the shorter is what is resized to the model's input.
        tasks: Tasks of one request.
        classes: Classes of a task whose logits are given.
    """

    queue: int = 256
    timeout: float = 30.0
    pause: float = 10.0
    idle: float = 10.0
    grace: float = 10.0
    connections: int = 512
    body_bytes: int = 10 << 20
    bodies_bytes: int = 256 << 20
    adapter_bytes: int = 256 << 20
    pixels: int = 25_000_000
    aspect: int = 20
    tasks: int = 64
    classes: int = 10_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:  # false for nan too
                raise ValueError(f"{name} must be above 0 and finite; got {value}.")


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


class Bodies:
    """Bytes of bodies that are held, counted in the event loop's thread: many clients must not fill the memory."""

    def __init__(self, limit: int) -> None:
        """Hold so many bytes at most."""
        self.limit, self.held = limit, 0

    def take(self, count: int) -> None:
        """Hold more bytes; 503 if they are too many."""
        if self.held + count > self.limit:
            raise ServingError(503, "Too many requests are being read.", "Try again.", {"Retry-After": "1"})
        self.held += count


@contextmanager
def limited(request: Request, limit: int, pause: float, bodies: Bodies | None = None) -> Iterator[Request]:
    """The same request, with a body that is bounded while it is read, whether it said its length or not.

    Args:
        request: As it came.
        limit: Bytes of its body; more raise 413.
        pause: Seconds to wait for the next bytes; longer raises 408.
        bodies: Where its bytes are counted while this lasts.
    """
    too_large = ServingError(413, f"The request is larger than {limit} bytes.", "Send a smaller one.")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    read = 0

    async def receive() -> Message:
        nonlocal read
        try:
            message = await asyncio.wait_for(request.receive(), pause)
        except (TimeoutError, asyncio.TimeoutError) as error:
            raise ServingError(408, f"No byte of the body came for {pause:g} s.", "Send it at once.") from error
        count = len(message.get("body", b""))
        if read + count > limit:
            raise too_large
        if bodies is not None:
            bodies.take(count)
        read += count
        return message

    try:
        yield Request(request.scope, receive)
    finally:
        if bodies is not None:
            bodies.held -= read
