# SPDX-License-Identifier: Apache-2.0
"""Supervised objectives: cross-entropy of a classifier's logits, and of CLIP's similarities to class names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .._options import check_options, option
from .base import Batch, Model, Objective, register_objective


@dataclass(frozen=True)
class CrossEntropyOptions:
    """Options of [`CrossEntropy`] and [`ZeroShot`]."""

    label_smoothing: float = option(0.0, "Share of the target spread over all classes.", least=0, below=1)

    def __post_init__(self) -> None:
        check_options(self)


class _Supervised(Objective):
    views = "one"
    needs_labels = True
    Options = CrossEntropyOptions

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``"loss"`` and detached ``"accuracy"`` of logits (batch, classes) of any float dtype, computed in fp32."""
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.options.label_smoothing)
        return {"loss": loss, "accuracy": (logits.detach().argmax(1) == labels).float().mean()}


@register_objective("cross_entropy")
class CrossEntropy(_Supervised):
    """Cross-entropy of the model's logits; the head is the model's, trained or frozen and masked."""

    consumes = "logits"

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Loss and accuracy of a batch; see [`Objective.forward`]."""
        labels, logits = self.entry(batch, "labels"), model(self.entry(batch, "pixel_values"))
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            made = f"{self.name} was made for {self.num_classes} classes, and the model returned {tuple(logits.shape)}"
            raise ValueError(f"{made}: load it with load_classifier(name, num_classes={self.num_classes}).")
        return self.loss(logits, labels)


@register_objective("zero_shot")
class ZeroShot(_Supervised):
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

    consumes = "features"
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
            wanted, found = (num_classes, feature_dim), tuple(class_embeddings.shape)
            fix = "take the text tower of the same CLIP, one row per class"
            raise ValueError(f"class_embeddings must have shape (classes, dim) = {wanted}, got {found}: {fix}.")
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
        labels, features = self.entry(batch, "labels"), self.features(model, self.entry(batch, "pixel_values"))
        return self.loss(self.logits(features), labels)
