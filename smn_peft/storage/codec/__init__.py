# SPDX-License-Identifier: Apache-2.0
"""Masks at about their entropy: the cheapest of five codes per layer, all layers in one blob of bytes."""

from __future__ import annotations

from .accelerated import accelerate
from .blob import BLOB_NAME, Base, LayerEntry, MaskBlob, decode_masks, encode_masks
from .errors import CodecError
from .layer_codes import LayerCode, decode_layer, encode_layer, needs_weight
from .registry import CODECS, codec_id, codec_name

__all__ = [
    "BLOB_NAME",
    "CODECS",
    "Base",
    "CodecError",
    "LayerCode",
    "LayerEntry",
    "MaskBlob",
    "accelerate",
    "codec_id",
    "codec_name",
    "decode_layer",
    "decode_masks",
    "encode_layer",
    "encode_masks",
    "needs_weight",
]
