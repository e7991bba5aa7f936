# SPDX-License-Identifier: Apache-2.0
"""Every table and figure of the paper as data: the runs it needs, how they become it, the paper's numbers."""

from __future__ import annotations

from collections.abc import Sequence

from .._options import did_you_mean
from ..evaluation import markdown_table
from .artefact import Artefact, Cell, Reproduction, needed_runs, render, reproduce
from .figures import FIGURES, RECIPES
from .runs import RunSpec, RunStore
from .scales import SCALES, Scale, Setting, scale_named
from .tables import ABLATIONS, TABLES

__all__ = [
    "ARTEFACTS",
    "SCALES",
    "Artefact",
    "Cell",
    "Reproduction",
    "RunSpec",
    "RunStore",
    "Scale",
    "Setting",
    "artefact_named",
    "listing",
    "needed_runs",
    "render",
    "reproduce",
    "scale_named",
]

ARTEFACTS: dict[str, Artefact] = {one.name: one for one in (*TABLES, *FIGURES, ABLATIONS, RECIPES)}


def artefact_named(name: str) -> Artefact:
    """Look up a table or figure.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in ARTEFACTS:
        known, hint = ", ".join(ARTEFACTS), did_you_mean(name, ARTEFACTS)
        raise ValueError(f"There is no table or figure {name!r}; there are {known}.{hint}")
    return ARTEFACTS[name]


def listing(scales: Sequence[Scale]) -> str:
    """A Markdown table of every table and figure, with its number of runs per seed and their rough duration."""
    rows = []
    for artefact in ARTEFACTS.values():
        row = {"name": artefact.name, "what": artefact.title, "seeds": str(artefact.seeds)}
        for scale in scales:
            runs = needed_runs(artefact, scale, [0])
            minutes = sum(run.minutes for run in runs)
            duration = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
            row[f"runs per seed, {scale.name}"] = f"{len(runs)}, {duration}"
        rows.append(row)
    return markdown_table(rows)
