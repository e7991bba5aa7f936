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
    read_adapter_file,
)
from .atomic import atomic_write
from .fingerprint import fingerprint, tensor_digest
from .formats import FORMAT_VERSION, check_format_version, check_packed

__all__ = [
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "WEIGHTS_NAME",
    "AdapterFileError",
    "AdapterSizes",
    "adapter_sizes",
    "atomic_write",
    "check_adapter_file",
    "check_format_version",
    "check_packed",
    "fingerprint",
    "read_adapter_file",
    "tensor_digest",
]
