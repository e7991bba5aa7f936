# SPDX-License-Identifier: Apache-2.0
"""What a bank's file says of a task and of itself without decoding anything, and what a task may be called."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

from ..storage import AdapterFileError, AdapterSizes

__all__ = ["BASE_NAME", "MAX_FACTS", "StoreInfo", "TaskCheck", "TaskInfo", "check_name"]

BASE_NAME = "__base__"
"""Names the base itself in a mixed batch, so no task can have it."""
MAX_NAME = 200
"""Characters of the longest name."""
MAX_FACTS = 10_000
"""Characters of the longest facts."""


def check_name(name: str) -> None:
    """Refuse a name that no terminal, URL or file could show.

    Args:
        name: Any text of 1 to [`MAX_NAME`] characters, without control characters.

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
    if not name.isprintable() and any(unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") for one in name):
        raise ValueError(f"{name!r} holds control characters: choose another name.")


@dataclass(frozen=True)
class TaskInfo:
    """What is known of a task without decoding it: its name and, as JSON, the facts of its row.

    Attributes:
        name: Its name.
        base: Name of the base model as the adapter's config says it, if it does.
        fingerprint: Fingerprint of the base's masked weights, if the config has one.
        codec: Of the adapter as it came in, and as it is exported; in the bank masks are always coded.
        weights: Masked weights, those included that pad a layer's last byte (7 a layer at most).
        density: Fraction of them that is on.
        sizes: Bytes in the bank, by purpose; `total` has the config and the header of the tensors too.
        checksum: CRC-32 of config and tensors.
        added: When it was put in, in ISO 8601, UTC.
    """

    name: str
    base: str | None
    fingerprint: str | None
    codec: str
    weights: int
    density: float
    sizes: AdapterSizes
    checksum: int
    added: str

    @classmethod
    def parse(cls, name: str, text: object) -> TaskInfo:
        """Read facts; AdapterFileError if one is missing or of another kind."""
        try:
            if not isinstance(text, str) or len(text) > MAX_FACTS:
                raise ValueError("no text, or too long")
            facts = json.loads(text)
            info = cls(name, **{**facts, "sizes": AdapterSizes(**facts["sizes"])})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise AdapterFileError(f"its facts are unreadable ({error})") from error
        texts = [text for text in (info.base, info.fingerprint) if text is not None] + [info.codec, info.added]
        numbers = [info.weights, info.checksum, *vars(info.sizes).values()]
        valid = all(isinstance(text, str) for text in texts) and isinstance(info.density, float)
        if not valid or not all(type(number) is int and 0 <= number < 1 << 50 for number in numbers):
            raise AdapterFileError("its facts are wrong")
        return info

    def facts(self) -> str:
        """All but the name, as JSON."""
        facts = {**vars(self), "sizes": vars(self.sizes)}
        del facts["name"]
        return json.dumps(facts, separators=(",", ":"))


@dataclass(frozen=True)
class StoreInfo:
    """A store as a whole.

    Attributes:
        tasks: Number of tasks.
        bytes: Bytes on disk.
        free: Bytes of removed tasks, which new ones fill; compaction gives them back.
        version: Version of the file's schema.
    """

    tasks: int
    bytes: int
    free: int
    version: int


class TaskCheck(NamedTuple):
    """What verification found of a task; `error` is None if it is whole."""

    name: str
    error: str | None
