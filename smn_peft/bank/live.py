# SPDX-License-Identifier: Apache-2.0
"""`LiveModel`: a plain model in whose memory tasks take turns."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .live_tensor import LiveTensor
from .named_call import NamedCall
from .task import Task

__all__ = ["LiveModel"]


class LiveModel:
    """A model whose masked weights are rewritten in place, from task to task and back to the base.

    One thread at a time may switch; [`values`] and [`shape`] are the base's own, and safe from any thread.

    Attributes:
        model: The base, in eval mode.
        current: The task that the weights are of; None: the base's own.
        scalable: Names of the weights whose products may take 1/σ: those of plain Linear layers.
        memory: Held while weights are written, never while they are used.
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
        self.scalable = {
            f"{name}.weight"
            for name, module in model.named_modules(remove_duplicate=False)
            if type(module) is nn.Linear and type(module._parameters.get("weight")) is nn.Parameter
        }
        self._live: dict[str, LiveTensor] = {}
        self._own: dict[str, Tensor] = {}
        self._touched: set[str] = set()
        self.memory = threading.RLock()
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self._shapes = {name: tensor.shape for name, tensor in named}
        first = {id(tensor): name for name, tensor in reversed(named)}
        self._first_names = {name: first[id(tensor)] for name, tensor in named}
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

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that a parameter or buffer of the base has now."""
        return _tensor(self.model, name).dtype

    def first_name(self, name: str) -> str:
        """The one name that a tensor goes by here, where its module stands in several places."""
        return self._first_names.get(name, name)

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
        """A parameter's or buffer's own values, whichever task is live; not to be written to."""
        with self._writable():
            if name in self._own:
                return self._own[name].detach().clone()
            if not isinstance(own := _tensor(self.model, name), nn.Parameter):
                return own.clone()
            live, parameter = self._bound(name), self._parameter(name)
            if not live.touched:
                live.follow(name, parameter)
            return live.values().to(parameter.dtype)

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        """What is made here serves every later call, whether it computes gradients or not."""
        with self.memory, torch.inference_mode(self._inference), torch.no_grad():
            yield

    def switch(self, task: Task | None) -> None:
        """Make the model the task's, or the base's own again.

        A switch that fails, whatever the reason, leaves the base.

        Raises:
            RuntimeError: What the device raised, such as running out of memory; or if somebody else wrote to the
                base's weights.
        """
        with self._writable():
            generation = self.generation
            try:
                if self._moved(task):
                    self.current = None
                elif task is self.current and (task is not None or not (self._touched or self._own)):
                    return
                self.generation += 1
                self.current = None
                self._leave(task)
                if task is not None:
                    self._enter(task)
            except BaseException:
                self.generation, self.current = generation + 1, None
                self._rescue()
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
        kept = set() if task is None else task.tensors.keys()
        for name in [name for name in self._own if name not in kept]:
            _put_back(self.model, name, self._own[name])
            del self._own[name]

    def _rescue(self) -> None:
        """Undo all that can be undone, and overwrite nothing that somebody else wrote."""
        for name in list(self._touched):
            with contextlib.suppress(Exception):  # the error that led here is the one to tell
                self._live[name].follow(name, self._parameter(name))
                self._live[name].restore()
                self._touched.discard(name)
        for name in list(self._own):
            with contextlib.suppress(Exception):
                _put_back(self.model, name, self._own[name])
                del self._own[name]

    def _enter(self, task: Task) -> None:
        for name, mask in task.masks.items():
            live = self._bound(name)
            self._touched.add(name)
            live.apply(mask)
        for name, tensor in task.tensors.items():
            own = _tensor(self.model, name)
            self._own.setdefault(name, own if isinstance(own, nn.Parameter) else own.clone())
            _replace(self.model, name, tensor.to(own.device, own.dtype, copy=True))

    def _bound(self, name: str) -> LiveTensor:
        if name not in self._live:
            scalable = name in self.scalable
            self._live[name] = LiveTensor(self._parameter(name), scales_outside=scalable, writing=self._writable)
        return self._live[name]

    def _parameter(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        if name not in self._modules:
            self._modules[name] = self.model.get_submodule(path)
        parameter = self._modules[name]._parameters[leaf]
        assert parameter is not None
        return parameter

    def close(self) -> None:
        """Give the base back as it was.

        Raises:
            RuntimeError: If that cannot be, as somebody else wrote to weights that a task was in.
        """
        try:
            self.switch(None)
        finally:
            for live in self._live.values():
                live.release()
            self._live.clear()
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
    if any(isinstance(module, NamedCall) for module in model.modules()):
        raise ValueError(
            "This model has a bank already, and two would undo each other's weights: close that one first, add the "
            "tasks to it, or load the base anew."
        )


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters that two modules hold, or that a module holds which stands in two places; all names.

    A module that stands in several places because its parent does has one place, its parent's.
    """
    owners: dict[int, set[tuple[int, str]]] = defaultdict(set)
    holders: dict[int, set[int]] = defaultdict(set)
    names: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, part in (*module._parameters.items(), *module._modules.items()):
            owners[id(part)].add((id(module), attribute))
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                holders[id(parameter)].add(id(module))
                names[id(parameter)].append(f"{path}.{attribute}".removeprefix("."))
    tied = {
        parameter
        for parameter, modules in holders.items()
        if len(owners[parameter]) > 1 or any(len(owners[module]) > 1 for module in modules)
    }
    return {name: names[parameter] for parameter in tied for name in names[parameter]}


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
