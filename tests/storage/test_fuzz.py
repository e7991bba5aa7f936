# SPDX-License-Identifier: Apache-2.0
"""A short run of `tests/fuzz/fuzz_codec.py`: no finding, no hang, no memory."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "fuzz" / "fuzz_codec.py"


@pytest.mark.slow
def test_fuzzing_the_readers_of_coded_masks_finds_nothing(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as for a script
    spec = importlib.util.spec_from_file_location("fuzz_codec", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    log = module.fuzz(seconds=30)
    print({**log, "findings": len(log["findings"])})
    assert log["findings"] == []
    assert log["executions"] > 1000
    assert log["slowest_s"] < 10
    assert log["grown_kb"] < 100_000
