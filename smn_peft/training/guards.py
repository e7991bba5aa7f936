# SPDX-License-Identifier: Apache-2.0
"""What stops a run early: NaN, an empty mask, collapsed codes, and signals such as Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ..data.loading import STOP_SIGNALS
from ..functional.distributed import read_flags
from .task import TrainingTask

_COLLAPSED_LINES = 5  # lines of the log in a row
_SAME_REQUEST = 1.0  # seconds
_ADVICE = (
    "Lower lr or head_lr, warm up longer, or, under fp16, train in bf16. The last checkpoint, if any, is from before."
)


class TrainingFailure(RuntimeError):
    """Training cannot go on usefully; the message names the step and the remedy."""


def check_loss(task: TrainingTask, loss: Tensor, step: int) -> None:
    """Raise TrainingFailure if a loss is not finite, naming the parameters that are not."""
    if torch.isfinite(loss).all():
        return
    broken = _not_finite(task)
    what = f"{broken[0]} and {len(broken) - 1} more hold NaN or infinity" if broken else "every parameter is finite"
    raise TrainingFailure(f"The loss is {float(loss.mean())} at step {step}; {what}. {_ADVICE}")


def check_masks(task: TrainingTask, step: int) -> None:
    """Raise TrainingFailure if a whole layer is masked, or scores are not finite, which count as off."""
    if broken := _not_finite(task):
        raise TrainingFailure(f"{broken[0]} and {len(broken) - 1} more hold NaN or infinity at step {step}. {_ADVICE}")
    masks = {} if task.mask_config is None else task.model.masks()
    some_left = read_flags([mask.any() for mask in masks.values()])
    if empty := [name for name, some in zip(masks, some_left, strict=True) if not some]:
        raise TrainingFailure(
            f"The mask of {empty[0]} is empty at step {step} ({len(empty)} such layers): the layer gives zeros, and "
            "nothing after it can learn. Lower lr, warm up longer, or leave the layer out with exclude_modules."
        )


def _not_finite(task: TrainingTask) -> list[str]:
    """Names of trainable parameters that hold NaN or infinity, found with one synchronisation."""
    parameters = {name: parameter for name, parameter, _ in task.trainable()}
    finite = read_flags([torch.isfinite(parameter).all() for parameter in parameters.values()])
    return [name for name, good in zip(parameters, finite, strict=True) if not good]


class CollapseWatch:
    """Warn when the objective reports a collapse, and stop the run once it has lasted: many runs leave it again.

    It has lasted after five lines of the log in a row and an epoch, once step `grace_steps` is reached.
    """

    def __init__(self, steps_per_epoch: int, verbose: bool = True) -> None:
        self._least, self._verbose = steps_per_epoch, verbose
        self._since, self._lines = 0, 0

    def record(self, step: int, problem: str | None, grace_steps: int) -> None:
        """Record one collapse check, with None for no collapse; TrainingFailure if it has lasted."""
        if problem is None:
            self._lines = 0
            return
        self._lines += 1
        if self._lines == 1:
            self._since = step
            if self._verbose:
                warnings.warn(f"Step {step}: {problem} The run is stopped if this lasts.", stacklevel=4)
        if self._lines >= _COLLAPSED_LINES and step - self._since >= self._least and step >= grace_steps:
            raise TrainingFailure(f"Step {step}, and since step {self._since}: {problem}")


class StopRequest:
    """Context in which a first SIGINT, SIGTERM or SIGUSR1 sets `requested`, and a later one acts as it would outside.

    Signals within a second of the first are the same request: a launcher repeats what the terminal has sent to all.
    Outside the main thread, where Python allows no handlers, nothing is ever requested.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > _SAME_REQUEST:
            self.__exit__()
            signal.raise_signal(number)
