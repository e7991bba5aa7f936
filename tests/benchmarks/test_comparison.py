# SPDX-License-Identifier: Apache-2.0
"""The rule by which a figure got worse or better, and what a comparison says and returns."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

LONE, SPREAD, EXACT = (None, None), (0.99, 1.01), (1.0, 1.0)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (LONE, (1.04, None, None), "same"),
        (LONE, (1.06, None, None), "worse"),
        (LONE, (0.94, None, None), "better"),
        (SPREAD, (1.06, None, None), "worse"),
        (SPREAD, (1.015, 1.012, 1.02), "same"),  # apart, but within 2 %
        (SPREAD, (1.03, 1.02, 1.04), "worse"),
        (SPREAD, (1.10, 1.00, 1.20), "same"),  # the quartiles overlap
        (SPREAD, (0.95, 0.94, 0.96), "better"),
        (EXACT, (1.0005, 1.0005, 1.0005), "same"),
        (EXACT, (1.002, 1.002, 1.002), "worse"),
        (EXACT, (0.99, 0.99, 0.99), "better"),
    ],
)
def test_a_ratio(scripts, row, before, after, verdict):
    assert scripts.comparison.verdict(row(1.0, *before), row(*after)) == verdict
    mirrored = {"worse": "better", "better": "worse"}.get(verdict, verdict)
    pair = row(1.0, *before, better="higher"), row(*after, better="higher")
    assert scripts.comparison.verdict(*pair) == mirrored


def test_a_peer_s_own_figure_is_never_judged(scripts, row):
    assert scripts.comparison.verdict(row(1.0, better=None), row(9.0, better=None)) == "same"


def test_what_is_in_a_unit_has_a_wide_margin_and_its_machine(scripts, row):
    old = row(10.0, unit="ms")
    assert scripts.comparison.verdict(old, row(12.0, unit="ms")) == "same"
    assert scripts.comparison.verdict(old, row(13.0, unit="ms")) == "worse"
    assert scripts.comparison.verdict(old, row(13.0, unit="ms", machine={"cpu": "two"})) == "passed_over"
    assert scripts.comparison.verdict(old, row(13.0, unit="ms", machine={"torch": "2.1"})) == "worse"
    assert scripts.comparison.verdict(old, row(13.0, unit="ms", machine={"vectors": "AVX2"})) == "passed_over"


def test_rows_are_put_where_they_belong(scripts, row):
    old = [row(name="same"), row(name="worse"), row(name="better"), row(name="gone"), row(name="gpu")]
    new = [
        row(name="same", target=0.9, machine={"torch": "2.1", "vectors": "AVX2"}),
        row(2.0, name="worse"),
        row(0.5, name="better"),
        row(name="added"),
        row(name="gpu", machine={"device": "GPU"}),
    ]
    found = scripts.comparison.compare(old, new)
    names = {key: [pair[1].name for pair in getattr(found, key)] for key in ("same", "worse", "better")}
    assert names == {"same": ["same"], "worse": ["worse"], "better": ["better"]}
    assert [row.name for row in found.missing] == ["gone", "gpu"]
    assert [row.name for row in found.new] == ["added", "gpu"]
    assert [row.name for row in found.misses] == ["same"]
    assert found.text().splitlines() == [
        "another machine: torch 2.0, now 2.1",
        "another machine: vectors not recorded, now AVX2",
        "worse: training, mine / its, worse: 1 -> 2",
        "better: training, mine / its, better: 1 -> 0.5",
        "missing: training, mine / its, gone: 1",
        "missing: training, mine / its, gpu: 1",
        "new: training, mine / its, added: 1",
        "new: training, mine / its, gpu: 1",
        "misses its target: training, mine / its, same: 1, not ≤ 0.9",
        "1 worse, 1 better, 1 same, 0 passed over, 2 missing, 2 new, 1 misses",
    ]


def written(path, *rows):
    path.write_text(json.dumps({"rows": [asdict(row) for row in rows]}))
    return str(path)


def test_the_exit_status_says_whether_something_got_worse(scripts, row, tmp_path, capsys):
    old, new = written(tmp_path / "old.json", row(1.0)), written(tmp_path / "new.json", row(1.2, 1.1, 1.3))
    assert scripts.comparison.main([old, new]) == 1
    assert "worse: training, mine / its, resnet18: 1 -> 1.2 (1.1 to 1.3)" in capsys.readouterr().out
    assert scripts.comparison.main([new, old]) == 0
    assert scripts.comparison.main([str(tmp_path / "none.json"), new]) == 2
    assert "none.json: `make bench` measures, `make bench-save` saves" in capsys.readouterr().err
