# SPDX-License-Identifier: Apache-2.0
"""Adapters as bytes: checked when they are read, written whole or not at all, tied to a base by its fingerprint."""

from __future__ import annotations

from .adapter_config import (
    CONFIG_NAME,
    FORMAT_VERSION,
    SETTINGS_NAME,
    check_config,
    check_format_version,
    is_settings,
    read_config,
    read_settings,
    settings_tensor,
)
from .adapter_file import (
    BASE_PREFIX,
    SAVE_DTYPES,
    WEIGHTS_NAME,
    AdapterSizes,
    adapter_sizes,
    check_adapter_file,
    check_packed,
    coded_masks,
    parse_adapter_file,
    purpose_of,
    read_adapter_file,
    rounded,
    write_adapter_file,
)
from .codec import CODECS
from .files import (
    AdapterFileError,
    atomic_write,
    check_regular,
    read_bytes,
    read_json,
    to_disk,
)
from .fingerprint import fingerprint, tensor_digest
from .hub_files import PICKLE_NAME, check_folder_weights, check_hub_weights, locate_adapter
from .inspection import inspect_adapter, verify_adapter_file
from .repack import (
    MAX_UNPACKED,
    pack_adapter,
    pack_tensors,
    size_change,
    unpack_adapter,
    unpack_tensors,
)

__all__ = [
    "BASE_PREFIX",
    "CODECS",
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "MAX_UNPACKED",
    "PICKLE_NAME",
    "SAVE_DTYPES",
    "SETTINGS_NAME",
    "WEIGHTS_NAME",
    "AdapterFileError",
    "AdapterSizes",
    "adapter_sizes",
    "atomic_write",
    "check_adapter_file",
    "check_config",
    "check_folder_weights",
    "check_format_version",
    "check_hub_weights",
    "check_packed",
    "check_regular",
    "coded_masks",
    "fingerprint",
    "inspect_adapter",
    "is_settings",
    "locate_adapter",
    "pack_adapter",
    "pack_tensors",
    "parse_adapter_file",
    "purpose_of",
    "read_adapter_file",
    "read_bytes",
    "read_config",
    "read_json",
    "read_settings",
    "rounded",
    "settings_tensor",
    "size_change",
    "tensor_digest",
    "to_disk",
    "unpack_adapter",
    "unpack_tensors",
    "verify_adapter_file",
    "write_adapter_file",
]
