# SPDX-License-Identifier: Apache-2.0
"""Tables and figures at a tiny scale, through the real path: runs, record, Markdown, pictures; nothing runs twice."""

from __future__ import annotations

import json

import pytest

from smn_peft.paper import ARTEFACTS, RunStore, render, reproduce
from smn_peft.training import RunSummary


def made(name, scale, store, seeds=1):
    said = []
    result = reproduce(ARTEFACTS[name], scale, seeds=seeds, output=store.folder, say=said.append)
    return result, said


def cells(record, row):
    return {
        (cell["section"].rpartition(": ")[2], cell["column"]): cell for cell in record["cells"] if cell["row"] == row
    }


def test_table2_and_what_other_tables_share_with_it(tiny_scale, tmp_path):
    store = RunStore(tmp_path)  # of its own: what is counted here must not be done already
    result, said = made("table2", tiny_scale, store)
    assert len(said) == 7
    threshold, found = cells(result.record, "threshold"), cells(result.record, "topk, found density")
    run = threshold["k-NN", "colours"]["runs"][0]
    summary = RunSummary.load(store.folder / "runs" / run)
    assert threshold["Density", "colours"]["values"] == [summary.density]
    assert threshold["k-NN", "colours"]["values"] == [summary.after["knn"]]
    assert cells(result.record, "frozen base")["k-NN", "colours"]["values"] == [summary.before["knn"]]
    topk = RunSummary.load(store.folder / "runs" / found["k-NN", "colours"]["runs"][0])
    assert topk.arguments["mask"]["density"] == summary.density < 1
    assert topk.density == pytest.approx(summary.density, abs=1e-3)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.text.splitlines() if "|" in line]
    assert ["threshold", f"{100 * summary.after['knn']:.1f}"] in rows
    assert ["topk 50 %", "89.1", "56.4", "46.5", "96.8", "40.3", "46.0", "43.9"] in rows  # the paper's
    assert [path.name for path in result.files] == ["table2-tiny.json", "table2-tiny.md"]
    saved = json.loads(result.files[0].read_text("utf-8"))
    assert render(saved) == result.files[1].read_text("utf-8") == result.text
    again, said = made("table2", tiny_scale, store)
    assert (again.text, said) == (result.text, [])
    progressive, said = made("table9", tiny_scale, store)
    assert len(said) == 1
    assert cells(progressive.record, "threshold")["k-NN", "colours"]["runs"] == [run]


def test_seeds_and_spread(tiny_scale, store):
    result, said = made("table10", tiny_scale, store, seeds=2)
    assert len(said) <= 2
    (cell,) = result.record["cells"]
    first, second = (f"{100 * value:.1f}" for value in cell["values"])
    assert f"| {first} | {second} |" in " ".join(result.text.split())


@pytest.mark.parametrize(
    ("name", "pictures"), [("figure3", 1), ("figure5", 1), ("figure7", 1), ("figure8", 1), ("recipes", 1)]
)
def test_figures(tiny_scale, store, name, pictures):
    result, _ = made(name, tiny_scale, store)
    drawn = [path for path in result.files if path.suffix == ".png"]
    assert len(drawn) == pictures
    assert all(path.stat().st_size > 10_000 for path in drawn)
    if name == "figure5":
        curves = list(result.record["details"].values())
        assert curves[0] == curves[1]  # equivalent: the same run, to the last digit here
        assert curves[0] != curves[2]
    if name == "figure8":
        assert 0 < result.record["details"]["first stages: 1"] < result.record["details"]["first stages: 2"] < 1


def test_what_fails_is_shown_as_failed(tiny_scale, store, tmp_path):
    from dataclasses import replace

    setting = tiny_scale.unsupervised["net"]
    methods = {**setting.methods, "mask": {**setting.methods["mask"], "head_lr": 1e38, "max_steps": 4}}
    broken = replace(tiny_scale, name="broken", unsupervised={"net": replace(setting, methods=methods)})
    result = reproduce(ARTEFACTS["table10"], broken, seeds=1, output=tmp_path)
    assert "| failed |" in " ".join(result.text.split())
    assert f"Run {result.record['cells'][0]['runs'][0]} failed: " in result.text


def test_nothing_runs_without_its_files(monkeypatch, tmp_path):
    from smn_peft.paper import SCALES

    monkeypatch.delenv("SMN_ASSETS", raising=False)
    with pytest.raises(ValueError, match=r"table8 at scale 'small': SMN_ASSETS is unset: it names the folder"):
        reproduce(ARTEFACTS["table8"], SCALES["small"], output=tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="seeds must be at least 1; got 0"):
        reproduce(ARTEFACTS["table8"], SCALES["small"], seeds=0)


def test_unknown_metrics(store, tiny_scale):
    with pytest.raises(ValueError, match="Unknown metric 'knm'; there are knn, "):
        store.measure(tiny_scale.self_supervised("mask", "colours"), "knm")
    spec = tiny_scale.self_supervised("mask", "colours")
    store.ensure(spec)
    with pytest.raises(ValueError, match="has no 'accuracy': its arguments do not ask for it"):
        store.measure(spec, "accuracy")
