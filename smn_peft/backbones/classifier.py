# SPDX-License-Identifier: Apache-2.0
"""`Classifier`: a backbone and a linear head on its pooled features; `load_classifier`: with a new head or its own."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..tuner.checks import base_name
from . import from_timm, from_transformers
from .backbone import Backbone, pooled_features
from .load import load_backbone

__all__ = ["Classifier", "load_classifier"]


class Classifier(nn.Module):
    """A backbone and a head, as one model that PEFT adapts.

    `MaskConfig(modules_to_save=["head"])` masks the backbone and trains the head in full (and whatever else has a
    name that ends so, since PEFT compares the end: the last norm of timm's ConvNeXt). With the head among the
    `target_modules` its random weights are masked.

    The head is an `nn.Linear` with two more buffers, `feature_mean` and `feature_std` (dim,), that standardise its
    input. They start at 0 and 1, which changes no bit, and are saved with the head's weights.

    Args:
        backbone: A vision model whose `pooled_features` are (batch, feature_dim).
        feature_dim: Size of the features.
        num_classes: Number of classes.
        head_seed: Seed of the head's weights, which are the same in every process.
    """

    #: Where the vision model is, in transformers' words; default targets are looked for there.
    base_model_prefix = "backbone"

    def __init__(self, backbone: nn.Module, feature_dim: int, num_classes: int, *, head_seed: int = 0) -> None:
        super().__init__()
        for name, value in (("feature_dim", feature_dim), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        self.backbone = backbone
        self.head = _seeded_head(feature_dim, num_classes, head_seed)
        self.num_classes = num_classes
        self.name_or_path = base_name(backbone) or ""
        if hasattr(backbone, "config"):
            self.config = backbone.config
        self.train(backbone.training)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """(batch, 3, height, width) -> logits (batch, num_classes); `kwargs` are the backbone's."""
        return self.forward_head(self.forward_features(pixel_values, **kwargs))

    def forward_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """(batch, 3, height, width) -> pooled features (batch, feature_dim), not standardised."""
        return pooled_features(self.backbone, pixel_values, **kwargs)

    def forward_head(self, features: Tensor, *, pre_logits: bool = False) -> Tensor:
        """Features (batch, feature_dim) -> logits; `pre_logits` gives the features as they are."""
        if pre_logits:
            return features
        head: Any = self.head
        if isinstance(head, BaseTunerLayer):  # a masked layer computes without its base layer's hook
            plain: Any = head.get_base_layer()
            if plain.feature_mean.any() or (plain.feature_std != 1).any():
                fix = "train it with modules_to_save=['head'], or call set_head without mean and std"
                raise ValueError(f"The head is masked and its input standardised, which cannot be combined: {fix}.")
        return head(features.to(head.weight.dtype))

    @torch.no_grad()
    def set_head(
        self, weight: Tensor, bias: Tensor | None = None, mean: Tensor | None = None, std: Tensor | None = None
    ) -> None:
        """Set the head's values, such as a linear probe's; those of the active adapter that trains the head in full.

        Args:
            weight: (num_classes, feature_dim).
            bias: (num_classes,), zeros if None.
            mean: (feature_dim,), subtracted from the features before the head; zeros if None.
            std: (feature_dim,), by which they are then divided; ones if None.
        """
        if (wrapper := type(self.head)) not in (nn.Linear, ModulesToSaveWrapper):
            raise ValueError(f"An adapter wraps the head ({wrapper.__name__}): call set_head before get_peft_model.")
        head: Any = self.head
        values: dict[str, Tensor] = {
            "weight": weight,
            "bias": torch.zeros_like(head.bias) if bias is None else bias,
            "feature_mean": torch.zeros_like(head.feature_mean) if mean is None else mean,
            "feature_std": torch.ones_like(head.feature_std) if std is None else std,
        }
        for name, value in values.items():
            if value.shape != (expected := getattr(head, name).shape):
                raise ValueError(f"set_head: {name} must be of shape {tuple(expected)}; got {tuple(value.shape)}.")
            if not torch.isfinite(value).all():
                raise ValueError(f"set_head: {name} holds NaN or infinity: check the features that it was fitted on.")
        if zeros := int((values["feature_std"] <= 0).sum()):
            raise ValueError(f"set_head: std is not above 0 in {zeros} features: clamp it, as in std.clamp_min(1e-6).")
        for name, value in values.items():
            getattr(head, name).copy_(value)


def load_classifier(
    name: str | os.PathLike[str] | Backbone, num_classes: int | None = None, *, head_seed: int = 0, **kwargs: Any
) -> Backbone:
    """Load a pretrained vision model, by the arguments of `load_backbone`, and put a linear head on it.

    Args:
        name: What `load_backbone` takes, or a `Backbone` already loaded.
        num_classes: Number of classes of a random head; None: the head of the checkpoint.
        head_seed: See [`Classifier`].
        kwargs: Arguments of `load_backbone`.

    Returns:
        The backbone with a `Classifier` as its `model`; `features` and `feature_dim` are those before the head.

    Raises:
        ValueError: The checkpoint has no classifier that is one linear layer on `pooled_features`; or as
            `load_backbone`.
    """
    if isinstance(name, Backbone) and kwargs:
        raise ValueError(f"{', '.join(kwargs)}: {name.name} is loaded already; pass this to load_backbone.")
    backbone = name if isinstance(name, Backbone) else load_backbone(name, **kwargs)
    if num_classes is not None:
        model = Classifier(backbone.model, backbone.feature_dim, num_classes, head_seed=head_seed)
        return replace(backbone, model=model)
    if isinstance(name, Backbone) or not kwargs.get("pretrained", True):
        raise ValueError("num_classes is needed where no checkpoint is loaded, whose head could be taken.")
    revision = kwargs.get("revision")
    try:
        if hasattr(backbone.model, "timm_model"):
            weight, bias = from_timm.classifier_of(backbone, revision, kwargs.get("state_dict"))
        else:
            weight, bias = from_transformers.classifier_of(backbone, revision)
        model = Classifier(backbone.model, backbone.feature_dim, len(weight), head_seed=head_seed)
        model.set_head(weight, bias)
    except (KeyError, ValueError) as error:
        fix = "pass num_classes for a new head"
        raise ValueError(f"{os.fspath(name)} has no classifier of one linear layer ({error}): {fix}.") from error
    return replace(backbone, model=model)


def _seeded_head(feature_dim: int, num_classes: int, seed: int) -> nn.Linear:
    """nn.Linear's own distribution, U(−1/√dim, 1/√dim), from a generator of its own; fp32."""
    head = nn.utils.skip_init(nn.Linear, feature_dim, num_classes)
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(feature_dim)
    with torch.no_grad():
        for parameter in (head.weight, head.bias):
            parameter.uniform_(-bound, bound, generator=generator)
    head.register_buffer("feature_mean", torch.zeros(feature_dim))
    head.register_buffer("feature_std", torch.ones(feature_dim))
    # A hook, not a subclass: only an exact nn.Linear can be masked, and a copy of the head keeps its hook.
    head.register_forward_pre_hook(_standardise)
    return head


def _standardise(head: nn.Module, args: tuple[Any, ...]) -> Tensor:
    return (args[0] - head.feature_mean) / head.feature_std
