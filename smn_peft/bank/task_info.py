# SPDX-License-Identifier: Apache-2.0
"""What a bank's file says of a task and of itself without decoding anything."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

from ..storage import AdapterFileError, AdapterSizes

__all__ = ["MAX_FACTS", "StoreInfo", "TaskCheck", "TaskInfo"]

MAX_FACTS = 10_000
"""Characters of the longest facts."""


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
