# SPDX-License-Identifier: Apache-2.0
"""The card of a repository that holds many tasks: one row per folder, kept up to date by every push."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..evaluation import format_fraction, markdown_table
from .facts import AdapterFacts
from .loading import loading_code
from .names import as_text, dataset_id, shown_name
from .results import metric_name

__all__ = ["collection_card"]

_BEGIN, _END = "<!-- smn:tasks:begin -->", "<!-- smn:tasks:end -->"
_MARKED = re.compile(rf"{_BEGIN}\n(?P<table>.*?)\n{_END}", re.DOTALL)
_COLUMNS = ("task", "base", "dataset", "result", "density", "bytes")


def collection_card(text: str | None, repo_id: str, tasks: Mapping[str, AdapterFacts], existing: str | None) -> str:
    """README.md at the root of a repository of many tasks.

    Args:
        text: The card to put the table into: that of an adapter at the root, or the one there is; None: a fresh one.
        repo_id: Repository.
        tasks: The adapters that are pushed, by folder.
        existing: The README.md there is, for the rows of the other tasks.
    """
    rows = {row["task"]: row for row in _rows(existing or "")}
    rows |= {f"[{folder}]({folder})": _row(folder, facts) for folder, facts in tasks.items()}
    if not rows:
        assert text is not None
        return text
    card = ModelCard(text or _first(repo_id, tasks), ignore_metadata_errors=True)
    block = f"{_BEGIN}\n{markdown_table([rows[name] for name in sorted(rows)])}\n{_END}"
    if _MARKED.search(card.text):
        card.text = _MARKED.sub(lambda _: block, card.text, count=1)
    else:
        card.text = f"{card.text.rstrip()}\n\n## Tasks\n\n{block}\n"
    _update(card.data, tasks)
    return str(card)


def _first(repo_id: str, tasks: Mapping[str, AdapterFacts]) -> str:
    folder, facts = next(iter(tasks.items()))
    data = ModelCardData(library_name="peft", base_model_relation="adapter")
    words = (
        f"# {repo_id.rpartition('/')[2]}\n\nMasks for several tasks, each in a folder with a card of its own: one bit "
        "per frozen weight says whether it stays on.\n\n"
        f"{_BEGIN}\n\n{_END}\n\n"
        f"```python\n{loading_code(facts.code, repo_id, folder)}\n```\n"
    )
    return f"---\n{data.to_yaml()}\n---\n\n{words}"


def _rows(text: str) -> list[dict[str, str]]:
    """The rows of the table there is; of a table with other columns none, since it is not ours."""
    found = _MARKED.search(text)
    lines = found["table"].strip().splitlines() if found else []
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))] for line in lines]
    if not cells or tuple(cells[0]) != _COLUMNS:
        return []
    rows = [dict(zip(_COLUMNS, line, strict=True)) for line in cells[2:] if len(line) == len(_COLUMNS)]
    return [{name: cell.replace("\\|", "|") for name, cell in row.items()} for row in rows]


def _row(folder: str, facts: AdapterFacts) -> dict[str, str]:
    results = [f"{metric_name(r)} {format_fraction(r.value, r.spread)} %" for r in facts.reports]
    return {
        "task": f"[{folder}]({folder})",
        "base": as_text(facts.base) or "–",
        "dataset": as_text(shown_name(facts.dataset)) or "–",
        "result": as_text(", ".join(results)) or "–",
        "density": "–" if facts.density is None else f"{facts.density:.4f}",
        "bytes": f"{facts.sizes.total:,}",
    }


def _update(data: Any, tasks: Mapping[str, AdapterFacts]) -> None:
    """Base models, datasets and tags: the union of what was there and what comes."""
    bases = [facts.base_id for facts in tasks.values() if facts.base_id]
    datasets = [found for facts in tasks.values() if (found := dataset_id(facts.dataset))]
    tags = ["smn", "mask", *(f"base_model:adapter:{base}" for base in bases)]
    for name, new in (("base_model", bases), ("datasets", datasets), ("tags", tags)):
        old = data.get(name) or []
        if merged := list(dict.fromkeys([*([old] if isinstance(old, str) else old), *new])):
            data[name] = merged
    data["library_name"] = "peft"
    if not data.get("base_model"):
        data.pop("base_model_relation")
