# SPDX-License-Identifier: Apache-2.0
"""Errors that a caller may have a way out of: no labels, or no such split."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["WITHOUT_LABELS", "NoLabelsError", "NoSplitError"]

WITHOUT_LABELS = "labelled=False to use the images without labels"


class NoLabelsError(ValueError):
    """There are no labels, or none that tell anything apart; the images themselves may be fine."""


class NoSplitError(ValueError):
    """There is no such split.

    Attributes:
        there: Names of those that there are, as far as they are known.
    """

    def __init__(self, message: str, there: Iterable[str]) -> None:
        """Say which there are instead."""
        super().__init__(message)
        self.there = tuple(there)
