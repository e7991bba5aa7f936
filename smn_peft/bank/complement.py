# SPDX-License-Identifier: Apache-2.0
"""Mixed batches without switching: one product with the base's weight, less what each task removed.

``y = s·(W x − C x) + b`` with C the few weights that the task switches off, sparse: for many tasks of few samples each
the shared product is nearly all of the work.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .live_parameter import Reading, unwatch, watch
from .removal import remove
from .task import Task, TaskMask

__all__ = ["NotPerSample", "Padded", "PaddingUsed", "Rows", "can_complement", "complemented"]

warnings.filterwarnings("ignore", message="Sparse CS. tensor support is in beta")

_PRODUCTS = (torch.float32, torch.float64)


class NotPerSample(Exception):
    """A layer got an input whose first dimension is not the batch: only switching serves this model."""


class PaddingUsed(Exception):
    """The model made something of logits that a task does not have: tasks with other numbers of classes take turns."""


class Padded(NamedTuple):
    """Logits of a sorted batch whose tasks have different numbers of classes, those that a task lacks being zeros.

    Attributes:
        output: (batch, most classes).
        widths: Classes of each run of samples.
    """

    output: Tensor
    widths: Sequence[int]


class Rows(NamedTuple):
    """Samples `start` to `stop` of a sorted batch, all of one task; None: the base's."""

    task: Task | None
    start: int
    stop: int


def can_complement(tasks: Sequence[Task | None], scalable: set[str], model: nn.Module) -> bool:
    """Whether the tasks are sparse masks of plain Linear layers, and heads, in a dtype that has sparse products."""
    parameter = next(model.parameters())
    if parameter.dtype not in _PRODUCTS or torch.is_autocast_enabled(parameter.device.type):
        return False
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return False
    if any(
        first.masks.keys() & second.tensors.keys() for first in filter(None, tasks) for second in filter(None, tasks)
    ):
        return False
    for task in tasks:
        if task is None:
            continue
        if any(model.get_parameter(name).dtype != parameter.dtype for name in task.masks):
            return False
        if any(name not in scalable or mask.removed is None for name, mask in task.masks.items()):
            return False
        owners = {name.rpartition(".")[0] for name in task.tensors}
        if any(type(model.get_submodule(owner)) is not nn.Linear for owner in owners):
            return False
        if any(not {f"{owner}.weight", f"{owner}.bias"} >= _of(task, owner) for owner in owners):
            return False
    return True


def _of(task: Task, owner: str) -> set[str]:
    return {name for name in task.tensors if name.rpartition(".")[0] == owner}


@contextmanager
def complemented(model: nn.Module, rows: Sequence[Rows], count: int) -> Iterator[list[Padded]]:
    """While this lasts, the model (the base's own weights live) treats each run of samples as its task says.

    Whoever multiplies by a weight that differs between the tasks gets the rows of each task right; whoever reads one
    in another way gets [`NotPerSample`].

    Yields:
        What heads of different widths gave, as they give it.
    """
    padded: list[Padded] = []
    names = {name.rpartition(".")[0] for run in rows if run.task for name in (*run.task.masks, *run.task.tensors)}
    with ExitStack() as stack:
        for name in sorted(names):
            layer: Any = model.get_submodule(name)
            products = _Complemented(layer, name, rows, count, padded)
            for parameter in (layer.weight, layer.bias) if products.is_head else (layer.weight,):
                if parameter is not None:
                    stack.callback(_restore, parameter, watch(parameter, products))
        yield padded


def _restore(parameter: Tensor, before: Reading | None) -> None:
    if before is None:
        unwatch(parameter)
    else:
        watch(parameter, before)


class _Complemented:
    """Products of a sorted batch with the weight of one Linear layer."""

    def __init__(self, layer: nn.Linear, name: str, rows: Sequence[Rows], count: int, padded: list[Padded]) -> None:
        self._layer, self._rows, self._count, self._padded = layer, rows, count, padded
        self._weight, self._bias = f"{name}.weight", f"{name}.bias"
        own = {name for run in rows if run.task is not None for name in run.task.tensors}
        self.is_head = not own.isdisjoint((self._weight, self._bias))

    @property
    def scale(self) -> Tensor:
        """A compiled graph has one weight."""
        raise NotPerSample

    def settle(self) -> None:
        """A reader would get one weight for all samples."""
        raise NotPerSample

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(batch, …, in_features) -> (batch, …, out_features), each run of samples under its task."""
        if input.dim() < 2 or len(input) != self._count or input.dtype != weight.dtype:
            raise NotPerSample
        if self.is_head:
            if weight is not self._layer.weight or bias is not self._layer.bias:
                raise NotPerSample
            return self._heads(input)
        product = F.linear(input, weight)
        if self._removed_at_once(input, product, bias):
            return product
        for task, start, stop in self._rows:
            part = product[start:stop].flatten(0, -2)
            mask = None if task is None else task.masks.get(self._weight)
            if mask is not None:
                torch.addmm(part, input[start:stop].flatten(0, -2), self._removed(mask), alpha=-1, out=part)
            scale = 1.0 if mask is None else mask.scale
            if bias is not None:  # here, while the rows are in the cache
                torch.add(bias, part, alpha=scale, out=part)
            elif scale != 1.0:
                part.mul_(scale)
        return product

    def _removed_at_once(self, input: Tensor, product: Tensor, bias: Tensor | None) -> bool:
        if input.device.type != "cpu" or torch.is_grad_enabled():
            return False
        tokens = input[0].numel() // input.shape[-1]
        masks = [None if run.task is None else run.task.masks.get(self._weight) for run in self._rows]
        runs = [(mask, (run.stop - run.start) * tokens) for mask, run in zip(masks, self._rows, strict=True)]
        return remove(product.flatten(0, -2), input.flatten(0, -2), self._layer.weight, bias, runs)

    def _removed(self, mask: TaskMask) -> Tensor:
        """Sparse (in_features, out_features): the weights that the task removed, transposed."""
        weight = self._layer.weight
        assert mask.removed is not None
        removed = mask.removed.to(weight.device)
        rows = torch.div(removed, weight.shape[1], rounding_mode="floor")
        starts = removed.new_zeros(len(weight) + 1)
        torch.cumsum(torch.bincount(rows, minlength=len(weight)), 0, out=starts[1:])
        columns = removed.sub(rows, alpha=weight.shape[1])
        values = weight.detach().reshape(-1).index_select(0, removed)
        return torch.sparse_csc_tensor(starts, columns, values, tuple(weight.shape[::-1]), check_invariants=False)

    def _heads(self, input: Tensor) -> Tensor:
        """A head per task; the logits that a task with fewer classes lacks are zeros, to be cut off afterwards."""
        outputs = []
        for task, start, stop in self._rows:
            own: Mapping[str, Tensor] = {} if task is None else task.tensors
            weight = own.get(self._weight, self._layer.weight).to(input.device, input.dtype)
            bias = own.get(self._bias, self._layer.bias)
            outputs.append(F.linear(input[start:stop], weight, None if bias is None else bias.to(input)))
        widths = [output.shape[-1] for output in outputs]
        if len(set(widths)) == 1:
            return torch.cat(outputs)
        joined = torch.cat([F.pad(output, (0, max(widths) - output.shape[-1])) for output in outputs])
        self._padded.append(Padded(joined, widths))
        return joined
