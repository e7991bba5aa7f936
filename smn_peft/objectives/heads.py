# SPDX-License-Identifier: Apache-2.0
"""What objectives put on top of the features: projection heads and prototypes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PROJECTIONS", "ProjectionHead", "Prototypes"]


def _mlp(feature_dim: int, hidden_dim: int, output_dim: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(feature_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, output_dim)
    )


PROJECTIONS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "linear": lambda feature_dim, hidden_dim, output_dim: nn.Linear(feature_dim, output_dim),
    "mlp": _mlp,
}
"""Projections by name: feature, hidden and output dimension in. The first is the paper's, the second SwAV's own."""


class ProjectionHead(nn.Module):
    """Projects features and normalises them to length 1."""

    def __init__(self, kind: str, feature_dim: int, hidden_dim: int, output_dim: int) -> None:
        """Make the projection.

        Args:
            kind: A key of [`PROJECTIONS`].
            feature_dim: Features per image.
            hidden_dim: Width of the hidden layer, where there is one.
            output_dim: Dimension of the embeddings.
        """
        super().__init__()
        self.projection = PROJECTIONS[kind](feature_dim, hidden_dim, output_dim)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, feature_dim) -> embeddings (batch, output_dim) of length 1, fp32."""
        projected: Tensor = self.projection(features.float())
        return F.normalize(projected.float(), dim=1)  # fp32: bf16 lengths are off by 1 %


class Prototypes(nn.Module):
    """K directions of length 1 that embeddings are compared with; a linear layer without bias."""

    def __init__(self, dim: int, count: int) -> None:
        """Draw random directions.

        Args:
            dim: Dimension of the embeddings.
            count: Number of prototypes K.
        """
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(count, dim), dim=1))

    @torch.no_grad()
    def normalise(self) -> None:
        """Bring every prototype back to length 1, in place."""
        self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, embeddings: Tensor) -> Tensor:
        """(batch, dim) -> cosine similarities (batch, K), fp32 also under autocast."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(embeddings.float(), self.weight)
