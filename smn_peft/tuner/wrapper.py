# SPDX-License-Identifier: Apache-2.0
"""`AdapterLayer`: a wrapper of a base layer with tensors per adapter; how to call a layer with other tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from threading import RLock
from typing import Any, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..functional.masking import MaskSpec
from .config import MaskConfig
from .mixed import in_rows, name_in_force, rows_in_force

__all__ = [
    "STATE_LOCK",
    "AdapterInfo",
    "AdapterLayer",
    "ResidentBuffers",
    "ScoreDict",
    "Slot",
    "adapter_layers",
    "call_with",
    "is_plain",
    "view_with",
]

STATE_LOCK = RLock()
"""Held where a forward changes what all threads share: it takes over loaded masks, or takes out merged ones."""

_OF_TOOLS = frozenset({"_hf_hook", "_old_forward"})  # accelerate's: they are of the module that it put them on
# What a layer without `in_features` and `out_features` calls them.
_SIZES: Mapping[str, tuple[str, ...]] = {
    "in_features": ("in_channels", "num_embeddings", "nx", "embed_dim", "num_features"),
    "out_features": ("out_channels", "embedding_dim", "nf", "embed_dim", "num_features"),
}


class Slot(NamedTuple):
    """A tensor of the base layer that can be masked.

    Attributes:
        name: Infix of the adapter's keys: ``""`` gives ``smn_mask``, ``"bias_"`` gives ``smn_bias_mask``.
        path: Path of the parameter from the base layer.
        weight: Of a bias, the `name` of its weight's slot; it is masked only with ``mask_bias=True`` or with its row.
    """

    name: str
    path: str
    weight: str | None = None

    @property
    def is_bias(self) -> bool:
        """Whether it is a bias."""
        return self.weight is not None

    @property
    def scores_name(self) -> str:
        """Name of the container of scores."""
        return f"smn_{self.name}scores"

    @property
    def unit_scores_name(self) -> str:
        """Name of the container of scores of whole rows or columns, which a bias shares with its weight."""
        return f"smn_{self.weight if self.weight is not None else self.name}unit_scores"

    @property
    def mask_name(self) -> str:
        """Name of the container of packed bits."""
        return f"smn_{self.name}mask"


@dataclass
class AdapterInfo:
    """What a layer knows of one adapter, beside its tensors."""

    config: MaskConfig
    spec: MaskSpec
    key: str
    slots: tuple[Slot, ...]
    granularity: str = "weight"
    trainable: dict[str, Tensor] = field(default_factory=dict)


class ScoreDict(nn.ParameterDict):
    """Scores by adapter name; a cast of the model to a narrower dtype leaves them as wide as they were.

    A score that crosses its threshold in steps of 1e-4 does not move at all in bf16.
    """

    def __getitem__(self, key: str) -> nn.Parameter:
        """Scores of an adapter; quicker than `nn.ParameterDict`'s own, since every forward reads them."""
        own = self._parameters.get(key)
        return self.__dict__[key] if own is None else own  # a replica of nn.DataParallel has attributes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScoreDict:
        def keep_width(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if result.dtype.itemsize < tensor.dtype.itemsize else result

        super()._apply(keep_width, recurse)  # type: ignore[no-untyped-call]
        return self


class ResidentBuffers(BufferDict):
    """Buffers by adapter name, of which only the newest is a registered buffer.

    The newest stands in the module's state dict under exactly the key of the checkpoint, where every loader finds it,
    transformers' native one included. The `older` ones are in a plain dict: `state_dict()`, `named_buffers()` and all
    that loops over them cost the same with two adapters as with a thousand.
    """

    def __init__(self) -> None:
        super().__init__(persistent=True)
        self.older: dict[str, Tensor] = {}

    def __getitem__(self, key: str) -> Tensor:
        buffer = self._buffers.get(key)
        return self.older[key] if buffer is None else buffer

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        if key in self.older:
            self.older[key] = buffer
            return
        if key not in self._buffers:
            self.older.update(self._buffers)  # type: ignore[arg-type]
            self._buffers.clear()
        self._buffers[key] = buffer

    def __delitem__(self, key: str) -> None:
        if self._buffers.pop(key, None) is None:
            del self.older[key]
        elif self.older:  # the newest of the rest takes its place
            newest, buffer = self.older.popitem()
            self._buffers[newest] = buffer

    def __contains__(self, key: object) -> bool:
        return key in self._buffers or key in self.older

    def discard(self, key: str) -> None:
        """Drop an adapter's buffer if there is one."""
        if key in self:
            del self[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ResidentBuffers:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.older.update({key: fn(buffer) for key, buffer in self.older.items()})
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key, buffer in self.older.items():
            if (loaded := state_dict.pop(prefix + key, None)) is not None:
                buffer.copy_(loaded)
        super()._load_from_state_dict(state_dict, prefix, *args)


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A wrapper of a base layer that has state per adapter; it answers for the base layer in all else."""

    hides_parts = False

    def __init__(self, base_layer: nn.Module) -> None:
        """Wrap `base_layer`; `update_layer` adds adapters."""
        super().__init__()
        self.base_layer = base_layer
        self.smn_info: dict[str, AdapterInfo] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        """Look up a stride, a size or whatever a model reads from its layers in the base layer."""
        own = self.__dict__.get("_modules", ())
        is_own = name in own or "base_layer" not in own or name.startswith("__") or name in _OF_TOOLS
        if is_own or hasattr(type(self), name):  # a property that failed: the base's value would be the wrong answer
            return super().__getattr__(name)
        return self.of_base(name)

    def of_base(self, name: str) -> Any:
        """An attribute of the base layer, with its value in this layer."""
        base = self._modules["base_layer"]
        known = (alias for alias in (name, *_SIZES.get(name, ())) if hasattr(base, alias))
        return getattr(base, next(known, name))

    @property
    def active_adapters(self) -> list[str]:
        """Active adapters; in a mixed batch the one that the running samples are under."""
        name = name_in_force()
        if name is not None:
            return [name] if name in self.smn_info else []
        active = self._active_adapter
        return [active] if isinstance(active, str) else active

    # --- Forward -----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the layer in whatever state it is: disabled, merged, adapted, or mixed over the batch."""
        if self._disable_adapters or self.merged_adapters:
            self.unmerge_if_disabled()
            return self.base_layer(*args, **kwargs)
        if (rows := rows_in_force(self)) is None:
            return self.run(self.active_adapters, *args, **kwargs)

        def run(name: str, *rest: Any, **others: Any) -> Any:
            return self.run([name], *rest, **others)

        return in_rows(rows, next(iter(self.smn_info.values())).key, run, *args, **kwargs)

    def run(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward under the named adapters; a name that the layer does not know changes nothing."""
        raise NotImplementedError

    def unmerge_if_disabled(self) -> None:
        """Unmerge if adapters are disabled; other threads wait until the base is as it was."""
        if self._disable_adapters and self.merged_adapters:
            with STATE_LOCK:
                if self.merged_adapters:
                    self.unmerge()

    # --- What the model asks of it -----------------------------------------------------------------------------------

    def unmerged(self) -> dict[int, Tensor | None]:
        """Values before merging of the base's tensors, by the tensor's `id`; None if they come back rounded only."""
        raise NotImplementedError

    def to_checkpoint(self, adapter_name: str, prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Entries of the adapter's file for this layer, from a (gathered) state dict where it has them.

        Keys start with `prefix`, the layer's name in `state_dict`, and end in the adapter's name, as PEFT's do.
        """
        raise NotImplementedError

    def from_checkpoint(self, adapter_name: str, prefix: str, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """State-dict entries of this layer (``smn_mask.default`` …) from a file's (``smn_mask`` …), checked.

        What the layer knows is taken out of `entries`.

        Raises:
            KeyError: If a tensor is missing; the argument is its key.
        """
        raise NotImplementedError

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Modules of the layer; without its parts while PEFT looks for `modules_to_save`."""
        found = super().named_modules(*args, **kwargs)
        return islice(found, 1) if self.hides_parts else found

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        base = self.get_base_layer()
        target = device or next(tensor.device for tensor in (*base.parameters(), *base.buffers()))
        for container in self._modules.values():
            if isinstance(container, (ScoreDict, ResidentBuffers)) and adapter_name in container:
                tensor: Any = container[adapter_name]
                container[adapter_name] = tensor if tensor.device.type == "meta" else tensor.to(target)

    def _get_available_adapters(self) -> set[str]:
        return set(self.smn_info)

    def __repr__(self) -> str:
        return "smn." + super().__repr__()


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Every layer that adapters live on, with its name in the state dict."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            yield name, module


# --- A layer with other tensors --------------------------------------------------------------------------------------


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module is nothing more than its class's forward: no hook, no forward put over it."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooked and "forward" not in module.__dict__


def view_with(module: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """A module like the given one with other tensors, by their paths; all the rest is shared with it.

    The tensors are plain attributes, which win over parameters, and over what FSDP sets: its gathered parameters are
    attributes as well.
    """
    view = _copy(module)
    for path, tensor in tensors.items():
        owner = view
        *parts, attribute = path.split(".")
        for part in parts:
            child = _copy(owner._modules[part])
            owner.__dict__["_modules"] = {**owner._modules, part: child}
            owner = child
        owner.__dict__[attribute] = tensor
    return view


def _copy(module: Any) -> Any:
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    return copy


def call_with(module: nn.Module, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """Call a module as if the given tensors were its parameters and buffers, by their paths.

    As `torch.func.functional_call`, but for threads: nothing of the module is written, not even for the call. Its
    hooks are called with the module itself.
    """
    if torch.compiler.is_compiling():
        return torch.func.functional_call(module, dict(tensors), args, kwargs)
    if "forward" in module.__dict__:  # it may hold the module, as accelerate's does: no copy would be asked
        own = {path: getattr(module.get_submodule(path.rpartition(".")[0]), path.split(".")[-1]) for path in tensors}
        with _Replaced({id(own[path]): tensor for path, tensor in tensors.items()}):
            return module(*args, **kwargs)
    view = view_with(module, tensors)
    if is_plain(module):
        return view.forward(*args, **kwargs)
    view.__dict__["_compiled_call_impl"] = None  # it would call the module
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        if hooks := getattr(module, name):
            view.__dict__[name] = OrderedDict((key, partial(_call_hook, hook, module)) for key, hook in hooks.items())
    return view(*args, **kwargs)


def _call_hook(hook: Callable[..., Any], module: nn.Module, view: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return hook(module, *args, **kwargs)


class _Replaced(TorchFunctionMode):
    """Replace tensors in the arguments of torch's functions, in this thread."""

    def __init__(self, tensors: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._swapped(args), **{key: self._swapped(value) for key, value in (kwargs or {}).items()})

    def _swapped(self, value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(self._swapped(item) for item in value)
        return self._tensors.get(id(value), value)
