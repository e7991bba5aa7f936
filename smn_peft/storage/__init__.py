# SPDX-License-Identifier: Apache-2.0
"""Adapters as bytes: what is read is checked, what is written is whole, and a base model has a fingerprint."""

from __future__ import annotations

from .adapter_config import check_config
from .adapter_file import (
    CONFIG_NAME,
    SETTINGS_NAME,
    WEIGHTS_NAME,
    AdapterFileError,
    AdapterSizes,
    adapter_sizes,
    check_adapter_file,
    purpose_of,
    read_adapter_file,
    read_metadata,
)
from .atomic import atomic_write
from .codec import CODECS
from .fingerprint import fingerprint, tensor_digest
from .finish import finish_adapter_file
from .formats import FORMAT_VERSION, check_format_version, check_packed
from .inspection import AdapterReport, LayerReport, inspect_adapter
from .locate import PICKLE_NAME, check_folder_weights, check_hub_weights, locate_adapter
from .repack import MAX_UNPACKED, pack_adapter, read_config, size_change, unpack_adapter
from .rounding import SAVE_DTYPES, rounded
from .settings import is_settings, read_settings, settings_tensor
from .verification import verify_adapter_file

__all__ = [
    "CODECS",
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "MAX_UNPACKED",
    "PICKLE_NAME",
    "SAVE_DTYPES",
    "SETTINGS_NAME",
    "WEIGHTS_NAME",
    "AdapterFileError",
    "AdapterReport",
    "AdapterSizes",
    "LayerReport",
    "adapter_sizes",
    "atomic_write",
    "check_adapter_file",
    "check_config",
    "check_folder_weights",
    "check_format_version",
    "check_hub_weights",
    "check_packed",
    "fingerprint",
    "finish_adapter_file",
    "inspect_adapter",
    "is_settings",
    "locate_adapter",
    "pack_adapter",
    "purpose_of",
    "read_adapter_file",
    "read_config",
    "read_metadata",
    "read_settings",
    "rounded",
    "settings_tensor",
    "size_change",
    "tensor_digest",
    "unpack_adapter",
    "verify_adapter_file",
]
