# SPDX-License-Identifier: Apache-2.0
"""Processes on several machines, each with a disk of its own: they start from the same, or end, all of them."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from smn_peft.training import run, run_many
from smn_peft.training.checkpoint import list_checkpoints
from tests.gloo import join_group, run_processes

from .tiny import tiny_arguments


def resumed(arguments, folders):
    """What each process is told, and what it says; none may wait for another."""
    join_group()
    mine = replace(arguments, output_dir=folders[dist.get_rank()])
    try:
        said = f"{run(mine, evaluate=False).steps} steps"
    except (ValueError, RuntimeError, OSError) as error:
        said = str(error)
    return {"said": torch.tensor(list(said.encode()), dtype=torch.uint8)}


def done(arguments, folders):
    """Steps of the tasks that a process is told of, where only the first has the finished run on its disk."""
    join_group()
    tasks = run_many({"a": replace(arguments, output_dir=folders[dist.get_rank()])})
    return {"steps": torch.tensor([summary.steps for _, summary in tasks])}


def said_by_both(tmp_path, arguments, folders, number):
    (group := tmp_path / f"group{number}").mkdir()
    found = run_processes(resumed, 2, group, arguments, [str(folder) for folder in folders])
    return [bytes(each["said"].tolist()).decode() for each in found]


def test_a_process_without_the_checkpoint_takes_it_from_the_main_process(tmp_path):
    """Two machines with a disk each, killed after two of four steps, end where a run that was not killed ends."""
    options = {"keep_best": 0.3, "evaluate_every": 1, "optimizer": "adamw", "lr": 0.1, "head": "probe"}
    arguments = tiny_arguments(tmp_path, epochs=2, keep_checkpoints=9, checkpoint_every=1, batch_size=8, **options)
    torch.set_num_threads(1)
    whole, main, other = (tmp_path / name for name in ("whole", "main", "other"))
    (steps,) = {*said_by_both(tmp_path, arguments, (whole, whole), 0)}
    main.mkdir()
    part = list_checkpoints(whole)[3]
    shutil.copytree(part, main / part.name)
    going_on = replace(arguments, resume=True)
    assert said_by_both(tmp_path, going_on, (main, other), 1) == [steps, steps]
    ends = [list_checkpoints(folder)[-1] for folder in (whole, main)]
    assert ends[0].name == ends[1].name > part.name
    for name in ("model.safetensors", "optimizer.safetensors", "best.safetensors"):
        first, second = (load_file(end / name) for end in ends)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    assert not list_checkpoints(other)


def test_who_has_another_checkpoint_ends_the_run(tmp_path):
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
    for number, (first, second) in enumerate([(empty, whole), (whole, other)]):
        main, one = said_by_both(tmp_path, going_on, (first, second), number)
        wanted = f"in {first}, and process 1 on"
        assert wanted in main
        assert wanted in one
        assert f"in {second}: delete what is left of another run, or put output_dir on a disk that all share" in one
        assert main.startswith("Another process cannot go on, so this one ends too. process 1 on")
    assert said_by_both(tmp_path, going_on, (whole, copy), 3) == ["4 steps", "4 steps"]


def test_only_the_main_process_knows_which_tasks_are_done(tmp_path):
    arguments = tiny_arguments(tmp_path, max_steps=1)
    torch.set_num_threads(1)
    run(arguments, evaluate=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    found = run_processes(done, 2, tmp_path, arguments, [str(tmp_path / "out"), str(tmp_path / "nothing")])
    assert [each["steps"].tolist() for each in found] == [[1], [1]]
    assert not (tmp_path / "nothing").exists()


def test_what_fails_on_one_process_fails_on_both(tmp_path):
    arguments = tiny_arguments(tmp_path, max_steps=1)
    torch.set_num_threads(1)
    run(arguments, evaluate=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    folders = [tmp_path / "out", tmp_path / "other"]
    (folders[0] / "run.json").unlink()
    file = list_checkpoints(folders[0])[0] / "optimizer.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    main, other = said_by_both(tmp_path, replace(arguments, resume=True), folders, 0)
    file.write_bytes(whole)
    assert main.startswith(os.fspath(file.parent))
    assert "optimizer.safetensors is not what was" in main
    assert other.startswith("Another process cannot go on, so this one ends too. process 0 on")
    assert not folders[1].exists()  # the main process alone writes
    folders[1].mkdir()
    (folders[1] / "adapter_config.json").write_text("{}")
    main, other = said_by_both(tmp_path, replace(arguments, resume=True), folders, 1)
    assert main.startswith("Another process cannot go on, so this one ends too. process 1 on")
    assert str(folders[1]) in other
