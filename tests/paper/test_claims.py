# SPDX-License-Identifier: Apache-2.0
"""Claims: judged seed by seed with a margin, and every row that one names is a row of its artefact."""

from __future__ import annotations

import pytest

from smn_peft.paper import ARTEFACTS, scale_named
from smn_peft.paper.claims import CLAIMS, Claim, claims_table, judge


def record(own, other, metric="accuracy"):
    cells = [
        {"section": "s", "row": row, "column": "c", "metric": metric, "values": values}
        for row, values in (("own", own), ("other", other))
    ]
    size = {"section": "s", "row": "own", "column": "file", "metric": "bytes", "values": [1.0]}
    return {"title": "t", "cells": [*cells, size]}


@pytest.mark.parametrize(
    ("own", "other", "short", "says"),
    [
        ([0.7, 0.72, 0.71], [0.6, 0.61, 0.6], 0.0, "holds"),
        ([0.7, 0.72, 0.71], [0.6], 0.0, "holds"),  # a frozen base has one value
        ([0.7, 0.72, 0.71], [0.705, 0.722, 0.715], 0.01, "holds"),
        ([0.6, 0.61, 0.6], [0.7, 0.72, 0.71], 0.0, "does not hold"),
        ([0.6, 0.61, 0.6], [0.7, 0.72, 0.71], 0.01, "does not hold"),
        ([0.7, 0.6, 0.65], [0.65, 0.65, 0.64], 0.0, "cannot be told"),
        ([0.7, 0.9], [0.6, 0.6], 0.0, "cannot be told"),
        ([0.601, 0.9, 0.601], [0.6, 0.6, 0.6], 0.0, "cannot be told"),  # one seed says it all
        ([0.7, 0.7, 0.7, 0.7, 0.599], [0.6], 0.0, "cannot be told"),  # a clear mean, and one seed against it
        ([0.7, None, 0.71], [0.6, 0.6, 0.6], 0.0, "cannot be told"),
    ],
)
def test_verdicts(own, other, short, says):
    (verdict,) = judge(Claim("x", "table1", "own", "other", short), record(own, other))
    assert verdict.says == says
    assert verdict.where == "s"


def test_columns_are_told_apart():
    made = record([0.7] * 3, [0.6] * 3)
    more = [{**cell, "column": "d"} for cell in made["cells"][:2]]
    made["cells"] += more
    found = judge(Claim("x", "table1", "own", "other"), made)
    assert [verdict.where for verdict in found] == ["s, c", "s, d"]


def test_densities_and_bytes_are_not_compared():
    assert judge(Claim("x", "table1", "own", "other"), record([1.0] * 3, [0.0] * 3, "density")) == []


def test_the_small_scale_has_the_rows_that_a_claim_compares():
    for claim in CLAIMS:
        rows = {cell.row for cell in ARTEFACTS[claim.artefact].cells(scale_named("small"))}
        assert {claim.row, claim.than} <= rows, claim.text


def test_the_table_says_by_how_much_and_what_the_paper_lacks():
    claim = next(claim for claim in CLAIMS if not claim.of_paper)
    made = record([0.7, 0.72, 0.71], [0.6, 0.6, 0.6])
    for cell in made["cells"]:
        cell["row"] = {"own": claim.row, "other": claim.than}[cell["row"]]
    table = claims_table({claim.artefact: made})
    assert "+11.0 ± 1.0" in table
    assert "(not in the paper)" in table
    assert "| holds |" in " ".join(table.split())
