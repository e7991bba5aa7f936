# SPDX-License-Identifier: Apache-2.0
"""What the Hub's answers mean for who pushes: an error with the fix, and patience where the Hub asks for it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import logging

__all__ = ["HubError", "patiently"]

# The HTTP library's own base class (it differs between versions of the client) and the socket's.
_TRANSPORT: tuple[type[BaseException], ...] = (HfHubHTTPError.__mro__[1], OSError)
_HANDLED: tuple[type[BaseException], ...] = (*_TRANSPORT, RuntimeError)
_BUSY = (429, 503)
_TRIES = 4
_LONGEST = 120.0  # seconds; a longer wait is the user's to decide
_RESET = re.compile(r"\bt\s*=\s*(\d+)")

_Result = TypeVar("_Result")
logger = logging.get_logger(__name__)


class HubError(OSError):
    """The Hub refused, or could not be reached; the message says what to do."""


def patiently(call: Callable[[], _Result], repo_id: str) -> _Result:
    """Call the Hub; where it is busy, wait as long as it says and try again.

    Only answers that say that nothing was done are tried again, so nothing is done twice. Interrupted uploads are
    taken up again by the client itself.

    Args:
        call: A request, or several that may be repeated.
        repo_id: Repository, for messages.

    Raises:
        HubError: The Hub refuses, is busy for longer than two minutes, or cannot be reached.
    """
    for attempt in range(1, _TRIES + 1):
        try:
            return call()
        except _HANDLED as error:
            cause = _cause(error)
            if cause is None:
                raise
            wait = _wait(cause)
            if wait is None or wait > _LONGEST or attempt == _TRIES:
                raise HubError(_explanation(cause, repo_id, wait)) from error
            logger.warning(f"The Hub is busy: trying again in {wait:g} seconds ({attempt} of {_TRIES - 1}).")
            time.sleep(wait)
    raise AssertionError("unreachable")


def _cause(error: BaseException) -> BaseException | None:
    """The transport's error, None for any other; the client wraps what ends an upload in a RuntimeError."""
    if isinstance(error, RuntimeError) and not isinstance(error, _TRANSPORT):
        inner = error.__cause__
        return inner if isinstance(inner, _TRANSPORT) else None
    return None if isinstance(error, (FileNotFoundError, PermissionError)) else error


def _wait(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait, None for an answer that will not change."""
    response = getattr(error, "response", None)
    if response is None or response.status_code not in _BUSY:
        return None
    stated = response.headers.get("Retry-After", "")
    if stated.strip().isdigit():
        return float(stated)
    reset = _RESET.search(response.headers.get("RateLimit", ""))
    return float(reset[1]) if reset else 10.0


def _explanation(error: BaseException, repo_id: str, wait: float | None) -> str:
    response: Any = getattr(error, "response", None)
    status = response.status_code if response is not None else None
    said = getattr(error, "server_message", None)
    said = f" The Hub says: {' '.join(said.split())}" if said else ""
    if status is None:
        return (
            f"The Hub cannot be reached, or the connection broke ({type(error).__name__}: {error}). Check the network "
            "and push again: what is uploaded already is not sent again."
        )
    if status in _BUSY:
        return f"The Hub takes no more requests for now: push again in {wait:g} seconds.{said}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision: name a branch of it, or leave --revision out.{said}"
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: ask for access on its page, then push again.{said}"
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return (
            "The Hub does not know you: log in by `hf auth login`, or set HF_TOKEN to a token with write access "
            f"(huggingface.co/settings/tokens).{said}"
        )
    if status in (401, 404):
        return (
            f"The Hub shows no {repo_id}: check the spelling of user and name; a private repository needs "
            f"`hf auth login` with an account that may see it.{said}"
        )
    if status == 403:
        return (
            f"Your token may not write to {repo_id}: take one with write access (huggingface.co/settings/tokens), "
            f"your own user name, or --create-pr to propose the change.{said}"
        )
    if status == 412:
        return f"{repo_id} was changed by somebody else meanwhile: push again.{said}"
    return f"The Hub answered {status} for {repo_id}.{said or ' ' + ' '.join(str(error).split())}"
