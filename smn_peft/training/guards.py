# SPDX-License-Identifier: Apache-2.0
"""What stops a run early, with the step, the tensor and what to do: NaN, an empty mask, collapsed codes."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..functional.distributed import read_flags
from .task import TrainingTask

__all__ = ["CollapseWatch", "TrainingFailure", "check_loss", "check_masks"]

_WINDOWS = 5  # lines of the log in a row


_ADVICE = (
    "Lower lr or head_lr, warm up longer, or, under fp16, train in bf16. The last checkpoint, if any, is from before."
)


class TrainingFailure(RuntimeError):
    """Training cannot go on usefully; the message names the step and the remedy."""


def check_loss(task: TrainingTask, loss: Tensor, step: int) -> None:
    """Refuse a loss, or one of several of a step's parts, that is not finite, naming what broke.

    Raises:
        TrainingFailure: If it is not.
    """
    if torch.isfinite(loss).all():
        return
    broken = _broken(task)
    what = f"{broken[0]} and {len(broken) - 1} more hold NaN or infinity" if broken else "every parameter is finite"
    raise TrainingFailure(f"The loss is {float(loss.mean())} at step {step}; {what}. {_ADVICE}")


def _broken(task: TrainingTask) -> list[str]:
    """Names of what trains and holds NaN or infinity; a device is waited for once."""
    names, finite = [], []
    for name, parameter, _ in task.trainable():
        names.append(name)
        finite.append(torch.isfinite(parameter).all())
    return [name for name, good in zip(names, read_flags(finite), strict=True) if not good]


def check_masks(task: TrainingTask, step: int) -> None:
    """Refuse a mask that has switched a whole layer off, and scores that are not finite, which count as off.

    Raises:
        TrainingFailure: If there is one.
    """
    if broken := _broken(task):
        raise TrainingFailure(f"{broken[0]} and {len(broken) - 1} more hold NaN or infinity at step {step}. {_ADVICE}")
    if empty := task.empty_masks():
        raise TrainingFailure(
            f"The mask of {empty[0]} is empty at step {step} ({len(empty)} such layers): the layer gives zeros, and "
            "nothing after it can learn. Lower lr, warm up longer, or leave the layer out with exclude_modules."
        )


class CollapseWatch:
    """Warns of a collapse when it shows, and stops the run once it has lasted: many start at one and leave it."""

    def __init__(self, steps_per_epoch: int, speaks: bool = True) -> None:
        """Seen from one of several processes, of which one speaks."""
        self._least, self._speaks = steps_per_epoch, speaks
        self._since, self._windows = 0, 0

    def see(self, step: int, problem: str | None, grace_steps: int) -> None:
        """Take what the objective says of a line of the log.

        Args:
            step: Optimizer steps done.
            problem: What is wrong, None if nothing is.
            grace_steps: Steps before which the run is not stopped.

        Raises:
            TrainingFailure: If the problem has lasted for five lines in a row and an epoch, and the grace is over.
        """
        if problem is None:
            self._windows = 0
            return
        self._windows += 1
        if self._windows == 1:
            self._since = step
            if self._speaks:
                warnings.warn(f"Step {step}: {problem} The run is stopped if this lasts.", stacklevel=4)
        if self._windows >= _WINDOWS and step - self._since >= self._least and step >= grace_steps:
            raise TrainingFailure(f"Step {step}, and since step {self._since}: {problem}")
