# SPDX-License-Identifier: Apache-2.0
"""All tables, figures and scales by name, and what each takes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from ..evaluation import markdown_table
from . import (
    ablations,
    figure3,
    figure5,
    figure6,
    figure7,
    figure8,
    figure9,
    figure10,
    figure11,
    recipes,
    table1,
    table2,
    table3,
    table5,
    table6,
    table7,
    table8,
    table9,
    table10,
)
from .artefact import Artefact
from .paper_scale import PAPER
from .reproduce import needed_runs
from .scale import Scale
from .small_scale import SMALL

__all__ = ["ARTEFACTS", "SCALES", "artefact_named", "listing", "scale_named"]

_TABLES = (table1, table2, table3, table5, table6, table7, table8, table9, table10)
_FIGURES = (figure3, figure5, figure6, figure7, figure8, figure9, figure10, figure11)
ARTEFACTS: dict[str, Artefact] = {
    module.ARTEFACT.name: module.ARTEFACT for module in (*_TABLES, *_FIGURES, ablations, recipes)
}
SCALES: dict[str, Scale] = {scale.name: scale for scale in (SMALL, PAPER)}


def artefact_named(name: str) -> Artefact:
    """A table or figure.

    Raises:
        ValueError: Unknown name, with those that are close.
    """
    _check("table or figure", name, ARTEFACTS)
    return ARTEFACTS[name]


def scale_named(name: str) -> Scale:
    """A scale.

    Raises:
        ValueError: Unknown name.
    """
    _check("scale", name, SCALES)
    return SCALES[name]


def _check(what: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"There is no {what} {name!r}; there are {', '.join(known)}.{hint}")


def listing(scales: Sequence[Scale]) -> str:
    """A Markdown table: every table and figure with its number of runs per seed and their rough duration."""
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
