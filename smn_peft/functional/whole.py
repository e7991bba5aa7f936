# SPDX-License-Identifier: Apache-2.0
"""`whole_numbers`: labels and indices as int64, from whatever type, and never another number than was meant."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["whole_numbers"]


def whole_numbers(values: Any, where: str, what: str = "label") -> Tensor:
    """Numbers as int64; floating point is taken only where every value is a whole number.

    Args:
        values: Tensor, NumPy array, number or sequence of numbers, of any shape.
        where: What they belong to, for the message.
        what: What one of them is.

    Returns:
        int64 of the same shape, on the same device.

    Raises:
        ValueError: If they are no numbers, or one is not whole (1 - 1e-9, NaN) or does not fit int64.
    """
    try:
        if not isinstance(values, Tensor):
            array = np.asarray(values)  # torch would make fp32 of a list of floats
            if array.dtype.kind not in "iufb":
                raise ValueError(f"they are {array.dtype}")  # text, objects
            values = torch.as_tensor(array.astype(array.dtype.newbyteorder("=")))
        found: Tensor = values
        whole = found.to(torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: every {what} must be a whole number: {error}.") from error
    if found.is_floating_point():
        wrong = (found != found.round()) | ~(found.abs() < 2.0**63)
    elif found.dtype == torch.uint64:
        wrong = whole < 0  # beyond int64 it comes back negative
    else:
        return whole
    if bool(wrong.any()):
        index = int(wrong.flatten().nonzero()[0, 0])
        value = found.flatten()[index].item()
        raise ValueError(f"{where}: {what} {value!r} (number {index}) is no whole number.")
    return whole
