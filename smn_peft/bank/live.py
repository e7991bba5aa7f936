# SPDX-License-Identifier: Apache-2.0
"""A plain model in whose memory tasks take turns: its weights are overwritten, and restored bit for bit."""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from ..functional.effective import write_masked
from ..tuner.checks import tied_parameters
from .task import BankStats, Task, TaskMask

__all__ = ["LiveModel", "LiveParameter", "LiveTensor", "Reading", "watch"]

# What can be asked of a tensor without looking at its values; anything else settles it, which is slower and as right.
_PROPERTIES = "shape dtype device layout requires_grad is_leaf grad grad_fn ndim is_cuda is_cpu is_meta nbytes"
_METHODS = "size dim numel element_size is_floating_point is_contiguous stride __len__ storage_offset requires_grad_"
_FACTS = {getattr(Tensor, name).__get__ for name in _PROPERTIES.split()}
_FACTS |= {getattr(Tensor, name) for name in _METHODS.split()}


class Reading(Protocol):
    """Answers for a [`LiveParameter`] when it is read."""

    @property
    def scale(self) -> Tensor:
        """Factor that the values lack, fp32, 0-dim; compiled graphs read it at every call."""

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute `F.linear` with the task's weight."""

    def settle(self) -> None:
        """Write the task's values before anything but `F.linear` reads or writes the parameter."""


class LiveParameter(nn.Parameter):
    """A parameter whose values may lack its task's 1/σ, which its [`Reading`] knows.

    `F.linear` computes with the task's weight, at no cost. Any other use of the values, through whatever name or
    reference, settles them first. Compiled extensions that take a tensor without torch's Python functions, such as
    ``torch.jit.script``, are not seen.
    """

    smn_reading: Reading

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            input, weight, bias = _arguments(*args, **kwargs)
            if isinstance(weight, LiveParameter) and not isinstance(input, LiveParameter) and len(types) == 1:
                with torch._C.DisableTorchFunctionSubclass():
                    if torch.compiler.is_dynamo_compiling():
                        return F.linear(input * weight.smn_reading.scale.to(input.dtype), weight, bias)
                    return weight.smn_reading.linear(input, weight, bias)
        if torch.compiler.is_dynamo_compiling():  # the graph serves later tasks too
            with torch._C.DisableTorchFunctionSubclass():
                args, kwargs = tree_map(_scaled, (tuple(args), dict(kwargs)))
                return func(*args, **kwargs)
        if func not in _FACTS:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, LiveParameter):
                    leaf.smn_reading.settle()
                    if len(types) > 1:  # another class's turn, which must see an ordinary parameter
                        watch(leaf, None)
            if len(types) > 1:
                return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def _plain(self) -> nn.Parameter:
        """An ordinary parameter of what is live, in this memory."""
        self.smn_reading.settle()
        with torch._C.DisableTorchFunctionSubclass():
            return nn.Parameter(self.detach(), self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return copy.deepcopy(self._plain())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)

    __hash__ = object.__hash__


def _arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _scaled(leaf: Any) -> Any:
    return leaf * leaf.smn_reading.scale.to(leaf.dtype) if isinstance(leaf, LiveParameter) else leaf


def watch(parameter: Any, reading: Reading | None) -> Reading | None:
    """Let a reading answer for a parameter, whose identity and memory stay; return the one that did before.

    With None it is an ordinary parameter again; its values must be settled.
    """
    before: Reading | None = parameter.__dict__.get("smn_reading")
    if reading is not None:
        parameter.__class__ = LiveParameter
        parameter.smn_reading = reading
    elif before is not None:
        del parameter.smn_reading
        parameter.__class__ = nn.Parameter
    return before


class LiveTensor:
    """A parameter of the base that is overwritten in place. Its methods are called without gradients.

    A dense task is undone by a copy of the base's tensor, made when the first such task comes; a sparse one, which
    only a contiguous parameter takes, by the values that it removed. It touches no others: the parameter is a
    [`LiveParameter`], and products are multiplied by `outside`.
    """

    def __init__(
        self, model: nn.Module, name: str, writing: Callable[[], AbstractContextManager[object]] = torch.no_grad
    ) -> None:
        """Bind a model's parameter; [`settle`] enters `writing`."""
        self.name, self._writing = name, writing
        path, _, self._leaf = name.rpartition(".")
        self._module = model.get_submodule(path)
        self._bind()

    def _bind(self) -> None:
        parameter: Any = self._module._parameters[self._leaf]
        with torch._C.DisableTorchFunctionSubclass():
            self._parameter, self._tensor = parameter, parameter.detach()
        self.outside = 1.0
        self.scale = torch.ones((), dtype=torch.float32, device=self._tensor.device)
        self._undo: tuple[Tensor, Tensor] | None = None  # indices and values of what a sparse task removed
        self._original: Tensor | None = None  # contiguous
        self._dirty = False  # the values are to be put back from the original
        self._seen = _state(parameter)

    @property
    def touched(self) -> bool:
        """Whether the weight is a task's."""
        return self._dirty or self._undo is not None or self.outside != 1.0

    def follow(self) -> bool:
        """Bind the parameter anew if it has another dtype, device or memory format by now, and return whether it has.

        RuntimeError if somebody else wrote other values to it.
        """
        parameter: Any = self._module._parameters[self._leaf]
        state = _state(parameter)
        if parameter is self._parameter and state == self._seen:
            return False
        if parameter is not self._parameter or state[0] != self._seen[0] or parameter.shape != self._tensor.shape:
            raise RuntimeError(
                f"{self.name} was written to, or replaced, since a bank uses it, so that its tasks do not fit any "
                "more. Close the bank before the base is changed, and open it again afterwards."
            )
        own = self.values() if self.touched else None
        self._bind()
        if own is not None:
            self._tensor.copy_(own)
            self._seen = _state(parameter)
        return True

    def values(self) -> Tensor:
        """Return the base's own values, whatever is live; they must not be written to."""
        if self._original is not None:
            return self._original
        values: Tensor = self._tensor.clone(memory_format=torch.contiguous_format)
        if self._undo is not None:
            values.view(-1).index_copy_(0, *self._undo)
        return values

    def apply(self, mask: TaskMask) -> None:
        """Overwrite the values with this task's."""
        if mask.packed is not None:
            original = self._dirtied()
            own = self._tensor if self._tensor.is_contiguous() else torch.empty_like(original)
            write_masked(own.view(-1), original.view(-1), mask.packed.to(own.device, non_blocking=True), mask.scale)
            if own is not self._tensor:
                self._tensor.copy_(own)
        elif mask.removed is not None:
            self._undo_values()
            if mask.scale != 1.0:
                watch(self._parameter, self)
            if len(mask.removed):
                flat = self._tensor.view(-1)
                removed = mask.removed.to(flat.device, non_blocking=True).long()
                self._undo = removed, flat.index_select(0, removed)
                flat.index_fill_(0, removed, 0)
            self._leave_outside(mask.scale)
        self._seen = _state(self._parameter)

    def _leave_outside(self, scale: float) -> None:
        if scale != self.outside:
            self.outside = scale
            self.scale.fill_(scale)

    def _dirtied(self) -> Tensor:
        """Keep the base's own values, and return them, before all are overwritten."""
        original = self.values()
        self._original, self._undo, self._dirty = original, None, True
        self._leave_outside(1.0)
        return original

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``s·(x Wᵀ) + b``: (…, in_features) -> (…, out_features)."""
        scale = self.outside
        if scale == 1.0 or input.dtype != weight.dtype or torch.is_autocast_enabled(input.device.type):
            return F.linear(input if scale == 1.0 else input * scale, weight, bias)
        flat = input.reshape(-1, input.shape[-1])
        start = flat.new_empty(()) if bias is None else bias
        product = torch.addmm(start, flat, weight.t(), beta=0 if bias is None else 1, alpha=scale)
        return product.view(*input.shape[:-1], len(weight))

    def settle(self) -> None:
        """Write 1/σ into the values, for this task."""
        if self.outside == 1.0:
            return
        with self._writing(), _disable_current_modes():  # torch.export reads under a mode of fake tensors
            if (scale := self.outside) != 1.0:
                self._dirtied()
                self._tensor.mul_(scale)
                self._seen = _state(self._parameter)

    def restore(self) -> None:
        """Put the base's values back, bit for bit; nothing happens where they are."""
        self._undo_values()
        self._leave_outside(1.0)
        self._seen = _state(self._parameter)

    def _undo_values(self) -> None:
        if self._dirty:
            assert self._original is not None
            try:
                self._tensor.copy_(self._original)
            except RuntimeError:  # memory that nobody can write to holds them still
                if not torch.equal(self._tensor, self._original):
                    raise
            self._dirty = False
        elif self._undo is not None:
            self._tensor.view(-1).index_copy_(0, *self._undo)
            self._undo = None

    def release(self) -> None:
        """Let the parameter be an ordinary one again, with the values that it has."""
        self.settle()
        watch(self._parameter, None)


def _state(parameter: Tensor) -> tuple[object, ...]:
    """The version, which grows with every change in place, and where and how the values lie."""
    with torch._C.DisableTorchFunctionSubclass():
        version = -1 if parameter.is_inference() else parameter._version
        return version, parameter.data_ptr(), parameter.dtype, parameter.stride()


_with_bank: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class LiveModel:
    """A model whose masked weights are rewritten in place, from task to task and back to the base.

    One thread at a time may switch; [`values`] are the base's own, and safe from any thread.

    Attributes:
        model: The base, in eval mode.
        current: The task that the weights are of; None: the base's own.
        shapes: Of the base's own parameters and buffers, by name.
        first_names: The one name that each goes by here, where its module stands in several places.
        scalable: Names of the weights that take sparse tasks: those of plain Linear layers, contiguous.
        tied: All names of each parameter that is tied, by each of them.
        memory: Held while weights are written, never while they are used.
    """

    def __init__(self, model: nn.Module, stats: BankStats) -> None:
        """Bind a model; ValueError if adapters wrap it already, or it has a bank."""
        modules = list(model.modules())
        wrapped = any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in modules)
        if wrapped or hasattr(model, "peft_config"):
            raise ValueError("A bank takes the plain base model, and this one has PEFT adapters: pass model.unload().")
        if any(module in _with_bank for module in modules):
            raise ValueError("This model has a bank already: close that one first, or add the tasks to it.")
        self.model = model.eval()
        self.current: Task | None = None
        self.stats, self.memory = stats, threading.RLock()
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.shapes = {name: tensor.shape for name, tensor in named}
        linears = {path for path, module in model.named_modules(remove_duplicate=False) if type(module) is nn.Linear}
        self.scalable = {
            name
            for name, tensor in named
            if name.endswith("weight") and name.rpartition(".")[0] in linears
            if type(tensor) is nn.Parameter and tensor.is_contiguous()
        }
        self.tied = tied_parameters(model)
        first = {id(tensor): name for name, tensor in reversed(named)}
        self.first_names = {name: first[id(tensor)] for name, tensor in named}
        self._inference = any(tensor.is_inference() for _, tensor in named)
        self._live: dict[str, LiveTensor] = {}
        self._own: dict[str, Tensor] = {}  # of the base, while a task brings another
        _with_bank.add(model)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that a parameter or buffer of the base has now."""
        return _tensor(self.model, name).dtype

    def values(self, name: str) -> Tensor:
        """A parameter's or buffer's own values, whichever task is live; not to be written to."""
        with self._writable():
            if name in self._own:
                return self._own[name].detach().clone()
            if not isinstance(own := _tensor(self.model, name), nn.Parameter):
                return own.clone()
            live = self._bound(name)
            if not live.touched:
                live.follow()
            return live.values().to(own.dtype)

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        """What is made here serves every later call, whether it computes gradients or not."""
        with self.memory, torch.inference_mode(self._inference), torch.no_grad():
            yield

    def switch(self, task: Task | None) -> None:
        """Make the model the task's, or the base's own again; one that fails, whatever the reason, leaves the base.

        RuntimeError if somebody else wrote to the base's weights, or of the device.
        """
        masks, brought = ({}, {}) if task is None else (task.masks, task.tensors)
        with self._writable():
            try:
                concerned = {name: live for name, live in self._live.items() if live.touched or name in masks}
                moved = any([live.follow() for live in concerned.values()])
                if not moved and task is self.current and (task is not None or not (concerned or self._own)):
                    return
                self.stats.switches += 1
                self.current = None
                for name in concerned.keys() - masks.keys():
                    self._live[name].restore()
                for name in self._own.keys() - brought.keys():
                    self._put_back(name)
                for name, mask in masks.items():
                    self._bound(name).apply(mask)
                for name, tensor in brought.items():
                    own = _tensor(self.model, name)
                    self._own.setdefault(name, own if isinstance(own, nn.Parameter) else own.clone())
                    _replace(self.model, name, tensor.to(own.device, own.dtype, copy=True))
            except BaseException:
                self.current = None
                self._rescue()
                raise
            self.current = task

    def _rescue(self) -> None:
        """Undo what can be undone, without overwriting what somebody else wrote."""
        for live in self._live.values():
            with contextlib.suppress(Exception):  # the error that led here is the one to tell
                live.follow()
                live.restore()
        for name in list(self._own):
            with contextlib.suppress(Exception):
                self._put_back(name)

    def _put_back(self, name: str) -> None:
        """The base's own tensor again, where the model is now."""
        own, there = self._own[name], _tensor(self.model, name)
        if isinstance(own, nn.Parameter) and (own.device, own.dtype) != (there.device, there.dtype):
            own.data = own.data.to(there.device, there.dtype)
        _replace(self.model, name, own)
        del self._own[name]

    def _bound(self, name: str) -> LiveTensor:
        if name not in self._live:
            self._live[name] = LiveTensor(self.model, name, self._writable)
        return self._live[name]

    def close(self) -> None:
        """Give the base back as it was; RuntimeError if somebody else wrote to weights that a task was in."""
        try:
            self.switch(None)
        finally:
            _with_bank.discard(self.model)
            for live in self._live.values():
                live.release()
            self._live.clear()


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return tensor


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
