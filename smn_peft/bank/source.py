# SPDX-License-Identifier: Apache-2.0
"""Where a bank's adapters lie, what they may be called, and a source that keeps them in memory."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import snapshot_download
from torch import Tensor

from ..storage import CONFIG_NAME, WEIGHTS_NAME, read_adapter_file
from ..storage.adapter_config import read_config

__all__ = [
    "BASE_NAME",
    "MAX_NAME",
    "MemorySource",
    "StoredAdapter",
    "TaskSource",
    "check_name",
    "read_adapter",
    "unknown_task",
]

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


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it is stored.

    Attributes:
        config: Its adapter_config.json.
        tensors: Of its safetensors file: masks bit-packed or coded, head, statistics.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class TaskSource(Protocol):
    """Where a bank's adapters lie. Names are unique; reading is safe from any thread."""

    def names(self) -> Sequence[str]:
        """Return all names, sorted."""

    def __contains__(self, name: object) -> bool: ...

    def __len__(self) -> int: ...

    def version(self, name: str) -> object:
        """Return what changes with the adapter under a name; KeyError for an unknown one."""

    def read(self, name: str) -> StoredAdapter:
        """Return an adapter; KeyError for an unknown name, AdapterFileError for a damaged one."""

    def add(self, name: str, adapter: StoredAdapter, *, replace: bool = False) -> None:
        """Put an adapter under a name; ValueError if it is no name, or taken and `replace` is false."""

    def remove(self, name: str) -> None:
        """Take an adapter out; KeyError for an unknown name."""

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name; KeyError and ValueError as above."""

    def close(self) -> None:
        """Let go of files."""


def read_adapter(adapter: str | os.PathLike[str], *, revision: str | None = None) -> StoredAdapter:
    """Read an adapter from a folder or from the Hub.

    Args:
        adapter: Folder with adapter_config.json and adapter_model.safetensors, or a Hub id.
        revision: Git revision on the Hub.

    Raises:
        AdapterFileError: If the file is damaged.
        FileNotFoundError: If there is no adapter.
        ValueError: If its format is not known.
    """
    folder, name = Path(adapter), str(adapter)
    if not folder.is_dir():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise FileNotFoundError(f"{name} does not exist: name the folder of an adapter, or user/name on the Hub.")
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]))
    return StoredAdapter(read_config(folder), read_adapter_file(folder))


def unknown_task(name: str, count: int) -> KeyError:
    """Return the error for a name that no task has."""
    shown = repr(name) if len(name) <= MAX_NAME else f"{name[:20]!r}… of {len(name)} characters"
    return KeyError(f"The bank has no task {shown}; it has {count}: see bank.names.")


class MemorySource:
    """Adapters in memory, as small as they are stored."""

    def __init__(self) -> None:
        """Start without tasks."""
        self._adapters: dict[str, StoredAdapter] = {}

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def version(self, name: str) -> object:
        """Return the adapter's identity."""
        return id(self.read(name))

    def read(self, name: str) -> StoredAdapter:
        """Return the adapter itself."""
        if name not in self._adapters:
            raise unknown_task(name, len(self))
        return self._adapters[name]

    def add(self, name: str, adapter: StoredAdapter, *, replace: bool = False) -> None:
        """Keep a reference."""
        check_name(name)
        if name in self._adapters and not replace:
            raise ValueError(f"The bank has a task {name!r} already: remove it, or pass replace=True.")
        self._adapters[name] = adapter

    def remove(self, name: str) -> None:
        """Drop the reference."""
        self.read(name)
        del self._adapters[name]

    def rename(self, old: str, new: str) -> None:
        """Keep it under another name."""
        self.add(new, self.read(old))
        del self._adapters[old]

    def close(self) -> None:
        """Drop all."""
        self._adapters.clear()
