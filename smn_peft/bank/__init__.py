# SPDX-License-Identifier: Apache-2.0
"""Thousands of masks over one base: switched in place, served in mixed batches, kept in one store."""

from __future__ import annotations

from .bank import BASE, MaskBank
from .source import MemorySource, StoredAdapter
from .task import BankStats

__all__ = ["BASE", "BankStats", "MaskBank", "MemorySource", "StoredAdapter"]
