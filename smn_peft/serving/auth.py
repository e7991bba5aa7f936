# SPDX-License-Identifier: Apache-2.0
"""The key that writing takes, compared in constant time; without one the server is read-only."""

from __future__ import annotations

import hmac
import os

from starlette.requests import Request

from .errors import ServingError

__all__ = ["check_key", "key_from"]


def check_key(request: Request, key: str | None) -> None:
    """Let a write pass; the key comes as ``Authorization: Bearer …`` or ``X-API-Key: …``.

    Raises:
        ServingError: 403 if the server has no key, 401 if the request's is another.
    """
    if key is None:
        fix = "Start it with --api-key-env and the name of an environment variable that holds a key."
        raise ServingError(403, "This server takes no changes.", fix)
    given = request.headers.get("x-api-key")
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if given is None and scheme.lower() == "bearer":
        given = token.strip()
    # Starlette reads headers as latin-1, which gives the bytes back that came.
    if given is None or not hmac.compare_digest(given.encode("latin-1"), key.encode()):
        what = "No API key was sent." if given is None else "The API key is another."
        raise ServingError(401, what, "Send the server's in the header Authorization: Bearer …", _CHALLENGE)


_CHALLENGE = {"WWW-Authenticate": "Bearer"}


def key_from(variable: str | None) -> str | None:
    """The key that an environment variable holds.

    Raises:
        ValueError: If it is named, and unset or empty.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"The environment variable {variable} holds no API key: set it, or leave --api-key-env out.")
    return key
