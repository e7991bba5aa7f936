# SPDX-License-Identifier: Apache-2.0
"""What every task of a sorted batch removed, taken off one shared product; compiled by numba (extra ``fast``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..functional.compiled import compiled
from .task import TaskMask

__all__ = ["remove"]

_LANES = 32  # samples are padded to so many, which the compiler adds up without a rest
_ROWS = 32  # outputs at a time, so that what is taken off them stays in the cache
_FREEDOMS = frozenset({"contract", "nsz"})
_NONE = torch.empty(0, dtype=torch.int32)


def remove(
    product: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, runs: Sequence[tuple[TaskMask | None, int]]
) -> bool:
    """``product = s·(product − x Cᵀ) + b`` in place, with C and s of the task that each run of rows has.

    Args:
        product: (rows, out_features), contiguous, on the CPU: x Wᵀ of the whole weight.
        input: x, (rows, in_features), of the product's dtype, as are weight and bias.
        weight: W, (out_features, in_features).
        bias: b, (out_features,).
        runs: The mask and the number of rows of each run, in order; None: the base's own weight.

    Returns:
        False if nothing was done: numba is not installed, or the weight is not contiguous.
    """
    if not weight.is_contiguous() or (run := compiled(_remove, _FREEDOMS)) is None:
        return False
    flat, rows = weight.detach().view(-1).numpy(), input.contiguous()
    added = np.zeros(len(weight), flat.dtype) if bias is None else bias.detach().numpy()
    lanes = -(-max(count for _, count in runs) // _LANES) * _LANES
    columns, taken = np.zeros((weight.shape[1], lanes), flat.dtype), np.empty((_ROWS, lanes), flat.dtype)
    row = 0
    for mask, count in runs:
        removed = _NONE if mask is None or mask.removed is None else mask.removed
        scale = flat.dtype.type(1.0 if mask is None else mask.scale)
        part = slice(row, row + count)
        run(product[part].numpy(), rows[part].numpy(), removed.numpy(), flat, added, scale, columns, taken)
        row += count
    return True


_NONE = torch.empty(0, dtype=torch.int32)


def _remove(
    product: Any, input: Any, removed: Any, weight: Any, bias: Any, scale: Any, columns: Any, taken: Any
) -> None:
    """One run; `columns` (in_features, padded) and `taken` (_ROWS, padded) are working memory."""
    (samples, out), (width, lanes) = product.shape, columns.shape
    for first in range(0, width if len(removed) else 0, _ROWS):
        for sample in range(samples):
            for column in range(first, min(first + _ROWS, width)):
                columns[column, sample] = input[sample, column]
    values = np.empty(len(removed), product.dtype)
    for index in range(len(removed)):  # all at once, since they come from everywhere in memory
        values[index] = weight[removed[index]]
    at = 0
    for first in range(0, out, _ROWS):
        last = min(first + _ROWS, out)
        taken[:] = 0
        for row in range(first, last):
            start = row * width
            while at < len(removed) and removed[at] < start + width:
                value, column = values[at], removed[at] - start
                for lane in range(lanes):
                    taken[row - first, lane] += value * columns[column, lane]
                at += 1
        for sample in range(samples):
            target, part = product[sample, first:last], bias[first:last]
            if last - first == _ROWS:  # a number that the compiler knows
                for row in range(_ROWS):
                    target[row] = (target[row] - taken[row, sample]) * scale + part[row]
            else:
                for row in range(last - first):
                    target[row] = (target[row] - taken[row, sample]) * scale + part[row]
