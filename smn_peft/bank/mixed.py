# SPDX-License-Identifier: Apache-2.0
"""Mixed batches: samples of one batch under different tasks, in groups or over one shared product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .complement import NotPerSample, PaddingUsed, Rows, can_complement, complemented
from .live import LiveModel
from .outputs import joined, run_of
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
        self._per_sample = self._pads = True

    def __call__(self, tasks: Sequence[Task | None], inputs: Tensor, **kwargs: Any) -> Any:
        """(batch, …) under one task per sample; rows come back in the order of the batch."""
        groups = _group(tasks, self._live.current)
        if len(groups) == 1:
            self._live.switch(tasks[0])
            return self._live.model(inputs, **kwargs)
        if self._shared(list(groups), len(tasks)):
            try:
                return self._complement(groups, inputs, kwargs)
            except NotPerSample:
                self._per_sample = False
            except PaddingUsed:
                self._pads = False
        parts = []
        for task, positions in groups.items():
            self._live.switch(task)
            chosen = _rows_of(kwargs, positions, len(tasks))
            parts.append((positions, self._live.model(inputs[positions], **chosen)))
        return joined(parts, len(tasks))

    def _shared(self, tasks: list[Task | None], count: int) -> bool:
        return (
            self._per_sample
            and count < COMPLEMENT_BELOW * len(tasks)
            and can_complement(tasks, self._live.scalable, self._live.model)
            and (self._pads or self._as_wide(tasks))
        )

    def _as_wide(self, tasks: list[Task | None]) -> bool:
        """Whether no head has another number of classes under another task."""
        heads = {name for task in tasks if task is not None for name in task.tensors}
        own = {name: self._live.shape(name) for name in heads}
        return all(
            len(
                {own[name] if task is None or name not in task.tensors else task.tensors[name].shape for task in tasks}
            )
            == 1
            for name in heads
        )

    def _complement(self, groups: Mapping[Task | None, list[int]], inputs: Tensor, kwargs: Mapping[str, Any]) -> Any:
        self._live.switch(None)
        rows: list[Rows] = []
        for task, positions in groups.items():
            start = rows[-1].stop if rows else 0
            rows.append(Rows(task, start, start + len(positions)))
        order = [position for positions in groups.values() for position in positions]
        with complemented(self._live.model, rows, len(order)) as padded:
            output = self._live.model(inputs[order], **_rows_of(kwargs, order, len(order)))
        parts = [(at, run_of(output, number, rows, padded)) for number, at in enumerate(groups.values())]
        return joined(parts, len(order))


def _group(tasks: Sequence[Task | None], live: Task | None) -> dict[Task | None, list[int]]:
    """Positions by task, those of the live task first."""
    groups: dict[Task | None, list[int]] = {live: []} if any(task is live for task in tasks) else {}
    for position, task in enumerate(tasks):
        groups.setdefault(task, []).append(position)
    return groups


def _rows_of(kwargs: Mapping[str, Any], positions: list[int], count: int) -> dict[str, Any]:
    """The model's other arguments, for some samples: tensors that have a row for each sample are cut to theirs."""
    return {
        key: value[positions] if isinstance(value, Tensor) and value.dim() and len(value) == count else value
        for key, value in kwargs.items()
    }
