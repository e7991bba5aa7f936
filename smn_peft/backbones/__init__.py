# SPDX-License-Identifier: Apache-2.0
"""Pretrained vision models by name, each with its own image transform and pooled features."""

from __future__ import annotations

from ..tuner.base_name import base_name
from .backbone import Backbone, pooled_features
from .key_mapping import clip_key_mapping
from .load import load_backbone

__all__ = ["Backbone", "base_name", "clip_key_mapping", "load_backbone", "pooled_features"]
