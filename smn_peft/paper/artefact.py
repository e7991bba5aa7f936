# SPDX-License-Identifier: Apache-2.0
"""`Artefact`: a table or figure of the paper as data: its runs, what is read from each, the paper's numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .run_spec import RunSpec
from .scale import Scale
from .store import RunStore

__all__ = ["Artefact", "Cell", "Numbers"]

#: Numbers of the paper: fractions (or what the section says) by section, row and column.
Numbers = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class Cell:
    """One number of a table: a metric of a run, over the seeds.

    Attributes:
        section: Table that it stands in, where an artefact has several.
        row: Row.
        column: Column.
        run: The run, without its seed.
        metric: See `smn_peft.paper.metrics`.
    """

    section: str
    row: str
    column: str
    run: RunSpec
    metric: str


@dataclass(frozen=True)
class Artefact:
    """A table or figure.

    Attributes:
        name: "table2", "figure8".
        title: What it shows.
        cells: Its numbers at a scale; every run that it needs is the run of a cell.
        paper: The paper's numbers, where it prints some.
        note: What to know when reading it: how it differs from the paper's.
        details: What else is shown, from finished runs: (store, scale, seeds) -> what JSON can hold; its
            "markdown", if it has any, stands below the table.
        draw: Makes pictures: (record, folder, stem of the files' names) -> their paths.
        seeds: Seeds that it takes if none are asked for.
        each_seed: Show every seed's value beside their mean.
    """

    name: str
    title: str
    cells: Callable[[Scale], Sequence[Cell]]
    paper: Numbers = field(default_factory=dict)
    note: str = ""
    details: Callable[[RunStore, Scale, Sequence[int]], Any] | None = None
    draw: Callable[[Mapping[str, Any], Path, str], list[Path]] | None = None
    seeds: int = 3
    each_seed: bool = False
