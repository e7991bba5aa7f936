# SPDX-License-Identifier: Apache-2.0
"""Run a test's function in several processes on torch.distributed's gloo backend, and bring the tensors back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Result = dict[str, torch.Tensor]


def _work(rank: int, function: Callable[..., Result], processes: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    try:
        torch.save(function(*arguments), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_processes(function: Callable[..., Result], processes: int, folder: Path, *arguments: Any) -> list[Result]:
    """What `function(*arguments)`, a function of a module, returns on each rank: tensors by name."""
    # Forked processes have the libraries imported, which takes longer than the tests; autograd's threads, which a
    # parent has where there is a GPU, do not survive a fork.
    method = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"
    mp.start_processes(_work, (function, processes, str(folder), arguments), nprocs=processes, start_method=method)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]
