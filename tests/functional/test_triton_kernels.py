# SPDX-License-Identifier: Apache-2.0
"""Kernels are used where they can be; where not, the user learns it, unless Triton is just not there."""

from __future__ import annotations

import warnings

import pytest

from smn_peft.functional.triton_kernels import usable


def test_what_loads_is_used():
    kernels = object()
    assert usable(lambda: kernels, "this") is kernels


def test_a_missing_triton_is_nothing_to_speak_of():
    def load() -> None:
        raise ImportError("No module named 'triton'")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert usable(load, "this") is None


def test_kernels_that_fail_are_named():
    def load() -> None:
        raise RuntimeError("Failed to find C compiler")

    with pytest.warns(UserWarning, match="cannot compile this, torch's passes are slower: Failed to find C compiler"):
        assert usable(load, "this") is None
