# SPDX-License-Identifier: Apache-2.0
"""Adapter files: safetensors of packed or coded masks beside a JSON configuration, and what can be done with them."""

from __future__ import annotations

from .adapter_config import read_config
from .adapter_file import AdapterSizes, adapter_sizes, read_adapter_file, write_adapter_file
from .files import AdapterFileError
from .hub_files import locate_adapter
from .inspection import inspect_adapter, verify_adapter_file
from .repack import MAX_UNPACKED, pack_adapter, size_change, unpack_adapter

__all__ = [
    "MAX_UNPACKED",
    "AdapterFileError",
    "AdapterSizes",
    "adapter_sizes",
    "inspect_adapter",
    "locate_adapter",
    "pack_adapter",
    "read_adapter_file",
    "read_config",
    "size_change",
    "unpack_adapter",
    "verify_adapter_file",
    "write_adapter_file",
]
