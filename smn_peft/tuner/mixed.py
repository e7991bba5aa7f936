# SPDX-License-Identifier: Apache-2.0
"""Mixed batches by `adapter_names`: samples of one batch under different adapters.

A model is run once for every adapter of the batch, on that adapter's samples: that is right whatever the model does
with them (windows and patches folded into the batch, weights that are read and not called, BatchNorm over tokens).
Only models that generate, whose caches cannot be cut into samples, have theirs told apart in every layer instead.

What holds for a forward is in a context variable: other threads and tasks on the same model do not see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "MixedWeight",
    "in_mixed_batch",
    "in_rows",
    "join_rows",
    "mixed_batch",
    "name_in_force",
    "rows_in_force",
    "take_rows",
]

_ALTERNATIVES = "Use MaskBank.forward, or run one batch per adapter."


class _Mixed(NamedTuple):
    """A mixed batch that is running in this context."""

    rows: list[str] | None = None  # adapter of every row that a layer is given, or None while `name` is in force
    unrepeated: list[str] | None = None  # the same inside `encoder`, whose rows a beam search does not repeat
    encoder: frozenset[nn.Module] = frozenset()
    name: str | None = None  # the one adapter in force, "__base__" for none
    groups: _Groups | None = None  # what is to be joined when the model returns


class _Groups(NamedTuple):
    """A batch of which all but the last group has run."""

    whole: _Mixed  # what was in force for the batch
    parts: list[tuple[list[int], Any]]  # positions of the groups that have run, and their outputs
    rest: list[int]  # positions of the last group


_current: ContextVar[_Mixed | None] = ContextVar("smn_mixed", default=None)
_lock = Lock()
_count = 0
_running = False  # in any thread; a compiled graph sees this, and no context variable


_get = torch.compiler.disable(_current.get)


def in_mixed_batch() -> bool:
    """Whether this forward is of a mixed batch."""
    return bool(_running) and _get() is not None


def name_in_force() -> str | None:
    """The one adapter that this forward is under, whichever is active; None without a mixed batch."""
    mixed: _Mixed | None = _get() if _running else None
    return None if mixed is None else mixed.name


def rows_in_force(layer: nn.Module) -> list[str] | None:
    """Adapter of every row of a layer's input; None unless rows are separated inside the layers."""
    mixed: _Mixed | None = _get() if _running else None
    if mixed is None:
        return None
    return mixed.unrepeated if layer in mixed.encoder else mixed.rows


@contextmanager
def mixed_batch(model: nn.Module, names: Sequence[str], wrappers: Sequence[nn.Module], beams: int) -> Iterator[None]:
    """Run the model's samples under the named adapters, "__base__" for none.

    `wrappers` are PEFT's of `modules_to_save`, which take `adapter_names` themselves; generation repeats every sample
    `beams` times, but not in an encoder.
    """
    encoder: frozenset[nn.Module] = frozenset()
    if beams > 1 and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoder = frozenset(model.get_encoder().modules())  # type: ignore[operator]
    rows = [name for name in names for _ in range(beams)]
    handles = [wrapper.register_forward_pre_hook(_pass_names, with_kwargs=True) for wrapper in wrappers]
    if not getattr(model, "can_generate", bool)():
        handles.append(model.register_forward_pre_hook(_run_groups, with_kwargs=True))
        handles.append(model.register_forward_hook(_join_groups))
    token = _current.set(_Mixed(rows, list(names), encoder))
    _note(1)
    try:
        yield
    finally:
        _note(-1)
        _current.reset(token)
        for handle in handles:
            handle.remove()


def _note(change: int) -> None:
    global _count, _running
    with _lock:
        _count += change
        _running = _count > 0


def _pass_names(wrapper: Any, args: Any, kwargs: dict[str, Any] | None = None) -> tuple[Any, Any] | None:
    mixed = _get()
    if mixed is None or kwargs is None:  # another thread has just removed its hook: ours comes after it
        return None
    rows = rows_in_force(wrapper)
    names = [mixed.name] * len(next(iter((*args, *kwargs.values())))) if rows is None else rows
    return args, {**kwargs, "adapter_names": [name if name in wrapper._adapters else "__base__" for name in names]}


# --- A model, once per adapter ---------------------------------------------------------------------------------------


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _run_groups(model: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> tuple[Any, Any] | None:
    """Run the model for every adapter but the last; the forward that follows is the last one's."""
    mixed = _current.get()
    if mixed is None or mixed.rows is None or kwargs is None:  # as above
        return None
    count, parts = len(mixed.rows), []
    *others, (last, rest) = _positions(mixed.rows).items()
    for name, positions in others:
        token = _current.set(_Mixed(name=name))
        try:
            parts.append((positions, model(*take_rows(args, positions, count), **take_rows(kwargs, positions, count))))
        finally:
            _current.reset(token)
    _current.set(_Mixed(name=last, groups=_Groups(mixed, parts, rest)))
    return take_rows(args, rest, count), take_rows(kwargs, rest, count)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _join_groups(model: nn.Module, args: Any, output: Any) -> Any:
    mixed = _current.get()
    if mixed is None or mixed.groups is None:
        return None
    _current.set(mixed.groups.whole)
    if not mixed.groups.parts:
        return output
    positions, outputs = zip(*mixed.groups.parts, (mixed.groups.rest, output), strict=True)
    return join_rows(outputs, positions)


def _positions(names: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        groups.setdefault(name, []).append(position)
    return groups


def take_rows(inputs: Any, positions: list[int], count: int) -> Any:
    """Select the samples at some positions from all tensors and lists that have a row for each sample."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == count:
            return value[positions]
        if isinstance(value, list) and len(value) == count:
            return [value[position] for position in positions]
        return take_rows(value, positions, count) if isinstance(value, (tuple, dict)) else value

    if isinstance(inputs, dict):
        return {key: cut(value) for key, value in inputs.items()}
    return tuple(cut(value) for value in inputs)


def join_rows(outputs: Sequence[Any], positions: Sequence[list[int]], *, ragged: bool = False) -> Any:
    """Rows of several outputs in the order of the batch; what has no row for each sample must be the same for all.

    If `ragged`, rows of different shapes are returned as a list.
    """
    first, sizes = outputs[0], [len(group) for group in positions]
    if isinstance(first, Tensor):
        if [len(tensor) if tensor.dim() else -1 for tensor in outputs] == sizes:
            if len({tensor.shape[1:] for tensor in outputs}) == 1:
                return torch.cat(list(outputs))[_order(positions).to(first.device)]
            if ragged:
                together = [row for tensor in outputs for row in tensor]
                return [together[index] for index in _order(positions).tolist()]
        elif all(tensor.shape == first.shape and torch.equal(tensor, first) for tensor in outputs):
            return first
        kind = f"tensors of shapes {', '.join(str(tuple(tensor.shape)) for tensor in outputs)}"
    elif isinstance(first, list) and [len(output) for output in outputs] == sizes and isinstance(first[0], Mapping):
        together = [sample for output in outputs for sample in output]  # what a detector found in each image
        return [together[index] for index in _order(positions).tolist()]
    elif isinstance(first, Mapping):
        parts = {key: join_rows([output[key] for output in outputs], positions, ragged=ragged) for key in first}
        return type(first)(**parts) if all(isinstance(key, str) for key in parts) else parts
    elif isinstance(first, (tuple, list)):
        items = [join_rows(items, positions, ragged=ragged) for items in zip(*outputs, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    elif first is None or (isinstance(first, (str, int, float)) and all(output == first for output in outputs)):
        return first
    else:
        kind = f"a {type(first).__name__}"
    raise ValueError(
        f"The model returned {kind} for a batch under several adapters, which has no row for each sample: leave out "
        "labels, or whatever asks for it, or run one batch per adapter."
    )


def _order(positions: Sequence[list[int]]) -> Tensor:
    """Index of each sample's row in the joined groups."""
    return torch.tensor([position for group in positions for position in group], device="cpu").argsort()


# --- A layer, its rows apart -----------------------------------------------------------------------------------------


def in_rows(
    names: Sequence[str], layer: str, run: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """A layer's output whose rows are under different adapters: `run` is called with each name and its rows."""
    if len(x) != len(names):
        raise ValueError(
            f"Mixed batches by `adapter_names` are not possible in {layer!r}: it is given {len(x)} rows for "
            f"{len(names)} samples, so the model folds windows, patches or tokens into the batch, and which row is "
            f"which sample's is not known. {_ALTERNATIVES}"
        )
    groups = _positions(names)
    parts = [run(name, x[torch.tensor(group, device=x.device)], *args, **kwargs) for name, group in groups.items()]
    return torch.cat(parts)[_order(list(groups.values())).to(x.device)]


class MixedWeight(Tensor):
    """A masked weight while rows are under different adapters: its dtype, shape and device may be read, no more."""

    layer: str

    @classmethod
    def of(cls, weight: Tensor, layer: str) -> MixedWeight:
        """Stand in for a layer's weight."""
        stand_in = weight.detach().as_subclass(cls)
        stand_in.layer = layer
        return stand_in

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Allow functions that read no value."""
        if func.__name__ in _TELL_NO_VALUE:
            result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
            if not isinstance(result, Tensor):
                return result
        name = next((arg.layer for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, cls)), "a layer")
        raise ValueError(
            f"Mixed batches by `adapter_names` are not possible here: the model takes the weight of {name!r} and does "
            f"not call the layer, and every row has another weight. {_ALTERNATIVES}"
        )


_TELL_NO_VALUE = frozenset(
    "__get__ __len__ size dim ndimension numel nelement element_size stride storage_offset is_contiguous "
    "is_floating_point is_complex get_device".split()
)
