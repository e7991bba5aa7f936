# SPDX-License-Identifier: Apache-2.0
"""Processes on several machines, each with a disk of its own: they start from the same, or end, all of them."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from smn_peft.training import run
from smn_peft.training.checkpoint import list_checkpoints
from tests.gloo import join_group, run_processes

from .tiny import tiny_arguments


def resumed(arguments, folders):
    """What each process is told, and what it says; none may wait for another."""
    join_group()
    mine = replace(arguments, output_dir=folders[dist.get_rank()])
    try:
        said = f"{run(mine, evaluate=False).steps} steps"
    except (ValueError, RuntimeError) as error:
        said = str(error)
    return {"said": torch.tensor(list(said.encode()), dtype=torch.uint8)}


def said_by_both(tmp_path, arguments, folders, number):
    (group := tmp_path / f"group{number}").mkdir()
    found = run_processes(resumed, 2, group, arguments, [str(folder) for folder in folders])
    return [bytes(each["said"].tolist()).decode() for each in found]


def test_who_would_start_from_another_checkpoint_ends_the_run(tmp_path):
    arguments = tiny_arguments(tmp_path, epochs=1, keep_checkpoints=1, checkpoint_every=2)
    torch.set_num_threads(1)
    run(arguments, evaluate=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    whole = tmp_path / "out"
    (whole / "run.json").unlink()
    going_on = replace(arguments, resume=True, epochs=1)
    empty, other, copy = (tmp_path / name for name in ("empty", "other", "copy"))
    shutil.copytree(whole, other)
    shutil.copytree(whole, copy)
    state = next(iter(list_checkpoints(other))) / "trainer_state.json"
    state.write_text(state.read_text() + "\n")  # the same step, written by another run
    for number, (first, second) in enumerate([(whole, empty), (empty, whole), (whole, other)]):
        for folder in (first, second):
            (folder / "run.json").unlink(missing_ok=True)
        main, one = said_by_both(tmp_path, going_on, (first, second), number)
        wanted = f"in {first}, and process 1 on"
        assert wanted in main
        assert wanted in one
        assert f"in {second}: put output_dir on a disk that all share" in one
        assert main.startswith("Another process cannot go on, so this one ends too. process 1 on")
    assert said_by_both(tmp_path, going_on, (whole, copy), 3) == ["4 steps", "4 steps"]


def test_what_fails_on_one_process_fails_on_both(tmp_path):
    arguments = tiny_arguments(tmp_path, max_steps=1)
    torch.set_num_threads(1)
    run(arguments, evaluate=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    folders = [tmp_path / "out", tmp_path / "copy"]
    (folders[0] / "run.json").unlink()
    shutil.copytree(*folders)
    for damaged in (0, 1):
        file = list_checkpoints(folders[damaged])[0] / "optimizer.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        said = said_by_both(tmp_path, replace(arguments, resume=True), folders, damaged)
        file.write_bytes(whole)
        assert said[damaged].startswith(os.fspath(file.parent))
        assert "optimizer.safetensors is not what was" in said[damaged]
        other = said[1 - damaged]
        assert other.startswith(f"Another process cannot go on, so this one ends too. process {damaged} on")
