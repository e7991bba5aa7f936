# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: all that training changes, in safetensors and JSON, written atomically."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..functional.distributed import is_sharded, overwrite, shard_as
from ..storage.files import to_disk
from .arguments import check_same
from .task import TrainingTask

_NAME = re.compile(r"checkpoint-(\d+)$")
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
    return None if path is None else f"{path.name} (sha256 {_sha256(path / STATE_NAME)[:16]})"


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    state: Mapping[str, Any],
    keep: int,
    best: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``checkpoint-<step>`` under a temporary name, rename it, and only then remove all but the `keep` newest.

    `optimizer` is its state dict; `state` is JSON-compatible, and has a "best" where tensors of the `best` state so
    far are given. OSError if the disk refuses; older checkpoints are untouched.
    """
    folder = Path(folder)
    final, temporary = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}"
    entries = ((f"{i}.{name}", value) for i, entry in optimizer["state"].items() for name, value in entry.items())
    momentum = {name: value for name, value in entries if value is not None}  # None: SGD before its first step
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".checkpoint-*"):  # by a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        parts = {"model": tensors, "optimizer": momentum, **({} if best is None else {"best": best})}
        for part, content in parts.items():
            content = {name: tensor.detach().cpu().contiguous() for name, tensor in content.items()}
            save_file(content, temporary / f"{part}.safetensors")
        # As it is read again: JSON turns tuples into lists.
        facts = json.loads(json.dumps({**state, "step": step, "param_groups": optimizer["param_groups"]}))
        text = json.dumps({**facts, _DIGESTS: _digests(temporary, facts)}, indent=1)
        (temporary / STATE_NAME).write_text(text, "utf-8")
        for path in temporary.iterdir():
            to_disk(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        to_disk(folder)
    except (OSError, SafetensorError) as error:
        older = _before(final)
        fix = f"{older} is whole: free some space and go on from it with resume" if older else "free some space"
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(getattr(error, "errno", None), f"Cannot write {final}: {reason}. {fix}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)  # one that is left over is no reason to stop
    return final


def read_state(path: Path) -> dict[str, Any]:
    """The JSON facts of a checkpoint, with `step`; ValueError if one of its files is not what was written."""
    try:
        state: dict[str, Any] = json.loads((path / STATE_NAME).read_text("utf-8"))
        stated = state.pop(_DIGESTS)
        for name, digest in _digests(path, state).items():
            if stated.get(name) != digest:
                raise ValueError(f"{name} is not what was written, by its SHA-256")
    except (ValueError, TypeError, AttributeError, KeyError, FileNotFoundError) as error:
        older = _before(path)
        then = f"{older}, the one before, is then taken" if older else "there is none before it: the run starts anew"
        raise ValueError(f"{path} is damaged: {error}. Delete it; {then}.") from error
    return state


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state of a checkpoint, and its tensors, named from their file on; ValueError as of [`read_state`]."""
    state = read_state(path)
    files = {part: load_file(path / f"{part}.safetensors") for part in _parts(state)}
    return state, {f"{part}.{name}": tensor for part, tensors in files.items() for name, tensor in tensors.items()}


def restore(
    path: Path,
    state: Mapping[str, Any],
    read: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Copy what [`read_checkpoint`] gave into the live tensors and the optimizer; returns the best state so far.

    Nothing is written before everything is compared: ValueError if `facts`, names or shapes differ.
    """
    if facts is not None:
        check_same(state["facts"], facts, path)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _parts(state)}
    for key, value in read.items():
        part, _, name = key.partition(".")
        parts[part][name] = value
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in parts["optimizer"].items():
        index, _, name = key.partition(".")
        entries.setdefault(int(index), {})[name] = value
    live = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entry in entries.items():
        if is_sharded(live[number]):
            same = {name: value for name, value in entry.items() if value.shape == live[number].shape}
            entry.update({name: shard_as(live[number], value) for name, value in same.items()})
    _copy(path, parts["model"], tensors, "Resume with the arguments that the run was started with.")
    optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})
    # A file has C order only; fused steps want momentum in its parameter's memory format.
    for parameter, own in optimizer.state.items():
        for name, value in own.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                own[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return parts.get("best", {})


def start_from(task: TrainingTask, folder: str | Path) -> bool:
    """Give a task the scores, head, prototypes and statistics of the newest checkpoint in another run's folder.

    Optimizer, step, budget and `Objective.run_state` (SwAV's queue) start anew; so do all of the objective's tensors
    where the other run's was another, and the head where that run had none. Returns whether the head, if any, came
    along.
    """
    path = _start(folder)
    facts, state = read_state(path)["facts"], task.training_state()  # read_state checks the files
    new = [f"objective.{name}" for name in task.objective.run_state]
    if str(facts.get("objective")).rpartition(":")[2] != task.objective.name:
        new = ["objective."]
    new.append("budget.")
    headless = task.objective.consumes == "logits" and facts.get("head_classes", ...) is None
    head, body = (f"{_root(state)}{part}." for part in ("head", "backbone"))
    if headless:  # its model is this one's backbone
        new.append(head)
    tensors = {name: tensor for name, tensor in state.items() if not name.startswith(tuple(new))}
    fix = "It must be a run of the same backbone, mask and objective options as this one."
    loaded = load_file(path / "model.safetensors")
    loaded = {name: value for name, value in loaded.items() if not name.startswith(tuple(new))}
    if headless:
        root = _root(state)
        loaded = {name.replace(root, body, 1) if name.startswith(root) else name: loaded[name] for name in loaded}
    _copy(path, loaded, tensors, fix)
    return not headless


def _root(state: Collection[str]) -> str:
    """Start of the names of what an adapter wraps, or of a bare model's."""
    adapted = "model.base_model.model."
    return adapted if any(name.startswith(adapted) for name in state) else "model."


def start_digest(folder: str | Path) -> str:
    """SHA-256, as hex, of what [`start_from`] reads; raises as that if there is no checkpoint."""
    return _sha256(_start(folder) / "model.safetensors")


def _start(folder: str | Path) -> Path:
    if (path := latest_checkpoint(folder)) is None:
        fix = "name the output_dir of a run with keep_checkpoints of 1 or more"
        raise FileNotFoundError(f"init_from={folder} holds no checkpoint, and an adapter alone has no scores: {fix}.")
    return path


def _copy(path: Path, loaded: Mapping[str, Tensor], tensors: Mapping[str, Tensor], fix: str) -> None:
    """Copy a checkpoint's tensors into the live ones of the same names."""
    if missing := sorted(set(tensors) ^ set(loaded)):
        found = f"{len(missing)} tensors are on one side only, such as {missing[0]}"
        raise ValueError(f"{path} belongs to another model or objective: {found}. {fix}")
    for name, tensor in tensors.items():
        if tensor.shape != loaded[name].shape:
            here, there = tuple(tensor.shape), tuple(loaded[name].shape)
            raise ValueError(f"{path}: {name} has shape {there}, the model's has {here}. {fix}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            overwrite(tensor, loaded[name])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digests(folder: Path, state: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of a checkpoint's files by name, of its state over all that it holds beside these."""
    digests = {f"{part}.safetensors": _sha256(folder / f"{part}.safetensors") for part in _parts(state)}
    return {**digests, STATE_NAME: hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()}


def _parts(state: Mapping[str, Any]) -> list[str]:
    return ["model", "optimizer", *["best"] * (state.get("best") is not None)]


def _before(path: Path) -> str | None:
    """Name of the newest complete checkpoint beside this one."""
    return next((old.name for old in reversed(list_checkpoints(path.parent)) if old != path), None)
