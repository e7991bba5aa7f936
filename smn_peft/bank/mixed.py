# SPDX-License-Identifier: Apache-2.0
"""Mixed batches: samples of one batch under different tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["group", "join"]

Key = TypeVar("Key")


def group(tasks: Sequence[Key], first: Key | None = None) -> dict[Key, list[int]]:
    """Positions of each task's samples, in order; those of `first`, which is live already, before the others."""
    groups: dict[Key, list[int]] = {}
    if first in tasks:
        groups[first] = []  # type: ignore[index]
    for position, task in enumerate(tasks):
        groups.setdefault(task, []).append(position)
    return groups


def join(parts: Sequence[tuple[list[int], Tensor]], count: int) -> Tensor | list[Tensor]:
    """Rows of several tensors in the order of the batch.

    Args:
        parts: (positions, rows) per task.
        count: Number of samples.

    Returns:
        One tensor (count, …) if all rows have one shape, else a list of `count` tensors: tasks of 10 and of 100
        classes have no common logits.
    """
    shapes = {rows.shape[1:] for _, rows in parts}
    if len(shapes) == 1:
        first = parts[0][1]
        result = first.new_empty(count, *first.shape[1:])
        for positions, rows in parts:
            result[torch.as_tensor(positions, device=rows.device)] = rows
        return result
    by_position = {position: row for positions, rows in parts for position, row in zip(positions, rows, strict=True)}
    return [by_position[position] for position in range(count)]
