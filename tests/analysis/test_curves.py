# SPDX-License-Identifier: Apache-2.0
"""Curves: means over seeds where all have a value, smoothing, and a plot with its labels."""

from __future__ import annotations

import pytest

from smn_peft.analysis import Series, mean_curve, plot_curves, smooth


def test_the_mean_is_over_what_all_have():
    curve = mean_curve("a", [{1: 1.0, 2: 2.0, 3: 9.0}, {2: 4.0, 1: 1.0}])
    assert (curve.x, curve.y) == ((1, 2), (1.0, 3.0))
    assert curve.spread == (0.0, pytest.approx(2**0.5))
    assert mean_curve("b", [{1: 1.0}]).spread == ()
    for nothing in ([], [{1: 1.0}, {2: 1.0}]):
        with pytest.raises(ValueError, match="'c' have no position in common"):
            mean_curve("c", nothing)


def test_smoothing_is_trailing():
    assert smooth([4.0, 0.0, 2.0, 6.0], 2) == [4.0, 2.0, 1.0, 4.0]
    with pytest.raises(ValueError, match="at least 1; got 0"):
        smooth([1.0], 0)


def test_lengths_must_fit():
    with pytest.raises(ValueError, match="'a' has 2 positions, 1 values and 0 spreads"):
        Series("a", (1, 2), (1,))


def test_a_panel_per_title(tmp_path):
    line = Series("λ = 50", (0, 1, 2), (2.3, 1.0, 0.5), (0.1, 0.1, 0.1))
    plot_curves({"equivalent": [line], "changed": [line, Series("λ = 100", (0, 1), (2.3, 0.7))]}, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text("utf-8")
    for shown in ("equivalent", "changed", "λ = 50", "λ = 100", "optimizer step", "training loss (nats)"):
        assert f">{shown}</text>" in text
