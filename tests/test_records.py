# SPDX-License-Identifier: Apache-2.0
"""README's result tables are what the committed records render to, not what somebody typed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    import paper_results
    import quickstart_report
    import transfer_report

    return quickstart_report, transfer_report, paper_results


def test_readme_is_rendered_from_the_records(reports, tmp_path):
    quickstart_report, transfer_report, _ = reports
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text("utf-8"), "utf-8")
    transfer_report.render_readme(copy)
    quickstart_report.render_readme(readme=copy)
    assert copy.read_text("utf-8") == (ROOT / "README.md").read_text("utf-8")


def test_a_typed_number_is_found(reports, tmp_path):
    copy = tmp_path / "README.md"
    text = (ROOT / "README.md").read_text("utf-8")
    number = f"{100 * json.loads((ROOT / 'examples/records/real_vit.json').read_text())['knn']:.1f}"
    copy.write_text(text.replace(f" {number} ", " 99.9 "), "utf-8")
    assert copy.read_text("utf-8") != text
    reports[1].render_readme(copy)
    assert f" {number} " in copy.read_text("utf-8")


def test_the_paper_at_a_small_scale_is_rendered_from_the_records(reports):
    *_, paper_results = reports
    found = paper_results.records()
    assert found
    assert paper_results.page(found) == paper_results.PAGE.read_text("utf-8")
    text = paper_results.README.read_text("utf-8")
    assert paper_results.readme(text, found) == text


def test_a_record_of_too_few_seeds_is_not_taken(reports, tmp_path, monkeypatch):
    *_, paper_results = reports
    monkeypatch.setattr(paper_results, "RECORDS", tmp_path / "records")
    for name, seeds in (("table1", [0]), ("figure9", [0, 1]), ("table3", [0, 1, 2]), ("table7", [0]), ("table5", [0])):
        (tmp_path / f"{name}-small.json").write_text(json.dumps({"seeds": seeds}), "utf-8")
    for name in ("table3", "figure9"):
        Image.new("RGBA", (60, 40), "red").save(tmp_path / f"{name}-small.png")
    paper_results.take(tmp_path)
    taken = sorted(path.name for path in (tmp_path / "records").iterdir())
    # The first two judge claims, and the last two none.
    assert taken == ["table3-small.json", "table3-small.png", "table5-small.json", "table7-small.json"]
    with Image.open(tmp_path / "records" / "table3-small.png") as picture:
        assert (picture.size, picture.convert("RGB").getpixel((5, 5))) == ((60, 40), (255, 0, 0))
