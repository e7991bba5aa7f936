# SPDX-License-Identifier: Apache-2.0
"""`EvalReport`: one measured number with all that it takes to read it; cards and tables are rendered from it."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..storage import atomic_write
from .markdown import format_fraction, markdown_table

__all__ = ["EvalReport", "library_versions", "merge_reports", "report_table"]

_LIBRARIES = ("smn_peft", "peft", "timm", "transformers", "scikit-learn")
_FORMAT = 1
_DERIVED = ("value", "spread")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on, as far as these are installed."""
    # torch itself names its build too, such as +cu130.
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class EvalReport:
    """A metric of one method on one part of a dataset, over its seeds.

    Attributes:
        label: What was evaluated: the row of a table.
        dataset: Name or Hub id.
        split: Part of the dataset that was tested on.
        metric: What `values` are, such as "knn_accuracy".
        values: Fractions from 0 to 1, one per seed.
        seeds: The seed of each value; empty where nothing is drawn, and then there is one value.
        revision: Git revision of the dataset; None if it has none.
        settings: All that was chosen, such as k and temperature; JSON's types.
        versions: Versions of the libraries.

    Raises:
        ValueError: On anything that does not fit together; the message names the field.
    """

    label: str
    dataset: str
    split: str
    metric: str
    values: tuple[float, ...]
    seeds: tuple[int, ...] = ()
    revision: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=library_versions)

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("label", "dataset", "split", "metric"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text:
                raise ValueError(f"{name} must be a text, got {text!r}: a table has to name what it shows.")
        if self.revision is not None and not isinstance(self.revision, str):
            raise ValueError(f"revision must be a text or None, got {self.revision!r}.")
        _set(self, "values", tuple(_fraction(value) for value in _items("values", self.values)))
        _set(self, "seeds", tuple(_items("seeds", self.seeds)))
        if not all(type(seed) is int for seed in self.seeds) or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be integers, each once; got {list(self.seeds)}.")
        if len(self.values) != (len(self.seeds) or 1):
            raise ValueError(
                f"values has {len(self.values)} entries for {len(self.seeds)} seeds: give one per seed, or one value "
                "and no seeds where nothing is drawn."
            )
        for name in ("settings", "versions"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} must be a mapping, got {getattr(self, name)!r}.")
            _set(self, name, _as_json(name, getattr(self, name)))
        if not all(isinstance(version, str) for version in self.versions.values()):
            raise ValueError(f"versions must map names to texts, got {dict(self.versions)}.")

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

    def to_json(self) -> str:
        """The report as JSON, with `value` and `spread` for other readers."""
        derived = {name: getattr(self, name) for name in _DERIVED}
        return json.dumps({"format": _FORMAT, **asdict(self), **derived}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> EvalReport:
        """Read what [`to_json`] wrote.

        Raises:
            ValueError: The text is not such a report, or was changed by hand so that it contradicts itself.
        """
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"This is no JSON, so no evaluation report: {error}.") from error
        if not isinstance(found, dict) or found.pop("format", None) != _FORMAT:
            raise ValueError(f"This is no evaluation report of format {_FORMAT}; smn_peft's newest version reads all.")
        known = {item.name for item in fields(cls)}
        wrong = {"lacks": known.union(_DERIVED) - set(found), "has the unknown": set(found) - known.union(_DERIVED)}
        for what, names in wrong.items():
            if names:
                raise ValueError(
                    f"The evaluation report {what} {', '.join(sorted(names))}: write it anew by to_json()."
                )
        derived = {name: found.pop(name) for name in _DERIVED}
        report = cls(**found)
        for name, stated in derived.items():
            expected = getattr(report, name)
            same = stated is expected is None or (
                _is_number(stated) and expected is not None and math.isclose(stated, expected, abs_tol=1e-9)
            )
            if not same:
                raise ValueError(f"The report says {name} {stated}, but its values give {expected}: it was edited.")
        return report

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as a JSON file, whole or not at all."""
        with atomic_write(path) as file:
            file.write(self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvalReport:
        """Read a file that [`save`] wrote; an error names it."""
        try:
            return cls.from_json(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def merge_reports(reports: Sequence[EvalReport]) -> EvalReport:
    """One report over the seeds of several, in the order of the seeds.

    Raises:
        ValueError: The reports differ in more than their seeds (the differences are named), or share a seed.
    """
    if not reports:
        raise ValueError("There are no reports to merge.")
    first = reports[0]
    for other in reports[1:]:
        names = [item.name for item in fields(first) if item.name not in ("values", "seeds")]
        pairs = {name: (getattr(first, name), getattr(other, name)) for name in names}
        different = [f"{name} {a!r} and {b!r}" for name, (a, b) in pairs.items() if a != b]
        if different:
            raise ValueError(
                f"Only reports of the same runs with other seeds merge; these differ: {'; '.join(different)}."
            )
    found = [pair for report in reports for pair in zip(report.seeds, report.values, strict=False)]
    if len(reports) > 1 and not all(report.seeds for report in reports):
        raise ValueError("A report without seeds does not merge: its number does not vary.")
    if len({seed for seed, _ in found}) != len(found):
        raise ValueError(f"A seed occurs twice among {sorted(seed for seed, _ in found)}: leave one report out.")
    if not found:
        return first
    seeds, values = zip(*sorted(found), strict=True)
    return replace(first, seeds=seeds, values=values)


def report_table(reports: Sequence[EvalReport]) -> str:
    """A Markdown table in percent: a row per label, a column per dataset, split and metric as far as these differ.

    Raises:
        ValueError: There are no reports, or two for one cell.
    """
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


def _set(report: EvalReport, name: str, value: Any) -> None:
    object.__setattr__(report, name, value)


def _items(name: str, value: Any) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{name} must be a sequence of numbers, got {value!r}.")
    return list(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _fraction(value: Any) -> float:
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"values must be fractions from 0 to 1, got {value!r}: 92 % is 0.92, and a NaN no result.")
    return float(value)


def _as_json(name: str, value: Any) -> Any:
    """As it comes back from a file, so that a report equals the one that was saved."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must hold what JSON can: texts, finite numbers, booleans, lists; {error}."
        ) from error
