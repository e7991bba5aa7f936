# SPDX-License-Identifier: Apache-2.0
"""`LiveModel`: a plain model in whose memory tasks take turns."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .live_tensor import LiveTensor
from .named_forward import NamedForward
from .scaled_linear import ScaledLinear, scalable_weights
from .task import Task

__all__ = ["LiveModel"]


class LiveModel:
    """A model whose masked weights are rewritten in place, from task to task and back to the base.

    One thread at a time may switch; [`values`] and [`shape`] are the base's own, and safe from any thread.

    Attributes:
        model: The base, in eval mode.
        current: The task that the weights are of; None: the base's own.
        scalable: Names of the weights whose layer takes 1/σ on itself.
        generation: Counts switches; a result belongs to a task only if the counter did not move meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        """Bind a model.

        Raises:
            ValueError: If adapters wrap the model already, or it has a bank.
        """
        _check_plain(model)
        self.model = model.eval()
        self.current: Task | None = None
        self.generation = 0
        self.scalable = scalable_weights(model)
        self._live: dict[str, LiveTensor] = {}
        self._linears: dict[str, ScaledLinear] = {}
        self._own: dict[str, Tensor] = {}
        self._touched: set[str] = set()
        self._memory = threading.RLock()  # held while weights are written, never while they are used
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self._shapes = {name: tensor.shape for name, tensor in named}
        self._tied = _tied(model)
        self._modules: dict[str, nn.Module] = {}
        self._inference = any(tensor.is_inference() for _, tensor in named)

    def may_be_sparse(self, name: str) -> bool:
        """Whether a task may be held as indices at this parameter."""
        return name in self.scalable

    def shape(self, name: str) -> torch.Size:
        """Shape of a parameter or buffer of the base; AttributeError if it has none of this name."""
        if name not in self._shapes:
            raise AttributeError(f"The base has no {name}.")
        return self._shapes[name]

    def check_alone(self, name: str) -> None:
        """Refuse a parameter that is another one too: what a task does to it would happen to both.

        Raises:
            ValueError: If it is tied.
        """
        if name in self._tied:
            raise ValueError(
                f"the base's {name} is tied: {', '.join(self._tied[name])} are one tensor, and a mask on one would "
                "change the other in silence. Give each its own (layer.weight = nn.Parameter(layer.weight.clone())), "
                "and open the bank anew."
            )

    def values(self, name: str) -> Tensor:
        """A parameter's own values, whichever task is live; not to be written to."""
        with self._writable():
            if name in self._own:
                return self._own[name].detach().clone()
            live, parameter = self._bound(name), self._parameter(name)
            if not live.touched:
                live.follow(name, parameter)
            return live.values().to(parameter.dtype)

    @contextmanager
    def _writable(self) -> Iterator[None]:
        """What is made here serves every later call, whether it computes gradients or not."""
        with self._memory, torch.inference_mode(self._inference), torch.no_grad():
            yield

    def switch(self, task: Task | None) -> None:
        """Make the model the task's, or the base's own again.

        A switch that fails, whatever the reason, leaves the base.

        Raises:
            RuntimeError: What the device raised, such as running out of memory; or if somebody else wrote to the
                base's weights.
        """
        with self._writable():
            if self._moved(task):
                self.current = None
                for linear in self._linears.values():
                    linear.move()
            elif task is self.current and (task is not None or not (self._touched or self._own)):
                return
            self.generation += 1
            self.current = None
            try:
                self._leave(task)
                if task is not None:
                    self._enter(task)
            except BaseException:
                self._leave(None)
                raise
            self.current = task

    def _moved(self, task: Task | None) -> bool:
        """Whether a weight that a task is in, or is to come into, has another place than before."""
        names = self._touched if task is None or task is self.current else self._touched.union(task.masks)
        moved = [
            live.follow(name, self._parameter(name)) for name in names if (live := self._live.get(name)) is not None
        ]
        return any(moved)

    def _leave(self, task: Task | None) -> None:
        """Undo what the next task does not overwrite."""
        masks = {} if task is None else task.masks
        for name in [name for name in self._touched if name not in masks]:
            self._live[name].restore()
            self._touched.discard(name)
            self._follow(name)
        kept = set() if task is None else task.tensors.keys()
        for name in [name for name in self._own if name not in kept]:
            _put_back(self.model, name, self._own.pop(name))

    def _enter(self, task: Task) -> None:
        for name, mask in task.masks.items():
            live = self._bound(name)
            if name in self.scalable and name not in self._linears:
                layer: Any = self.model.get_submodule(name.rpartition(".")[0])
                self._linears[name] = ScaledLinear(layer, live)
            self._touched.add(name)
            live.apply(mask)
            self._follow(name)
        for name, tensor in task.tensors.items():
            own = _tensor(self.model, name)
            self._own.setdefault(name, own if isinstance(own, nn.Parameter) else own.clone())
            _replace(self.model, name, tensor.to(own.device, own.dtype, copy=True))

    def _bound(self, name: str) -> LiveTensor:
        if name not in self._live:
            self._live[name] = LiveTensor(self._parameter(name), scales_outside=name in self.scalable)
        return self._live[name]

    def _parameter(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        if name not in self._modules:
            self._modules[name] = self.model.get_submodule(path)
        parameter = self._modules[name]._parameters[leaf]
        assert parameter is not None
        return parameter

    def _follow(self, name: str) -> None:
        if name in self._linears:
            self._linears[name].follow()

    def close(self) -> None:
        """Give the base back as it was, with its own forwards.

        Raises:
            RuntimeError: If that cannot be, as somebody else wrote to weights that a task was in.
        """
        try:
            self.switch(None)
        finally:
            for linear in self._linears.values():
                linear.remove()
            self._live.clear()
            self._linears.clear()
            self._touched.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held to restore the base."""
        return sum(live.nbytes for live in self._live.values()) + sum(tensor.nbytes for tensor in self._own.values())


def _check_plain(model: nn.Module) -> None:
    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    if any(isinstance(module, wrappers) for module in model.modules()) or hasattr(model, "peft_config"):
        raise ValueError(
            "A bank takes the plain base model, and this one has PEFT adapters: pass model.unload(), or load the "
            "base anew."
        )
    if any(isinstance(module.__dict__.get("forward"), (NamedForward, ScaledLinear)) for module in model.modules()):
        raise ValueError(
            "This model has a bank already, and two would undo each other's weights: close that one first, add the "
            "tasks to it, or load the base anew."
        )


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters that have several, each with all names that its tensor has."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    return {name: names for names in owners.values() if len(names) > 1 for name in names}


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return tensor


def _put_back(model: nn.Module, name: str, own: Tensor) -> None:
    """The base's own tensor again, where the model is now."""
    there = _tensor(model, name)
    if isinstance(own, nn.Parameter) and (own.device, own.dtype) != (there.device, there.dtype):
        own.data = own.data.to(there.device, there.dtype)
    _replace(model, name, own)


def _replace(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer: in place where the shapes agree and it is a buffer, else as another tensor."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf].copy_(tensor)
        return
    module._parameters[leaf] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
    if isinstance(module, nn.Linear) and leaf == "weight":
        module.out_features, module.in_features = tensor.shape
