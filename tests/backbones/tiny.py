# SPDX-License-Identifier: Apache-2.0
"""Options of tiny models."""

from __future__ import annotations

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
VIT = {"depth": 1, "embed_dim": 32, "num_heads": 2}
