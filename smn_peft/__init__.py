# SPDX-License-Identifier: Apache-2.0
"""Adapt a frozen vision backbone by learning one bit per weight; importing this registers the method with PEFT."""

from __future__ import annotations

from ._push_to_hub import register
from .bank import MaskBank
from .tuner import MaskConfig, MaskModel, explain_targets, round_extras

__all__ = ["MaskBank", "MaskConfig", "MaskModel", "explain_targets", "round_extras"]

register()

__version__ = "0.1.0"
