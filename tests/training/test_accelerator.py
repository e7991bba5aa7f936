# SPDX-License-Identifier: Apache-2.0
"""The accelerator of a run: processes that would train side by side into one folder are refused."""

from __future__ import annotations

import pytest

from smn_peft.training.processes import build_accelerator

from .helpers import loop


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # and no LOCAL_RANK: accelerate takes this process for the only one
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match=r"2 processes were started \(WORLD_SIZE\), but accelerate has 1 .*--cpu"):
        build_accelerator(loop(tmp_path, cpu=False))


@pytest.mark.parametrize("size", [None, "1"])
def test_a_process_alone_is_not(tmp_path, monkeypatch, size):
    if size is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert build_accelerator(loop(tmp_path, cpu=False)).num_processes == 1
