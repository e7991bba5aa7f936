# SPDX-License-Identifier: Apache-2.0
"""What of a layer can be masked, and what a layer knows of an adapter beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ..functional.masking import MaskSpec
from .config import MaskConfig

__all__ = ["AdapterInfo", "Slot"]


class Slot(NamedTuple):
    """A tensor of the base layer that can be masked.

    Attributes:
        name: Infix of the adapter's keys: ``""`` gives ``smn_mask``, ``"bias_"`` gives ``smn_bias_mask``.
        path: Path of the parameter from the base layer.
        is_bias: Whether it is masked only with ``mask_bias=True``.
    """

    name: str
    path: str
    is_bias: bool = False

    @property
    def scores_name(self) -> str:
        """Name of the container of scores."""
        return f"smn_{self.name}scores"

    @property
    def mask_name(self) -> str:
        """Name of the container of packed bits."""
        return f"smn_{self.name}mask"


@dataclass
class AdapterInfo:
    """What a layer knows of one adapter, beside its tensors."""

    config: MaskConfig
    spec: MaskSpec
    key: str
    slots: tuple[Slot, ...]
    trainable: dict[str, Tensor] = field(default_factory=dict)
