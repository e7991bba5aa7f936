# SPDX-License-Identifier: Apache-2.0
"""Masks coded to about their entropy: the cheapest of four codes per layer, all layers in one blob of bytes."""

from __future__ import annotations

from .blob import BLOB_NAME, CODECS, Base, LayerEntry, MaskBlob, decode_masks, encode_masks
from .layer import LayerCode, accelerate, decode_layer, encode_layer

__all__ = [
    "BLOB_NAME",
    "CODECS",
    "Base",
    "LayerCode",
    "LayerEntry",
    "MaskBlob",
    "accelerate",
    "decode_layer",
    "decode_masks",
    "encode_layer",
    "encode_masks",
]
