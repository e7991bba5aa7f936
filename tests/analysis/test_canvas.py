# SPDX-License-Identifier: Apache-2.0
"""The canvas writes whole pictures that are white, and nothing after an error."""

from __future__ import annotations

import matplotlib
import pytest
from PIL import Image

from smn_peft.analysis.plots import canvas


def test_a_picture_is_white_and_the_users_settings_stay(tmp_path):
    before = dict(matplotlib.rcParams)
    with canvas(tmp_path / "new" / "a.png", columns=2) as axes:
        assert len(axes) == 2
        axes[0].plot([0, 1], [0, 1], label="line")
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
    assert dict(matplotlib.rcParams) == before


def test_nothing_is_left_of_a_plot_that_fails(tmp_path):
    with pytest.raises(RuntimeError, match="half"), canvas(tmp_path / "a.png"):
        raise RuntimeError("half way")
    assert list(tmp_path.iterdir()) == []


def test_the_suffix_names_the_format(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jpeg must end in \.png, \.svg or \.pdf"), canvas(tmp_path / "a.jpeg"):
        pass
