# SPDX-License-Identifier: Apache-2.0
"""`NoLabelsError`: images that were to come with labels, and have none."""

from __future__ import annotations

__all__ = ["WITHOUT_LABELS", "NoLabelsError"]

WITHOUT_LABELS = "labelled=False to use the images without labels"


class NoLabelsError(ValueError):
    """There are no labels, or none that tell anything apart; the images themselves may be fine."""
