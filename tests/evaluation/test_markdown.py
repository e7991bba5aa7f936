# SPDX-License-Identifier: Apache-2.0
"""Markdown tables, cell by cell."""

from __future__ import annotations

import pytest

from smn_peft.evaluation import format_fraction, markdown_table


def test_columns_are_padded_and_numbers_set_right():
    rows = [{"method": "k-NN", "top-1 %": "9.5"}, {"method": "probe | L2", "top-1 %": "10.0"}]
    assert markdown_table(rows).splitlines() == [
        "| method      | top-1 % |",
        "| ----------- | ------: |",
        "| k-NN        |     9.5 |",
        "| probe \\| L2 |    10.0 |",
    ]


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="A table needs at least one row"):
        markdown_table([])


def test_fractions_in_percent():
    assert format_fraction(0.92149) == "92.1"
    assert format_fraction(0.92149, 0.00512) == "92.1 ± 0.5"
    assert format_fraction(1, 0) == "100.0 ± 0.0"
