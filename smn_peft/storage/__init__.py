# SPDX-License-Identifier: Apache-2.0
"""Adapters as bytes: what is read is checked, what is written is whole, and a base model has a fingerprint."""

from __future__ import annotations

from .adapter_file import (
    CONFIG_NAME,
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
from .rounding import SAVE_DTYPES, rounded

__all__ = [
    "CODECS",
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "SAVE_DTYPES",
    "WEIGHTS_NAME",
    "AdapterFileError",
    "AdapterSizes",
    "adapter_sizes",
    "atomic_write",
    "check_adapter_file",
    "check_format_version",
    "check_packed",
    "fingerprint",
    "finish_adapter_file",
    "purpose_of",
    "read_adapter_file",
    "read_metadata",
    "rounded",
    "tensor_digest",
]
