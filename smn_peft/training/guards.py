# SPDX-License-Identifier: Apache-2.0
"""What stops a run early, with the step, the tensor and what to do: NaN, an empty mask, collapsed codes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional.flags import read_flags
from .task import TrainingTask

__all__ = ["TrainingFailure", "check_loss", "check_masks"]


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
