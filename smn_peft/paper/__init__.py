# SPDX-License-Identifier: Apache-2.0
"""Every table and figure of the paper as data: the runs it needs, how they become it, the paper's numbers."""

from __future__ import annotations

from collections.abc import Sequence

from .._options import did_you_mean
from ..evaluation import markdown_table
from . import figures  # noqa: F401 - registers the figures, and the tables that it imports
from .artefact import ARTEFACTS, Artefact, Reproduction, needed_runs, render, reproduce
from .compare import compare
from .scales import SCALES, Scale, scale_named

__all__ = [
    "ARTEFACTS",
    "SCALES",
    "Reproduction",
    "artefact_named",
    "compare",
    "listing",
    "render",
    "reproduce",
    "scale_named",
]


def artefact_named(name: str) -> Artefact:
    """Look up a table or figure; ValueError if there is none of this name."""
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
