# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder: the second is told who is there, and a run that was killed leaves nothing behind."""

from __future__ import annotations

import os
import platform
import signal
import time

import pytest
from accelerate.state import AcceleratorState

from smn_peft.training import run
from smn_peft.training.run import run_lock
from tests.processes import context, leave_the_test

from .tiny import tiny_arguments


def hold(folder):
    leave_the_test()
    with run_lock(folder):
        if os.fork() == 0:  # a worker, which outlives it
            time.sleep(30)
            os._exit(0)
        (folder / "held").touch()
        time.sleep(60)


def test_the_second_run_is_told_who_is_there_and_kill_9_gives_the_folder_back(tmp_path):
    arguments = tiny_arguments(tmp_path, epochs=1)
    out = tmp_path / "out"
    out.mkdir()
    process = context().Process(target=hold, args=(out,))
    process.start()
    while not (out / "held").exists():
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match=rf"out is in use by process {process.pid} on {platform.node()}: wait"):
        run(arguments)
    assert not (out / "metrics.jsonl").exists()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (out / "held").unlink()
    AcceleratorState._reset_state(reset_partial_state=True)
    run(arguments)
    assert not list(out.glob(".run*"))
    AcceleratorState._reset_state(reset_partial_state=True)


def test_in_one_process_too_and_after_an_error_it_is_free(tmp_path):
    with (
        run_lock(tmp_path),
        pytest.raises(RuntimeError, match=f"in use by process {os.getpid()} "),
        run_lock(tmp_path),
    ):
        pass
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError
    with run_lock(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".run.lock"]
    assert os.listdir(tmp_path) == []
