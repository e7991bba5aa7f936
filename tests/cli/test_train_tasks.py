# SPDX-License-Identifier: Apache-2.0
"""`smn train --tasks`: runs in turn are the runs alone, are done once, go on, and do not stop each other."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from smn_peft.cli import app, train
from smn_peft.data import ImageDataset
from smn_peft.evaluation import extract_features
from smn_peft.training import RunSummary, assemble
from tests.training.tiny import write_model, write_npz

runner = CliRunner()


@pytest.fixture
def line(tmp_path) -> list[str]:
    """The options that all tasks share."""
    return [
        "train",
        f"--backbone={write_model(tmp_path)}",
        f"--dataset={write_npz(tmp_path / 'set.npz')}",
        f"--output-dir={tmp_path / 'out'}",
        "--batch-size=12",
        "--max-steps=3",
        "--lr=5",
        "--knn-k=5",
        "--log-every=1",
        "--cpu",
        "--cache-images",
    ]


def tasks_file(tmp_path, text):
    (tmp_path / "tasks.yaml").write_text(text)
    return f"--tasks={tmp_path / 'tasks.yaml'}"


def adapter(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def test_each_task_is_the_run_that_it_would_be_alone_and_is_done_once(line, tmp_path, monkeypatch):
    decoded, cached = [], ImageDataset.cached
    monkeypatch.setattr(ImageDataset, "cached", lambda images: decoded.append(len(images)) or cached(images))
    text = "one: {seed: 1}\nfew: {limit: 24}\ntwo: {seed: 2, mask: {batch_norm: adapt}}\n"
    file = tasks_file(tmp_path, text)
    assert runner.invoke(app, [*line, file, "--part=1/3"]).exit_code == 0
    before = (tmp_path / "out/one/run.json").stat().st_mtime_ns
    del decoded[:]
    result = runner.invoke(app, [*line, file])
    assert result.exit_code == 0, result.output
    assert "two: 3 steps" in result.output
    assert (tmp_path / "out/one/run.json").stat().st_mtime_ns == before
    assert sorted(decoded) == [24, 24, 48]  # test images, the few, training images: once each
    alone = [*line, f"--output-dir={tmp_path / 'alone'}", "--seed=2", "--mask.batch-norm=adapt"]
    assert runner.invoke(app, alone).exit_code == 0
    assert adapter(tmp_path / "out/two") == adapter(tmp_path / "alone")
    assert adapter(tmp_path / "out/one") != adapter(tmp_path / "alone")
    two, same = (RunSummary.load(tmp_path / folder) for folder in ("out/two", "alone"))
    assert (two.before, two.after) == (same.before, same.after)
    changed = runner.invoke(app, [*line, tasks_file(tmp_path, "one: {seed: 3}\n")])
    assert changed.exit_code == 1
    assert "seed" in changed.output


def test_a_task_that_fails_does_not_stop_the_others(line, tmp_path):
    file = tasks_file(tmp_path, "bad: {mask: {init_score: -1.0}}\ngood: {seed: 2}\n")
    result = runner.invoke(app, [*line, file])
    assert result.exit_code == 1
    assert "bad: " in result.output
    assert (tmp_path / "out/good/run.json").is_file()
    assert not (tmp_path / "out/bad/run.json").exists()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("dataset: nowhere.npz", "nowhere.npz does not exist"),
        ("dataset: {cut}, cache_images: false", "row 5: cannot be read as an image"),
        ("objective_options: {{label_smooth: 1}}", "label_smoothing"),
    ],
)
def test_nor_does_one_whose_data_or_options_are_wrong(line, tmp_path, bad, says):
    bad = bad.format(cut=write_npz(tmp_path / "cut.npz", broken=5))
    result = runner.invoke(app, [*line, tasks_file(tmp_path, f"one: {{{bad}}}\ntwo: {{seed: 2, eval_split: null}}\n")])
    assert result.exit_code == 1
    (said,) = (text for text in result.stderr.splitlines() if text.startswith("one: "))
    assert says in said
    assert "two: 3 steps" in result.stdout
    assert (tmp_path / "out/two/run.json").is_file()


def test_a_dry_run_shows_every_plan(line, tmp_path):
    result = runner.invoke(app, [*line, tasks_file(tmp_path, "one: {lr: 7}\ntwo:\n"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "one\nbackbone" in result.output
    assert "learning rates 7 and" in result.output
    assert not (tmp_path / "out/one/run.json").exists()
    result = runner.invoke(app, [*line, tasks_file(tmp_path, "one: {dataset: no.npz}\ntwo:\n"), "--dry-run"])
    assert result.exit_code == 1
    assert "one: no.npz does not exist" in result.stderr
    assert "two\nbackbone" in result.stdout


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("../up: {seed: 1}", "a name is a folder's"),
        ("one: {sede: 1}", "Did you mean seed?"),
        ("one: 3", "must hold a mapping"),
        ("one: {output_dir: x}", "leave it out"),
        ("{}", "holds no task"),
        ("- one", "must hold a mapping"),
        ("one: {seed: 1}\ntwo: {mixed_precision: bf16}", "another mixed_precision"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(line, tmp_path, text, says):
    result = runner.invoke(app, [*line, tasks_file(tmp_path, text)])
    assert result.exit_code != 0
    assert says in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_parts_share_the_tasks(line, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(train, "run_many", lambda tasks: chosen.append(list(tasks)) or [])
    file = tasks_file(tmp_path, "".join(f"t{index}: {{seed: {index}}}\n" for index in range(7)))
    for index in (1, 2, 3):
        assert runner.invoke(app, [*line, file, f"--part={index}/3"]).exit_code == 0
    assert chosen == [["t0", "t3", "t6"], ["t1", "t4"], ["t2", "t5"]]
    for wrong in ("0/3", "4/3", "2", "a/b"):
        assert "--part is I/N with I from 1 to N" in runner.invoke(app, [*line, file, f"--part={wrong}"]).stderr


def test_features_of_the_frozen_base_are_computed_once(line, tmp_path, monkeypatch):
    counted = []
    count = lambda *args, **kwargs: counted.append(len(args[1])) or extract_features(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(assemble, "extract_features", count)
    text = "\n".join(
        [
            "first: {lr: 1}",
            "second: {adapt: full, lr: 0.05}",
            "half: {mask: {mask_type: topk, density: 0.5, init_score: kaiming_uniform}}",  # off for the base
            "other: {seed: 4}",  # its base has other weights, since no file gives them
            "few: {seed: 4, limit: 24}",  # other training images, the same test images
        ]
    )
    line = [*line, "--head=probe"]
    result = runner.invoke(app, [*line, tasks_file(tmp_path, text)])
    assert result.exit_code == 0, result.output
    assert counted == [48, 24, 48, 24] + 2 * [48, 24] + [48, 24, 48, 24] + [24, 24, 24]
    alone = {
        "second": ["--adapt=full", "--lr=0.05"],
        "half": ["--mask.mask-type=topk", "--mask.density=0.5"],
        "other": ["--seed=4"],
    }
    alone["half"].append("--mask.init-score=kaiming_uniform")
    alone["few"] = ["--seed=4", "--limit=24"]
    for name, options in alone.items():
        assert runner.invoke(app, [*line, *options, f"--output-dir={tmp_path / 'alone' / name}"]).exit_code == 0
        shared, same = (RunSummary.load(tmp_path / folder / name) for folder in ("out", "alone"))
        assert (shared.before, shared.after) == (same.before, same.after)


def test_what_goes_on_from_a_checkpoint_is_not_the_frozen_base(line, tmp_path):
    file = tasks_file(tmp_path, "first: {lr: 1}\nsecond: {adapt: full, lr: 0.05}\n")
    assert runner.invoke(app, [*line, file]).exit_code == 0
    done = RunSummary.load(tmp_path / "out/second")
    assert done.after["accuracy"] != done.before["accuracy"]
    for name in ("first", "second"):
        (tmp_path / "out" / name / "run.json").unlink()
    (tmp_path / "out/first/checkpoint-3").rename(tmp_path / "away")
    assert runner.invoke(app, [*line, file]).exit_code == 0
    assert RunSummary.load(tmp_path / "out/second").after == done.after
