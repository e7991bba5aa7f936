# SPDX-License-Identifier: Apache-2.0
"""Distillation: the model's logits follow those of another model on the same images (Hinton et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._options import check_options, option
from .base import Batch, Model, Objective, register_objective


@dataclass(frozen=True)
class DistillationOptions:
    """Options of [`Distillation`]."""

    temperature: float = option(2.0, "Temperature T that both models' logits are divided by.", above=0)

    def __post_init__(self) -> None:
        check_options(self)


@register_objective("distillation")
class Distillation(Objective):
    """T² times the divergence of the model's classes from the teacher's, both at temperature T (section 2, Eq. 1).

    Args:
        feature_dim: Number of features of an image.
        num_classes: Number of the teacher's classes.
        options: Options.
        teacher: Model of the same classes, in eval mode. It sees the images that the model sees, augmented; it is no
            part of the objective's state.
    """

    views = "one"
    needs_labels = False
    consumes = "logits"
    Options = DistillationOptions

    def __init__(
        self,
        feature_dim: int,
        num_classes: int | None,
        options: DistillationOptions,
        teacher: nn.Module | None = None,
    ) -> None:
        if teacher is None:
            raise ValueError("The objective 'distillation' follows another model: use `smn convert`, or pass teacher.")
        super().__init__(feature_dim, num_classes, options)
        self._teacher = (teacher,)  # in a tuple torch does not find it, and it is not saved

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch, fp32, and ``"agreement"``, the share of images of which both say the same class."""
        images = self.entry(batch, "pixel_values")
        (teacher,) = self._teacher
        with torch.no_grad():
            wanted = teacher.to(images.device)(images).float()
        logits = model(images).float()
        if logits.shape != wanted.shape:
            made = f"the model returned {tuple(logits.shape)} and the teacher {tuple(wanted.shape)}"
            raise ValueError(f"distillation compares logits of the same classes: {made}.")
        t = self.options.temperature
        loss = F.kl_div(
            (logits / t).log_softmax(1), (wanted / t).log_softmax(1), reduction="batchmean", log_target=True
        )
        return {"loss": t * t * loss, "agreement": (logits.detach().argmax(1) == wanted.argmax(1)).float().mean()}
