# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder: the second is told who is there, and what a killed run held is taken over."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

import pytest
from accelerate.state import AcceleratorState

from smn_peft.training import FolderInUse, run, run_many
from smn_peft.training.run import claim
from tests.processes import context, leave_the_test

from .tiny import tiny_arguments


def hold(folder):
    leave_the_test()
    with claim(folder):
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
    with pytest.raises(RuntimeError, match=rf"out is in use by process {process.pid} on .*: wait"):
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
        claim(tmp_path),
        pytest.raises(RuntimeError, match=f"in use by process {os.getpid()} "),
        claim(tmp_path),
    ):
        pass
    with pytest.raises(KeyError), claim(tmp_path):
        raise KeyError
    with claim(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".run.lock"]
    assert os.listdir(tmp_path) == []


def hold_elsewhere(folder):
    leave_the_test()
    socket.gethostname = lambda: "elsewhere"
    sys.modules[claim.__module__].LEASE = 0.5
    with claim(folder):
        (folder / "held").touch()
        time.sleep(60)


def test_another_machine_keeps_a_folder_while_it_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[claim.__module__], "LEASE", 0.5)
    process = context().Process(target=hold_elsewhere, args=(tmp_path,))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    time.sleep(1.0)
    with pytest.raises(FolderInUse, match=f"process {process.pid} on elsewhere"), claim(tmp_path):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with pytest.raises(FolderInUse), claim(tmp_path):  # it may only be slow
        pass
    time.sleep(0.5)
    with claim(tmp_path):
        pass


def test_jobs_share_tasks(tmp_path):
    tasks = {name: tiny_arguments(tmp_path, epochs=1, output_dir=str(tmp_path / name)) for name in ("a", "b")}
    with claim(tmp_path / "a"):
        found = dict(run_many(tasks))
    assert isinstance(found["a"], FolderInUse)
    assert os.listdir(tmp_path / "a") == []
    again = dict(run_many(tasks))
    assert (again["a"].steps, again["b"]) == (found["b"].steps, found["b"])
    AcceleratorState._reset_state(reset_partial_state=True)
