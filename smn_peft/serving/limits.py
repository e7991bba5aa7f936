# SPDX-License-Identifier: Apache-2.0
"""Bounds on requests, and `ServingError`: a refusal as status, reason and remedy."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from starlette.requests import Request
from starlette.types import Message

from ..bank.store import StoreBusyError
from ..data.decoding import ImageError, TooManyPixelsError, UnknownFormatError
from ..storage.files import AdapterFileError

__all__ = ["Budget", "Limits", "ServingError", "explained", "limited"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Bounds on requests."""

    queue: int = 256  # samples held at a time, waiting or worked on; one more is answered with 429
    timeout: float = 30.0  # seconds to read a request's body, and again to answer it
    pause: float = 10.0  # seconds without a byte of a body after which it is given up
    idle: float = 10.0  # seconds that a connection may take for a header, or wait for its next request
    grace: float = 10.0  # seconds after SIGTERM in which running requests are finished; then they are dropped
    connections: int = 512  # held at a time, and at most half of the limit on open files; then 503
    body_bytes: int = 10 << 20  # of a request for predictions or embeddings
    bodies_bytes: int = 256 << 20  # of all such requests together
    adapter_bytes: int = 256 << 20  # of a request that brings an adapter
    pixels: int = 25_000_000  # width times height of an image
    aspect: int = 20  # longer side of an image over its shorter one, which is resized to the model's input
    samples: int = 64  # tasks or images of one request
    classes: int = 10_000  # of a task whose logits are given

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:  # false for nan too
                raise ValueError(f"{name} must be above 0 and finite; got {value}.")


class ServingError(Exception):
    """A refusal: HTTP status, what is wrong, what to do about it, and headers; 503 asks to come back in 5 s."""

    def __init__(self, status: int, error: str, fix: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error)
        self.status, self.body = status, {"error": error, "fix": fix}
        self.headers = {**({"Retry-After": "5"} if status == 503 else {}), **(headers or {})}


# Errors that mean the same wherever they are raised: status, what is wrong ("": as the error says), and the remedy.
_MEANINGS: tuple[tuple[Any, int, str, str], ...] = (
    ((MemoryError, torch.OutOfMemoryError), 503, "The server is out of memory.", "Try again later."),
    (StoreBusyError, 503, "Another process writes to the bank.", "Nothing was changed: try again when it is done."),
    (TooManyPixelsError, 413, "", "Shrink the image."),
    (UnknownFormatError, 415, "", "Send an image in one of these formats."),
    (ImageError, 422, "", "Send a whole image file."),
)


def explained(error: BaseException, task: str | None = None, *, change: bool = False) -> ServingError:
    """Make a refusal of any error, raised by the use of a `task`, or its `change`; an unknown one is logged."""
    if isinstance(error, ServingError):
        return error
    for kind, status, what, fix in _MEANINGS:
        if isinstance(error, kind):
            return ServingError(status, what or str(error), fix)
    if change:
        if isinstance(error, PermissionError):
            return ServingError(403, f"Task {task!r} was not changed: {error}", "Give the server access to its files.")
        if isinstance(error, (ValueError, TypeError, FileNotFoundError)):
            return ServingError(422, f"Task {task!r} was not added: {error}", "Send an adapter made for the base.")
        if isinstance(error, OSError):
            return ServingError(503, f"Task {task!r} was not changed: {error}", "Try again later.")
    elif task is not None and isinstance(error, KeyError):
        return ServingError(404, f"There is no task {task!r}.", "GET /v1/models lists the tasks.")
    elif task is not None and isinstance(error, (ValueError, TypeError, OSError)):
        what, fix = f"Task {task!r} cannot be used: {error}", "Add one that was made for the server's base."
        if isinstance(error, AdapterFileError):
            what = f"Task {task!r} is damaged: {error}"
            fix = "Remove it and add it again; `smn bank verify` names all that are damaged."
        logger.error(what)
        return ServingError(500, what, f"Other tasks are served. {fix}")
    logger.error("a request failed", exc_info=error)
    fix = "Try again; the server's log has the details."
    return ServingError(500, f"The server failed ({type(error).__name__}).", fix)


class Budget:
    """An amount of which clients hold parts, counted in the event loop's thread."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0

    def take(self, count: int, refusal: ServingError) -> None:
        """Hold more; raise `refusal` if that is too much."""
        if self.held + count > self.limit:
            raise refusal
        self.held += count


@contextmanager
def limited(request: Request, limit: int, pause: float, bodies: Budget | None = None) -> Iterator[Request]:
    """Bound a request's body while it is read from the request that is yielded.

    More than `limit` bytes raise 413, no byte for `pause` seconds 408; 503 if the budget `bodies`, in which the bytes
    count until the context ends, is spent.
    """
    too_large = ServingError(413, f"The request is larger than {limit} bytes.", "Send a smaller one.")
    too_many = ServingError(503, "Too many requests are being read.", "Try again.")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    read = 0

    async def receive() -> Message:
        nonlocal read
        try:
            message = await asyncio.wait_for(request.receive(), pause)
        except asyncio.TimeoutError as error:
            raise ServingError(408, f"No byte of the body came for {pause:g} s.", "Send it at once.") from error
        count = len(message.get("body", b""))
        if read + count > limit:
            raise too_large
        if bodies is not None:
            bodies.take(count, too_many)
        read += count
        return message

    try:
        yield Request(request.scope, receive)
    finally:
        if bodies is not None:
            bodies.held -= read
