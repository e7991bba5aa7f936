# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl: readable at any moment, and cut back to where a resumed run starts."""

from __future__ import annotations

import json
import math

from smn_peft.training.metrics import MetricsLog, read_metrics


def test_lines_are_json_and_nan_is_null(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "loss": 0.5, "density": None})
    log.write({"step": 2, "loss": math.nan, "density": 0.9})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5, "density": None}, {"step": 2, "loss": None, "density": 0.9}]


def test_a_resumed_run_cuts_off_what_it_will_do_again(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(1, 6):
        log.write({"step": step, "loss": float(step)})
    MetricsLog(tmp_path, from_step=3).write({"step": 4, "loss": -4.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, -4.0),
    ]


def test_a_new_run_starts_an_empty_file(tmp_path):
    MetricsLog(tmp_path).write({"step": 1, "loss": 1.0})
    MetricsLog(tmp_path)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_line_that_a_crash_cut_short_is_passed_over(tmp_path):
    MetricsLog(tmp_path).write({"step": 1, "loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]
