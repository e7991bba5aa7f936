# SPDX-License-Identifier: Apache-2.0
"""A bank's tasks on disk: safetensors shards that never change, and an index that changes all at once."""

from __future__ import annotations

from .compaction import Compaction
from .disk_store import DiskStore
from .index import StoreBusyError
from .info import StoreInfo, TaskInfo
from .names import BASE_NAME, check_name
from .verification import TaskCheck

__all__ = [
    "BASE_NAME",
    "Compaction",
    "DiskStore",
    "StoreBusyError",
    "StoreInfo",
    "TaskCheck",
    "TaskInfo",
    "check_name",
]
