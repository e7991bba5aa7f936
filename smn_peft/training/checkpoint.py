# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: all that training changes, in safetensors and JSON, written atomically."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..storage.files import to_disk
from .task import TrainingTask

_NAME = re.compile(r"checkpoint-(\d+)$")
_UNFINISHED = ".checkpoint-"
STATE_NAME = "trainer_state.json"
_DIGESTS = "digests"  # in the state: SHA-256 by file name, the state's own over all else that it holds


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Complete checkpoints of a run's folder, oldest first."""
    found = [(int(match[1]), path) for path in Path(folder).glob("checkpoint-*") if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found) if (path / STATE_NAME).is_file()]


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint, or None."""
    return next(reversed(list_checkpoints(folder)), None)


def checkpoint_name(path: Path | None) -> str | None:
    """Step and content of a checkpoint, by which processes with a disk each compare theirs."""
    return None if path is None else f"{path.name} (sha256 {_file_digest(path / STATE_NAME)[:16]})"


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write ``checkpoint-<step>`` under a temporary name, rename it, and only then remove all but the `keep` newest.

    `state` is JSON-compatible. OSError if the disk refuses; older checkpoints are untouched.
    """
    folder = Path(folder)
    final, temporary = folder / f"checkpoint-{step}", folder / f"{_UNFINISHED}{step}"
    inside = optimizer.state_dict()
    entries = ((f"{i}.{name}", value) for i, entry in inside["state"].items() for name, value in entry.items())
    momentum = {name: value for name, value in entries if value is not None}  # None: SGD before its first step
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_UNFINISHED}*"):  # by a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        for part, content in (("model", tensors), ("optimizer", momentum)):
            content = {name: tensor.detach().cpu().contiguous() for name, tensor in content.items()}
            save_file(content, temporary / f"{part}.safetensors")
        # As it is read again: JSON turns tuples into lists.
        facts = json.loads(json.dumps({**state, "step": step, "param_groups": inside["param_groups"]}))
        digests = {path.name: _file_digest(path) for path in sorted(temporary.iterdir())}
        text = json.dumps({**facts, _DIGESTS: {**digests, STATE_NAME: _state_digest(facts)}}, indent=1)
        (temporary / STATE_NAME).write_text(text, "utf-8")
        for path in temporary.iterdir():
            to_disk(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        to_disk(folder)
    except (OSError, SafetensorError) as error:
        older = [old.name for old in list_checkpoints(folder)] if folder.is_dir() else []
        fix = f"{older[-1]} is whole: free some space and go on from it with resume" if older else "free some space"
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(getattr(error, "errno", None), f"Cannot write {final}: {reason}. {fix}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in list_checkpoints(folder)[:-keep]:
        with suppress(OSError):  # one that is left over is no reason to stop
            shutil.rmtree(old)
    return final


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON facts of a checkpoint, with `step`; ValueError if the file is damaged."""
    path = Path(path)
    try:
        state: dict[str, Any] = json.loads((path / STATE_NAME).read_text("utf-8"))
        if missing := sorted({"step", "param_groups", _DIGESTS} - set(state)):
            raise ValueError(f"{STATE_NAME} has no {missing[0]!r}")
        _check_digest(STATE_NAME, state, _state_digest(state))
    except (ValueError, TypeError, AttributeError, FileNotFoundError) as error:
        raise _damaged(path, error) from error
    return state


def load_checkpoint(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Copy a checkpoint's tensors into the live ones, restore the optimizer, and return the facts.

    Nothing is written before everything is compared: ValueError if names or shapes differ, or a file is damaged.
    """
    path = Path(path)
    state = read_state(path)
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in _read(path, "optimizer", state).items():
        index, _, name = key.partition(".")
        entries.setdefault(int(index), {})[name] = value
    _load_tensors(path, state, tensors, "Resume with the arguments that the run was started with.")
    optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})
    # A file has C order only; fused steps want momentum in its parameter's memory format.
    for parameter, own in optimizer.state.items():
        for name, value in own.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                own[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return state


def start_from(task: TrainingTask, folder: str | Path) -> None:
    """Give a task the scores, head, prototypes and statistics of the newest checkpoint in another run's folder.

    Optimizer, step and `Objective.run_state` (SwAV's queue) start anew.
    """
    path = _checkpoint(folder)
    own = {f"objective.{name}" for name in task.objective.run_state}
    tensors = {name: tensor for name, tensor in task.training_state().items() if name not in own}
    fix = "It must be a run of the same backbone, mask and objective options as this one."
    _load_tensors(path, read_state(path), tensors, fix, ignore=own)


def start_digest(folder: str | Path) -> str:
    """SHA-256, as hex, of what [`start_from`] reads; raises as that if there is no checkpoint."""
    return _file_digest(_checkpoint(folder) / "model.safetensors")


def _checkpoint(folder: str | Path) -> Path:
    path = latest_checkpoint(folder)
    if path is None:
        fix = "name the output_dir of a run with keep_checkpoints of 1 or more"
        raise FileNotFoundError(f"init_from={folder} holds no checkpoint, and an adapter alone has no scores: {fix}.")
    return path


def _load_tensors(
    path: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor], fix: str, ignore: Collection[str] = ()
) -> None:
    """Copy a checkpoint's tensors into the live ones; it may have those named in `ignore` besides."""
    loaded = _read(path, "model", state)
    if missing := sorted(set(tensors) ^ (set(loaded) - set(ignore))):
        found = f"{len(missing)} tensors are on one side only, such as {missing[0]}"
        raise ValueError(f"{path} belongs to another model or objective: {found}. {fix}")
    for name, tensor in tensors.items():
        if tensor.shape != loaded[name].shape:
            here, there = tuple(tensor.shape), tuple(loaded[name].shape)
            raise ValueError(f"{path}: {name} has shape {there}, the model's has {here}. {fix}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(loaded[name])


def _read(path: Path, part: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint, once its digest is checked."""
    file = path / f"{part}.safetensors"
    try:
        _check_digest(file.name, state, _file_digest(file))
        return load_file(file)
    except (SafetensorError, ValueError, FileNotFoundError) as error:
        raise _damaged(path, error) from error


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _state_digest(state: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in state.items() if name != _DIGESTS}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _check_digest(name: str, state: Mapping[str, Any], found: str) -> None:
    if state[_DIGESTS].get(name) != found:
        raise ValueError(f"{name} is not what was written, by its SHA-256")


def _damaged(path: Path, error: Exception) -> ValueError:
    found = list_checkpoints(path.parent)
    older = [old.name for old in found[: found.index(path) if path in found else 0]]
    then = f"{older[-1]}, the one before, is then taken" if older else "there is none before it: the run starts anew"
    return ValueError(f"{path} is damaged: {error}. Delete it; {then}.")
