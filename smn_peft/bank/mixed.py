# SPDX-License-Identifier: Apache-2.0
"""Mixed batches: samples of one batch under different tasks, in groups or over one shared product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .complement import NotPerSample, Rows, can_complement, complemented
from .live import LiveModel
from .task import Task

__all__ = ["COMPLEMENT_BELOW", "MixedForward", "one_per_sample"]

COMPLEMENT_BELOW = 6
"""Samples per task from which on a switch for each task is cheaper than what its removed weights cost."""


def one_per_sample(tasks: Sequence[str | Task | None] | str | Task | None, count: int) -> list[str | Task | None]:
    """What a caller says of a batch as one task for each of its samples; of an empty one, a task all the same.

    Raises:
        TypeError: If a task is named by something else than text.
        ValueError: If their number is another.
    """
    if tasks is None or isinstance(tasks, (str, Task)):
        return [tasks] * max(count, 1)
    names = list(tasks)
    if len(names) != count:
        raise ValueError(f"There are {count} samples and {len(names)} tasks: name one task per sample.")
    for name in names:
        if not (name is None or isinstance(name, (str, Task))):
            raise TypeError(f"tasks holds {name!r} ({type(name).__name__}): name a task by its text.")
    return names or [None]


class MixedForward:
    """Runs a batch under the task of each sample."""

    def __init__(self, live: LiveModel) -> None:
        """Run on a live model."""
        self._live = live
        self._per_sample = True

    def __call__(self, tasks: Sequence[Task | None], inputs: Tensor, **kwargs: Any) -> Any:
        """(batch, …) under one task per sample; rows come back in the order of the batch."""
        groups = _group(tasks, self._live.current)
        if len(groups) == 1:
            self._live.switch(tasks[0])
            return self._live.model(inputs, **kwargs)
        if self._shared(list(groups), len(tasks)):
            try:
                return self._complement(groups, inputs, **kwargs)
            except NotPerSample:
                self._per_sample = False
        parts = []
        for task, positions in groups.items():
            self._live.switch(task)
            parts.append((positions, self._live.model(inputs[positions], **kwargs)))
        return _join(parts, len(tasks))

    def _shared(self, tasks: list[Task | None], count: int) -> bool:
        return (
            self._per_sample
            and count < COMPLEMENT_BELOW * len(tasks)
            and can_complement(tasks, self._live.scalable, self._live.model)
        )

    def _complement(self, groups: Mapping[Task | None, list[int]], inputs: Tensor, **kwargs: Any) -> Any:
        self._live.switch(None)
        rows: list[Rows] = []
        for task, positions in groups.items():
            start = rows[-1].stop if rows else 0
            rows.append(Rows(task, start, start + len(positions)))
        order = [position for positions in groups.values() for position in positions]
        with complemented(self._live.model, rows, len(order)):
            output = self._live.model(inputs[order], **kwargs)
        parts = [(positions, _cut(output, run)) for run, positions in zip(rows, groups.values(), strict=True)]
        return _join(parts, len(order))


def _group(tasks: Sequence[Task | None], live: Task | None) -> dict[Task | None, list[int]]:
    """Positions by task, those of the live task first."""
    groups: dict[Task | None, list[int]] = {live: []} if any(task is live for task in tasks) else {}
    for position, task in enumerate(tasks):
        groups.setdefault(task, []).append(position)
    return groups


def _cut(output: Any, rows: Rows) -> Any:
    """The rows of one task, without the padding of its logits."""
    if isinstance(output, Mapping):
        return type(output)(**{key: _cut(value, rows) for key, value in output.items()})
    part = output[rows.start : rows.stop]
    widths = [] if rows.task is None else [len(t) for name, t in rows.task.tensors.items() if name.endswith(".weight")]
    return part[..., : widths[0]] if len(widths) == 1 and part.dim() == 2 else part


def _join(parts: Sequence[tuple[list[int], Any]], count: int) -> Any:
    """Rows of several outputs in the order of the batch; a list where their shapes differ."""
    first = parts[0][1]
    if isinstance(first, Mapping):
        keys = [key for key, value in first.items() if isinstance(value, Tensor)]
        return type(first)(**{key: _join([(at, output[key]) for at, output in parts], count) for key in keys})
    if len({rows.shape[1:] for _, rows in parts}) == 1:
        result = first.new_empty(count, *first.shape[1:])
        for positions, rows in parts:
            result[torch.as_tensor(positions, device=rows.device)] = rows
        return result
    by_position = {position: row for positions, rows in parts for position, row in zip(positions, rows, strict=True)}
    return [by_position[position] for position in range(count)]
