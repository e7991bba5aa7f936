# SPDX-License-Identifier: Apache-2.0
"""`smn eval` prints the table of what a run saved, and writes the reports as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from smn_peft.cli import app
from smn_peft.evaluation import EvalReport, report_table
from smn_peft.training.saved import evaluate_run
from tests.training.tiny import base_of, finished_run

runner = CliRunner()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return finished_run(tmp_path_factory.mktemp("finished"), mask={"batch_norm": "adapt"}) / "out"


def smn_eval(*words: object, code: int = 0):
    result = runner.invoke(app, ["eval", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def test_the_table_and_the_file_are_the_reports(finished, tmp_path):
    result = smn_eval(
        finished, "--backbone", base_of(finished.parent), "--base", "--cpu", "--json", tmp_path / "reports.json"
    )
    expected = evaluate_run(finished, base=True, backbone=base_of(finished.parent))
    expected += evaluate_run(finished, backbone=base_of(finished.parent))
    assert result.stdout == f"{report_table(expected)}\n"
    written = [EvalReport.from_json(json.dumps(item)) for item in json.loads((tmp_path / "reports.json").read_text())]
    assert written == expected
    assert [(report.label == "out", report.metric) for report in written] == [
        (False, "knn"),
        (True, "knn"),
        (True, "accuracy"),
    ]


def test_what_cannot_be_is_said_before_the_work(tmp_path):
    gone = tmp_path / "gone"
    for file, message in ((tmp_path / "no" / "a.json", "does not exist: make it first"), (tmp_path, "name a file")):
        said = smn_eval(gone, "--json", file, code=2).stderr.replace("│", "")
        assert message in " ".join(said.split())
    assert "batch_size must be at least 1; got 0" in smn_eval(gone, "--cpu", "--batch-size", 0, code=1).stderr


def test_options_reach_the_evaluation(finished):
    options = ["--metric", "linear_probe", "--low-shot", 0.5, "--low-shot", 0.25, "--seeds", 2]
    options += ["--limit", 24, "--batch-size", 7, "--split", "train"]
    expected = evaluate_run(
        finished,
        backbone=base_of(finished.parent),
        metrics=["linear_probe"],
        low_shot=[0.5, 0.25],
        seeds=2,
        limit=24,
        split="train",
    )
    assert (
        smn_eval(finished, "--backbone", base_of(finished.parent), "--cpu", *options).stdout
        == f"{report_table(expected)}\n"
    )


def test_mistakes(finished, tmp_path):
    assert (
        "Did you mean knn?"
        in smn_eval(finished, "--backbone", base_of(finished.parent), "--metric", "kn", code=1).stderr
    )
    assert "holds no run.json and no adapter_config.json" in smn_eval(tmp_path, code=1).stderr
    assert (
        "Unknown dataset 'cifar1'. Did you mean cifar1"
        in smn_eval(finished, "--backbone", base_of(finished.parent), "--dataset", "cifar1", code=1).stderr
    )
    assert (
        "has no split 'val'"
        in smn_eval(finished, "--backbone", base_of(finished.parent), "--split", "val", code=1).stderr
    )
    smn_eval(finished, "--backbone", base_of(finished.parent), "--low-shot", "much", code=2)
    smn_eval(code=2)
