# SPDX-License-Identifier: Apache-2.0
"""Several processes start from the same, and what fails on one of them fails on all, so that none waits for it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from .checkpoint import checkpoint_name

__all__ = ["agree_on_start", "together"]

T = TypeVar("T")


def together(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """What `act` gives on this process, once it has ended well on all.

    Args:
        accelerator: Knows the other processes, which call this too.
        act: Runs on each process, and waits for no other.

    Raises:
        Exception: What `act` raises here.
        RuntimeError: If it failed on another process only; the message is that process's.
    """
    if accelerator.num_processes == 1:
        return act()
    problem: Exception | None = None
    try:
        result = act()
    except Exception as error:  # whatever it is, the others have to hear of it
        problem = error
    said = [None if problem is None else f"{_name(accelerator)}: {problem}"]
    others = [text for text in gather_object(said) if text is not None]
    if problem is not None:
        raise problem
    if others:
        raise RuntimeError(f"Another process cannot go on, so this one ends too. {others[0]}")
    return result


def agree_on_start(accelerator: Accelerator, checkpoint: Path | None, facts: Mapping[str, Any]) -> None:
    """Let the main process decide what the run goes on from; each reads its own disk, which need not be the main's.

    Args:
        accelerator: Knows the other processes, which call this too.
        checkpoint: The newest that this process finds in its `output_dir`.
        facts: Of the run, with `output_dir` and, where they are known, the digests of base and data.

    Raises:
        ValueError: If this process found another checkpoint than the main one, or reads another base or other images.
        RuntimeError: If another process did.
    """
    mine = {"who": _name(accelerator), "from": checkpoint_name(checkpoint), "facts": dict(facts)}
    decided = [mine]
    if accelerator.num_processes > 1:
        broadcast_object_list(decided)
    together(accelerator, lambda: _compare(mine, decided[0]))


def _compare(mine: Mapping[str, Any], main: Mapping[str, Any]) -> None:
    if mine["from"] != main["from"]:
        here, there = (Path(each["facts"]["output_dir"]).absolute() for each in (mine, main))
        raise ValueError(
            f"{main['who']} starts from {main['from'] or 'no checkpoint'} in {there}, and {mine['who']} has "
            f"{mine['from'] or 'none'} in {here}: put output_dir on a disk that all share, or copy the main process's "
            "folder to every machine."
        )
    for name, what in (("base", "weights of the base"), ("data", "training images")):
        if mine["facts"].get(name) != main["facts"].get(name):
            raise ValueError(f"{mine['who']} reads other {what} than {main['who']}: copy the same to every machine.")


def _name(accelerator: Accelerator) -> str:
    return f"process {accelerator.process_index} on {platform.node() or 'this machine'}"
