# SPDX-License-Identifier: Apache-2.0
"""PEFT's own tests of custom models, run on mask adapters; `python -m tests.peft_suite` runs all of them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .cases import LEFT_OUT, reason_to_leave_out
from .runner import download, run


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The file that PEFT_SDIST names, or what pip downloads."""
    if name := os.environ.get("PEFT_SDIST"):
        return Path(name).resolve()
    try:
        return download(tmp_path_factory.mktemp("sdist"))
    except (subprocess.CalledProcessError, StopIteration):
        pytest.skip("PEFT_SDIST is unset, and pip cannot download PEFT's source distribution")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_peft_s_own_tests_hold_for_masks(sdist):
    assert run(["test_custom_models.py"], sdist, ["--timeout=120", "-p", "no:cacheprovider"]) == 0


def test_what_is_left_out_has_a_reason():
    assert all(len(reason) > 30 for _, reason in LEFT_OUT)
    assert reason_to_leave_out("TestPeftCustomModel.test_save_pretrained[MLP 1 SMN]") is not None
    assert reason_to_leave_out("TestPeftCustomModel.test_save_load_roundtrip[MLP 1 SMN]") is None
    assert reason_to_leave_out("TestPeftCustomModel.test_adapter_dtype_autocast[True-True-dtype0-MLP 1 SMN]") is None
