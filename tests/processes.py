# SPDX-License-Identifier: Apache-2.0
"""Processes for tests, forked where that can be: they have torch and transformers imported, which takes longest."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

__all__ = ["ROOT", "can_fork", "context", "leave_the_test", "sent"]

ROOT = Path(__file__).resolve().parents[1]


def can_fork() -> bool:
    """Whether a forked process could train: autograd's threads, once this process has any, do not survive a fork."""
    if sys.platform != "linux" or torch.cuda.is_available():
        return False
    child = os.fork()
    if child == 0:
        try:
            torch.ones(1, requires_grad=True).sum().backward()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def context() -> Any:
    """How processes are started."""
    return multiprocessing.get_context("fork" if can_fork() else "spawn")


def leave_the_test() -> None:
    """What a forked process does first: no coverage, which would be lost, and the threads that survive, one."""
    sys.settrace(None)
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)


def sent(value: Any) -> Any:
    """What a worker process is given when it is started with `value`."""
    return ForkingPickler.loads(ForkingPickler.dumps(value))
