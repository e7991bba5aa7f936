# SPDX-License-Identifier: Apache-2.0
"""A task as it is held in memory: per masked tensor either its bits or the few weights that it switches off."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..functional.packing import popcount
from ..storage import check_packed

__all__ = ["SPARSE_BELOW", "Task", "TaskMask"]

SPARSE_BELOW = 1 / 40
"""Up to this inactive fraction a task is held as indices: zeroing them beats writing the whole tensor."""


_OBJECT = 160  # bytes of a mask's or a task's own object, with its numbers and its place in a table
_TENSOR = 550  # bytes of a tensor's objects, torch's and numpy's, beside its values


@dataclass(frozen=True, eq=False, slots=True)
class TaskMask:
    """What a task does to one tensor of the base.

    Attributes:
        numel: Number of weights.
        active: How many of them stay on.
        scale: What the kept weights are multiplied with, ``sqrt(numel / active)``, or 1 without scaling.
        packed: uint8 (⌈numel/8⌉,), bits in numpy's `packbits` order; None where `removed` says the same.
        removed: int32 indices of the weights that are off, ascending, in C order; None where `packed` is held.
    """

    numel: int
    active: int
    scale: float
    packed: Tensor | None
    removed: Tensor | None

    @classmethod
    def from_packed(
        cls, name: str, packed: Tensor, numel: int, *, scaled: bool, sparse_below: float = SPARSE_BELOW
    ) -> TaskMask:
        """Choose the form that switches faster.

        Args:
            name: Of the tensor, for messages.
            packed: uint8 bits of the mask, as in an adapter file.
            numel: Number of weights that the base has there.
            scaled: Whether kept weights are divided by σ.
            sparse_below: Inactive fraction up to which indices are held; 0 for a tensor that must be written whole.

        Raises:
            TypeError: If the bits are not uint8.
            ValueError: If their number does not fit, or padding bits are set.
        """
        check_packed(name, packed, numel)
        removed = _zeros(packed.numpy(), numel, int(sparse_below * numel))
        active = popcount(packed) if removed is None else numel - len(removed)
        scale = math.sqrt(numel / active) if scaled and active else 1.0
        if removed is None:
            return cls(numel, active, scale, packed, None)
        return cls(numel, active, scale, None, torch.from_numpy(removed))


@dataclass(frozen=True, eq=False)
class Task:
    """A task that can be switched to.

    Attributes:
        name: Its name in the bank.
        masks: By parameter name of the base.
        tensors: Parameters and buffers that the task brings along whole, by their name in the base: the head,
            BatchNorm statistics.
        info: The adapter's config, and what else is known of it.
        info_nbytes: Bytes that `info` takes for this task alone.
        nbytes: Bytes in memory, those of Python's and torch's objects too.
    """

    name: str
    masks: Mapping[str, TaskMask]
    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any] = field(default_factory=dict)
    info_nbytes: int = 0
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Weigh the task once."""
        parts = [part for mask in self.masks.values() for part in (mask.packed, mask.removed) if part is not None]
        tables = sys.getsizeof(self.masks) + sys.getsizeof(self.tensors)
        objects = _OBJECT * (len(self.masks) + 4) + tables
        object.__setattr__(self, "nbytes", _bytes_of([*parts, *self.tensors.values()]) + objects + self.info_nbytes)

    @property
    def density(self) -> float:
        """Fraction of the masked weights that are active."""
        return sum(mask.active for mask in self.masks.values()) / sum(mask.numel for mask in self.masks.values())


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors keep in memory: a view keeps all that it is a view of."""
    tensors = list(tensors)
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values()) + _TENSOR * len(tensors)


def _zeros(packed: NDArray[np.uint8], numel: int, limit: int) -> NDArray[np.int32] | None:
    """Where the bits are zero, ascending; None if more than `limit` are. Only bytes that hold one are looked into."""
    holed = np.flatnonzero(packed != 255).astype(np.int32)
    if len(holed) > limit + 1:  # the last byte may hold nothing but padding
        return None
    row, bit = np.nonzero(np.unpackbits(packed[holed][:, None], axis=1) == 0)
    found = 8 * holed[row] + bit.astype(np.int32)
    found = found[found < numel]
    return found if len(found) <= limit else None
