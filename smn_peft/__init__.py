# SPDX-License-Identifier: Apache-2.0
"""smn_peft: adapt a frozen vision backbone by learning one bit per weight. Importing it registers the method with PEFT."""

from __future__ import annotations

from .tuner import MaskConfig, MaskModel, explain_targets

__all__ = ["MaskConfig", "MaskModel", "explain_targets"]

__version__ = "0.1.0"
