# SPDX-License-Identifier: Apache-2.0
"""Low-shot curves from reports: order, spread, table and plot."""

from __future__ import annotations

import pytest

from smn_peft.analysis import low_shot_series, low_shot_table, plot_low_shot
from smn_peft.evaluation import EvalReport


def report(label: str, fraction: float | None, *values: float) -> EvalReport:
    seeds = tuple(range(len(values))) if len(values) > 1 else ()
    settings = {} if fraction is None else {"label_fraction": fraction}
    return EvalReport(label, "cifar10", "test", "accuracy", values, seeds, settings=settings)


REPORTS = [report("probe", 0.1, 0.5, 0.7), report("probe", 0.01, 0.3, 0.3), report("mask", 0.1, 0.8)]


def test_series_rise_in_the_fraction():
    probe, mask = low_shot_series(REPORTS)
    assert (probe.label, probe.x, probe.y) == ("probe", (1.0, 10.0), (30.0, pytest.approx(60.0)))
    assert probe.spread == pytest.approx((0.0, 100 * 0.02**0.5))
    assert (mask.y, mask.spread) == ((80.0,), ())
    with pytest.raises(ValueError, match="'x' has no label_fraction"):
        low_shot_series([report("x", None, 0.5)])


def test_table_and_plot(tmp_path):
    assert low_shot_table(REPORTS).splitlines()[2:] == [
        "| probe  |    60.0 ± 14.1 |    30.0 ± 0.0 |",
        "| mask   |           80.0 |             – |",
    ]
    plot_low_shot(low_shot_series(REPORTS), tmp_path / "a.svg", title="CIFAR-10")
    text = (tmp_path / "a.svg").read_text("utf-8")
    for shown in ("probe", "mask", "CIFAR-10", "labelled training images (%)", "test accuracy (%)", "10", "1"):
        assert f">{shown}</text>" in text
