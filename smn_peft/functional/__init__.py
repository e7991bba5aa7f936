# SPDX-License-Identifier: Apache-2.0
"""Pure functions on tensors: masks, effective weights and bit packing. No modules, no PEFT, no files."""

from __future__ import annotations

from .effective import masked_conv, masked_linear
from .features import Whitening, fit_whitening
from .masking import (
    MASK_TYPES,
    MaskSpec,
    compute_mask,
    density,
    effective_weight,
    masked_weight,
    progressive_density,
    scale_of,
    straight_through,
    threshold_mask,
    topk_mask,
)
from .packing import hamming, pack_bits, packed_size, popcount, round_stochastically, unpack_bits

__all__ = [
    "MASK_TYPES",
    "MaskSpec",
    "Whitening",
    "compute_mask",
    "density",
    "effective_weight",
    "fit_whitening",
    "hamming",
    "masked_conv",
    "masked_linear",
    "masked_weight",
    "pack_bits",
    "packed_size",
    "popcount",
    "progressive_density",
    "round_stochastically",
    "scale_of",
    "straight_through",
    "threshold_mask",
    "topk_mask",
    "unpack_bits",
]
