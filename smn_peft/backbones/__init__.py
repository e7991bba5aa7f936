# SPDX-License-Identifier: Apache-2.0
"""Pretrained vision models by name, each with its own image transform and pooled features."""

from __future__ import annotations

from ..tuner.checks import base_name
from .backbone import Backbone, accept_size, pooled_features
from .classifier import Classifier, load_classifier
from .clip import clip_key_mapping, text_embeddings
from .from_file import is_file_spec, load_from_file, name_read_from
from .load import load_backbone

__all__ = [
    "Backbone",
    "Classifier",
    "accept_size",
    "base_name",
    "clip_key_mapping",
    "is_file_spec",
    "load_backbone",
    "load_classifier",
    "load_from_file",
    "name_read_from",
    "pooled_features",
    "text_embeddings",
]
