# SPDX-License-Identifier: Apache-2.0
"""Records: what was measured, as JSON that says how, and the Markdown that is rendered from it and nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation import library_versions, markdown_table
from .artefact import Artefact
from .metrics import format_value, is_frozen, measure
from .scale import Scale
from .store import RunStore

__all__ = ["make_record", "render"]

_FORMAT = 1
_UNITS = {"bytes": "kB", "cascade_bytes": "kB", "loss": "nats"}


def make_record(artefact: Artefact, scale: Scale, store: RunStore, seeds: Sequence[int]) -> dict[str, Any]:
    """What finished runs give for an artefact, JSON-compatible.

    Args:
        artefact: The table or figure.
        scale: At which its runs were made.
        store: Where they are.
        seeds: Those of the runs.
    """
    cells, failures = [], {}
    for cell in artefact.cells(scale):
        specs = [cell.run.seeded(seed) for seed in (seeds[:1] if is_frozen(cell.metric) else seeds)]
        failures.update({spec.id: reason for spec in specs if (reason := store.failure(spec)) is not None})
        cells.append(
            {
                "section": cell.section,
                "row": cell.row,
                "column": cell.column,
                "metric": cell.metric,
                "values": [measure(store, spec, cell.metric) for spec in specs],
                "runs": [spec.id for spec in specs],
            }
        )
    return {
        "format": _FORMAT,
        "name": artefact.name,
        "title": artefact.title,
        "note": artefact.note,
        "scale": scale.name,
        "seeds": list(seeds),
        "each_seed": artefact.each_seed,
        "cells": cells,
        "failures": failures,
        "paper": artefact.paper,
        "details": None if artefact.details is None else artefact.details(store, scale, seeds),
        "versions": library_versions(),
    }


def render(record: Mapping[str, Any]) -> str:
    """A record as Markdown: what was measured, then the paper's numbers."""
    seeds = len(record["seeds"])
    over = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    parts = [f"## {record['title']}", f"Scale `{record['scale']}`, {over}; accuracies and densities in percent."]
    if record["note"]:
        parts.append(record["note"])
    sections = list(dict.fromkeys(cell["section"] for cell in record["cells"]))
    for section in sections:
        mine = [cell for cell in record["cells"] if cell["section"] == section]
        parts += [f"### {section}"] if section else []
        parts.append(_each_seed(mine) if record["each_seed"] else _table(mine))
    if isinstance(record["details"], Mapping) and "markdown" in record["details"]:
        parts.append(record["details"]["markdown"])
    for identity, reason in record["failures"].items():
        parts.append(f"Run {identity} failed: {' '.join(reason.split())}")
    if record["paper"]:
        parts.append("### The paper's numbers")
        for section, rows in record["paper"].items():
            parts += [f"{section}:"] if section else []
            parts.append(_paper(rows))
    return "\n\n".join(parts) + "\n"


def _mean(metric: str, values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f"{len(values) - len(known)} of {len(values)} failed"
    return format_value(metric, statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def _table(cells: Sequence[Mapping[str, Any]]) -> str:
    columns = {}
    for cell in cells:
        unit = _UNITS.get(cell["metric"].partition("@")[0])
        columns[cell["column"]] = f"{cell['column']} ({unit})" if unit else cell["column"]
    rows: dict[str, dict[str, str]] = {}
    for cell in cells:
        row = rows.setdefault(cell["row"], {"": cell["row"], **dict.fromkeys(columns.values(), "–")})
        row[columns[cell["column"]]] = _mean(cell["metric"], cell["values"])
    return markdown_table(list(rows.values()))


def _each_seed(cells: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for cell in cells:
        values, metric = cell["values"], cell["metric"]
        known = [value for value in values if value is not None]
        row = {"": f"{cell['row']}, {cell['column']}"}
        row |= {f"R{i + 1}": "failed" if v is None else format_value(metric, v) for i, v in enumerate(values)}
        row["mean"] = format_value(metric, statistics.fmean(known)) if known else "–"
        row["std"] = format_value(metric, statistics.stdev(known)) if len(known) > 1 else "–"
        rows.append(row)
    return markdown_table(rows)


def _paper(rows: Mapping[str, Mapping[str, float]]) -> str:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    return markdown_table(
        [
            {"": name, **{column: f"{100 * row[column]:.1f}" if column in row else "–" for column in columns}}
            for name, row in rows.items()
        ]
    )
