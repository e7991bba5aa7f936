# SPDX-License-Identifier: Apache-2.0
"""CLIP's zero-shot head: cross-entropy of cosine similarities to frozen text embeddings of the class names."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Batch, Model, Objective, check_features, entry, register_objective
from .cross_entropy import CrossEntropyOptions, classification_loss


@register_objective("zero_shot")
class ZeroShot(Objective):
    """Supervised training of CLIP's image embeddings against frozen class embeddings; it has no parameters.

    Args:
        feature_dim: Dimension of the image embeddings, after the visual projection.
        num_classes: Number of classes.
        options: Options.
        class_embeddings: Text embeddings (classes, dim) in the order of the labels; normalised here.
        logit_scale: Factor of the cosine, 1/temperature: 100 for OpenAI's CLIP, whose parameter is its logarithm.

    Raises:
        ValueError: If the embeddings do not fit the features or the classes, or are not finite; or the scale is not
            above 0.
    """

    views = "one"
    needs_labels = True
    consumes = "features"
    Options = CrossEntropyOptions
    class_embeddings: Tensor
    logit_scale: Tensor

    def __init__(
        self,
        feature_dim: int,
        num_classes: int | None,
        options: CrossEntropyOptions,
        class_embeddings: Tensor,
        logit_scale: Tensor | float,
    ) -> None:
        super().__init__(feature_dim, num_classes, options)
        if tuple(class_embeddings.shape) != (num_classes, feature_dim):
            raise ValueError(
                f"class_embeddings must have shape (classes, dim) = ({num_classes}, {feature_dim}), got "
                f"{tuple(class_embeddings.shape)}: take the text tower of the same CLIP, one row per class."
            )
        scale = torch.as_tensor(logit_scale, dtype=torch.float32).detach().reshape(()).clone()
        if not scale > 0:
            raise ValueError(f"logit_scale must be above 0, got {scale.item()}: CLIP's is exp(model.logit_scale).")
        normalised = F.normalize(class_embeddings.detach().float(), dim=1)
        if not (normalised.isfinite().all() and normalised.any(1).all()):
            raise ValueError("class_embeddings holds a row that is zero or not finite: compute the embeddings again.")
        self.register_buffer("class_embeddings", normalised)
        self.register_buffer("logit_scale", scale)

    def logits(self, features: Tensor) -> Tensor:
        """Image embeddings (batch, dim) -> logits (batch, classes), fp32 also under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            return self.logit_scale * F.linear(F.normalize(features.float(), dim=1), self.class_embeddings)

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Loss and accuracy of a batch; see [`Objective.forward`]."""
        labels, features = entry(batch, "labels", self.name), model(entry(batch, "pixel_values", self.name))
        check_features(features, self.feature_dim, self.name)
        return classification_loss(self.logits(features), labels, self.options.label_smoothing)
