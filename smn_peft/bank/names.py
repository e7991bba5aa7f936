# SPDX-License-Identifier: Apache-2.0
"""What a task may be called."""

from __future__ import annotations

import unicodedata

__all__ = ["BASE_NAME", "MAX_NAME", "check_name"]

BASE_NAME = "__base__"
"""Names the base itself in a mixed batch, so no task can have it."""
MAX_NAME = 200
"""Characters of the longest name."""


def check_name(name: str) -> None:
    """Refuse a name that no terminal, URL or file could show.

    Args:
        name: Any text of 1 to [`MAX_NAME`] characters, without control characters, that is no folder's "." or "..".

    Raises:
        TypeError: If it is no text.
        ValueError: If it is empty, too long, reserved, or holds what is not to be printed.
    """
    if not isinstance(name, str):
        raise TypeError(f"A task's name is text; got {type(name).__name__}.")
    if not name:
        raise ValueError("A task's name must not be empty.")
    if len(name) > MAX_NAME:
        raise ValueError(f"A task's name has at most {MAX_NAME} characters; {name[:20]!r}… has {len(name)}.")
    if name == BASE_NAME:
        raise ValueError(f"{BASE_NAME!r} names the base itself: choose another name.")
    if name in (".", ".."):
        raise ValueError(f"{name!r} names a folder in every path and URL: choose another name.")
    if not name.isprintable() and any(unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") for one in name):
        raise ValueError(f"{name!r} holds control characters: choose another name.")
