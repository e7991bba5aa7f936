# SPDX-License-Identifier: Apache-2.0
"""Mixed batches: samples of one batch under different tasks, task by task or over one shared product.

The shared product is ``y = s·(W x − C x) + b`` with C the few weights that a task switches off, sparse: for many tasks
of few samples each it is nearly all of the work.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..tuner.mixed import join_rows, take_rows
from .live import LiveModel, watch
from .task import Task, TaskMask

__all__ = ["SHARED_BELOW", "MixedForward", "NamedCall", "answer_names", "forget_names", "one_per_sample"]

SHARED_BELOW = 6
"""Samples per task from which on a switch for each task is cheaper than what its removed weights cost."""
_PRODUCTS = (torch.float32, torch.float64)


class _NotPerSample(Exception):
    """A layer got an input whose first dimension is not the batch: only switching serves this model."""


class _PaddingUsed(Exception):
    """The model made something of logits that a task does not have: tasks with other numbers of classes take turns."""


class _Rows(NamedTuple):
    """Samples `start` to `stop` of a sorted batch, all of one task."""

    task: Task | None
    start: int
    stop: int


class _Padded(NamedTuple):
    output: Tensor  # logits (batch, most classes) of a sorted batch, zeros where a task has fewer
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
        self._per_sample = self._pads = True

    def __call__(self, tasks: Sequence[Task | None], inputs: Tensor, **kwargs: Any) -> Any:
        """Run (batch, …) under one task per sample; rows come back in the order of the batch."""
        current = self._live.current  # its samples first
        groups: dict[Task | None, list[int]] = {current: []} if any(task is current for task in tasks) else {}
        for position, task in enumerate(tasks):
            groups.setdefault(task, []).append(position)
        if len(groups) == 1:
            self._live.switch(tasks[0])
            return self._live.model(inputs, **kwargs)
        if self._can_share(list(groups), len(tasks)):
            try:
                return self._share(groups, inputs, kwargs)
            except _NotPerSample:
                self._per_sample = False
            except _PaddingUsed:
                self._pads = False
        outputs = []
        for task, positions in groups.items():
            self._live.switch(task)
            outputs.append(self._live.model(inputs[positions], **take_rows(kwargs, positions, len(tasks))))
        return join_rows(outputs, list(groups.values()), ragged=True)

    def _can_share(self, tasks: list[Task | None], count: int) -> bool:
        """Whether the tasks are sparse masks of plain Linear layers and heads, in a dtype that has sparse products."""
        model = self._live.model
        parameter = next(model.parameters())
        if not self._per_sample or count >= SHARED_BELOW * len(tasks) or parameter.dtype not in _PRODUCTS:
            return False
        if torch.is_autocast_enabled(parameter.device.type):
            return False
        if any(module._compiled_call_impl is not None for module in model.modules()):
            return False
        masked = {name for task in tasks if task for name in task.masks}
        whole = {name for task in tasks if task for name in task.tensors}
        if masked & whole or not masked <= self._live.scalable:
            return False
        if any(model.get_parameter(name).dtype != parameter.dtype for name in masked):
            return False
        if any(mask.removed is None for task in tasks if task for mask in task.masks.values()):
            return False
        owners = {name.rpartition(".")[0] for name in whole}
        heads = {f"{owner}.{leaf}" for owner in owners for leaf in ("weight", "bias")}
        if not whole <= heads or any(type(model.get_submodule(owner)) is not nn.Linear for owner in owners):
            return False
        own = self._live.shapes
        return self._pads or all(
            len({task.tensors[name].shape if task and name in task.tensors else own[name] for task in tasks}) == 1
            for name in whole
        )

    def _share(self, groups: Mapping[Task | None, list[int]], inputs: Tensor, kwargs: Mapping[str, Any]) -> Any:
        self._live.switch(None)
        rows: list[_Rows] = []
        for task, positions in groups.items():
            start = rows[-1].stop if rows else 0
            rows.append(_Rows(task, start, start + len(positions)))
        order = [position for positions in groups.values() for position in positions]
        with _shared_products(self._live.model, rows, len(order)) as padded:
            output = self._live.model(inputs[order], **take_rows(kwargs, order, len(order)))
        outputs = [_run_of(output, number, rows, padded) for number in range(len(rows))]
        return join_rows(outputs, list(groups.values()), ragged=True)


# --- One product for all tasks ---------------------------------------------------------------------------------------


@contextmanager
def _shared_products(model: nn.Module, rows: Sequence[_Rows], count: int) -> Iterator[list[_Padded]]:
    """While this lasts, the model (the base's own weights live) treats each run of samples as its task says.

    Whoever multiplies by a weight that differs between the tasks gets the rows of each task right; whoever reads one
    in another way gets [`_NotPerSample`]. Yields what heads of different widths gave, as they give it.
    """
    padded: list[_Padded] = []
    names = {name.rpartition(".")[0] for run in rows if run.task for name in (*run.task.masks, *run.task.tensors)}
    with ExitStack() as stack:
        for name in sorted(names):
            layer: Any = model.get_submodule(name)
            products = _SharedLinear(layer, name, rows, count, padded)
            for parameter in (layer.weight, layer.bias) if products.is_head else (layer.weight,):
                if parameter is not None:
                    stack.callback(watch, parameter, watch(parameter, products))
        yield padded


class _SharedLinear:
    """Products of a sorted batch with the weight of one Linear layer; the [`Reading`] of its parameters."""

    def __init__(self, layer: nn.Linear, name: str, rows: Sequence[_Rows], count: int, padded: list[_Padded]) -> None:
        self._layer, self._rows, self._count, self._padded = layer, rows, count, padded
        self._weight, self._bias = f"{name}.weight", f"{name}.bias"
        own = {name for run in rows if run.task is not None for name in run.task.tensors}
        self.is_head = not own.isdisjoint((self._weight, self._bias))

    @property
    def scale(self) -> Tensor:
        """A compiled graph has one weight."""
        raise _NotPerSample

    def settle(self) -> None:
        """A reader would get one weight for all samples."""
        raise _NotPerSample

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(batch, …, in_features) -> (batch, …, out_features), each run of samples under its task."""
        if input.dim() < 2 or len(input) != self._count or input.dtype != weight.dtype:
            raise _NotPerSample
        if self.is_head:
            if weight is not self._layer.weight or bias is not self._layer.bias:
                raise _NotPerSample
            return self._heads(input)
        product = F.linear(input, weight)
        for task, start, stop in self._rows:
            mask = None if task is None else task.masks.get(self._weight)
            part = product[start:stop].flatten(0, -2)
            if mask is not None:
                torch.addmm(part, input[start:stop].flatten(0, -2), self._removed(mask), alpha=-1, out=part)
            scale = 1.0 if mask is None else mask.scale
            if bias is not None:  # here, while the rows are in the cache
                torch.add(bias, part, alpha=scale, out=part)
            elif scale != 1.0:
                part.mul_(scale)
        return product

    def _removed(self, mask: TaskMask) -> Tensor:
        """Sparse (in_features, out_features): the weights that the task removed, transposed."""
        _warn_of_sparse_tensors()
        weight = self._layer.weight
        assert mask.removed is not None
        removed, width = mask.removed.to(weight.device), weight.shape[1]
        ends = torch.arange(0, weight.numel() + 1, width, dtype=removed.dtype, device=weight.device)
        starts = torch.searchsorted(removed, ends, out_int32=True)
        values = weight.detach().reshape(-1).index_select(0, removed)
        shape = (width, len(weight))
        return torch.sparse_csc_tensor(starts, removed % width, values, shape, check_invariants=False)

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
        self._padded.append(_Padded(joined, widths))
        return joined


@functools.cache
def _warn_of_sparse_tensors() -> None:
    """Let torch say once, unheard, that sparse tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csc_tensor([0, 0], [], [], (1, 1), device="cpu")


# --- What the model returns ------------------------------------------------------------------------------------------


def _run_of(output: Any, number: int, rows: Sequence[_Rows], padded: Sequence[_Padded]) -> Any:
    """One run of what a model returned for a sorted batch, its logits without the padding.

    A model may return padded logits, and nothing that it makes of them.
    """
    seen: set[int] = set()

    def cut(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        if not tensor.dim() or len(tensor) != rows[-1].stop:
            raise _NotPerSample
        part = tensor[rows[number].start : rows[number].stop]
        for index, (logits, widths) in enumerate(padded):
            if tensor is logits:
                seen.add(index)
                return part[..., : widths[number]]
            if tensor.shape == logits.shape:
                raise _PaddingUsed  # probabilities, say, over classes that a task does not have
        return part

    result = tree_map(cut, output)
    if len(seen) != len(padded):
        raise _PaddingUsed
    return result


# --- `adapter_names` on a plain model --------------------------------------------------------------------------------


class NamedCall(nn.Module):
    """What a model's class derives from, beside its own, while a bank is open: it answers calls with `adapter_names`.

    A copy, pickled or in memory, is of the model's own class and has no bank.
    """

    smn_mixed: Callable[[], Callable[..., Any] | None]
    smn_model: Callable[[], nn.Module | None]
    smn_class: type[nn.Module]

    def __call__(self, *inputs: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Call the model; with `adapter_names`, one per sample, as `MaskBank.forward`."""
        if adapter_names is None:
            return super().__call__(*inputs, **kwargs)
        mixed = self.smn_mixed()
        if mixed is None or self.smn_model() is not self:
            raise ValueError("adapter_names is for the model of an open bank: this is a copy, or its bank is closed.")
        (batch,) = inputs or (kwargs.pop("pixel_values"),)
        return mixed(batch, adapter_names, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as the model's own class."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        if make.__name__ == "__newobj__":  # which pickle grants to an object's present class alone
            make = _new
        own = self.smn_class
        return make, tuple(own if part is type(self) else part for part in arguments), *rest


def _new(own: type[nn.Module], *arguments: Any) -> nn.Module:
    return own.__new__(own, *arguments)


def answer_names(model: nn.Module, mixed: Callable[..., Any]) -> None:
    """Hand the model's calls with `adapter_names` to a bound method, whose object is not kept alive."""
    own = type(model)
    facts = {
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        "smn_mixed": weakref.WeakMethod(mixed),
        "smn_model": weakref.ref(model),
        "smn_class": own,
    }
    model.__class__ = type(own.__name__, (NamedCall, own), facts)


def forget_names(model: nn.Module) -> None:
    """Give the model its own class back."""
    if isinstance(model, NamedCall):
        model.__class__ = model.smn_class  # type: ignore[assignment]
