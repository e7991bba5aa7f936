# SPDX-License-Identifier: Apache-2.0
"""Tasks as they are held in memory: the bits or the few removed weights of each masked tensor."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..functional.packing import popcount
from ..storage.adapter_file import check_packed

__all__ = ["SPARSE_BELOW", "BankStats", "Task", "TaskMask"]

SPARSE_BELOW = 1 / 40
"""Up to this inactive fraction a task is held as indices: zeroing them is faster than writing the whole tensor."""

_OBJECT = 160  # bytes of a mask's or a task's own object, with its numbers and its place in a table
_TENSOR = 550  # bytes of a tensor's objects, torch's and numpy's, beside its values


@dataclass(frozen=True, eq=False, slots=True)
class TaskMask:
    """What a task does to one tensor of the base; either `packed` or `removed` is held."""

    numel: int
    active: int  # weights that stay on
    scale: float  # multiplier of the kept weights, sqrt(numel / active), or 1 without scaling
    packed: Tensor | None  # uint8 (⌈numel/8⌉,), bits in numpy's `packbits` order
    removed: Tensor | None  # int32 indices of the weights that are off, ascending, in C order

    @classmethod
    def from_packed(
        cls, name: str, packed: Tensor, numel: int, *, scaled: bool, sparse_below: float = SPARSE_BELOW
    ) -> TaskMask:
        """Choose the form that switches faster: indices up to an inactive fraction of `sparse_below`.

        TypeError if the bits are not uint8, ValueError if their number does not fit or padding bits are set.
        """
        check_packed(name, packed, numel)
        zeros = _zeros(packed.numpy(), numel, int(sparse_below * numel))
        active = popcount(packed) if zeros is None else numel - len(zeros)
        scale = math.sqrt(numel / active) if scaled and active else 1.0
        held = (packed, None) if zeros is None else (None, torch.from_numpy(zeros))
        return cls(numel, active, scale, *held)


def _zeros(packed: NDArray[np.uint8], numel: int, limit: int) -> NDArray[np.int32] | None:
    """Where the bits are zero, ascending; None if more than `limit` are. Only bytes that hold one are looked into."""
    holed = np.flatnonzero(packed != 255).astype(np.int32)
    if len(holed) > limit + 1:  # the last byte may hold nothing but padding
        return None
    row, bit = np.nonzero(np.unpackbits(packed[holed][:, None], axis=1) == 0)
    found = 8 * holed[row] + bit.astype(np.int32)
    found = found[found < numel]
    return found if len(found) <= limit else None


@dataclass(frozen=True, eq=False)
class Task:
    """A task that can be switched to."""

    name: str
    masks: Mapping[str, TaskMask]  # by parameter name of the base
    tensors: Mapping[str, Tensor]  # brought along whole, by name in the base: the head, BatchNorm statistics
    info: Mapping[str, Any] = field(default_factory=dict)  # the adapter's config
    nbytes: int = field(init=False)  # in memory, those of Python's and torch's objects too

    def __post_init__(self) -> None:
        """Weigh the task once; a view keeps all that it is a view of."""
        parts = [part for mask in self.masks.values() for part in (mask.packed, mask.removed) if part is not None]
        parts += self.tensors.values()
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
        objects = _OBJECT * (len(self.masks) + 4) + sys.getsizeof(self.masks) + sys.getsizeof(self.tensors)
        nbytes = sum(storages.values()) + _TENSOR * len(parts) + objects + _size(self.info)
        object.__setattr__(self, "nbytes", nbytes)

    def in_one_block(self) -> Task:
        """Copy the task into one block of memory: what decoding takes and frees would lie in gaps between many."""
        parts = [part for mask in self.masks.values() for part in (mask.packed, mask.removed) if part is not None]
        parts += self.tensors.values()
        block, start = np.empty(sum(_aligned(part.nbytes) for part in parts), np.uint8), 0

        def moved(part: Tensor | None) -> Tensor | None:
            nonlocal start
            if part is None or not part.numel():
                return part
            copy = torch.frombuffer(block, dtype=part.dtype, count=part.numel(), offset=start)
            start += _aligned(part.nbytes)
            copy.copy_(part.reshape(-1))
            return copy if part.dim() == 1 else copy.view(part.shape)

        masks = {
            name: replace(mask, packed=moved(mask.packed), removed=moved(mask.removed))
            for name, mask in self.masks.items()
        }
        tensors = {name: copy for name, part in self.tensors.items() if (copy := moved(part)) is not None}
        return Task(self.name, masks, tensors, self.info)

    @property
    def density(self) -> float:
        """Fraction of the masked weights that are active."""
        return sum(mask.active for mask in self.masks.values()) / sum(mask.numel for mask in self.masks.values())


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _size(value: Any) -> int:
    """Bytes of a value out of JSON."""
    parts = value if isinstance(value, (list, tuple)) else ()
    if isinstance(value, Mapping):
        parts = (*value.keys(), *value.values())
    return sys.getsizeof(value) + sum(_size(part) for part in parts)


@dataclass
class BankStats:
    """What a bank has done since it was opened."""

    hits: int = 0  # lookups whose task was decoded already
    misses: int = 0  # lookups that had to decode
    evictions: int = 0  # decoded tasks that made room, or were too large to be kept
    switches: int = 0  # times that the model's weights were rewritten
    resident_bytes: int = 0  # of decoded tasks that are held now
    resident: int = 0  # number of these
