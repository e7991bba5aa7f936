# SPDX-License-Identifier: Apache-2.0
"""Tables and figures: valid at both scales, and made at a tiny one through the real path; nothing runs twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from smn_peft.analysis.compression import adapter_compression, format_compression
from smn_peft.paper import ARTEFACTS, SCALES, artefact_named, listing, render, reproduce, scale_named
from smn_peft.paper.artefact import needed_runs
from smn_peft.paper.runs import METRICS
from smn_peft.training import RunSummary, evaluate_run
from tests.training.tiny import ROOT

RECORDS = ROOT / "examples" / "records" / "paper"


def made(name, scale, store, seeds=1):
    """Reproduce an artefact; every run that is said to run is one that was not done."""
    todo = [spec for spec in needed_runs(ARTEFACTS[name], scale, range(seeds)) if not store.is_done(spec)]
    said = []
    result = reproduce(ARTEFACTS[name], scale, seeds=seeds, output=store.folder, say=said.append)
    assert [line.split()[-1] for line in said] == [spec.id for spec in todo]
    assert all(store.is_done(spec) for spec in todo)
    return result


def cells(record, row):
    return {
        (cell["section"].rpartition(": ")[2], cell["column"]): cell for cell in record["cells"] if cell["row"] == row
    }


@pytest.mark.parametrize("scale", SCALES)
def test_every_run_is_valid_and_every_cell_once(scale):
    for artefact in ARTEFACTS.values():
        found = artefact.cells(SCALES[scale])
        places = [(cell.section, cell.row, cell.column) for cell in found]
        assert len(set(places)) == len(places) > 0, artefact.name
        assert {cell.metric.partition("@")[0] for cell in found} <= {*METRICS}
        assert all(len(run.id) == 12 for run in needed_runs(artefact, SCALES[scale], [0]))


def test_runs_are_shared_between_tables_and_the_same_as_in_the_committed_records():
    small = SCALES["small"]
    runs = {name: {run.id for run in needed_runs(ARTEFACTS[name], small, [0])} for name in ARTEFACTS}
    assert runs["figure6"] < runs["table8"] < runs["table1"]
    assert len(runs["table9"] - runs["table2"]) == 1  # the progressive one
    assert runs["table10"] < runs["table2"]
    assert len(runs["figure8"] & runs["figure9"]) == 3
    assert runs["figure10"] == runs["figure11"] == runs["table3"]
    recorded = [json.loads(path.read_text("utf-8")) for path in RECORDS.glob("*.json")]
    assert recorded
    for record in recorded:
        if ARTEFACTS[record["name"]].then is not None:  # its cells' runs are chosen by these
            assert {trial["run"] for trial in record["details"]["trials"]} <= runs[record["name"]]
            continue
        assert {cell["runs"][0] for cell in record["cells"]} <= runs[record["name"]], record["name"]


def test_the_frozen_base_is_read_from_one_seed():
    table = ARTEFACTS["table1"]
    frozen = replace(table, cells=lambda scale: [cell for cell in table.cells(scale) if cell.frozen])
    assert len(needed_runs(frozen, SCALES["small"], [0, 1])) == len(needed_runs(frozen, SCALES["small"], [0])) == 2
    assert len(needed_runs(ARTEFACTS["table10"], SCALES["small"], [0, 1])) == 2


def test_the_papers_numbers():
    assert ARTEFACTS["table1"].paper["ViT-B/32, CLIP"]["mask"]["cifar10"] == 0.971
    assert ARTEFACTS["table2"].paper["k-NN"]["topk 50 %"]["flowers102"] == 0.403
    assert ARTEFACTS["table6"].paper["Reduction in percent, CIFAR-100"]["lz4"]["fp32 weights"] == -0.0039
    assert ARTEFACTS["table8"].paper[""]["ResNet-18, supervised"]["inatloc500"] == 0.512
    assert ARTEFACTS["table10"].paper[""]["ucf101"]["std"] == 0.007
    assert ARTEFACTS["ablations"].paper == {}


def test_names(tiny_scale):
    text = listing([tiny_scale])
    assert all(f"| {name} " in text for name in ARTEFACTS)
    with pytest.raises(ValueError, match=r"There is no table or figure 'tabel2'; .* Did you mean table2\?"):
        artefact_named("tabel2")
    with pytest.raises(ValueError, match="There is no scale 'huge'; there are small, paper"):
        scale_named("huge")


def test_table2_and_what_table9_shares_with_it(tiny_scale, store):
    result = made("table2", tiny_scale, store)
    assert len(needed_runs(ARTEFACTS["table2"], tiny_scale, [0])) == 5
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
    assert made("table2", tiny_scale, store).text == result.text
    progressive = made("table9", tiny_scale, store)
    assert cells(progressive.record, "threshold")["k-NN", "colours"]["runs"] == [run]
    assert len({cell["runs"][0] for cell in progressive.record["cells"]} - set(cell_runs(result.record))) == 1


def cell_runs(record) -> list[str]:
    return [run for cell in record["cells"] for run in cell["runs"]]


def test_seeds_and_spread(tiny_scale, store):
    result = made("table10", tiny_scale, store, seeds=2)
    (cell,) = result.record["cells"]
    first, second = (f"{100 * value:.1f}" for value in cell["values"])
    assert f"| {first} | {second} |" in " ".join(result.text.split())


def test_mask_and_weights_are_compressed(tiny_scale, store):
    result = made("table6", tiny_scale, store)
    mask, full = (store.folder / "runs" / result.record["cells"][i]["runs"][0] for i in (0, 2))
    table = adapter_compression(mask, full / "model.safetensors")
    assert result.record["details"]["mask_weights"] == table.mask_weights
    assert format_compression(table) in result.text


def test_a_cascade_serves_its_table_and_figures(tiny_scale, store):
    table, embeddings, clusters = (made(name, tiny_scale, store) for name in ("table3", "figure10", "figure11"))
    values = {(cell["section"], cell["row"]): cell["values"][0] for cell in table.record["cells"]}
    (run,) = {*cell_runs(table.record), *cell_runs(embeddings.record), *cell_runs(clusters.record)}
    saved = store.cascade(tiny_scale.cascade("colours").seeded(0))
    for row in ("dispatcher", "dispatcher, whitened", "cascade, conditional", "cascade, unconditional"):
        assert values["k-NN", row] == saved["values"]["knn"][row]
        assert values["Linear probe", row] == saved["values"]["linear_probe"][row]
    assert 0 < values["Storage", "masks"] == saved["sizes"]["masks"] < values["Storage", "all files"]
    assert not list((store.folder / "runs" / run).rglob("checkpoint-*"))
    maps, groups = embeddings.record["details"], clusters.record["details"]
    assert [(one["label"], len(one["points"])) for one in maps] == [(n, 24) for n in ("base", "dispatcher", "cascade")]
    assert maps[0]["points"] != maps[2]["points"]
    assert sum(row["images"] for row in groups) == 48
    assert all(row["cumulative"][-1] == pytest.approx(1.0) for row in groups)
    assert [path.suffix for result in (embeddings, clusters) for path in result.files].count(".png") == 2


def pictures(files: tuple[Path, ...] | list[Path]) -> int:
    assert all(path.stat().st_size > 10_000 for path in files if path.suffix == ".png")
    return sum(path.suffix == ".png" for path in files)


def test_figures(tiny_scale, store):
    figures = {name: made(name, tiny_scale, store) for name in ("figure5", "figure7", "figure8")}
    assert all(pictures(figure.files) == 1 for figure in figures.values())
    curves = list(figures["figure5"].record["details"].values())
    assert curves[0] == curves[1] != curves[2]  # equivalent: the same run, to the last digit here
    densities = figures["figure7"].record["details"]
    assert {len(layers) > 5 for layers in densities.values()} == {True}
    assert not any(layer["name"].startswith("head.") for layers in densities.values() for layer in layers)
    shares = figures["figure8"].record["details"]
    assert 0 < shares["first stages: 1"] < 1


def test_few_labels_on_top_of_a_mask_without(tiny_scale, store):
    def arguments(run):
        return RunSummary.load(store.folder / "runs" / run).arguments

    result = reproduce(ARTEFACTS["figure3"], tiny_scale, seeds=2, output=store.folder)
    assert pictures(result.files) == 1
    rows = {cell["row"]: cell for cell in result.record["cells"]}
    tried = {trial["method"]: arguments(trial["run"]) for trial in result.record["details"]["trials"]}
    assert len(rows) == len(tried) + 3
    start = rows["linear probe, frozen base"]
    assert start["runs"] == rows["mask with these labels"]["runs"]
    for row in ("mask with these labels", "few-labels"):
        summaries = [RunSummary.load(store.folder / "runs" / run) for run in rows[row]["runs"]]
        assert [summary.before["accuracy"] for summary in summaries] == start["values"]  # with the same labels
        assert [summary.after["accuracy"] for summary in summaries] == rows[row]["values"]
        assert [summary.arguments["fraction_seed"] for summary in summaries] == [0, 1]
    assert tried["mask with these labels"]["init_from"] is None
    # The mask without labels has not seen the images of the trials either.
    runs = [tried["few-labels"], *map(arguments, rows["few-labels"]["runs"])]
    starts = [arguments(Path(run["init_from"]).name) for run in runs]
    assert [(start["seed"], start["eval_fraction"]) for start in starts] == [(0, 0.2), (0, None), (1, None)]
    probes = [rows[f"low-shot probe, {name}"] for name in ("frozen base", "mask without labels")]
    names = [Path(run["init_from"]).name for run in runs[1:]]
    assert [probe["runs"] for probe in probes] == [names[:1], names]
    folder, backbone = store.folder / "runs" / names[0], starts[1]["backbone"]
    shots = evaluate_run(folder, backbone=backbone, low_shot=[0.5], seeds=3)
    assert probes[1]["values"][0] == shots[0].value


def test_pictures_of_the_committed_records(tmp_path):
    for name in ("figure3", "figure6", "figure9", "recipes"):
        record = json.loads((RECORDS / f"{name}-small.json").read_text("utf-8"))
        assert pictures(ARTEFACTS[name].draw(record, tmp_path / name)) == 1
    for cell in record["cells"]:
        cell["values"] = [None]
    assert ARTEFACTS["recipes"].draw(record, tmp_path / "failed") == []


def test_what_fails_is_shown_as_failed(tiny_scale, tmp_path):
    setting = tiny_scale.main
    methods = {**setting.methods, "mask": {**setting.methods["mask"], "head_lr": 1e38, "max_steps": 4}}
    broken = replace(tiny_scale, name="broken", main=replace(setting, methods=methods))
    result = reproduce(ARTEFACTS["table10"], broken, seeds=1, output=tmp_path)
    assert "| failed |" in " ".join(result.text.split())
    assert f"Run {result.record['cells'][0]['runs'][0]} failed: " in result.text


def test_nothing_runs_without_its_files(monkeypatch, tmp_path):
    monkeypatch.delenv("SMN_ASSETS", raising=False)
    with pytest.raises(ValueError, match=r"table8 at scale 'small': SMN_ASSETS is unset: it names the folder"):
        reproduce(ARTEFACTS["table8"], SCALES["small"], output=tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="seeds must be at least 1; got 0"):
        reproduce(ARTEFACTS["table8"], SCALES["small"], seeds=0)
