# SPDX-License-Identifier: Apache-2.0
"""Comparisons of methods: as many trials each, choices on held-out images within sizes, tests once, table and plot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from smn_peft.analysis import pareto_front
from smn_peft.cli import app
from smn_peft.paper import ARTEFACTS, SCALES, compare, render
from smn_peft.paper.claims import Claim, judge
from smn_peft.paper.compare import METHODS, best_within, read_methods
from smn_peft.paper.runs import RunSpec, RunStore
from smn_peft.training import RunSummary
from tests.training.tiny import SWAV

GRID = {
    "convolutional": {
        "mask": {"trials": [{"lr": 0.05}, {"lr": 0.5}]},
        "linear probe": {"adapt": "head", "trials": [{"head_lr": 0.01}, {"head_lr": 0.1}]},
        "full fine-tuning": {"adapt": "full", "trials": [{"lr": 0.001}, {"lr": 0.01}]},
        "LoRA": {"adapt": "lora", "trials": [{"lr": 0.01, "peft": {"r": 1}}, {"lr": 0.01, "peft": {"r": 8}}]},
        "VeRA": {"adapt": "vera", "trials": [{"lr": 0.01}, {"lr": 0.1}]},
    }
}


@pytest.fixture(scope="module")
def values(tiny_folder):
    """What all methods share."""
    return {
        "backbone": f"{tiny_folder / 'model.py'}:build",
        "dataset": str(tiny_folder / "set.npz"),
        "max_steps": 2,
        "batch_size": 12,
        "optimizer": "adamw",
        "head_lr": 0.01,
        "knn_k": 5,
        "cpu": True,
        "cache_images": True,
        "supervised": {"jitter_probability": 0.0, "grayscale": 0.0, "solarize": 0.0},
    }


@pytest.fixture(scope="module")
def grid(tiny_folder) -> Path:
    path = tiny_folder / "grid.yaml"
    path.write_text(yaml.safe_dump(GRID, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def made(values, grid, tiny_folder):
    """A comparison with labels, and what it said."""
    said: list[str] = []
    output = tiny_folder / "compared"
    return compare(values, grid=grid, budgets=[4, 12], seeds=2, output=output, say=said.append), said, output


def test_trials_choose_and_finals_are_tested(made):
    result, said, output = made
    assert "VeRA is left out: adapt='vera' cannot adapt" in said[0]
    assert "Left out: VeRA" in result.record["note"]
    details, store = result.record["details"], RunStore(output)
    assert len(details["trials"]) == 4 * 2
    for trial in details["trials"]:
        summary = RunSummary.load(output / "runs" / trial["run"])
        assert summary.arguments["eval_fraction"] == 0.2
        assert summary.arguments["save_dtype"] == "bfloat16"
        assert trial["value"] == summary.after["accuracy"]
        assert trial["bytes"] == summary.sizes["total"]
    cells = {(cell["row"], cell["column"]): cell for cell in result.record["cells"]}
    for (method, column), cell in cells.items():
        budget = {"≤ 4 kB": 4e3, "≤ 12 kB": 12e3, "any size": float("inf")}[column]
        tried = [trial for trial in details["trials"] if trial["method"] == method and trial["bytes"] <= budget]
        best = max(tried, key=lambda trial: (trial["value"], -trial["bytes"]))
        assert cell["runs"][0] == best["final"]
        assert len(cell["runs"]) == len(cell["values"]) == 2
        for run, value in zip(cell["runs"], cell["values"], strict=True):
            summary = RunSummary.load(output / "runs" / run)
            assert (summary.arguments["eval_fraction"], summary.arguments["eval_split"]) == (None, "test")
            assert summary.after["accuracy"] == value
    assert ("full fine-tuning", "≤ 4 kB") not in cells
    finals = {cell["runs"][0] for cell in cells.values()}
    assert len(details["finals"]) == len(finals)
    assert len(list((output / "runs").iterdir())) == 8 + 2 * len(finals)
    assert store.folder == output


def test_it_is_shown(made):
    result, _, output = made
    assert [path.name for path in result.files] == ["compare.json", "compare.md", "compare.png"]
    assert all(path.stat().st_size for path in result.files)
    record = json.loads((output / "compare.json").read_text("utf-8"))
    assert render(record) == result.text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.text.splitlines() if "|" in line]
    final = next(final for final in record["details"]["finals"] if final["method"] == "LoRA")
    shown = next(row for row in rows if row[0] == "LoRA" and final["trial"] in row)
    assert shown[1] == f"{sum(final['bytes']) / 2e3:,.1f}"
    assert shown[4:] == ["2", "yes" if final["front"] else ""]
    assert any(final["front"] for final in record["details"]["finals"])


def test_nothing_is_done_twice(made, values, grid):
    result, _, output = made
    said: list[str] = []
    again = compare(values, grid=grid, budgets=[4, 12], seeds=2, output=output, say=said.append)
    assert [line for line in said if "run" in line.split(":")[1]] == []
    assert again.text == result.text


def test_a_claim_is_judged_within_each_size(made):
    verdicts = judge(Claim("…", "compare", "mask", "full fine-tuning"), made[0].record)
    assert [verdict.where for verdict in verdicts] == ["model.py:build, set.npz"]  # a size, where there are several
    verdicts = judge(Claim("…", "compare", "mask", "linear probe"), made[0].record)
    assert [verdict.where.rpartition(", ")[2] for verdict in verdicts] == ["≤ 4 kB", "≤ 12 kB", "any size"]
    assert all(len(verdict.differences) == 2 for verdict in verdicts)


def test_without_labels_by_knn(values, tiny_folder):
    output, swav = tiny_folder / "unlabelled", {**values, **SWAV, "mask": {"batch_norm": "adapt"}}
    names, said, path = ["mask", "LoRA"], [], tiny_folder / "single.yaml"
    single = {name: {**GRID["convolutional"][name]} for name in [*names, "linear probe"]}
    for method in single.values():
        method["trials"] = method["trials"][:1]
    path.write_text(yaml.safe_dump({"convolutional": single}))
    result = compare(swav, grid=path, seeds=1, output=output, say=said.append)
    assert said[0].startswith("linear probe is left out: adapt='head' needs objective='cross_entropy'")
    rows = {cell["row"]: cell for cell in result.record["cells"]}
    assert set(rows) == {*names, "frozen base"}
    assert rows["mask"]["metric"] == "knn"
    summary = RunSummary.load(output / "runs" / rows["LoRA"]["runs"][0])
    assert rows["frozen base"]["values"] == [summary.before["knn"]]
    assert summary.arguments["mask"]["batch_norm"] == "frozen"


def test_a_trial_that_fails_is_shown_and_not_chosen(values, tiny_folder):
    path = tiny_folder / "failing.yaml"
    content = {
        "LoRA": {"adapt": "lora", "trials": [{"lr": 0.01}, {"lr": 1e30}]},
        "mask": {"trials": [{"lr": 0.01}, {"lr": 0.02, "max_bytes": 100}]},  # below the size of the head
    }
    path.write_text(yaml.safe_dump({"convolutional": content}))
    result = compare({**values, "max_steps": 4}, grid=path, seeds=1, output=tiny_folder / "failing")
    trials = result.record["details"]["trials"]
    for good, failed in (trials[:2], trials[2:]):
        assert failed["value"] is failed["bytes"] is None
        (cell,) = (cell for cell in result.record["cells"] if cell["row"] == good["method"])
        assert cell["runs"] == [good["final"]]


def test_refusals(values, grid, tmp_path):
    with pytest.raises(ValueError, match=r"There is no method 'LoRa' for .*: there are mask, .* Did you mean LoRA\?"):
        compare(values, methods=["LoRa"], grid=grid, output=tmp_path)
    with pytest.raises(ValueError, match="adapt='vera' cannot adapt"):
        compare(values, methods=["VeRA"], grid=grid, output=tmp_path)
    with pytest.raises(ValueError, match="leave eval_fraction out"):
        compare({**values, "eval_fraction": 0.5}, grid=grid, output=tmp_path)
    with pytest.raises(ValueError, match="has no methods under 'convolutional': it holds linear"):
        read_methods({"linear": {}}, "convolutional", "my.yaml")
    assert list(tmp_path.iterdir()) == []
    with np.load(values["dataset"]) as arrays:
        np.savez(tmp_path / "one.npz", **{name: arrays[name] for name in arrays if name != "split"})
    with (
        pytest.warns(UserWarning, match="held out"),
        pytest.raises(ValueError, match="images to test on beside the split 'train'"),
    ):
        compare({**values, "dataset": str(tmp_path / "one.npz")}, grid=grid, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            {
                "a": {"trials": [{"lr": 1.0}]},
                "b": {"trials": [{"lr": 1.0}]},
                "c": {"trials": [{"lr": 1.0}, {"lr": 2.0}]},
            },
            r"'c' has 2 trials and the others have 1: a comparison is fair only if",
        ),
        ({"a": {"trials": [{"lr": 1.0}, {"lr": 1.0}]}}, r"my\.yaml: 'a' has one trial twice"),
        ({"a": {"adapt": "full"}}, r"my\.yaml: 'a' needs trials, such as"),
        ({"a": {"trials": [{"rate": 1.0}]}}, r"my\.yaml: 'a' has an unknown option 'rate'"),
    ],
)
def test_unfair_grids_are_refused(methods, message):
    with pytest.raises(ValueError, match=message):
        read_methods({"linear": methods}, "linear", "my.yaml")


def test_the_best_within_a_size():
    small, large, best = (RunSpec({"backbone": name}) for name in ("small", "large", "best"))
    trials = [(0.5, 900.0, small), (0.5, 1000.0, large), (0.7, 5000.0, best)]
    assert best_within(trials, 0.5) is None
    assert best_within(trials, 1) is small  # of equals the smaller
    assert best_within(trials, 5) is best_within(trials, None) is best


def test_pareto_front():
    points = [(3.0, 0.7), (1.0, 0.5), (2.0, 0.4), (3.0, 0.8), (5.0, 0.8), (1.0, 0.2), (9.0, 0.9)]
    assert pareto_front(points) == [1, 3, 6]

    def beaten(size, value):
        return any((s <= size and v >= value) and (s, v) != (size, value) for s, v in points)

    assert sorted(pareto_front(points)) == [i for i, point in enumerate(points) if not beaten(*point)]


def test_the_package_s_methods_have_as_many_trials_each():
    for kind in ("linear", "convolutional"):
        methods = read_methods(METHODS, kind)
        assert {len(method.trials) for method in methods.values()} == {6}
        assert {"mask", "LoRA", "full fine-tuning", "linear probe", "biases (BitFit)"} <= set(methods)
    for name in ("methods", "unlabelled"):
        sections = {cell.section for cell in ARTEFACTS[name].cells(SCALES["small"])}
        assert sections == {"ViT-Tiny, 64 px, cifar10", "ResNetV2-50, 48 px, cifar10"}


def test_from_the_line(values, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({name: value for name, value in values.items() if name != "backbone"}))
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump({"convolutional": {"head": {"adapt": "head", "trials": [{"head_lr": 0.01}]}}}))
    line = ["compare", recipe, "--backbone", values["backbone"], "--methods", "head", "--grid", grid, "--seeds", 1]
    result = CliRunner().invoke(app, [str(word) for word in [*line, "--output", tmp_path / "out"]])
    assert result.exit_code == 0, result.output
    assert "chosen trials, tested once" in result.stdout
    assert f"{tmp_path / 'out' / 'compare.png'}" in result.stderr
