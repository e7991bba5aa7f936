# SPDX-License-Identifier: Apache-2.0
"""What a stored mask must look like: format version, dtype, size, zero padding."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional.packing import packed_size

__all__ = ["FORMAT_VERSION", "check_format_version", "check_packed"]

FORMAT_VERSION = 1
"""Version of the adapter format that this release writes; it reads every version up to this one."""


def check_format_version(version: object) -> None:
    """Refuse a format that this release does not know.

    Raises:
        ValueError: If `version` is not an integer from 1 to [`FORMAT_VERSION`].
    """
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(
            f"format_version must be a positive integer, got {version!r}: adapter_config.json is damaged."
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"This adapter has format version {version}; this smn_peft reads up to {FORMAT_VERSION}. "
            "Upgrade it: pip install -U smn_peft."
        )


def check_packed(name: str, packed: Tensor, numel: int) -> None:
    """Check a packed mask before it touches a model.

    Args:
        name: Key of the tensor, for the message.
        packed: What the file holds under that key.
        numel: Number of weights that the base model has there.

    Raises:
        TypeError: If the tensor is not uint8.
        ValueError: If its size is not ⌈numel/8⌉ bytes, or a padding bit is set.
    """
    if packed.dtype != torch.uint8:
        raise TypeError(
            f"{name} is {packed.dtype}, a packed mask is uint8. The file is damaged or is not a mask adapter: save it "
            "again with save_pretrained."
        )
    if packed.dim() != 1 or packed.numel() != packed_size(numel):
        raise ValueError(
            f"{name} has shape {tuple(packed.shape)}, but the base weight has {numel} entries and takes "
            f"({packed_size(numel)},) bytes. The adapter was made for another architecture: load the base model that "
            "its adapter_config.json names."
        )
    padding = -numel % 8
    if padding and packed.device.type != "meta" and int(packed[-1]) & ((1 << padding) - 1):
        raise ValueError(
            f"{name} has non-zero padding bits after its {numel} bits: the file is damaged. Download or save it again."
        )
