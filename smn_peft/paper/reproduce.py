# SPDX-License-Identifier: Apache-2.0
"""`reproduce`: run what a table or figure still needs, and write its record, its Markdown and its pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..storage import atomic_write
from ..training.shared import share
from .artefact import Artefact
from .metrics import is_frozen
from .record import make_record, render
from .run_spec import RunSpec, missing_files
from .scale import Scale
from .store import RunStore

__all__ = ["Reproduction", "needed_runs", "reproduce"]


@dataclass(frozen=True)
class Reproduction:
    """What came of an artefact.

    Attributes:
        record: What was measured.
        text: The record as Markdown.
        files: The record, the Markdown and the pictures.
    """

    record: dict[str, Any]
    text: str
    files: tuple[Path, ...]


def needed_runs(artefact: Artefact, scale: Scale, seeds: Sequence[int]) -> list[RunSpec]:
    """The runs of an artefact, each once; a run whose found density another takes comes before that."""
    found: dict[str, RunSpec] = {}
    for seed in seeds:
        for cell in artefact.cells(scale):
            if is_frozen(cell.metric) and seed != seeds[0]:
                continue
            spec = cell.run.seeded(seed)
            if spec.found is not None:
                found.setdefault(spec.found.id, spec.found)
            found.setdefault(spec.id, spec)
    return list(found.values())


def reproduce(
    artefact: Artefact,
    scale: Scale,
    *,
    seeds: int | None = None,
    output: str | Path = "runs/paper",
    say: Callable[[str], None] = lambda text: None,
) -> Reproduction:
    """Make a table or figure; runs that are done, for this one or for another, are not done again.

    Args:
        artefact: The table or figure.
        scale: At which size.
        seeds: Number of seeds; None: as many as the artefact wants.
        output: Folder of the runs and of what is written.
        say: Told of every run as it starts.

    Raises:
        ValueError: If files are missing that the runs read; nothing is run then.
        Interrupted: After Ctrl-C; the same call goes on.
    """
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds must be at least 1; got {seeds}.")
    chosen, store = range(seeds or artefact.seeds), RunStore(output)
    specs = needed_runs(artefact, scale, chosen)
    todo = [spec for spec in specs if not store.is_done(spec)]
    if problem := missing_files(todo):
        raise ValueError(f"{artefact.name} at scale {scale.name!r}: {problem}")
    with share():
        for number, spec in enumerate(todo, 1):
            say(f"{artefact.name}: run {number} of {len(todo)} ({len(specs) - len(todo)} were done), {spec.id}")
            store.ensure(spec)
    record = make_record(artefact, scale, store, chosen)
    text, stem = render(record), f"{artefact.name}-{scale.name}"
    files = [store.folder / f"{stem}.json", store.folder / f"{stem}.md"]
    store.folder.mkdir(parents=True, exist_ok=True)
    for path, content in zip(files, (json.dumps(record, indent=1, ensure_ascii=False) + "\n", text), strict=True):
        with atomic_write(path) as file:
            file.write(content.encode())
    if artefact.draw is not None:
        files += artefact.draw(json.loads(files[0].read_text("utf-8")), store.folder, stem)
    return Reproduction(record, text, tuple(files))
