# SPDX-License-Identifier: Apache-2.0
"""A plain model in whose memory tasks take turns: its weights are overwritten, and restored bit for bit."""

from __future__ import annotations

import contextlib
import threading
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
_FACTS = frozenset(
    getattr(Tensor, name).__get__
    for name in "shape dtype device layout requires_grad is_leaf grad grad_fn ndim is_cuda is_cpu is_meta nbytes "
    "itemsize is_sparse is_quantized is_nested _version _backward_hooks _grad".split()
) | frozenset(
    getattr(Tensor, name)
    for name in "size dim numel nelement element_size is_floating_point is_complex is_contiguous stride __len__ "
    "storage_offset is_inference requires_grad_ get_device ndimension".split()
)


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
        """Compute products by the reading; settle the values before any other use of them."""
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

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """An ordinary parameter that holds what is live."""
        self.smn_reading.settle()
        with torch._C.DisableTorchFunctionSubclass():
            copy = nn.Parameter(self.detach().clone(memory_format=torch.preserve_format), self.requires_grad)
        return memo.setdefault(id(self), copy)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as an ordinary parameter that holds what is live."""
        self.smn_reading.settle()
        with torch._C.DisableTorchFunctionSubclass():
            return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)

    __hash__ = object.__hash__


def _arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments of `F.linear`, however they were passed."""
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

    A sparse task is undone by the values that it removed. A dense one takes a copy of the base's tensor, made when the
    first such task comes; so does every task where the memory is in another order than the shape (channels_last).
    With `scales_outside` a sparse task touches only what it removes: the parameter is a [`LiveParameter`], and
    products are multiplied by `outside`.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        *,
        scales_outside: bool,
        writing: Callable[[], AbstractContextManager[object]] = torch.no_grad,
    ) -> None:
        """Bind a model's parameter, a plain one if its scale may stay outside; `writing` is for [`settle`]."""
        self.name, self.scales_outside, self._writing = name, scales_outside, writing
        path, _, self._leaf = name.rpartition(".")
        self._module = model.get_submodule(path)
        self._bind()

    def _bind(self) -> None:
        parameter: Any = self._module._parameters[self._leaf]
        self.outside = 1.0
        self.scale = torch.ones((), dtype=torch.float32, device=parameter.device)
        with torch._C.DisableTorchFunctionSubclass():
            self._parameter, self._tensor = parameter, parameter.detach()
        self._flat = self._tensor.view(-1) if self._tensor.is_contiguous() else None
        self._undo: tuple[Tensor, Tensor] | None = None
        self._original: Tensor | None = None
        self._dirty = False
        self._place, self._version = _place(parameter), _version(parameter)

    @property
    def touched(self) -> bool:
        """Whether some of the values are a task's."""
        return self._dirty or self._undo is not None

    def follow(self) -> bool:
        """Bind the parameter anew if it has another dtype, device or memory format by now, and return whether it has.

        RuntimeError if somebody else wrote other values to it.
        """
        parameter: Any = self._module._parameters[self._leaf]
        version = _version(parameter)
        if parameter is self._parameter and version == self._version and _place(parameter) == self._place:
            return False
        if parameter is not self._parameter or version != self._version or parameter.shape != self._tensor.shape:
            raise RuntimeError(
                f"{self.name} was written to, or replaced, since a bank uses it, so that its tasks do not fit any "
                "more. Close the bank before the base is changed, and open it again afterwards."
            )
        own = self.values() if self.touched else None
        self._bind()
        if own is not None:
            self._tensor.copy_(own)
            self._version = _version(parameter)
        return True

    def values(self) -> Tensor:
        """Return the base's own values, whatever is live; they must not be written to."""
        values = self._original
        if values is None:
            values = self._tensor.clone(memory_format=torch.contiguous_format).view(-1)
            if self._undo is not None:
                values.index_copy_(0, *self._undo)
        return values.view(self._tensor.shape)

    def apply(self, mask: TaskMask) -> None:
        """Overwrite the values with this task's."""
        if mask.packed is not None:
            self._write(mask.packed, mask.scale)
        else:
            assert mask.removed is not None
            assert self.scales_outside or mask.active == mask.numel
            self._undo_values()
            if self.scales_outside:
                watch(self._parameter, self)
            self._remove(mask.removed.to(self._tensor.device, non_blocking=True).long())
            self._leave_outside(mask.scale)
        self._version = _version(self._parameter)

    def _leave_outside(self, scale: float) -> None:
        if scale != self.outside:
            self.outside = scale
            self.scale.fill_(scale)

    def _write(self, packed: Tensor, scale: float) -> None:
        original = self._keep_original()
        self._dirty, self._undo = True, None
        self._leave_outside(1.0)
        out = torch.empty_like(original) if self._flat is None else self._flat
        write_masked(out, original, packed.to(out.device, non_blocking=True), scale)
        if self._flat is None:
            self._tensor.copy_(out.view(self._tensor.shape))

    def _remove(self, removed: Tensor) -> None:
        if self._flat is not None:
            self._undo = removed, self._flat.index_select(0, removed)
            self._flat.index_fill_(0, removed, 0)
        elif len(removed):
            self._dirty, left = True, self._keep_original().index_fill(0, removed, 0)
            self._tensor.copy_(left.view(self._tensor.shape))

    def _keep_original(self) -> Tensor:
        if self._original is None:
            self._original = self.values().view(-1)
        return self._original

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``s·(x Wᵀ) + b``: (…, in_features) -> (…, out_features)."""
        scale = self.outside
        if scale == 1.0 or input.dtype != weight.dtype or torch.is_autocast_enabled(input.device.type):
            return F.linear(input if scale == 1.0 else input * scale, weight, bias)
        flat = input.reshape(-1, input.shape[-1])
        if bias is None:
            product = flat.new_empty(len(flat), len(weight))
            product = torch.addmm(product, flat, weight.t(), beta=0, alpha=scale)
        else:
            product = torch.addmm(bias, flat, weight.t(), alpha=scale)
        return product.view(*input.shape[:-1], len(weight))

    def settle(self) -> None:
        """Write 1/σ into the values, for this task."""
        if self.outside == 1.0:
            return
        with self._writing(), _disable_current_modes():  # torch.export reads under a mode of fake tensors
            if (scale := self.outside) == 1.0:
                return
            self._keep_original()
            self._dirty, self._undo = True, None
            self._tensor.mul_(scale)
            self._leave_outside(1.0)
            self._version = _version(self._parameter)

    def restore(self) -> None:
        """Put the base's values back, bit for bit; nothing happens where they are."""
        self._undo_values()
        self._leave_outside(1.0)
        self._version = _version(self._parameter)

    def _undo_values(self) -> None:
        if self._dirty:
            assert self._original is not None
            try:
                self._tensor.copy_(self._original.view(self._tensor.shape))
            except RuntimeError:  # memory that nobody can write to holds them still
                if not torch.equal(self._tensor, self._original.view(self._tensor.shape)):
                    raise
            self._dirty = False
        if self._undo is not None:
            assert self._flat is not None
            self._flat.index_copy_(0, *self._undo)
            self._undo = None

    def release(self) -> None:
        """Let the parameter be an ordinary one again, with the values that it has."""
        self.settle()
        watch(self._parameter, None)


def _place(parameter: Tensor) -> tuple[object, ...]:
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.data_ptr(), parameter.dtype, parameter.stride()


def _version(parameter: Tensor) -> int:
    """Grows with every change in place, whoever makes it."""
    with torch._C.DisableTorchFunctionSubclass():
        return -1 if parameter.is_inference() else parameter._version


class LiveModel:
    """A model whose masked weights are rewritten in place, from task to task and back to the base.

    One thread at a time may switch; [`values`] are the base's own, and safe from any thread.

    Attributes:
        model: The base, in eval mode.
        current: The task that the weights are of; None: the base's own.
        shapes: Of the base's own parameters and buffers, by name.
        scalable: Names of the weights whose products may take 1/σ: those of plain Linear layers.
        tied: All names of each parameter that is tied, by each of them.
        memory: Held while weights are written, never while they are used.
        stats: Where switches are counted.
    """

    def __init__(self, model: nn.Module, stats: BankStats) -> None:
        """Bind a model; ValueError if adapters wrap it already, or it has a bank."""
        _check_plain(model)
        self.model = model.eval()
        self.current: Task | None = None
        self.stats = stats
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
        self.shapes = {name: tensor.shape for name, tensor in named}
        first = {id(tensor): name for name, tensor in reversed(named)}
        self._first_names = {name: first[id(tensor)] for name, tensor in named}
        self.tied = tied_parameters(model)
        self._inference = any(tensor.is_inference() for _, tensor in named)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that a parameter or buffer of the base has now."""
        return _tensor(self.model, name).dtype

    def first_name(self, name: str) -> str:
        """The one name that a tensor goes by here, where its module stands in several places."""
        return self._first_names.get(name, name)

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
        with self._writable():
            try:
                if self._moved(task):
                    self.current = None
                elif task is self.current and (task is not None or not (self._touched or self._own)):
                    return
                self.stats.switches += 1
                self.current = None
                self._leave(task)
                if task is not None:
                    self._enter(task)
            except BaseException:
                self.current = None
                self._rescue()
                raise
            self.current = task

    def _moved(self, task: Task | None) -> bool:
        """Whether a weight that a task is in, or is to come into, has another place than before."""
        names = self._touched if task is None or task is self.current else self._touched.union(task.masks)
        return any([self._live[name].follow() for name in names if name in self._live])

    def _leave(self, task: Task | None) -> None:
        """Undo what the next task does not overwrite."""
        masks = {} if task is None else task.masks
        for name in [name for name in self._touched if name not in masks]:
            self._live[name].restore()
            self._touched.discard(name)
        kept = set() if task is None else task.tensors.keys()
        for name in [name for name in self._own if name not in kept]:
            self._put_back(name)

    def _rescue(self) -> None:
        """Undo what can be undone, without overwriting what somebody else wrote."""
        for name in list(self._touched):
            with contextlib.suppress(Exception):  # the error that led here is the one to tell
                self._live[name].follow()
                self._live[name].restore()
                self._touched.discard(name)
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
            outside = name in self.scalable
            self._live[name] = LiveTensor(self.model, name, scales_outside=outside, writing=self._writable)
        return self._live[name]

    def close(self) -> None:
        """Give the base back as it was; RuntimeError if somebody else wrote to weights that a task was in."""
        try:
            self.switch(None)
        finally:
            for live in self._live.values():
                live.release()
            self._live.clear()
            self._touched.clear()


def _check_plain(model: nn.Module) -> None:
    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    if any(isinstance(module, wrappers) for module in model.modules()) or hasattr(model, "peft_config"):
        raise ValueError("A bank takes the plain base model, and this one has PEFT adapters: pass model.unload().")
    if any(hasattr(module, "smn_class") for module in model.modules()):  # a `NamedCall`
        raise ValueError("This model has a bank already: close that one first, or add the tasks to it.")


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
