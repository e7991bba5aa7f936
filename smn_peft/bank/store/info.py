# SPDX-License-Identifier: Apache-2.0
"""What a store says of a task and of itself, without reading a shard."""

from __future__ import annotations

from dataclasses import dataclass

from ...storage import AdapterSizes

__all__ = ["StoreInfo", "TaskInfo"]


@dataclass(frozen=True)
class TaskInfo:
    """A task in a store.

    Attributes:
        name: Its name.
        base: Name of the base model as the adapter's config says it, if it does.
        fingerprint: Fingerprint of the base's masked weights, if the config has one.
        codec: Of the adapter as it came in, and as it is exported; in the store masks are always coded.
        weights: Masked weights, those included that pad a layer's last byte (7 a layer at most).
        density: Fraction of them that is on.
        sizes: Bytes in the store, by purpose; `total` has the config and the table of tensors too.
        added: When it was put in, in ISO 8601, UTC.
    """

    name: str
    base: str | None
    fingerprint: str | None
    codec: str
    weights: int
    density: float
    sizes: AdapterSizes
    added: str


@dataclass(frozen=True)
class StoreInfo:
    """A store as a whole.

    Attributes:
        tasks: Number of tasks.
        shards: Number of shard files.
        bytes: Bytes on disk, index and shards.
        dead: Bytes of tasks that were removed or replaced; compaction frees them.
        version: Version of the store's layout.
    """

    tasks: int
    shards: int
    bytes: int
    dead: int
    version: int
