# SPDX-License-Identifier: Apache-2.0
"""The error of everything that reads coded masks."""

from __future__ import annotations

from ..adapter_file import AdapterFileError

__all__ = ["CodecError"]


class CodecError(AdapterFileError):
    """Coded masks that cannot be trusted: truncated, damaged, hostile or of an unknown kind."""
