# SPDX-License-Identifier: Apache-2.0
"""`ServingError`: what went wrong as a status, a sentence and the remedy; and what other errors become."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from ..bank.database import StoreBusyError
from ..storage import AdapterFileError

__all__ = ["ServingError", "explained", "explained_for_task"]

logger = logging.getLogger(__name__)


class ServingError(Exception):
    """An answer that is not the one asked for.

    Attributes:
        status: HTTP status.
        error: What is wrong.
        fix: What to do about it.
        headers: Of the response.
    """

    def __init__(self, status: int, error: str, fix: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error)
        self.status, self.error, self.fix = status, error, fix
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        """The response's JSON."""
        return {"error": self.error, "fix": self.fix}


def explained(error: BaseException) -> ServingError:
    """An unforeseen error: it is logged in full, and the client learns its kind alone."""
    if isinstance(error, ServingError):
        return error
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return ServingError(503, "The server is out of memory.", "Try again later.", {"Retry-After": "5"})
    if isinstance(error, StoreBusyError):
        logger.warning("the store is busy: %s", error)
        fix = "Nothing was changed: try again when it is done."
        return ServingError(503, "Another process is writing to the bank.", fix, {"Retry-After": "5"})
    logger.error("a request failed", exc_info=error)
    return ServingError(
        500, f"The server failed ({type(error).__name__}).", "Try again; the server's log has the details."
    )


def explained_for_task(error: BaseException, name: str) -> ServingError:
    """Why a task gave no answer; 404 if it went meanwhile, 500 with its name if it cannot be used."""
    if isinstance(error, KeyError):
        return ServingError(404, f"There is no task {name!r}.", "GET /v1/tasks lists the tasks.")
    if isinstance(error, AdapterFileError):
        logger.error("task %r is damaged: %s", name, error)
        fix = "Other tasks are served. Remove this one and add it again; `smn bank verify` names all that are damaged."
        return ServingError(500, f"Task {name!r} is damaged: {error}", fix)
    if isinstance(error, (ValueError, TypeError, OSError)):
        logger.error("task %r cannot be used: %s", name, error)
        fix = "Other tasks are served. Add one that was made for the server's base."
        return ServingError(500, f"Task {name!r} cannot be used: {error}", fix)
    return explained(error)
