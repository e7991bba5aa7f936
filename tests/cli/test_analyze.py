# SPDX-License-Identifier: Apache-2.0
"""`smn analyze` on two tiny runs: tables, files and pictures, and what cannot be analysed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from click.testing import CliRunner

from smn_peft.cli import app
from smn_peft.evaluation import EvalReport
from smn_peft.storage.adapter_file import adapter_sizes
from smn_peft.training import load_masks, run
from tests.training.tiny import TEST, base_of, tiny_arguments


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    for name, lr in (("low", 1e3), ("high", 1e4)):
        run(tiny_arguments(folder, output_dir=str(folder / name), max_steps=2, lr=lr))
    AcceleratorState._reset_state(reset_partial_state=True)
    return [str(folder / "low"), str(folder / "high")]


def backbone(runs: list[str]) -> list[str]:
    return ["--backbone", base_of(Path(runs[0]).parent)]


def analyze(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["analyze", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_density(runs, tmp_path):
    masks = load_masks(runs[0], backbone=backbone(runs)[1])
    text = analyze("density", *runs, *backbone(runs), "--plot", tmp_path / "a.png", "--json", tmp_path / "a.json")
    active = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    totals = [line.split("|")[4].strip() for line in text.splitlines() if line.split("|")[2].strip() == "all"]
    assert totals[0] == f"{100 * active:.1f}"
    assert float(totals[1]) < float(totals[0])
    assert len(json.loads((tmp_path / "a.json").read_text())) == 2 * len(masks)
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert "mean of 2" in analyze("density", *runs, *backbone(runs), "--average")


def test_similarity_and_loss(runs, tmp_path):
    text = analyze("similarity", *runs, *backbone(runs), "--plot", tmp_path / "s.png")
    assert "low, high" in text
    text = analyze("loss", *runs, "--plot", tmp_path / "l.png", "--json", tmp_path / "l.json")
    assert [row["label"] for row in json.loads((tmp_path / "l.json").read_text())] == ["low", "high"]
    assert (tmp_path / "s.png").exists()
    assert (tmp_path / "l.png").exists()
    assert "has no losses in metrics.jsonl" in analyze("loss", tmp_path, code=1)


def test_embedding(runs, tmp_path):
    text = analyze("embedding", runs[0], *backbone(runs), "--base", "--plot", tmp_path / "e.png")
    assert f"{TEST} images of 3 classes" in text


def test_low_shot(tmp_path):
    report = EvalReport("probe", "d", "test", "a", (0.5,), settings={"label_fraction": 0.1})
    (tmp_path / "r.json").write_text(f"[{report.to_json()}]")
    assert "10 % of labels" in analyze("low-shot", tmp_path / "r.json", "--plot", tmp_path / "f.png")
    (tmp_path / "bad.json").write_text("[1]")
    assert "holds no reports of `smn eval`" in analyze("low-shot", tmp_path / "bad.json", code=1)


def test_compression(runs, tmp_path):
    text = analyze("compression", runs[1], "--json", tmp_path / "c.json")
    table = json.loads((tmp_path / "c.json").read_text())
    bits = sum(8 * ((mask.numel() + 7) // 8) for mask in load_masks(runs[1], backbone=backbone(runs)[1]).values())
    assert table["mask_weights"] == bits == 8 * adapter_sizes(runs[1]).mask
    rows = {row["method"]: row for row in table["rows"]}
    assert rows["uncompressed"]["bits_per_weight"] == 1.0
    assert {"gzip", "bz2", "lzma", "smn_peft"} <= {*rows, *table["missing"]}
    for method, row in rows.items():
        assert row["bits_per_weight"] == 8 * row["mask_bytes"] / bits
        (line,) = (line for line in text.splitlines() if line.split("|")[1:2] == [f" {method:<12} "])
        assert f"{row['mask_bytes']:,}" in line
        assert f"{row['bits_per_weight']:.4f}" in line
    assert 0 < table["entropy"] < 1
    assert f"{bits:,} masked weights" in text
    assert "fp32 weights" not in text
    # a coded file holds the same masks, and a file of weights is compressed beside them
    result = CliRunner().invoke(app, ["pack", runs[1], "-o", str(tmp_path / "coded")])
    assert result.exit_code == 0, result.output
    again = analyze("compression", tmp_path / "coded", "--weights", tmp_path / "coded" / "adapter_model.safetensors")
    assert "fp32 weights" in again
    assert [line.split("|")[2] for line in again.splitlines()[2:-2]] == [
        line.split("|")[2] for line in text.splitlines()[2:-2]
    ]
    assert "does not exist" in analyze("compression", tmp_path / "none", code=1)
    assert "name a safetensors file of weights" in analyze("compression", runs[1], "--weights", "none", code=1)
