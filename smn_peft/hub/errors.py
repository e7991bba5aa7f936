# SPDX-License-Identifier: Apache-2.0
"""`HubError`: what the Hub's answers mean for who pushes, and patience where the Hub asks for it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging

_BUSY = (429, 503)
_TRIES = 4
_LONGEST = 120.0  # seconds; a longer wait is the user's to decide
_RESET = re.compile(r"\bt\s*=\s*(\d+)")

_Result = TypeVar("_Result")
logger = logging.get_logger(__name__)


class HubError(OSError):
    """The Hub refused, or could not be reached; the message says what to do."""


def patiently(call: Callable[[], _Result], repo_id: str) -> _Result:
    """Call the Hub; where it is busy, wait as long as it says and try again, which the client does for uploads alone.

    Only answers that say that nothing was done are tried again. `repo_id` is for messages.

    Raises:
        HubError: The Hub refuses, is busy for longer than two minutes, or cannot be reached.
    """
    for attempt in range(1, _TRIES + 1):
        try:
            return call()
        except (HTTPError, OSError, RuntimeError) as error:
            # The client wraps what ends an upload in a RuntimeError.
            cause: Any = error if isinstance(error, (HTTPError, OSError)) else error.__cause__
            if isinstance(cause, (FileNotFoundError, PermissionError)) or not isinstance(cause, (HTTPError, OSError)):
                raise  # of this disk, or a bug
            wait = _seconds_to_wait(cause)
            if wait is None or wait > _LONGEST or attempt == _TRIES:
                raise HubError(_explanation(cause, repo_id, wait)) from error
            logger.warning(f"The Hub is busy: trying again in {wait:g} seconds ({attempt} of {_TRIES - 1}).")
            time.sleep(wait)
    raise AssertionError("unreachable")


def _seconds_to_wait(error: Exception) -> float | None:
    """Seconds that the Hub asks to wait; None for an answer that will not change."""
    response = getattr(error, "response", None)
    if response is None or response.status_code not in _BUSY:
        return None
    stated = response.headers.get("Retry-After", "")
    if stated.strip().isdigit():
        return float(stated)
    reset = _RESET.search(response.headers.get("RateLimit", ""))
    return float(reset[1]) if reset else 10.0


def _explanation(error: Exception, repo_id: str, wait: float | None) -> str:
    if not isinstance(error, HfHubHTTPError):
        return (
            f"The Hub cannot be reached, or the connection broke ({type(error).__name__}: {error}). Check the network "
            "and push again: what is uploaded already is not sent again."
        )
    status, tokens = error.response.status_code, "a token with write access (huggingface.co/settings/tokens)"
    said = f" The Hub says: {' '.join(error.server_message.split())}" if error.server_message else ""
    if isinstance(error, RevisionNotFoundError):
        fix = f"{repo_id} has no such revision: name a branch of it, or leave --revision out."
    elif isinstance(error, GatedRepoError):
        fix = f"{repo_id} is gated: ask for access on its page, then push again."
    elif isinstance(error, RepositoryNotFoundError) or status == 404:
        fix = (
            f"The Hub shows no {repo_id}: check the spelling of user and name; a private repository needs "
            "`hf auth login` with an account that may see it."
        )
    elif status in _BUSY:
        fix = f"The Hub takes no more requests for now: push again in {wait:g} seconds."
    elif status == 401:
        fix = f"The Hub does not know you: log in by `hf auth login`, or set HF_TOKEN to {tokens}."
    elif status == 403:
        fix = (
            f"Your token may not write to {repo_id}: take {tokens}, your own user name, or --create-pr to propose the "
            "change."
        )
    elif status == 412:
        fix = f"{repo_id} was changed by somebody else meanwhile: push again."
    else:
        fix = f"The Hub answered {status} for {repo_id}." + ("" if said else f" {' '.join(str(error).split())}")
    return fix + said
