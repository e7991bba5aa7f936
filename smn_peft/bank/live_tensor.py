# SPDX-License-Identifier: Apache-2.0
"""One weight of the base while tasks take turns in its memory: written, and restored bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..functional.triton_kernels import usable
from .accelerated import fast_write
from .live_parameter import unwatch, watch
from .task import TaskMask

__all__ = ["LiveTensor", "write_masked"]

_CHUNK = 1 << 13  # bytes of bits: 64 Ki weights, so that a chunk's masks stay in the cache between two passes
_CHUNK_ON_DEVICE = 1 << 20  # there every call costs a launch, and masks take four bytes per weight
_BITS = torch.tensor([[byte >> shift & 1 for shift in range(7, -1, -1)] for byte in range(256)], device="cpu")
_FUSED = (torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@functools.cache
def _all_or_none(dtype: torch.dtype) -> NDArray[np.signedinteger[Any]]:
    """(256, 8) integers by byte of bits, all their bits set where a weight stays."""
    return (-_BITS.to(_INTEGERS[dtype.itemsize])).numpy()


def write_masked(out: Tensor, weight: Tensor, packed: Tensor, scale: float = 1.0) -> None:
    """``out = weight · mask · scale``, reading and writing memory once.

    Args:
        out: (N,), contiguous, of the weight's dtype and device; overwritten.
        weight: (N,), contiguous.
        packed: uint8 (⌈N/8⌉,) on the same device.
        scale: Multiplier of the kept weights.
    """
    if out.device.type == "cpu":
        _write_cpu(out, weight, packed, scale)
    else:
        _write_device(out, weight, packed, scale)


def _write_cpu(out: Tensor, weight: Tensor, packed: Tensor, scale: float) -> None:
    """In numpy, whose calls cost less than torch's on chunks, or compiled."""
    integer, bits = _INTEGERS[out.dtype.itemsize], packed.numpy()
    source, target = weight.view(integer).numpy(), out.view(integer).numpy()
    if compiled := fast_write():
        if integer is torch.int16:  # numpy has no bf16
            compiled(target, source, bits, target.dtype.type(1))
            return _scale(out, scale)
        return compiled(out.numpy(), weight.numpy(), bits, out.numpy().dtype.type(scale))
    table = _all_or_none(out.dtype)
    masks = np.empty((min(_CHUNK, len(bits)), 8), table.dtype)
    for start in range(0, len(bits), _CHUNK):
        part, chunk = slice(8 * start, 8 * (start + _CHUNK)), bits[start : start + _CHUNK]
        np.take(table, chunk, axis=0, out=masks[: len(chunk)], mode="clip")  # another mode would copy
        np.bitwise_and(source[part], masks.reshape(-1)[: len(source[part])], out=target[part])
        _scale(out[part], scale)
    return None


def _scale(out: Tensor, scale: float) -> None:
    if scale != 1.0:
        out.mul_(scale)


def _write_device(out: Tensor, weight: Tensor, packed: Tensor, scale: float) -> None:
    if out.device.type == "cuda" and out.dtype in _FUSED and out.numel() and (fused := _fused_write()):
        return fused(out, weight, packed, scale)
    table = _BITS.to(out.device, out.dtype)
    for start in range(0, packed.numel(), _CHUNK_ON_DEVICE):
        part = slice(8 * start, 8 * (start + _CHUNK_ON_DEVICE))
        masks = table[packed[start : start + _CHUNK_ON_DEVICE].int()].view(-1)[: out[part].numel()]
        torch.mul(weight[part], masks, out=out[part])
        _scale(out[part], scale)


@functools.cache
def _fused_write() -> Callable[[Tensor, Tensor, Tensor, float], None] | None:
    """The kernel, tried on eight weights."""

    def load() -> Callable[[Tensor, Tensor, Tensor, float], None]:
        from .fused_write import fused_write

        some = torch.zeros(8, device="cuda")
        fused_write(some, some.clone(), some.to(torch.uint8), 1.0)
        return fused_write

    return usable(load, "the write of masks")


class LiveTensor:
    """A parameter of the base, whose storage stays where it is.

    A sparse task is undone by the values that it removed; a dense one needs a copy of the base's tensor, which is made
    when the first such task comes, and so does every task where the memory is in another order than the shape
    (channels_last).

    With `scales_outside` a sparse task touches only what it removes: the parameter is a [`LiveParameter`], products
    are multiplied by `outside`, and whatever else reads it finds it settled, 1/σ and all.

    Its methods are called without gradients.
    """

    def __init__(
        self,
        parameter: Tensor,
        *,
        scales_outside: bool,
        writing: Callable[[], AbstractContextManager[object]] = torch.no_grad,
    ) -> None:
        """Bind a parameter; nothing is written.

        Args:
            parameter: A plain `nn.Parameter` if its scale may stay outside.
            scales_outside: Whether it may.
            writing: What [`settle`], which any reader may cause, writes under.
        """
        self.scales_outside = scales_outside
        self._writing = writing
        self._bind(parameter)

    def _bind(self, parameter: Tensor) -> None:
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

    def follow(self, name: str, parameter: Tensor) -> bool:
        """Notice what became of the parameter since it was bound; costs a microsecond where nothing did.

        Args:
            name: Of the parameter, for the message.
            parameter: What the layer has now.

        Returns:
            Whether it has another dtype, device or memory format; it is then bound there, with the base's values.

        Raises:
            RuntimeError: If somebody else wrote other values to it.
        """
        version = _version(parameter)
        if parameter is self._parameter and version == self._version and _place(parameter) == self._place:
            return False
        if parameter is not self._parameter or version != self._version or parameter.shape != self._tensor.shape:
            raise RuntimeError(
                f"{name} was written to, or replaced, since a bank uses it: what the bank's tasks were checked "
                "against, and would be put back, is not the model's any more. Close the bank before the base is "
                "changed, and open it again afterwards."
            )
        own = self.values() if self.touched else None
        self._bind(parameter)
        if own is not None:
            self._tensor.copy_(own)
            self._version = _version(parameter)
        return True

    def values(self) -> Tensor:
        """The base's own values, whatever is live: of the parameter's shape, and nobody writes to them."""
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
        unwatch(self._parameter)

    @property
    def nbytes(self) -> int:
        """Bytes held to undo."""
        held = [self._original, *(self._undo or ())]
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def _place(parameter: Tensor) -> tuple[object, ...]:
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.data_ptr(), parameter.dtype, parameter.stride()


def _version(parameter: Tensor) -> int:
    """Grows with every change in place, whoever makes it."""
    with torch._C.DisableTorchFunctionSubclass():
        return -1 if parameter.is_inference() else parameter._version
