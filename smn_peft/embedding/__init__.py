# SPDX-License-Identifier: Apache-2.0
"""Embeddings under a base, an adapter, a cascade or a bank's task: of whole datasets on disk, or batch by batch."""

from __future__ import annotations

from .dataset import FORMATS, embed_dataset
from .embedder import Embedder

__all__ = ["FORMATS", "Embedder", "embed_dataset"]
