# SPDX-License-Identifier: Apache-2.0
"""Masks as PEFT adapters: one learned bit per frozen weight. Importing the package registers the type `SMN`."""

from __future__ import annotations

from ._push_to_hub import register
from .bank import MaskBank
from .tuner import MaskConfig, MaskModel, explain_targets, load_sliced, round_extras, save_sliced, slice_model

__all__ = [
    "MaskBank",
    "MaskConfig",
    "MaskModel",
    "explain_targets",
    "load_sliced",
    "round_extras",
    "save_sliced",
    "slice_model",
]

register()

__version__ = "0.1.0"
