# SPDX-License-Identifier: Apache-2.0
"""Figures 8 and 9 from their records: accuracy over the share of the weights that a mask may touch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..analysis import SelectiveRow, plot_selective, selective_series

__all__ = ["draw_shares"]


def draw_shares(record: Mapping[str, Any], path: Path, shares: Mapping[str, float]) -> Path:
    """Draw the rows "label: share %" of a record, and those whose share is given, each line ending in all weights.

    Args:
        record: Of Figure 8 or 9.
        path: File to write.
        shares: Share of the weights from 0 to 1 of the rows that do not say it, by row.
    """
    frozen, whole = None, []
    rows = []
    for cell in record["cells"]:
        values = [value for value in cell["values"] if value is not None]
        label, _, rest = cell["row"].partition(": ")
        share = shares.get(cell["row"], float(rest[:-2]) / 100 if rest.endswith(" %") else None)
        if cell["row"] == "frozen base" and values:
            frozen = values[0]
        elif cell["row"] == "all weights":
            whole = values
        elif share is not None:
            rows += [SelectiveRow(label, share, value) for value in values]
    rows += [SelectiveRow(label, 1.0, value) for label in dict.fromkeys(row.label for row in rows) for value in whole]
    plot_selective(selective_series(rows), path, frozen=frozen)
    return path
