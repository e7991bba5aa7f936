# SPDX-License-Identifier: Apache-2.0
"""Projection heads and prototypes: what objectives put on top of the features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ProjectionHead", "Prototypes"]


class ProjectionHead(nn.Module):
    """Project features (batch, feature_dim) to embeddings (batch, output_dim) of length 1, fp32.

    `kind` is ``"linear"``, the paper's, or ``"mlp"``, SwAV's own, with a hidden layer of `hidden_dim`.
    """

    def __init__(self, kind: str, feature_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        if kind == "linear":
            self.projection: nn.Module = nn.Linear(feature_dim, output_dim)
        else:
            hidden = nn.Linear(feature_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU()
            self.projection = nn.Sequential(*hidden, nn.Linear(hidden_dim, output_dim))

    def forward(self, features: Tensor) -> Tensor:
        """Project and normalise."""
        projected: Tensor = self.projection(features.float())
        return F.normalize(projected.float(), dim=1)  # fp32: bf16 lengths are off by 1 %


class Prototypes(nn.Module):
    """`count` unit vectors of dimension `dim` that embeddings are compared with; a linear layer without bias."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(count, dim), dim=1))

    @torch.no_grad()
    def normalise(self) -> None:
        """Scale every prototype back to length 1, in place."""
        self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, embeddings: Tensor) -> Tensor:
        """(batch, dim) -> cosine similarities (batch, K), fp32 also under autocast."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(embeddings.float(), self.weight)
