# SPDX-License-Identifier: Apache-2.0
"""The table in docs/benchmarks.md, rendered from the saved baseline; run it to put it there.

Every ratio has a line, and what is in a unit has one if it has a target. Where more than four cases share figure and
target, they share a line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from recording import BASELINE, Row, load

from smn_peft.evaluation import markdown_table

__all__ = ["render", "render_page"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
MARKED = re.compile(r"(<!-- benchmarks:begin -->\n).*(<!-- benchmarks:end -->)", re.DOTALL)
MANY = 4


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}"


def _target(row: Row) -> str:
    if row.target is None:
        return ""
    unit = "" if row.unit == "ratio" else f" {row.unit}"
    return f"{'≥' if row.better == 'higher' else '≤'} {row.target:,g}{unit}"


def _line(rows: Sequence[Row]) -> dict[str, str]:
    """A line of the table, for one row or for many of the same figure and target."""
    first, unit = rows[0], "" if rows[0].unit == "ratio" else f" {rows[0].unit}"
    values = sorted(row.value for row in rows)
    spread = first.low is not None and not first.exact and len(rows) == 1
    missed = sum(row.misses for row in rows)
    target = _target(first)
    if missed:
        target += ", missed" if len(rows) == 1 else f", missed by {missed}"
    return {
        "benchmark": first.benchmark,
        "what": first.what,
        "case": first.name if len(rows) == 1 else f"{len(rows)} cases",
        "measured": " to ".join(_number(value) for value in dict.fromkeys((values[0], values[-1]))) + unit,
        "quartiles": f"{_number(first.low)} to {_number(first.high)}" if spread else "",
        "target": target,
    }


def _machines(rows: Sequence[Row]) -> str:
    """The sentences that say where it was measured, and on how many threads."""
    found, threads = [], {}
    for row in rows:
        facts, device = row.machine, row.machine["device"]
        vectors = f" with {facts['vectors']}" if "vectors" in facts else ""
        where = f"{facts['cpu']}{vectors}, {facts['cores']} cores" + ("" if device == "cpu" else f", {device}")
        found.append(f"{where}, torch {facts['torch']}")
        threads.setdefault(facts["threads"], {})[row.benchmark] = None
    used = "; ".join(f"{count} for {', '.join(names)}" for count, names in sorted(threads.items()))
    return f"Measured on {'; '.join(dict.fromkeys(found))}. Threads: {used}."


def render(rows: Sequence[Row]) -> str:
    """Markdown of a file's rows: the machine and the table."""
    figures: dict[tuple[str, ...], dict[float | None, list[Row]]] = {}
    for row in rows:
        if row.unit == "ratio" or row.target is not None:
            figure = figures.setdefault((row.benchmark, row.what, row.machine["device"]), {})
            figure.setdefault(row.target, []).append(row)
    groups = [group for figure in figures.values() for group in figure.values()]
    lines = [_line(part) for group in groups for part in ([group] if len(group) > MANY else zip(group))]
    return f"{_machines(rows)}\n\n{markdown_table(lines)}"


def render_page(baseline: Path = BASELINE, page: Path = PAGE) -> None:
    """Replace what stands between the page's markers.

    Raises:
        ValueError: If the markers are not there once.
    """
    block = render(load(baseline))
    text, count = MARKED.subn(lambda match: f"{match[1]}{block}\n{match[2]}", page.read_text("utf-8"))
    if count != 1:
        raise ValueError(f"{page} must have <!-- benchmarks:begin --> … <!-- benchmarks:end --> once.")
    page.write_text(text, "utf-8")


if __name__ == "__main__":
    render_page()
