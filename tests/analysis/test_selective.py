# SPDX-License-Identifier: Apache-2.0
"""Selective masking: runs of one share are averaged, lines rise in the share."""

from __future__ import annotations

import pytest

from smn_peft.analysis import SelectiveRow, plot_selective, selective_series


def test_series_and_plot(tmp_path):
    rows = [
        SelectiveRow("random", 0.5, 0.9),
        SelectiveRow("random", 0.01, 0.6),
        SelectiveRow("random", 0.01, 0.7),
        SelectiveRow("random", 0.5, 0.8),
        SelectiveRow("first stages", 0.009, 0.79),
    ]
    random, stages = selective_series(rows)
    assert (random.x, random.y) == ((1.0, 50.0), pytest.approx((65.0, 85.0)))
    assert random.spread == pytest.approx((10 / 2**0.5,) * 2)
    assert (stages.y, stages.spread) == ((79.0,), ())
    plot_selective([random, stages], tmp_path / "a.svg", frozen=0.5)
    text = (tmp_path / "a.svg").read_text("utf-8")
    for shown in ("random", "first stages", "frozen base", "weights that a mask may touch (%)", "k-NN accuracy (%)"):
        assert f">{shown}</text>" in text
