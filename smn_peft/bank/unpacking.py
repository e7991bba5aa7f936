# SPDX-License-Identifier: Apache-2.0
"""Coded masks to bits, with every size known from the base."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..functional.packing import packed_size
from ..functional.selection import seeded_generator, select_trainable
from ..storage import AdapterFileError
from ..storage.codec import BLOB_NAME, MaskBlob, accelerate, decode_masks
from .live import LiveModel

__all__ = ["blob_in", "decode_blob"]


@functools.cache
def _accelerate_once() -> None:
    """Read by compiled code where numba is installed: a bank reads many masks."""
    with contextlib.suppress(ImportError):
        accelerate()


def blob_in(tensors: Mapping[str, Tensor]) -> tuple[str, MaskBlob] | None:
    """The coded masks among an adapter's tensors, with the prefix of their names; None if they are bit-packed.

    Raises:
        AdapterFileError: If they are damaged.
    """
    key = next((key for key in tensors if key.rpartition(".")[2] == BLOB_NAME), None)
    if key is None:
        return None
    if tensors[key].dtype != torch.uint8:
        raise AdapterFileError(f"{key} is {tensors[key].dtype}, coded masks are uint8: the adapter is damaged.")
    return key.removesuffix(BLOB_NAME), MaskBlob.parse(tensors[key].numpy().data)


def decode_blob(
    prefix: str,
    blob: MaskBlob,
    live: LiveModel,
    locate: Callable[[str], tuple[str, str]],
    config: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Bit-packed masks by key.

    Args:
        prefix: What the keys have before the names in the blob.
        blob: The coded masks.
        live: Of the base, on whose own weights a selection or the codec may build.
        locate: From a key to the name of the base's parameter and its path from the masked layer.
        config: The adapter's.

    Raises:
        AdapterFileError: If a mask is damaged.
        ValueError: If a size is not that of the base.
    """
    _accelerate_once()
    for entry in blob.entries:
        numel = live.shape(locate(prefix + entry.name)[0]).numel()
        if entry.size != packed_size(numel):
            raise ValueError(
                f"{prefix}{entry.name} is coded for {entry.size} bytes of bits, the base has {numel} weights there: "
                "open the bank over the base that adapter_config.json names."
            )

    masks = decode_masks(blob, blob.size, _Base(live, prefix, locate, config))
    return {prefix + name: torch.from_numpy(bits) for name, bits in masks.items()}


@dataclass(frozen=True)
class _Base:
    """What the codec asks of the base."""

    live: LiveModel
    prefix: str
    locate: Callable[[str], tuple[str, str]]
    config: Mapping[str, Any]

    def selected(self, name: str) -> NDArray[np.bool_] | None:
        fraction = self.config.get("trainable_fraction", 1.0)
        if fraction == 1.0:
            return None
        parameter, path = self.locate(self.prefix + name)
        layer = (self.prefix + name).rpartition(".")[0]
        generator = seeded_generator(self.config.get("seed", 0), f"{layer}.{path}.select")
        weight = self.live.values(parameter)
        return select_trainable(weight, fraction, self.config["select"], generator).reshape(-1).cpu().numpy()

    def weight(self, name: str) -> NDArray[np.floating]:
        weight = self.live.values(self.locate(self.prefix + name)[0])
        wide = weight.double() if weight.dtype == torch.float64 else weight.float()  # exact: the order stays
        return wide.reshape(-1).cpu().numpy()
