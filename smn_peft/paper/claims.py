# SPDX-License-Identifier: Apache-2.0
"""The paper's claims, each a comparison of two rows of a table, judged by its record."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ..evaluation import markdown_table
from .artefact import Record

__all__ = ["CLAIMS", "Claim", "claims_table", "judge"]


@dataclass(frozen=True)
class Claim:
    """Row `row` of an artefact is above row `than`, or at most `short` below it."""

    text: str
    artefact: str  # name of the table or figure that judges it
    row: str  # the row that should be above
    than: str  # the row that it is compared with
    short: float = 0.0  # by how much it may fall short (a fraction of 1)
    of_paper: bool = True  # whether the paper makes it; else it is a control that the paper lacks


_Control = partial(Claim, of_paper=False)
_FULL, _CASCADE, _STATISTICS = "full fine-tuning", "cascade, unconditional", "BatchNorm statistics alone"
_SMALL_RECIPE, _PAPER_RECIPE = "mask, the small recipe", "mask, the paper's recipe"

#: What is judged, in the order of the paper; a text that starts with "…" continues the claim before it.
CLAIMS = (
    Claim("a mask with labels beats k-NN on the frozen base", "table1", "mask", "k-NN, frozen base"),
    Claim("a mask with labels comes within a point of full fine-tuning", "table1", "mask", _FULL, 0.01),
    Claim("… by the paper's recipe too", "table1", "mask, SGD and a random head", _FULL, 0.01),
    _Control("… beats a linear probe", "table1", "mask", "linear probe, frozen base"),
    _Control("… beats fp32 LoRA of at most its bytes, one rate", "table1", "mask", "LoRA of at most the mask's bytes"),
    _Control("… is more than statistics that adapt", "table1", "mask", f"new head, {_STATISTICS}"),
    Claim("a mask without labels beats the frozen base", "table2", "threshold", "frozen base"),
    Claim("thresholds beat topk at 50 %", "table2", "threshold", "topk 50 %"),
    Claim("thresholds are no worse than topk at the density they found", "table2", "threshold", "topk, found density"),
    _Control("… is more than statistics that adapt", "table2", "threshold", _STATISTICS),
    _Control("… beats fine-tuning without labels", "table2", "threshold", _FULL),
    Claim("a conditional cascade beats its dispatcher", "table3", "cascade, conditional", "dispatcher"),
    Claim("an unconditional cascade beats its dispatcher", "table3", _CASCADE, "dispatcher"),
    _Control("… is more than whitening", "table3", _CASCADE, "dispatcher, whitened"),
    _Control("… is more than as many dispatchers of other seeds", "table3", _CASCADE, "dispatchers of 4 seeds"),
    Claim("masking a tenth of the weights beats the frozen base", "figure8", "random: 10 %", "frozen base"),
    Claim("masking half of the weights loses at most a point", "figure8", "random: 50 %", "all weights", 0.01),
    Claim("the largest tenth is a better choice than a random one", "figure9", "magnitude: 10 %", "random: 10 %"),
    _Control("the small recipe beats the paper's", "recipes", _SMALL_RECIPE, _PAPER_RECIPE),
    _Control("the small recipe comes within a point of full fine-tuning", "recipes", _SMALL_RECIPE, _FULL, 0.01),
)


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
