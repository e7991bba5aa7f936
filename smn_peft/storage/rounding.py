# SPDX-License-Identifier: Apache-2.0
"""Dtypes that a head and statistics can be saved in, and rounding to them without a surprise."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SAVE_DTYPES", "rounded"]

SAVE_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Dtypes by the names that a config says; float32 leaves every tensor as it is."""


def rounded(name: str, tensor: Tensor, save_dtype: str) -> Tensor:
    """A tensor in the dtype that it is saved in.

    Args:
        name: Its key, for the message.
        tensor: Any tensor; one that is not a float, or not wider than the dtype, is given back as it is.
        save_dtype: A key of [`SAVE_DTYPES`].

    Raises:
        ValueError: If a finite value becomes infinite: fp16 ends at 65504.
    """
    dtype = SAVE_DTYPES[save_dtype]
    if save_dtype == "float32" or not tensor.is_floating_point() or tensor.element_size() <= dtype.itemsize:
        return tensor
    narrow = tensor.detach().to(dtype)
    if bool((torch.isinf(narrow) & torch.isfinite(tensor)).any()):
        raise ValueError(
            f"{name} holds values beyond what {save_dtype} can hold ({float(tensor.abs().max()):.3g}): save it with "
            "save_dtype='bfloat16' or 'float32'."
        )
    return narrow
