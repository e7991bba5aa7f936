# SPDX-License-Identifier: Apache-2.0
"""One weight of the base while tasks take turns in its memory: written, and restored bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..functional.triton_kernels import usable
from .accelerated import fast_write
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
        compiled(target, source, bits)
        return _scale(out, scale)
    table = _all_or_none(out.dtype)
    masks = np.empty((min(_CHUNK, len(bits)), 8), table.dtype)
    for start in range(0, len(bits), _CHUNK):
        part, chunk = slice(8 * start, 8 * (start + _CHUNK)), bits[start : start + _CHUNK]
        np.take(table, chunk, axis=0, out=masks[: len(chunk)], mode="clip")  # another mode would copy
        np.bitwise_and(source[part], masks.reshape(-1)[: len(source[part])], out=target[part])
        _scale(out[part], scale)


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
    when the first such task comes.

    With `scales_outside` the tensor never holds 1/σ: its layer multiplies by `outside`, so that a sparse task touches
    only what it removes.
    """

    def __init__(self, parameter: Tensor, *, scales_outside: bool) -> None:
        """Bind a contiguous parameter; nothing is written."""
        self.scales_outside = scales_outside
        self.outside = 1.0
        self._flat = parameter.detach().view(-1)
        self._undo: tuple[Tensor, Tensor] | None = None
        self._original: Tensor | None = None
        self._dirty = False

    @torch.no_grad()
    def apply(self, mask: TaskMask) -> None:
        """Make the tensor the task's; what was there before is gone, whichever task's it was."""
        if mask.packed is not None:
            self._write(mask.packed, 1.0 if self.scales_outside else mask.scale)
        else:
            assert mask.removed is not None
            assert self.scales_outside or mask.active == mask.numel
            self.restore()
            removed = mask.removed.to(self._flat.device, non_blocking=True).long()
            self._undo = removed, self._flat.index_select(0, removed)
            self._flat.index_fill_(0, removed, 0)
        self.outside = mask.scale if self.scales_outside else 1.0

    def _write(self, packed: Tensor, scale: float) -> None:
        if self._original is None:
            self.restore()
            self._original = self._flat.clone()
        self._undo, self._dirty = None, True
        write_masked(self._flat, self._original, packed.to(self._flat.device, non_blocking=True), scale)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the base's values back, bit for bit; nothing happens where they are."""
        self.outside = 1.0
        if self._dirty:
            assert self._original is not None
            self._flat.copy_(self._original)
            self._dirty = False
        if self._undo is not None:
            self._flat.index_copy_(0, *self._undo)
            self._undo = None

    @property
    def nbytes(self) -> int:
        """Bytes held to undo."""
        held = [self._original, *(self._undo or ())]
        return sum(tensor.nbytes for tensor in held if tensor is not None)
