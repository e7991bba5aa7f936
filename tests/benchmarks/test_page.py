# SPDX-License-Identifier: Apache-2.0
"""docs/benchmarks.md is what the saved baseline renders to, and what a rendering shows."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

MARKERS = "before\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\nafter\n"


def test_the_page_is_rendered_from_the_baseline(scripts, tmp_path):
    page = scripts.page
    copy = tmp_path / "benchmarks.md"
    copy.write_text(page.PAGE.read_text("utf-8"), "utf-8")
    page.render_page(page=copy)
    assert copy.read_text("utf-8") == page.PAGE.read_text("utf-8")


def test_what_stands_between_the_markers_is_replaced(scripts, row, tmp_path):
    page, baseline = tmp_path / "benchmarks.md", tmp_path / "baseline.json"
    baseline.write_text(json.dumps({"rows": [asdict(row(1.25))]}))
    page.write_text(MARKERS)
    scripts.page.render_page(baseline, page)
    block = scripts.page.render([row(1.25)])
    assert page.read_text() == MARKERS.replace("old", block)
    page.write_text("nothing")
    with pytest.raises(ValueError, match=r"must have <!-- benchmarks:begin -->"):
        scripts.page.render_page(baseline, page)


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line][2:]


def test_a_line_says_what_was_measured_and_what_was_wanted(scripts, row):
    rows = [
        row(1.07, 1.06, 1.085, target=1.1),
        row(1.2, 1.15, 1.25, name="vit_tiny", target=1.1),
        row(2512.3, what="decode", unit="Mbit/s", better="higher", target=1000),
        row(0.0123, 0.0123, 0.0123, what="on disk", unit="GB", target=0.13),
        row(3.5, what="opens in", unit="ms"),
        row(1.5, what="for comparison", better=None),
    ]
    text = scripts.page.render(rows)
    assert text.startswith("Measured on one, 2 cores, torch 2.0. Threads: 1 for training.\n\n| benchmark |")
    assert cells(text) == [
        ["training", "mine / its", "resnet18", "1.070", "1.060 to 1.085", "≤ 1.1"],
        ["training", "mine / its", "vit_tiny", "1.200", "1.150 to 1.250", "≤ 1.1, missed"],
        ["training", "decode", "resnet18", "2,512 Mbit/s", "", "≥ 1,000 Mbit/s"],
        ["training", "on disk", "resnet18", "0.012 GB", "", "≤ 0.13 GB"],
        ["training", "for comparison", "resnet18", "1.500", "", ""],
    ]


def test_many_cases_share_a_line(scripts, row):
    rows = [row(1 + number / 10, name=str(number), target=1.25) for number in range(5)]
    assert cells(scripts.page.render(rows)) == [
        ["training", "mine / its", "5 cases", "1.000 to 1.400", "", "≤ 1.25, missed by 2"]
    ]


def test_a_figure_s_cases_stand_together(scripts, row):
    rows = [row(name="a", target=1.2), row(what="another"), row(name="b", target=1.3)]
    assert [line[1:3] for line in cells(scripts.page.render(rows))] == [
        ["mine / its", "a"],
        ["mine / its", "b"],
        ["another", "resnet18"],
    ]


def test_every_machine_is_named(scripts, row):
    text = scripts.page.render(
        [row(machine={"threads": 2}), row(benchmark="codec"), row(machine={"device": "GPU", "threads": 2})]
    )
    machines = "Measured on one, 2 cores, torch 2.0; one, 2 cores, GPU, torch 2.0."
    assert text.startswith(f"{machines} Threads: 1 for codec; 2 for training.\n")
