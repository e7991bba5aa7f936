# SPDX-License-Identifier: Apache-2.0
"""Markdown tables that read in a terminal too, and fractions as these show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["format_fraction", "markdown_table"]


def format_fraction(value: float, spread: float | None = None) -> str:
    """A fraction in percent, with its spread where there is one: ``92.1 ± 0.5``."""
    return f"{100 * value:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table, its columns the keys of the first row: the first is set left, the others right.

    Args:
        rows: One mapping per row, column -> cell; all with the keys of the first.

    Raises:
        ValueError: If there is no row.
    """
    if not rows:
        raise ValueError("A table needs at least one row.")
    lines = [list(rows[0]), *([row[key] for key in rows[0]] for row in rows)]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(lines[0]))]
    cells = [
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (cells[0], rule, *cells[1:]))
