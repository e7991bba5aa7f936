# SPDX-License-Identifier: Apache-2.0
"""The file of the benchmarks: rows are added one by one, replaced by key, and what is no such file is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch


@pytest.fixture
def path(tmp_path):
    return tmp_path / "outputs" / "bench.json"


def test_rounds_become_median_and_quartiles(scripts, path):
    recorder = scripts.recording.Recorder("training", path=path)
    assert recorder.add("mine / its", "resnet18", [1.0, 5.0, 2.0, 4.0, 3.0], target=1.1) == 3.0
    (row,) = json.loads(path.read_text())["rows"]
    facts = row.pop("machine")
    assert row == {
        "benchmark": "training",
        "what": "mine / its",
        "name": "resnet18",
        "value": 3.0,
        "low": 2.0,
        "high": 4.0,
        "unit": "ratio",
        "better": "lower",
        "target": 1.1,
    }
    assert facts.keys() == {"cpu", "vectors", "cores", "threads", "torch", "device"}
    assert facts["threads"] == torch.get_num_threads()
    assert all(facts.values())


def test_one_number_has_no_quartiles_unless_it_is_exact(scripts, path):
    recorder = scripts.recording.Recorder("codec", path=path)
    recorder.add("decode", "masks", [500.0], unit="Mbit/s", better="higher")
    recorder.add("size / entropy", "masks", 1.0123456789, exact=True)
    one, sized = scripts.recording.load(path)
    assert (one.low, one.high, one.exact) == (None, None, False)
    assert (sized.low, sized.value, sized.high, sized.exact) == (1.01235, 1.01235, 1.01235, True)


def test_a_row_takes_the_place_of_its_key_and_leaves_the_others(scripts, path):
    for benchmark, value in (("training", 1.0), ("bank", 2.0), ("training", 3.0)):
        scripts.recording.Recorder(benchmark, path=path).add("mine / its", "resnet18", value)
    assert [(row.benchmark, row.value) for row in scripts.recording.load(path)] == [("training", 3.0), ("bank", 2.0)]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_variable_names_the_file_and_without_it_none_is_written(scripts, path, monkeypatch, tmp_path):
    monkeypatch.setenv("BENCH_JSON", str(path))
    scripts.recording.Recorder("training").add("mine / its", "resnet18", 1.0)
    assert len(scripts.recording.load(path)) == 1
    monkeypatch.delenv("BENCH_JSON")
    assert scripts.recording.Recorder("training").add("mine / its", "vit_tiny", 1.0) == 1.0
    assert len(scripts.recording.load(path)) == 1


def test_what_cannot_be_recorded_is_said(scripts, path):
    recorder = scripts.recording.Recorder("training", path=path)
    with pytest.raises(ValueError, match=r"resnet18.*not finite"):
        recorder.add("mine / its", "resnet18", [1.0, math.nan, 1.0])
    recorder.add("mine / its", "resnet18", 1.0)
    with pytest.raises(ValueError, match=r"resnet18.*recorded before: give its case another name"):
        recorder.add("mine / its", "resnet18", 1.0)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"value": 1}]}'])
def test_another_file_is_refused(scripts, path, text):
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bench\.json is not what the benchmarks write .*delete it"):
        scripts.recording.load(path)


@pytest.mark.parametrize(
    ("better", "target", "misses"),
    [
        ("lower", 1.0, False),
        ("lower", 0.9, True),
        ("higher", 1.0, False),
        ("higher", 1.1, True),
        ("lower", None, False),
    ],
)
def test_a_target_is_missed_on_its_worse_side(row, better, target, misses):
    assert row(1.0, better=better, target=target).misses == misses
