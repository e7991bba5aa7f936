# SPDX-License-Identifier: Apache-2.0
"""`smn cascade`: an expert per job, the same line again, embeddings in a file, the table, and mistakes."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from smn_peft.cascade import Cascade, evaluate_cascade
from smn_peft.cli import app
from smn_peft.data import load_images
from smn_peft.evaluation import EvalReport, report_table
from tests.cascade.tiny import cascade_arguments
from tests.training.tiny import SWAV, TEST, TRAIN

runner = CliRunner()


def smn(*words: object, code: int = 0):
    result = runner.invoke(app, ["cascade", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def line(tmp_path_factory) -> list[object]:
    """A recipe for a tiny dispatcher, and the options of its cascade."""
    folder = tmp_path_factory.mktemp("cli")
    arguments = cascade_arguments(folder)
    names = ("dataset", "output_dir", "batch_size", "lr", "head_lr", "knn_k", "cpu")
    recipe = {name: getattr(arguments, name) for name in names} | SWAV | {"epochs": 1, "eval_split": None}
    (folder / "tiny.yaml").write_text(json.dumps({**recipe, "mask": {"batch_norm": "adapt"}}))
    return ["--recipe", folder / "tiny.yaml", "--experts", 2, "--router-dim", 4, "--backbone", arguments.backbone]


def test_in_jobs_then_embeddings_and_the_table(line, tmp_path):
    out, backbone = line[1].parent / "out", line[-1]
    assert "make both first" in smn("train", *line, "--expert", 0, code=1).stderr
    assert f"{TRAIN} images in clusters of " in smn("train", *line, "--prepare").stdout
    assert smn("train", *line, "--expert", 1).stdout.endswith("done: expert 1\n")
    finished = (out / "expert-1" / "run.json").stat().st_mtime_ns
    assert "(K + 1) β/32 is" in smn("train", *line).stdout
    assert (out / "expert-1" / "run.json").stat().st_mtime_ns == finished
    dataset = line[1].parent / "set.npz"
    for mode in ("conditional", "unconditional"):
        words = [out, *line[-2:], "--dataset", dataset, "--split", "test", "--batch-size", 12, "--mode", mode, "--cpu"]
        words += ["--format", "safetensors", "-o", tmp_path / mode]
        result = runner.invoke(app, ["embed", *map(str, words)])
        assert f"{TEST} images in 1 parts, dim 16" in result.stdout, result.output
        found, images = load_file(tmp_path / mode / "part-00000-of-00001.safetensors"), load_images(dataset, "test")
        expected = Cascade.load(out, backbone=backbone).embed(images, mode, batch_size=12)
        torch.testing.assert_close(found["embedding"], expected.features, rtol=1e-5, atol=1e-6)
        assert torch.equal(found["label"], images.labels)
    result = smn("eval", out, *line[-2:], "--cpu", "--metric", "knn", "--json", tmp_path / "reports.json")
    reports = evaluate_cascade(out, backbone=backbone, metrics=["knn"])
    assert result.stdout == f"{report_table(reports)}\n"
    assert [row.split("|")[1].strip() for row in result.stdout.splitlines()[2:]] == [
        "dispatcher",
        "dispatcher, whitened",
        "cascade, conditional",
        "cascade, unconditional",
    ]
    written = [EvalReport.from_json(json.dumps(item)) for item in json.loads((tmp_path / "reports.json").read_text())]
    assert written == reports


def test_mistakes(line, tmp_path):
    assert "experts must be at least 2" in smn("train", *line, "--experts", 1, code=1).stderr
    assert "give one of them" in " ".join(smn("train", *line, "--prepare", "--expert", 0, code=2).stderr.split())
    assert "No such option '--expertt'." in smn("train", *line, "--expertt", 1, code=2).stderr
    assert "objective='cross_entropy' needs them" in smn("train", *line, "--objective", "cross_entropy", code=1).stderr
    assert "holds no finished cascade" in smn("eval", tmp_path, code=1).stderr
