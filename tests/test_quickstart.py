# SPDX-License-Identifier: Apache-2.0
"""The quickstart's promises: what its record shows, that README.md shows the record, and a whole run of it."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples/quickstart.py"
RECORD = ROOT / "examples/quickstart.json"
KNN, PROBE, CONTROL, FULL, MASK, PAPER = range(6)


@pytest.fixture
def example(monkeypatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of examples/ as a script there would; afterwards none of them stays known by its short name."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield importlib.import_module
    for path in (ROOT / "examples").glob("*.py"):
        if path.stem not in before:
            sys.modules.pop(path.stem, None)


@pytest.fixture
def report(example) -> ModuleType:
    return example("quickstart_report")


@pytest.fixture
def common(example) -> ModuleType:
    return example("common")


@pytest.fixture
def record() -> dict:
    return json.loads(RECORD.read_text("utf-8"))


def accuracies(record: dict) -> list[float]:
    return [statistics.mean(row["accuracy"]) for row in record["rows"]]


def keeps_its_promises(record: dict) -> None:
    means = accuracies(record)
    for mask, gap in ((MASK, 0.02), (PAPER, 0.01)):
        assert means[mask] >= means[FULL] - gap
        assert means[mask] >= means[KNN] + 0.15
        assert means[mask] > max(means[PROBE], means[CONTROL]), "a new head and new statistics do as well"
    assert record["reload_identical"] is True
    assert len(record["rows"][MASK]["accuracy"]) == 3
    size = record["rows"][PAPER]["bytes"]
    assert size["statistics"] > record["rows"][MASK]["bytes"]["statistics"] == 0
    assert size["mask"] + size["head"] + size["statistics"] <= size["total"]
    assert size["total"] < record["rows"][FULL]["bytes"]["total"] / 20


def test_the_recorded_run_keeps_the_promises(record):
    keeps_its_promises(record)


@pytest.mark.slow
def test_a_whole_run_keeps_the_promises(tmp_path):
    command = [sys.executable, str(SCRIPT), "--json", str(tmp_path / "record.json")]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    keeps_its_promises(json.loads((tmp_path / "record.json").read_text("utf-8")))


def test_the_readme_shows_the_record(report, tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text("utf-8"), "utf-8")
    report.render_readme(readme=copy)
    assert copy.read_text("utf-8") == (ROOT / "README.md").read_text("utf-8"), (
        "README.md is not what the record says: python examples/quickstart.py --readme"
    )


def test_only_what_is_between_the_markers_is_rendered(report, record, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- quickstart:begin -->\nold\n\nold\n<!-- quickstart:end -->\nafter\n", "utf-8")
    report.render_readme(readme=readme)
    expected = f"before\n<!-- quickstart:begin -->\n{report.render(record)}\n<!-- quickstart:end -->\nafter\n"
    assert readme.read_text("utf-8") == expected
    readme.write_text("no markers\n", "utf-8")
    with pytest.raises(ValueError, match="has no <!-- quickstart:begin --> … <!-- quickstart:end -->"):
        report.render_readme(readme=readme)


def test_a_failed_reload_is_said_loudly(report, record):
    assert "identical to the bit" in report.render(record)
    failed = report.render({**record, "reload_identical": False})
    assert "identical to the bit" not in failed
    assert "DID NOT GIVE THE SAME LOGITS" in failed


def test_the_check_of_the_reloaded_masks_can_fail(example, capsys, tmp_path):
    quickstart = example("quickstart")
    quickstart.pretrain(tmp_path / "base", epochs=1)
    quickstart.run("mask, the defaults", tmp_path, epochs=1, seeds=1)
    assert quickstart.verify(tmp_path)
    saved = tmp_path / "mask-frozen/logits.safetensors"
    logits = load_file(saved)["logits"]
    logits[7, 1] = torch.nextafter(logits[7, 1], torch.tensor(0.0))
    save_file({"logits": logits}, saved)
    assert not quickstart.verify(tmp_path)
    assert "2000 logits NOT identical" in capsys.readouterr().out


def test_verifying_nothing_is_no_success(example, tmp_path):
    assert not example("quickstart").verify(tmp_path)


def test_knn_against_a_plain_loop(common):
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(40, 6, generator=generator), torch.randn(30, 6, generator=generator)
    labels, truth = torch.arange(40) % 4, torch.arange(30) % 4
    right = 0
    for sample, label in zip(test, truth, strict=True):
        similarities = torch.nn.functional.cosine_similarity(train, sample[None])
        nearest = similarities.argsort(descending=True)[:7].tolist()
        votes = [sum(float((similarities[i] / 0.1).exp()) for i in nearest if labels[i] == c) for c in range(4)]
        right += votes.index(max(votes)) == int(label)
    assert common.knn_accuracy(train, labels, test, truth, k=7) == pytest.approx(right / 30)
    assert common.knn_accuracy(train, labels, train, labels, k=1) == 1.0
    assert 0 <= common.knn_accuracy(train, labels, test, truth, k=200) <= 1


def test_linear_probe_gives_the_head_that_it_scores(common):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.randn(90, 5, generator=generator) + 4 * torch.eye(3, 5)[labels]
    score, weight, bias = common.linear_probe(features[:60], labels[:60], features[60:], labels[60:])
    logits = torch.nn.functional.linear(features[60:], weight, bias)
    assert score == pytest.approx(float((logits.argmax(1) == labels[60:]).float().mean()))
    assert score > 0.8


def test_digits_are_split_without_overlap(common):
    train, test = common.digits(range(5, 10))
    assert len(train) == 496
    assert len(test) == 400
    assert train.tensors[0].shape[1:] == (1, 32, 32)
    assert float(train.tensors[0].min()) >= -1
    assert float(train.tensors[0].max()) <= 1
    assert set(train.tensors[1].tolist()) == set(test.tensors[1].tolist()) == set(range(5))
    again = common.digits(range(5, 10))[1]
    assert torch.equal(test.tensors[0], again.tensors[0])
    seen = {image.numpy().tobytes() for image in train.tensors[0]}
    assert not any(image.numpy().tobytes() in seen for image in test.tensors[0])


def test_param_groups_part_head_from_scores(common):
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 2), "fc": torch.nn.Linear(2, 2)})
    model["body"].bias.requires_grad_(False)
    groups = common.param_groups(model, 20.0, 0.1, head="fc")
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(1, 20.0), (2, 0.1)]


def test_fit_stops_at_a_loss_that_is_not_finite(common):
    model = torch.nn.Linear(2, 2)
    loader = [(torch.full((4, 2), float("nan")), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(FloatingPointError, match="the loss is nan after 0 images; lower the rates"):
        common.fit(model, loader, 1, torch.optim.SGD(model.parameters(), lr=0.1))
