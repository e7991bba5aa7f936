# SPDX-License-Identifier: Apache-2.0
"""`smn analyze` on two tiny runs: tables, files and pictures, and what cannot be analysed."""

from __future__ import annotations

import json

import pytest
from accelerate.state import AcceleratorState
from typer.testing import CliRunner

from smn_peft.cli.main import app
from smn_peft.evaluation import EvalReport
from smn_peft.training import load_masks, run
from tests.training.tiny import TEST, tiny_arguments


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    for name, lr in (("low", 1e3), ("high", 1e4)):
        run(tiny_arguments(folder, output_dir=str(folder / name), max_steps=2, lr=lr))
    AcceleratorState._reset_state(reset_partial_state=True)
    return [str(folder / "low"), str(folder / "high")]


def analyze(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["analyze", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_density(runs, tmp_path):
    masks = load_masks(runs[0])
    text = analyze("density", *runs, "--plot", tmp_path / "a.png", "--json", tmp_path / "a.json")
    active = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    totals = [line.split("|")[4].strip() for line in text.splitlines() if line.split("|")[2].strip() == "all"]
    assert totals[0] == f"{100 * active:.1f}"
    assert float(totals[1]) < float(totals[0])
    assert len(json.loads((tmp_path / "a.json").read_text())) == 2 * len(masks)
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert "mean of 2" in analyze("density", *runs, "--average")


def test_similarity_and_loss(runs, tmp_path):
    text = analyze("similarity", *runs, "--plot", tmp_path / "s.png")
    assert "low, high" in text
    text = analyze("loss", *runs, "--plot", tmp_path / "l.png", "--json", tmp_path / "l.json")
    assert [row["label"] for row in json.loads((tmp_path / "l.json").read_text())] == ["low", "high"]
    assert (tmp_path / "s.png").exists()
    assert (tmp_path / "l.png").exists()
    assert "has no losses in metrics.jsonl" in analyze("loss", tmp_path, code=1)


def test_embedding(runs, tmp_path):
    text = analyze("embedding", runs[0], "--base", "--plot", tmp_path / "e.png")
    assert f"{TEST} images of 3 classes" in text


def test_low_shot(tmp_path):
    report = EvalReport("probe", "d", "test", "a", (0.5,), settings={"label_fraction": 0.1})
    (tmp_path / "r.json").write_text(f"[{report.to_json()}]")
    assert "10 % of labels" in analyze("low-shot", tmp_path / "r.json", "--plot", tmp_path / "f.png")
    (tmp_path / "bad.json").write_text("[1]")
    assert "holds no reports of `smn eval`" in analyze("low-shot", tmp_path / "bad.json", code=1)
