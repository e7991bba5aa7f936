# SPDX-License-Identifier: Apache-2.0
"""The paper's claims, each a comparison of two rows of a table, judged by its record."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..evaluation import markdown_table
from .artefact import TEXTS, Record


@dataclass(frozen=True)
class Claim:
    """Row `row` of an artefact is above row `than`, or at most `short` below it."""

    text: str  # one that starts with "…" continues the claim before it
    artefact: str  # name of the table or figure that judges it
    row: str  # the row that should be above
    than: str  # the row that it is compared with
    short: float = 0.0  # by how much it may fall short (a fraction of 1)
    of_paper: bool = True  # whether the paper makes it; else it is a control that the paper lacks


#: What is judged, in the order of the paper.
CLAIMS = tuple(Claim(artefact=name, **claim) for name, texts in TEXTS.items() for claim in texts.get("claims", ()))


@dataclass(frozen=True)
class Verdict:
    """A claim in one section of its artefact."""

    where: str  # a backbone, a metric, a length of training, or several of these
    differences: tuple[float, ...]  # `row` less `than`, by seed (fractions of 1)
    says: str  # "holds", "does not hold" or "cannot be told"


def judge(claim: Claim, record: Record) -> list[Verdict]:
    """Compare the rows of a claim in every section that has both, seed by seed, by the record of its artefact.

    It holds if every seed says so and the mean is two standard errors away from the margin, and does not hold if
    every seed says the opposite as clearly; else, and under fewer than three seeds, it cannot be told.
    """
    cells: dict[tuple[str, str], dict[str, Sequence[float | None]]] = {}
    for cell in record["cells"]:
        if cell["row"] in (claim.row, claim.than) and "bytes" not in cell["metric"] and cell["metric"] != "density":
            cells.setdefault((cell["section"], cell["column"]), {})[cell["row"]] = cell["values"]
    both = {place: rows for place, rows in cells.items() if len(rows) == 2}
    sections = [section for section, _ in both]
    verdicts = []
    for (section, column), rows in both.items():
        own, other = rows[claim.row], rows[claim.than]
        wide = max(len(own), len(other))  # the frozen base has one value
        pairs = zip(*(list(row) * (wide if len(row) == 1 else 1) for row in (own, other)), strict=True)
        differences = tuple(a - b for a, b in pairs if a is not None and b is not None)
        where = section if sections.count(section) == 1 else f"{section}, {column}"
        verdicts.append(Verdict(where, differences, _says([d + claim.short for d in differences])))
    return verdicts


def _says(margins: Sequence[float]) -> str:
    if len(margins) > 2:
        clear = abs(statistics.mean(margins)) > 2 * statistics.stdev(margins) / len(margins) ** 0.5
        if clear and min(margins) > 0:
            return "holds"
        if clear and max(margins) < 0:
            return "does not hold"
    return "cannot be told"


def claims_table(records: Mapping[str, Record]) -> str:
    """Markdown of all claims whose artefact has a record, of `records` by the artefact's name."""
    rows = []
    for claim in CLAIMS:
        for verdict in judge(claim, records[claim.artefact]) if claim.artefact in records else []:
            points = [100 * difference for difference in verdict.differences]
            mean = f"{statistics.mean(points):+.1f}" if points else "–"
            spread = f" ± {statistics.stdev(points):.1f}" if len(points) > 1 else ""
            row = {"claim": claim.text if claim.of_paper else f"{claim.text} (not in the paper)"}
            row |= {"where": verdict.where or records[claim.artefact]["title"], "points": mean + spread}
            rows.append({**row, "seeds": str(len(points)), "at this scale it": verdict.says})
    return markdown_table(rows)
