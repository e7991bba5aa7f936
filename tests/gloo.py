# SPDX-License-Identifier: Apache-2.0
"""Run a test's function in several processes on torch.distributed's gloo backend, and bring the tensors back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState

from .processes import context, leave_the_test

Result = dict[str, torch.Tensor]


def _work(rank: int, function: Callable[..., Result], processes: int, folder: str, arguments: tuple[Any, ...]) -> None:
    leave_the_test()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    try:
        torch.save(function(*arguments), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def join_group() -> None:
    """Let accelerate find, in the function that a process runs, the group that it belongs to."""
    rank, processes = str(dist.get_rank()), str(dist.get_world_size())
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "none", "MASTER_PORT": "0"}
    os.environ |= found
    AcceleratorState._reset_state(reset_partial_state=True)


def run_processes(function: Callable[..., Result], processes: int, folder: Path, *arguments: Any) -> list[Result]:
    """What `function(*arguments)`, a function of a module, returns on each rank: tensors by name."""
    method = context().get_start_method()
    mp.start_processes(_work, (function, processes, str(folder), arguments), nprocs=processes, start_method=method)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]
