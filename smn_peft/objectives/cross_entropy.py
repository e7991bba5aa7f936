# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy: supervised training of a model that returns logits."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Batch, Model, Objective, register_objective
from .batch import images_of, labels_of

__all__ = ["CrossEntropy", "CrossEntropyOptions", "classification_loss"]


@dataclass(frozen=True)
class CrossEntropyOptions:
    """Options of [`CrossEntropy`]."""

    label_smoothing: float = field(default=0.0, metadata={"help": "Share of the target spread over all classes."})

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}.")


def classification_loss(logits: Tensor, labels: Tensor, label_smoothing: float) -> dict[str, Tensor]:
    """Cross-entropy and accuracy of a batch, in fp32.

    Args:
        logits: (batch, classes), any float dtype.
        labels: (batch,) int64.
        label_smoothing: Share of the target that is spread over all classes.

    Returns:
        ``"loss"`` and the detached ``"accuracy"``.
    """
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
        """Loss and accuracy of a batch; see [`Objective.forward`].

        Raises:
            ValueError: If images or labels are missing, or the model does not return `num_classes` logits.
        """
        labels, logits = labels_of(batch, self.name), model(images_of(batch, self.name))
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"{self.name} was made for {self.num_classes} classes, and the model returned "
                f"{tuple(logits.shape)}: load it with load_classifier(name, num_classes={self.num_classes})."
            )
        return classification_loss(logits, labels, self.options.label_smoothing)
