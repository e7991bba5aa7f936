# SPDX-License-Identifier: Apache-2.0
"""Labels and indices are whole numbers, or an error: none becomes another one on the way to int64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from smn_peft.functional.features import whole_numbers

NEAR_ONE = 1 - 1e-9


@pytest.mark.parametrize(
    "values",
    [
        [0, 1, 2],
        [0.0, 1.0, 2.0],
        np.array([0, 1, 2], np.uint8),
        np.array([0, 1, 2], np.uint64),
        np.array([0, 1, 2], ">i4"),
        np.array([0, 1, 2], np.float64),
        np.array([0, 1, 2], np.float16),
        torch.tensor([0, 1, 2], dtype=torch.int32),
        torch.tensor([0.0, 1.0, 2.0], dtype=torch.bfloat16),
    ],
)
def test_whole_numbers_of_every_type_are_taken(values):
    found = whole_numbers(values, "here")
    assert found.dtype == torch.int64
    assert found.tolist() == [0, 1, 2]


def test_flags_numbers_and_nothing():
    assert whole_numbers(np.array([True, False]), "here").tolist() == [1, 0]
    assert int(whole_numbers(3, "here")) == 3
    assert whole_numbers([], "here").tolist() == []
    assert whole_numbers(torch.tensor([2**53 + 1]), "here").tolist() == [2**53 + 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, NEAR_ONE], r"here: label 0\.999999999 \(number 1\) is no whole number"),
        (np.array([NEAR_ONE]), "is no whole number"),
        (torch.tensor([1.5]), r"label 1\.5 \(number 0\)"),
        (np.array([0, np.nan]), r"label nan \(number 1\)"),
        (np.array([np.inf]), "label inf"),
        (np.array([1e300]), "is no whole number"),
        (np.array([2**63], np.uint64), r"label 9223372036854775808 \(number 0\)"),
        (np.array(["1", "2"]), r"every label must be a whole number: they are <U1"),
        (np.array([1, None], dtype=object), "they are object"),
        ([[1], [2, 3]], "every label must be a whole number"),
        (np.array([1 + 2j]), "they are complex128"),
    ],
)
def test_anything_else_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        whole_numbers(values, "here")
