# SPDX-License-Identifier: Apache-2.0
"""Binary masks as a PEFT method: importing this package registers the type `SMN` with PEFT."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from .config import SMN, MaskConfig
from .layer import MaskLayer
from .model import MaskModel
from .slicing import load_sliced, save_sliced, slice_model
from .state_dict import round_extras
from .targets import explain_targets

__all__ = [
    "MaskConfig",
    "MaskLayer",
    "MaskModel",
    "explain_targets",
    "load_sliced",
    "round_extras",
    "save_sliced",
    "slice_model",
]

_registered = PEFT_TYPE_TO_TUNER_MAPPING.get(SMN)
if _registered is None:
    register_peft_method(name="smn", config_cls=MaskConfig, model_cls=MaskModel, prefix="smn_")
elif _registered is not MaskModel:
    raise ImportError(
        f"The PEFT type SMN is already registered by {_registered.__module__}: import only one of the two packages."
    )
