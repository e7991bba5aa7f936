# SPDX-License-Identifier: Apache-2.0
"""`TaskSource`: where a bank's adapters lie; `MemorySource` keeps them coded in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import snapshot_download
from torch import Tensor

from ..storage import CONFIG_NAME, WEIGHTS_NAME, read_adapter_file
from ..storage.adapter_config import read_config
from .names import MAX_NAME, check_name

__all__ = ["MemorySource", "StoredAdapter", "TaskSource", "read_adapter", "unknown_task"]


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
    """What a bank asks of the place where its adapters lie. Names are unique; reading is safe from any thread."""

    def names(self) -> Sequence[str]:
        """All names, sorted."""

    def __contains__(self, name: object) -> bool:
        """Whether there is such a task."""

    def __len__(self) -> int:
        """Number of tasks."""

    def version(self, name: str) -> object:
        """What changes when another adapter is put under the same name; KeyError for an unknown one."""

    def read(self, name: str) -> StoredAdapter:
        """An adapter; KeyError for an unknown name, AdapterFileError for a damaged one."""

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
    """The error for a name that no task has."""
    shown = repr(name) if len(name) <= MAX_NAME else f"{name[:20]!r}… of {len(name)} characters"
    return KeyError(f"The bank has no task {shown}; it has {count}: see bank.names.")


class MemorySource:
    """Adapters in memory, as small as they are stored."""

    def __init__(self) -> None:
        """Start without tasks."""
        self._adapters: dict[str, StoredAdapter] = {}

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def version(self, name: str) -> object:
        """Identity of the adapter."""
        return id(self.read(name))

    def read(self, name: str) -> StoredAdapter:
        """The adapter itself."""
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
