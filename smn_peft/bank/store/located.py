# SPDX-License-Identifier: Apache-2.0
"""From an index row to an adapter: where it lies, whether it is whole, its tensors in place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...storage import AdapterFileError, check_config
from ..source import StoredAdapter
from .record import DTYPES, checksum_of, read_table
from .shards import Shards, is_shard_name

__all__ = ["Located", "naming"]


@dataclass(frozen=True)
class Located:
    """A task's row: what it says is checked before it is used, as the index may come from elsewhere.

    Attributes:
        id: Number of the task; another adapter under the same name has another.
        name: Its name.
        shard: Number of the shard.
        file: The shard's name.
        file_size: The shard's bytes.
        start: Where the adapter starts in the file.
        size: Its bytes.
        checksum: See `checksum_of`.
        table: See `read_table`.
        config: adapter_config.json.
    """

    id: int
    name: str
    shard: int
    file: str
    file_size: int
    start: int
    size: int
    checksum: int
    table: bytes
    config: bytes

    QUERY = (
        "SELECT task.id, name, shard, file, shard.size, start, task.size, checksum, tensors, config "
        "FROM task JOIN shard ON shard.id = task.shard WHERE "
    )

    def check(self) -> None:
        """Check what the row says of itself.

        Raises:
            AdapterFileError: If a value is of another type, or the adapter would lie outside its shard.
        """
        numbers = (self.id, self.shard, self.file_size, self.start, self.size, self.checksum)
        valid = all(isinstance(number, int) and number >= 0 for number in numbers)
        valid = valid and isinstance(self.table, bytes) and isinstance(self.config, bytes)
        if not (valid and is_shard_name(self.file) and self.start + self.size <= self.file_size):
            raise AdapterFileError("its row in the index is wrong")

    def data(self, shards: Shards) -> Tensor:
        """The adapter's bytes, uint8 (size,), where they lie.

        Raises:
            AdapterFileError: If the shard is not what the index says.
            FileNotFoundError: If it is gone.
        """
        return shards.map(self.file, self.file_size)[self.start : self.start + self.size]

    def check_bytes(self, data: Tensor) -> None:
        """Compare config, table and data with the checksum.

        Raises:
            AdapterFileError: If it differs.
        """
        if (found := checksum_of(self.config, self.table, [data.numpy().data])) != self.checksum:
            raise AdapterFileError(f"its checksum is {found:08x}, the index says {self.checksum:08x}")

    def adapter(self, data: Tensor) -> StoredAdapter:
        """Config and tensors; the tensors share their memory with `data`.

        Raises:
            AdapterFileError: If config or table are damaged.
            ValueError: If the adapter's format is not known.
        """
        config = read_config_text(self.config)
        tensors: dict[str, Tensor] = {}
        for entry in read_table(self.table, self.size):
            dtype = DTYPES[entry.dtype]
            if (self.start + entry.start) % dtype.itemsize:
                raise AdapterFileError(f"{entry.key} does not start at a multiple of its dtype")
            tensors[entry.key] = data[entry.start : entry.end].view(dtype).view(entry.shape)
        return StoredAdapter(config, tensors)


def read_config_text(text: bytes) -> dict[str, Any]:
    """adapter_config.json as a dictionary.

    Raises:
        AdapterFileError: If it is no JSON object, or a field is not of its kind.
        ValueError: If its format is not known.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"its config is unreadable ({error})") from error
    return check_config(config)


@contextmanager
def naming(name: str, where: object) -> Iterator[None]:
    """Say which task of which shard an error is about, and what to do."""
    try:
        yield
    except AdapterFileError as error:
        raise AdapterFileError(
            f"Task {name!r} in {where} is damaged: {error}. Other tasks are not concerned; put its adapter in again "
            "(smn bank add --replace), or remove it."
        ) from error
