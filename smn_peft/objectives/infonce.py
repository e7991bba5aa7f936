# SPDX-License-Identifier: Apache-2.0
"""InfoNCE: every view of an image is told apart from all other images of the batch (SimCLR, Chen et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .._options import check_options, option
from ..functional.distributed import gather_rows, process_index
from .base import Batch, Model, Objective, register_objective
from .swav import ProjectionHead


@dataclass(frozen=True)
class InfoNCEOptions:
    """Options of [`InfoNCE`]."""

    projection: Literal["linear", "mlp"] = option("mlp", "Projection head: 'linear' or 'mlp' (Linear-BN-ReLU-Linear).")
    hidden_dim: int = option(2048, "Width of the hidden layer of the 'mlp' projection.", least=1)
    output_dim: int = option(128, "Dimension of the embeddings that are compared.", least=1)
    temperature: float = option(0.1, "Temperature τ of the similarities.", above=0)

    def __post_init__(self) -> None:
        check_options(self)


def contrastive_loss(embeddings: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """NT-Xent (SimCLR, Eq. 1), over the images of all processes and over any number of views.

    For each view the other views of its image are the positives, whose terms are averaged (L_out of Khosla et al.
    2020, Eq. 2); with two views that is SimCLR's loss.

    Args:
        embeddings: Unit vectors (views, batch, dim) of this process, fp32.
        temperature: τ.

    Returns:
        The mean over this process's views and images, and the share of these whose nearest is a positive, both 0-dim.
    """
    views, batch, _ = embeddings.shape
    everything = gather_rows(embeddings, dim=1, differentiable=True)
    images = everything.shape[1]
    logits = embeddings.flatten(0, 1) @ everything.flatten(0, 1).T / temperature
    own = torch.arange(batch, device=logits.device) + process_index() * batch
    image = own.repeat(views)  # of each row
    same = image[:, None] == torch.arange(images, device=logits.device).repeat(views)
    itself = image + images * torch.arange(views, device=logits.device).repeat_interleave(batch)
    logits = logits.scatter(1, itself[:, None], -torch.inf)
    positives = same.scatter(1, itself[:, None], False)
    loss = logits.logsumexp(1) - logits.masked_fill(~positives, 0).sum(1) / (views - 1)
    nearest = positives.gather(1, logits.detach().argmax(1, keepdim=True))
    return loss.mean(), nearest.float().mean()


@register_objective("infonce")
class InfoNCE(Objective):
    """Projection head on the features and contrastive loss of all crops; see [`Objective`] for the arguments."""

    views = "crops"
    needs_labels = False
    consumes = "features"
    Options = InfoNCEOptions

    def __init__(self, feature_dim: int, num_classes: int | None, options: InfoNCEOptions) -> None:
        super().__init__(feature_dim, num_classes, options)
        self.head = ProjectionHead(options.projection, feature_dim, options.hidden_dim, options.output_dim)

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch of crops, and ``"matched"``, the share of crops whose nearest is of the same image."""
        crops = self.crops(batch)
        embeddings = self.head(self.crop_features(model, crops))
        with torch.autocast(embeddings.device.type, enabled=False):
            loss, matched = contrastive_loss(embeddings.unflatten(0, (len(crops), -1)), self.options.temperature)
        return {"loss": loss, "matched": matched}
