# SPDX-License-Identifier: Apache-2.0
"""Answers that lie on a device, read together: every read waits for all that the device still has to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["read_flags"]


def read_flags(flags: Sequence[Tensor]) -> list[bool]:
    """Values of 0-dim bool tensors, on one device or several."""
    if not flags:
        return []
    first = flags[0].device
    answers: list[bool] = torch.stack([flag.to(first) for flag in flags]).tolist()
    return answers
