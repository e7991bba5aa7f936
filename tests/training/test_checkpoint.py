# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: round trip to the bit, whole or not at all, and clear about what does not fit."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from smn_peft.training import checkpoint
from smn_peft.training.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    read_checkpoint,
    read_state,
    restore,
    save_checkpoint,
)


def stepped(optimizer_class, seed=0, **kwargs):
    """Two parameters after three optimizer steps, and the optimizer."""
    torch.manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(4))]
    optimizer = optimizer_class(
        [{"params": [p], "peak_lr": 0.1, "name": str(i)} for i, p in enumerate(parameters)], **kwargs
    )
    for _ in range(3):
        advance(parameters, optimizer)
    return parameters, optimizer


def advance(parameters, optimizer):
    optimizer.zero_grad()
    (parameters[0].sin() @ parameters[1]).sum().backward()
    optimizer.step()


def load_checkpoint(path, tensors, optimizer):
    state, read = read_checkpoint(path)
    restore(path, state, read, tensors, optimizer)
    return state


def named(parameters):
    return {f"p{i}": parameter for i, parameter in enumerate(parameters)}


@pytest.mark.parametrize("text", ['{"step": 3', "[]", '{"param_groups": []}'])
def test_damaged_facts_are_named(tmp_path, text):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text(text)
    optimizer = torch.optim.SGD([torch.zeros(2)])
    for read in (read_state, lambda path: load_checkpoint(path, {}, optimizer)):
        with pytest.raises(ValueError, match=r"checkpoint-3 is damaged: .*Delete it; .* the run starts anew"):
            read(tmp_path / "checkpoint-3")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.AdamW, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1}),
    ],
)
def test_a_resumed_optimizer_takes_the_same_steps(tmp_path, kind, options):
    parameters, optimizer = stepped(kind, **options)
    save_checkpoint(tmp_path, 3, named(parameters), optimizer.state_dict(), {"facts": {"a": 1}}, keep=1)
    other, resumed = stepped(kind, seed=1, **options)
    state = load_checkpoint(tmp_path / "checkpoint-3", named(other), resumed)
    assert state["step"] == 3
    assert state["facts"] == {"a": 1}
    for _ in range(4):
        advance(parameters, optimizer)
        advance(other, resumed)
    assert all(torch.equal(a, b) for a, b in zip(parameters, other, strict=True))
    assert [group["peak_lr"] for group in resumed.param_groups] == [0.1, 0.1]


def test_only_the_newest_stay_and_strangers_are_left_alone(tmp_path):
    parameters, optimizer = stepped(torch.optim.SGD, lr=0.1)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").mkdir()  # without its state: not complete
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, named(parameters), optimizer.state_dict(), {}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]
    assert latest_checkpoint(tmp_path).name == "checkpoint-10"
    assert (tmp_path / "checkpoint-best").is_dir()
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_a_full_disk_leaves_the_older_checkpoint_and_says_so(tmp_path, monkeypatch):
    parameters, optimizer = stepped(torch.optim.SGD, lr=0.1)
    save_checkpoint(tmp_path, 1, named(parameters), optimizer.state_dict(), {}, keep=1)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        OSError, match=r"checkpoint-2: No space left on device\. checkpoint-1 is whole: free some space"
    ):
        save_checkpoint(tmp_path, 2, named(parameters), optimizer.state_dict(), {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    load_checkpoint(tmp_path / "checkpoint-1", named(parameters), optimizer)


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_written(tmp_path):
    parameters, optimizer = stepped(torch.optim.SGD, lr=0.1)
    save_checkpoint(tmp_path, 1, named(parameters), optimizer.state_dict(), {}, keep=1)
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(ValueError, match=r"another model or objective: 1 tensors are on one side only, such as p1"):
        load_checkpoint(tmp_path / "checkpoint-1", {"p0": parameters[0]}, optimizer)
    with pytest.raises(ValueError, match=r"p1 has shape \(4,\), the model's has \(5,\)"):
        load_checkpoint(tmp_path / "checkpoint-1", {"p0": parameters[0], "p1": torch.zeros(5)}, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer_state.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    parameters, optimizer = stepped(torch.optim.SGD, lr=0.1, momentum=0.9)
    path = save_checkpoint(tmp_path, 1, named(parameters), optimizer.state_dict(), {}, keep=1)
    (path / name).write_bytes((path / name).read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"checkpoint-1 is damaged: .*Delete it"):
        load_checkpoint(path, named(parameters), optimizer)


def test_nothing_in_a_checkpoint_is_pickled(tmp_path):
    parameters, optimizer = stepped(torch.optim.AdamW, lr=0.1)
    path = save_checkpoint(tmp_path, 1, named(parameters), optimizer.state_dict(), {}, keep=1)
    assert sorted(p.name for p in path.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "trainer_state.json",
    ]
    assert json.loads((path / "trainer_state.json").read_text())["step"] == 1


def test_what_a_killed_process_left_is_cleared_away_and_others_may_read(tmp_path):
    parameters, optimizer = stepped(torch.optim.SGD, lr=0.1)
    (tmp_path / ".checkpoint-1").mkdir()
    (tmp_path / ".checkpoint-1" / "model.safetensors").write_bytes(b"half")
    before = os.umask(0o022)
    try:
        path = save_checkpoint(tmp_path, 2, named(parameters), optimizer.state_dict(), {}, keep=1)
    finally:
        os.umask(before)
    assert [found.name for found in tmp_path.iterdir()] == ["checkpoint-2"]
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer_state.json"])
def test_one_flipped_bit_is_refused_and_the_file_and_the_older_checkpoint_are_named(tmp_path, name):
    parameters, optimizer = stepped(torch.optim.SGD, lr=0.1, momentum=0.9)
    for step in (9, 10):
        save_checkpoint(tmp_path, step, named(parameters), optimizer.state_dict(), {"facts": {"a": 1}}, keep=2)
    load_checkpoint(tmp_path / "checkpoint-10", named(parameters), optimizer)
    before = [parameter.clone() for parameter in parameters]
    file = tmp_path / "checkpoint-10" / name
    data = bytearray(file.read_bytes())
    place = data.index(b'"lr": 0.1') + 8 if name.endswith(".json") else len(data) - 3  # still JSON, still safetensors
    data[place] ^= 1
    file.write_bytes(data)
    wanted = rf"checkpoint-10 is damaged: {name} is not what was written.*Delete it; checkpoint-9, the one before,"
    with pytest.raises(ValueError, match=wanted):
        load_checkpoint(tmp_path / "checkpoint-10", named(parameters), optimizer)
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    load_checkpoint(tmp_path / "checkpoint-9", named(parameters), optimizer)
