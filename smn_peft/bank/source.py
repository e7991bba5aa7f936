# SPDX-License-Identifier: Apache-2.0
"""Where a bank's adapters lie, what they may be called, and a source that keeps them in memory."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..storage.adapter_config import read_config
from ..storage.adapter_file import read_adapter_file
from ..storage.hub_files import locate_adapter

__all__ = ["BASE_NAME", "MAX_NAME", "MemorySource", "StoredAdapter", "check_name", "read_adapter", "unknown_task"]

BASE_NAME = "__base__"
"""Names the base itself in a mixed batch, so no task can have it."""
MAX_NAME = 200
"""Characters of the longest name."""


def check_name(name: str) -> None:
    """Refuse a name that no terminal, URL or file could show: TypeError if it is no text, else ValueError."""
    if not isinstance(name, str):
        raise TypeError(f"A task's name is text; got {type(name).__name__}.")
    if not 0 < len(name) <= MAX_NAME:
        raise ValueError(f"A task's name has 1 to {MAX_NAME} characters; {name[:20]!r}… has {len(name)}.")
    if name in (BASE_NAME, ".", ".."):
        raise ValueError(f"{name!r} names the base itself or a folder: choose another name.")
    if not name.isprintable() and any(unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") for one in name):
        raise ValueError(f"{name!r} holds control characters: choose another name.")


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it is stored."""

    config: Mapping[str, Any]  # of its adapter_config.json
    tensors: Mapping[str, Tensor]  # of its safetensors file: masks bit-packed or coded, head, statistics


def read_adapter(adapter: str | os.PathLike[str], *, revision: str | None = None) -> StoredAdapter:
    """Read an adapter from a folder or from the Hub.

    AdapterFileError if the file is damaged, FileNotFoundError if there is none, ValueError if its format is not known.
    """
    folder = locate_adapter(str(adapter), revision)
    if not folder.is_dir():
        raise FileNotFoundError(f"{adapter} is a file: name the folder of an adapter, or user/name on the Hub.")
    return StoredAdapter(read_config(folder), read_adapter_file(folder))


def unknown_task(name: str, count: int) -> KeyError:
    """Error for a name that no task has."""
    shown = repr(name) if len(name) <= MAX_NAME else f"{name[:20]!r}… of {len(name)} characters"
    return KeyError(f"The bank has no task {shown}; it has {count}: see bank.names.")


class MemorySource:
    """Adapters in memory, as small as they are stored; see [`DiskStore`] for the methods."""

    def __init__(self) -> None:
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
