# SPDX-License-Identifier: Apache-2.0
"""The quickstart's promises: what its record shows, that README.md shows the record, and a whole run of it."""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
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
CONTROL, FULL, MASK, PAPER, SWAV_CONTROL, SWAV = range(6)


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of examples/ as a script there would; afterwards none of them stays known by its short name."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield importlib.import_module
    for path in (ROOT / "examples").glob("*.py"):
        if path.stem not in before:
            sys.modules.pop(path.stem, None)


@pytest.fixture(scope="module")
def pretrained(example, tmp_path_factory) -> Path:
    """A folder with the base after one epoch."""
    folder = tmp_path_factory.mktemp("pretrained")
    example("quickstart_training").pretrain(folder, epochs=1)
    return folder


@pytest.fixture
def folder(pretrained, tmp_path) -> Path:
    """A folder of one's own with that base."""
    shutil.copytree(pretrained / "base", tmp_path / "base")
    return tmp_path


@pytest.fixture
def report(example) -> ModuleType:
    return example("quickstart_report")


@pytest.fixture
def common(example) -> ModuleType:
    return example("common")


@pytest.fixture
def record() -> dict:
    return json.loads(RECORD.read_text("utf-8"))


def keeps_its_promises(record: dict) -> None:
    rows, frozen = record["rows"], record["frozen"]
    means = [statistics.mean(row.get("accuracy") or row["knn"]) for row in rows]
    for mask, gap in ((MASK, 0.02), (PAPER, 0.01)):
        assert means[mask] >= means[FULL] - gap
        assert means[mask] >= frozen["knn"] + 0.1
        assert means[mask] > max(frozen["probe"], means[CONTROL]), "a new head and new statistics do as well"
    assert means[SWAV] >= frozen["knn"] + 0.05, "SwAV teaches the features nothing"
    assert means[SWAV] >= means[SWAV_CONTROL] + 0.05, "new statistics do as well"
    assert statistics.mean(rows[SWAV]["probe"]) >= frozen["probe"] - 0.01
    assert record["reload_identical"] is True
    assert [len(row["cpu_seconds"]) for row in rows] == [3] * 6
    assert record["cpu_seconds"] < 240
    size = rows[PAPER]["bytes"]
    assert size["statistics"] > rows[MASK]["bytes"]["statistics"] == 0
    assert size["mask"] + size["head"] + size["statistics"] <= size["total"]
    assert rows[SWAV]["bytes"]["head"] == 0
    assert size["total"] < rows[FULL]["bytes"]["total"] / 20


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
    assert "DID NOT GIVE THE SAME OUTPUTS" in failed


def test_a_loss_is_said_as_a_loss(report, record):
    rows = [{**row, "knn": [0.5]} if row["method"] == "SwAV, mask" else row for row in record["rows"]]
    text = report.render({**record, "rows": rows, "frozen": {**record["frozen"], "knn": 0.6}})
    assert "k-NN on the features goes from 60.0 % to 50.0 % (-10.0 points)" in text


@pytest.mark.filterwarnings("ignore:The linear probe")
@pytest.mark.parametrize(
    ("label", "name", "words"),
    [
        ("mask, the defaults", "frozen", "2000 logits"),
        ("SwAV, mask", "swav", "51200 features"),
    ],
)
def test_the_check_of_the_reloaded_masks_can_fail(example, label, name, words, capsys, folder, monkeypatch):
    quickstart = example("quickstart")
    training = example("quickstart_training")
    # What the probe finds is not looked at here, and after one epoch it takes longest.
    monkeypatch.setattr(training, "linear_probe", functools.partial(training.linear_probe, max_iterations=10))
    row = quickstart.run(label, folder, epochs=1, seeds=1)
    assert row["bytes"]["mask"] > 0
    assert quickstart.verify(folder)
    saved = folder / f"mask-{name}/outputs.safetensors"
    ((kind, outputs),) = load_file(saved).items()
    outputs[7, 1] = torch.nextafter(outputs[7, 1], torch.tensor(9.0))
    save_file({kind: outputs}, saved)
    assert not quickstart.verify(folder)
    assert f"{words} NOT identical" in capsys.readouterr().out


def test_verifying_nothing_is_no_success(example, tmp_path):
    assert not example("quickstart").verify(tmp_path)


def test_the_control_has_all_but_the_mask(example, folder):
    training, methods = example("quickstart_training"), example("quickstart_methods").METHODS
    train = training.digits(training.NEW)[0].subset(range(128))
    before = training.load(folder / "base", head=False).state_dict()
    model, log = training.adapt(methods["SwAV, statistics adapt"], folder, train, epochs=1, seed=0)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert log["density"] is None
    assert moved
    assert all("running_" in name or name.endswith("num_batches_tracked") for name in moved)


def test_swav_learns_the_same_mask_where_there_are_no_labels(example, folder):
    training, methods = example("quickstart_training"), example("quickstart_methods").METHODS
    train = training.digits(training.NEW)[0].subset(range(128))
    parts = (train, train.without_labels())
    models = [training.adapt(methods["SwAV, mask"], folder, part, epochs=1, seed=0)[0] for part in parts]
    states = [model.state_dict() for model in models]
    assert models[0].density() < 1
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_digits_are_split_without_overlap(common):
    train, test = common.digits(range(5, 10))
    assert (len(train), len(test)) == (496, 400)
    assert train[0]["image"].shape == (3, 32, 32)
    assert train[0]["image"].dtype == torch.uint8
    assert train.classes == ["5", "6", "7", "8", "9"]
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(5))
    again = common.digits(range(5, 10))[1]
    assert all(torch.equal(test[i]["image"], again[i]["image"]) for i in range(len(test)))
    seen = {train[i]["image"].contiguous().numpy().tobytes() for i in range(len(train))}
    assert not any(test[i]["image"].contiguous().numpy().tobytes() in seen for i in range(len(test)))
