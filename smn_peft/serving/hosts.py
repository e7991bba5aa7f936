# SPDX-License-Identifier: Apache-2.0
"""Which sites' pages may make a browser ask this server: its own alone, unless others are allowed by name.

A page of another site can send a POST to any server that the browser reaches (its Origin tells), and can take on a
local server's address under its own name (DNS rebinding; the Host tells, since it is that name).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from .errors import ServingError

__all__ = ["check_origin"]

_READING = frozenset({"GET", "HEAD", "OPTIONS"})


def check_origin(method: str, headers: Headers, allowed: Sequence[str]) -> None:
    """Let a request pass that was sent to this server by name, and by no other site's page.

    "localhost" and IP addresses are always names of this server: nobody can make those point elsewhere.

    Args:
        method: Of the request.
        headers: Of the request.
        allowed: Other names of this server, and of sites whose pages may post to it; "*.example.com" for all below,
            "*" for everything.

    Raises:
        ServingError: 403.
    """
    if "*" in allowed:
        return
    host = headers.get("host", "").lower()
    name = _name(host)
    if name is None or not (name == "localhost" or _is_address(name) or _among(name, allowed)):
        fix = "Use its address, or start it with --allowed-hosts and this name."
        raise ServingError(403, f"The server is not called {host[:100]!r}.", fix)
    origin = headers.get("origin")
    if origin is None or method in _READING:
        return
    netloc = origin.lower().partition("://")[2]
    if netloc != host and not _among(_name(netloc) or "", allowed):
        fix = "Send it from the server's own page, or start the server with --allowed-hosts and that site's name."
        raise ServingError(403, f"The request comes from a page of {origin[:100]!r}.", fix)


def _name(netloc: str) -> str | None:
    try:
        return urlsplit(f"//{netloc}").hostname
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _among(name: str, allowed: Sequence[str]) -> bool:
    return any(
        name == pattern or (pattern.startswith("*.") and name.endswith(pattern[1:]))
        for pattern in (each.lower().strip("[]") for each in allowed if each)
    )
