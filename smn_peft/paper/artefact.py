# SPDX-License-Identifier: Apache-2.0
"""`Artefact`: a table or figure as data. `reproduce` makes its runs, its record (JSON), its Markdown and pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..evaluation import library_versions, markdown_table
from ..storage.files import atomic_write
from ..training.assemble import share
from .runs import RunSpec, RunStore, missing_files
from .scales import Scale, read_yaml

#: What `make_record` returns, or the JSON of it.
Record = Mapping[str, Any]
# Unit, factor and digits of metrics that are not percentages with one digit.
_KILOBYTES = ("kB", 1e-3, 1)
_FORMATS = {"bytes": _KILOBYTES, "cascade_bytes": _KILOBYTES, "loss": ("nats", 1.0, 4), "density": ("", 100, 2)}


@dataclass(frozen=True)
class Cell:
    """One number of a table: a metric of a run, over the seeds."""

    section: str  # sub-table; "" where there is one only
    row: str
    column: str
    run: RunSpec  # the run, without its seed
    metric: str  # see `RunStore.measure`

    @property
    def frozen(self) -> bool:
        """Whether the metric is the frozen base's, which is the same for every seed."""
        return self.metric.startswith("frozen_")


@dataclass(frozen=True)
class Artefact:
    """A table or figure; title, note and the paper's numbers are those of ``artefacts.yaml``."""

    name: str  # "table2", "figure8"
    cells: Callable[[Any], list[Cell]]  # its numbers at a scale; every run that it needs is the run of a cell
    title: str
    note: str  # how it differs from the paper's, and what to know when reading it
    paper: Mapping[str, Mapping[str, Mapping[str, float]]]  # the paper's numbers by section, row and column
    # (store, cells, seeds) -> further data as JSON; its "markdown", if any, is shown below the table. Without it, as
    # where a run failed, there is no picture.
    details: Callable[[RunStore, Sequence[Cell], Sequence[int]], Any] | None = None
    # (record, stem of the files' names) -> the pictures that it wrote.
    draw: Callable[[Record, Path], list[Path]] | None = None
    seeds: int = 3  # default number of seeds
    each_seed: bool = False  # show every seed's value beside their mean
    # (store, scale) -> the artefact that is shown, where its cells depend on what the runs of these gave, first seed.
    then: Callable[[RunStore, Any], Artefact] | None = None
    incomplete: bool = False  # whether there are details although a run failed


ARTEFACTS: dict[str, Artefact] = {}
TEXTS: dict[str, Any] = read_yaml("artefacts.yaml")
"""What ``artefacts.yaml`` says of every artefact."""


def artefact(name: str, **options: Any) -> Callable[[Callable[[Scale], list[Cell]]], None]:
    """Register an artefact by the function that lists its cells; `options` are other attributes of `Artefact`."""
    texts = TEXTS[name]
    paper = {
        section: {row: dict(zip(texts["columns"], values, strict=True)) for row, values in rows.items()}
        for section, rows in texts.get("sections", {}).items()
    }

    def register(cells: Callable[[Scale], list[Cell]]) -> None:
        ARTEFACTS[name] = Artefact(name, cells, texts["title"], texts.get("note", ""), paper, **options)

    return register


def needed_runs(artefact: Artefact, scale: Scale | None, seeds: Sequence[int]) -> list[RunSpec]:
    """The runs of an artefact, each once; a run whose density another takes comes before it."""
    found: dict[str, RunSpec] = {}
    for seed in seeds:
        for cell in artefact.cells(scale):
            if cell.frozen and seed != seeds[0]:
                continue
            spec = cell.run.seeded(seed)
            found |= {run.id: run for run in spec.earlier.values() if run.id not in found}
            found.setdefault(spec.id, spec)
    return list(found.values())


def make_record(artefact: Artefact, scale: Scale | None, store: RunStore, seeds: Sequence[int]) -> dict[str, Any]:
    """Read the numbers of an artefact from its finished runs, as JSON-compatible data."""
    cells, rows, failures = artefact.cells(scale), [], {}
    details = artefact.details
    for cell in cells:
        specs = [cell.run.seeded(seed) for seed in (seeds[:1] if cell.frozen else seeds)]
        failures.update({spec.id: reason for spec in specs if (reason := store.failure(spec)) is not None})
        place = {name: getattr(cell, name) for name in ("section", "row", "column", "metric")}
        values = [store.measure(spec, cell.metric) for spec in specs]
        rows.append({**place, "values": values, "runs": [spec.id for spec in specs]})
    return {
        "format": 1,
        **{name: getattr(artefact, name) for name in ("name", "title", "note", "each_seed", "paper")},
        "scale": None if scale is None else scale.name,
        "seeds": list(seeds),
        "cells": rows,
        "failures": failures,
        "details": details(store, cells, seeds) if details and (artefact.incomplete or not failures) else None,
        "versions": library_versions(),
    }


def by_section(record: Record) -> dict[str, list[Mapping[str, Any]]]:
    """Cells of a record by section."""
    sections = dict.fromkeys(cell["section"] for cell in record["cells"])
    return {section: [cell for cell in record["cells"] if cell["section"] == section] for section in sections}


def render(record: Record) -> str:
    """A record as Markdown: what was measured, then the paper's numbers."""
    seeds = len(record["seeds"])
    over = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    at = f"Scale `{record['scale']}`, {over}" if record["scale"] else over.capitalize()
    parts = [f"## {record['title']}", f"{at}; accuracies and densities in percent."]
    parts += [record["note"]] if record["note"] else []
    for section, cells in by_section(record).items():
        parts += [f"### {section}"] if section else []
        shown = [text for cell in cells for text in _each_seed(cell)] if record["each_seed"] else map(_mean, cells)
        parts.append(_table(shown))
    if isinstance(record["details"], Mapping) and "markdown" in record["details"]:
        parts.append(record["details"]["markdown"])
    parts += [f"Run {id} failed: {' '.join(reason.split())}" for id, reason in record["failures"].items()]
    if record["paper"]:
        parts.append("### The paper's numbers")
        for section, rows in record["paper"].items():
            parts += [f"{section}:"] if section else []
            values = ((row, column, f"{100 * rows[row][column]:.1f}") for row in rows for column in rows[row])
            parts.append(_table(values))
    return "\n\n".join(parts) + "\n"


def _table(cells: Iterable[tuple[str, str, str]]) -> str:
    """Markdown of (row, column, text)."""
    cells = list(cells)
    columns = dict.fromkeys((column for _, column, _ in cells), "–")
    rows: dict[str, dict[str, str]] = {}
    for row, column, text in cells:
        rows.setdefault(row, {"": row, **columns})[column] = text
    return markdown_table(list(rows.values()))


def _mean(cell: Mapping[str, Any]) -> tuple[str, str, str]:
    """Row, column with its unit, and mean with its standard deviation."""
    unit, factor, digits = _FORMATS.get(cell["metric"].partition("@")[0], ("", 100.0, 1))
    values, column = cell["values"], f"{cell['column']} ({unit})" if unit else cell["column"]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return cell["row"], column, f"{len(values) - len(known)} of {len(values)} failed"
    spread = f" ± {factor * statistics.stdev(known):,.{digits}f}" if len(known) > 1 else ""
    return cell["row"], column, f"{factor * statistics.fmean(known):,.{digits}f}{spread}"


def _each_seed(cell: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """As [`_mean`], of the percentage of every seed, their mean and standard deviation."""
    known = [100 * value for value in cell["values"] if value is not None]
    texts = {f"R{i}": "failed" if v is None else f"{100 * v:.1f}" for i, v in enumerate(cell["values"], 1)}
    texts["mean"] = f"{statistics.fmean(known):.1f}" if known else "–"
    texts["std"] = f"{statistics.stdev(known):.1f}" if len(known) > 1 else "–"
    return [(f"{cell['row']}, {cell['column']}", column, text) for column, text in texts.items()]


class Reproduction(NamedTuple):
    """Result of `reproduce`."""

    record: dict[str, Any]
    text: str  # the record as Markdown
    files: list[Path]  # record, Markdown, pictures


def reproduce(
    artefact: Artefact,
    scale: Scale | None,
    *,
    seeds: int | None = None,
    output: str | Path = "runs/paper",
    say: Callable[[str], None] = lambda text: None,
) -> Reproduction:
    """Make a table or figure; runs that are done, for this one or for another, are not done again.

    Args:
        artefact: The table or figure.
        scale: Its size; None for one that has no scales.
        seeds: Number of seeds; None: the artefact's default.
        output: Folder of the runs and of what is written.
        say: Called with a line of text when a run starts.

    Raises:
        ValueError: Files that the runs read are missing; nothing is run then.
        Interrupted: After Ctrl-C; the same call goes on.
    """
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds must be at least 1; got {seeds}.")
    chosen, store = range(seeds or artefact.seeds), RunStore(Path(output))
    if artefact.then is not None:
        _run(artefact, scale, range(1), store, say)
        artefact = artefact.then(store, scale)
    _run(artefact, scale, chosen, store, say)
    # As JSON holds it, so that text and pictures are what the file gives.
    content = json.dumps(make_record(artefact, scale, store, chosen), indent=1, ensure_ascii=False)
    record = json.loads(content)
    text, stem = render(record), store.folder / (f"{artefact.name}-{scale.name}" if scale else artefact.name)
    files = [Path(f"{stem}.json"), Path(f"{stem}.md")]
    store.folder.mkdir(parents=True, exist_ok=True)
    for path, written in zip(files, (content + "\n", text), strict=True):
        with atomic_write(path) as file:
            file.write(written.encode())
    if artefact.draw is not None and (artefact.details is None or record["details"] is not None):
        files += artefact.draw(record, stem)
    return Reproduction(record, text, files)


def _run(
    artefact: Artefact, scale: Scale | None, seeds: Sequence[int], store: RunStore, say: Callable[[str], None]
) -> None:
    """Do the runs of an artefact that are not done."""
    specs = needed_runs(artefact, scale, seeds)
    todo = [spec for spec in specs if not store.is_done(spec)]
    if problem := missing_files(todo):
        raise ValueError(f"{artefact.name}{f' at scale {scale.name!r}' if scale else ''}: {problem}")
    with share():
        for number, spec in enumerate(todo, 1):
            say(f"{artefact.name}: run {number} of {len(todo)} ({len(specs) - len(todo)} were done), {spec.id}")
            store.ensure(spec)
