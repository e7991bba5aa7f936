# SPDX-License-Identifier: Apache-2.0
"""A bank's adapters: what they may be called, a source that keeps them in memory, and rows of a bank's file.

A row is an adapter's config, a safetensors blob of its tensors with coded masks, and facts for listings.
"""

from __future__ import annotations

import json
import os
import unicodedata
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeAlias

from annotated_types import Interval
from safetensors.torch import save
from torch import Tensor

from ..storage.adapter_config import (
    CONFIG_NAME,
    SETTINGS_NAME,
    check_config,
    read_config,
    settings_tensor,
)
from ..storage.adapter_file import (
    BASE_PREFIX,
    WEIGHTS_NAME,
    AdapterSizes,
    check_adapter_file,
    coded_masks,
    parse_adapter_file,
    purpose_of,
    read_adapter_file,
    write_adapter_file,
)
from ..storage.files import AdapterFileError, atomic_write
from ..storage.hub_files import locate_adapter
from ..storage.repack import MAX_UNPACKED, pack_tensors, unpack_tensors

__all__ = [
    "BASE_NAME",
    "FILE_NAME",
    "MAX_BLOB",
    "MAX_CONFIG",
    "Adapter",
    "MemorySource",
    "StoredAdapter",
    "TaskInfo",
    "TaskRow",
    "check_name",
    "checked",
    "encoded",
    "read_adapter",
    "unknown_task",
]

FILE_NAME = "bank.sqlite"
"""The file in a bank's folder, and in its repository on the Hub."""
BASE_NAME = "__base__"
"""Names the base itself in a mixed batch, so no task can have it."""
MAX_NAME = 200
"""Characters of the longest name."""
MAX_CONFIG = 1 << 24
"""Bytes of the longest config."""
MAX_BLOB = 900_000_000
"""Bytes of the largest adapter; SQLite holds 1e9 in a row."""
MAX_FACTS = 10_000
"""Characters of the longest facts."""


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


class MemorySource(dict[str, StoredAdapter]):
    """Adapters in memory by name, as small as they are stored; see [`DiskStore`] for the methods."""

    def __missing__(self, name: str) -> StoredAdapter:
        raise unknown_task(name, len(self))

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self)

    def find(self, text: str = "", *, after: str = "", limit: int = 100) -> list[str]:
        """Return a page of the names that contain a text, sorted, from the next to `after` on."""
        part = text.lower()
        return sorted(name for name in self if name > after and part in name.lower())[:limit]

    def near(self, name: str, count: int) -> list[str]:
        """Return the names next to one in sorted order, `count` before it and as many from it on."""
        names = self.names()
        place = bisect_left(names, name)
        return names[max(0, place - count) : place + count]

    def refresh(self) -> bool:
        """Return False: what is in memory does not change elsewhere."""
        return False

    def version(self, name: str) -> object:
        """Return the adapter's identity."""
        return id(self[name])

    def read(self, name: str) -> StoredAdapter:
        """Return the adapter itself."""
        return self[name]

    def add(self, name: str, adapter: StoredAdapter, *, replace: bool = False) -> None:
        """Keep a reference."""
        check_name(name)
        if name in self and not replace:
            raise ValueError(f"The bank has a task {name!r} already: remove it, or pass replace=True.")
        self[name] = adapter

    def remove(self, name: str) -> None:
        """Drop the reference."""
        self.read(name)
        del self[name]

    def rename(self, old: str, new: str) -> None:
        """Keep it under another name."""
        self.add(new, self[old])
        del self[old]

    def close(self) -> None:
        """Drop all."""
        self.clear()


Adapter: TypeAlias = StoredAdapter | str | os.PathLike[str]
"""An adapter, its folder, or its Hub id."""


_Count = Annotated[int, Interval(ge=0, lt=1 << 50)]


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """What is known of a task without decoding it: its name and, as JSON, the facts of its row."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"strict": True, "extra": "forbid"}
    name: str = ""
    base: str | None  # name of the base model, as the adapter's config has it
    fingerprint: str | None  # of the base's masked weights
    codec: str  # of the adapter as it came in, and as it is exported; in the bank masks are always coded
    weights: _Count  # that are masked, those included that pad a layer's last byte (7 a layer at most)
    density: float  # fraction of them that is on
    sizes: AdapterSizes  # in the bank; `total` has the config and the header of the tensors too
    checksum: _Count  # CRC-32 of config and tensors
    added: str  # when it was put in, in ISO 8601, UTC

    @classmethod
    def parse(cls, name: str, text: object) -> TaskInfo:
        """Read facts; AdapterFileError if one is missing or of another kind."""
        if not isinstance(text, str) or len(text) > MAX_FACTS:
            raise AdapterFileError("its facts are no text, or too long")
        try:
            facts: TaskInfo = _reader().validate_json(text)
            return replace(facts, name=name)
        except ValueError as error:  # pydantic's
            raise AdapterFileError(f"its facts are wrong ({error.errors()[0]['msg']})") from error  # type: ignore

    def facts(self) -> str:
        """All but the name, as JSON."""
        return json.dumps({key: value for key, value in asdict(self).items() if key != "name"}, separators=(",", ":"))


@cache
def _reader() -> Any:
    from pydantic import TypeAdapter  # on use: `import smn_peft` is done without

    return TypeAdapter(TaskInfo)


@dataclass(frozen=True)
class TaskRow:
    """A task's row. What it says is checked before it is used, as the file may come from elsewhere."""

    facts: str  # of a `TaskInfo`
    config: bytes  # adapter_config.json
    blob: bytes  # a safetensors file of the tensors, masks coded

    def adapter(self) -> StoredAdapter:
        """Return config and tensors; AdapterFileError unless their checksum agrees."""
        if not isinstance(self.config, bytes) or not isinstance(self.blob, bytes):
            raise AdapterFileError("its config or its tensors are too large, or of another kind")
        found, expected = _checksum(self.config, self.blob), TaskInfo.parse("", self.facts).checksum
        if found != expected:
            raise AdapterFileError(f"its checksum is {found:08x}, the bank says {expected:08x}")
        return StoredAdapter(_parsed(self.config), parse_adapter_file(self.blob, "its blob"))

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapter's folder; see [`DiskStore.export`]."""
        adapter = self.adapter()
        path = Path(folder)
        begun = path / CONFIG_NAME  # written first: an export that did not come to its end is taken up again
        if (path / WEIGHTS_NAME).exists() or (begun.exists() and begun.read_bytes() != self.config):
            raise FileExistsError(f"{path} holds an adapter already: name another folder.")
        tensors = dict(adapter.tensors)
        if adapter.config.get("codec", "bits") == "bits":
            tensors = unpack_tensors(tensors, MAX_UNPACKED)
        if adapter.config.get("unmasked_fingerprint") is not None:  # as PEFT's `save_pretrained` writes it
            rest = [tensor for name, tensor in tensors.items() if purpose_of(name) != "mask"]
            tensors[f"{BASE_PREFIX}{SETTINGS_NAME}"] = settings_tensor(adapter.config, rest)
        path.mkdir(parents=True, exist_ok=True)
        with atomic_write(begun) as file:
            file.write(self.config)
        write_adapter_file(path / WEIGHTS_NAME, tensors)

    def check(self) -> None:
        """Decode the masks too, and compare the facts with what they are about; AdapterFileError if damaged."""
        facts, adapter = TaskInfo.parse("", self.facts), self.adapter()
        _check_masks(adapter.tensors)
        if facts != _info(adapter.config, adapter.tensors, self.config, self.blob, facts.added):
            raise AdapterFileError("its facts are not those of its config and tensors")


def checked(adapters: Iterable[tuple[str, Adapter]]) -> list[tuple[str, Adapter]]:
    """Check that names are allowed and differ, and the header and config of folders; return a list."""
    adapters, seen = list(adapters), set()
    for name, adapter in adapters:
        check_name(name)
        if name in seen:
            raise ValueError(f"Two adapters are to be the task {name!r}: give them different names.")
        seen.add(name)
        if not isinstance(adapter, StoredAdapter) and Path(adapter).is_dir():
            read_config(adapter)
            check_adapter_file(adapter)
    return adapters


def encoded(adapters: Iterable[tuple[str, Adapter]]) -> Iterator[tuple[str, TaskRow]]:
    """Read and code adapters, each when it is asked for; a folder's config to the letter."""
    for name, adapter in adapters:
        try:
            stored = adapter if isinstance(adapter, StoredAdapter) else read_adapter(adapter)
            if not isinstance(adapter, StoredAdapter) and Path(adapter).is_dir():
                config = (Path(adapter) / CONFIG_NAME).read_bytes()
            else:
                config = json.dumps(dict(stored.config), indent=2, sort_keys=True).encode()
            row = _encode(config, stored.tensors)
        except AdapterFileError as error:
            raise AdapterFileError(f"The adapter for the task {name!r} is damaged: {error}") from error
        except ValueError as error:
            raise ValueError(f"The adapter for the task {name!r} cannot be taken: {error}") from error
        yield name, row


def _encode(config: bytes, tensors: Mapping[str, Tensor]) -> TaskRow:
    """Make the row of an adapter, its masks coded; ValueError if there is none, or something is too large."""
    if len(config) > MAX_CONFIG:
        raise ValueError(f"its config has {len(config):,} bytes, and a bank takes up to {MAX_CONFIG:,}: shorten it.")
    parsed, coded = _parsed(config), _coded(tensors)
    blob = save({key: tensor.detach().cpu().contiguous().clone() for key, tensor in coded.items()}, {"format": "pt"})
    if len(blob) > MAX_BLOB:
        raise ValueError(f"it has {len(blob):,} bytes, and a bank takes up to {MAX_BLOB:,}: save it without scores.")
    parse_adapter_file(blob, "it")  # what could not be read again is not taken
    facts = _info(parsed, coded, config, blob, datetime.now(timezone.utc).isoformat(timespec="seconds")).facts()
    if len(facts) > MAX_FACTS:
        raise ValueError("its config has a name of the base, a fingerprint or a codec of thousands of characters.")
    return TaskRow(facts, config, blob)


def _parsed(config: bytes) -> dict[str, Any]:
    try:
        return check_config(json.loads(config))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AdapterFileError(f"its config is unreadable ({error})") from error


def _checksum(config: bytes, blob: bytes) -> int:
    return zlib.crc32(blob, zlib.crc32(config))


def _info(config: Mapping[str, Any], tensors: Mapping[str, Tensor], text: bytes, blob: bytes, added: str) -> TaskInfo:
    sizes = {"mask": 0, "head": 0, "statistics": 0, "scores": 0}
    weights = inactive = 0
    for key, tensor in tensors.items():
        sizes[purpose_of(key)] += tensor.nbytes
    if (coded := coded_masks(tensors)) is not None:
        weights, inactive = 8 * coded[1].size, sum(layer.inactive for layer in coded[1].entries)
    return TaskInfo(
        base=config.get("base_model_name_or_path"),
        fingerprint=config.get("base_fingerprint"),
        codec=config.get("codec", "bits"),
        weights=weights,
        density=(weights - inactive) / max(weights, 1),
        sizes=AdapterSizes(**sizes, total=len(text) + len(blob)),
        checksum=_checksum(text, blob),
        added=added,
    )


def _coded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the masks in one blob."""
    masks = {key: tensor for key, tensor in tensors.items() if purpose_of(key) == "mask"}
    if not masks:
        raise ValueError("it holds no mask: a bank takes adapters of MaskConfig.")
    _check_masks(tensors)
    if coded_masks(tensors) is not None:
        return dict(tensors)
    return {key: tensor for key, tensor in tensors.items() if key not in masks} | pack_tensors(masks)


def _check_masks(tensors: Mapping[str, Tensor]) -> None:
    """Decode the masks, unless they are the selected weights' alone: to decode those takes the base."""
    coded = coded_masks(tensors)
    if coded is None or not coded[1].needs_base:
        unpack_tensors(tensors, MAX_UNPACKED)
