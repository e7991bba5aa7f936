# SPDX-License-Identifier: Apache-2.0
"""Mixed batches: samples of one batch under different tasks, task by task or over one shared product.

The shared product is ``y = s·(W x − C x) + b`` with C the few weights that a task switches off, sparse: for many tasks
of few samples each it is nearly all of the work.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..functional.torch_kernels import compiled
from ..tuner.mixed import join_rows, take_rows
from .live import LiveModel, watch
from .task import Task

__all__ = ["SHARED_BELOW", "MixedForward", "one_per_sample"]

SHARED_BELOW = 6
"""Samples per task from which on a switch for each task is cheaper than what its removed weights cost."""


class _NotShared(Exception):
    """The model does something with its inputs, weights or logits that only switching serves."""


class _Run(NamedTuple):
    """Samples `start` to `stop` of a sorted batch, all of one task."""

    task: Task | None
    start: int
    stop: int


class _Padded(NamedTuple):
    logits: Tensor  # (batch, most classes) of a sorted batch, zeros where a task has fewer
    widths: Sequence[int]  # classes of each run


def one_per_sample(tasks: Sequence[str | Task | None] | str | Task | None, count: int) -> list[str | Task | None]:
    """Return one task for each sample of a batch; of an empty one, a task all the same.

    TypeError if one is named by something else than text, ValueError if their number is another.
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
        self._live = live
        self._shares = True  # as far as the model has shown

    def __call__(self, tasks: Sequence[Task | None], inputs: Tensor, **kwargs: Any) -> Any:
        """Run (batch, …) under one task per sample; rows come back in the order of the batch."""
        current = self._live.current  # its samples first
        groups: dict[Task | None, list[int]] = {current: []} if any(task is current for task in tasks) else {}
        for position, task in enumerate(tasks):
            groups.setdefault(task, []).append(position)
        if len(groups) == 1:
            self._live.switch(tasks[0])
            return self._live.model(inputs, **kwargs)
        if self._can_share(groups, len(tasks)):
            try:
                return self._share(groups, inputs, kwargs)
            except _NotShared:
                self._shares = False
        outputs = []
        for task, positions in groups.items():
            self._live.switch(task)
            outputs.append(self._live.model(inputs[positions], **take_rows(kwargs, positions, len(tasks))))
        return join_rows(outputs, list(groups.values()), ragged=True)

    def _can_share(self, groups: Collection[Task | None], count: int) -> bool:
        """Whether the tasks are few samples each of sparse masks of plain Linear layers, and heads that are such."""
        model = self._live.model
        if not self._shares or count >= SHARED_BELOW * len(groups):
            return False
        if torch.is_autocast_enabled(next(model.parameters()).device.type):
            return False
        if any(module._compiled_call_impl is not None for module in model.modules()):
            return False
        tasks = [task for task in groups if task is not None]
        masked = {name for task in tasks for name in task.masks}
        heads = {f"{name.rpartition('.')[0]}.weight" for task in tasks for name in task.tensors}
        is_sparse = all(mask.removed is not None for task in tasks for mask in task.masks.values())
        return is_sparse and masked | heads <= self._live.scalable and not masked & heads

    def _share(self, groups: Mapping[Task | None, list[int]], inputs: Tensor, kwargs: Mapping[str, Any]) -> Any:
        self._live.switch(None)
        runs: list[_Run] = []
        for task, positions in groups.items():
            start = runs[-1].stop if runs else 0
            runs.append(_Run(task, start, start + len(positions)))
        order = [position for positions in groups.values() for position in positions]
        with _shared_products(self._live.model, runs) as padded:
            output = self._live.model(inputs[order], **take_rows(kwargs, order, len(order)))
        return join_rows(_split(output, runs, padded), list(groups.values()), ragged=True)


@contextmanager
def _shared_products(model: nn.Module, runs: Sequence[_Run]) -> Iterator[list[_Padded]]:
    """While this lasts, the model (the base's own weights live) treats each run of samples as its task says.

    Whoever multiplies by a weight that differs between the tasks gets the rows of each task right; whoever reads one
    in another way gets [`_NotShared`]. Yields what heads of different widths gave, as they give it.
    """
    padded: list[_Padded] = []
    names = {name.rpartition(".")[0] for run in runs if run.task for name in (*run.task.masks, *run.task.tensors)}
    with ExitStack() as stack:
        for name in sorted(names):
            layer: Any = model.get_submodule(name)
            products = _SharedLinear(layer, name, runs, padded)
            for parameter in (layer.weight, layer.bias) if products.is_head else (layer.weight,):
                if parameter is not None:
                    stack.callback(watch, parameter, watch(parameter, products))
        yield padded


def _split(output: Any, runs: Sequence[_Run], padded: Sequence[_Padded]) -> list[Any]:
    """Split what a model returned for a sorted batch into the runs, the logits without the padding.

    A model may return padded logits, and nothing that it makes of them, such as probabilities.
    """
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    widths, shapes = {id(logits): own for logits, own in padded}, {logits.shape for logits, _ in padded}
    others = [leaf for leaf in leaves if id(leaf) not in widths]
    is_per_sample = all(leaf.dim() and len(leaf) == runs[-1].stop for leaf in leaves)
    if not is_per_sample or not widths.keys() <= set(map(id, leaves)) or any(leaf.shape in shapes for leaf in others):
        raise _NotShared

    def cut(leaf: Any, number: int) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        part = leaf[runs[number].start : runs[number].stop]
        return part[..., : widths[id(leaf)][number]] if id(leaf) in widths else part

    return [tree_map(functools.partial(cut, number=number), output) for number in range(len(runs))]


class _SharedLinear:
    """Products of a sorted batch with the weight of one Linear layer; the [`Reading`] of its parameters."""

    def __init__(self, layer: nn.Linear, name: str, runs: Sequence[_Run], padded: list[_Padded]) -> None:
        self._layer, self._runs, self._padded = layer, runs, padded
        self._weight, self._bias = f"{name}.weight", f"{name}.bias"
        self.is_head = any(key in run.task.tensors for run in runs if run.task for key in (self._weight, self._bias))

    @property
    def scale(self) -> Tensor:
        raise _NotShared  # a compiled graph has one weight

    def settle(self) -> None:
        raise _NotShared  # a reader would get one weight for all samples

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(batch, …, in_features) -> (batch, …, out_features), each run of samples under its task."""
        if input.dim() < 2 or len(input) != self._runs[-1].stop or input.dtype != weight.dtype:
            raise _NotShared
        if self.is_head:
            if weight is not self._layer.weight or bias is not self._layer.bias:
                raise _NotShared
            return self._heads(input)
        if weight.dtype not in (torch.float32, torch.float64):  # which have sparse products
            raise _NotShared
        input, product = input.detach().contiguous(), F.linear(input, weight)
        weight, bias = weight.detach(), weight.new_zeros(len(weight)) if bias is None else bias.detach()
        masks = [None if run.task is None else run.task.masks.get(self._weight) for run in self._runs]
        per_sample = product[0, ..., 0].numel()
        stops = [run.stop * per_sample for run in self._runs]
        _remove(product.flatten(0, -2), input.flatten(0, -2), stops, masks, weight, bias)
        return product

    def _heads(self, input: Tensor) -> Tensor:
        """A head per task; the logits that a task with fewer classes lacks are zeros, to be cut off afterwards."""
        outputs = []
        for task, start, stop in self._runs:
            own: Mapping[str, Tensor] = {} if task is None else task.tensors
            weight = own.get(self._weight, self._layer.weight).to(input.device, input.dtype)
            bias = own.get(self._bias, self._layer.bias)
            outputs.append(F.linear(input[start:stop], weight, None if bias is None else bias.to(input)))
        widths = [output.shape[-1] for output in outputs]
        if len(set(widths)) == 1:
            return torch.cat(outputs)
        joined = torch.cat([F.pad(output, (0, max(widths) - output.shape[-1])) for output in outputs])
        self._padded.append(_Padded(joined, widths))
        return joined


_LANES, _ROWS = 16, 8  # floats of a vector register; outputs whose sums stay in the cache
_NONE = torch.empty(0, dtype=torch.int32)


def _remove(
    product: Tensor, input: Tensor, stops: Sequence[int], masks: Sequence[Any], weight: Tensor, bias: Tensor
) -> None:
    """``product = s·(product − x Cᵀ) + b`` in place; C and s are of the [`TaskMask`] (or None) of each run of rows.

    `product` is (rows, out), `input` x (rows, in); runs end at `stops`. Compiled where numba is installed.
    """
    removed = [_NONE if mask is None or mask.removed is None else mask.removed for mask in masks]
    scales = [1.0 if mask is None else mask.scale for mask in masks]
    if product.is_cpu and weight.is_contiguous() and (run := compiled(_remove_loop)) is not None:
        flat, ends = weight.view(-1).numpy(), np.cumsum([len(one) for one in removed])
        joined, factors = torch.cat(removed).numpy(), np.array(scales, flat.dtype)
        run(product.numpy(), input.numpy(), np.array(stops), joined, ends, flat, bias.numpy(), factors)
        return
    _warn_of_sparse_tensors()
    width, shape = weight.shape[1], (weight.shape[1], len(weight))
    bounds = torch.arange(0, weight.numel() + 1, width, dtype=torch.int32, device=weight.device)
    for start, stop, off, scale in zip([0, *stops], stops, removed, scales, strict=False):
        off, part = off.to(weight.device), product[start:stop]
        values = weight.reshape(-1).index_select(0, off)
        rows = torch.searchsorted(off, bounds, out_int32=True)
        transposed = torch.sparse_csc_tensor(rows, off % width, values, shape, check_invariants=False)
        torch.addmm(part, input[start:stop], transposed, alpha=-1, out=part)
        torch.add(bias, part, alpha=scale, out=part)


def _remove_loop(
    product: Any, input: Any, stops: Any, removed: Any, ends: Any, weight: Any, bias: Any, scales: Any
) -> None:
    outputs, width, begin, at = product.shape[1], input.shape[1], 0, 0
    for run in range(len(stops)):
        samples, end, scale = stops[run] - begin, ends[run], scales[run]
        lanes = -(-samples // _LANES) * _LANES
        columns = np.empty((width, lanes), product.dtype)
        taken, values = np.empty((_ROWS, lanes), product.dtype), np.empty(end - at, product.dtype)
        for column in range(width if end > at else 0):
            for sample in range(samples):
                columns[column, sample] = input[begin + sample, column]
            columns[column, samples:] = 0
        offset = at
        for index in range(offset, end):  # all at once, since they come from everywhere in memory
            values[index - offset] = weight[removed[index]]
        for first in range(0, outputs, _ROWS):
            last = min(first + _ROWS, outputs)
            taken[:] = 0
            for row in range(first, last):
                start = row * width
                while at < end and removed[at] < start + width:
                    value, column = values[at - offset], removed[at] - start
                    for lane in range(lanes):
                        taken[row - first, lane] += value * columns[column, lane]
                    at += 1
            for sample in range(samples):
                target = product[begin + sample]
                for row in range(first, last):
                    target[row] = (target[row] - taken[row - first, sample]) * scale + bias[row]
        begin = stops[run]


@functools.cache
def _warn_of_sparse_tensors() -> None:
    """Let torch say once, unheard, that sparse tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csc_tensor([0, 0], [], [], (1, 1), device="cpu")
