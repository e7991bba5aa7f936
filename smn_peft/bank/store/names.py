# SPDX-License-Identifier: Apache-2.0
"""What a stored task may be called: the same as any task of a bank."""

from __future__ import annotations

from ..names import BASE_NAME, MAX_NAME, check_name

__all__ = ["BASE_NAME", "MAX_NAME", "check_name"]
