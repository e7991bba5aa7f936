# SPDX-License-Identifier: Apache-2.0
"""`EvalReport`: one measured number with all that it takes to read it; and Markdown tables of such numbers."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from typing import Any

import torch

from .._options import from_mapping, read_values

__all__ = ["EvalReport", "format_fraction", "library_versions", "markdown_table", "merge_reports", "report_table"]

_FORMAT = 1


def format_fraction(value: float, spread: float | None = None) -> str:
    """A fraction in percent, with its spread where there is one: ``92.1 ± 0.5``."""
    return f"{100 * value:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table that reads in a terminal too; its columns are the keys of the first of the rows."""
    if not rows:
        raise ValueError("A table needs at least one row.")
    columns = []
    for i, key in enumerate(rows[0]):
        cells = [cell.replace("|", "\\|") for cell in (key, *(row[key] for row in rows))]
        width = max(3, *map(len, cells))
        head, *rest = (cell.rjust(width) if i else cell.ljust(width) for cell in cells)
        columns.append([head, "-" * (width - 1) + ":" if i else "-" * width, *rest])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on, as far as these are installed."""
    # torch itself names its build too, such as +cu130.
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("smn_peft", "peft", "timm", "transformers", "scikit-learn"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@dataclass(frozen=True)
class EvalReport:
    """A metric of one method on one part of a dataset, over its seeds."""

    label: str  # what was evaluated: the row of a table
    dataset: str  # name or Hub id
    split: str  # part of the dataset that was tested on
    metric: str  # what `values` are, such as "knn_accuracy"
    values: tuple[float, ...]  # fractions from 0 to 1, one per seed
    seeds: tuple[int, ...] = ()  # empty where nothing is drawn, and then there is one value
    revision: str | None = None  # Git revision of the dataset, if it has one
    settings: Mapping[str, Any] = field(default_factory=dict)  # all that was chosen, in JSON's types
    versions: Mapping[str, str] = field(default_factory=library_versions)  # of the libraries

    def __post_init__(self) -> None:
        """Check every field."""
        for name, value in read_values(type(self), vars(self), "Evaluation report", build=True).items():
            object.__setattr__(self, name, value)
        for name in ("label", "dataset", "split", "metric"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty: a table has to name what it shows.")
        for value in self.values:
            if not 0 <= value <= 1:
                raise ValueError(f"values must be fractions from 0 to 1, got {value!r}: 92 % is 0.92, NaN no result.")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be integers, each once; got {list(self.seeds)}.")
        if len(self.values) != (len(self.seeds) or 1):
            counts = f"{len(self.values)} entries for {len(self.seeds)} seeds"
            raise ValueError(f"values has {counts}: give one per seed, or one value and no seeds if nothing is drawn.")
        try:  # as it comes back from a file, so that a report equals the one that was saved
            object.__setattr__(self, "settings", json.loads(json.dumps(self.settings, allow_nan=False)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings must hold what JSON can: texts, finite numbers, lists; {error}.") from error

    @classmethod
    def of(cls, dataset: Any, **kwargs: Any) -> EvalReport:
        """A report that takes dataset, split and revision from the attributes of a dataset."""
        revision = getattr(dataset, "revision", None)
        return cls(dataset=dataset.name, split=dataset.split, revision=revision, **kwargs)

    @property
    def value(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (with n - 1); None with one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        seeds = f" over {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
        shown = format_fraction(self.value, self.spread)
        return f"{self.label}: {self.metric} on {self.dataset} ({self.split}) {shown} %{seeds}"

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON's types, with `value` and `spread` for other readers."""
        return {"format": _FORMAT, **asdict(self), "value": self.value, "spread": self.spread}

    def to_json(self) -> str:
        """The report as JSON, for [`from_json`]."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> EvalReport:
        """Read what [`to_json`] wrote; a ValueError if it is no report, or was edited and contradicts itself."""
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"This is no JSON, so no evaluation report: {error}.") from error
        if not isinstance(found, dict) or found.pop("format", None) != _FORMAT:
            raise ValueError(f"This is no evaluation report of format {_FORMAT}; smn_peft's newest version reads all.")
        derived = {name: found.pop(name) for name in ("value", "spread") if name in found}
        if missing := {"value", "spread", *(item.name for item in fields(cls))} - {*derived, *found}:
            raise ValueError(f"The evaluation report lacks {', '.join(sorted(missing))}: write it anew by to_json.")
        report = from_mapping(cls, found, "The evaluation report")
        for name, stated in derived.items():
            expected = getattr(report, name)
            known = isinstance(stated, float) and expected is not None
            if not (math.isclose(stated, expected, abs_tol=1e-9) if known else stated is expected is None):
                raise ValueError(f"The report says {name} {stated}, but its values give {expected}: it was edited.")
        return report


def merge_reports(reports: Sequence[EvalReport]) -> EvalReport:
    """One report over the seeds of several, in their order; other differences are refused, and named."""
    if not reports:
        raise ValueError("There are no reports to merge.")
    first = reports[0]
    names = [item.name for item in fields(first) if item.name not in ("values", "seeds")]
    for other in reports[1:]:
        pairs = {name: (getattr(first, name), getattr(other, name)) for name in names}
        if differing := "; ".join(f"{name} {a!r} and {b!r}" for name, (a, b) in pairs.items() if a != b):
            raise ValueError(f"Only reports of the same runs with other seeds merge; these differ: {differing}.")
    if len(reports) == 1:
        return first
    if not all(report.seeds for report in reports):
        raise ValueError("A report without seeds does not merge: its number does not vary.")
    found = [pair for report in reports for pair in zip(report.seeds, report.values, strict=True)]
    seeds, values = zip(*sorted(found), strict=True)
    if len({*seeds}) != len(seeds):
        raise ValueError(f"A seed occurs twice among {[*seeds]}: leave one report out.")
    return replace(first, seeds=seeds, values=values)


def report_table(reports: Sequence[EvalReport]) -> str:
    """A Markdown table in percent: a row per label, a column per dataset, split and metric as far as these differ."""
    if not reports:
        raise ValueError("There are no reports to show.")
    parts = ("dataset", "split", "metric")
    shown = [p for p in parts if p == "dataset" or len({getattr(report, p) for report in reports}) > 1]
    cells: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for report in reports:
        column = " ".join(getattr(report, part) for part in shown) + " %"
        row = cells.setdefault(report.label, {})
        if column in row:
            raise ValueError(f"Two reports of {report.label!r} on {column[:-2]}: merge_reports, or label them apart.")
        row[column] = format_fraction(report.value, report.spread)
        columns[column] = None
    return markdown_table(
        [{"method": label, **{column: row.get(column, "–") for column in columns}} for label, row in cells.items()]
    )
