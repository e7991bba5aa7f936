# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy: supervised training of a model that returns logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .._options import check_options, option
from .base import Batch, Model, Objective, entry, register_objective


@dataclass(frozen=True)
class CrossEntropyOptions:
    """Options of [`CrossEntropy`]."""

    label_smoothing: float = option(0.0, "Share of the target spread over all classes.", least=0, below=1)

    def __post_init__(self) -> None:
        check_options(self)


def classification_loss(logits: Tensor, labels: Tensor, label_smoothing: float) -> dict[str, Tensor]:
    """``"loss"`` and detached ``"accuracy"`` of logits (batch, classes) of any float dtype, computed in fp32."""
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
    with torch.no_grad():
        accuracy = (logits.argmax(1) == labels).float().mean()
    return {"loss": loss, "accuracy": accuracy}


@register_objective("cross_entropy")
class CrossEntropy(Objective):
    """Cross-entropy of the model's logits; the head is the model's, trained or frozen and masked."""

    views = "one"
    needs_labels = True
    consumes = "logits"
    Options = CrossEntropyOptions

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Loss and accuracy of a batch; see [`Objective.forward`]."""
        labels, logits = entry(batch, "labels", self.name), model(entry(batch, "pixel_values", self.name))
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"{self.name} was made for {self.num_classes} classes, and the model returned "
                f"{tuple(logits.shape)}: load it with load_classifier(name, num_classes={self.num_classes})."
            )
        return classification_loss(logits, labels, self.options.label_smoothing)
